"""Server and chat with a real, tiny model give the model's text."""

import json

import pytest
import tiny_models
from serving_tools import Server, wait_for
from typer.testing import CliRunner

from cpumoe.cli import app
from cpumoe.integrations.transformers import ExpertsOptions, LanguageModel, perplexity
from cpumoe.text.generation import Sampling

QUESTION = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tiny_models.deepseek_v4(tmp_path_factory.mktemp("tiny"))
    tiny_models.byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    # As the command `chat` loads it.
    return LanguageModel.from_pretrained(folder, options=ExpertsOptions(attention="native"))


@pytest.fixture(scope="module")
def server(model):
    with Server(model) as running:
        yield running


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1, "seed": 5}])
def test_all_ways_give_the_models_text(server, model, sampling):
    expected = model.generate(model.encode("Once"), Sampling(max_new_tokens=9, **sampling))
    with server.client() as client:
        ask = {"model": model.name, "prompt": "Once", "max_tokens": 9, **sampling}
        reply = client.completions.create(**ask)
        streamed = [
            chunk.choices[0].text for chunk in client.completions.create(**ask, stream=True)
        ]
    native = {"max_new_tokens": 9, "temperature": sampling["temperature"]}
    native["sampling_seed"] = sampling.get("seed")
    body = {"input_ids": model.encode("Once").tokens, "sampling_params": native}
    assert reply.choices[0].text == expected.text
    assert "".join(streamed) == expected.text
    assert server.http.post("/generate", json=body).json()["text"] == expected.text
    assert reply.usage.completion_tokens == expected.completion_tokens
    assert reply.choices[0].finish_reason == expected.finish_reason


def test_chat(server, model, folder):
    expected = model.generate(model.encode_chat(QUESTION), Sampling(9, 0)).text
    with server.client() as client:
        reply = client.chat.completions.create(
            model=model.name, messages=QUESTION, max_tokens=9, temperature=0
        )
    assert reply.choices[0].message.content == expected
    options = ["--max-tokens", "9", "--temperature", "0"]
    for target in (str(folder), server.url):
        result = CliRunner().invoke(app, ["chat", target, *options], input="Hi\n")
        assert result.exit_code == 0, result.output
        assert result.stdout_bytes.decode() == f"{expected}\n"


def test_a_prompts_log_probabilities_are_those_of_its_perplexity(server, model):
    text = "In the beginning"
    expected = perplexity(model.model, model.encode(text).tokens, window=64)
    with server.client() as client:
        ask = {"model": model.name, "prompt": text, "echo": True, "logprobs": 2}
        choice = client.completions.create(**ask, max_tokens=0).choices[0]
    first, *others = choice.logprobs.token_logprobs
    assert first is None
    assert choice.text == text
    assert -sum(others) == pytest.approx(expected.nats_per_token * expected.scored_tokens, rel=1e-2)
    body = {"text": text, "return_logprob": True, "logprob_start_len": 0}
    body["sampling_params"] = {"max_new_tokens": 0}
    information = server.http.post("/generate", json=body).json()["meta_info"]
    rows = information["input_token_logprobs"]
    assert [row[0] for row in rows] == [None, *map(pytest.approx, others)]
    assert [row[1] for row in rows] == [*model.encode(text).tokens]


def test_log_probabilities_of_a_stream_are_those_of_the_whole(server, model):
    ask = {"model": model.name, "messages": QUESTION, "max_tokens": 9, "temperature": 0}
    ask |= {"logprobs": True, "top_logprobs": 2}
    with server.client() as client:
        whole = client.chat.completions.create(**ask).choices[0]
        chunks = [chunk.choices[0] for chunk in client.chat.completions.create(**ask, stream=True)]
    streamed = [token for chunk in chunks if chunk.logprobs for token in chunk.logprobs.content]
    assert 0 < len(streamed) <= 9
    assert [token.bytes for token in streamed] == [t.bytes for t in whole.logprobs.content]
    for token in whole.logprobs.content:
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob


def test_a_call_that_must_be_has_arguments_of_its_schema(server, model):
    properties = {"colour": {"enum": ["red", "green"]}, "glossy": {"type": "boolean"}}
    parameters = {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }
    tools = [{"type": "function", "function": {"name": "paint", "parameters": parameters}}]
    named = {"type": "function", "function": {"name": "paint"}}
    with server.client() as client:
        for choice in ("required", named):
            reply = client.chat.completions.create(
                model=model.name,
                messages=QUESTION,
                tools=tools,
                tool_choice=choice,
                parallel_tool_calls=False,
                temperature=0,
            )
            assert reply.choices[0].finish_reason == "tool_calls"
            (call,) = reply.choices[0].message.tool_calls
            assert call.function.name == "paint"
            assert {*json.loads(call.function.arguments)} == {"colour", "glossy"}


def test_a_schema_that_cannot_be_honoured_is_the_requests_fault(server):
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wizard"}}}
    body = {"messages": QUESTION, "response_format": form}
    status, error = server.refuse("/v1/chat/completions", body)
    assert (status, error["param"]) == (400, "response_format")


def test_refusals_of_the_model(server):
    unknown = {"prompt": [1, 10**6]}
    assert server.refuse("/v1/completions", unknown)[1]["param"] == "prompt"
    too_long = {"prompt": "x" * 600}
    assert server.refuse("/v1/completions", too_long)[1]["code"] == "context_length_exceeded"


def test_a_disconnect_stops_the_model(server, model, monkeypatch):
    generate = model.generate
    results = []

    def generate_until_the_client_left(prompt, sampling, *, on_piece, cancelled):
        def pass_on(piece):
            on_piece(piece)
            wait_for(cancelled)  # otherwise the model might be faster than the client

        results.append(generate(prompt, sampling, on_piece=pass_on, cancelled=cancelled))
        return results[0]

    monkeypatch.setattr(model, "generate", generate_until_the_client_left)
    # Without this, the random model may end before its first piece of text.
    body = {"prompt": "Once", "max_tokens": 500, "stream": True, "ignore_eos": True}
    with server.http.stream("POST", "/v1/completions", json=body) as reply:
        chunks = (
            reply.iter_raw()
        )  # a name, because an iterator that is collected closes the connection
        next(chunks)
        assert not results
    wait_for(lambda: results)
    assert results[0].finish_reason == "cancelled"
    assert results[0].completion_tokens < 500
