"""What the ranks of a case do; each returns facts that the tests compare."""

import json
import math
import os
import signal
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed
from cpu_strategies import strategy
from dmpo_runs import PROMPTS, TOKENIZER, Recorder, dmpo_of, overlay_options, small_dmpo, trainer
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.distributed.fsdp._fully_shard import _fsdp_collectives, _fsdp_param_group

from dmpo_lightning import (
    DMPO,
    WDCE,
    ConfidenceSampler,
    LoRA,
    Preemption,
    PromptLoader,
    Sampler,
    SavePretrained,
    SkipNonFiniteSteps,
    WinoSampler,
)
from dmpo_lightning.__main__ import main
from dmpo_lightning.checkpoints.reading import newest_readable
from dmpo_lightning.distributed.sharding import whole_weights
from helpers import flip

torch.set_num_threads(1)


def process_rank() -> int:
    return int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])


class Uneven(Sampler):
    """Forgets that other ranks wait: rank 1 runs one forward more."""

    def sample(self, policy, prompt_ids, prompt_mask, *, completion_length, keys):
        sampler = ConfidenceSampler(denoising_steps=4 + process_rank())
        return sampler.sample(policy, prompt_ids, prompt_mask, completion_length=completion_length, keys=keys)


SAMPLERS = {
    "static": lambda: ConfidenceSampler(denoising_steps=4),
    "threshold": lambda: ConfidenceSampler(block_length=4, threshold=0.6),
    "early exit": lambda: ConfidenceSampler(block_length=2, threshold=0.6, early_exit=True),
    "wino": lambda: WinoSampler(threshold=0.3, temperature=1.0),
    "uneven": Uneven,
}


def reward(example, completion):
    """Differs between most completions, so that few groups are without signal."""
    digits = [int(character) if character.isdigit() else 0 for character in completion]
    return sum(digit * (place + 1) for place, digit in enumerate(digits)) / 50 + completion.count(example["digit"]) / 4


def module(
    adapter: str,
    *,
    model: str = "sudoku_tiny",
    sampler: str = "static",
    dropout: float = 0.1,
    rank: int = 4,
    tolerance: float = 1e-4,
    objective: dict | None = None,
    optimizer: str = "AdamW",
    learning_rate: float = 1e-3,
    **options,
) -> DMPO:
    defaults = {
        "objective": WDCE(reward_temperature=0.1, replicates=2, weight_tolerance=tolerance, **objective or {}),
        "sampler": SAMPLERS[sampler](),
        "completion_length": 8,
        "group_size": 4,
        "micro_batch_size": 4,
        "num_iterations": 2,
        "reward": reward,
        "optimizer": lambda parameters: getattr(torch.optim, optimizer)(parameters, lr=learning_rate),
        "seed": 3,
    }
    lora = LoRA(r=rank, alpha=8, dropout=dropout) if adapter == "lora" else None
    dmpo = dmpo_of(model, adapter=lora, **defaults | options)
    with torch.no_grad():
        for name, parameter in dmpo.policy.named_parameters():
            if ".lora_B." in name:  # a policy that differs from its reference
                parameter.copy_(torch.linspace(-0.02, 0.02, parameter.numel()).view_as(parameter))
    return dmpo


def fit(
    kind: str,
    dmpo: DMPO,
    folder: str,
    *,
    steps: int,
    prompts: int = 2,
    count: int = 6,
    accumulate: int = 2,
    callbacks=(),
    timeout: float = 60,
    ckpt_path: str | None = None,
    **flags,
) -> tuple[Trainer, Recorder]:
    """Trains on ``count`` prompts, validates every 4 steps on 5 prompts and saves at each step."""
    torch.manual_seed(process_rank())  # of dropout
    record = Recorder()
    saves = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    options = {
        "max_steps": steps,
        "accumulate_grad_batches": accumulate,
        "gradient_clip_val": 0.5,
        "val_check_interval": 4 * accumulate,
        "check_val_every_n_epoch": None,
        "callbacks": [record, saves, *callbacks],
        "enable_checkpointing": True,
        "strategy": strategy(kind, timeout=timeout),
        "devices": int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
    }
    run = trainer(folder, **options | flags)
    data = [*PROMPTS, {"prompt": "0006", "digit": "6"}]
    loaders = (
        PromptLoader(data[:count], TOKENIZER, batch_size=prompts),
        PromptLoader(data[:5], TOKENIZER, batch_size=2, shuffle=False),
    )
    run.fit(dmpo, *loaders, ckpt_path=ckpt_path)
    return run, record


