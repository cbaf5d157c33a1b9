"""An HTTP server for a `TextModel`: OpenAI's and SGLang's protocols over one worker thread.

Start at `app.create_app`, `server.serve` and `settings.Settings`. Nothing is imported here, because
the command line needs the settings' defaults without waiting for a web framework.
"""
