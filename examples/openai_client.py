"""Asks `cpumoe serve` with OpenAI's own client: a completion, and a chat as a stream.

Give the address of a running server. Without one, the program starts a server of the small model
that comes with cpumoe, and stops it at the end. Needs the extras `transformers` and `serve`, and
the package `openai`.

    python openai_client.py [http://127.0.0.1:8000/v1]
"""

import re
import subprocess
import sys

from openai import OpenAI


def ask(url: str) -> None:
    """Sends both requests and prints the answers."""
    client = OpenAI(base_url=url, api_key="none is needed")
    model = client.models.list().data[0].id
    answer = client.completions.create(model=model, prompt="In the beginning", max_tokens=16)
    print(f"{model} continues: In the beginning{answer.choices[0].text}")

    messages = [{"role": "user", "content": "Tell me a story."}]
    for event in client.chat.completions.create(
        model=model, messages=messages, max_tokens=32, stream=True
    ):
        print(event.choices[0].delta.content or "", end="", flush=True)
    print()


if len(sys.argv) > 1:
    ask(sys.argv[1])
else:
    command = [sys.executable, "-m", "cpumoe", "serve", "--port", "0", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            # The first line is "serving NAME at URL (Ctrl-C stops it)".
            ask(re.search(r"http://\S+", server.stdout.readline())[0])
        finally:
            server.terminate()
