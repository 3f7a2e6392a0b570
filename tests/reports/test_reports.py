"""A report of a real run: what it is made of, and what it makes of files in any state."""

import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from report_runs import HOSTILE, add_hostile, made_run

from dmpo_lightning.__main__ import main
from dmpo_lightning.reports.lines import encoded, read_lines
from dmpo_lightning.reports.page import page, viewer_items, write_report
from dmpo_lightning.reports.plots import MOST_POINTS, Panel, learning_curve, panels
from dmpo_lightning.reports.record import held_out, read_run, read_runs, rollouts


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_run(tmp_path_factory)


def data_of(text):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found[1])


def test_a_run_leaves_its_report(run, capsys):
    text = (run / "report.html").read_text(encoding="utf-8")
    plots = {plot["name"]: plot for plot in data_of(text)["plots"]}
    captions = re.findall(r"<figcaption><b>([\w/]+)", text)
    assert captions == list(plots)
    assert captions[0] == "val/accuracy"
    said = set(re.findall(r"([\w/]+) is ", text.partition("Without a plot")[2]))
    assert {"reward/total", "weight/ess", "policy/log_rnd", "train/loss", "completion/length"} <= {*plots, *said}
    assert not said & set(plots)
    summary = json.loads((run / "summary.json").read_text())
    for moment in ("before", "after"):
        solved = summary[moment]["greedy"]["reward"]
        assert f"{solved['mean']:.3f} ± {solved['standard_error']:.3f}" in text
    base = {series["label"]: (series["y"][0], series["base"]) for series in plots["val/accuracy"]["series"]}
    solved = summary["before"]["temperature_1"]["accuracy"]["mean"]
    assert base["sampled"] == pytest.approx((solved, solved), abs=1e-4)
    points = data_of(text)["points"][plots["val/accuracy"]["series"][0]["x"]]
    assert [step for step, _, _ in points] == [0, 4, 8]
    assert "No guard fired." in text
    # The result is the heading, and what was run comes last.
    assert re.search(r"<h1>[^<]* to [^<]* on 6 held-out examples, 8 steps, \d+ rollouts, 0:\d\d</h1>", text)
    assert text.index("<h1>") < text.index('data-plot="0"') < text.index('id="viewer"') < text.index("sudoku_tiny")


def test_examples_are_the_same_prompts_before_and_after(run):
    for moment in ("before", "after"):
        records = list(read_lines(run / f"rollouts/{moment}.jsonl"))
        assert [(each["moment"], each["prompt_index"]) for each in records] == [(moment, index) for index in range(6)]
    items = [item for item in viewer_items([read_run(run, "a")], [[]]) if item["kind"] == "most changed"]
    panes = [[pane["title"] for pane in item["panes"]] for item in items]
    assert panes == [["before", "after"]] * 6
    rewards = [
        [float(re.search(r"reward (\S+)", pane["about"])[1].strip(",")) for pane in item["panes"]] for item in items
    ]
    changes = [abs(before - after) for before, after in rewards]
    assert changes == sorted(changes, reverse=True)


def rollout(index, buffer, reward, **more):
    record = {"buffer": buffer, "prompt_index": index, "reward": reward, "prompt": f"p{index}", "completion": "c"}
    return record | {"components": {"solved": float(reward > 1)}} | more


