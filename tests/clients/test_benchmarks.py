"""The requests of serving benchmarks, and what they read from the answers.

Requests and readers follow vLLM's `vllm bench serve` (vllm/benchmarks/lib/endpoint_request_func.py)
and SGLang's `bench_serving` (sglang/benchmark/serving.py).
"""

import asyncio
import json

import aiohttp
import pytest

TOKENS = 10
USAGE = {"stream": True, "stream_options": {"include_usage": True}}
MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "Tell me of the sea."}]}]


async def events(url, body):
    async with aiohttp.ClientSession() as session, session.post(url, json=body) as reply:
        assert reply.status == 200, await reply.text()
        documents, buffer = [], b""
        async for chunk in reply.content.iter_any():
            buffer += chunk
            *lines, buffer = buffer.split(b"\n\n")
            lines = [line for line in lines if line and not line.startswith(b":")]
            documents += [json.loads(line[6:]) for line in lines if line != b"data: [DONE]"]
    return documents


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "The sea", "repetition_penalty": 1.0, "max_tokens": TOKENS, "logprobs": None},
        {"messages": MESSAGES, "max_completion_tokens": TOKENS},
    ],
    ids=["completions", "chat"],
)
def test_vllm(url, model, body):
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    body = {"model": model, **body, **USAGE, "ignore_eos": True}
    *texts, last = asyncio.run(events(url + path, body))
    assert all(document["choices"] for document in texts)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == TOKENS


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "The sea", "best_of": 1, "max_tokens": TOKENS},
        {"messages": MESSAGES, "max_completion_tokens": TOKENS},
    ],
    ids=["completions", "chat"],
)
def test_sglang_with_openais_protocol(url, model, body):
    path = "/v1/completions" if "prompt" in body else "/v1/chat/completions"
    body = {"model": model, "temperature": 0.0, "stream": True, "ignore_eos": True, **body}
    documents = asyncio.run(events(url + path, body))
    choices = [document["choices"][0] for document in documents]
    if "prompt" in body:
        text = "".join(choice["text"] for choice in choices)
    else:
        text = "".join(choice["delta"].get("content") or "" for choice in choices)
    assert text


@pytest.mark.parametrize("prompt", [{"text": "The sea"}, {"input_ids": [0, 53, 84]}])
@pytest.mark.parametrize("logprobs", [False, True])
def test_sglang(url, prompt, logprobs):
    body = {
        **prompt,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": TOKENS, "ignore_eos": True},
        "stream": True,
        "lora_path": "",
        "return_logprob": logprobs,
        "logprob_start_len": -1,
    }
    documents = asyncio.run(events(f"{url}/generate", body))
    counts = [document["meta_info"]["completion_tokens"] for document in documents]
    assert counts == sorted(counts)
    assert counts[-1] == TOKENS
    if logprobs:
        assert len(documents[-1]["meta_info"]["output_token_logprobs"]) == TOKENS


def test_many_at_once(url, model):
    body = {"model": model, "prompt": "The sea", "max_tokens": TOKENS, "ignore_eos": True, **USAGE}

    async def ask():
        return await asyncio.gather(*(events(f"{url}/v1/completions", body) for _ in range(8)))

    for documents in asyncio.run(ask()):
        assert documents[-1]["usage"]["completion_tokens"] == TOKENS
