"""A checkpoint that is saved on an exception, or between two steps, continues the run bit for bit."""

import csv
import signal
from itertools import product

import pytest
import torch
from dmpo_runs import PROMPTS, TOKENIZER, Recorder, digit_share, loader, module, trainer, weights
from lightning.pytorch.callbacks import Callback, OnExceptionCheckpoint
from lightning.pytorch.loggers import CSVLogger

from dmpo_lightning import LoRA, PromptLoader
from tiers import slow_unless

ADAPTED = {"adapter": LoRA(r=2, alpha=4, dropout=0.3)}


class InterruptError(Exception):
    """What interrupts a run."""


class StopAt(Callback):
    """Raises in a hook, at the training batch of this number over all epochs."""

    def __init__(self, hook, number):
        self.number = number
        setattr(self, hook, self.stop)

    def stop(self, trainer, *rest, **more):
        if trainer.fit_loop.total_batch_idx == self.number:
            raise InterruptError


def failing_reward(at):
    calls = []

    def reward(example, completion):
        calls.append(example)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return digit_share(example, completion)

    return reward


def run(tmp_path, made, *, callbacks=(), checkpoint=None, **flags):
    # Dropout draws from this generator. A new process is seeded, but has drawn nothing.
    torch.manual_seed(0 if checkpoint is None else 1)
    record = Recorder()
    fit = trainer(tmp_path, callbacks=[record, *callbacks], enable_checkpointing=True, **flags)
    fit.fit(made, loader(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return fit, record


def check_resumed(tmp_path, make, interrupt, flags, *, reward=digit_share):
    whole = make(reward=digit_share)
    _, expected = run(tmp_path, whole, **flags)
    with pytest.raises((InterruptError, SystemExit, KeyboardInterrupt)):
        run(tmp_path, make(reward=reward), callbacks=[*interrupt, OnExceptionCheckpoint(tmp_path)], **flags)
    again = make(reward=digit_share)
    fit, record = run(tmp_path, again, checkpoint=tmp_path / "on_exception.ckpt", **flags)
    assert record.losses == expected.losses[len(expected.losses) - len(record.losses) :]
    assert record.prompts == expected.prompts[len(expected.prompts) - len(record.prompts) :]
    assert torch.equal(weights(again), weights(whole))
    assert fit.global_step == flags["max_steps"]
    assert (again.buffers_collected, again.rollouts_seen) == (whole.buffers_collected, whole.rollouts_seen)


@pytest.mark.parametrize(
    ("accumulation", "at"), slow_unless(lambda *case: case == (2, 17), product([1, 2], [3, 17, 33]))
)
def test_an_interrupt_while_a_reward_is_computed(tmp_path, accumulation, at):
    """Eight completions a buffer, so in the first, the third and the fifth, which is the second of an epoch."""
    flags = {"max_steps": 18 // accumulation, "accumulate_grad_batches": accumulation}
    check_resumed(tmp_path, module, [], flags, reward=failing_reward(at))


HOOKS = [
    *("on_train_batch_start", "on_before_zero_grad", "on_before_backward", "on_after_backward"),
    *("on_before_optimizer_step", "on_train_batch_end"),
]
FAST_STOPS = {("on_before_zero_grad", 12), ("on_before_optimizer_step", 12), ("on_train_batch_end", 5)}


@pytest.mark.parametrize(("hook", "number"), slow_unless(lambda *case: case in FAST_STOPS, product(HOOKS, [5, 12])))
def test_an_exception_anywhere_in_a_step(tmp_path, hook, number):
    """In the middle of a buffer, and in the first batch of an epoch."""
    check_resumed(tmp_path, lambda **o: module(**ADAPTED, **o), [StopAt(hook, number)], {"max_steps": 15})


@pytest.mark.parametrize(
    ("hook", "number"),
    slow_unless(
        lambda *case: case == ("on_after_backward", 7),
        [("on_train_batch_start", 7), ("on_before_backward", 12), ("on_after_backward", 7), ("on_after_backward", 12)],
    ),
)
def test_an_exception_within_an_accumulated_step(tmp_path, hook, number):
    flags = {"max_steps": 8, "accumulate_grad_batches": 2}
    check_resumed(tmp_path, lambda **o: module(**ADAPTED, **o), [StopAt(hook, number)], flags)


def test_prompts_per_buffer_is_part_of_a_buffers_layout(tmp_path):
    first = trainer(tmp_path, max_steps=3)
    first.fit(module(), loader())
    first.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match="'prompts_per_buffer': 3.*collected afresh"):
        trainer(tmp_path, max_steps=6).fit(module(), loader(3), ckpt_path=tmp_path / "a.ckpt")


class SaveAt(Callback):
    def __init__(self, number, path):
        self.number, self.path = number, path

    def on_train_batch_end(self, trainer, *rest):
        if trainer.fit_loop.total_batch_idx == self.number:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize(
    ("number", "validates"),
    slow_unless(lambda *case: case == (12, True), [(0, True), (3, True), (4, False), (12, True), (13, True)]),
)
def test_the_steps_of_the_logger_do_not_drift(tmp_path, number, validates):
    """Saved anywhere, at two batches a step and twelve an epoch."""
    flags = {"max_steps": 8, "accumulate_grad_batches": 2, "log_every_n_steps": 1}

    def logged(name, made, checkpoint=None, callbacks=()):
        logger = CSVLogger(tmp_path, name=name)
        fit = trainer(tmp_path, logger=logger, callbacks=list(callbacks), val_check_interval=4, **flags)
        held = (loader(3, shuffle=False),) if validates else ()
        fit.fit(made, loader(), *held, ckpt_path=checkpoint)
        with open(f"{logger.log_dir}/metrics.csv", encoding="utf-8") as file:
            return [(row["step"], row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]

    whole = logged("whole", module(), callbacks=[SaveAt(number, tmp_path / "a.ckpt")])
    rest = logged("rest", module(), tmp_path / "a.ckpt")
    assert len(rest) == 8 - (number + 1) // 2
    assert rest == whole[len(whole) - len(rest) :]


def test_a_dataset_that_fails_once_loses_no_prompt(tmp_path):
    class Rows(list):
        fails = False

        def __getitem__(self, place):
            if self.fails and place == 4:
                Rows.fails = False
                raise InterruptError
            return super().__getitem__(place)

    def prompts():
        return PromptLoader(Rows(PROMPTS), TOKENIZER, batch_size=2)

    def fit(made, **options):
        record = Recorder()
        checkpoint = options.pop("ckpt_path", None)
        callbacks = [record, *options.pop("callbacks", [])]
        run = trainer(tmp_path, max_steps=12, callbacks=callbacks, enable_checkpointing=True)
        run.fit(made, prompts(), ckpt_path=checkpoint)
        return record

    whole, again = module(), module()
    expected = fit(whole)
    Rows.fails = True
    with pytest.raises(InterruptError):
        fit(module(), callbacks=[OnExceptionCheckpoint(tmp_path)])
    record = fit(again, ckpt_path=tmp_path / "on_exception.ckpt")
    assert record.prompts == expected.prompts[len(expected.prompts) - len(record.prompts) :]
    assert torch.equal(weights(again), weights(whole))
