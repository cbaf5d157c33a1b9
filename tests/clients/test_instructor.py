"""Instructor: objects of a class, in each of its modes."""

import instructor
import openai
import pytest
from schemas import Paint


# Mode JSON leaves the schema to the prompt, which needs a larger model.
@pytest.mark.parametrize("mode", ["TOOLS", "JSON_SCHEMA"])
def test_objects(url, model, conversation, mode):
    plain = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
    client = instructor.from_openai(plain, mode=instructor.Mode[mode])
    paint = client.chat.completions.create(
        model=model, messages=conversation, response_model=Paint, max_retries=0
    )
    assert isinstance(paint, Paint)
