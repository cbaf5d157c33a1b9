"""Server and chat with a real, tiny model: they say what the model says."""

import pytest
import tiny_models
from serving_tools import Server, wait_for
from typer.testing import CliRunner

from cpumoe.cli import app
from cpumoe.generation import Sampling
from cpumoe.integrations.transformers import LanguageModel

QUESTION = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tiny_models.deepseek_v4(tmp_path_factory.mktemp("tiny"))
    tiny_models.byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return LanguageModel.from_pretrained(folder)


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


def test_refusals_of_the_model(server):
    unknown = {"prompt": [1, 10**6]}
    assert server.refuse("/v1/completions", unknown)[1]["param"] == "prompt"
    too_long = {"prompt": "x" * 600}
    assert server.refuse("/v1/completions", too_long)[1]["code"] == "context_length_exceeded"


def test_a_disconnect_stops_the_model(server):
    worker = server.app.state.service.worker
    body = {"prompt": "Once", "max_tokens": 500, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as reply:
        next(reply.iter_raw())
        assert not worker.idle
    wait_for(lambda: worker.idle)
