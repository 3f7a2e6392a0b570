"""Benchmarks as plain Python: examples, prompts, scores."""

from dmpo_lightning.tasks.base import Example, Message, Split, Task
from dmpo_lightning.tasks.sudoku import LatinSquareDemonstrations, Sudoku

__all__ = ["Example", "LatinSquareDemonstrations", "Message", "Split", "Sudoku", "Task"]
