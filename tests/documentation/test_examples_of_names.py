"""Every public name says in an example how it is used, and the example does what it says."""

import doctest

import pytest

import dmpo_lightning

NAMES = sorted(set(dmpo_lightning.__all__) - {"__version__"})


@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_does_what_it_says(name, tmp_path, monkeypatch):
    if name == "ZeROStrategy":
        pytest.importorskip("deepspeed")  # which says on its first import what accelerator it found
    monkeypatch.chdir(tmp_path)
    explained = getattr(dmpo_lightning, name).__doc__
    examples = doctest.DocTestParser().get_doctest(explained, {"__name__": "example"}, name, None, None)
    assert examples.examples
    assert doctest.DocTestRunner().run(examples).failed == 0
