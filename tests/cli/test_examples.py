"""The examples run, and do what they say."""

import json
import runpy
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from dmpo_lightning.__main__ import main
from dmpo_lightning.models.loading import EMBEDDED_MODELS
from dmpo_lightning.objectives import DiffuGRPO
from dmpo_lightning.rollout import RolloutRows
from helpers import END_OF_TEXT, MASK, NEVER_SAMPLED, tiny_policy

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_drop_in_raises_its_own_reward(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = runpy.run_path(str(EXAMPLES / "drop_in.py"))
    module = namespace["main"](max_steps=20)
    assert module.buffers_collected == 10
    assert module.trainer.global_step == 20
    assert torch.isfinite(module.trainer.callback_metrics["train/loss"])


@pytest.mark.parametrize("model", EMBEDDED_MODELS)
def test_the_tokenizer_recipe_makes_the_embedded_tokenizer(tmp_path, model):
    runpy.run_path(str(EXAMPLES / "make_tiny_tokenizer.py"))["main"](model, str(tmp_path))
    embedded = Path(__file__).parents[2] / "src" / "dmpo_lightning" / "assets" / model
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / name).read_text() == (embedded / name).read_text()


@pytest.mark.slow
def test_a_held_out_puzzle_of_a_run_is_drawn_while_it_is_denoised(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Path("runs/sudoku_tiny/latest")
    short = ["--trainer.max_steps=4", "--model.micro_batch_size=8", "--data.sizes={train: 64, validation: 4, test: 4}"]
    assert main(["fit", "--config", "sudoku_tiny.yaml", *short]) == 0
    runpy.run_path(str(EXAMPLES / "denoising_svg.py"))["main"](run, Path("denoising.svg"))
    drawn = ElementTree.parse("denoising.svg").getroot().findall("{http://www.w3.org/2000/svg}text")
    titles, numbers = drawn[::17], [*drawn[1:17], *drawn[18:]]
    assert [each.text for each in titles] == ["before", "after"]
    examples = [json.loads(line) for line in (run / "rollouts/after.jsonl").read_text().splitlines()]
    # The puzzle's own numbers do not appear, since they stand there.
    given = "".join("." if len(each) else each.text for each in numbers[16:])
    assert any(given.replace(".", "0") in example["prompt"] for example in examples)
    assert all(each.text in "1234" for each in numbers[16:])


@pytest.mark.slow
def test_a_task_of_your_own_is_trained_and_tested_by_its_dotted_path(tmp_path, monkeypatch):
    for name in ("custom_task.py", "custom_task.yaml"):
        shutil.copy(EXAMPLES / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())  # the command puts the working directory there
    options = ["--config", "custom_task.yaml", "--trainer.enable_progress_bar", "false"]
    assert main(["fit", *options, "--trainer.max_steps", "64", "--trainer.val_check_interval", "32"]) == 0
    (checkpoint,) = tmp_path.glob("runs/favourite/latest/checkpoints/*.ckpt")
    accuracy = {}
    for name, further in (("before", []), ("after", ["--ckpt_path", str(checkpoint)])):
        assert main(["test", *options, *further, f"--trainer.logger.init_args.version={name}"]) == 0
        written = json.loads((tmp_path / f"runs/favourite/{name}/evaluation.json").read_text())
        assert (written["task"], written["n"]) == ("Favourite", 10)
        accuracy[name] = written["results"][0]["means"]["accuracy"]["mean"]
    assert accuracy["before"] < 0.5 < accuracy["after"]


@pytest.mark.parametrize(
    ("name", "option", "columns"),
    [
        ("custom_objective", "--model.objective=custom_objective.DiffuGRPO", ("advantage/spread", "policy/k3")),
        ("custom_sampler", "--model.sampler=custom_sampler.EntropyBounded", ("weight/ess", "train/loss")),
    ],
)
def test_one_file_of_your_own_is_all_that_an_objective_or_a_sampler_takes(tmp_path, monkeypatch, name, option, columns):
    shutil.copy(EXAMPLES / f"{name}.py", tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    run = ["--trainer.max_steps=2", "--trainer.enable_progress_bar=false", "--trainer.callbacks=null"]
    size = ["--data.prompts_per_buffer=4", "--model.micro_batch_size=16", "--trainer.limit_val_batches=0"]
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", "--trainer.logger.save_dir=logs"]
    assert (
        main(["fit", "--config", "sudoku_tiny.yaml", option, *run, *size, *logger, "--trainer.log_every_n_steps=1"])
        == 0
    )
    (metrics,) = tmp_path.glob("logs/**/metrics.csv")
    header, *rows = metrics.read_text().splitlines()
    assert set(columns) <= set(header.split(","))
    assert rows


@torch.no_grad()
def test_entropy_bounded_decoding_reveals_what_its_bound_allows():
    """From one token a step at no bound to all of them at once, and each time a whole completion."""
    sampler = runpy.run_path(str(EXAMPLES / "custom_sampler.py"))["EntropyBounded"]
    policy = tiny_policy(with_reference=False).eval()
    prompts, mask = torch.tensor([[7, 9, 12], [8, 8, 8]]), torch.tensor([[True] * 3, [False, True, True]])
    steps = {}
    for bound in (0.0, 4.0, 1e9):
        found = sampler(bound).sample(policy, prompts, mask, completion_length=8, keys=torch.tensor([3, 4]))
        assert (found.reveal_step >= 0).all()
        assert not torch.isin(found.completion_ids, torch.tensor(NEVER_SAMPLED)).any()
        steps[bound] = int(found.reveal_step.max()) + 1
    assert steps[0.0] == 8 > steps[4.0] > steps[1e9] == 1


def test_the_loss_of_the_custom_objective_is_the_published_one():
    """That of the package, where the ratio is clipped on both sides and the last token stands behind the end."""
    own, published = runpy.run_path(str(EXAMPLES / "custom_objective.py"))["DiffuGRPO"](prompt_masking=0.0), DiffuGRPO()
    policy, prompt = tiny_policy().eval(), torch.tensor([[MASK, MASK]])
    ids, keys = torch.tensor([[8, END_OF_TEXT, 9]]), torch.tensor([5])
    rows = RolloutRows(prompt, torch.ones(1, 2, dtype=torch.bool), ids, keys, torch.zeros_like(ids), 1.0)
    new = own.log_probs(policy, rows)
    old, reference = new - torch.tensor([1.0, -1.0, 0.0]), new + torch.tensor([0.3, 0.0, 0.0])
    for advantage in (torch.tensor([0.7]), torch.tensor([-0.7])):
        mine = {"old": old, "reference": reference, "advantage": advantage}
        found, _ = own.loss(policy, rows, mine, iteration=0, planned_rollouts=1)
        mine |= {"behaviour_log_prob": old[:, None], "reference_log_prob": reference[:, None]}
        torch.testing.assert_close(found, published.loss(policy, rows, mine, iteration=0, planned_rollouts=1)[0])


@pytest.mark.parametrize(("name", "lines"), [("custom_task", 30), ("custom_objective", 45), ("custom_sampler", 35)])
def test_the_examples_are_short(name, lines):
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < lines