def sums(dmpo: DMPO) -> list[float]:
    """Of each trained weight."""
    return [float(value.double().sum()) for value in whole_weights(dmpo.policy.model).values()]


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size


def train(
    kind: str,
    adapter: str,
    *,
    cuts: list[int],
    steps: int = 5,
    refresh: int | None = None,
    flags: dict | None = None,
    **options,
) -> dict:
    """A run, and for each of ``cuts`` another one that continues it from its checkpoint at that optimizer step."""
    options |= {"reference_refresh_interval": refresh}
    whole = module(adapter, **options)
    before = sums(whole)
    flags = flags or {}
    run, record = fit(kind, whole, "whole", steps=steps, callbacks=[SavePretrained("exported")], **flags)
    weights, resumed, distances = whole_weights(whole.policy.model), [], []
    for cut in cuts:
        again = module(adapter, **options)
        _, rest = fit(kind, again, f"from {cut}", steps=steps, ckpt_path=f"whole/step={cut}.ckpt", **flags)
        resumed.append(rest.losses)
        reached = whole_weights(again.policy.model)
        distances.append(max(float((weights[name] - reached[name]).abs().max()) for name in weights))
    return {
        "losses": record.losses,
        "resumed": resumed,
        "steps": run.global_step,
        "validation": float(run.callback_metrics["val/sampled/reward"]),
        "moved": max(abs(after - first) for after, first in zip(sums(whole), before, strict=True)),
        "distance": max(distances),
    }


def compared_by_torch(**case) -> dict:
    """A run in which torch compares what the ranks are about to run."""
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    torch.distributed.set_debug_level_from_env()  # which torch reads by itself when it is imported
    return one_run(**case)


