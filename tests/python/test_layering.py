"""The direction of dependencies in C++, read from `#include` lines, and tables that exist once.

base <- {threading, formats} <- kernels <- {packing, staging} <- paths <- {moe, linear, attention}
{moe, linear, attention} <- variant
base, threading, moe, linear, attention, variant API <- dispatch <- engine <- {streams, capi}
streams <- bindings
"""

import ast
import re
from pathlib import Path

import cpumoe

ROOT = Path(__file__).parents[2]

# What each folder of cpp/ may include, besides itself. kernels/ and staging/ know no format;
# packing/, paths/, moe/ and linear/, where the two meet, do.
MAY_INCLUDE = {
    "base": set(),
    "threading": {"base"},
    "formats": {"base"},
    "kernels": {"base", "threading"},
    "packing": {"base", "threading", "formats", "kernels"},
    "staging": {"base", "kernels"},
    "paths": {"base", "formats", "kernels", "packing", "staging"},
    "moe": {"base", "threading", "formats", "kernels", "packing", "staging", "paths"},
    "linear": {"base", "threading", "formats", "kernels", "packing", "staging", "paths"},
    "attention": {"base", "threading", "kernels", "packing", "staging", "paths"},
    "variant": {
        *("base", "threading", "formats", "kernels", "packing", "staging", "moe", "linear"),
        "attention",
    },
    "dispatch": {"base", "threading", "variant"},
    "engine": {"base", "threading", "variant", "dispatch", "moe", "linear", "attention"},
    "streams": {"base", "threading", "moe", "engine"},
    "bindings": {
        *("base", "threading", "formats", "packing", "variant", "dispatch", "moe", "engine"),
        "streams",
    },
    "capi": {"base", "threading", "variant", "dispatch", "moe", "engine"},
}
# Compiled once, with baseline flags. Must not reach code that is compiled per ISA (-inl.h).
BASELINE = {"base", "threading", "dispatch", "engine", "streams", "bindings", "capi"}
GENERATED = re.compile(
    r"\w+_table\.inc|build_id\.inc|kernels/@isa@/ops-inl\.h|moe/@format@_moe-inl\.h"
)
INTRINSICS = re.compile(r"#include <\w*intrin\.h>|#include <arm_\w+\.h>|\b_mm\d*_|\b__m\d+")
TORCH = re.compile(r"#include [<\"](torch|ATen|c10)/")

LINE_LIMIT = 150
EQUAL_LINES_LIMIT = 6


def sources(folder, *suffixes):
    """Path relative to `folder` -> text."""
    paths = (path for path in sorted(folder.rglob("*")) if path.suffix in suffixes)
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8") for path in paths}


def cpp_sources():
    return sources(ROOT / "cpp", ".h", ".cc", ".in")


def includes(text):
    return re.findall(r'^\s*#include "([^"]+)"', text, re.MULTILINE)


def reachable(start, files):
    """Every file of `files` that `start` includes, directly or not."""
    seen, todo = set(), [start]
    while todo:
        new = [name for name in includes(files.get(todo.pop(), "")) if name not in seen]
        seen.update(new)
        todo.extend(new)
    return seen


def include_violations(files):
    found = []
    for name, text in files.items():
        folder = name.split("/")[0]
        for target in includes(text):
            if GENERATED.fullmatch(target):
                continue
            if target not in files:
                found.append(f"{name}: includes {target}, which is not in cpp/")
            elif target.split("/")[0] not in MAY_INCLUDE[folder] | {folder}:
                found.append(f"{name}: {folder}/ may not include {target}")
        if folder in BASELINE:
            per_isa = sorted(t for t in reachable(name, files) if t.endswith("-inl.h"))
            found += [f"{name}: baseline code reaches {target}" for target in per_isa]
        in_an_isa = re.match(r"kernels/\w+/", name)
        if INTRINSICS.search(text) and not in_an_isa:
            found.append(f"{name}: intrinsics outside kernels/<isa>/")
        if TORCH.search(text):
            found.append(f"{name}: includes a torch header")
    return found


def test_cpp_includes():
    files = cpp_sources()
    assert {name.split("/")[0] for name in files} == set(MAY_INCLUDE)
    assert include_violations(files) == []


