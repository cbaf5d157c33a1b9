"""Answers that a JSON schema admits, with a real vocabulary and with one token per byte."""

import json

import pytest
import tiny_models
from moe_tools import EVERYTHING

from cpumoe.integrations.transformers import LanguageModel
from cpumoe.text.generation import Piece, Prompt, Sampling

pytest.importorskip("llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["old", "young"]}, "maxItems": 2},
        "alive": {"type": "boolean"},
    },
    "required": ["name", "age", "tags", "alive"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def embedded():
    return LanguageModel.from_pretrained()


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory):
    folder = tiny_models.gpt_oss(tmp_path_factory.mktemp("tiny"))
    tiny_models.byte_tokenizer(folder)
    return LanguageModel.from_pretrained(folder)


def ask(model, schema, text="Tell me of Moses.", **sampling):
    sampling = {"max_new_tokens": 400, "seed": 1, "json_schema": json.dumps(schema), **sampling}
    return model.generate(model.encode(text), Sampling(**sampling))


def assert_is_a_person(text):
    person = json.loads(text)
    assert set(person) == set(PERSON["required"])
    assert isinstance(person["name"], str)
    assert len(person["name"]) <= 12
    assert isinstance(person["age"], int)
    assert 0 <= person["age"] <= 150
    assert set(person["tags"]) <= {"old", "young"}
    assert isinstance(person["alive"], bool)


@pytest.mark.parametrize("seed", range(2) if EVERYTHING else [0])
@pytest.mark.parametrize("name", ["embedded", "bytes_model"])
def test_the_text_is_a_document_that_the_schema_admits(request, name, seed):
    result = ask(request.getfixturevalue(name), PERSON, temperature=1.5, seed=seed)
    assert_is_a_person(result.text)
    assert result.finish_reason == "stop"


def test_greedy_text_too(embedded):
    assert_is_a_person(ask(embedded, PERSON, temperature=0).text)


def test_the_schema_has_the_last_word(bytes_model):
    tokenizer = bytes_model.tokenizer
    brace = tokenizer.convert_tokens_to_ids("{")
    contrary = LanguageModel(
        bytes_model.model,
        tokenizer,
        "contrary",
        generation_config={"suppress_tokens": [brace], "no_repeat_ngram_size": 1},
    )
    assert_is_a_person(ask(contrary, PERSON, temperature=1, min_tokens=300).text)
    assert_is_a_person(ask(contrary, PERSON, temperature=1, ignore_eos=True).text)


def test_any_object_and_anything(embedded):
    assert isinstance(json.loads(ask(embedded, {"enum": [{"a": 1}]}).text), dict)
    assert ask(embedded, {"const": True}).text == "true"
    text = ask(embedded, True, max_new_tokens=60)
    assert text.finish_reason == "length" or json.loads(text.text) is not Ellipsis


def test_characters_of_several_tokens_are_whole(embedded):
    assert json.loads(ask(embedded, {"enum": ["é…漢字🎉"]}).text) == "é…漢字🎉"


def test_stop_strings_and_logprobs_go_along(embedded):
    result = ask(embedded, {"enum": ["one two"]}, stop=(" two",), logprobs=1)
    assert result.text == '"one'
    assert "".join(token.text for token in result.logprobs).startswith('"one')


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"type": "colour"}, "Invalid type: colour"),
        ({"not": {"type": "string"}}, "Unimplemented keys"),
        ({"type": "string", "pattern": "(?<=a)b"}, "look-around"),
        ({"$ref": "#/nowhere"}, "does not exist"),
        ({"properties": 5}, "properties must be an object"),
        (False, "object"),
    ],
)
def test_schemas_that_cannot_be_honoured_are_refused(embedded, schema, problem):
    with pytest.raises(ValueError, match=r"\Ajson_schema: ") as refused:
        ask(embedded, schema)
    assert problem in str(refused.value)
    assert "\n" not in str(refused.value)


class _Reply:
    """A format of chats whose answer comes after "</think>"."""

    markers = ("<think>", "</think>")
    openers = ()

    def __init__(self, tokens_of_reasoning):
        self._left = tokens_of_reasoning

    @property
    def answering(self):
        return self._left <= 0

    def parser(self):
        return self

    def feed(self, text):
        self._left -= 1
        return Piece(text) if self._left < 0 else Piece(reasoning=text)

    def flush(self):
        return Piece()


def test_reasoning_before_the_answer_is_free(bytes_model):
    def generate(seed):
        prompt = Prompt(bytes_model.encode("Hi").tokens, _Reply(5))
        sampling = Sampling(400, seed=seed, temperature=1, json_schema=json.dumps(PERSON))
        return bytes_model.generate(prompt, sampling)

    # Free text of random bytes may end the reply, or inside a character, whose rest then precedes
    # the document. Which seeds do so depends on the variant.
    answers = map(generate, range(1, 20))
    result = next(answer for answer in answers if answer.text.lstrip().startswith("{"))
    assert_is_a_person(result.text)
    assert not result.reasoning.startswith("{")
