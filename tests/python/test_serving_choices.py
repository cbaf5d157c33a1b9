"""Several texts per request, and log probabilities, in both protocols."""

import json

import pytest
from fake_model import FakeModel
from serving_tools import Server, error_of, wait_for

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/generate"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def server():
    with Server() as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as openai_client:
        yield openai_client


def events(server, path, **body):
    reply = server.http.post(path, json={**body, "stream": True})
    assert reply.status_code == 200, reply.text
    *lines, done, end = reply.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_several_answers_differ_in_their_seeds(server, client):
    reply = client.chat.completions.create(model="fake", messages=HELLO, n=3, seed=7)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert {choice.message.content for choice in reply.choices} == {" 1 2 3 4 5"}
    seeds = [sampling.seed for sampling in server.model.samplings[-3:]]
    assert seeds[0] == 7
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    # The prompt counts once.
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (11, 18)
    client.chat.completions.create(model="fake", messages=HELLO, n=2)
    assert [sampling.seed for sampling in server.model.samplings[-2:]] == [None, None]


@pytest.mark.parametrize("prompts", [["a", "bc"], [[97], [98, 99]]])
def test_several_prompts(server, client, prompts):
    reply = client.completions.create(model="fake", prompt=prompts, n=2, max_tokens=2)
    assert server.model.prompts[-4:] == ["a", "a", "bc", "bc"]
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in reply.choices] == [" 1 2"] * 4
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (3, 8)


def test_several_answers_stream(client):
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = [*client.chat.completions.create(model="fake", messages=HELLO, n=2, **options)]
    usage = chunks.pop()
    assert (usage.choices, usage.usage.completion_tokens) == ([], 12)
    assert all(chunk.usage is None for chunk in chunks)
    for index in range(2):
        choices = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert (choices[0].delta.role, choices[0].delta.content) == ("assistant", "")
        assert "".join(choice.delta.content or "" for choice in choices) == " 1 2 3 4 5"
        reasons = [choice.finish_reason for choice in choices]
        assert reasons == [None] * (len(reasons) - 1) + ["stop"]
    chunks = [*client.completions.create(model="fake", prompt=["a", "b"], stream=True)]
    assert [chunk.choices[0].index for chunk in chunks] == sorted(
        chunk.choices[0].index for chunk in chunks
    )
    assert {chunk.choices[0].index for chunk in chunks} == {0, 1}


def test_usage_in_every_event(server):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *texts, last = events(server, COMPLETIONS, prompt="ab", stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in [*texts, last]]
    assert counts == sorted(counts)
    assert (counts[0] > 0, counts[-1]) == (True, 6)
    assert all(event["usage"]["prompt_tokens"] == 2 for event in texts)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (CHAT, {"messages": HELLO, "n": 4}, "n"),
        (COMPLETIONS, {"prompt": ["a", "b", "c", "d"]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 2}, "n"),
        (GENERATE, {"text": ["a", "b", "c", "d"]}, "text"),
        (GENERATE, {"text": "a", "sampling_params": {"n": 10**9}}, "n"),
    ],
)
def test_a_request_for_more_texts_than_the_queue_holds_is_refused(path, body, param):
    with Server(queue=2) as server:
        status, error = server.refuse(path, body)
        assert (status, error["param"], error["code"]) == (400, param, "too_many_texts")
        assert "at most 3 texts" in error["message"]
        assert server.http.post(COMPLETIONS, json={"prompt": ["a"] * 3}).status_code == 200


def test_all_texts_of_a_request_find_room_or_none():
    with Server(FakeModel(end=10**6, delay=0.01), queue=2) as server:
        worker = server.app.state.service.worker
        with server.http.stream("POST", COMPLETIONS, json={"prompt": "x", "stream": True}) as reply:
            # Kept, because dropping it closes the connection.
            chunks = reply.iter_raw()
            next(chunks)
            refused = server.http.post(COMPLETIONS, json={"prompt": ["a"] * 3})
            assert (refused.status_code, error_of(refused)["code"]) == (503, "overloaded")
            assert worker.waiting == 0
        wait_for(lambda: worker.idle)


