"""The structure is kept: sizes, names, one-way imports, a README that tells the truth."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("engine", "workers", "zoo", "ext")
SOURCES = sorted(p for room in (*ROOMS, "bench") for p in (ROOT / room).rglob("*.py"))
REFUSED_NAMES = {"utils", "util", "common", "shared", "misc", "base", "helpers", "helper"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 50
# A GPU kernel is one function: its arguments and constants alone take a line each.
MAX_KERNEL_LINES = 110


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text())
    return [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path):
    assert path.read_text().count("\n") <= MAX_FILE_LINES
    for function in functions(path):
        lines = (function.end_lineno or 0) - function.lineno + 1
        is_kernel = any(ast.unparse(d).startswith("triton.jit") for d in function.decorator_list)
        limit = MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES
        assert lines <= limit, f"{function.name} has {lines} lines"


def test_native_sources_stay_small():
    for path in sorted((ROOT / "ext").rglob("*.cpp")) + sorted((ROOT / "ext").rglob("*.h")):
        assert path.read_text().count("\n") <= MAX_FILE_LINES, path.name


def test_names_say_what_things_are():
    for path in SOURCES:
        assert path.stem not in REFUSED_NAMES, path
        assert not {p.name for p in path.relative_to(ROOT).parents} & REFUSED_NAMES, path


def test_packages_export_nothing_from_their_init():
    for path in SOURCES:
        if path.name == "__init__.py":
            tree = ast.parse(path.read_text())
            assert all(
                isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) for n in tree.body
            ), f"{path} does more than say what the package is"


def test_imports_go_one_way():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lint-imports"))],
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def test_the_readme_maps_every_file():
    text = (ROOT / "README.md").read_text()
    missing = [
        str(p.relative_to(ROOT))
        for p in SOURCES
        if p.name not in {"__init__.py", "__main__.py"}
        and not re.search(rf"`(?:[\w/]*/)?{re.escape(p.name)}`", text)
    ]
    assert not missing, f"the README's map does not name {missing}"


def test_the_readme_names_no_file_that_is_gone():
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## The map of rooms") :]
    section = section[: section.index("\n## ", 5)]
    known = {p.name for p in SOURCES} | {p.name for p in (ROOT / "ext").rglob("*.*")}
    named = set(re.findall(r"`(?:[\w/]*/)?([\w]+\.(?:py|cpp|h))`", section))
    assert named <= known, f"gone: {sorted(named - known)}"
