"""Which checkpoint ``--ckpt_path`` takes, and which it refuses to open."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cli_runs import SAVE, SMALL, refusal, status, tiny

from dmpo_lightning.checkpoints.reading import load_data
from dmpo_lightning.checkpoints.writing import write_file

TINY = ["--config=sudoku_tiny.yaml", "--config=small.yaml", "--trainer.max_steps=2"]
WEIGHTS_ALONE = SAVE | {
    "init_args": {"every_n_train_steps": 1, "save_top_k": -1, "save_weights_only": True, "filename": "weights-{step}"}
}


def command(name, *options):
    return tiny(name, "--trainer.max_steps=2", *options)


def checkpoints(folder="."):
    return sorted(str(path) for path in Path(folder).rglob("*.ckpt"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The checkpoint of a run of two steps."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("small.yaml").write_text(yaml.safe_dump(SMALL))
        assert command("fit") == 0
        (path,) = checkpoints()
        return folder / path


# What is refused ------------------------------------------------------------------------------------------------------


class Bomb:
    """Makes a folder where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_what_a_checkpoint_says_of_classes_and_remote_code_is_not_obeyed(workplace, finished):
    """Lightning's command line makes a model of the class that a checkpoint names."""
    (workplace / "bomb.py").write_text("import os\nos.mkdir('exploded')\nclass Model: pass\n")
    named = {"_class_path": "bomb.Model", "_instantiator": "x", "model": {"model": "x", "trust_remote_code": True}}
    torch.save(load_data(finished) | {"hyper_parameters": named}, "foreign.ckpt")
    assert command("validate", "--ckpt_path=foreign.ckpt") == 0
    assert not Path("exploded").exists()


def pickled_file(path):
    torch.save({"state_dict": {}, "bomb": Bomb()}, path)


def fsdp_folder(path):
    path.mkdir()
    torch.save({}, path / "meta.pt")
    (path / ".metadata").write_bytes(pickle.dumps(Bomb()))


def deepspeed_folder(path):
    path.mkdir()
    (path / "latest").write_text("checkpoint")


@pytest.mark.parametrize(
    ("verb", "write", "reason"),
    [
        ("fit", pickled_file, "more than data"),
        ("validate", pickled_file, "more than data"),
        ("validate", fsdp_folder, "a folder is unpickled"),
        ("fit", deepspeed_folder, "a folder is unpickled"),
    ],
)
def test_a_checkpoint_that_could_run_code_is_refused(workplace, capsys, write, reason, verb):
    write(workplace / "a.ckpt")
    said = refusal(capsys, verb, *TINY, "--ckpt_path=a.ckpt")
    assert reason in said
    assert "--trust_checkpoint" in said
    assert not Path("exploded").exists()


def test_a_trusted_checkpoint_is_opened_whatever_it_holds(workplace):
    pickled_file(workplace / "a.ckpt")
    # Lightning passes the choice on to torch.
    assert command("fit", "--ckpt_path=a.ckpt", "--trust_checkpoint", "--weights_only=false") == 2
    assert Path("exploded").exists()


JUNK = [
    ("pytorch-lightning_version", None),
    ("state_dict", None),
    ("loops", {"fit_loop": 1}),
    ("callbacks", {"RunRecorder": 1}),
    ("lr_schedulers", None),
    ("optimizer_states", [{"state": {}, "param_groups": []}]),
    ("options", {"optimizer": 1}),
    ("dmpo", {"buffers_collected": "x"}),
]


@pytest.mark.parametrize(("name", "value"), JUNK)
def test_what_cannot_be_restored_is_one_line_before_anything_is_trained(workplace, finished, capsys, name, value):
    held = load_data(finished) | {name: value}
    torch.save({name: each for name, each in held.items() if each is not None}, "foreign.ckpt")
    said = refusal(capsys, "fit", *TINY, "--ckpt_path=foreign.ckpt")
    assert said.startswith("dmpo-lightning: `--ckpt_path foreign.ckpt` cannot be restored: ")


def test_states_of_generators_that_are_none_are_one_line_too(workplace, finished, capsys):
    held = load_data(finished)
    held["dmpo"]["ranks"][0]["generators"] = {}
    torch.save(held, "foreign.ckpt")
    said = refusal(capsys, "fit", *TINY, "--ckpt_path=foreign.ckpt")
    assert said.startswith("dmpo-lightning: `--ckpt_path foreign.ckpt` cannot be restored: ")


