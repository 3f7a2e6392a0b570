"""A working directory for commands that leave files."""

import sys
from pathlib import Path

import pytest
import yaml
from cli_runs import SMALL


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """An empty working directory with `SMALL` as ``small.yaml``, and a home folder in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    Path("home").mkdir()
    Path("small.yaml").write_text(yaml.safe_dump(SMALL))
    return tmp_path
