"""Chats with a real tokenizer and model: templates, tools, and splitting of replies."""

import contextlib
import json

import pytest
import tiny_models

from cpumoe.integrations.transformers import LanguageModel
from cpumoe.text.generation import Sampling as _Sampling
from cpumoe.text.generation import ToolCall

HARMONY = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"]
TEMPLATES = {
    "harmony": "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{% if m.thinking %}({{ m.thinking }}){% endif %}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}<|end|>"
    "{% endfor %}<|start|>assistant{# <|channel|> #}",
    "qwen": "{% if tools %}{{ tools | tojson }}<tool_call></tool_call>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{% endfor %}"
    "<|assistant|>{% if think is defined and not think %}<think>\n\n</think>\n\n{% endif %}",
}
QUESTION = [{"role": "user", "content": "Hi"}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tiny_models.gpt_oss(tmp_path_factory.mktemp("tiny"))
    tiny_models.byte_tokenizer(folder)
    return LanguageModel.from_pretrained(folder).model


@pytest.fixture
def chat(base, tmp_path):
    def make(kind):
        tokenizer = tiny_models.byte_tokenizer(tmp_path, TEMPLATES[kind])
        markers = HARMONY if kind == "harmony" else ["<think>", "</think>"]
        tokenizer.add_tokens(markers, special_tokens=kind == "harmony")
        ends = [2, *tokenizer.convert_tokens_to_ids(["<|return|>", "<|call|>"])]
        config = {"eos_token_id": ends if kind == "harmony" else 2}
        return LanguageModel(base, tokenizer, kind, generation_config=config)

    return make


def Sampling(**asked):  # noqa: N802
    return _Sampling(**{"max_new_tokens": 200, "temperature": 0, **asked})


@contextlib.contextmanager
def saying(model, text):
    """Makes a model say a text, and then its end token."""
    left = [*model.tokenizer(text, add_special_tokens=False)["input_ids"]]

    def prefer(_, __, logits):
        logits = logits.clone()
        logits[..., left.pop(0) if left else 2] += 1000
        return logits

    handle = model.model.lm_head.register_forward_hook(prefer)
    try:
        yield left
    finally:
        handle.remove()


def ask(model, reply, *, tools=(), arguments=None, **sampling):
    prompt = model.encode_chat(QUESTION, tools=tools, template_arguments=arguments)
    pieces = []
    with saying(model, reply):
        result = model.generate(prompt, Sampling(**sampling), on_piece=pieces.append)
    assert "".join(piece.text for piece in pieces) == result.text
    assert "".join(piece.reasoning for piece in pieces) == result.reasoning
    assert tuple(call for piece in pieces for call in piece.tool_calls) == result.tool_calls
    return result


REPLY = (
    "<|channel|>analysis<|message|>The end? No.<|end|>"
    "<|start|>assistant<|channel|>final<|message|>Good day. The end.<|return|>"
)


def test_channels_are_reasoning_and_answer(chat):
    result = ask(chat("harmony"), REPLY)
    assert (result.text, result.reasoning) == ("Good day. The end.", "The end? No.")
    assert (result.finish_reason, result.tool_calls) == ("stop", ())


def test_a_completion_is_not_taken_apart(chat):
    model = chat("harmony")
    with saying(model, REPLY):
        result = model.generate(model.encode("Once"), Sampling())
    assert result.text == "analysisThe end? No.assistantfinalGood day. The end."
    with saying(model, REPLY):
        result = model.generate(model.encode("Once"), Sampling(skip_special_tokens=False))
    assert result.text == REPLY.removesuffix("<|return|>")


def test_a_call_is_ended_by_an_end_token(chat):
    reply = '<|channel|>commentary to=functions.weather<|message|>{"city": "Oslo"}<|call|>'
    result = ask(chat("harmony"), reply)
    assert result.tool_calls == (ToolCall("weather", '{"city": "Oslo"}'),)
    assert (result.text, result.finish_reason) == ("", "stop")


def test_stop_strings_end_the_answer_and_not_the_reasoning(chat):
    result = ask(chat("harmony"), REPLY, stop=("The end",))
    assert (result.text, result.reasoning) == ("Good day. ", "The end? No.")
    assert result.finish_reason == "stop"
    # A marker is a token, and ends the text around it.
    result = ask(chat("harmony"), REPLY, stop=("<|end|>",))
    assert (result.text, result.reasoning) == ("", "The end? No.")


def test_a_reply_that_is_cut_off_keeps_what_came(chat):
    result = ask(chat("harmony"), REPLY, max_new_tokens=16)
    assert (result.text, result.finish_reason) == ("", "length")
    assert "The end?".startswith(result.reasoning)
    assert result.reasoning


def test_thinking_markers(chat):
    model = chat("qwen")
    result = ask(model, "<think>\nHm.\n</think>\n\nGood day.")
    assert (result.text, result.reasoning) == ("Good day.", "Hm.")
    closed = ask(model, "Good day.", arguments={"think": False})
    assert (closed.text, closed.reasoning) == ("Good day.", "")


def test_calls_between_markers(chat):
    model = chat("qwen")
    reply = 'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    result = ask(model, reply, tools=TOOLS)
    assert (result.text, result.tool_calls) == ("Let me see.", (ToolCall("weather", "{}"),))
    assert ask(model, reply).text == reply


def test_templates_get_tools_reasoning_and_arguments_as_objects(chat):
    qwen, harmony = chat("qwen"), chat("harmony")
    prompt = qwen.decode(qwen.encode_chat(QUESTION, tools=TOOLS).tokens)
    assert json.dumps(TOOLS) in prompt
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    history = [
        *QUESTION,
        {"role": "assistant", "content": "", "reasoning_content": "why", "tool_calls": [call]},
        {"role": "user", "content": "x"},
    ]
    assert '{"a": [1]}' in harmony.decode(harmony.encode_chat(history).tokens)
    assert "(why)" in harmony.decode(harmony.encode_chat(history).tokens)
    assert "(why)" in qwen.decode(qwen.encode_chat(history).tokens)
    history[1]["content"] = None
    assert "None" not in qwen.decode(qwen.encode_chat(history[:2]).tokens)


def rendered(chat, template, messages):
    model = chat("qwen")
    model.tokenizer.chat_template = template
    return model.decode(model.encode_chat(messages).tokens)


def called(*identifiers, content=None):
    calls = [
        {"id": i, "type": "function", "function": {"name": f"f{i}", "arguments": '{"a": 1}'}}
        for i in identifiers
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls}


def test_templates_that_want_arguments_as_text_get_them_so(chat):
    # DeepSeek's templates do so, and there is always some content.
    template = (
        "{% for m in messages %}{{ m.content + '' }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    assert rendered(chat, template, [*QUESTION, called("x")]) == 'Hifx{"a": 1}'


def test_arguments_nested_too_deeply_to_be_read_stay_text(chat):
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}"
        "{{ c.function.arguments | length }}{% endfor %}{% endfor %}"
    )
    message = called("x")
    message["tool_calls"][0]["function"]["arguments"] = "[" * 100_000 + "]" * 100_000
    assert rendered(chat, template, [message]) == "200000"


