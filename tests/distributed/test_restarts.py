"""A job that is told to end, or killed at any moment, goes on as if nothing had happened."""

import json
import random
import signal
from pathlib import Path

import pytest
from ranks import end_ranks, run_ranks
from small_run import ARGUMENTS, write_small

from dmpo_lightning.checkpoints.reading import newest_readable, why_unfit

STEPS = 8


SIGNALS = [("ddp", "SIGTERM", "training"), ("ddp", "SIGUSR1", "validation"), ("zero2", "SIGTERM", "validation")]
SIGNALS += [(kind, "SIGUSR1", "training") for kind in ("fsdp2", "fsdp1", "zero3")]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name", "phase"), SIGNALS)
def test_after_a_signal_to_one_rank_all_save_and_leave_and_the_rest_of_the_run_is_the_same(tmp_path, kind, name, phase):
    """A validation, of three batches, comes after step 4 of 5."""
    adapter = "full" if kind == "zero3" else "lora"
    whole = run_ranks("cases.one_run", 2, tmp_path / "whole", kind=kind, adapter=adapter, steps=5)
    ended = end_ranks("cases.preempted", 2, tmp_path / "cut", kind=kind, adapter=adapter, name=name, phase=phase)
    assert ended.statuses == [128 + signal.Signals[name]] * 2
    saved = newest_readable(tmp_path / "cut")
    assert saved is not None
    assert saved.name == "preempted.ckpt"
    rest = run_ranks("cases.resume", 2, tmp_path / "rest", kind=kind, adapter=adapter, saved=str(saved))
    for before, after in zip(whole, rest, strict=True):
        assert after["steps"] == 5
        assert 0 < len(after["losses"]) < len(before["losses"])
        tolerance = 0 if kind in ("ddp", "fsdp2") else 1e-6
        assert after["losses"] == pytest.approx(before["losses"][-len(after["losses"]) :], abs=tolerance, rel=0)
        assert after["weights"] == pytest.approx(before["weights"], abs=tolerance * 100, rel=0)
        assert after["validation"]["val/sampled/reward"] == before["validation"]["val/sampled/reward"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fsdp2", "fsdp1", "zero2", "zero3", "fsdp2_full"])
def test_a_sharded_checkpoint_of_other_weights_or_with_a_flipped_bit_is_refused_in_one_line(tmp_path, kind):
    pairs = [("lora", "other rank"), ("lora", "whole"), ("whole", "lora"), ("whole", "damaged")]
    for errors in run_ranks("cases.refusals", 2, tmp_path, kind=kind, pairs=pairs):
        assert len(errors) == len(pairs)
        for name, text in errors:
            assert name == "UnfitCheckpointError"
            assert "\n" not in text
        assert all("Set model and adapter as in the run that wrote it" in text for _, text in errors[:-1])
        # Rank 0 looks at one part of a folder's files and rank 1 at another.
        assert "has not the checksum with which it was written" in errors[-1][1]
    for wrote, is_whole in (("lora", True), ("whole", False)):
        assert (why_unfit(tmp_path / wrote / "step=1.ckpt", keys=["dmpo"], continues=True) is None) == is_whole


def kill_and_restart(folder: Path, kind: str, whole: list[dict], *, kills: int, seed: int) -> None:
    """Kills jobs ``kills`` times, every other time while a checkpoint is written; whenever one comes to its end, and of
    the last, checks it.
    """
    draw, job, in_a_save, many = random.Random(seed), 0, 0, kills >= 10
    while True:
        place = folder / str(job)
        death = {"event": "save" if kills % 2 else "batch", "rank": draw.randrange(2), "count": draw.randint(1, 5)}
        death |= {"delay": draw.uniform(0, 0.03)} if kills > 0 else {"event": None}
        ended = end_ranks("cases.life", 2, place, grace=2, kind=kind, steps=STEPS, **death)
        in_a_save += any(place.rglob("*.partial"))
        if ended.statuses == [0, 0]:
            assert_no_step_lost_or_doubled(place, whole)
            assert [rank["weights"] for rank in ended.facts()] == [rank["weights"] for rank in whole]
            job += 1
            if kills <= 0:
                break
        else:  # 1: the other rank was killed; 0: this one had just ended
            assert set(ended.statuses) <= {-9, 0, 1}
            assert -9 in ended.statuses, ended.log(0)[-3000:]
            kills -= 1
    lives = [json.loads(line) for path in folder.rglob("steps0.jsonl") for line in path.read_text().splitlines()]
    assert any(life.get("from") for life in lives), "no life continued another"
    if many and kind != "ddp":  # of the few, and of DDP's quick writes, none may be hit
        assert in_a_save, "no kill left a checkpoint half written"


def assert_no_step_lost_or_doubled(folder: Path, whole: list[dict]) -> None:
    """Each life starts at the step of the checkpoint it found, and each micro-batch of it has the loss that it has in
    the run that nobody killed.
    """
    for rank, losses in enumerate(each["losses"] for each in whole):
        start, expected = 0, None
        for line in (folder / f"steps{rank}.jsonl").read_text().splitlines():
            note = json.loads(line)
            if "from" in note:
                start = 0 if note["from"] is None else int(note["from"].removesuffix(".ckpt").partition("=")[2])
                expected = 2 * start  # two micro-batches per step
                continue
            assert note["batch"] == expected, note
            assert note["loss"] == losses[note["batch"]], note
            assert note["step"] == (note["batch"] + 1) // 2
            expected += 1
        assert expected == 2 * STEPS


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "kills", "seed"), [("ddp", 10, 3), ("fsdp2", 10, 4), ("zero2", 4, 5)])
@pytest.mark.timeout(900)
def test_killed_at_any_moment_no_step_is_lost_or_doubled_and_every_state_is_readable(tmp_path, kind, kills, seed):
    whole = run_ranks("cases.one_run", 2, tmp_path / "whole", kind=kind, adapter="lora", steps=STEPS)
    kill_and_restart(tmp_path, kind, whole, kills=kills, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "strategy"),
    [("ddp", "lightning.pytorch.strategies.DDPStrategy"), ("fsdp2", "dmpo_lightning.FSDP2Strategy")],
)
def test_rank_0_chooses_the_last_checkpoint_for_ranks_that_do_not_see_it(tmp_path, kind, strategy):
    """Where each rank writes its own part, rank 1 sees it too."""
    write_small(tmp_path, strategy=strategy, devices=2)
    arguments = [str(tmp_path / "small.yaml") if each == "small.yaml" else each for each in ARGUMENTS]
    for steps in (1, 2):
        case = {"arguments": [*arguments, f"--trainer.max_steps={steps}"], "apart": kind == "ddp"}
        ranks = run_ranks("cases.command_line", 2, tmp_path, timeout=300, **case)
        assert [rank["status"] for rank in ranks] == [0, 0]
    assert "No checkpoint in" not in (tmp_path / "rank0.log").read_text()
    assert "Continues from" in (tmp_path / "rank0.log").read_text()
