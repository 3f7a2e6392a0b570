"""What the report before and after says when its folder cannot be written."""

import warnings

from dmpo_runs import module, trainer
from test_run_directory import Held

from dmpo_lightning import BeforeAfterReport, ConfidenceSampler
from dmpo_lightning.callbacks.progress import ProgressLine


def test_the_table_is_printed_and_what_is_lost_is_said_where_no_file_can_be_written(tmp_path, capsys):
    occupied = tmp_path / "occupied"
    occupied.write_text("a file stands where the folder would be")
    samplers = {"temperature_1": ConfidenceSampler(denoising_steps=4), "greedy": ConfidenceSampler(temperature=0.0)}
    report = BeforeAfterReport(samplers, curve=("val/sampled/accuracy", "val/greedy/accuracy"))
    run = trainer(occupied, max_steps=4, max_epochs=-1, enable_progress_bar=True, callbacks=[ProgressLine(), report])
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        run.fit(module(), datamodule=Held())
    assert run.global_step == 4
    shown = capsys.readouterr()
    assert "before, temperature_1" in shown.out
    assert "after, greedy" in shown.out
    assert "Next: " not in shown.out
    assert "Evaluating the base on 6 held-out examples with 2 samplers ..." in shown.err.splitlines()
    said = [str(each.message) for each in given if "could not be written" in str(each.message)]
    assert len(said) == 1
    assert said[0].startswith(f"summary.json and learning_curve.png could not be written to {occupied}: [Errno ")
