"""Draws a held-out 4x4 Sudoku of a run of the demo being denoised, before and after training, as an animated SVG.

    python examples/denoising_svg.py runs/sudoku_tiny/latest denoising.svg

It takes the puzzle whose reward rose most. Tokens appear in the order in which they were revealed.
"""

import sys
from pathlib import Path

from dmpo_lightning.reports.record import Completion, held_out, read_run

CELL, SECONDS, PAUSE = 36, 0.3, 8


def cells(completion: Completion, left: int) -> list[str]:
    """A number for each cell, at the step that revealed it; the puzzle's own stand there from the start."""
    puzzle = "".join(filter(str.isdigit, completion.prompt))
    end = max(step for _, step, _ in completion.tokens) + 1 + PAUSE
    drawn = []
    for number, (token, step, _) in enumerate(completion.tokens[1:17]):
        x, y = left + CELL * (number % 4) + CELL // 2, 40 + CELL * (number // 4) + CELL // 2 + 6
        given = puzzle[number] != "0"
        appears = (
            f'<animate attributeName="opacity" values="0;0;1;1" keyTimes="0;{step / end:.3f};{(step + 1) / end:.3f};1" '
            f'dur="{end * SECONDS:.1f}s" repeatCount="indefinite"/>'
        )
        style = 'font-weight="bold" fill="#808080"' if given else 'fill="#1f77b4"'
        drawn.append(f'<text x="{x}" y="{y}" {style}>{token}{"" if given else appears}</text>')
    return drawn


def grid(title: str, left: int) -> list[str]:
    """Lines of a square, those between boxes thicker, and what is above it."""
    lines = [f'<text x="{left + 2 * CELL}" y="26" font-size="14" fill="#808080">{title}</text>']
    for number in range(5):
        at, width = CELL * number, 1 + (number % 2 == 0)
        path = f"M{left + at} 40v{4 * CELL}M{left} {40 + at}h{4 * CELL}"
        lines.append(f'<path d="{path}" stroke="#808080" stroke-width="{width}"/>')
    return lines


def main(run: Path, output: Path) -> None:
    before, after = held_out(read_run(run, run.name))[0]
    body = [*grid("before", 20), *cells(before, 20)]
    body += [*grid("after", 60 + 4 * CELL), *cells(after, 60 + 4 * CELL)]
    size = f'width="{80 + 8 * CELL}" height="{60 + 4 * CELL}"'
    text = 'font-family="monospace" font-size="18" text-anchor="middle"'
    output.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {text}>{"".join(body)}</svg>\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
