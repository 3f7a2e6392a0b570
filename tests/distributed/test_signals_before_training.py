"""A signal before training ends a run with a word, and as a job that goes back into the queue."""

import signal
from textwrap import dedent

import pytest
from ranks import end_ranks
from small_run import ARGUMENTS, write_small

TOLD = """
    import os, signal
    from lightning.pytorch import Callback

    def tell(when):
        if os.environ["TOLD"].split(":")[0] == when:
            os.kill(os.getpid(), signal.Signals[os.environ["TOLD"].split(":")[1]])

    class Sender(Callback):
        def on_fit_start(self, trainer, pl_module):
            tell("start")

        def on_validation_batch_end(self, trainer, *arguments):
            assert trainer.sanity_checking
            tell("sanity check")

        def on_train_batch_start(self, *arguments):
            raise AssertionError("it trains")

    def reward(example, completion):
        tell("evaluation")
        return 1.0
"""
PREEMPTION = "--trainer.callbacks+=dmpo_lightning.Preemption"
PLUGIN = "lightning.pytorch.plugins.environments.SLURMEnvironment"
SLOW = pytest.mark.slow
CASES = [
    ("start:SIGUSR1", [], True),
    pytest.param("start:SIGUSR1", ["--trainer.strategy=auto"], True, marks=SLOW),
    pytest.param(
        "start:SIGUSR1", [f"--trainer.plugins={PLUGIN}", "--trainer.plugins.auto_requeue=false"], False, marks=SLOW
    ),
    pytest.param("sanity check:SIGTERM", ["--trainer.num_sanity_val_steps=1"], False, marks=SLOW),
    pytest.param("evaluation:SIGUSR1", ["--trainer.num_sanity_val_steps=0"], True, marks=SLOW),
]


@pytest.mark.parametrize(("told", "options", "requeued"), CASES)
def test_a_signal_before_training_is_said_and_requeues_as_in_training(tmp_path, told, options, requeued):
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    (tmp_path / "scontrol").chmod(0o755)
    folder = tmp_path / "job"
    folder.mkdir()
    (folder / "told.py").write_text(dedent(TOLD))
    write_small(folder, strategy="lightning.pytorch.strategies.DDPStrategy", reports=True)
    arguments = [*ARGUMENTS, "--model.reward=told.reward", "--trainer.callbacks+=told.Sender", PREEMPTION, *options]
    case = {"arguments": arguments, "told": told, "path": str(tmp_path)}
    ended = end_ranks("cases.told_early", 1, folder, environment="slurm nodes", **case)
    number = signal.Signals[told.split(":")[1]]
    assert ended.statuses == [128 + number], ended.log(0)[-3000:]
    assert "nothing was trained since the start" in ended.log(0)
    assert not list(folder.rglob("*.ckpt"))
    asked = tmp_path / "asked"
    assert (asked.read_text() if asked.exists() else "") == ("requeue 4711\n" if requeued else "")
