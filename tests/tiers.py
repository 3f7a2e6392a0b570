"""Which tests run in the core tier, `make test`, and which in `make test-all` alone."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest

LATER = (
    "benchmarks",
    "callbacks/test_callbacks_guards.py",
    "callbacks/test_callbacks_preemption.py",
    "callbacks/test_progress.py",
    "checkpoints/test_checkpoint_export.py",
    "cli/test_arguments.py",
    "cli/test_cli_checkpoints.py",
    "cli/test_cli_resume.py",
    "cli/test_completion.py",
    "cli/test_examples.py",
    "cli/test_generate.py",
    "cli/test_habits.py",
    "cli/test_refusals.py",
    "cli/test_score.py",
    "distributed",
    "models/test_models_countdown_tiny.py",
    "models/test_models_quantization.py",
    "modules/test_checkpoint_fit.py",
    "modules/test_dmpo_adapters.py",
    "modules/test_generating.py",
    "modules/test_generators.py",
    "modules/test_interrupts.py",
    "modules/test_resume_options.py",
    "modules/test_run_directory.py",
    "modules/test_run_length.py",
    "modules/test_sft.py",
    "modules/test_weight_averaging.py",
    "planning/test_planning_command.py",
    "planning/test_planning_measured.py",
    "reports/test_reports_browser.py",
    "tasks/test_tasks_algebra.py",
    "tasks/test_tasks_hostile.py",
)
"""Files and folders of ``tests`` whose tests are all slow: they fit models again and again, or start processes."""


def slow_unless(fast: Callable[..., bool], cases: Iterable[Any]) -> list[Any]:
    """The cases of ``pytest.mark.parametrize``, those of which ``fast`` is not true marked slow.

    A case that is a tuple is given to ``fast`` as its values.
    """
    return [
        case
        if fast(*(case if isinstance(case, tuple) else (case,)))
        else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.slow)
        for case in cases
    ]
