"""What a run shows on a terminal, which tmux plays, and what it writes into a log."""

import fcntl
import itertools
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from uuid import uuid4

import pytest
from dmpo_runs import loader, module, trainer
from lightning.pytorch import Callback
from test_run_directory import Held

from dmpo_lightning import (
    Backbone,
    BeforeAfterReport,
    ConfidenceSampler,
    DemonstrationsDataModule,
    LatinSquareDemonstrations,
    MaskedSFT,
    ProgressLine,
)
from dmpo_lightning.commands.fit import is_news
from dmpo_lightning.modules.observers import RolloutObserver
from dmpo_lightning.terminal import BottomLine

GOLDEN = Path(__file__).parent / "golden"


class Terminal:
    """A terminal of some size, and all that was written to it."""

    def __init__(self, columns: int, rows: int) -> None:
        self.columns, self.rows = columns, rows
        self._master, slave = os.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self._written = bytearray()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        try:
            while block := os.read(self._master, 65536):
                self._written += block
        except OSError:  # how Linux says that nobody writes any more
            pass

    def end(self) -> str:
        self.stream.close()
        self._reader.join(10)
        os.close(self._master)
        return self._written.decode().replace("\r\n", "\n")


def played(text: str, columns: int, rows: int, folder: Path) -> str:
    """What a terminal shows of a text, by tmux."""
    tmux = shutil.which("tmux")
    if tmux is None:
        pytest.skip("needs tmux: apt-get install tmux")
    (folder / "text").write_text(text)
    (folder / "done").unlink(missing_ok=True)
    # A server of its own each time: one that is about to end takes no session.
    run = [tmux, "-u", "-L", f"dmpo-{uuid4().hex}", "-f", "/dev/null"]
    play = f"cat {folder}/text; touch {folder}/done; sleep 60"
    subprocess.run([*run, "new-session", "-d", "-x", str(columns), "-y", str(rows), play], check=True, timeout=30)
    try:
        for _ in range(300):
            if (folder / "done").exists():
                break
            time.sleep(0.1)
        time.sleep(0.3)
        shown = subprocess.run([*run, "capture-pane", "-p"], check=True, capture_output=True, text=True, timeout=30)
    finally:
        subprocess.run([*run, "kill-server"], check=False, timeout=30)
    return shown.stdout.rstrip("\n") + "\n"


def masked(text: str) -> str:
    """Without results, which differ a little between machines, and without what was sampled."""
    text = re.sub(r"(  reward \S+, weight \S+:).*", r"\1 ...", text)
    text = re.sub(r"\d+ threads?", "# threads", text)
    return re.sub(r"\d\d:\d\d", "T", re.sub(r"-?\d+\.\d+|\d+ rollouts/s", "#", text))


@pytest.fixture
def steady_clock(monkeypatch):
    """Each look at the clock is 20 ms later than the one before, so that rates and times left are always the same."""
    ticks = itertools.count()
    for name in ("callbacks.progress", "modules.observers", "modules.dmpo"):
        monkeypatch.setattr(f"dmpo_lightning.{name}.perf_counter", lambda: next(ticks) / 50)


@pytest.fixture
def on_terminal(monkeypatch):
    """Puts standard error, and what Lightning says, on a terminal."""

    def make(columns: int, rows: int) -> Terminal:
        terminal = Terminal(columns, rows)
        monkeypatch.setattr(sys, "stderr", terminal.stream)
        monkeypatch.setenv("TERM", "xterm")
        # As in a process of its own, whatever this one has put into these lists.
        handler = logging.StreamHandler(terminal.stream)
        handler.addFilter(is_news)
        monkeypatch.setattr(logging.getLogger("lightning"), "handlers", [])
        monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "handlers", [handler])
        monkeypatch.setattr(logging.getLogger("lightning.pytorch"), "propagate", False)
        return terminal

    return make


def run(tmp_path, *callbacks, every_n_buffers=20, **options):
    fit = trainer(
        tmp_path,
        enable_progress_bar=True,
        callbacks=[ProgressLine(refresh_interval=0, plain_interval=0, every_n_buffers=every_n_buffers), *callbacks],
        **{"max_steps": 8, "max_epochs": -1, "val_check_interval": 4, "check_val_every_n_epoch": None} | options,
    )
    dmpo = module()
    fit.fit(dmpo, loader(), loader(shuffle=False))
    return fit, dmpo


