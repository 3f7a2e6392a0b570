"""A check for debugging: whether ranks run equally many forwards."""

from typing import Any

from dmpo_lightning.distributed.ranks import gather_ranks


class LockStep:
    """Names ranks that would wait for each other without end.

    Before each forward, and at the end of each phase, every rank says what it is about to do.
    """

    def __init__(self) -> None:
        self.forwards = 0

    def before_forward(self, phase: str, model: str) -> None:
        """Raises RuntimeError on every rank if another rank is about to do something else."""
        self._compare({"phase": phase, "does": f"runs another of the {model}"})
        self.forwards += 1

    def end(self, phase: str) -> None:
        """Does the same at the end of a phase. The count then starts over."""
        self._compare({"phase": phase, "does": "is done"})
        self.forwards = 0

    def _compare(self, own: dict[str, Any]) -> None:
        ranks = gather_ranks(own | {"forwards": self.forwards})
        if any(rank != ranks[0] for rank in ranks):
            said = "; ".join(
                f"rank {number}, {each['phase']} after {each['forwards']} forwards, {each['does']}"
                for number, each in enumerate(ranks)
            )
            raise RuntimeError(
                f"Ranks are out of step, which would hang where forwards gather weights: {said}. A sampler must run "
                "equally many forwards on every rank: let it end where `policy.anywhere(work is left)` is False."
            )
