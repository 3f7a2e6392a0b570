"""Sizes that keep the code readable: no long files, functions or constructors."""

import ast
from pathlib import Path

import pytest

import dmpo_lightning

ROOT = Path(dmpo_lightning.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def functions(file: Path) -> list[Function]:
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, Function)]


def lines_of_code(function: Function) -> int:
    """Without its docstring."""
    first = function.body[0]
    has_docstring = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if has_docstring else 0
    return function.end_lineno - function.lineno + 1 - docstring


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_file_has_at_most_300_lines(file):
    assert len(file.read_text().splitlines()) <= 300


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_function_has_at_most_50_lines_without_its_docstring(file):
    sizes = {each.name: lines_of_code(each) for each in functions(file)}
    assert {function: lines for function, lines in sizes.items() if lines > 50} == {}


@pytest.mark.parametrize("file", FILES, ids=name)
def test_a_constructor_takes_at_most_20_arguments(file):
    taken = {
        each.lineno: len(each.args.args) + len(each.args.kwonlyargs) - 1
        for each in functions(file)
        if each.name == "__init__"
    }
    assert all(count <= 20 for count in taken.values()), taken