def one_run(kind: str, adapter: str, *, steps: int = 4, flags: dict | None = None, **options) -> dict:
    """A run without restart."""
    dmpo = module(adapter, **options)
    run, record = fit(kind, dmpo, "run", steps=steps, **(flags or {}))
    return {
        "losses": record.losses,
        "prompts": record.prompts,
        "steps": run.global_step,
        "validation": {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")},
        "norm": float(run.callback_metrics["gradient/norm"]),
        "weights": sums(dmpo),
        "bytes": size_of(Path(f"run/step={steps}.ckpt")),
        "trainable": sum(value.numel() for value in whole_weights(dmpo.policy.model).values()),
    }


def every_overlay(kind: str, adapter: str, *, overlays: str) -> dict:
    """The losses of one short run of each overlay, with all weights whatever ``adapter``."""
    losses = {}
    for overlay in sorted(Path(overlays).glob("*.yaml")):
        options = overlay_options(overlay) | {"group_size": 2, "micro_batch_size": 2, "reward": reward, "seed": 3}
        dmpo = small_dmpo("sudoku_tiny", **options)
        _, record = fit(kind, dmpo, overlay.stem, steps=2, val_check_interval=None, limit_val_batches=0)
        losses[overlay.stem] = record.losses
    return losses


class Start(Callback):
    """What a run has right after it was restored."""

    def on_train_start(self, trainer, pl_module):
        states = trainer.optimizers[0].state.values()
        self.facts = {
            "step": trainer.global_step,
            "optimizer_steps": sorted({float(state["step"]) for state in states if "step" in state}),
            "collected": pl_module.buffers_collected,
            "weights": sums(pl_module),
        }


def from_checkpoint(kind: str, adapter: str, *, steps: int, saved: str | None = None, rank: int | None = None) -> dict:
    """A run that starts, or continues from what other ranks saved, perhaps more or fewer; or ``rank`` alone does."""
    saved = saved if rank in (None, process_rank()) else None
    dmpo, start = module(adapter, dropout=0.0), Start()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        run, record = fit(kind, dmpo, "run", steps=steps, ckpt_path=saved, callbacks=[start])
    return {
        "start": start.facts,
        "losses": record.losses,
        "steps": run.global_step,
        "collected": dmpo.buffers_collected,
        "weights": sums(dmpo),
        "said": [str(each.message) for each in said],
    }


class Infinite(Callback):
    """Makes the losses of one rank infinite at some batches."""

    def __init__(self, batches: list[int]) -> None:
        self.batches = batches

    def setup(self, trainer, pl_module, stage):
        step = pl_module.training_step

        def broken(batch, batch_idx):
            bad = trainer.global_rank == 1 and batch_idx in self.batches
            return step(batch, batch_idx) * (math.inf if bad else 1.0)

        pl_module.training_step = broken


def counters(checkpoint: str) -> dict:
    """Of a file, or of a folder of FSDP or DeepSpeed."""
    path = Path(checkpoint)
    files = [path] if path.is_file() else [*path.glob("meta.pt"), *path.glob("checkpoint/*model_states.pt")]
    return torch.load(files[0], weights_only=False)["callbacks"]["SkipNonFiniteSteps"]


def with_infinite_losses(kind: str, adapter: str, *, batches: list[int], limit: int = 10, steps: int = 4) -> dict:
    dmpo, skipping = module(adapter), SkipNonFiniteSteps(limit)
    run, _ = fit(kind, dmpo, "run", steps=steps, accumulate=1, callbacks=[Infinite(batches), skipping])
    values = sums(dmpo)
    return {
        "skipped": skipping.total,
        "saved": counters("run/step=2.ckpt")["total"],
        "logged": float(run.callback_metrics["train/skipped_steps"]),
        "steps": run.global_step,
        "finite": all(map(math.isfinite, values)),
        "weights": values,
    }


class Sends(Callback):
    """The last rank sends itself a signal after a batch, of training or of the first validation."""

    def __init__(self, name: str, *, after: int = 2, phase: str = "training") -> None:
        self.number, self.after, self.phase = signal.Signals[name], after, phase

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._send(trainer, "training", batch_idx)

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        self._send(trainer, "validation", batch_idx)

    def _send(self, trainer, phase, batch_idx):
        if phase == self.phase and batch_idx == self.after and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), self.number)


def with_a_lost_rank(kind: str, name: str, *, patience: float) -> dict:
    """Killed, or stopped for good."""
    fit(kind, module("full"), "run", steps=10, callbacks=[Sends(name)], timeout=patience)
    return {}


def preempted(
    kind: str, adapter: str, *, name: str, phase: str = "training", flags: dict | None = None, path: str = ""
) -> dict:
    """A signal to the last rank alone; does not return. Commands are looked for in ``path`` first."""
    os.environ["PATH"] = os.pathsep.join([path, os.environ["PATH"]])
    sends = Sends(name, after=2 if phase == "training" else 0, phase=phase)
    fit(kind, module(adapter), "run", steps=5, callbacks=[sends, Preemption()], **(flags or {}))
    return {}


