"""The site in a browser: it is searched without a network, leads nowhere that is not there, and fits a telephone."""

import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import pytest
from chromium import browser, executable

import dmpo_lightning

REPOSITORY = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(find_spec("furo") is None, reason='needs the site\'s tools: pip install -e ".[docs]"'),
]


class Links(HTMLParser):
    """Where a page leads, and the places in it that can be led to."""

    def __init__(self, page):
        super().__init__()
        self.targets, self.anchors = [], set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.anchors |= {attributes.get("id")}
        self.targets += [attributes[name] for name in ("href", "src") if attributes.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site") / "html"
    # What `make docs` has built is built again where it has changed only.
    if (built := REPOSITORY / "docs" / "_build").is_dir():
        shutil.copytree(built, folder)
    command = [sys.executable, "-m", "sphinx", "--quiet", "-W", "-n", "--keep-going", "docs", str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    if executable() is None:
        pytest.skip("needs a Chromium, such as Debian's: apt-get install chromium")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def test_no_link_is_dead_and_every_public_name_is_explained(site):
    pages = {path.resolve(): Links(path) for path in site.rglob("*.html")}
    dead = set()
    # Pages of source lead back also to what was explained in an earlier build.
    for path, page in ((path, page) for path, page in pages.items() if "_modules" not in path.parts):
        for target in page.targets:
            file, _, anchor = unquote(target).partition("#")
            if file.startswith(("http:", "https:", "data:", "mailto:", "//")):
                continue
            there = (path.parent / file.partition("?")[0]).resolve() if file else path
            if not there.exists() or (anchor and there in pages and anchor not in pages[there].anchors):
                dead.add((path.name, target))
    assert dead == set()
    described = set().union(*(page.anchors for page in pages.values()))
    names = {f"dmpo_lightning.{name}" for name in dmpo_lightning.__all__} - {"dmpo_lightning.__version__"}
    assert names <= described


def test_a_search_finds_an_option(site, chromium):
    chromium.look(width=1280, dark=False)
    chromium.open(site / "search.html")
    found = chromium.value(
        "new Promise((done) => {Search.performSearch('proximal_coefficient'); setInterval(() => {"
        "const links = [...document.querySelectorAll('#search-results li a')].map((each) => each.getAttribute('href'));"
        "if (links.length) done(links)}, 50)})"
    )
    assert any(link.startswith("options.html") for link in found)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_pages_are_read_on_any_screen_and_ask_for_no_network(site, chromium, tmp_path, width, dark):
    chromium.look(width=width, dark=dark)
    for page in sorted(path for path in site.rglob("*.html") if "_modules" not in path.parts):
        chromium.open(page)
        assert chromium.value("document.documentElement.scrollWidth") <= width, page.name
        assert all(address.startswith(("file:", "data:")) for address in chromium.requests), page.name
        ink, paper = "getComputedStyle(document.body).color", "getComputedStyle(document.body).backgroundColor"
        bright = [chromium.value(f"Math.max(...{each}.match(/\\d+/g).map(Number))") for each in (ink, paper)]
        assert (bright[0] > bright[1]) == dark, page.name
    chromium.open(site / "index.html")
    # Kept for a look.
    chromium.picture(tmp_path / f"site-{width}-{'dark' if dark else 'light'}.png")