def test_templates_that_write_identifiers_get_the_models_own(chat):
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}<|tool_call_begin|>{{ c.id }}"
        "{% endfor %}{{ m.tool_call_id or '' }};{% endfor %}"
    )
    answers = [{"role": "tool", "content": "x", "tool_call_id": i} for i in ("p", "q", "lost")]
    history = [called("p", "q"), *answers, called("r")]
    assert rendered(chat, template, history) == (
        "<|tool_call_begin|>functions.fp:0<|tool_call_begin|>functions.fq:1;"
        "functions.fp:0;functions.fq:1;lost;<|tool_call_begin|>functions.fr:2;"
    )
    # Some clients number calls anew in each reply.
    history = [called("p"), answers[0]] * 3
    assert rendered(chat, template, history) == "".join(
        f"<|tool_call_begin|>functions.fp:{i};functions.fp:{i};" for i in range(3)
    )


def test_reasoning_does_not_go_where_a_template_refuses_it(chat):
    # gpt-oss' template does so beside the text of a message with calls.
    template = (
        "{% for m in messages %}{% if m.content and m.thinking and m.tool_calls %}"
        "{{ raise_exception('both') }}{% endif %}{{ m.thinking }}{{ m.content }}{% endfor %}"
    )
    message = {**called("x", content="Look:"), "reasoning_content": "why"}
    assert rendered(chat, template, [message]) == "Look:"
    assert rendered(chat, template, [{**message, "content": ""}]) == "why"


def test_template_arguments_are_the_templates_alone(chat):
    model = chat("qwen")
    for name in ("tokenize", "chat_template", "add_generation_prompt", "return_dict"):
        with pytest.raises(
            ValueError, match=f"template arguments: expected .* got reserved: {name}"
        ):
            model.encode_chat(QUESTION, template_arguments={name: True})


def test_messages_that_no_json_holds_are_refused(chat):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(ValueError, match="messages: expected values that JSON can"):
        chat("qwen").encode_chat([{"role": "user", "content": deep}])


def test_logprobs_tell_all_tokens_of_a_reply(chat):
    result = ask(chat("harmony"), REPLY, logprobs=0)
    assert "".join(token.text for token in result.logprobs) == REPLY
    assert len(result.logprobs) == result.completion_tokens


@pytest.mark.parametrize(
    ("kind", "begin", "reasoning"),
    [
        ("harmony", '"', ""),
        (
            "harmony",
            "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>",
            "Hm.",
        ),
        ("qwen", '"', ""),
        ("qwen", "<think>Hm.</think>", "Hm."),
    ],
)
def test_a_schema_holds_for_the_answer(chat, kind, begin, reasoning):
    pytest.importorskip("llguidance")
    result = ask(chat(kind), begin, json_schema='{"enum": ["yes", "no"]}')
    assert json.loads(result.text) in ("yes", "no")
    assert (result.reasoning, result.finish_reason) == (reasoning, "stop")


def test_a_schema_does_not_hold_for_calls(chat):
    pytest.importorskip("llguidance")
    reply = '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'
    model = chat("qwen")
    model.tokenizer.add_tokens(["<tool_call>", "</tool_call>"])
    model = LanguageModel(model.model, model.tokenizer, "calls", generation_config={})
    result = ask(model, reply, tools=TOOLS, json_schema='{"enum": ["yes", "no"]}')
    assert (result.text, result.tool_calls) == ("", (ToolCall("weather", "{}"),))