def test_prompts_are_counted_over_time_and_by_difficulty_and_their_rollouts_are_shown(tmp_path):
    grids = [{"completion": grid, "drawings": ["..", grid]} for grid in ("21", "12")]
    records = [rollout(1, 0, 2), rollout(1, 0, 2), rollout(2, 0, 1, **grids[0]), rollout(2, 0, 2, **grids[1])]
    records += [rollout(3, 0, 1)]
    records += [rollout(4, 1, 1, difficulty="7 blanks"), rollout(4, 1, 1, difficulty="7 blanks")]
    for number in (0, 1):
        own = [each for each in records if each["buffer"] == number]
        write_lines(tmp_path / f"rollouts/rank0-{number}.jsonl", own)
    write_report([tmp_path], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    rows = re.findall(
        r'<th scope="row">([^<]*)</th><td><div class="stack".*?</div></td>((?:<td class=short>\d+</td>)+)', text
    )
    counts = {name: [int(each) for each in re.findall(r"\d+", cells)] for name, cells in rows}
    assert counts == {"all": [2, 1, 1], "buffer 0": [1, 1, 1], "buffer 1": [1, 0, 0], "difficulty 7 blanks": [1, 0, 0]}
    items = data_of(text)["completions"]
    titles = [item["title"] for item in items]
    assert titles == [
        "never solved, prompt 4, wrong",
        "never solved, prompt 3, wrong",
        "sometimes solved, prompt 2, right, wrong",
        "always solved, prompt 1, right",
    ]
    assert [pane["title"] for pane in items[0]["panes"]] == ["in buffer 1, 2 of 2"]
    assert [pane["drawing"] for pane in items[2]["panes"]] == ["12", "21"]
    assert re.findall(r'data-item="(\d+)"', text) == ["0", "2", "3"]


@pytest.mark.parametrize("is_within", [True, False])
def test_seconds_go_into_one_bar(tmp_path, is_within):
    values = {"time/sampling": 30.0, "time/scoring": 10.0, "time/training": 40.0}
    validation = {"kind": "validation", "step": 2, "seconds": 100.0, "values": {"time/validation": 15.0}}
    # The recorder may begin to count before the first evaluation, or behind it.
    late = 20.0 * is_within
    base = {"kind": "base", "step": 0, "seconds": late, "values": {"time/evaluation": 20.0}}
    after = {"kind": "after", "step": 2, "seconds": 110.0 + late, "values": {"time/evaluation": 10.0}}
    validation["seconds"] += late
    write_lines(tmp_path / "metrics.jsonl", [base, POINT | {"values": values}, validation, after])
    text = page(read_runs([tmp_path]))
    words = re.sub("<.*?>", "", text.partition("Where the time went")[2].partition("</p>")[0])
    parts = "sampling 30 s, scoring 10 s, training 40 s, validation 15 s, evaluation 30 s, other 5 s"
    assert words == f"{parts}, in all 2:10"
    assert re.findall(r'width: ([\d.]+)%"', text) == ["23.08", "7.69", "30.77", "11.54", "23.08", "3.85"]


EVALUATION = {"task": "GSM8K", "split": "test", "steps": {"hot": [4]}, "temperature": {"hot": 1.0}, "checkpoint": None}


def evaluated(folder):
    means = {"accuracy": {"mean": 0.5, "standard_error": 0.25}, "pass@2": {"mean": 0.75, "standard_error": 0.1}}
    results = [
        {"sampler": "hot", "length": length, "n": 2, "tokens_per_second": 9.0, "means": means} for length in (8, 16)
    ]
    folder.mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION | {"results": results}))
    line = {"sampler": "hot", "rollout": 0, "example": {"question": "1+1"}, "completion": "2", "answer": "2"}
    lines = [
        line | {"index": index, "length": length, "correct": index + length > 8, "scores": {"reward": 1.0}}
        for index in range(2)
        for length in (8, 16)
    ]
    write_lines(folder / "completions.jsonl", lines)
    return folder


def test_an_evaluation_has_a_page_with_its_table_its_settings_and_its_verdicts(tmp_path):
    folder = evaluated(tmp_path / "e")
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    assert "<h1>GSM8K: accuracy .50 hot at length 8, .50 hot at length 16 on 2 test prompts</h1>" in text
    assert text.count("0.500 ± 0.250") == 2
    assert text.count("0.750 ± 0.100") == 2
    assert '<th scope="row">split</th><td class=short>test</td>' in text
    items = data_of(text)["completions"]
    # First what was right at one length alone.
    assert [item["title"] for item in items] == [
        "evaluated, prompt 0, wrong, right",
        "evaluated, prompt 1, right, right",
    ]
    assert items[0]["prompt"] == "question: 1+1"
    assert [(pane["title"], pane["about"]) for pane in items[0]["panes"]] == [
        ("hot, length 8", "wrong, answer 2; reward 1"),
        ("hot, length 16", "right, answer 2; reward 1"),
    ]


def test_runs_are_named_by_what_differs_and_what_holds_none_is_left_out(run, tmp_path, capsys):
    folders = []
    for seed, rate in ((0, 0.1), (1, 0.1), (0, 0.2)):
        folders.append(with_few_plots(run, tmp_path / f"{seed}-{rate}"))
        model = {"init_args": {"optimizer": {"init_args": {"lr": rate}}, "seed": seed}}
        configuration = {"seed_everything": seed, "model": model, "trainer": {"logger": {"name": str(rate)}}}
        facts = json.loads((run / "run.json").read_text()) | {"configuration": configuration}
        (folders[-1] / "run.json").write_text(json.dumps(facts))
    (tmp_path / "empty").mkdir()
    output = tmp_path / "all.html"
    assert main(["report", *map(str, folders), str(tmp_path / "empty"), "-o", str(output)]) == 0
    assert f"Left out: {tmp_path / 'empty'} holds no run." in capsys.readouterr().err
    data = data_of(output.read_text())
    assert data["runs"] == ["seed 0, lr 0.1", "seed 1, lr 0.1", "seed 0, lr 0.2"]
    assert data["seeds"] == [[0, 1], [0, 1], []]
    # One prompt, with what was before and after in each run.
    titles = [pane["title"] for pane in data["completions"][0]["panes"]]
    assert titles == ["before", *(f"{name}: after" for name in data["runs"])]


