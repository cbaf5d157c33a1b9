"""README and docs/ do what they say: commands and Python blocks run, and links lead somewhere.

A block is run if its language is `sh` or `python`. A comment right above exempts one, and says why:

    <!-- not run: it installs packages -->
"""

import re
from pathlib import PurePosixPath
from urllib.parse import unquote, urlsplit

import pytest
from markdown_pages import ROOT, read_page, repository_pages
from page_runner import RUN, BlockError, CommandServer, PageRunner

import cpumoe
import cpumoe.integrations.transformers

PAGES = {path.relative_to(ROOT).as_posix(): read_page(path) for path in repository_pages()}
EXECUTED = [n for n in PAGES if n == "README.md" or n.startswith(("docs/", "examples/"))]
WITH_BLOCKS = [n for n in EXECUTED if any(b.language in RUN for b in PAGES[n].blocks)]
# Languages of blocks that show something. An empty one is for output and drawings.
SHOWN = ("", "text", "json", "toml", "yaml", "cmake", "c", "cpp")


@pytest.fixture(scope="module")
def command_server(tmp_path_factory):
    with CommandServer(tmp_path_factory.mktemp("commands")) as server:
        yield server


@pytest.fixture
def run_page(tmp_path, command_server):
    def run(page):
        if message := fault_of_blocks(page, tmp_path / "run", command_server):
            pytest.fail(message, pytrace=False)

    return run


def fault_of_blocks(page, folder, command_server):
    """What a page's first block that fails says; None if none does."""
    with PageRunner(page, folder, command_server) as runner:
        try:
            return runner.run()
        except BlockError as error:
            return str(error)


@pytest.mark.parametrize("name", WITH_BLOCKS)
def test_blocks_run(name, run_page):
    run_page(PAGES[name])


def test_every_block_is_run_or_says_why_not():
    for name in EXECUTED:
        page = PAGES[name]
        for block in page.blocks:
            known = block.language in (*RUN, *SHOWN)
            assert known, f"{name}:{block.line}: {block.language}: write sh or python"
            assert block.reason is None or len(block.reason.split()) > 2, f"{name}:{block.line}"
        assert not page.stray_reasons, f"{name}:{page.stray_reasons}: no block is below the comment"


@pytest.mark.parametrize("module", [cpumoe, cpumoe.integrations.transformers])
def test_the_api_page_has_every_public_name(module):
    page = (ROOT / "docs" / "api.md").read_text("utf-8")
    documented = set(re.findall(r"(?m)^::: \S+\.(\S+)$", page))
    names = {name for name in module.__all__ if not name.startswith("_")}
    assert names <= documented, f"docs/api.md lacks {sorted(names - documented)}"


def test_nested_lists_are_indented_as_the_site_needs():
    """Four spaces: fewer are enough for GitHub, but not for MkDocs."""
    for name, page in PAGES.items():
        shown = {line for b in page.blocks for line in range(b.line, b.line + b.text.count("\n"))}
        for line, text in enumerate(page.path.read_text("utf-8").splitlines(), 1):
            nested = re.match(r" {1,3}([-*]|\d+\.) ", text)
            assert line in shown or not nested, f"{name}:{line}: indent it by four spaces"


def test_links_lead_somewhere():
    faults = [fault for page in PAGES.values() for fault in broken_links(page)]
    assert not faults, "\n".join(faults)


PAGE = """# A page

<!-- not run: it needs a network -->
```sh
curl https://example.org
```

## A `b` & c

See [it](#a-b--c), [the missing](#gone), ![a picture](gone.svg)
and <a href="https://two words">this</a>.

```python
x = 1
```

    ```sh
    this is text of an indented block
    ```

## A `b` & c

<!-- not run: there is no block below -->
"""


@pytest.fixture
def write_page(tmp_path):
    def write(text):
        path = tmp_path / "page.md"
        path.write_text(text, "utf-8")
        return read_page(path)

    return write


def test_pages_are_read_as_github_reads_them(write_page):
    page = write_page(PAGE)
    assert [(b.language, b.line, b.reason) for b in page.blocks] == [
        ("sh", 5, "it needs a network"),
        ("python", 14, None),
    ]
    assert page.anchors == {"a-page", "a-b--c", "a-b--c-1"}
    assert page.stray_reasons == [23]
    assert [fault_of(page, target) is None for _, target in page.links] == [True] + 3 * [False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```sh\ntrue\nfalse | true\n```", "page.md:3: failed: "),
        ("```sh\ncpumoe inspect nowhere\n```", "page.md:2: failed: cpumoe inspect nowhere"),
        ("```sh\ncpumoe serve nowhere\n```", "page.md:2: failed: cpumoe serve nowhere"),
        ("```sh\npython -m pip list\n```", "mark the block with <!-- not run: why -->"),
        ("```python\nx = 1\n```\n\n```python\nx\ny\n```", 'page.md", line 7, in <module>\n    y\n'),
    ],
)
def test_a_line_that_fails_is_named(text, message, write_page, tmp_path, command_server):
    assert message in fault_of_blocks(write_page(text), tmp_path / "run", command_server)


def broken_links(page):
    for line, target in page.links:
        if fault := fault_of(page, target):
            yield f"{page.name}:{line}: {target}: {fault}"


def fault_of(page, target):
    """Why a link is broken; None if it is not. Nothing is asked of other computers."""
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        return None if re.fullmatch(r"[\w.-]+\.\w+(:\d+)?", parts.netloc) else "not an address"
    if parts.scheme or parts.netloc or PurePosixPath(parts.path).is_absolute():
        return "expected a relative path, or an address of http or https"
    path = (page.path.parent / unquote(parts.path)).resolve() if parts.path else page.path
    if not path.exists():
        return "no such file"
    if page.name and ROOT not in (path, *path.parents):
        return "outside of the repository"
    if parts.fragment and path.suffix == ".md":
        anchors = read_page(path).anchors
        return None if unquote(parts.fragment) in anchors else f"no such heading: {sorted(anchors)}"
    return None