def test_cpp_violations_are_caught():
    files = {
        "base/bits.h": '#include "threading/pool.h"\n',
        "threading/pool.h": "",
        "formats/fp3.h": "#include <immintrin.h>\n",
        "kernels/gemm-inl.h": '#include "formats/fp3.h"\n',
        "kernels/avx9/ops-inl.h": "#include <immintrin.h>\n",
        "moe/moe.h": '#include "kernels/gemm-inl.h"\n',
        "bindings/module.cc": '#include "moe/moe.h"\n#include "gone.h"\n#include <torch/torch.h>\n',
    }
    assert include_violations(files) == [
        "base/bits.h: base/ may not include threading/pool.h",
        "formats/fp3.h: intrinsics outside kernels/<isa>/",
        "kernels/gemm-inl.h: kernels/ may not include formats/fp3.h",
        "bindings/module.cc: includes gone.h, which is not in cpp/",
        "bindings/module.cc: baseline code reaches kernels/gemm-inl.h",
        "bindings/module.cc: includes a torch header",
    ]


def code_lines(text):
    """Lines without comments, blank lines and indentation."""
    text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    stripped = (re.sub(r"//.*", "", line).strip() for line in text.splitlines())
    return [line for line in stripped if line]


def equal_run(first, second):
    """The longest run of equal lines of two lists."""
    best = []
    for i in range(len(first)):
        for j in range(len(second)):
            length = 0
            while (
                i + length < len(first)
                and j + length < len(second)
                and first[i + length] == second[j + length]
            ):
                length += 1
            if length > len(best):
                best = first[i : i + length]
    return best


def siblings():
    files = {name: t for name, t in cpp_sources().items() if name.endswith("_moe-inl.h")}
    table = (ROOT / "cmake" / "Variants.cmake").read_text()
    rows = re.findall(r"^cpumoe_format\((\w+)", table, re.MULTILINE)
    assert set(files) == {f"moe/{row}_moe-inl.h" for row in rows}
    assert set(rows) >= set(cpumoe.WEIGHT_FORMATS)
    return files


def test_sibling_operators_are_short():
    for name, text in siblings().items():
        assert len(text.splitlines()) <= LINE_LIMIT, name


def test_sibling_operators_share_no_code():
    files = list(siblings().items())
    for index, (name, text) in enumerate(files):
        for other_name, other in files[:index]:
            run = equal_run(code_lines(text), code_lines(other))
            assert len(run) < EQUAL_LINES_LIMIT, f"{name} and {other_name} share: {run}"


def test_shared_code_is_caught():
    a = "int x;\n// a\nf();\ng();\nh();\n  i();\nj();\n\nk();\n"
    b = "float x;\nf();\ng();  // why\nh();\ni();\n/* c */\nj();\nk();\nend();"
    assert equal_run(code_lines(a), code_lines(b)) == [
        "f();",
        "g();",
        "h();",
        "i();",
        "j();",
        "k();",
    ]


def without_docstrings(tree):
    """String constants of Python code that are not docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
        if is_text and id(node) not in docstrings:
            yield node.value


def code_words(name, text):
    """The words in which an ISA's name would count as code: no comments, no docstrings."""
    if name.endswith(".py"):
        text = "\n".join(without_docstrings(ast.parse(text)))
    elif name.endswith((".h", ".cc", ".in")):
        text = "\n".join(code_lines(text))
    else:
        text = re.sub(r"#.*", "", text)
    return set(re.findall(r"\w+", text))


def isa_list_violations(files, isas):
    named = {name: sorted(code_words(name, text) & set(isas)) for name, text in files.items()}
    return [f"{name}: lists {', '.join(some)}" for name, some in named.items() if len(some) > 1]


def test_isas_are_listed_in_one_table_only():
    isas = cpumoe.known_isas()
    cmake = {"cmake/" + name: t for name, t in sources(ROOT / "cmake", ".cmake").items()}
    table = cmake.pop("cmake/Variants.cmake")
    assert code_words("Variants.cmake", table) >= set(isas)
    cpp = {n: t for n, t in cpp_sources().items() if not re.match(r"kernels/\w+/", n)}
    files = {
        **cmake,
        **cpp,
        **sources(ROOT / "python", ".py"),
        **sources(ROOT / "asv_benchmarks" / "benchmarks", ".py"),
        "CMakeLists.txt": (ROOT / "CMakeLists.txt").read_text("utf-8"),
    }
    assert isa_list_violations(files, isas) == []


def test_a_second_isa_list_is_caught():
    files = {
        "ok.py": '"""alpha and beta."""\nISA = "alpha"  # or beta\n',
        "bad.py": 'ISAS = ["alpha", "beta"]\n',
        "bad.cc": 'const char* isas[] = {"alpha", "beta"};\n',
        "ok.cc": '// alpha, beta\nconst char* isa = "alpha";\n',
        "bad.cmake": "foreach(isa alpha beta)  # gamma\n",
    }
    assert isa_list_violations(files, ["alpha", "beta", "gamma"]) == [
        "bad.py: lists alpha, beta",
        "bad.cc: lists alpha, beta",
        "bad.cmake: lists alpha, beta",
    ]