def test_words_beside_a_plot_are_those_of_the_documentation():
    text = (Path(__file__).parents[2] / "docs/metrics.md").read_text()
    names = ("val/accuracy", "val/8/accuracy", "reward/spread", "reward/own", "time/training", "gradient/norm")
    said = {name: Panel(name, ()).about for name in names}
    assert all(part.replace("`", "") in text.replace("`", "") for words in said.values() for part in words)
    assert said["val/8/accuracy"] == said["val/accuracy"] != said["reward/own"]
    assert said["reward/spread"][0].startswith("standard deviation within a group")
    assert said["time/training"][1] == "seconds"


def test_each_validation_leaves_a_page_that_loads_itself_anew_for_a_while_and_the_end_one_that_does_not(run):
    pages = [(run / name).read_text(encoding="utf-8") for name in ("live.html", "report.html")]
    # The run may be killed.
    until = (run / "live.html").stat().st_mtime + 3600
    assert data_of(pages[0])["reload_until"] == pytest.approx(1000 * until, abs=60_000)
    assert data_of(pages[1])["reload_until"] == 0
    assert ["Written at" in text for text in pages] == [True, False]
    assert re.search(r"<h1>[^<]*accuracy [^<]* to [^<]* prompts, 4 steps", pages[0])


def test_a_page_of_a_run_that_goes_on_says_so(run, tmp_path):
    folder = with_few_plots(run, tmp_path / "a")
    (folder / "summary.json").unlink()
    (folder / "rollouts/after.jsonl").unlink()
    facts = json.loads((run / "run.json").read_text()) | {"configuration": {"trainer": {"max_steps": 20}}}
    (folder / "run.json").write_text(json.dumps(facts))
    write_report([folder], folder / "report.html", live=True)
    text = (folder / "report.html").read_text()
    assert ", 8 of 20 steps, " in text
    assert data_of(text)["reload_until"]
    # The base is known from the start.
    assert data_of(text)["plots"][0]["series"][0]["base"] is not None
    assert [pane["title"] for pane in data_of(text)["completions"][0]["panes"]] == ["before"]


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
        curve, base = lines[label], lines[f"base, {label}"]
        assert list(curve.get_xdata()) == [0, 1, 2]
        assert list(curve.get_ydata()) == [accuracy, (1 + n) / 10, (2 + n) / 10]
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
        line
        | (
            {"values": {name: line["values"][name] for name in kept if name in line["values"]}}
            if "values" in line
            else {}
        )
        for line in read_lines(run / "metrics.jsonl")
    ]
    (folder / "metrics.jsonl").write_bytes(b"".join(map(encoded, lines)))
    return folder


