"""Foreign text and numbers as a page holds them: nothing of them is read as HTML or as a script."""

import html
import json
from typing import Any

from dmpo_lightning.terminal import printable

LONGEST_TEXT = 20_000
"""Characters of a text that are shown."""


def shown(text: str, longest: int = LONGEST_TEXT) -> str:
    """The beginning of a text, with invisible characters, such as those that turn its direction, written out."""
    rest = len(text) - longest
    return printable(text[:longest]) + (f" ... ({rest} more characters)" if rest > 0 else "")


def escaped_html(text: Any, longest: int = LONGEST_TEXT) -> str:
    """The text as the content or an attribute of an element."""
    return html.escape(shown(str(text), longest))


def script_json(value: Any) -> str:
    """A value as the content of a script element, which no text within it can end.

    It is ASCII, and ``<`` is escaped, of which an end tag and a comment would be made.
    """
    plain = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return plain.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def rounded(value: float) -> float:
    """Five digits, which is more than a plot shows."""
    return float(f"{value:.5g}")


def table(headings: list[str], rows: list[list[str]]) -> str:
    """A table whose cells are text, with the first of each row as its heading."""
    head = "".join(f'<th scope="col">{escaped_html(each)}</th>' for each in headings)
    body = "".join(
        f'<tr><th scope="row">{escaped_html(row[0], 200)}</th>'
        + "".join(f"<td>{escaped_html(cell, 1000)}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