def resume(kind: str, adapter: str, *, saved: str) -> dict:
    dmpo = module(adapter)
    run, record = fit(kind, dmpo, "resumed", steps=5, ckpt_path=saved, callbacks=[Preemption()])
    return {
        "losses": record.losses,
        "weights": sums(dmpo),
        "steps": run.global_step,
        "validation": {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")},
    }


def life(kind: str, *, steps: int, rank: int = 0, event: str | None = None, count: int = 0, delay: float = 0.0) -> dict:
    """One of the lives of a job: continues from the newest checkpoint, and notes every optimizer step. It may be killed
    on one rank: ``delay`` seconds after the ``count``-th ``batch`` of this life, or after the ``count``-th ``save`` has
    begun to write.
    """
    found = newest_readable(Path("run"))
    dmpo = module("lora")
    with open(f"steps{process_rank()}.jsonl", "a") as notes:
        notes.write(json.dumps({"from": None if found is None else found.name}) + "\n")
        dies = [Dies(event, count, delay)] if event and rank == process_rank() else []
        fit(kind, dmpo, "run", steps=steps, ckpt_path=found and str(found), callbacks=[Notes(notes), *dies])
    return {"weights": sums(dmpo)}


class Dies(Callback):
    """See `life`."""

    def __init__(self, event: str, count: int, delay: float) -> None:
        self.event, self.left, self.delay = event, count, delay

    def setup(self, trainer, pl_module, stage):
        save = trainer.strategy.save_checkpoint

        def saving(*arguments, **options):
            self._happened("save")
            save(*arguments, **options)

        trainer.strategy.save_checkpoint = saving

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._happened("batch")

    def _happened(self, event):
        self.left -= event == self.event
        if event == self.event and self.left == 0:
            threading.Thread(target=self._die, daemon=True).start()

    def _die(self):
        while self.event == "save" and not any(Path("run").rglob("*.partial")):
            time.sleep(1e-4)
        time.sleep(self.delay)
        os.kill(os.getpid(), signal.SIGKILL)


class Notes(Callback):
    def __init__(self, file) -> None:
        self.file = file

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        note = {"step": trainer.global_step, "batch": trainer.fit_loop.total_batch_idx, "loss": outputs["loss"].item()}
        self.file.write(json.dumps(note) + "\n")
        self.file.flush()


def count_gathers(kind: str, *, gather: bool, **options) -> dict:
    """`one_run`, and the collective operations that gather weights while each buffer is collected."""
    calls, counts, collect = [], [], DMPO._collect
    for name in ("all_gather_into_tensor", "_allgather_base", "all_gather_into_tensor_coalesced"):
        count_calls(torch.distributed, name, calls)
    if kind == "fsdp2":
        count_calls(_fsdp_collectives, "foreach_all_gather", calls)
        count_calls(_fsdp_param_group, "foreach_all_gather", calls)

    def collecting(dmpo, batch):
        before = len(calls)
        collect(dmpo, batch)
        counts.append(len(calls) - before)

    DMPO._collect = collecting  # in this process alone
    return one_run(kind, "full", gather_for_generation=gather, **options) | {"gathers": counts}


def count_calls(owner, name: str, calls: list[str]) -> None:
    original = getattr(owner, name, None)
    if original is None:
        return

    def counted(*arguments, **options):
        calls.append(name)
        return original(*arguments, **options)

    setattr(owner, name, counted)


def command_line(arguments: list[str], *, apart: bool) -> dict:
    """With ``apart`` rank 1 is in another folder, where it sees none of the runs that rank 0 sees."""
    if apart and process_rank() == 1:
        Path("apart").mkdir(exist_ok=True)
        os.chdir("apart")
    return {"status": main(arguments)}


def told_early(arguments: list[str], *, told: str, path: str) -> dict:
    """The command line with a signal that a local module sends; does not return. Commands are first looked for in
    ``path``.
    """
    os.environ |= {"TOLD": told, "PATH": os.pathsep.join([path, os.environ["PATH"]])}
    return {"status": main(arguments)}


WEIGHTS = {"whole": ("full", {}), "lora": ("lora", {}), "other rank": ("lora", {"rank": 2})}


def refusals(kind: str, *, pairs: list[tuple[str, str]]) -> list[list[str]]:
    """How checkpoints of one kind of weights are refused by runs of another, and damaged ones: class and text."""
    for wrote in dict(pairs):
        adapter, options = WEIGHTS[wrote]
        fit(kind, module(adapter, **options), wrote, steps=1)
    errors = []
    for wrote, reads in pairs:
        adapter, options = WEIGHTS[wrote if reads == "damaged" else reads]
        if reads == "damaged" and process_rank() == 0:
            saved = Path(wrote, "step=1.ckpt")
            parts = sorted(each for each in saved.rglob("*") if each.suffix in (".distcp", ".pt"))
            flip(saved if saved.is_file() else parts[-1])
        torch.distributed.barrier()
        try:
            fit(kind, module(adapter, **options), "again", steps=2, ckpt_path=f"{wrote}/step=1.ckpt")
        except Exception as error:
            errors.append([type(error).__name__, str(error)])
        else:
            errors.append(["none", ""])
    return errors
