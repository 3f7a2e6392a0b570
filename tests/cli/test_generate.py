"""``dmpo-lightning generate``: the same from a checkpoint and what is exported of it, and safe on a terminal."""

import io
import json
import re

import pytest
import torch
from dmpo_runs import digit_share, loader, small_dmpo, trainer

from dmpo_lightning import DMPO, ConfidenceSampler, LoRA, RandomOrderSampler
from dmpo_lightning.__main__ import main
from dmpo_lightning.checkpoints.export import export_checkpoint
from dmpo_lightning.commands.generate import Denoising, make_sampler
from dmpo_lightning.modules.checkpoint import held_arguments
from dmpo_lightning.modules.generating import generate
from dmpo_lightning.rollout import Sampling
from helpers import FixedLogits, tiny_policy

PROMPT, OTHER = "1030041003004001", "1234341221434320"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a short run with an adapter, and what is exported of it."""
    folder = tmp_path_factory.mktemp("trained")
    # The adapter is drawn from here. Merged weights round differently, which may turn a token that is nearly a tie.
    torch.manual_seed(0)
    dmpo = small_dmpo(
        "sudoku_tiny",
        adapter=LoRA(r=2),
        sampler=ConfidenceSampler(denoising_steps=10, temperature=1.0),
        completion_length=20,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-2),
    )
    run = trainer(folder, max_steps=2)
    run.fit(dmpo, loader())
    run.save_checkpoint(folder / "run.ckpt")
    export_checkpoint(folder / "run.ckpt", folder / "adapter")
    export_checkpoint(folder / "run.ckpt", folder / "merged", merge=True)
    return folder, dmpo


def answers(capsys, *arguments):
    assert main(["generate", *map(str, arguments)]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_checkpoint_adapter_and_exported_folder_agree_with_the_module(trained, capsys):
    folder, dmpo = trained
    asked = ["--prompt", PROMPT, "--prompt", OTHER, "--completions", "3", "--json"]
    expected = [each.text for each in dmpo.generate([PROMPT, OTHER], completions=3)]
    own = answers(capsys, "--ckpt_path", folder / "run.ckpt", *asked)
    assert [each["text"] for each in own] == expected
    assert len(set(expected)) > 2
    options = ["--completion_length=20", "--sampler.denoising_steps=10", "--sampler.temperature=1", *asked]
    for name in ("adapter", "merged"):
        found = answers(capsys, "--model", folder / name, *options)
        assert [each["text"] for each in found] == expected
        assert [each["steps"] for each in found] == [each["steps"] for each in own]
    base = answers(capsys, "--model", "sudoku_tiny", *options)
    assert [each["text"] for each in base] != expected
    loaded = DMPO.load_from_checkpoint(folder / "run.ckpt", reward=digit_share)
    assert [each.text for each in loaded.generate([PROMPT, OTHER], completions=3)] == expected


def test_prompts_come_from_options_files_and_standard_input(tmp_path, capsys, monkeypatch):
    model = ["--model", "sudoku_tiny", "--completion_length", "20", "--json"]
    (tmp_path / "prompts.jsonl").write_text(
        json.dumps({"prompt": PROMPT}) + "\n" + json.dumps({"prompt": [{"role": "user", "content": OTHER}]}) + "\n"
    )
    expected = [each["text"] for each in answers(capsys, *model, "--prompt", PROMPT, "--prompt", OTHER)]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n"))
    assert [each["text"] for each in answers(capsys, *model)] == expected[:1]
    found = answers(capsys, *model, "--prompts_file", tmp_path / "prompts.jsonl")
    assert [each["text"] for each in found] == expected
    assert main(["generate", *model[:4], "--prompt", PROMPT, "--prompt", OTHER]) == 0
    assert capsys.readouterr().out == f"--- 0 {PROMPT}\n{expected[0]}\n--- 1 {OTHER}\n{expected[1]}\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "1"], "There is no model: pass --model"),
        (["--model", "sudoku_tiny"], "There is no prompt: pass --prompt"),
        (["--model", "sudoku_tiny", "--prompts_file", "no.txt"], "`--prompts_file` must be a file"),
        (["--model", "sudoku_tiny", "--prompts_file", "bad.jsonl"], "bad.jsonl, line 2: no object with `prompt`."),
        (["--ckpt_path", "no.ckpt", "--prompt", "1"], "No checkpoint file 'no.ckpt'; give a .ckpt"),
        (["--ckpt_path", "no.ckpt", "--prompt", "1"], "of a run: there is a.ckpt, b.ckpt."),
        (["--ckpt_path", "bad.jsonl", "--prompt", "1"], "truncated, damaged or no checkpoint"),
        (["--model", "sudoku_tiny", "--prompt", "1", "--sampler.temprature", "2"], "Did you mean temperature?"),
        (["--model", "sudoku_tiny", "--prompt", "1", "--sampler.temperature=hot"], "Expected a float. Got value: hot"),
        (["--model", "sudoku_tiny", "--prompt", "1", "--sampler.temperature=-1"], "must be at least 0 and finite"),
        (["--model", "sudoku_tiny", "--prompt", "1", "--sampler", "os.system"], "os.system"),
        (["--model", "sudoku_tiny", "--prompt", "1", "--device", "moon"], "`--device` moon: "),
        (["--model", "sudoku_tiny", "--prompt", "1", "--comletions", "2"], "Did you mean --completions?"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "1"}\n{"text": "1"}\n')
    for name in "ab":
        (tmp_path / f"{name}.ckpt").touch()
    try:
        status = main(["generate", *arguments])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_the_sampler_of_a_run_is_taken_and_changed():
    kept = {"class": "ConfidenceSampler", "block_length": 5, "denoising_steps": 4, "temperature": 0.2}
    stored = {"sampler": kept}
    sampler = make_sampler(["--sampler.temperature", "1", "--sampler.denoising_steps=null"], stored)
    assert (sampler.block_length, sampler.denoising_steps, sampler.temperature) == (5, None, 1.0)
    assert make_sampler([], {}).temperature == 0
    other = make_sampler(["--sampler=RandomOrderSampler"], stored)
    assert (type(other).__name__, other.temperature) == ("RandomOrderSampler", 1.0)


def test_a_sampler_that_a_checkpoint_cannot_choose_is_asked_for():
    stored = held_arguments({"arguments": {"sampler": {"class": "os.system", "temperature": 1}}})
    with pytest.raises(ValueError, match=r"a sampler of its own .*, which .* pass it by --sampler"):
        make_sampler(["--sampler.temperature=0"], stored)
    assert make_sampler(["--sampler", "ConfidenceSampler"], stored).temperature == 1.0


class OwnSampler(RandomOrderSampler):
    """Of a run whose code is somewhere else."""


def test_a_run_with_its_own_sampler_is_not_answered_by_another(tmp_path, capsys):
    run = trainer(tmp_path, max_steps=1)
    run.fit(small_dmpo("sudoku_tiny", sampler=OwnSampler(), completion_length=20), loader())
    run.save_checkpoint(tmp_path / "own.ckpt")
    asked = ["generate", "--ckpt_path", str(tmp_path / "own.ckpt"), "--prompt", PROMPT]
    assert main(asked) == 2
    assert "pass it by --sampler" in capsys.readouterr().err
    assert main([*asked, f"--sampler={__name__}.OwnSampler", "--sampler.temperature=0"]) == 0


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


class Hostile:
    """A tokenizer that was never asked for permission: its tokens obey nobody."""

    def decode(self, ids):
        return {6: "\x1b[2J", 7: "\u202e", 8: "a\nb", 9: "漢"}.get(ids[0], "x")

    def batch_decode(self, rows):
        return [self.decode(row) for row in rows]


def shown(monkeypatch, stream, *, size=(24, 10)):
    """What is drawn of a completion of hostile tokens, where the terminal is small."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("dmpo_lightning.commands.generate.terminal_size", lambda stream: size)
    table = torch.full((60, 32), -9.0)
    table[torch.arange(60), torch.arange(60) % 4 + 6] = 9.0
    policy = tiny_policy(model=FixedLogits(table))
    policy.max_length = None
    watcher = Denoising(policy, stream)
    policy.tokenizer, real = Hostile(), policy.tokenizer
    monkeypatch.setattr("dmpo_lightning.modules.generating.tokenize_prompt", lambda *_: real("1")["input_ids"])
    monkeypatch.setattr("dmpo_lightning.modules.generating.warn_of_lost_text", lambda *_, **__: None)
    monkeypatch.setattr(policy, "decode", lambda ids: [""] * len(ids))
    generate(policy, "1", Sampling(ConfidenceSampler(), 40), on_change=watcher)
    return stream.getvalue()


def test_a_live_picture_obeys_no_token_and_has_room(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    drawn = shown(monkeypatch, Terminal())
    assert "\x1b[2J" not in drawn
    assert "\u202e" not in drawn
    plain = re.sub(r"\x1b\[[\d;]*m", "", drawn)
    assert r"\x1b[2J" in plain
    pictures = plain.split("\x1b[H\x1b[J")[1:]
    assert len(pictures) == 40
    for picture in pictures:
        heading, text = picture.splitlines()
        assert len(text) <= 12 * 8, "of 24 cells on 8 lines, each character may take two"
        assert "\u2591" in text or "40 of 40" in heading


def test_without_colours_and_without_a_terminal(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    assert "m" not in {part[0] for part in shown(monkeypatch, Terminal()).split("\x1b[")[1:] if part[:1] == "m"}
    assert "\x1b[0m" not in shown(monkeypatch, Terminal())
    lines = shown(monkeypatch, io.StringIO()).splitlines()
    assert len(lines) == 40
    assert lines[0].startswith("step 1, 1 of 40 tokens: ")
    assert all(line.isprintable() for line in lines)
