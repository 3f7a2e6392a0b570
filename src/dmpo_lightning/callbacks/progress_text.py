"""What is known of a running job, as one line that fits a terminal, or as a plain line for a log file."""

from dataclasses import dataclass
from typing import Literal

Columns = Literal["long", "short"]

SHORT_PHASES = {"sampling": "sample", "training": "train", "validating": "val", "evaluating": "eval"}
"""What narrow terminals read instead."""
SHORTEST_BAR, LONGEST_BAR = 6, 30


@dataclass
class Progress:
    """Where a run is. What is not known yet is None, and is left out of the lines.

    Args:
        phase: what is being done.
        done: of ``total``, in this phase.
        total: None leaves the counts out.
        denoised: denoising steps done, of those that the present completions take.
        denoising_steps: None leaves the counts out.
        step: optimizer steps done.
        steps: of the whole run.
        loss: shown where there is no reward.
        reward: mean over a rollout buffer.
        accuracy: of the last validation, by its first sampler.
        ess: effective sample size, as a share of a group.
        informative: the share of groups whose rewards differ.
        rate: rollouts per second.
        seconds_left: of the run.
    """

    phase: str = ""
    done: int = 0
    total: int | None = None
    denoised: int = 0
    denoising_steps: int | None = None
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    reward: float | None = None
    accuracy: float | None = None
    ess: float | None = None
    informative: float | None = None
    rate: float | None = None
    seconds_left: float | None = None


def status_line(progress: Progress, columns: int) -> str:
    """The progress in at most this many columns: full words and a bar where they fit, else less."""
    parts = [_head(progress, "long"), *_fields(progress, "long")]
    for full in ("  ".join(parts), " ".join(parts)):
        if len(full) <= columns:
            bar = _bar(progress, columns - len(full) - 3)
            return f"{bar} {full}" if bar else full
    short = [_head(progress, "short"), *_fields(progress, "short")]
    # What stands last matters least, but for the time left, which stays as long as there is room for anything.
    while len(short) > 1 and len(" ".join(short)) > columns:
        del short[-2 if progress.seconds_left is not None and len(short) > 2 else -1]
    return " ".join(short)[:columns]


def plain_line(progress: Progress) -> str:
    """The progress for a log file, of any length and without a phase, which the line outlives."""
    return ", ".join([f"step {_steps(progress)}", *_fields(progress, "long")])


def duration(seconds: float) -> str:
    """As clocks show it: 0:07, 12:34, 1:02:03, and 2d 01:02:03 above a day."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def number(value: float) -> str:
    """Three digits behind the point, or about four in all where the number is large."""
    return f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"


def _head(progress: Progress, columns: Columns) -> str:
    phase = progress.phase if columns == "long" else SHORT_PHASES.get(progress.phase, progress.phase)
    counts = [] if progress.total is None else [f"{progress.done}/{progress.total}"]
    if progress.denoising_steps is not None:
        counts.append(f"{progress.denoised}/{progress.denoising_steps}")
    return " ".join(part for part in (_steps(progress), phase, *counts) if part)


def _steps(progress: Progress) -> str:
    if progress.step is None:
        return ""
    return f"{progress.step}" if progress.steps is None else f"{progress.step}/{progress.steps}"


def _fields(progress: Progress, columns: Columns) -> list[str]:
    """The measures in the order of what they matter."""
    is_long = columns == "long"
    fields = []
    if progress.reward is not None:
        fields.append(f"{'reward' if is_long else 'rew'} {number(progress.reward)}")
    elif progress.loss is not None:
        fields.append(f"loss {number(progress.loss)}")
    if progress.accuracy is not None:
        fields.append(f"{'accuracy' if is_long else 'acc'} {progress.accuracy:.3f}")
    if progress.ess is not None:
        fields.append(f"ess {progress.ess:.2f}")
    if progress.informative is not None:
        fields.append(f"{'informative' if is_long else 'inf'} {progress.informative:.0%}")
    if progress.rate is not None:
        fields.append(f"{_rate(progress.rate)}{' rollouts/s' if is_long else '/s'}")
    if progress.seconds_left is not None:
        fields.append(f"{duration(progress.seconds_left)}{' left' if is_long else ''}")
    return fields


def _rate(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 100 else f"{rate:.2g}"


def _bar(progress: Progress, room: int) -> str:
    if progress.step is None or not progress.steps or room < SHORTEST_BAR:
        return ""
    length = min(room, LONGEST_BAR)
    filled = length * progress.step // progress.steps
    return f"[{'=' * filled}{' ' * (length - filled)}]"
