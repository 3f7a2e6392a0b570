"""Benchmarks as plain Python: examples, prompts, scores. A new one is its file here and a line in `_HOMES`."""

from dmpo_lightning.tasks.base import Task
from dmpo_lightning.tasks.countdown import Countdown
from dmpo_lightning.tasks.gsm8k import GSM8K
from dmpo_lightning.tasks.math500 import Math500
from dmpo_lightning.tasks.sudoku import Sudoku

__all__ = ["GSM8K", "Countdown", "Math500", "Sudoku", "Task"]
