import os
import signal

import pytest
import torch
from dmpo_runs import Recorder, loader, module, trainer, weights
from lightning.pytorch.callbacks import Callback

from dmpo_lightning import Preemption
from dmpo_lightning.checkpoints import newest_readable


class Killer(Callback):
    """Sends a signal to this process after a training batch."""

    def __init__(self, number: int, *, after: int) -> None:
        self.number, self.after = number, after

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == self.after:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "accumulate", "after", "saved_at"), [("SIGTERM", 1, 2, 4), ("SIGUSR1", 2, 2, 2)])
def test_a_preempted_run_saves_at_the_next_optimizer_step_and_continues_exactly(
    tmp_path, number, accumulate, after, saved_at
):
    options = {"max_steps": 8, "accumulate_grad_batches": accumulate}
    whole, record = module(), Recorder()
    trainer(tmp_path, callbacks=[record], **options).fit(whole, loader())
    before = signal.getsignal(signal.Signals[number])
    stopped = trainer(tmp_path, callbacks=[Preemption(), Killer(signal.Signals[number], after=after)], **options)
    with pytest.raises(SystemExit) as exit_:
        stopped.fit(module(), loader())
    assert exit_.value.code == 128 + signal.Signals[number]
    assert stopped.global_step == saved_at
    assert signal.getsignal(signal.Signals[number]) == before
    checkpoint = newest_readable(tmp_path)
    assert checkpoint is not None
    assert checkpoint.name == "preempted.ckpt"
    resumed, rest = module(), Recorder()
    trainer(tmp_path, callbacks=[rest], **options).fit(resumed, loader(), ckpt_path=str(checkpoint))
    assert torch.equal(weights(resumed), weights(whole))
    assert rest.losses == record.losses[saved_at * accumulate :]


def test_unknown_signals_are_refused():
    with pytest.raises(ValueError, match=r"got \['SIGNONE'\]"):
        Preemption(["SIGNONE"])
