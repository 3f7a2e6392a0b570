"""``fit --ckpt_path``: this run's configuration is used, and what it does otherwise is said."""

import warnings
from pathlib import Path

import pytest
import torch
import yaml
from cli_runs import SMALL

from dmpo_lightning.__main__ import main
from dmpo_lightning.callbacks.facts import compared
from dmpo_lightning.checkpoints.reading import newest_readable

STORED_RATE, OTHER_RATE = "--model.optimizer.lr=0.001", "--model.optimizer.lr=0.002"


def fit(name, *options, steps=4):
    """The last checkpoint of a run of that name, and its path."""
    arguments = ["--config=sudoku_tiny.yaml", "--config=small.yaml", f"--trainer.logger.init_args.name={name}"]
    assert main(["fit", *arguments, f"--trainer.max_steps={steps}", *options]) == 0
    path = newest_readable(Path("runs") / name)
    assert path is not None
    return torch.load(path, weights_only=True), path


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """With a run of two steps, one of four that was never interrupted, and one of four at the other rate."""
    folder = tmp_path_factory.mktemp("resume")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        Path("small.yaml").write_text(yaml.safe_dump(SMALL))
        yield {
            "half": str(fit("half", STORED_RATE, steps=2)[1]),
            "whole": fit("whole", STORED_RATE)[0],
            "other": fit("other", OTHER_RATE)[0],
        }


def rates(checkpoint):
    (state,), (scheduler,) = checkpoint["optimizer_states"], checkpoint["lr_schedulers"]
    return [group["lr"] for group in state["param_groups"]], scheduler["base_lrs"], scheduler["last_epoch"]


def same_weights(one, other):
    return all(torch.equal(one["state_dict"][name], value) for name, value in other["state_dict"].items())


def messages(record):
    return [str(each.message) for each in record if "(stored -> now)" in str(each.message)]


def test_another_learning_rate_is_trained_with_and_said(workplace):
    with pytest.warns(UserWarning, match="stored -> now") as record:
        resumed, _ = fit("faster", f"--ckpt_path={workplace['half']}", OTHER_RATE)
    assert rates(resumed) == rates(workplace["other"]) != rates(workplace["whole"])
    assert not same_weights(resumed, workplace["whole"])
    configuration, options = messages(record)
    assert configuration.splitlines()[1:] == ["  model.init_args.optimizer.init_args.lr: 0.001 -> 0.002"]
    assert options.splitlines()[1:] == ["  optimizer.0.lr: 0.001 -> 0.002"]


def test_an_unchanged_run_is_exact_and_silent_wherever_it_writes(workplace):
    elsewhere = ["--trainer.default_root_dir=elsewhere", "--trainer.callbacks+=dmpo_lightning.Preemption"]
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        resumed, _ = fit("same", f"--ckpt_path={workplace['half']}", STORED_RATE, *elsewhere)
    assert messages(record) == []
    assert same_weights(resumed, workplace["whole"])
    assert rates(resumed) == rates(workplace["whole"])


CHANGES = {
    "--trainer.gradient_clip_val=0.5": "trainer.gradient_clip_val: 0.2 -> 0.5",
    "--trainer.precision=bf16-true": "trainer.precision: None -> bf16-true",
    "--model.objective.reward_temperature=0.1": ("model.init_args.objective.init_args.reward_temperature: 0.05 -> 0.1"),
    "--data.blanks=[10, 12]": "data.init_args.blanks: [11, 12] -> [10, 12]",
    "--model.optimizer.weight_decay=0.5": "model.init_args.optimizer.init_args.weight_decay: 0.0 -> 0.5",
}


def test_every_key_that_differs_is_named(workplace):
    with pytest.warns(UserWarning, match="stored -> now") as record:
        resumed, _ = fit("changed", f"--ckpt_path={workplace['half']}", STORED_RATE, *CHANGES)
    configuration, options = messages(record)
    assert sorted(configuration.splitlines()[1:]) == sorted(f"  {line}" for line in CHANGES.values())
    assert options.splitlines()[1:] == ["  optimizer.0.weight_decay: 0.0 -> 0.5"]
    assert resumed["optimizer_states"][0]["param_groups"][0]["weight_decay"] == 0.5
    assert resumed["cli_config"]["trainer"]["gradient_clip_val"] == 0.5


def test_an_evaluation_compares_nothing(workplace):
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        arguments = ["--config=sudoku_tiny.yaml", "--config=small.yaml", f"--ckpt_path={workplace['half']}"]
        assert main(["validate", *arguments, OTHER_RATE]) == 0
    assert messages(record) == []


def test_a_checkpoint_of_no_command_line_is_continued(workplace):
    state = torch.load(workplace["half"], weights_only=True)
    del state["cli_config"]
    torch.save(state, "other.ckpt")
    resumed, _ = fit("python", "--ckpt_path=other.ckpt", STORED_RATE)
    assert same_weights(resumed, workplace["whole"])


def test_how_long_and_where_a_run_runs_is_not_compared():
    config = {
        "seed_everything": 0,
        "trainer": {"max_steps": 1, "devices": 1, "logger": None, "precision": "32-true"},
        "model": {"class_path": "A"},
        "data": {"class_path": "B"},
        "ckpt_path": None,
    }
    moved = config | {"trainer": {"max_steps": 2, "devices": 8, "logger": True, "precision": "32-true"}}
    assert compared(config) == compared(moved | {"ckpt_path": "a.ckpt"})
    assert compared(config) != compared(config | {"trainer": {"precision": "bf16-mixed"}})
    assert compared(config) != compared(config | {"seed_everything": 1})
