"""One run for all tests of reports, which change none of its files."""

import pytest
from report_runs import make_run


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "version_0"
    make_run(folder)
    return folder
