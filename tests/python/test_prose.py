"""How the project writes, as far as a program can tell.

A sentence of the documents has at most 35 words. No comment, docstring or help text opens with
"Of " or "The same", and no sentence does: their subjects would then stand somewhere else.
"""

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

COMMENTED = ("cpp", "python", "tests", "tools", "asv_benchmarks", "cmake", "examples")
# How the files of a suffix begin a comment.
MARKS = {".h": "//", ".cc": "//", ".in": "//", ".cmake": "#", ".txt": "#", ".sh": "#"}
OPENS_BADLY = re.compile(r"(Of|The same)\b")

PAGES = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/**/*.md")
MOST_WORDS = 35

FENCE = re.compile(r"^\s*(```|~~~).*?^\s*\1[`~]*\s*$", re.MULTILINE | re.DOTALL)
MARKUP = re.compile(r"<!--.*?-->|<[^<>]+>", re.DOTALL)
CODE = re.compile(r"(`+)[^`].*?\1", re.DOTALL)
LINK = re.compile(r"!?\[([^\]]*)\](?:\([^)]*\)|\[[^\]]*\])")
# Lines without prose: tables, headings, rules, targets of links, mkdocstrings' directives.
NO_PROSE = re.compile(r"\s*(\||#|---|\[[^\]]+\]:|::: )")
# What begins a list item, a quote or an admonition.
NEW_BLOCK = re.compile(r"\s*([-*+]|\d+\.|>|:)\s+|\s*(!!!|\?\?\?)\s")
ENDS_SENTENCE = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)[.!?][\"')*_\]]*$")


def blank(match):
    return "\n" * match.group().count("\n")


def one_word(match):
    return "code" + blank(match)


def blocks(markdown):
    """(number of the first line, lines) of every paragraph and every list item."""
    text = CODE.sub(one_word, MARKUP.sub(blank, FENCE.sub(blank, markdown)))
    text = LINK.sub(lambda match: match.group(1), text)
    start, lines = 0, []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        item = NEW_BLOCK.match(line)
        ends = not line.strip() or NO_PROSE.match(line)
        if lines and (ends or item):
            yield start, lines
            lines = []
        if not ends:
            start = start if lines else number
            lines.append(line[item.end() if item else 0 :])


def sentences(markdown):
    """(line, sentence) of every sentence; code in it is one word."""
    for start, lines in blocks(markdown):
        words, first = [], start
        for number, line in enumerate(lines, start):
            for word in line.split():
                first = first if words else number
                words.append(word)
                if ENDS_SENTENCE.search(word):
                    yield first, " ".join(words)
                    words = []
        if words:
            yield first, " ".join(words)


def word_count(sentence):
    return sum(any(char.isalnum() for char in word) for word in sentence.split())


def comments_by_mark(text, mark):
    """(line, text) of every comment; comments on lines of their own that touch are one."""
    alone, trailing = re.compile(rf"\s*{mark}+ ?(.*)"), re.compile(rf".*\S\s+{mark}+ (.*)")
    start, lines = 0, []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        match = alone.match(line)
        if match:
            start = start if lines else number
            lines.append(match.group(1))
            continue
        if lines:
            yield start, "\n".join(lines)
            lines = []
        match = trailing.match(line)
        if match:
            yield number, match.group(1)


def comments_of_python(text):
    """(line, text) of every comment, docstring and help text of an argument."""
    lines = [""] * len(text.splitlines())
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            is_alone = token.line.strip() == token.string
            if is_alone:
                lines[token.start[0] - 1] = token.string
            else:
                yield token.start[0], token.string.lstrip("# ")
    yield from comments_by_mark("\n".join(lines), "#")
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Expr(value=ast.Constant(value=str(docstring))):
                yield node.lineno, docstring
            case ast.keyword(arg="help", value=ast.Constant(value=str(help_text))):
                yield node.lineno, help_text
            # The helpers of cpumoe.cli.options take help texts by position.
            case ast.Call(func=ast.Name(id="value_option" | "count_option"), args=arguments):
                texts = (a.value for a in arguments if isinstance(a, ast.Constant))
                yield from ((node.lineno, text) for text in texts)


def comments(path):
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        return comments_of_python(text)
    return comments_by_mark(text, MARKS[path.suffix])


def commented_files():
    for folder in COMMENTED:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {*MARKS, ".py"} and path.name != "requirements.txt":
                yield path


def pages():
    return sorted({path for pattern in PAGES for path in ROOT.glob(pattern)})


def opens_badly(text):
    """(line, sentence) of what opens with "Of " or "The same": the text or a sentence of it."""
    if OPENS_BADLY.match(text.strip()):
        return [(1, text.strip().splitlines()[0])]
    return [(line, found) for line, found in sentences(text) if OPENS_BADLY.match(found)]


def sentences_of_pages():
    for path in pages():
        for line, sentence in sentences(path.read_text("utf-8")):
            yield f"{path.relative_to(ROOT)}:{line}", sentence


def test_every_comment_names_its_subject():
    found = [
        f"{path.relative_to(ROOT)}:{first + line - 1}: {sentence}"
        for path in commented_files()
        for first, text in comments(path)
        for line, sentence in opens_badly(text)
    ]
    assert not found, "\n".join(["comments that cannot be read alone:", *found])


def test_every_sentence_of_the_documents_names_its_subject():
    found = [f"{place}: {text}" for place, text in sentences_of_pages() if OPENS_BADLY.match(text)]
    assert not found, "\n".join(["sentences that cannot be read alone:", *found])


def test_no_sentence_of_the_documents_is_too_long():
    found = [
        f"{place}: {word_count(text)} words: {text}"
        for place, text in sentences_of_pages()
        if word_count(text) > MOST_WORDS
    ]
    assert not found, "\n".join([f"sentences of more than {MOST_WORDS} words:", *found])


def test_sentences_are_found_in_paragraphs_items_and_around_code():
    page = (
        "# A heading of no interest\n\nOne `a b. c` two. Three,\nfour! e.g. five\n\n"
        '- six [seven](a.md "eight. nine")\n  ten.\n- eleven\n\n| a. b. | c |\n\n'
        "```sh\nno. prose\n```\n**Twelve.** Thirteen\n"
    )
    assert list(sentences(page)) == [
        (3, "One code two."),
        (3, "Three, four!"),
        (4, "e.g. five"),
        (6, "six seven ten."),
        (8, "eleven"),
        (15, "**Twelve.**"),
        (15, "Thirteen"),
    ]


def test_comments_are_found_in_every_language():
    cpp = '// One.\n// Of two.\nint x;  // The same three\nauto s = "// no";\n'
    assert list(comments_by_mark(cpp, "//"))[:2] == [(1, "One.\nOf two."), (3, "The same three")]
    python = 'x = "# no"  # Of one\n\n# Two.\n# The same.\n\n\ndef f():\n    """Of three."""\n'
    assert list(comments_of_python(python)) == [
        (1, "Of one"),
        (3, "Two.\nThe same."),
        (8, "Of three."),
    ]
    assert list(comments_of_python('add("--x", help="Of " "one.")\n')) == [(1, "Of one.")]
    assert list(comments_of_python('count_option("Of one.", least=2)\n')) == [(1, "Of one.")]


@pytest.mark.parametrize("text", ["Of one.", "A sum. The same of two.", "One.\n\nOf two."])
def test_openings_without_a_subject_are_found(text):
    assert opens_badly(text)


@pytest.mark.parametrize("text", ["Offsets.", "One of two.", "The samples.", "It is the same."])
def test_other_openings_are_not(text):
    assert not opens_badly(text)
