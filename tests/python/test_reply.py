"""Splitting of replies into reasoning, answer and tool calls, by templates' markers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpumoe.text.generation import ToolCall
from cpumoe.text.reply import reply_format

# The markers of each family's template, by which reply_format knows the family.
QWEN = "{%- if tools %}<tool_call>...</tool_call>{%- endif %}<think>...</think>"
DEEPSEEK = "<think></think><｜tool▁calls▁begin｜><｜tool▁call▁begin｜><｜tool▁sep｜>"
DSML = "{%- set token = '｜DSML｜' %}<think></think><{{ token }}invoke name="
KIMI = "<think></think><|tool_calls_section_begin|><|tool_call_begin|>"
HARMONY = "<|start|>assistant<|channel|>analysis<|message|>"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            },
        },
    }
]
CALL = ToolCall("weather", '{"city": "Oslo", "days": 2}')


def apart(format, pieces):
    """Returns text, reasoning and calls of a reply that comes in these pieces."""
    if format is None:
        return "".join(pieces), "", []
    parser = format.parser()
    found = [*map(parser.feed, pieces), parser.flush()]
    return (
        "".join(piece.text for piece in found),
        "".join(piece.reasoning for piece in found),
        [call for piece in found for call in piece.tool_calls],
    )


def check(template, reply, expected, *, prompt="<|assistant|>", tools=TOOLS):
    """The pieces in which a reply comes do not change how it is split."""
    format = reply_format(template, prompt, tools)
    text, reasoning, calls = expected
    for size in (1, 2, 3, 7, len(reply) or 1):
        pieces = [reply[i : i + size] for i in range(0, len(reply), size)]
        assert apart(format, pieces) == (text, reasoning, calls), size


HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}\n</tool_call>'
XML = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>"
)
V3 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n"
    '```json\n{"city": "Oslo", "days": 2}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
V31 = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>"
    '{"city": "Oslo", "days": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>'
)
V4 = (
    '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
    '<｜DSML｜parameter name="city" string="true">Oslo</｜DSML｜parameter>\n'
    '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n'
    "</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
)
K2 = (
    "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0"
    '<|tool_call_argument_begin|>{"city": "Oslo", "days": 2}<|tool_call_end|>'
    "<|tool_calls_section_end|>"
)
GLM = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
)
FORMS = [
    (QWEN, HERMES),
    (QWEN, XML),
    (QWEN, GLM),
    (DEEPSEEK, V3),
    (DEEPSEEK, V31),
    (DSML, V4),
    (KIMI, K2),
]


@pytest.mark.parametrize(("template", "written"), FORMS)
class TestCalls:
    def test_a_call_alone(self, template, written):
        check(template, written, ("", "", [CALL]))
        check(template, f"\n\n{written}\n", ("", "", [CALL]))

    def test_after_reasoning_and_text(self, template, written):
        reply = f"<think>\nRain?\n</think>\n\nI look it up.\n\n{written}"
        check(template, reply, ("I look it up.", "Rain?", [CALL]))
        check(template, f"Look: {written}\n{written}", ("Look:", "", [CALL, CALL]))

    def test_whose_end_ended_the_reply(self, template, written):
        format = reply_format(template, "", TOOLS)
        cut = written[: written.rindex(format.syntax.end)]
        text, _, calls = apart(format, [cut])
        assert calls == ([] if format.syntax.needs_end else [CALL])
        assert bool(text) == format.syntax.needs_end

    def test_that_was_cut_off_is_text(self, template, written):
        format = reply_format(template, "", TOOLS)
        cut = written[: written.index("Oslo")]
        text, _, calls = apart(format, [*cut])
        assert calls == []
        assert text.endswith(cut[-5:])

    def test_without_tools_is_text(self, template, written):
        check(template, f"See {written}", (f"See {written}", "", []), tools=[])

    def test_no_answer_follows(self, template, written):
        parser = reply_format(template, "", TOOLS).parser()
        assert parser.answering
        parser.feed(written)
        assert not parser.answering


def test_calls_that_are_none_are_text():
    for broken in ("<tool_call>{nonsense}</tool_call>", "<tool_call>[1]</tool_call>"):
        check(QWEN, f"a {broken} b", (f"a{broken}b", "", []))
    check(
        KIMI,
        "<|tool_call_begin|>x<|tool_call_end|>",
        ("<|tool_call_begin|>x<|tool_call_end|>", "", []),
    )


def test_arguments_come_as_the_model_wrote_them():
    reply = V31.replace('"days": 2', '"days": ')
    check(DEEPSEEK, reply, ("", "", [ToolCall("weather", '{"city": "Oslo", "days": }')]))
    reply = '<tool_call>{"name": "f", "parameters": {"é": null}}</tool_call>'
    check(QWEN, reply, ("", "", [ToolCall("f", '{"é": null}')]))
    check(QWEN, '<tool_call>{"name": "f"}</tool_call>', ("", "", [ToolCall("f", "{}")]))


def test_elements_of_unknown_tools_are_text():
    reply = XML.replace("weather", "other")
    check(QWEN, reply, ("", "", [ToolCall("other", '{"city": "Oslo", "days": "2"}')]))


@pytest.mark.parametrize("template", [QWEN, DEEPSEEK, KIMI, DSML])
@pytest.mark.parametrize("tools", [[], TOOLS])
def test_reasoning(template, tools):
    def expect(reply, *expected, prompt="<|assistant|>"):
        check(template, reply, (*expected, []), prompt=prompt, tools=tools)

    expect("<think>\nHm.\n\nYes.\n</think>\n\nGood day.", "Good day.", "Hm.\n\nYes.")
    expect("\n<think>Hm.</think>Good day.", "Good day.", "Hm.")
    expect("Hm.\n</think>\n\nGood day.", "Good day.", "Hm.", prompt="<|assistant|><think>\n")
    # The prompt has already closed the reasoning, so this is no marker.
    for behind in ("<|assistant|><think>\n\n</think>\n\n", "<|assistant|></think>"):
        expect("<think>a</think>", "<think>a</think>", "", prompt=behind)
    # A reply without reasoning is all answer, and late reasoning is not recognized.
    expect("Good day.", "Good day.", "")
    expect("  indented", "  indented", "")
    expect("One writes <think>a</think>.", "One writes <think>a</think>.", "")
    expect("<thin", "<thin", "")
    expect("<think>a</think>b</think>c", "b</think>c", "a")
    # The reply is cut off.
    expect("<think>Hm.\n", "", "Hm.")
    expect("<think>Hm.</thi", "", "Hm.</thi")
    expect("<think>", "", "")
    expect("", "", "")
    expect("<think></think>", "", "")


def test_text_comes_as_soon_as_it_is_certain():
    parser = reply_format(QWEN, "<|assistant|>", TOOLS).parser()
    assert not parser.feed("<thi")
    assert not parser.feed("nk>")
    assert parser.feed("One").reasoning == "One"
    assert parser.feed(" two <").reasoning == " two"
    assert parser.feed("3").reasoning == " <3"
    assert not parser.answering
    assert not parser.feed("</think>")
    assert parser.answering
    assert parser.feed("\n\nText <b").text == "Text <b"
    assert parser.feed(" <tool").text == ""
    assert parser.feed("box>").text == " <toolbox>"


def test_an_answer_without_calls_waits_for_nothing():
    parser = reply_format(QWEN, "<think>\n\n</think>\n\n", TOOLS).parser()
    assert parser.feed("a b").text == "a b"
    parser = reply_format(QWEN, "", []).parser()
    assert [parser.feed(text).text for text in ("a ", " \n", "<tool_call>")] == [
        "a ",
        " \n",
        "<tool_call>",
    ]


def harmony(reply, text, reasoning="", calls=()):
    check(HARMONY, reply, (text, reasoning, [*calls]))


FINAL = "<|start|>assistant<|channel|>final<|message|>"


def test_channels():
    harmony(
        f"<|channel|>analysis<|message|>Hm. <|end|>{FINAL}Good day.<|return|>", "Good day.", "Hm. "
    )
    harmony("<|channel|>final<|message|>Good day.<|return|>", "Good day.")
    harmony("<|channel|>final<|message|>Good day.", "Good day.")
    harmony(f"<|channel|>analysis<|message|>a<|end|>{FINAL}", "", "a")
    harmony(
        "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b"
        f"<|end|>{FINAL}c<|end|>",
        "c",
        "a\nb",
    )
    # A preamble belongs to the answer.
    harmony(f"<|channel|>commentary<|message|>I look.<|end|>{FINAL}Done.", "I look.\nDone.")
    # Messages without an end marker.
    harmony(f"<|channel|>analysis<|message|>a{FINAL}b", "b", "a")
    harmony("<|channel|>analysis<|message|>a<|channel|>final<|message|>b", "b", "a")


ARGUMENTS = '{"city": "Oslo", "days": 2}'


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>",
        " to=functions.weather<|channel|>commentary <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.weather json<|message|>",
    ],
)
def test_calls_on_channels(header):
    harmony(f"{header}{ARGUMENTS}<|call|>", "", "", [CALL])
    harmony(f"{header}{ARGUMENTS}", "", "", [CALL])
    start = "<|start|>assistant"
    harmony(
        f"<|channel|>analysis<|message|>a<|end|>{start}{header}{ARGUMENTS}<|call|>"
        f"{start}{header}{ARGUMENTS}<|call|>",
        "",
        "a",
        [CALL, CALL],
    )
    harmony(header + '{"city": ', '{"city": ')


def test_replies_without_channels_are_text():
    for text in ("Good day.", " to be", "t", "< 3", "", "to=me"):
        harmony(text, text)
    harmony("Good day.<|end|>", "Good day.")


def test_the_answer_of_channels_begins_late():
    parser = reply_format(HARMONY, "", []).parser()
    assert parser.answering  # unless a channel is opened
    parser.feed("<|channel|>")
    assert not parser.answering
    parser.feed("analysis<|message|>a")
    assert not parser.answering
    parser.feed("<|end|><|start|>assistant<|channel|>final")
    assert not parser.answering
    parser.feed("<|message|>")
    assert parser.answering


@pytest.mark.parametrize("template", ["", "<|im_start|>", "<tool_call>"])
def test_templates_without_markers_have_no_format(template):
    assert reply_format(template, "", []) is None


@given(st.text("<>/|thinkool_c \n"), st.sampled_from([QWEN, DEEPSEEK, KIMI, DSML, HARMONY]))
def test_no_text_breaks_a_parser_or_gets_lost(text, template):
    format = reply_format(template, "", TOOLS)
    whole = apart(format, [text])
    assert apart(format, [*text]) == whole
    if not any(marker in text for marker in format.markers):
        assert whole[0].strip() == text.strip()