def test_several_runs_share_each_plot(run, tmp_path, capsys):
    runs = [with_few_plots(run, tmp_path / name / "version_0") for name in ("a", "b")]
    output = tmp_path / "both.html"
    assert main(["report", *map(str, runs), "-o", str(output)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Report: {output}"
    data = data_of(output.read_text())
    labels = [[(series["run"], series["label"]) for series in plot["series"]] for plot in data["plots"]]
    assert labels == [[(0, "sampled"), (1, "sampled")], [(0, ""), (1, "")]]
    # They differ in nothing by which they could be named.
    assert data["runs"] == ["a/version_0", "b/version_0"]


def test_of_a_run_of_many_points_each_tenth_is_drawn_with_the_last(tmp_path):
    points = ({"kind": "buffer", "buffer": n, "step": n, "values": {"reward/total": n}} for n in range(4000))
    (tmp_path / "metrics.jsonl").write_bytes(b"".join(map(encoded, points)))
    (panel,) = panels(read_runs([tmp_path]))
    assert len(panel.series[0].x) == MOST_POINTS
    assert panel.series[0].y[-2:] == (3989, 3999)


def test_files_that_were_cut_off_or_hold_something_else_make_a_page(tmp_path):
    junk = [b"", b"\xff\x00{", b"[]", b'{"kind":"buffer","val']
    for number, content in enumerate(junk):
        folder = tmp_path / str(number)
        for name in ("run.json", "metrics.jsonl", "summary.json", "rollouts/before.jsonl", "rollouts/rank0-1.jsonl"):
            path = folder / name
            path.parent.mkdir(exist_ok=True, parents=True)
            path.write_bytes(content)
        runs = read_runs([folder])
        assert page(runs).startswith("<!DOCTYPE html>")


POINT = {"kind": "buffer", "step": 4, "rollouts": 8, "seconds": 1.0, "values": {"reward/total": 0.5}}
ROLLOUT = {
    "buffer": 0,
    "prompt_index": 1,
    "reward": 0.5,
    "prompt": "p",
    "completion": "c",
    "components": {"right": 1.0},
}
ROLLOUT |= {"tokens": ["a"], "reveal_step": [0], "confidence": [0.5], "drawings": ["q", "a"]}
WRONG = (None, math.nan, math.inf, "\x1b[2J<script>", [1], [[None]], {}, {"a": "b"}, 10**400, -1e308, 1e308, True)
NO_LINES = (b"\xff", b"[" * 100_000, b'{"a":' * 5000, b"9" * 5000)


def write_lines(path, records, *more):
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_bytes(b"".join(json.dumps(record).encode() + b"\n" for record in records) + b"\n".join([*more, b'{"ki']))


def test_a_bad_line_takes_no_good_one_and_a_warning_names_its_file(tmp_path, capsys):
    points = [POINT | {name: value} for name in POINT for value in WRONG]
    points += [POINT | {"values": {"reward/total": 0.5, "x/y": value}} for value in WRONG]
    write_lines(tmp_path / "metrics.jsonl", [POINT, *points, {"kind": "guard"}], *NO_LINES)
    rollouts = [ROLLOUT | {name: value} for name in (*ROLLOUT, "weight") for value in WRONG]
    rollouts += [ROLLOUT | {name: [value]} for name in ("tokens", "reveal_step", "confidence") for value in WRONG]
    for name in ("rank0-000000", "rank0-x", "before", "after"):
        write_lines(tmp_path / f"rollouts/{name}.jsonl", [ROLLOUT, *rollouts], *NO_LINES)
    facts = {name: dict(enumerate(WRONG)) for name in ("model", "data")} | {"versions": [1], "configuration": "x"}
    (tmp_path / "run.json").write_text(json.dumps(facts | {"seed": 3}))
    (tmp_path / "summary.json").write_bytes(NO_LINES[0])
    answer = {"index": 0, "sampler": "s", "length": 8, "completion": "c", "scores": {"reward": 1.0}, "correct": True}
    answers = [answer | {name: value} for name in (*answer, "example", "answer", "rollout") for value in WRONG]
    write_lines(tmp_path / "completions.jsonl", [answer, *answers], *NO_LINES)
    with pytest.warns(UserWarning, match="left out") as warned:
        assert main(["report", str(tmp_path)]) == 0
    text = (tmp_path / "report.html").read_text()
    assert "reward/total is 0.5" in text
    assert any(pane["tokens"] for item in data_of(text)["completions"] for pane in item["panes"])
    said = [str(each.message) for each in warned]
    bad = ("metrics.jsonl", "rank0-000000.jsonl", "before.jsonl", "completions.jsonl", "summary.json")
    assert all(any(f"{name}: " in line for line in said) for name in bad)
    assert all(line.isprintable() for line in said)
    assert len(said) == len(set(said)) < 10
    assert text.count("<script") == 2


def test_a_report_reads_only_what_has_an_end(tmp_path):
    """A device, a pipe without a writer, a folder and a link to nowhere."""
    write_lines(tmp_path / "metrics.jsonl", [POINT])
    write_lines(tmp_path / "rollouts/rank0-000000.jsonl", [ROLLOUT])
    os.mkfifo(tmp_path / "rollouts/rank1-000000.jsonl")
    (tmp_path / "rollouts/rank2-000000.jsonl").mkdir()
    (tmp_path / "rollouts/rank3-000000.jsonl").symlink_to("nowhere")
    for name in ("run.json", "rollouts/rank4-000000.jsonl", "rollouts/before.jsonl"):
        (tmp_path / name).symlink_to("/dev/zero")
    write_report([tmp_path], tmp_path / "report.html")
    assert len(data_of((tmp_path / "report.html").read_text())["completions"]) == 1


def test_the_record_of_an_earlier_version_is_read(tmp_path):
    point = {"kind": "buffer", "iteration": 0, "step": 4, "values": {"reward/total": 0.5}}
    sampled = {"iteration": 0, "prompt_index": 3, "rollout": 0, "reward": 0.5, "prompt": "a", "completion": "b"}
    (tmp_path / "metrics.jsonl").write_bytes(encoded(point))
    (tmp_path / "rollouts").mkdir()
    lines = [{"header": {"seed": 0}}, sampled]
    (tmp_path / "rollouts/rank0-000000.jsonl").write_bytes(b"".join(map(encoded, lines)))
    write_report([tmp_path], tmp_path / "report.html")
    run = read_run(tmp_path, "a")
    assert run.buffers[0].values == {"reward/total": 0.5}
    assert [(each.text, each.buffer) for each in rollouts(run)] == [("b", 0)]
    lines = [
        {"moment": moment, "prompt_index": 3, "prompt": "a", "completion": moment} for moment in ("before", "after")
    ]
    (tmp_path / "examples.jsonl").write_bytes(b"".join(map(encoded, lines)))
    assert [[each.text for each in pair] for pair in held_out(run)] == [["before", "after"]]


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