ESCAPE = "\x1b]0;owned\x07"


def test_no_word_of_a_checkpoint_moves_the_terminal(workplace, finished):
    saved = load_data(finished)
    saved["cli_config"]["model"]["init_args"]["objective"]["class_path"] = f"x{ESCAPE}"
    saved["options"]["optimizer"][0]["lr"] = f"x{ESCAPE}"
    saved["callbacks"][f"Other{ESCAPE}"] = {"a": 1}
    torch.save(saved, f"foreign{ESCAPE}.ckpt")
    command = [sys.executable, "-m", "dmpo_lightning", "fit", *TINY, f"--ckpt_path=foreign{ESCAPE}.ckpt"]
    run = subprocess.run([*command, "--trainer.max_steps=4"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "\x1b" not in run.stdout + run.stderr
    # Said all the same, by this package's warnings and by Lightning's.
    assert run.stderr.count(r"\x1b]0;owned\x07") >= 4


@pytest.mark.parametrize("url", ["http://localhost:9/a.ckpt", "s3://bucket/a.ckpt", "registry:model"])
def test_a_checkpoint_that_is_elsewhere_is_refused_unless_it_is_read_as_data(workplace, capsys, url):
    said = refusal(capsys, "validate", *TINY, f"--ckpt_path={url}")
    assert "not on this machine" in said
    assert "--trust_checkpoint" in said


def test_the_help_says_what_trusting_means(capsys):
    assert status("fit", "--help") == 0
    assert "--trust_checkpoint" in capsys.readouterr().out


# The last of a run ----------------------------------------------------------------------------------------------------


def other_runs(finished):
    """Where runs of other names and their tools leave checkpoints, all newer than anything of one's own."""
    for folder in ("runs/other/version_0/checkpoints", "runs/sudoku_tiny/other/version_0/checkpoints", "data", "."):
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_file(load_data(finished) | {"global_step": 100}, Path(folder) / "newest.ckpt")


@pytest.mark.parametrize(
    "logger",
    [
        pytest.param("--trainer.logger=false", marks=pytest.mark.slow),
        pytest.param("--trainer.logger.init_args.name=", marks=pytest.mark.slow),
        "--trainer.logger.init_args.name=sudoku_tiny",
    ],
    ids=["no logger", "empty name", "name"],
)
def test_no_other_run_is_continued(workplace, finished, caplog, logger):
    assert command("fit", logger) == 0
    assert len(checkpoints()) == 1
    other_runs(finished)
    assert command("fit", logger, "--ckpt_path=last", "--trainer.max_steps=4") == 0
    (new,) = [path for path in checkpoints() if "step=4" in path]
    assert load_data(new)["global_step"] == 4


def test_weights_alone_are_passed_over_by_training_and_taken_by_an_evaluation(workplace, caplog, capfd):
    callbacks = yaml.safe_dump({"trainer": {"callbacks": [SAVE, WEIGHTS_ALONE]}})
    Path("two.yaml").write_text(callbacks)
    assert command("fit", "--config=two.yaml") == 0
    for path in checkpoints():
        if "weights" not in path:
            os.utime(path, (1000, 1000))
    with caplog.at_level(logging.WARNING):
        assert command("fit", "--config=two.yaml", "--ckpt_path=last", "--trainer.max_steps=4") == 0
    assert "weights-step=2.ckpt cannot be used (it holds weights alone" in caplog.text
    (new,) = [path for path in checkpoints() if "step=4" in path and "weights" not in path]
    assert load_data(new)["global_step"] == 4
    (weights,) = [path for path in checkpoints() if "weights-step=4" in path]
    assert command("validate", f"--ckpt_path={weights}") == 0


def test_half_written_checkpoints_are_removed_by_training_alone(workplace):
    assert command("fit") == 0
    (own,) = checkpoints()
    partial = Path(own).with_name("a.ckpt.partial")
    partial.write_bytes(b"1")
    assert command("validate", "--ckpt_path=last") == 0
    assert partial.exists()
    assert command("fit", "--ckpt_path=last") == 0
    assert not partial.exists()
