"""What the command line leaves out of what Lightning says. Users of the library keep theirs."""

import logging
import sys
import warnings

SPEAKERS = ("lightning", "lightning.fabric", "lightning.pytorch")
"""Loggers whose handlers print what Lightning says."""
NOISE = ("💡", "GPU available", "TPU available", "HPU available", "Seed set to")
"""How messages begin that advertise, or that `dmpo-lightning` says better."""
KNOWN = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r".*does not have many workers.*",
    r".*Checkpoint directory .* exists and is not empty.*",
)
"""Warnings that Lightning gives in a run without fault, and that nobody can do anything about."""


def quiet() -> None:
    """Silences advertisements, deprecations and warnings without a remedy, unless ``-W`` or PYTHONWARNINGS ask for any.

    Called once torch and Lightning are imported, since warnings that are configured later win.
    """
    for name in SPEAKERS:
        # A filter of the logger itself would not be asked for what its children say.
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(is_news)
    if not sys.stderr.isatty():
        # Its bars are written for terminals, where they show how long a large model still takes to load.
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
    if sys.warnoptions:
        return
    for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.filterwarnings("ignore", category=category)
    for message in KNOWN:
        warnings.filterwarnings("ignore", message=message)


def is_news(record: logging.LogRecord) -> bool:
    """A filter for loggers, which keeps what is none of `NOISE`."""
    return not record.getMessage().startswith(NOISE)
