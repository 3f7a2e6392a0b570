"""Calls in worker processes that are killed when they take too long. Imports the standard library alone."""

from dmpo_lightning.workers.pool import CallError, TimeLimitError, WorkerDiedError, WorkerPool

__all__ = ["CallError", "TimeLimitError", "WorkerDiedError", "WorkerPool"]
