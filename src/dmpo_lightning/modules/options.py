"""Options of optimizer and scheduler on a resume: those of this run win over those that a checkpoint brings back."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Options = dict[str, Any]
SchedulerFactory = Callable[[Optimizer], LRScheduler]

MOVING = frozenset({"base_lrs", "last_epoch", "_last_lr", "_step_count", "_get_lr_called_within_step", "_is_initial"})
"""What a scheduler counts, or takes from the optimizer. The rest of its state are options."""


REPLAYED = 100_000
"""Steps of a schedule that are tried out before a run, which takes less than a second."""


def check_schedule(scheduler_factory: SchedulerFactory, options: Options, *, steps: int | float) -> None:
    """Tries a schedule out for as many optimizer steps as a run has.

    Raises:
        ValueError: the scheduler raises an error before the run ends, as OneCycleLR does behind its ``total_steps``.
    """
    scheduler = scheduler_factory(_stand_in(options))
    if isinstance(scheduler, ReduceLROnPlateau):
        return
    done = 0
    try:
        for done in _advanced(scheduler, int(min(steps, REPLAYED))):  # noqa: B007  said where the next one fails
            pass
    # It may be anybody's, and raise anything.
    except Exception as error:
        raise ValueError(
            f"`lr_scheduler` {type(scheduler).__name__} ends after {done} optimizer steps, but the run has {steps} "
            f"({error}); give it as many steps as the run, or the run no more (`max_steps`)."
        ) from error


def configured_options(optimizer: Optimizer, scheduler: LRScheduler | None) -> Options:
    """The options of each param group and of the scheduler before the first step, in plain types.

    The learning rate is the one that the scheduler starts from.
    """
    # A scheduler with a warm-up has lowered `lr` by now, and kept what was configured as `initial_lr`.
    groups = [group | {"lr": group.get("initial_lr", group["lr"])} for group in optimizer.param_groups]
    return {
        # `initial_lr` is put there by a scheduler: with and without one the stored options would seem to differ.
        "optimizer": plain(groups, without={"params", "param_names", "initial_lr"}),
        "lr_scheduler": None if scheduler is None else plain(scheduler.state_dict(), without=MOVING),
    }


def plain(value: Any, *, without: frozenset[str] | set[str] = frozenset()) -> Any:
    """A copy in Python's own types, all that ``torch.load(weights_only=True)`` reads.

    Other types, and keys of the names ``without``, are left out.
    """
    if isinstance(value, Mapping):
        kept = {name: each for name, each in value.items() if name not in without and _has_plain_form(each)}
        return {name: plain(each, without=without) for name, each in kept.items()}
    if isinstance(value, list | tuple):
        items = [plain(each, without=without) for each in value if _has_plain_form(each)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, Tensor):
        return value.item()
    # Booleans come before integers, of which they are a subclass: True would be stored as 1.
    if value is None or isinstance(value, bool | str):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _has_plain_form(value: Any) -> bool:
    is_number = isinstance(value, Tensor) and value.numel() == 1
    return value is None or is_number or isinstance(value, Mapping | list | tuple | bool | str | Integral | Real)


def differences(stored: Any, now: Any, *, name: str = "") -> dict[str, tuple[Any, Any]]:
    """What differs, by dotted key, as a pair of the stored and the present value. An absent one counts as None."""
    before, after = _parts(stored), _parts(now)
    if before is None or after is None:
        return {} if stored == now else {name: (stored, now)}
    differing: dict[str, tuple[Any, Any]] = {}
    for key in before | after:
        differing |= differences(before.get(key), after.get(key), name=f"{name}.{key}" if name else str(key))
    return differing


def _parts(value: Any) -> dict[Any, Any] | None:
    """What is compared part by part: a mapping, or a list of mappings such as param groups."""
    if isinstance(value, list) and any(isinstance(each, Mapping) for each in value):
        return dict(enumerate(value))
    return dict(value) if isinstance(value, Mapping) else None


def differences_text(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """One line each."""
    return "\n".join(f"  {name}: {stored} -> {now}" for name, (stored, now) in differing.items())


def take_over(
    optimizer: Any,
    scheduler: LRScheduler | None,
    *,
    stored: Options,
    now: Options,
    scheduler_factory: SchedulerFactory | None,
    steps: int,
) -> None:
    """Gives a restored optimizer and scheduler the options of this run where they differ, and says so.

    ``optimizer`` is anything with ``param_groups``, such as DeepSpeed's wrappers. Learning rates, and what else a
    scheduler moves, become what they would be after ``steps`` optimizer steps of this run's schedule. Scaling the
    present rate would not do: a schedule of another length, or with a floor, is at another point of its curve.
    """
    differing = differences(stored, now)
    if not differing:
        return
    rank_zero_warn(
        "The checkpoint's optimizer and scheduler had other options; this run's are used (stored -> now):\n"
        + differences_text(differing)
    )
    moved = _stand_in(now)
    again = None if scheduler_factory is None else scheduler_factory(moved)
    if isinstance(again, ReduceLROnPlateau) and scheduler is not None:
        before, after = stored["lr_scheduler"] or {}, now["lr_scheduler"]
        scheduler.load_state_dict({name: value for name, value in after.items() if before.get(name) != value})
        for group, then, reached in zip(optimizer.param_groups, stored["optimizer"], moved.param_groups, strict=False):
            # By how much it has lowered the rate follows from what it has seen, and not from a number of steps.
            reached["lr"] *= group["lr"] / then["lr"] if "patience" in before else 1.0
    elif again is not None and scheduler is not None:
        for _ in _advanced(again, steps):
            pass
        scheduler.load_state_dict(again.state_dict())
    for group, reached in zip(optimizer.param_groups, moved.param_groups, strict=False):
        _set(group, {name: value for name, value in reached.items() if name != "params"})


def _stand_in(options: Options) -> Optimizer:
    """What a schedule runs on without the run's weights: groups alone, since a wrapper takes no scheduler."""
    groups = options["optimizer"]
    # Those that move momentum or betas, such as OneCycleLR, look for them in `defaults` as well.
    return Optimizer([group | {"params": [torch.zeros(1)]} for group in groups], dict(groups[0]))


def _advanced(scheduler: LRScheduler, steps: int) -> Iterator[int]:
    """Advances a schedule by so many steps, and counts those that it has made before each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*before.*optimizer.step.*")
        for step in range(steps):
            yield step
            scheduler.step()


def _set(group: dict[str, Any], options: Options) -> None:
    for name, value in options.items():
        # An option in a tensor stays in that tensor, as torch's own schedulers keep it.
        if isinstance(group.get(name), Tensor):
            group[name].fill_(value)
        else:
            group[name] = value
