"""Shows a completion while it is unmasked: live on a terminal, one line per step elsewhere."""

import time
from dataclasses import dataclass, field
from typing import TextIO
from unicodedata import east_asian_width

from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers import Change
from dmpo_lightning.terminal import coloured, escaped, is_terminal, printable, terminal_size

GREEN, YELLOW, DIM = "1;32", "1;33", "2"
"""Of a token that was just revealed, of one to which the model gives less than a half, and of a place still masked."""


@dataclass
class Piece:
    """What one place of a completion shows."""

    text: str
    colour: str | None


@dataclass
class Denoising:
    """An observer that draws a completion anew at each of its steps.

    Args:
        policy: whose tokenizer reads the tokens. They are untrusted, and nothing in them reaches the terminal as it is.
        stream: to write to.
        delay: the least number of seconds between two pictures on a terminal, where small models are too fast to see.
    """

    policy: Policy
    stream: TextIO
    delay: float = 0.0
    _rows: int | None = field(default=None, init=False)
    """The completion that is drawn."""
    _step: int = field(default=0, init=False)
    _drawn: int = field(default=0, init=False)
    """Lines of the last picture."""

    def __call__(self, change: Change) -> None:
        """Draws the first of the completions that have changed."""
        row = int(change.rows[0])
        if row != self._rows:
            self._rows, self._step, self._drawn = row, 0, 0
        self._step += 1
        ids = change.completion_ids[0].tolist()
        pieces = self._pieces(ids, change.written[0].tolist(), change.confidence[0].tolist())
        masked = ids.count(self.policy.facts.mask_token_id)
        heading = f"step {self._step}, {len(ids) - masked} of {len(ids)} tokens"
        if not is_terminal(self.stream):
            self.stream.write(f"{heading}: {escaped(''.join(piece.text for piece in pieces))}\n")
            return
        width, height = terminal_size(self.stream)
        # A line that is full would wrap, and one more than fits would scroll; neither can be taken back.
        lines, changed = self._lines(pieces, width - 1)
        room = height - 2
        first = max(0, min(changed - room // 2, len(lines) - room))
        lines = [coloured(heading, DIM, self.stream), *lines[first : first + room]]
        back = f"\x1b[{self._drawn}F\x1b[J" if self._drawn else ""
        self.stream.write(back + "\n".join(lines) + "\n")
        self.stream.flush()
        self._drawn = len(lines)
        time.sleep(self.delay)

    def _pieces(self, ids: list[int], written: list[bool], confidence: list[float]) -> list[Piece]:
        mask = self.policy.facts.mask_token_id
        shown = []
        for token, is_new, sure in zip(ids, written, confidence, strict=True):
            if token == mask:
                shown.append(Piece(self._mark, DIM))
            else:
                new = YELLOW if sure < 0.5 else GREEN
                # One by one, so that each has its own colour.
                text = str(self.policy.tokenizer.decode([token]))
                shown.append(Piece(printable(text), new if is_new else None))
        return shown

    @property
    def _mark(self) -> str:
        """Of a masked place, in a character that the stream can write."""
        try:
            "░".encode(self.stream.encoding or "ascii")
        except UnicodeEncodeError:
            return "_"
        return "░"

    def _lines(self, pieces: list[Piece], width: int) -> tuple[list[str], int]:
        """The pieces in lines of at most this width, counted without colours, and the last with a change."""
        lines, used, changed = [""], 0, 0
        for piece in pieces:
            for character in piece.text.replace("\t", " "):
                needed = 2 if east_asian_width(character) in "WF" else 1
                if character == "\n" or used + needed > width:
                    lines.append("")
                    used = 0
                if character != "\n":
                    lines[-1] += coloured(character, piece.colour, self.stream) if piece.colour else character
                    used += needed
            if piece.colour in (GREEN, YELLOW):
                changed = len(lines) - 1
        return lines, changed
