"""What a run shows on a terminal, which tmux plays, and what it writes into a log."""

import fcntl
import io
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
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from dmpo_lightning import Backbone, DemonstrationsDataModule, LatinSquareDemonstrations, MaskedSFT
from dmpo_lightning.callbacks.progress import ProgressLine
from dmpo_lightning.callbacks.samples import RolloutsOnScreen
from dmpo_lightning.callbacks.status import ERASE, StatusLine
from dmpo_lightning.commands.quiet import is_news

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
    run = [tmux, "-L", f"dmpo-{uuid4().hex}", "-f", "/dev/null"]
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
    return re.sub(r"-?\d+\.\d+", "#", text)


@pytest.fixture
def steady_clock(monkeypatch):
    """Each look at the clock is 20 ms later than the one before, so that rates and times left are always the same."""
    ticks = itertools.count()
    for name in ("callbacks.progress", "modules.meter", "modules.collecting"):
        monkeypatch.setattr(f"dmpo_lightning.{name}.perf_counter", lambda: next(ticks) / 50)


@pytest.fixture
def on_terminal(monkeypatch):
    """Puts standard error, and what Lightning says, on a terminal."""
    terminals = []

    def make(columns: int, rows: int) -> Terminal:
        terminal = Terminal(columns, rows)
        terminals.append(terminal)
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


def run(tmp_path, *callbacks, **options):
    fit = trainer(
        tmp_path,
        enable_progress_bar=True,
        callbacks=[ProgressLine(refresh_interval=0, plain_interval=0), *callbacks],
        **{"max_steps": 8, "max_epochs": -1, "val_check_interval": 4, "check_val_every_n_epoch": None} | options,
    )
    dmpo = module()
    fit.fit(dmpo, loader(), loader(shuffle=False))
    return fit, dmpo


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (100, 30)])
def test_the_screen_of_a_run(tmp_path, on_terminal, steady_clock, columns, rows):
    terminal = on_terminal(columns, rows)
    run(tmp_path, RolloutsOnScreen(every_n_buffers=1, characters=60))
    text = terminal.end()
    frames = [frame.partition("\n")[0] for frame in text.split(ERASE)]
    assert max(map(len, frames)) < columns
    sampled = [frame for frame in frames if re.search(r"\b4/8 sampl", frame)]
    assert [re.search(r"sampl\w+ (\d/4)", frame)[1] for frame in sampled] == ["0/4", "1/4", "2/4", "3/4"]
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
    assert re.search(r"accuracy \d\.\d+, ess .*, informative \d+%, .* rollouts/s, \d:\d\d left$", buffers[1])
    assert re.search(r"; trained for \d:\d\d$", buffers[2])
    validations = [line for line in lines if "accuracy sampled" in line]
    assert [line.split(":")[0] for line in validations] == ["step 4/8", "step 8/8"]
    sampled, greedy = (each.means["accuracy"][0] for each in dmpo.results)
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
    shapes = [re.sub(r"\d+\.\d+", "#", re.sub(r"\d:\d\d", "T", line)) for line in lines]
    assert shapes == [
        "step 2/4, loss #, T left",
        "step 4/4, loss #, T left",
        "step 4/4: val/loss # (T)",
        "step 4/4, loss #; trained for T",
    ]


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_bars_of_lightning_count_to_the_end_of_the_run_also_after_a_restart(tmp_path, bar):
    class Counting(bar):
        def on_train_batch_end(self, *arguments):
            super().on_train_batch_end(*arguments)
            task = self.train_progress_bar
            seen.append((task.n if bar is TQDMProgressBar else task.completed, task.total))

    def fit(steps, **options):
        seen.clear()
        one = trainer(
            tmp_path,
            max_steps=steps,
            max_epochs=-1,
            enable_progress_bar=True,
            accumulate_grad_batches=2,
            limit_train_batches=12,
            callbacks=[Counting()],
        )
        one.fit(module(), loader(), **options)
        return one, list(seen)

    seen = []
    first, counts = fit(2)
    assert counts == [(n, 4) for n in range(1, 5)]
    first.save_checkpoint(tmp_path / "x.ckpt")
    _, counts = fit(5, ckpt_path=tmp_path / "x.ckpt")
    assert counts == [(n, 10) for n in range(5, 11)]


@pytest.mark.parametrize(("columns", "room"), [(80, 79), (0, 79), (1, 1)])
def test_there_is_room_for_a_line_in_every_terminal(columns, room):
    terminal = Terminal(columns, 24)
    assert StatusLine(terminal.stream).columns == room
    terminal.end()


def test_what_is_printed_appears_above_the_line(tmp_path):
    stream = io.StringIO()
    line = StatusLine(stream)
    line.draw("at the bottom")
    line.write_above(stream, "half")
    line.draw("later")
    line.write_above(stream, " a line\n")
    line.close(keep=True)
    assert stream.getvalue() == f"{ERASE}at the bottom{ERASE}half a line\nlater\n"


def test_the_streams_are_given_back_after_an_exception(tmp_path, on_terminal, monkeypatch):
    terminal = on_terminal(80, 24)
    before = sys.stdout, sys.stderr

    class Fails(RolloutsOnScreen):
        def on_rollouts(self, *arguments):
            raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        run(tmp_path, Fails())
    assert (sys.stdout, sys.stderr) == before
    last = terminal.end().split(ERASE)[-1]
    assert re.fullmatch(r"\[ +\] 0/8 training 0/4  reward .*\n", last)
