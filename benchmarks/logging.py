"""What all logging costs: rollout buffers with it and without, turn by turn.

    python -m benchmarks.logging --buffers 24

One run trains the embedded model. For every other buffer the line on the screen (a pseudo-terminal), the samples, and
the scalars, histograms and texts of two loggers are switched off. The ratio of the medians is printed, and the share of
a buffer that is spent in the logging itself. Seconds are those of the processor, over all threads, which other load on
the machine changes least.
"""

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from benchmarks.options import check_quarters
from dmpo_lightning import DMPO, WDCE, Backbone, ConfidenceSampler, PromptLoader, load_tokenizer
from dmpo_lightning.callbacks.completion_records import LoggingExtras
from dmpo_lightning.callbacks.progress import ProgressLine


class Switch:
    """Whether the present buffer is logged, and how long buffers took in either case."""

    def __init__(self) -> None:
        self.is_on = True
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.own = 0.0


def switched(kind: type, switch: Switch) -> type:
    """The class, with each hook that Lightning calls left out while the switch is off, and its time taken."""

    def wrap(name: str) -> Any:
        def hook(self: Any, *arguments: Any, **options: Any) -> Any:
            if not switch.is_on and name not in ("on_fit_start", "on_train_start", "on_train_end", "setup", "teardown"):
                return None
            started = time.process_time()
            try:
                return getattr(super(made, self), name)(*arguments, **options)
            finally:
                switch.own += time.process_time() - started

        return hook

    others = ("setup", "teardown", "log_metrics", "save", "_note_denoising")
    names = [name for name in dir(kind) if name.startswith("on_") or name in others]
    made = type(kind.__name__, (kind,), {name: wrap(name) for name in names if callable(getattr(kind, name))})
    return made


class Timed(DMPO):
    """Times each buffer from its collection to that of the next, and turns the switch in between."""

    switch: Switch
    _since = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.buffer.needs_rollouts:
            now = time.process_time()
            # The first two warm up.
            if self.buffers_collected > 2:
                self.switch.seconds[self.switch.is_on].append(now - self._since)
            else:
                self.switch.own = 0.0
            self.switch.is_on = self.buffers_collected % 2 == 0
            self._since = time.process_time()
        return super().training_step(batch, batch_idx)


def main(arguments: list[str] | None = None) -> dict[str, float]:
    options = _options(arguments)
    torch.set_num_threads(1)
    switch = Switch()
    with tempfile.TemporaryDirectory() as folder:
        master, slave = os.openpty()
        threading.Thread(target=_drain, args=(master,), daemon=True).start()
        terminal, screen = os.fdopen(slave, "w"), sys.stderr
        sys.stderr = terminal
        try:
            _fit(options, switch, folder)
        finally:
            sys.stderr = screen
            terminal.close()
    median = {on: statistics.median(seconds) for on, seconds in switch.seconds.items()}
    hooks = switch.own / sum(switch.seconds[True])
    result = {
        "seconds_with": median[True],
        "seconds_without": median[False],
        "ratio": median[True] / median[False],
        "share_in_hooks": hooks,
    }
    print(
        f"{options.buffers} buffers of {options.prompts * options.group} rollouts: {median[True]:.3f} s with all "
        f"logging, {median[False]:.3f} s without, ratio of medians {result['ratio']:.4f}; "
        f"time inside the logging itself {hooks:.2%} of a buffer"
    )
    return result


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--buffers", type=int, default=24, help="at least 5: two warm up, and each kind is timed")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--length", type=int, default=20)
    options = parser.parse_args(arguments)
    if options.buffers < 5:
        parser.error(f"--buffers must be at least 5, got {options.buffers}")
    check_quarters(parser, options.prompts * options.group)
    return options


def _fit(options: argparse.Namespace, switch: Switch, folder: str) -> None:
    tokenizer = load_tokenizer("sudoku_tiny")
    module = Timed(
        Backbone("sudoku_tiny"),
        objective=WDCE(reward_temperature=0.05, baseline="none"),
        sampler=ConfidenceSampler(),
        completion_length=options.length,
        group_size=options.group,
        micro_batch_size=options.prompts * options.group // 4,
        reward=lambda example, completion: sum(map(str.isdigit, completion)) / 20,
    )
    module.switch = switch
    loggers: list[Logger] = [switched(kind, switch)(folder) for kind in (TensorBoardLogger, CSVLogger)]
    callbacks = [switched(kind, switch)() for kind in (ProgressLine, LoggingExtras)]
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4 * options.buffers,
        max_epochs=-1,
        log_every_n_steps=4,
        logger=loggers,
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    examples = [{"prompt": f"{number:04d}"} for number in range(8 * options.prompts)]
    trainer.fit(module, PromptLoader(examples, tokenizer, batch_size=options.prompts))


def _drain(descriptor: int) -> None:
    try:
        while os.read(descriptor, 65536):
            pass
    except OSError:  # how Linux says that nobody writes any more
        pass


if __name__ == "__main__":
    main()