def test_a_client_that_leaves_withdraws_all_texts_of_its_request():
    with Server(FakeModel(end=10**6, delay=0.01)) as server:
        worker = server.app.state.service.worker
        body = {"prompt": ["a"] * 5, "stream": True, "max_tokens": 900}
        with server.http.stream("POST", COMPLETIONS, json=body) as reply:
            # Kept, because dropping it closes the connection.
            chunks = reply.iter_raw()
            next(chunks)
            assert worker.waiting == 4
        wait_for(lambda: worker.idle)
        assert len(server.model.prompts) == 1


def test_a_text_that_fails_fails_its_request():
    with Server() as server:
        server.model.context_length = 10
        status, error = server.refuse(COMPLETIONS, {"prompt": ["a", "b" * 20]})
        assert (status, error["code"]) == (400, "context_length_exceeded")
        reply = server.http.post(COMPLETIONS, json={"prompt": ["a", "b" * 20], "stream": True})
        assert reply.status_code == 200
        *_, last, done, _ = reply.text.split("\n\n")
        assert json.loads(last[6:])["error"]["code"] == "context_length_exceeded"
        assert done == "data: [DONE]"


def test_log_probabilities_of_a_chat(client):
    reply = client.chat.completions.create(
        model="fake", messages=HELLO, logprobs=True, top_logprobs=2
    )
    tokens = reply.choices[0].logprobs.content
    assert [token.token for token in tokens] == [" 1", " 2", " 3", " 4", " 5"]
    assert tokens[1].logprob == pytest.approx(-0.2)
    assert bytes(tokens[1].bytes) == b" 2"
    assert [top.token for top in tokens[1].top_logprobs] == ["<0>", "<1>"]
    reply = client.chat.completions.create(model="fake", messages=HELLO, logprobs=True)
    assert reply.choices[0].logprobs.content[0].top_logprobs == []
    reply = client.chat.completions.create(model="fake", messages=HELLO)
    assert reply.choices[0].logprobs is None


def test_log_probabilities_of_a_chat_stream(client):
    stream = client.chat.completions.create(
        model="fake", messages=HELLO, logprobs=True, top_logprobs=1, stream=True
    )
    choices = [chunk.choices[0] for chunk in stream]
    tokens = [token for c in choices if c.logprobs for token in c.logprobs.content]
    assert [token.token for token in tokens] == [" 1", " 2", " 3", " 4", " 5"]
    for choice in choices:
        if choice.logprobs:
            assert choice.delta.content == "".join(t.token for t in choice.logprobs.content)


@pytest.mark.parametrize("stream", [True, False])
def test_log_probabilities_of_a_completion(client, stream):
    reply = client.completions.create(
        model="fake", prompt="ab", max_tokens=3, logprobs=2, stream=stream
    )
    parts = [chunk.choices[0].logprobs for chunk in (reply if stream else [reply])]
    tokens = [token for part in parts for token in part.tokens]
    assert tokens == [" 1", " 2", " 3"]
    assert [p for part in parts for p in part.token_logprobs] == pytest.approx([-0.1, -0.2, -0.3])
    # The alternatives include the token itself.
    top = [top for part in parts for top in part.top_logprobs]
    assert top[2] == pytest.approx({"<0>": 0.0, "<1>": -0.1, " 3": -0.3})
    assert [offset for part in parts for offset in part.text_offset] == [0, 2, 4]


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
@pytest.mark.parametrize("stream", [True, False])
def test_echo(client, prompt, stream):
    reply = client.completions.create(
        model="fake", prompt=prompt, echo=True, max_tokens=2, stream=stream
    )
    choices = [chunk.choices[0] for chunk in (reply if stream else [reply])]
    assert "".join(choice.text for choice in choices) == "ab 1 2"
    assert choices[-1].finish_reason == "length"


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
@pytest.mark.parametrize("stream", [True, False])
def test_echo_with_log_probabilities(client, prompt, stream):
    reply = client.completions.create(
        model="fake", prompt=prompt, echo=True, logprobs=1, max_tokens=1, stream=stream
    )
    choices = [chunk.choices[0] for chunk in (reply if stream else [reply])]
    (choice,) = [choice for choice in choices if choice.logprobs and choice.logprobs.tokens]
    logprobs = choice.logprobs
    assert choice.text == "ab 1"
    assert logprobs.tokens == ["a", "b", " 1"]
    assert logprobs.token_logprobs == [None, pytest.approx(-9.8), pytest.approx(-0.1)]
    assert logprobs.top_logprobs[0] is None
    assert logprobs.top_logprobs[1] == pytest.approx({"<0>": 0.0, "b": -9.8})
    assert logprobs.text_offset == [0, 1, 2]


