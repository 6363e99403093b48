"""Text from outside as it can be shown: nothing in it acts on what shows it, or hides."""

from __future__ import annotations

import unicodedata

__all__ = ["visible"]

# controls, formats (reordering, zero width), halves of characters, line and paragraph separators
_UNSEEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def visible(text: str) -> str:
    r"""`text` with everything that is no visible character written as Python escapes it.

    A module's name may come from a stranger's checkpoint: an escape sequence would steer the
    terminal, a line break would forge a line, a right-to-left override would turn words around,
    and half a surrogate pair cannot be written to a file.

    ```python
    visible("layer\x1b[2J\n")  # 'layer\\x1b[2J\\n'
    ```
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if unicodedata.category(c) not in _UNSEEN else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
