"""The report in a browser: it draws, it obeys, it complains of nothing and asks for nothing."""

import shutil

import pytest
from chromium import browser, executable
from report_runs import add_hostile, made_run

from dmpo_lightning.reports.page import write_report

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
def chromium(tmp_path_factory):
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1400])
def test_every_plot_and_the_viewer_draw(report, chromium, width, dark):
    chromium.look(width=width, dark=dark)
    chromium.open(report)
    assert chromium.complaints == []
    assert chromium.requests == [report.as_uri()]
    assert chromium.value("window.hit") is None
    # Nothing is cut off at the side.
    assert chromium.value("document.documentElement.scrollWidth") <= width
    plots = chromium.value(
        "[...document.querySelectorAll('figure svg')].map((svg) => [svg.getBoundingClientRect().width, "
        "[...svg.querySelectorAll('path')].filter((path) => path.getTotalLength() > 0).length])"
    )
    assert len(plots) > 15
    assert all(across > 200 and paths > 2 for across, paths in plots)
    assert all(across < width for across, _ in plots)
    # Text of plots has the page's colour, and their lines one that is told from the paper.
    ink, paper = "getComputedStyle(document.body).color", "getComputedStyle(document.body).backgroundColor"
    bright = [chromium.value(f"Math.max(...{each}.match(/\\d+/g).map(Number))") for each in (ink, paper)]
    assert (bright[0] > bright[1]) == dark
    assert chromium.value(f"getComputedStyle(document.querySelector('figure svg text')).fill === {ink}")
    assert chromium.value("document.querySelectorAll('#panes .token').length") > 0


def test_slider_keys_and_buttons_move_the_viewer(report, chromium):
    chromium.look(width=1400, dark=False)
    chromium.open(report)
    chromium.value("document.getElementById('viewer').focus()")
    assert chromium.value(POSITION) == "step 4 of 4"
    masked = []
    for key in ("Home", "ArrowRight", "ArrowRight", "ArrowLeft", "End"):
        chromium.press(key)
        masked.append(chromium.value(MASKED))
    # Two completions of eight tokens, four denoising steps.
    assert masked == [16, 12, 8, 12, 0]
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
    assert any("best, prompt 100" in title for title in titles)
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


def test_a_pointer_over_a_plot_is_told_its_values(report, chromium):
    chromium.look(width=1400, dark=False)
    chromium.open(report)
    said = chromium.value(
        "{const plot = document.querySelector('.plot'), box = plot.getBoundingClientRect();"
        "const at = {clientX: box.left + 0.94 * box.width, clientY: box.top + 20};"
        "plot.dispatchEvent(new PointerEvent('pointermove', at));"
        "plot.parentElement.querySelector('output').textContent}"
    )
    assert said.startswith("optimizer step 8: ")
    assert said.count(" ± ") == 4
