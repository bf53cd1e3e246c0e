"""Text that models wrote, made harmless to look at: in a terminal, in a page.

A completion may hold escape sequences that rewrite a terminal, marks that turn the direction of a line, or characters
of no width behind which text hides. All of them are shown as their code point.
"""

from __future__ import annotations

import re
import sys

from rich.console import Console

PIPED_WIDTH = 160  # columns of tables that go to a file or a pipe

# C0 and C1 controls, soft hyphen, zero-width and direction marks, tags, and halves of a character
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff"
                        "\ufff9-\ufffb\U000e0000-\U000e007f]|[\ud800-\udfff]")


def visible(value: object) -> str:
    """The text of a value; characters that act instead of being seen stand as `[U+001B]`. Tab and newline stay."""
    return _INVISIBLE.sub(lambda match: f"[U+{ord(match[0]):04X}]", str(value))


def one_line(value: object, most: int) -> str:
    """`visible` on one line of at most `most` characters."""
    line = " ".join(visible(value).split())
    return line if len(line) <= most else line[:most - 3] + "..."


def open_console() -> Console:
    """Made when needed: the tests and the shell may have redirected stdout since the import."""
    return Console() if sys.stdout.isatty() else Console(width=PIPED_WIDTH)
