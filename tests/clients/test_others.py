"""Request shapes of clients that are no Python packages, and clients of other protocols.

The shapes follow Open WebUI (backend/open_webui/utils/payload.py), LibreChat
(packages/data-provider) and Continue (core/llm/openaiTypeConverters.ts).
"""

import httpx
import pytest

PENALTIES = {"frequency_penalty": 0, "presence_penalty": 0}


@pytest.mark.parametrize(
    "fields",
    [
        {"stream": False, "temperature": 0.8, "top_p": 1.0, "seed": 5, "stop": [], **PENALTIES},
        {"stream": True, "stream_options": {"include_usage": True}, "user": "65f0", **PENALTIES},
        {
            "stream": True,
            "top_p": None,
            "stop": ["<|im_end|>", "</s>", "<|eot_id|>", "[/INST]", "USER:", "\nHuman:"],
            "tools": None,
            "prediction": None,
        },
    ],
    ids=["Open WebUI", "LibreChat", "Continue"],
)
def test_chat(url, model, conversation, fields):
    body = {"model": model, "messages": conversation, "max_tokens": 12, **fields}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    assert ("data: [DONE]" in reply.text) == fields["stream"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/api/chat"),
        ("POST", "/api/generate"),
        ("GET", "/api/tags"),
        ("GET", "/api/version"),
    ],
)
def test_clients_of_ollama_are_told_which_protocols_there_are(url, method, path):
    body = {"model": "llama3", "messages": [{"role": "user", "content": "hi"}]}
    reply = httpx.request(method, url + path, json=body if method == "POST" else None)
    assert reply.status_code == 404
    message = reply.json()["error"]["message"]
    assert path in message
    assert "/v1/chat/completions" in message
