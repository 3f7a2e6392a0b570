"""The text of a configuration, as `dmpo-lightning` reads it before the parser does."""

import pytest
import yaml
from jsonargparse import get_loader

from dmpo_lightning.commands.arguments import merged_node


def merged_text(text: str, name: str) -> str:
    return yaml.serialize(merged_node(text, name))


VALUES = """\
date: 2026-11-30
moment: 2026-11-30 12:00:00
numbers: [1e3, 2.5e-5, 1.0e+3, .5, 0o17, 017, 0x1f, 1_000, 12:30:00, 4294967296]
not_finite: [.inf, -.inf, .nan, .INF, NaN, Infinity]
words: [yes, no, on, off, y, None, none, ~, null, "null", 'yes', "1e3", "2026-11-30"]
empty:
texts: ['', "tab\\t", "naïve ☃", "# none", "a: b", {flow: }]
block: |
  first
    second
folded: >-
  one
  line
shared: &shared {a: 1, b: [1, 2]}
again: *shared
taken: {<<: *shared, b: 3}
twice: [*shared, *shared]
"""


@pytest.mark.parametrize("name", ["plain", "2026-11-30", "'{a}'", "&name some/name"])
@pytest.mark.parametrize("form", ["{init_args: {model: %s}}", "{model: %s}"])
def test_all_values_are_the_parsers_whether_the_model_is_a_name_or_a_backbone(form, name):
    load = get_loader("yaml")
    (own,) = load(f"- {name}")
    for model in (name, f"{{model: {name}}}"):
        merged = load(merged_text(f"{VALUES}model: {form % model}", "x"))
        assert merged.pop("model") == load(form % "{model: OWN}".replace("OWN", repr(own)))
        assert repr(merged) == repr(load(VALUES))


def test_a_models_name_that_a_configuration_takes_over_is_one_of_a_backbone():
    text = "shared: &shared {model: DIR, group_size: 4}\nmodel: {init_args: {<<: *shared, group_size: 8}}\n"
    options = yaml.safe_load(merged_text(text, "x"))
    assert options["model"]["init_args"] == {"model": {"model": "DIR"}, "group_size": 8}
    assert options["shared"] == {"model": "DIR", "group_size": 4}


def test_home_folders_are_found_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("HOME", "/home/a b: c")
    text = "data: {paths: [~/x, '~/y', a~/z], ~/k: ~}\n"
    found = yaml.safe_load(merged_text(text, "x"))["data"]
    assert found == {"paths": ["/home/a b: c/x", "/home/a b: c/y", "a~/z"], "~/k": None}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it must state options by name, such as `max_steps: 100`, got nothing."),
        ("# only: a comment\n", "got nothing."),
        ("---\n", "got nothing."),
        ("- a\n", "it must state options by name, such as `max_steps: 100`, got a list."),
        ("[]", "got nothing."),
        ("5\n", "got 5."),
        ("2026-11-30", "got 2026-11-30."),
        ("words of somebody", "got words of somebody."),
        ("trainer:\n  # max_steps: 5\n", "`trainer` must state options by name, such as `max_steps: 100`, got no"),
        ("trainer: 3\n", "`trainer` must state options by name, such as `max_steps: 100`, got 3."),
        ("trainer:\n\tmax_steps: 5\n", "found character '\\t' that cannot start any token"),
        ("trainer:\n  max_steps: 1\n  devices: 1\n  max_steps: 2\n", "`max_steps` is stated twice, in lines 2 and 4."),
        ("a: [{b: {c: 1, 'c': 2}}]", "`c` is stated twice, in lines 1 and 1."),
        ("a: 1\n---\nb: 2\n", "but found another document"),
        ("a: \0", "special characters are not allowed"),
        ('{"trainer": {"max_steps": 3}', "expected ',' or '}', but got '<stream end>'"),
        ("a: *nothing", "found undefined alias"),
        ("a: &a {b: *a}", "cannot be read"),
        ("[" * 5000, "cannot be read"),
    ],
)  # fmt: skip
def test_a_text_that_is_no_configuration_is_refused_in_one_line(text, said):
    with pytest.raises(ValueError, match=r"\AThe configuration 'own.yaml' cannot be read: .*\Z") as error:
        merged_text(text, "own.yaml")
    assert said in str(error.value)
