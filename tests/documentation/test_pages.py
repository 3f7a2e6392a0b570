"""What README and the pages of the site say can be run runs, and what they link is there."""

import json
import re
import shlex
import shutil
import sys
from glob import glob
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from cli_runs import KEEPS_LAST, SMALL, status
from transformers import Qwen3Config, Qwen3ForCausalLM

from dmpo_lightning import load_tokenizer
from small_models import SMALL as SMALL_CAUSAL
from tiers import slow_unless

REPOSITORY = Path(__file__).parents[2]
NAMES = ["README.md", *sorted(str(path.relative_to(REPOSITORY)) for path in REPOSITORY.glob("docs/**/*.md"))]
TEXTS = {name: (REPOSITORY / name).read_text() for name in NAMES if "_build" not in name}
LAST = "runs/sudoku_tiny/latest/checkpoints/last.ckpt"
SMALL_RUN = ["--config=small.yaml", "--trainer.max_steps=2", KEEPS_LAST]
SLOW_PYTHON = ("README.md", "docs/scaling.md", "docs/quick_start.md")


def blocks(name: str, language: str) -> list[str]:
    """What stands between fences of this language."""
    fences = re.findall(rf"^( *)```{language}\n(.*?)^ *```$", TEXTS[name], re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", text, flags=re.MULTILINE) for indent, text in fences]


def lines(name: str) -> list[str]:
    """The commands of a page, each a line."""
    return "".join(blocks(name, "bash")).replace("\\\n", " ").splitlines()


def commands(name: str) -> list[list[str]]:
    """What ``dmpo-lightning`` is called with, by itself or by something else."""
    found = (re.search(r"(?:^|&& |-m |/)dmpo[-_]lightning (.*)$", line) for line in lines(name))
    return [shlex.split(each[1], comments=True) for each in found if each]


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder with a run of the small model, and a small model in the place of one of the hub."""
    folder = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("small.yaml").write_text(yaml.safe_dump(SMALL))
        assert status("fit", "--config=sudoku_tiny.yaml", *SMALL_RUN) == 0
        Qwen3ForCausalLM(Qwen3Config(**SMALL_CAUSAL)).save_pretrained("Qwen/Qwen3-0.6B")
        load_tokenizer("sudoku_tiny").save_pretrained("Qwen/Qwen3-0.6B")
    example = {"question": "", "ground_truth": 4.0, "completion": "<answer>4</answer>"}
    (folder / "completions.jsonl").write_text(json.dumps(example))
    return folder


@pytest.fixture
def place(trained, tmp_path, monkeypatch):
    """A working directory with that, and the files of `examples`."""
    shutil.copytree(trained, tmp_path, symlinks=True, dirs_exist_ok=True)
    for path in (REPOSITORY / "examples").glob("custom_*"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TEXTS if commands(name)])
def test_the_commands_of_a_page_work_one_after_the_other(name, place):
    """Runs of the small model in small, and all others as far as the parser goes."""
    for text in blocks(name, "python"):
        # A file that the page has one write.
        if file := re.match(r"# (\w+\.py)\n", text):
            Path(file[1]).write_text(text)
    for command, *given in commands(name):
        arguments = [LAST if each == "CKPT" else each for each in given]
        # As a shell has it, on the day of which the page speaks.
        patterns = [re.sub(r"/\d{4}-\d\d-\d\d_\*$", "/20*_*", each) for each in arguments]
        arguments = [found for each in patterns for found in glob(each) or [each]]
        if command in ("fit", "test", "validate", "predict") and "--print_config" not in arguments:
            small = "sudoku_tiny.yaml" in arguments and "overlays/blocks_tiny.yaml" not in arguments
            # A checkpoint cannot be printed.
            last = [] if small else [i for i, each in enumerate(arguments) if each == "--ckpt_path"]
            arguments = [each for i, each in enumerate(arguments) if i not in last and i - 1 not in last]
            arguments += SMALL_RUN if small else ["--print_config"]
        assert status(command, *arguments) == 0, (command, *given)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in TEXTS if blocks(name, "yaml")])
def test_the_configurations_of_a_page_are_taken(name, place):
    for number, text in enumerate(blocks(name, "yaml")):
        Path(f"block{number}.yaml").write_text(text)
        assert status("fit", "--config=sudoku_tiny.yaml", f"--config=block{number}.yaml", "--print_config") == 0, text


PYTHON = [name for name in TEXTS if blocks(name, "python")]


@pytest.mark.parametrize("name", slow_unless(lambda name: name not in SLOW_PYTHON, PYTHON))
def test_the_python_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for text in blocks(name, "python"):
        exec(compile(text, name, "exec"), namespace)  # noqa: S102


@pytest.mark.slow
def test_the_notebook_runs_and_its_reward_rises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "notebook"}
    for cell in json.loads((REPOSITORY / "examples/quick_start.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), "notebook", "exec"), namespace)  # noqa: S102
    rewards = namespace["rewards"]
    assert len(rewards) == 20
    assert rewards[0] < 0.3
    assert rewards[-1] > 0.5
    assert (namespace["folder"] / "report.html").is_file()


@pytest.mark.parametrize("name", TEXTS)
def test_what_else_a_page_runs_and_links_is_there(name):
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXTS[name], re.MULTILINE)):
        assert f"\n{target}:" in makefile, target
    for module in set(re.findall(r"python -m ((?:benchmarks|dmpo_lightning)[\w.]*)", TEXTS[name])):
        assert find_spec(module), module
    for path in set(re.findall(r"\b((?:examples|tests|benchmarks|configs|docs)/[\w./-]*\w)\b", "\n".join(lines(name)))):
        assert (REPOSITORY / path).exists(), path
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", re.sub(r"`[^`\n]*`", "", TEXTS[name])):
        assert target.startswith("https://") or (REPOSITORY / name).parent.joinpath(target).exists(), target


def test_readme_is_short_and_its_pictures_small():
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", TEXTS["README.md"])
    assert [Path(picture).suffix for picture in pictures] == [".png", ".svg"]
    assert sum((REPOSITORY / picture).stat().st_size for picture in pictures) < 100_000
    assert [line for line in TEXTS["README.md"].splitlines() if len(line) > 140 and not line.startswith("|")] == []
    assert TEXTS["README.md"].count("\n") <= 150
