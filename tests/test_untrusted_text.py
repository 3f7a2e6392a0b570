"""Nothing in the package evaluates text."""

import ast
from pathlib import Path

import pytest

import dmpo_lightning

FORBIDDEN = {"eval", "exec", "compile", "sympify", "parse_expr", "literal_eval", "system"}
OWNERS = ("ast", "builtins", "os", "sympy")
MODULES = sorted(Path(dmpo_lightning.__file__).parent.rglob("*.py"))


def called_names(source: str) -> set[str]:
    """Names that are called or imported; of ``a.b(...)`` the last, where a may evaluate text."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name):
                names.add(function.id)
            elif isinstance(function, ast.Attribute) and ast.unparse(function.value) in OWNERS:
                names.add(function.attr)
        if isinstance(node, ast.ImportFrom | ast.Import):
            names |= {alias.name.rpartition(".")[2] for alias in node.names}
    return names


def test_there_are_modules_to_look_at():
    assert len(MODULES) > 50


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_no_module_evaluates_text(module):
    assert not called_names(module.read_text()) & FORBIDDEN


@pytest.mark.parametrize("source", ["eval('1')", "import ast\nast.literal_eval('1')", "from sympy import sympify"])
def test_the_check_finds_what_it_looks_for(source):
    assert called_names(source) & FORBIDDEN
