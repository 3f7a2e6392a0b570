"""A report of a real run: what it is made of, and what it makes of files in any state."""

import html
import json
import re
import shutil
import subprocess
import sys

import pytest
from report_runs import HOSTILE, add_hostile, made_run

from dmpo_lightning.__main__ import main
from dmpo_lightning.reports.completions import viewer_items
from dmpo_lightning.reports.curves import MOST_POINTS, panels
from dmpo_lightning.reports.lines import encoded, read_lines
from dmpo_lightning.reports.page import page, read_runs, write_report
from dmpo_lightning.reports.rollouts import chosen
from dmpo_lightning.reports.run import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_run(tmp_path_factory)


def data_of(text):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1])


def test_a_run_leaves_its_report(run, capsys):
    text = (run / "report.html").read_text(encoding="utf-8")
    plots = data_of(text)["plots"]
    captions = set(re.findall(r"<figcaption>([\w/]+)", text))
    assert len(plots) == text.count("<svg ") == len(captions)
    assert {"val/accuracy", "reward/total", "weight/ess", "policy/log_rnd", "train/loss"} <= captions
    summary = json.loads((run / "summary.json").read_text())
    for moment in ("before", "after"):
        solved = summary[moment]["greedy"]["reward"]
        assert f"{solved['mean']:.3f} ± {solved['standard_error']:.3f}" in text
    assert "sudoku_tiny" in text


def test_examples_are_the_same_prompts_before_and_after(run):
    records = list(read_lines(run / "examples.jsonl"))
    assert [(each["moment"], each["prompt_index"]) for each in records] == [
        (moment, index) for moment in ("before", "after") for index in range(6)
    ]
    items = [item for item in viewer_items([read_run(run, "a")]) if "most changed" in item["title"]]
    assert [[pane["title"] for pane in item["panes"]] for item in items] == [
        ["Completion before", "Completion after"]
    ] * 6
    changes = [
        abs(float(a) - float(b)) for item in items for a, b in re.findall(r"reward (\S+) to (\S+)", item["title"])
    ]
    assert changes == sorted(changes, reverse=True)


def test_best_and_worst_are_of_the_last_buffers_and_of_different_prompts(run):
    written = [line for path in (run / "rollouts").iterdir() for line in read_lines(path) if "header" not in line]
    last = [line["reward"] for line in written if line["iteration"] == 1]
    for kind, of_group in (("best", max), ("worst", min)):
        found = [each for name, each in chosen(read_run(run, "a"), 1) if name == kind]
        assert [each.reward for each in found] == [of_group(last)]
        assert found[0].tokens


def test_what_changed_most_comes_from_rollouts_where_no_examples_are(tmp_path):
    (tmp_path / "rollouts").mkdir()
    rewards = {0: {0: [0.0, 1.0], 5: [1.0, 1.0]}, 1: {0: [1.0, 1.0], 5: [0.0, 0.0]}, 2: {0: [0.5]}}
    records = [
        {"iteration": iteration, "prompt_index": prompt, "rollout": number, "reward": reward, "completion": "a"}
        for prompt, buffers in rewards.items()
        for iteration, group in buffers.items()
        for number, reward in enumerate(group)
    ]
    (tmp_path / "rollouts/rank0-000000.jsonl").write_bytes(b"".join(map(encoded, records)))
    found = [each for kind, each in chosen(read_run(tmp_path, "a"), 4) if kind == "most changed"]
    assert [(each.prompt_index, each.iteration) for each in found] == [(1, 0), (1, 5), (0, 0), (0, 5)]


def test_hostile_text_stays_text_and_the_page_stays_small(run, tmp_path):
    copy = tmp_path / "hostile"
    shutil.copytree(run, copy)
    add_hostile(copy)
    write_report([copy], copy / "report.html")
    content = (copy / "report.html").read_bytes()
    assert len(content) < 5_000_000
    text = content.decode()
    # Two scripts of our own; all else that looks like one is escaped.
    assert re.findall(r"<script[^>]*>", text) == ['<script type="application/json" id="data">', "<script>"]
    assert text.count("</script>") == 2
    assert "<img" not in text
    assert not [character for character in text if not character.isprintable() and character != "\n"]
    shown = json.dumps(data_of(text))
    assert "<script>window.hit = 1</script>" in shown
    assert "x" * 20_000 + " ... (980000 more characters)" in shown
    assert html.escape(HOSTILE[0]) in text


def with_few_plots(run, folder):
    """A copy of the run, of which a page is drawn quickly."""
    shutil.copytree(run, folder)
    kept = ("reward/total", "val/sampled/accuracy", "val/sampled/accuracy_stderr")
    lines = [
        line | {"values": {name: line["values"][name] for name in kept if name in line["values"]}}
        for line in read_lines(run / "metrics.jsonl")
    ]
    (folder / "metrics.jsonl").write_bytes(b"".join(map(encoded, lines)))
    return folder


def test_several_runs_share_each_plot(run, tmp_path, capsys):
    runs = [with_few_plots(run, tmp_path / name / "version_0") for name in ("a", "b")]
    output, pictures = tmp_path / "both.html", tmp_path / "png"
    assert main(["report", *map(str, runs), "-o", str(output), "--png", str(pictures), "--x", "seconds"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {output}"
    plots = data_of(output.read_text())["plots"]
    labels = [[series["label"] for series in plot["series"]] for plot in plots.values()]
    assert labels == [["a/version_0 sampled", "b/version_0 sampled"], ["a/version_0", "b/version_0"]]
    assert {plot["axis"] for plot in plots.values()} == {"seconds of fitting"}
    assert {path.read_bytes()[:4] for path in pictures.iterdir()} == {b"\x89PNG"}
    assert len(list(pictures.iterdir())) == len(plots)


def test_a_run_of_many_points_is_averaged(run, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(
        b"".join(
            encoded({"kind": "buffer", "iteration": n, "step": n, "values": {"reward/total": n}}) for n in range(4000)
        )
    )
    (panel,) = panels(read_runs([tmp_path]))
    assert len(panel.series[0].x) == MOST_POINTS
    assert panel.series[0].y[:2] == (4.5, 14.5)


@pytest.mark.parametrize(
    "junk", [b"", b"\xff\x00{", b"[]", b'{"values":3,"kind":"buffer","iteration":1,"step":1e999}\n']
)
def test_files_in_any_state_make_a_page(tmp_path, junk):
    for name in ("run.json", "metrics.jsonl", "examples.jsonl", "guards.jsonl", "summary.json", "rollouts/a.jsonl"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(junk)
    runs = read_runs([tmp_path])
    assert page(runs, panels(runs)).startswith("<!DOCTYPE html>")


def test_a_folder_without_a_run_is_refused_with_what_was_meant(run, tmp_path, capsys):
    assert main(["report", str(run.parent)]) == 2
    assert f"Did you mean {run}?" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "none")]) == 2
    assert "must be the directory of a run" in capsys.readouterr().err


def test_the_command_loads_no_torch(run, tmp_path):
    arguments = ["report", str(with_few_plots(run, tmp_path / "a")), "-o", str(tmp_path / "a.html")]
    code = f"import sys; from dmpo_lightning.__main__ import main; main({arguments}); "
    code += "print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.splitlines()[-1] == "[]"
