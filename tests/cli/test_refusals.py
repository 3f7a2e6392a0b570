"""What the command line refuses: one line with what to do about it, and status 2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import printed_config, refusal, status

from dmpo_lightning.commands.arguments import named_modules, resolve_arguments

TINY = ["--config", "sudoku_tiny.yaml"]
CONFIGURATION = "pass --config NAME_OR_FILE, such as --config sudoku_tiny.yaml"
FILES = {
    "bad.yaml": "a: [1\nb: }\n",
    "deep.yaml": "[" * 5000,
    "circle.yaml": "a: &a {b: *a}\n",
    "empty.yaml": "",
    "list.yaml": "- a\n",
}


@pytest.mark.parametrize(
    ("arguments", "remedy"),
    [
        (["fit", "--config", "home"], "No configuration 'home'"),
        (["plan"], CONFIGURATION),
        (["fit", *TINY, "--trainer.accelerator=gpu"], "The Trainer refuses --trainer.accelerator gpu: "),
        (["fit", *TINY, "--trainer.devices=0"], "`Trainer(devices='0')` value is not a valid input"),
        (["fit", *TINY, "--trainer.max_steps=-5"], "The Trainer refuses --trainer.max_steps -5: "),
        (["fit", *TINY, "--trainer.strategy=dpp"], "invalid strategy name: `strategy='dpp'`"),
        (["fit", *TINY, "--model.optimizer.lr=-1"], "AdamW refuses its options: Invalid learning rate: -1.0."),
        (["fit", *TINY, "--model.lr_scheduler.start_factor=2"], "refuses its options: Starting multiplicative"),
        (["fit", *TINY, "--model.optimizer.lr=abc"], "`model.optimizer.lr` cannot be read: Expected a float"),
        (["fit", *TINY, "--trainer.logger=tensorboard"], "got tensorboard. Did you mean TensorBoardLogger?"),
        (["fit", *TINY, "--trainer.logger.nam=x"], "no option TensorBoardLogger.nam. Did you mean name?"),
        (["fit", *TINY, "--trainer.callbacks+=EarlyStoping"], "got EarlyStoping. Did you mean EarlyStopping?"),
        (["fit", *TINY, "--config=bad.yaml"], "'bad.yaml' cannot be read: "),
        (["fit", *TINY, "--config=deep.yaml"], "'deep.yaml' cannot be read: "),
        (["fit", *TINY, "--config=circle.yaml"], "'circle.yaml' cannot be read: "),
        (["fit", *TINY, "--config=empty.yaml"], "'empty.yaml' cannot be read: it must state options by name"),
        (["plan", *TINY, "--config=list.yaml"], "'list.yaml' cannot be read: it must state options by name"),
        (["plan", *TINY, "--seed_everything", "-1"], "`--seed_everything` must be at least 0 and less than 2**32"),
        (["fit", *TINY, "--ckpt_path=~/no.ckpt"], "home/no.ckpt, which does not exist"),
        (["test", *TINY, "--ckpt_path", "no.ckpt"], "got no.ckpt, which does not exist"),
        *(([verb, *TINY, "--ckpt_path=hpc"], "pass `last`") for verb in ("fit", "validate", "test", "predict")),
        (["test", *TINY, "--ckpt_path=best"], "(./best for a file of that name)"),
        (["validate", *TINY, "--ckpt_path=last"], "`--ckpt_path last` found no checkpoint"),
        (["export", "--ckpt_path", "no.ckpt", "--output", "x"], "No checkpoint file 'no.ckpt'"),
        (["fit", *TINY, "--data=dmpo_lightning.GSM8KDataModule", "--data.path=~/no.jsonl"], "home/no.jsonl"),
        (["fit", *TINY, "--trainer.logger.init_args.save_dir=bad.yaml/x"], "bad.yaml/x/sudoku_tiny"),
        (["fit", *TINY, "--model.group_size=1"], "`group_size` must be at least 2"),
        (["fit", *TINY, "--model.objective.proximal_coefficient=2"], "`proximal_coefficient` must be in (0, 1], got 2"),
        (["fit", *TINY, "--model.sampler.block_length=6"], "must be a multiple of `block_length`, got 20 and 6"),
        (["fit", *TINY, "--data.blanks=[3, 14]"], "`blanks` must be two counts"),
        (["fit", *TINY, "--model.model=no/such_model"], "Cannot load 'no/such_model'"),
        (["fit", *TINY, "--model.reward=os.system"], "`score` must be a function of an example and a completion of"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_with_its_remedy(arguments, remedy, capsys, workplace):
    for name, text in FILES.items():
        (workplace / name).write_text(text)
    assert status(*arguments) == 2
    # Behind the line that says what is being loaded.
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dmpo-lightning: ")]
    assert len(said) == 1
    assert remedy in said[0]


@pytest.mark.parametrize("stands", ["file", "link"])
def test_a_run_directory_that_cannot_be_made_ends_a_run_before_it_computes(stands, capsys, tmp_path, monkeypatch):
    """With a file or a link that leads nowhere in its place, because permissions do not bind root."""
    monkeypatch.chdir(tmp_path)
    place = tmp_path / "runs"
    place.touch() if stands == "file" else place.symlink_to("nowhere/at_all")
    line = refusal(capsys, "fit", *TINY)
    assert line.startswith("dmpo-lightning: The run directory runs/sudoku_tiny/")
    assert "cannot be made: " in line
    assert "--trainer.logger.save_dir" in line
    assert [each.name for each in tmp_path.iterdir()] == ["runs"]


def test_the_home_folder_is_found_behind_an_equals_sign(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("trainer: {max_steps: 3}\n")
    assert printed_config(capsys, *TINY, "--config=~/x.yaml")["trainer"]["max_steps"] == 3
    assert resolve_arguments(["--config=~/x.yaml", "--trainer.default_root_dir", "~/r", "--prompt=~/r"]) == [
        f"--config={tmp_path}/x.yaml",
        f"--trainer.default_root_dir={tmp_path}/r",
        "--prompt=~/r",
    ]


def test_names_are_those_of_dotted_paths(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "reward: {score: {init_args: {functions: {right: scores.is_right}}}}\n# torchvision.ops\n"
    )
    arguments = [f"--config={tmp_path / 'a.yaml'}", "--trainer.callbacks+=killer.Kill", "--task", "own.Task"]
    arguments += ["--model.objective={class_path: objectives.Own}", "--seed", "1.5"]
    assert named_modules(arguments) == {"scores", "killer", "own", "objectives"}


SHADOWS = ("torchvision", "triton", "bitsandbytes", "deepspeed", "wandb", "yaml")


# As the console script is started, whose own folder comes first on the import path.
SCRIPT = ["-P", "-c", "import sys; from dmpo_lightning.__main__ import main; main(sys.argv[1:])"]
OWN = "import own_words\n\ndef score(example, completion):\n    return own_words.ONE\n"


@pytest.mark.parametrize(
    "start", [pytest.param(["-m", "dmpo_lightning"], marks=pytest.mark.slow), SCRIPT], ids=["module", "script"]
)
def test_files_of_the_working_directory_take_no_packages_place(start, tmp_path):
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text(f"open('ran_{name}', 'w').close()\n")
    (tmp_path / "own_rewards.py").write_text(OWN)
    (tmp_path / "own_words.py").write_text("ONE = 1.0\n")
    arguments = ["plan", *TINY, "--model.reward=own_rewards.score", "--json"]
    done = subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=tmp_path, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("ran_*")) == []


def test_worker_processes_find_the_modules_of_the_working_directory(tmp_path, monkeypatch):
    from dmpo_lightning.rewards.reward import Reward
    from dmpo_lightning.workers.local_modules import find_local_modules

    (tmp_path / "named_rewards.py").write_text(OWN)
    (tmp_path / "own_words.py").write_text("ONE = 1.0\n")
    (tmp_path / "unnamed_words.py").write_text("ONE = 1.0\n")
    find_local_modules(tmp_path, {"named_rewards"})
    try:
        import named_rewards

        with pytest.raises(ImportError):
            import unnamed_words  # noqa: F401
        reward = Reward(named_rewards.score, workers=1)
        assert reward([{}], [["a", "b"]]).total.tolist() == [[1.0, 1.0]]
        reward.close()
    finally:
        find_local_modules(Path(), ())


def test_an_optimizer_of_matrices_alone_is_not_refused():
    from dmpo_lightning.commands.fit import _check_optimizer

    _check_optimizer({"optimizer": {"class_path": "torch.optim.Muon", "init_args": {"lr": 1e-3}}})
