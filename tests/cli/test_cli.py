"""What the commands leave and show, in a working directory that holds nothing else."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from cli_runs import status

from dmpo_lightning.__main__ import USAGE, main
from dmpo_lightning.commands.arguments import shipped_configs

RECORD = [
    *("index", "sampler", "length", "rollout", "example", "completion"),
    *("answer", "correct", "scores", "effective_length"),
]
FEW = ["--data.sizes={train: 64, validation: 8, test: 8}", "--data.check=verified"]
SHORT = ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--model.micro_batch_size=8"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The run directory of ``test`` with several completions and lengths, and what it printed."""
    folder = tmp_path_factory.mktemp("evaluated")
    options = ["--model.completions_per_prompt=2", "--model.evaluation_lengths=[20, 24]"]
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        assert main(["test", "--config", "sudoku_tiny", *FEW, *options]) == 0
    (run,) = (folder / "runs" / "sudoku_tiny").glob("2*")
    return run, printed.getvalue()


def test_fit_writes_summary_curve_and_config(workplace, capsys):
    options = ["--seed_everything=7", *SHORT, *FEW[:1], "--data.prompts_per_buffer=2"]
    assert main(["fit", "--config", "sudoku_tiny.yaml", *options]) == 0
    run = Path("runs/sudoku_tiny/latest")
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seed"] == 7
    rates = [
        "solve_rate_before",
        "solve_rate_best_temperature_before",
        "solve_rate_after",
        "greedy_before",
        "greedy_after",
    ]
    assert all(0 <= summary[name] <= 1 for name in rates)
    assert summary["solve_rate_best_temperature_before"] == max(
        result["accuracy"]["mean"] for result in summary["before"].values()
    )
    assert summary["seconds"] > 0
    assert (run / "learning_curve.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((run / "rollouts" / "rank0-000000.jsonl").read_text().splitlines()[0])
    assert [len(drawing.splitlines()) for drawing in record["drawings"]] == [5, 5], "of the puzzle and of the answer"
    assert (run / "config.yaml").is_file()
    assert "after, greedy" in capsys.readouterr().out


def test_predict_writes_one_json_line_per_completion(workplace, capsys):
    assert main(["predict", "--config", "sudoku_tiny", *FEW]) == 0
    written = next(workplace.rglob("completions.jsonl"))
    records = [json.loads(line) for line in written.read_text().splitlines()]
    assert [record["index"] for record in records] == sorted([*range(8), *range(8)])  # two samplers
    assert list(records[0]) == RECORD
    said = capsys.readouterr().out.splitlines()
    assert f"  answers     runs/sudoku_tiny/{written.parent.name}/completions.jsonl" in said
    assert "Predicted; 16 completions" in said
    assert not Path("runs/sudoku_tiny/latest").exists(), "of training alone"


def test_an_evaluation_prints_a_table_with_all_that_its_numbers_depend_on(evaluated):
    run, printed = evaluated
    lines = [line.split() for line in printed.splitlines()]
    rows = [line[:2] for line in lines if line and line[0].startswith("Sudoku/")]
    assert rows == [
        ["Sudoku/sampled", "20"],
        ["Sudoku/sampled", "24"],
        ["Sudoku/greedy", "20"],
        ["Sudoku/greedy", "24"],
    ]
    stated = {
        "length": "[20, 24]",
        "steps": '{"sampled": [20, 24], "greedy": [20, 24]}',
        "block": '{"sampled": null, "greedy": null}',
        "temperature": '{"sampled": 1.0, "greedy": 0.0}',
        "dtype": '["float32"]',
        "precision": "32-true",
        "rewards": "published",
        "check": "verified",
        "n": "8",
        "seed": "0",
        "model": "sudoku_tiny",
        "checkpoint": "null",
    }
    for name, value in stated.items():
        assert [name, *value.split()] in lines, name
    assert "accuracy  pass@1  pass@2" in printed
    # Lightning's own table would be a second one.
    assert "test/greedy" not in printed
    assert f"  results     runs/sudoku_tiny/{run.name}/evaluation.json\n" in printed
    assert (run / "report.html").is_file()
    written = json.loads((run / "evaluation.json").read_text())
    assert (written["n"], written["length"], written["split"]) == (8, [20, 24], "test")
    accuracy = written["results"][2]["means"]["accuracy"]
    assert f"{accuracy['mean']:.4f} +- {accuracy['standard_error']:.4f}" in printed


def test_the_records_of_an_evaluation_score_to_the_accuracy_it_printed(evaluated, capsys):
    run, _ = evaluated
    file = run / "completions.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert all(list(record) == RECORD for record in records)
    assert len({tuple(map(record.get, ("index", "sampler", "length", "rollout"))) for record in records}) == 8 * 2 * 4
    assert main(["score", "--task", "sudoku", "--check", "verified", "--file", str(file), "--json"]) == 0
    scored = json.loads(capsys.readouterr().out)["samplers"]
    for result in json.loads((run / "evaluation.json").read_text())["results"]:
        found = scored[f"{result['sampler']}/{result['length']}"]
        assert found["n"] == 16
        assert found["accuracy"] == pytest.approx(result["means"]["accuracy"]["mean"], abs=1e-6)


def test_help_version_and_configs_answer_by_themselves(capsys):
    assert main(["--help"]) == main(["--version"]) == main(["configs"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*shipped_configs(), "validate"])
    for code in ("0 ", "1 ", "2 ", "130 ", "128+N "):
        assert f"\n  {code}" in USAGE


@pytest.mark.parametrize(
    ("given", "used"), [([], 0), (["--seed_everything=3"], 3), (["--seed_everything=3", "--model.seed=5"], 5)]
)
def test_the_model_takes_seed_everything_unless_it_has_its_own(given, used, tmp_path, monkeypatch):
    from dmpo_lightning.commands.fit import DMPOCLI

    seeds = []
    monkeypatch.setattr(DMPOCLI, "_run_subcommand", lambda self, name: seeds.append(self.model.seed))
    monkeypatch.chdir(tmp_path)
    assert status("fit", "--config", "sudoku_tiny", *given) == 0
    assert seeds == [used]
