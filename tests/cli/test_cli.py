"""The command line, from any directory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import status

from dmpo_lightning.__main__ import main
from dmpo_lightning.commands.arguments import config_directory, resolve_config, shipped_configs

RUNNABLE = [name for name in shipped_configs() if "/" not in name]


def command(*arguments, cwd, timeout=240):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "dmpo_lightning", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def printed_config(capsys, *arguments):
    import yaml

    with pytest.raises(SystemExit) as stop:
        main(["fit", *arguments, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def refusal(capsys, *arguments):
    assert status("fit", "--config", "sudoku_tiny", *arguments) == 2
    return capsys.readouterr().err


SHORT = ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--model.micro_batch_size=8"]
SMALL = ["--data.prompts_per_buffer=2", "--data.sizes={train: 64, validation: 16, test: 16}"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A short run of the shipped configuration from an empty directory, and what it printed."""
    folder = tmp_path_factory.mktemp("anywhere")
    done = command("fit", "--config", "sudoku_tiny.yaml", "--seed_everything=7", *SHORT, *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


@pytest.mark.slow
def test_a_checkpoint_can_be_tested_and_exported(fitted):
    folder, _ = fitted
    checkpoint = "runs/sudoku_tiny/latest/checkpoints/last.ckpt"
    done = command("test", "--config", "sudoku_tiny.yaml", "--ckpt_path", checkpoint, *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "Sudoku/greedy" in done.stdout
    done = command("export", "--ckpt_path", checkpoint, "--output", "model", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "39 trained tensors" in done.stdout
    done = command("validate", "--config", "sudoku_tiny.yaml", "--model.model=model", *SMALL, cwd=folder)
    assert done.returncode == 0, done.stderr


def test_fit_from_any_directory_writes_summary_curve_and_config(fitted):
    folder, printed = fitted
    run = folder / "runs" / "sudoku_tiny" / "latest"
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
    assert (run / "config.yaml").is_file()
    assert "after, greedy" in printed


def test_predict_writes_one_json_line_per_completion(tmp_path):
    done = command("predict", "--config", "sudoku_tiny", *SMALL, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = next(tmp_path.rglob("completions.jsonl"))
    lines = written.read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 2 * 16  # two samplers
    assert sorted({record["index"] for record in records}) == list(range(16))
    assert [record["index"] for record in records] == sorted(record["index"] for record in records)
    assert list(records[0]) == RECORD
    assert f"Written to runs/sudoku_tiny/{written.parent.name}: completions.jsonl\n" in done.stdout
    assert not (tmp_path / "runs/sudoku_tiny/latest").exists(), "of training alone"


RECORD = [
    *("index", "sampler", "length", "rollout", "example", "completion"),
    *("answer", "correct", "scores", "effective_length"),
]
FEW = ["--data.sizes={train: 64, validation: 8, test: 8}", "--data.check=verified"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The run directory of ``test`` with several completions and lengths, and what it printed."""
    folder = tmp_path_factory.mktemp("evaluated")
    options = ["--model.completions_per_prompt=2", "--model.evaluation_lengths=[20, 24]"]
    done = command("test", "--config", "sudoku_tiny", *FEW, *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs" / "sudoku_tiny").iterdir()
    return run, done.stdout


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
        "length": "20 24",
        "steps": "sampled: 20 24, greedy: 20 24",
        "block": "sampled: -, greedy: -",
        "temperature": "sampled: 1.0, greedy: 0.0",
        "dtype": "float32",
        "precision": "32-true",
        "rewards": "published",
        "check": "verified",
        "n": "8",
        "seed": "0",
        "model": "sudoku_tiny",
        "checkpoint": "-",
    }
    for name, value in stated.items():
        assert [name, *value.split()] in lines, name
    assert "accuracy  pass@1  pass@2" in printed
    # Lightning's own table would be a second one.
    assert "test/greedy" not in printed
    assert f"Written to runs/sudoku_tiny/{run.name}: evaluation.json, completions.jsonl\n" in printed
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


@pytest.mark.parametrize("name", RUNNABLE)
def test_every_shipped_configuration_parses(name, capsys):
    assert printed_config(capsys, "--config", name)["model"]["class_path"].startswith("dmpo_lightning.")


def test_a_bare_name_is_found_with_and_without_ending_and_a_file_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (
        resolve_config("sudoku_tiny")
        == resolve_config("sudoku_tiny.yaml")
        == str(config_directory() / "sudoku_tiny.yaml")
    )
    Path("sudoku_tiny.yaml").write_text("{}")
    assert resolve_config("sudoku_tiny.yaml") == "sudoku_tiny.yaml"


def test_a_misspelt_config_name_lists_what_exists(capsys):
    assert main(["fit", "--config", "sudoku_tinny"]) == 2
    error = capsys.readouterr().err
    assert "Did you mean sudoku_tiny.yaml?" in error
    assert all(name in error for name in shipped_configs())


def test_several_configs_merge_in_order_and_the_command_line_wins(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("model:\n  init_args:\n    group_size: 4\n    num_iterations: 2\n")
    (tmp_path / "b.yaml").write_text("model:\n  init_args:\n    num_iterations: 3\n")
    files = ["--config", "sudoku_tiny", "--config", str(tmp_path / "a.yaml"), f"--config={tmp_path / 'b.yaml'}"]
    merged = printed_config(capsys, *files, "--model.completion_length=24")["model"]["init_args"]
    assert (merged["group_size"], merged["num_iterations"], merged["completion_length"]) == (4, 3, 24)


@pytest.mark.parametrize(
    ("argument", "owner", "meant"),
    [
        ("--model.group_sizes=4", "dmpo_lightning.DMPO has:", "group_size"),
        ("--model.objective.baselin=none", "dmpo_lightning.WDCE has:", "baseline"),
        ("--data.blankz=3", "dmpo_lightning.SudokuDataModule has:", "blanks"),
        ("--trainer.max_stepz=4", "Options there: trainer.accelerator", "trainer.max_steps"),
    ],
)
def test_a_misspelt_key_lists_what_exists(argument, owner, meant, capsys):
    error = refusal(capsys, argument)
    assert owner in error
    assert f"Did you mean {meant}?" in error


def test_a_misspelt_key_in_a_file_lists_what_exists(tmp_path, capsys):
    (tmp_path / "a.yaml").write_text("model:\n  init_args:\n    group_sizes: 4\n")
    assert "Did you mean group_size?" in refusal(capsys, "--config", str(tmp_path / "a.yaml"))


def test_help_version_and_configs_answer_by_themselves(capsys):
    assert main(["--help"]) == main(["--version"]) == main(["configs"]) == 0
    printed = capsys.readouterr().out
    assert "sudoku_tiny.yaml" in printed
    assert "validate" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.group_size=1"], "`group_size` must be at least 2"),
        (
            ["--model.objective.reward_temperature=-1"],
            "`reward_temperature` (alpha) must be positive and finite, got -1.0",
        ),
        (["--model.objective.proximal_coefficient=2"], "`proximal_coefficient` must be in (0, 1], got 2.0"),
        (["--model.objective.replicates=3"], "`replicates` must be positive, and even when `antithetic`"),
        (["--model.sampler.block_length=6"], "`completion_length` must be a multiple of `block_length`, got 20 and 6"),
        (["--data.blanks=[3, 14]"], "`blanks` must be two counts"),
        (["--model.model=no/such_model"], "Cannot load 'no/such_model'"),
    ],
)
def test_what_a_constructor_refuses_is_its_own_message_and_status_2(arguments, message, capsys):
    error = refusal(capsys, *arguments)
    assert message in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("given", "used"), [([], 0), (["--seed_everything=3"], 3), (["--seed_everything=3", "--model.seed=5"], 5)]
)
def test_the_model_takes_seed_everything_unless_it_has_its_own(given, used, tmp_path, monkeypatch):
    from dmpo_lightning.commands.fit import DMPOCLI

    seeds = []
    monkeypatch.setattr(DMPOCLI, "fit", lambda self, model, **options: seeds.append(model.seed), raising=False)
    monkeypatch.setattr(DMPOCLI, "_run_subcommand", lambda self, name: seeds.append(self.model.seed))
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", "sudoku_tiny", *given])
    assert seeds == [used]
