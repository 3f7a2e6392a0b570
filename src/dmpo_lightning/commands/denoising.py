"""Shows a completion while it is unmasked: live on a terminal, one line per step elsewhere."""

import os
import time
from dataclasses import dataclass, field
from typing import TextIO

from dmpo_lightning.policy import Policy
from dmpo_lightning.samplers import Change
from dmpo_lightning.terminal import escaped, is_terminal, terminal_size

GREEN, YELLOW, DIM = "1;32", "1;33", "2"
"""Of a token that was just revealed, of one to which the model gives less than a half, and of a masked position."""


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

    def __call__(self, change: Change) -> None:
        """Draws the first of the completions that have changed."""
        row, mask = int(change.rows[0]), self.policy.facts.mask_token_id
        self._row, self._step = row, self._step + 1 if row == self._row else 1
        columns = (change.completion_ids[0].tolist(), change.written[0].tolist(), change.confidence[0].tolist())
        # Not every stream can write the other character.
        blank = "░" if "utf" in (self.stream.encoding or "").lower() else "_"
        pieces: list[tuple[str, str | None]] = []
        changed = 0
        for token, is_new, sure in zip(*columns, strict=True):
            if token == mask:
                pieces.append((blank, DIM))
                continue
            # One by one, so that each has its own colour.
            colour = (YELLOW if sure < 0.5 else GREEN) if is_new else None
            pieces += [(each, colour) for each in escaped(str(self.policy.tokenizer.decode([token])))]
            changed = len(pieces) if is_new else changed
        revealed = sum(token != mask for token in columns[0])
        heading = f"step {self._step}, {revealed} of {len(columns[0])} tokens"
        if not is_terminal(self.stream):
            self.stream.write(f"{heading}: {''.join(text for text, _ in pieces)}\n")
            return
        width, height = terminal_size(self.stream)
        # What has room around the change, where each character may take two cells.
        room = width // 2 * max(1, height - 2)
        first = max(0, min(changed - room // 2, len(pieces) - room))
        shown = "".join(coloured(text, colour, self.stream) for text, colour in pieces[first : first + room])
        self.stream.write(f"\x1b[H\x1b[J{coloured(heading, DIM, self.stream)}\n{shown}\n")
        self.stream.flush()
        time.sleep(self.delay)


def coloured(text: str, code: str | None, stream: TextIO) -> str:
    """The text in a colour (a number of SGR, such as 32 for green) where the stream is a terminal that shows colours.

    ``NO_COLOR`` in the environment forbids it (https://no-color.org).
    """
    return f"\x1b[{code}m{text}\x1b[0m" if code and is_terminal(stream) and not os.environ.get("NO_COLOR") else text
