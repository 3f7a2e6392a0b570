"""Shows a completion while it is unmasked: live on a terminal, one line per step elsewhere."""

import os
import time
from dataclasses import dataclass, field
from typing import TextIO
from unicodedata import east_asian_width

from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers import Change
from dmpo_lightning.terminal import escaped, is_terminal, printable, terminal_size

GREEN, YELLOW, DIM = "1;32", "1;33", "2"
"""Of a token that was just revealed, of one to which the model gives less than a half, and of a masked position."""
Piece = tuple[str, str | None]
"""The text of a position of a completion, and its colour."""


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
    _row: int | None = field(default=None, init=False)
    """The number of the completion that is drawn."""
    _step: int = field(default=0, init=False)
    _drawn: int = field(default=0, init=False)
    """How many lines the last picture had."""

    def __call__(self, change: Change) -> None:
        """Draws the first of the completions that have changed."""
        row = int(change.rows[0])
        if row != self._row:
            self._row, self._step, self._drawn = row, 0, 0
        self._step += 1
        pieces = self._pieces(change)
        revealed = int((change.completion_ids[0] != self.policy.facts.mask_token_id).sum())
        heading = f"step {self._step}, {revealed} of {len(pieces)} tokens"
        if is_terminal(self.stream):
            self._draw(heading, pieces)
        else:
            self.stream.write(f"{heading}: {escaped(''.join(text for text, _ in pieces))}\n")

    def _pieces(self, change: Change) -> list[Piece]:
        columns = (change.completion_ids[0].tolist(), change.written[0].tolist(), change.confidence[0].tolist())
        pieces: list[Piece] = []
        for token, is_new, sure in zip(*columns, strict=True):
            if token == self.policy.facts.mask_token_id:
                # Not every stream can write the other character.
                pieces.append(("░" if "utf" in (self.stream.encoding or "").lower() else "_", DIM))
            else:
                # One by one, so that each has its own colour.
                text = printable(str(self.policy.tokenizer.decode([token])))
                pieces.append((text, (YELLOW if sure < 0.5 else GREEN) if is_new else None))
        return pieces

    def _draw(self, heading: str, pieces: list[Piece]) -> None:
        """Draws a picture in the place of the last one, cut to what the terminal has room for around the change."""
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

    def _lines(self, pieces: list[Piece], width: int) -> tuple[list[str], int]:
        """The pieces in lines of at most this width, counted without colours, and the last with a change."""
        lines, used, changed = [""], 0, 0
        for text, colour in pieces:
            for character in text.replace("\t", " "):
                needed = 2 if east_asian_width(character) in "WF" else 1
                if character == "\n" or used + needed > width:
                    lines.append("")
                    used = 0
                if character != "\n":
                    lines[-1] += coloured(character, colour, self.stream) if colour else character
                    used += needed
            if colour in (GREEN, YELLOW):
                changed = len(lines) - 1
        return lines, changed


def coloured(text: str, code: str, stream: TextIO) -> str:
    """The text in a colour (a number of SGR, such as 32 for green) where the stream is a terminal that shows colours.

    ``NO_COLOR`` in the environment forbids it (https://no-color.org).
    """
    return f"\x1b[{code}m{text}\x1b[0m" if is_terminal(stream) and not os.environ.get("NO_COLOR") else text
