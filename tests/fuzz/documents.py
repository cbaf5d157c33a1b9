"""JSON documents that are nearly right: sound documents with a few changes."""

import copy
import json

from hypothesis import strategies as st

_DEEP = 100_000


def nested(depth):
    """A list in a list in a list."""
    value = []
    for _ in range(depth):
        value = [value]
    return value


# Wrong values instead of a number, a text or a list.
ODD_VALUES = (
    None,
    True,
    False,
    0,
    -1,
    1,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    -float("inf"),
    2**31,
    2**63,
    2**64,
    10**400,
    "",
    "x" * 70_000,
    "\0",
    "\n\r\x1b[2J",
    "\ud800",
    "ß‮😀",
    "../../etc/passwd",
    "/dev/zero",
    "re:" + "(a+)+" * 30 + "$",
    "re:" + "(" * 500,
    "{% for x in range(9**9) %}",
    [],
    {},
    [[]],
    [None] * 300,
    ["a" * 900] * 30,
    {str(i): i for i in range(300)},
    nested(50),  # copying it takes two Python calls a level
)


def places(document, at=()):
    """The path of each value in a document; the document's own, (), comes first."""
    yield at
    if isinstance(document, dict):
        items = document.items()
    else:
        items = enumerate(document) if isinstance(document, list) else ()
    for key, value in items:
        yield from places(value, (*at, key))


def _value(document, place):
    for key in place:
        document = document[key]
    return document


# Functions of `draw` instead of strategies, because Hypothesis keeps strategies of large texts.
def changed(draw, documents):
    """Draws one of the documents, with up to four changes."""
    document = copy.deepcopy(draw(st.sampled_from(documents)))
    for _ in range(draw(st.integers(0, 4))):
        document = _change(draw, document)
    return document


def _change(draw, document):
    paths = list(places(document))
    place = paths[draw(st.integers(0, len(paths) - 1))]
    other = paths[draw(st.integers(0, len(paths) - 1))]
    odd = ODD_VALUES[draw(st.integers(0, len(ODD_VALUES) - 1))]
    kind = draw(st.sampled_from(["odd", "odd", "another's", "number", "text"]))
    if kind == "number":
        new = draw(st.integers())
    elif kind == "text":
        new = draw(st.text(max_size=30))
    else:
        new = copy.deepcopy(odd if kind == "odd" else _value(document, other))
    if not place:
        return draw(st.sampled_from([lambda: new, lambda: [document]]))()
    *way, key = place
    owner = _value(document, way)
    action = draw(st.sampled_from(["set", "set", "remove", "add"]))
    if action == "set":
        owner[key] = new
    elif action == "remove":
        del owner[key]
    elif isinstance(owner, dict):
        owner[draw(st.sampled_from(["error", "name", "text_config", "", f"{key}x"]))] = new
    else:
        owner.insert(key, new)
    return document


def damaged(draw, data):
    """Draws bytes as a broken disk, a broken connection or another program would leave them."""
    data = bytearray(data)
    action = draw(
        st.sampled_from(["", "", "", "cut", "flip", "insert", "repeat", "deep", "utf-16"])
    )
    at = draw(st.integers(0, max(0, len(data) - 1)))
    if action == "cut":
        del data[at:]
    elif action == "flip" and data:
        data[at] ^= draw(st.integers(1, 255))
    elif action == "insert":
        data[at:at] = draw(st.binary(max_size=20) | st.sampled_from([b"\xef\xbb\xbf", b"\0" * 99]))
    elif action == "repeat":
        data += data[at:]
    elif action == "deep":
        data[at:at] = draw(st.sampled_from([b"[", b'{"a":', b"]"])) * _DEEP
    elif action == "utf-16":
        return data.decode(errors="replace").encode("utf-16")
    return bytes(data)


def dumped(document):
    """A document as JSON text; NaN and infinities as Python writes them, surrogates escaped."""
    return json.dumps(document).encode()


@st.composite
def json_bytes(draw, documents):
    """Draws the content of a file that should be one of the documents."""
    return damaged(draw, dumped(changed(draw, documents)))
