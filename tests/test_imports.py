"""Who may import whom, read from the source; and what importing the package costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmpo_lightning

ROOT = Path(dmpo_lightning.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
MAY_IMPORT_LIGHTNING = {"data", "modules", "callbacks", "strategies", "cli"}


def part_of(file: Path) -> str:
    """The folder or module right below the package: ``samplers``, ``policy``."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def files_of(part: str) -> list[Path]:
    found = [file for file in FILES if part_of(file) == part]
    assert found, part
    return found


def imported_modules(file: Path) -> Iterator[str]:
    """Every module that a file names in an import, wherever it stands."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            assert node.module is not None
            yield node.module
            if node.module == "dmpo_lightning":
                yield from (f"dmpo_lightning.{alias.name}" for alias in node.names)


def top_levels(file: Path) -> set[str]:
    return {module.partition(".")[0] for module in imported_modules(file)}


def own_parts(file: Path) -> set[str]:
    """Parts of the package that a file imports."""
    return {module.split(".")[1] for module in imported_modules(file) if module.startswith("dmpo_lightning.")}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_lightning_is_imported_only_where_the_design_says(file):
    names = top_levels(file) & {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
    assert not names or part_of(file) in MAY_IMPORT_LIGHTNING


def test_the_parts_that_may_import_lightning_do():
    """Else the test above proves nothing."""
    importing = {part_of(file) for file in FILES if "lightning" in top_levels(file)}
    assert {"data", "modules", "cli"} <= importing


@pytest.mark.parametrize("file", files_of("functional"), ids=lambda file: file.name)
def test_functional_imports_torch_jaxtyping_the_standard_library_and_itself(file):
    assert top_levels(file) <= {"torch", "jaxtyping", "dmpo_lightning"} | set(sys.stdlib_module_names)
    assert own_parts(file) <= {"functional"}


@pytest.mark.parametrize("file", files_of("tasks"), ids=lambda file: file.name)
def test_tasks_are_plain_python(file):
    assert not top_levels(file) & {"torch", "numpy", "transformers", "lightning"}
    assert own_parts(file) <= {"tasks", "workers"}


@pytest.mark.parametrize(
    "part", ["functional", "tasks", "models", "policy", "samplers", "objectives", "rewards", "rollout"]
)
def test_the_algorithm_knows_nothing_of_modules_callbacks_and_the_command_line(part):
    for file in files_of(part):
        assert not own_parts(file) & {"modules", "callbacks", "cli", "__main__"}, file


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_text_is_never_evaluated(file):
    nodes = list(ast.walk(ast.parse(file.read_text())))
    called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
    used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    assert not called & {"eval", "exec", "compile", "__import__"}
    assert not (called | imported | used) & {"sympify", "parse_expr", "literal_eval"}


@pytest.mark.parametrize(
    "module", ["dmpo_lightning", "dmpo_lightning.__main__", "dmpo_lightning.configs", "dmpo_lightning.tasks"]
)
def test_importing_loads_neither_torch_nor_lightning(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'lightning', 'transformers', 'numpy'}} & set(sys.modules)))"
    assert run_python(code) == "[]"


@pytest.mark.parametrize("argument", ["--help", "--version", "configs"])
def test_what_needs_no_torch_is_answered_without_it(argument):
    code = f"import sys; from dmpo_lightning.__main__ import main; status = main(['{argument}']); "
    assert run_python(code + "print(status, 'torch' in sys.modules)").splitlines()[-1] == "0 False"


def test_every_public_name_resolves():
    for name in dmpo_lightning.__all__:
        assert getattr(dmpo_lightning, name) is not None
    assert set(dir(dmpo_lightning)) == set(dmpo_lightning.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'PPO'"):
        _ = dmpo_lightning.PPO
