"""An HTTP server for a `TextModel`: OpenAI's and SGLang's protocols over one worker thread.

Start at `app.create_app`, `server.serve` and `settings.Settings`. Nothing is imported here: the
command line wants the settings' defaults, but not to wait for a web framework.
"""
