"""The same numbers in every logger, and in each what it takes beside numbers."""

import csv
import json
import logging
import warnings
from pathlib import Path

import pytest
from dmpo_runs import loader, module, trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dmpo_lightning.callbacks.completion_records import LoggingExtras, log_samples
from dmpo_lightning.terminal import clean_messages, shortened

OF_A_BUFFER = {"time/sampling", "time/scoring", "time/training", "rollouts/seen", "rollouts/per_second", "optimizer/lr"}
HOSTILE = "```\n<script>alert(1)</script>\x1b[2J\x00"


def run(tmp_path, *loggers, **options):
    """Two buffers of four optimizer steps, with a validation after each."""
    fit = trainer(
        tmp_path,
        logger=list(loggers),
        **{
            "callbacks": [LoggingExtras(every_n_buffers=1, prompts=1)],
            "max_steps": 8,
            "max_epochs": -1,
            "log_every_n_steps": 4,
            "val_check_interval": 4,
        }
        | options,
        check_val_every_n_epoch=None,
    )
    dmpo = module()
    fit.fit(dmpo, loader(), loader(shuffle=False))
    return fit, dmpo


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("logged")
    board, table = TensorBoardLogger(folder, name="board"), CSVLogger(folder, name="table")
    run(folder, board, table)
    events = EventAccumulator(board.log_dir, size_guidance={"tensors": 0})
    events.Reload()
    with open(f"{table.log_dir}/metrics.csv", newline="") as file:
        return events, list(csv.DictReader(file))


def test_tensorboard_and_csv_hold_the_same_numbers(logged):
    events, rows = logged
    names = set(events.Tags()["scalars"]) - {"hp_metric"}
    assert names == set(rows[0]) - {"step"}
    assert OF_A_BUFFER <= names
    assert not any("mean" in name.split("/") for name in names)
    for name in names:
        in_table = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        in_board = [(event.step, event.value) for event in events.Scalars(name)]
        assert dict(in_board) == pytest.approx(dict(in_table), rel=1e-5, nan_ok=True), name


def test_what_a_buffer_cost_is_logged_with_it(logged):
    events, _ = logged
    values = {name: [event.value for event in events.Scalars(name)] for name in OF_A_BUFFER}
    assert values["rollouts/seen"] == [8, 16]
    assert values["optimizer/lr"] == pytest.approx([1e-3, 1e-3])
    seconds = [values[f"time/{part}"] for part in ("sampling", "scoring", "training")]
    for sampling, scoring, training, rate in zip(*seconds, values["rollouts/per_second"], strict=True):
        assert min(sampling, scoring, training) > 0
        assert rate == pytest.approx(8 / (sampling + scoring + training), rel=1e-4)


def test_tensorboard_gets_texts(logged):
    events, _ = logged
    texts = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("completion/text/text_summary")]
    assert len(texts) == 2
    assert all(text.startswith("reward ") and "assistant" in text for text in texts)


def test_a_completion_in_tensorboard_is_code_and_nothing_else(tmp_path):
    board = TensorBoardLogger(tmp_path)
    log_samples(board, [{"prompt": "ask", "completion": HOSTILE, "reward": 0.5, "weight": 1.0}], 3)
    board.finalize("success")
    events = EventAccumulator(board.log_dir)
    events.Reload()
    text = events.Tensors("completion/text/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.split("\n\n")[2] == "    ```\n    <script>alert(1)</script>\\x1b[2J\\x00"


def test_long_texts_keep_their_beginning_and_their_end_on_one_line():
    assert shortened("a" * 30 + "\n" + "b" * 30, 30) == "a" * 10 + " ... " + "b" * 20
    assert shortened("\x1b[2J\n", 30) == "\\x1b[2J\\n"


class FullDisk(Callback):
    """Of both loggers, once they have begun. Also root can write no byte there."""

    def on_train_start(self, trainer, pl_module):
        board, table = trainer.loggers
        board.experiment.file_writer.event_writer._general_file_writer.filename = "/dev/full"
        Path(table.log_dir, "metrics.csv").symlink_to("/dev/full")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_run_goes_on_without_loggers_whose_disk_is_full_and_says_so(tmp_path):
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        loggers = [TensorBoardLogger(tmp_path), CSVLogger(tmp_path, name="table")]
        fit, _ = run(tmp_path, *loggers, callbacks=[LoggingExtras(every_n_buffers=1), FullDisk()], log_every_n_steps=1)
    assert fit.global_step == 8
    said = [str(each.message) for each in given]
    for name in ("TensorBoardLogger", "CSVLogger"):
        (first,) = (text for text in said if text.startswith(f"{name} cannot write"))
        assert "OSError(28, 'No space left on device')). The run goes on" in first
        (last,) = (text for text in said if text.startswith(f"{name} could not write"))
        assert int(last.split()[4]) >= 8


@pytest.mark.slow
def test_mlflow_holds_numbers_and_tables(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    from lightning.pytorch.loggers import MLFlowLogger

    # Newer versions ask for a database otherwise, which the small package has not.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/mlruns")
    run(tmp_path, logger)
    client = mlflow.MlflowClient(f"file:{tmp_path}/mlruns")
    metrics = client.get_run(logger.run_id).data.metrics
    assert OF_A_BUFFER | {"reward/total", "val/sampled/accuracy"} <= set(metrics)
    assert metrics["rollouts/seen"] == 16
    content = mlflow.artifacts.download_artifacts(run_id=logger.run_id, tracking_uri=f"file:{tmp_path}/mlruns")
    table = json.loads(Path(content, "completion/text/step_00000000.json").read_text())
    assert table["columns"] == ["prompt", "completion", "reward", "weight"]


@pytest.mark.slow
def test_wandb_holds_numbers_and_tables(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    run(tmp_path, logger)
    summary = dict(logger.experiment.summary)
    wandb.finish()
    assert OF_A_BUFFER | {"reward/total", "val/sampled/accuracy"} <= set(summary)
    assert summary["rollouts/seen"] == 16
    assert summary["completion/text"]["_type"] == "table-file"


def test_log_records_and_warnings_of_a_command_are_printable_whoever_speaks(capsys, caplog):
    factory = logging.getLogRecordFactory()
    try:
        with warnings.catch_warnings():
            clean_messages()
            logging.getLogger("others").warning("a %s", HOSTILE)
            warnings.warn(HOSTILE, RuntimeWarning, stacklevel=1)
            # For users, in words that name neither file nor line.
            warnings.warn("a model\x1b", UserWarning, stacklevel=1)
            # Whose arguments do not fit.
            assert logging.getLogRecordFactory()("a", 10, "a", 1, "%d", ("x",), None).args == ("x",)
    finally:
        logging.setLogRecordFactory(factory)
    cleaned = HOSTILE.replace("\x1b", r"\x1b").replace("\x00", r"\x00")
    assert caplog.messages == [f"a {cleaned}"]
    error = capsys.readouterr().err
    assert f"RuntimeWarning: {cleaned}" in error
    assert error.splitlines()[-1] == r"a model\x1b"