def test_a_prompt_can_be_scored_alone(server, client):
    reply = client.completions.create(
        model="fake", prompt="x" * 1000, echo=True, logprobs=0, max_tokens=0
    )
    assert reply.choices[0].text == "x" * 1000
    assert len(reply.choices[0].logprobs.tokens) == server.model.context_length == 1000
    assert reply.usage.completion_tokens == 0


def test_offsets_of_an_echo_begin_with_the_text(server, client):
    """The tokenizer may put a token before the prompt."""
    encode = server.model.encode
    server.model.encode = lambda text, **_: encode("<s>" + text)
    try:
        reply = client.completions.create(
            model="fake", prompt="ab", echo=True, logprobs=0, max_tokens=1
        )
    finally:
        del server.model.encode
    logprobs = reply.choices[0].logprobs
    assert reply.choices[0].text == "ab 1"
    assert logprobs.tokens == ["<", "s", ">", "a", "b", " 1"]
    assert logprobs.text_offset == [0, 0, 0, 0, 1, 2]


def test_sglangs_log_probabilities(server):
    body = {
        "text": "abc",
        "return_logprob": True,
        "logprob_start_len": 1,
        "top_logprobs_num": 1,
        "return_text_in_logprobs": True,
        "sampling_params": {"max_new_tokens": 2},
    }
    information = server.http.post(GENERATE, json=body).json()["meta_info"]
    # The first requested token has none, as in SGLang's answers.
    assert information["input_token_logprobs"] == [
        [None, 98, "b"],
        [pytest.approx(-9.9), 99, "c"],
    ]
    assert information["input_top_logprobs"] == [None, [[0.0, 0, "<0>"]]]
    assert information["output_token_logprobs"] == [
        [pytest.approx(-0.1), 1, " 1"],
        [pytest.approx(-0.2), 2, " 2"],
    ]
    assert information["output_top_logprobs"] == [[[0.0, 0, "<0>"]]] * 2
    body |= {"logprob_start_len": -1, "return_text_in_logprobs": False, "top_logprobs_num": 0}
    information = server.http.post(GENERATE, json=body).json()["meta_info"]
    assert information["input_token_logprobs"] == []
    assert information["output_token_logprobs"][0] == [pytest.approx(-0.1), 1, None]
    assert "output_top_logprobs" not in information
    stream = events(server, GENERATE, **body)
    assert len(stream[-1]["meta_info"]["output_token_logprobs"]) == 2


@pytest.mark.parametrize(
    "prompts", [{"text": ["a", "bc"]}, {"input_ids": [[97], [98, 99]]}, {"text": ["a"]}]
)
def test_sglang_answers_a_list_with_a_list(server, prompts):
    body = {**prompts, "sampling_params": {"max_new_tokens": 1, "n": 2}, "rid": "mine"}
    replies = server.http.post(GENERATE, json=body).json()
    count = 2 * len(next(iter(prompts.values())))
    assert [reply["text"] for reply in replies] == [" 1"] * count
    ids = [reply["meta_info"]["id"] for reply in replies]
    assert len(set(ids)) == count
    assert all(name.startswith("mine") for name in ids)
    stream = events(server, GENERATE, **body)
    assert {event["index"] for event in stream} == {*range(count)}
    last = {event["index"]: event for event in stream}
    assert [last[index]["text"] for index in range(count)] == [" 1"] * count
