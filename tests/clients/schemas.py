"""Classes into which answers are parsed, whose documents are always short."""

from enum import Enum

from pydantic import BaseModel, ConfigDict, Field


class Colour(str, Enum):
    RED = "red"
    GREEN = "green"
    BLUE = "blue"


class Paint(BaseModel):
    """A pot of paint."""

    # Otherwise the schema admits any other fields, and a small model writes many.
    model_config = ConfigDict(extra="forbid")

    colour: Colour
    litres: int = Field(ge=1, le=9)
    glossy: bool


PAINT_TOOL = {
    "type": "function",
    "function": {
        "name": "paint",
        "description": "Orders a pot of paint.",
        "parameters": {
            "type": "object",
            "properties": {
                "colour": {"type": "string", "enum": ["red", "green", "blue"]},
                "litres": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["colour", "litres"],
            "additionalProperties": False,
        },
    },
}
