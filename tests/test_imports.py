"""Who may import whom and other rules of the house, read from the source; and what importing the package costs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import dmpo_lightning
from checked import CHECKED

ROOT = Path(dmpo_lightning.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = (
    "terminal",
    "reports",
    "functional",
    "workers",
    "tasks",
    "rewards",
    "models",
    "checkpoints",
    "distributed",
    "policy",
    "samplers",
    "rollout",
    "objectives",
    "schedule",
    "evaluation",
    "data",
    "modules",
    "planning",
    "callbacks",
    "commands",
    "__main__",
    "",
)
"""From the bottom up; a part imports itself and those before it. The last is the package's own ``__init__``."""
MAY_IMPORT_LIGHTNING = {"distributed", "data", "modules", "callbacks", "commands"}


def part_of(module: str) -> str:
    """The folder or module right below the package: ``samplers`` of ``dmpo_lightning.samplers.base``."""
    return module.split(".")[1] if "." in module else ""


def name_of(file: Path) -> str:
    parts = ("dmpo_lightning", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(file): file for file in FILES}


def files_of(part: str) -> list[Path]:
    found = [file for module, file in MODULES.items() if part_of(module) == part]
    assert found, part
    return found


def imported_modules(file: Path) -> Iterator[str]:
    """Every module that a file names, wherever it stands: in an import, or as a text for ``import_module``."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            assert node.module is not None
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else node.module for name in inside)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = re.match(r"dmpo_lightning(\.\w+)+", node.value)
            yield from [named[0]] if named else []


def own_imports(file: Path) -> set[str]:
    """Modules of the package that a file imports. A public name such as ``dmpo_lightning.DMPO`` in a text is none."""
    return {module for module in imported_modules(file) if module in MODULES and module != name_of(file)}


def homes_of_public_names() -> set[str]:
    """What the package's ``__init__`` imports on first use."""
    return {f"dmpo_lightning.{home}" for home in dmpo_lightning._HOMES.values()}


GRAPH = {module: own_imports(file) for module, file in MODULES.items()}
GRAPH["dmpo_lightning"] |= homes_of_public_names()


def top_levels(file: Path) -> set[str]:
    return {module.partition(".")[0] for module in imported_modules(file)}


def own_parts(file: Path) -> set[str]:
    """Parts of the package that a file imports."""
    return {part_of(module) for module in own_imports(file)} - {""}


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_every_part_has_its_layer():
    assert {part_of(module) for module in MODULES} == set(LAYERS)


def test_no_module_imports_upwards():
    """Not in a function and not by a string either."""
    layer = {module: LAYERS.index(part_of(module)) for module in MODULES}
    # `__main__` asks the package's own top for the version; nothing there is imported before it is asked for.
    upwards = {
        (module, other)
        for module, imported in GRAPH.items()
        for other in imported - {"dmpo_lightning"}
        if layer[other] > layer[module]
    }
    assert upwards == set()


def test_no_module_reaches_itself():
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in finished:
            for other in sorted(GRAPH[module]):
                visit(other, (*path, module))
            finished.add(module)

    for module in MODULES:
        visit(module, ())


def test_few_modules_lie_loose():
    loose = [file.name for file in FILES if file.parent == ROOT and file.name != "__init__.py"]
    assert len(loose) <= 5, loose


def test_lightning_is_imported_only_where_the_design_says():
    names = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
    assert {part_of(name_of(file)) for file in FILES if top_levels(file) & names} == MAY_IMPORT_LIGHTNING


def test_every_stated_shape_is_checked_in_tests():
    stated = {module for module, file in MODULES.items() if "jaxtyping" in top_levels(file)}
    checked = {f"dmpo_lightning.{name}" for name in CHECKED}
    assert {module for module in stated if not any(f"{module}.".startswith(f"{name}.") for name in checked)} == set()
    assert not {name for name in checked if name not in MODULES}, "not there"


def test_functional_imports_torch_jaxtyping_the_standard_library_and_itself():
    for file in files_of("functional"):
        assert top_levels(file) <= {"torch", "jaxtyping", "dmpo_lightning"} | set(sys.stdlib_module_names), file
        assert own_parts(file) <= {"functional"}, file


def test_tasks_are_plain_python():
    for file in files_of("tasks"):
        assert not top_levels(file) & {"torch", "numpy", "transformers", "lightning"}, file
        assert own_parts(file) <= {"tasks", "workers"}, file


def test_text_is_never_evaluated():
    for file in FILES:
        nodes = list(ast.walk(ast.parse(file.read_text())))
        called = {node.func.id for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        imported = {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert not called & {"eval", "exec", "compile", "__import__"}, file
        assert not (called | imported | used) & {"sympify", "parse_expr", "literal_eval"}, file


@pytest.mark.parametrize(
    "module", ["dmpo_lightning", "dmpo_lightning.__main__", "dmpo_lightning.commands.arguments", "dmpo_lightning.tasks"]
)
def test_importing_loads_neither_torch_nor_lightning(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'lightning', 'transformers', 'numpy'}} & set(sys.modules)))"
    assert run_python(code) == "[]"


@pytest.mark.parametrize("argument", ["--help", "--version", "configs"])
def test_what_needs_no_torch_is_answered_without_it(argument):
    code = f"import sys; from dmpo_lightning.__main__ import main; status = main(['{argument}']); "
    assert run_python(code + "print(status, 'torch' in sys.modules)").splitlines()[-1] == "0 False"


def test_no_function_but_constructors_has_more_than_seven_parameters():
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name != "__init__":
                taken = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
                assert len(set(taken) - {"self", "cls"}) <= 7, f"{file}: {node.name}"


def test_every_public_name_resolves():
    for name in dmpo_lightning.__all__:
        assert getattr(dmpo_lightning, name) is not None
    assert set(dir(dmpo_lightning)) == set(dmpo_lightning.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'PPO'"):
        _ = dmpo_lightning.PPO
