"""A full disk costs a run its log and nothing else."""

import warnings
from pathlib import Path

import pytest
from dmpo_runs import loader, module, trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from dmpo_lightning.callbacks.forgiving_loggers import ForgivingLoggers

FULL = Path("/dev/full")


class FillDisk(Callback):
    """From the first optimizer step on the logger's file is one that never has room."""

    def on_train_start(self, trainer, pl_module):
        file = Path(trainer.logger.log_dir, "metrics.csv")
        file.unlink(missing_ok=True)
        file.symlink_to(FULL)


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, which Linux has")
def test_a_run_goes_on_where_the_disk_of_its_logger_is_full(tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit = trainer(
        tmp_path,
        max_steps=4,
        max_epochs=-1,
        log_every_n_steps=1,
        logger=logger,
        callbacks=[ForgivingLoggers(), FillDisk()],
    )
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        fit.fit(module(), loader())
    assert fit.global_step == 4
    said = [str(each.message) for each in given if "cannot write" in str(each.message)]
    assert len(said) == 1
    assert said[0].startswith("CSVLogger cannot write: [Errno 28] No space left on device")