class Talks(Callback):
    """Speaks in the middle of the run, through each of the ways to a terminal."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 5:
            print("half a", end=" ", file=sys.stderr)
            print("line", file=sys.stderr)
            logging.getLogger("lightning.pytorch").warning("from a handler that is older than the line")


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (140, 30)])
def test_the_screen_of_a_run(tmp_path, on_terminal, steady_clock, columns, rows):
    terminal = on_terminal(columns, rows)
    run(tmp_path, Talks(), every_n_buffers=1)
    text = terminal.end()
    frames = re.split(r"[\r\n]", text)
    sampled = [frame for frame in frames if re.match(r"4/8 .* sampling \d", frame)]
    assert [re.search(r"sampling (\d/4)", frame)[1] for frame in sampled] == ["0/4", "1/4", "2/4", "3/4"]
    assert max(map(len, sampled)) <= columns
    # As it was while the second buffer was sampled, and at the end.
    until = text.rindex(sampled[-1]) + len(sampled[-1])
    screens = [played(part, columns, rows, tmp_path) for part in (text[:until], text)]
    screen = masked(f"\n{'~' * columns}\n".join(screens))
    golden = GOLDEN / f"screen_{columns}x{rows}.txt"
    if os.environ.get("DMPO_WRITE_GOLDEN"):
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(screen)
    assert screen == golden.read_text()


def test_a_log_gets_a_line_for_each_buffer_and_each_validation(tmp_path, capsys):
    _, dmpo = run(tmp_path)
    lines = capsys.readouterr().err.splitlines()
    assert not any("\x1b" in line or "\r" in line for line in lines)
    buffers = [line for line in lines if re.match(r"step \d/8, reward", line)]
    assert [line.split(",")[0] for line in buffers] == ["step 0/8", "step 4/8", "step 8/8"]
    assert re.search(r"accuracy \d\.\d+, ess .*, informative \d+%, .* rollouts/s, \d\d:\d\d left$", buffers[1])
    assert re.search(r"; trained for \d\d:\d\d$", buffers[2])
    validations = [line for line in lines if "accuracy sampled" in line]
    assert [line.split(":")[0] for line in validations] == ["step 4/8", "step 8/8"]
    sampled, greedy = (each.means["accuracy"][0] for each in dmpo.evaluator.results)
    assert f"sampled {sampled:.3f} +- " in validations[1]
    assert f"greedy {greedy:.3f} +- " in validations[1]
    assert dmpo.policy.on_denoising_step is None


def test_lines_in_a_log_keep_their_distance(tmp_path, capsys):
    fit = trainer(tmp_path, max_steps=8, max_epochs=-1, enable_progress_bar=True, callbacks=[ProgressLine()])
    fit.fit(module(), loader())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    assert [line.split(",")[0] for line in lines] == ["step 0/8", "step 8/8"]


def test_supervised_fine_tuning_shows_its_losses(tmp_path, capsys):
    data = DemonstrationsDataModule(
        LatinSquareDemonstrations(size=16), tokenizer="sudoku_tiny", completion_length=20, batch_size=4
    )
    fit = trainer(
        tmp_path,
        max_steps=4,
        max_epochs=-1,
        log_every_n_steps=2,
        val_check_interval=4,
        limit_val_batches=1,
        enable_progress_bar=True,
        callbacks=[ProgressLine(plain_interval=0)],
    )
    fit.fit(MaskedSFT(Backbone("sudoku_tiny", random_weights=True)), data)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step")]
    shapes = [re.sub(r"\d+\.\d+", "#", re.sub(r"\d\d:\d\d", "T", line)) for line in lines]
    assert shapes == [
        "step 2/4, loss #, T left",
        "step 4/4, loss #, T left",
        "step 4/4: val/loss # (T)",
        "step 4/4, loss #; trained for T",
    ]


@pytest.mark.parametrize(
    ("columns", "room", "last"),
    [(0, 80, "accuracy 0.456"), (80, 80, "accuracy 0.456"), (40, 40, "01:23 left"), (200, 200, "informative 87%")],
)
def test_a_line_leaves_out_what_has_no_room_and_cuts_nothing(columns, room, last):
    # Without columns there are no rows either, as in some containers.
    terminal = Terminal(columns, 24 if columns else 0)
    line = BottomLine(terminal.stream, 0.0)
    parts = ["01:23 left", "validating 0/1 12/20", "reward 0.123", "accuracy 0.456", "ess 0.92", "informative 87%"]
    line.show(" 37/200", parts, 37 / 200)
    line.close(keep=True)
    shown = re.split(r"[\r\n]", terminal.end())
    assert max(map(len, shown)) <= room
    (drawn,) = {each for each in shown if "37/200" in each}
    assert re.search(rf"  {last} *$", drawn)
    assert [part for part in parts if part in drawn] == parts[: parts.index(last) + 1]


def form(line: str) -> list[tuple[int, str]]:
    """Where the words of a line stand, without those that change with what is being done."""
    words = r"left|reward|accuracy|\bess|informative"
    return [(found.start(), found[0]) for found in re.finditer(words, line)]


@pytest.mark.parametrize("columns", [80, 140])
def test_the_line_of_a_run_has_one_form_from_the_first_step_to_the_last(tmp_path, on_terminal, columns):
    terminal = on_terminal(columns, 24)
    run(tmp_path)
    lines = [each for each in re.split(r"[\r\n]", terminal.end()) if re.match(r" *\d/8 ", each)]
    assert {line.split()[0] for line in lines} == {f"{step}/8" for step in range(9)}
    assert len({str(form(line)) for line in lines}) == 1
    assert "validating 0/" in "".join(lines)
    words = [word for _, word in form(lines[0])]
    assert words[:3] == ["left", "reward", "accuracy"]


def test_the_streams_are_given_back_after_an_exception(tmp_path, on_terminal):
    terminal = on_terminal(80, 24)
    before = sys.stdout, sys.stderr

    class Fails(RolloutObserver):
        def on_rollouts(self, *arguments):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        run(tmp_path, Fails())
    assert (sys.stdout, sys.stderr) == before
    last = re.split(r"[\r\n]", terminal.end().rstrip())[-1]
    assert re.match(r"0/8 .* training 0/4 +reward ", last)


def test_an_evaluation_before_or_behind_a_run_has_a_bar_and_the_time_left(tmp_path, on_terminal, steady_clock):
    terminal = on_terminal(80, 24)
    samplers = {"temperature_1": ConfidenceSampler(denoising_steps=4), "greedy": ConfidenceSampler(temperature=0.0)}
    line = ProgressLine(refresh_interval=0)
    flags = {"max_steps": 8, "max_epochs": -1, "enable_progress_bar": True}
    fit = trainer(tmp_path, callbacks=[line, BeforeAfterReport(samplers)], **flags)
    dmpo = module()
    fit.fit(dmpo, datamodule=Held())
    lines = [each for each in re.split(r"[\r\n]", terminal.end()) if re.match(r" *\d/\d ", each)]
    counts = list(dict.fromkeys(each.split()[0] for each in lines[: len(lines) // 2]))
    # Two batches by two samplers, before the steps go on.
    assert counts[:5] == ["0/8", "0/4", "1/4", "2/4", "3/4"]
    trained = next(place for place, each in enumerate(lines) if each.startswith("8/8"))
    base, final = ([each for each in part if "evaluating" in each] for part in (lines[:trained], lines[trained:]))
    assert {each.split()[0] for each in base if "--:-- left" in each} == {"0/4"}
    # The line goes on where the share falls from 3/4 to 0/8.
    assert any("sampling 1/4" in each for each in lines)
    # Of the final one the clock knows how long it takes before it has begun.
    assert final
    assert not any("--:-- left" in each for each in final)
    length = dmpo.completion_length
    assert line.clock.ending == 6 * sum(each.num_steps(length) for each in samplers.values())
    assert len({each.index("left") for each in lines}) == 1
