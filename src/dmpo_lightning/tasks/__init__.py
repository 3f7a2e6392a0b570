"""Benchmarks as plain Python: examples, prompts, scores."""

from dmpo_lightning.tasks.base import Example, Message, Share, Split, Task, Variant, Verdict
from dmpo_lightning.tasks.countdown import Countdown
from dmpo_lightning.tasks.demonstrations import CountdownDemonstrations, JsonlPairs, LatinSquareDemonstrations
from dmpo_lightning.tasks.gsm8k import GSM8K
from dmpo_lightning.tasks.math500 import Math500
from dmpo_lightning.tasks.sudoku import Sudoku

__all__ = [
    "GSM8K",
    "Countdown",
    "CountdownDemonstrations",
    "Example",
    "JsonlPairs",
    "LatinSquareDemonstrations",
    "Math500",
    "Message",
    "Share",
    "Split",
    "Sudoku",
    "Task",
    "Variant",
    "Verdict",
]
