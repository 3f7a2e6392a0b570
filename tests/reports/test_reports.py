"""A report of a real run: what it is made of, and what it makes of files in any state."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
from report_runs import HOSTILE, add_hostile, made_run

from dmpo_lightning.__main__ import main
from dmpo_lightning.reports.lines import LONGEST, encoded, read_lines
from dmpo_lightning.reports.page import page, viewer_items, write_report
from dmpo_lightning.reports.plots import MOST_POINTS, learning_curve, panels
from dmpo_lightning.reports.record import read_run, read_runs, shown_completions


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
    for moment in ("before", "after"):
        records = list(read_lines(run / f"rollouts/{moment}.jsonl"))
        assert [(each["moment"], each["prompt_index"]) for each in records] == [(moment, index) for index in range(6)]
    items = [item for item in viewer_items([read_run(run, "a")]) if "most changed" in item["title"]]
    panes = [[pane["title"] for pane in item["panes"]] for item in items]
    assert panes == [["Completion before", "Completion after"]] * 6
    rewards = [found for item in items for found in re.findall(r"reward (\S+) to (\S+)", item["title"])]
    changes = [abs(float(before) - float(after)) for before, after in rewards]
    assert changes == sorted(changes, reverse=True)


def test_best_and_worst_are_of_the_last_buffers_and_of_different_prompts(run):
    rewards = [line["reward"] for path in (run / "rollouts").glob("rank0-*") for line in read_lines(path)]
    found = {kind: each for kind, each in shown_completions(read_run(run, "a"), 1) if kind in ("best", "worst")}
    assert {kind: each.reward for kind, each in found.items()} == {"best": max(rewards), "worst": min(rewards)}
    assert all(each.tokens and each.moment.startswith("in buffer ") for each in found.values())
    several = [each.prompt_index for kind, each in shown_completions(read_run(run, "a"), 9) if kind == "best"]
    assert len(several) == len(set(several)) == 4


def test_each_metric_of_a_learning_curve_is_drawn_with_its_own_base(tmp_path):
    names = [f"val/{name}/accuracy" for name in ("cool", "hot", "greedy")]
    points = [
        {"kind": "validation", "step": step, "values": {name: (step + n) / 10 for n, name in enumerate(names)}}
        for step in (1, 2)
    ]
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(encoded, points)))
    bases = {names[2]: ("T = 0", 0.7), names[0]: ("T = 0.2", 0.5), names[1]: ("T = 1", 0.3)}
    axes = learning_curve(read_run(tmp_path, "a"), bases).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    for n, name in enumerate(names):
        label, accuracy = bases[name]
        curve, base = lines[name], lines[f"base, {label}"]
        assert list(curve.get_ydata()) == [(1 + n) / 10, (2 + n) / 10]
        assert list(base.get_ydata()) == [accuracy, accuracy]
        assert base.get_color() == curve.get_color()
    assert len({line.get_color() for line in lines.values()}) == 3


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
            encoded({"kind": "buffer", "buffer": n, "step": n, "values": {"reward/total": n}}) for n in range(4000)
        )
    )
    (panel,) = panels(read_runs([tmp_path]))
    assert len(panel.series[0].x) == MOST_POINTS
    assert panel.series[0].y[:2] == (4.5, 14.5)


def test_files_that_were_cut_off_or_hold_something_else_make_a_page(tmp_path):
    junk = [b"", b"\xff\x00{", b"[]", b'{"kind":"buffer","val']
    for number, content in enumerate(junk):
        folder = tmp_path / str(number)
        for name in ("run.json", "metrics.jsonl", "summary.json", "rollouts/before.jsonl", "rollouts/rank0-1.jsonl"):
            path = folder / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(content)
        runs = read_runs([folder])
        assert page(runs, panels(runs)).startswith("<!DOCTYPE html>")


POINT = {"kind": "buffer", "step": 4, "rollouts": 8, "seconds": 1.0, "values": {"reward/total": 0.5}}
ROLLOUT = {
    "buffer": 0,
    "prompt_index": 1,
    "reward": 0.5,
    "prompt": "p",
    "completion": "c",
    "components": {"right": 1.0},
}
ROLLOUT |= {"tokens": ["a"], "reveal_step": [0], "confidence": [0.5]}
MEASURE = {"mean": 0.25, "standard_error": 0.125}
WRONG = (None, math.nan, math.inf, "\x1b[2J<script>", [1], [[None]], {}, {"a": "b"}, 10**400, -1e308, 1e308, True)
NO_LINES = (b"\xff", b"[" * 100_000, b'{"a":' * 5000, b"9" * 5000, b"x" * (LONGEST + 9))


def write_lines(path, records, *more):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records) + b"\n".join([*more, b'{"ki']))


def test_a_bad_value_takes_no_good_one_and_is_counted_by_its_name(tmp_path, capsys):
    points = [POINT | {name: value} for name in POINT for value in WRONG]
    points += [POINT | {"values": {"reward/total": 0.5, "x/y": value}} for value in WRONG]
    write_lines(tmp_path / "metrics.jsonl", [POINT, *points, {"kind": "guard"}], *NO_LINES)
    rollouts = [ROLLOUT | {name: value} for name in (*ROLLOUT, "weight") for value in WRONG]
    rollouts += [ROLLOUT | {name: [value]} for name in ("tokens", "reveal_step", "confidence") for value in WRONG]
    for name in ("rank0-000000", "rank0-x", "rank0-" + "9" * 99, "before", "after"):
        write_lines(tmp_path / f"rollouts/{name}.jsonl", [ROLLOUT, *rollouts], *NO_LINES)
    facts = {name: dict(enumerate(WRONG)) for name in ("model", "data")} | {"versions": [1], "configuration": "x"}
    (tmp_path / "run.json").write_text(json.dumps(facts | {"seed": 3}))
    results = {"good": {"reward": MEASURE}, "worse": {str(n): MEASURE | {"mean": v} for n, v in enumerate(WRONG)}}
    results |= {f"wrong {number}": value for number, value in enumerate(WRONG)}
    (tmp_path / "summary.json").write_text(json.dumps({"before": results, "after": 3}))
    assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert {"reward/total"} <= set(re.findall(r"<figcaption>([\w/]+)", text))
    assert "0.250 ± 0.125" in text
    assert any(pane["tokens"] for item in data_of(text)["completions"] for pane in item["panes"])
    said = [line.split(": ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    # Neither None nor NaN is anything but a number that is not known.
    assert {
        "metrics.jsonl: lines that hold no record (7)",
        "metrics.jsonl: step (9)",
        "metrics.jsonl: values (7)",
        "metrics.jsonl: x/y (9)",
        "rank0-000000.jsonl: reward (9)",
        "run.json: versions (1)",
        "run.json: configuration (1)",
        "summary.json: after (1)",
    } <= set(said)
    assert all(line.isprintable() and html.escape(line.rpartition(" (")[0]) in text for line in said)
    assert text.count("<script") == 2


def test_a_report_reads_only_what_has_an_end(tmp_path):
    """A device, a pipe without a writer, a folder, a file of the system's, and one of a terabyte."""
    folder = tmp_path / "rollouts"
    write_lines(tmp_path / "metrics.jsonl", [POINT])
    write_lines(folder / "rank0-000000.jsonl", [ROLLOUT])
    os.mkfifo(folder / "rank1-000000.jsonl")
    (folder / "rank2-000000.jsonl").mkdir()
    for number, target in enumerate(("/dev/zero", "/proc/kmsg", "nowhere", "rank4-000000.jsonl"), start=3):
        (folder / f"rank{number}-000000.jsonl").symlink_to(target)
    for name in ("run.json", "summary.json", "rollouts/before.jsonl"):
        (tmp_path / name).symlink_to("/dev/zero")
    with (folder / "rank9-000000.jsonl").open("wb") as file:
        file.truncate(2**40)
    found, left_out = write_report([tmp_path], tmp_path / "report.html")
    assert [panel.name for panel in found] == ["total"]
    unread = {what.partition(":")[0] for _, what, _ in left_out}
    bad = {f"rank{number}-000000.jsonl" for number in (1, 2, 3, 9)} | {"run.json", "summary.json", "before.jsonl"}
    # Of the good ones the line that was cut off.
    assert unread == bad | {"metrics.jsonl", "rank0-000000.jsonl"}


def test_the_record_of_an_earlier_version_is_read(tmp_path):
    point = {"kind": "buffer", "iteration": 0, "step": 4, "values": {"reward/total": 0.5}}
    rollout = {"iteration": 0, "prompt_index": 3, "rollout": 0, "reward": 0.5, "prompt": "a", "completion": "b"}
    (tmp_path / "metrics.jsonl").write_bytes(encoded(point))
    (tmp_path / "rollouts").mkdir()
    lines = [{"header": {"seed": 0}}, rollout]
    (tmp_path / "rollouts/rank0-000000.jsonl").write_bytes(b"".join(map(encoded, lines)))
    run = read_run(tmp_path, "a")
    assert run.buffers[0].values == {"reward/total": 0.5}
    assert [(kind, each.text) for kind, each in shown_completions(run, 1)] == [("best", "b"), ("worst", "b")]


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
