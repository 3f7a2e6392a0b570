"""The report in a browser: it draws, it obeys, it complains of nothing and asks for nothing."""

import json
import shutil

import pytest
from chromium import browser, executable
from report_runs import add_hostile, made_run

from dmpo_lightning.reports.lines import append, encoded
from dmpo_lightning.reports.page import viewer, viewer_item, write_report
from dmpo_lightning.reports.record import Completion

pytestmark = pytest.mark.skipif(
    executable() is None, reason="needs a Chromium, such as Debian's: apt-get install chromium"
)
POSITION = "document.getElementById('position').textContent"
CHOSEN = "document.getElementById('which').selectedIndex"
MASKED = "document.querySelectorAll('.token.masked').length"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made_run(tmp_path_factory)


@pytest.fixture(scope="module")
def report(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser") / "run"
    shutil.copytree(run, folder)
    add_hostile(folder)
    # With itself, so that runs are compared too.
    write_report([folder, folder], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def seeds(run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    for seed in (0, 1):
        shutil.copytree(run, folder / str(seed))
        facts = json.loads((run / "run.json").read_text()) | {"configuration": {"seed_everything": seed}}
        (folder / f"{seed}/run.json").write_text(json.dumps(facts))
    write_report([folder / "0", folder / "1"], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Two held-out examples with what was different before, and a rollout that was wrong."""
    folder = tmp_path_factory.mktemp("drawn")
    grids = {"before": "1 2 | 4 3", "after": "1 2 | 3 4"}
    texts = {"before": ["1243", "abcd"], "after": ["1234", "xybcd"]}
    for moment, grid in grids.items():
        for index, text in enumerate(texts[moment]):
            record = {"moment": moment, "prompt_index": index, "prompt": "p", "completion": text, "reward": 1.0 - index}
            record |= {"tokens": list(text), "reveal_step": [0] * len(text), "confidence": [1.0] * len(text)}
            record |= {} if index else {"drawings": ["1 2 | . .", grid]}
            append(folder / f"rollouts/{moment}.jsonl", encoded(record))
        words = {"before": "it is five", "after": "it is six"}[moment]
        record = {"moment": moment, "prompt_index": 2, "prompt": "p", "completion": words, "reward": 0.0}
        append(folder / f"rollouts/{moment}.jsonl", encoded(record))
    rollout = {"buffer": 0, "prompt_index": 7, "prompt": "q", "completion": "r", "reward": 0.0}
    append(folder / "rollouts/rank0-0.jsonl", encoded(rollout | {"components": {"correct": 0.0}}))
    write_report([folder], folder / "report.html")
    return folder / "report.html"


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_every_plot_and_the_viewer_draw(report, chromium, tmp_path, width, dark):
    chromium.look(width=width, dark=dark)
    chromium.open(report)
    assert chromium.complaints == []
    assert chromium.requests == [report.as_uri()]
    assert chromium.value("window.hit") is None
    # Kept for a look.
    chromium.picture(tmp_path / f"report-{width}-{'dark' if dark else 'light'}.png")
    # Nothing is cut off at the side.
    assert chromium.value("document.documentElement.scrollWidth") <= width
    plots = chromium.value(
        "[...document.querySelectorAll('figure .plot > svg')].map((svg) => [svg.getBoundingClientRect().width, "
        "[...svg.querySelectorAll('path.line')].filter((path) => path.getTotalLength() > 0).length])"
    )
    assert len(plots) == chromium.value("document.querySelectorAll('figure').length") > 10
    assert all(200 < across < width and lines > 1 for across, lines in plots)
    # Text of plots has a colour of the page.
    ink, paper = "getComputedStyle(document.body).color", "getComputedStyle(document.body).backgroundColor"
    bright = [chromium.value(f"Math.max(...{each}.match(/\\d+/g).map(Number))") for each in (ink, paper)]
    assert (bright[0] > bright[1]) == dark
    soft = "getComputedStyle(document.querySelector('p.soft')).color"
    assert chromium.value(f"getComputedStyle(document.querySelector('.plot text')).fill === {soft}")
    assert chromium.value("document.querySelectorAll('#panes .token').length") > 0
    # What one sees first is the result: its plot begins on the first screen.
    assert chromium.value("document.querySelector('figure').getBoundingClientRect().bottom") < 900


def test_a_legend_hides_runs_and_plots_change_their_axis_and_merge_seeds(seeds, chromium):
    chromium.look(width=1280, dark=False)
    chromium.open(seeds)
    lines = "[...document.querySelectorAll('.plot')].map((plot) => plot.querySelectorAll(':scope > svg .line').length)"
    both = chromium.value(lines)
    # Two samplers of two runs, from step 0.
    assert both[0] == 4
    names = chromium.value(
        "[...document.querySelectorAll('.plot')[0].querySelectorAll('.legend span')].map((e) => e.textContent)"
    )
    assert [name.strip() for name in names[:2]] == ["seed 0, sampled", "seed 0, greedy"]
    press = "[...document.querySelectorAll('#controls button')].find((each) => each.textContent === '{}').click()"
    chromium.value(press.format("seed 1"))
    assert [2 * count for count in chromium.value(lines)] == both
    chromium.value(press.format("seed 1"))
    chromium.value(press.format("seeds as mean and range"))
    assert [2 * count for count in chromium.value(lines)] == both
    assert "mean of 2 seeds" in chromium.value("document.querySelector('.legend').textContent")
    chromium.value(
        "{const axis = document.getElementById('axis'); axis.value = 2; axis.dispatchEvent(new Event('change'))}"
    )
    text = chromium.value(
        "[...document.querySelectorAll('.plot')[0].querySelectorAll('text')].map((each) => each.textContent)"
    )
    assert text[-1] == "time of fitting"
    assert "0:00" in text
    assert chromium.complaints == []


def test_differences_are_marked_and_a_task_draws_its_own(drawn, chromium):
    chromium.look(width=400, dark=False)
    chromium.open(drawn)
    marked = (
        "[...document.querySelectorAll('#panes > div')].map((pane) => "
        "[...pane.querySelectorAll('{}')].map((each) => each.textContent))"
    )
    # By place where most are equal, else what is not in the row that both share.
    assert chromium.value(marked.format(".token.other")) == [["4", "3"], ["3", "4"]]
    assert chromium.value(marked.format(".drawing .other")) == [["4", "3"], ["3", "4"]]
    assert chromium.value("document.getElementById('drawing').textContent") == "1 2 | . ."
    chromium.value("document.getElementById('later').click()")
    assert chromium.value(marked.format(".token.other")) == [["a"], ["x", "y"]]
    chromium.value("document.getElementById('later').click()")
    assert chromium.value(marked.format(".text .other")) == [["five"], ["six"]]
    # Nothing is known of its steps.
    assert chromium.value("document.getElementById('play').offsetParent") is None
    chromium.value("document.querySelector('button[data-item]').click()")
    assert "never solved" in chromium.value("document.getElementById('which').selectedOptions[0].text")
    assert chromium.complaints == []


def test_a_viewer_alone_is_a_document(chromium, tmp_path):
    completion = Completion("p", "ab", 0, "", tokens=(("a", 1, 0.5), ("b", 0, 1.0)))
    path = tmp_path / "viewer.html"
    path.write_text(viewer([viewer_item("generated", [completion])]))
    chromium.open(path)
    assert chromium.complaints == []
    assert chromium.value(POSITION) == "step 2 of 2"


def test_slider_keys_and_buttons_move_the_viewer(report, chromium):
    chromium.look(width=1400, dark=False)
    chromium.open(report)
    chromium.value("document.getElementById('viewer').focus()")
    assert chromium.value(POSITION) == "step 4 of 4"
    masked = []
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowLeft", "End"):
        chromium.press(key)
        masked.append(chromium.value(MASKED))
    # Three completions of eight tokens, four denoising steps.
    assert masked == [24, 18, 12, 18, 0]
    chromium.press("ArrowDown")
    assert chromium.value(CHOSEN) == 1
    chromium.press("ArrowUp")
    chromium.value("document.getElementById('earlier').click()")
    assert chromium.value(f"{CHOSEN} === document.getElementById('which').length - 1")
    chromium.value("document.getElementById('later').click()")
    chromium.value("{const s = document.getElementById('step'); s.value = 1; s.dispatchEvent(new Event('input'))}")
    assert chromium.value(POSITION) == "step 1 of 4"
    chromium.press(" ", " ")
    assert chromium.value("document.getElementById('play').textContent") == "Pause"
    played = (
        "new Promise((done) => setInterval(() => {"
        "if (document.getElementById('play').textContent === 'Play') done(document.getElementById('step').value)}, 20))"
    )
    assert chromium.value(played) == "4"
    assert chromium.complaints == []


def test_hostile_completions_are_shown_as_text(report, chromium):
    chromium.look(width=400, dark=False)
    chromium.open(report)
    titles = chromium.value("[...document.getElementById('which').options].map((option) => option.text)")
    assert any("always solved, prompt 100" in title for title in titles)
    seen = []
    for number in range(len(titles)):
        chromium.value(
            f"{{const list = document.getElementById('which'); list.value = {number};"
            "list.dispatchEvent(new Event('change'))}"
        )
        seen.append(chromium.value("document.getElementById('prompt').textContent"))
    assert "<script>window.hit = 1</script>" in seen
    assert "\\u202eright to left\\u2066" in seen
    assert "\\x00 null" in seen
    assert max(map(len, seen)) < 21_000
    assert chromium.value("window.hit") is None
    assert chromium.value("document.documentElement.scrollWidth") <= 400
    assert chromium.complaints == []
    assert chromium.requests == [report.as_uri()]


def test_a_pointer_over_a_plot_and_arrow_keys_read_its_values(report, chromium):
    chromium.look(width=1280, dark=False)
    chromium.open(report)
    said = chromium.value(
        "{const svg = document.querySelector('.plot > svg'), box = svg.getBoundingClientRect();"
        "const at = {clientX: box.left + 0.97 * box.width, clientY: box.top + 20};"
        "svg.dispatchEvent(new PointerEvent('pointermove', at));"
        "svg.closest('figure').querySelector('output').textContent}"
    )
    assert said.startswith("optimizer steps 8: ")
    assert said.count(" ± ") == 4
    chromium.value("document.querySelector('.plot > svg').focus()")
    chromium.press("ArrowLeft")
    assert chromium.value("document.querySelector('figure output').textContent").startswith("optimizer steps 4: ")
