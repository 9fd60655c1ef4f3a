"""Makes untrusted text safe to print in a terminal, and normalises text for comparison."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """Returns the text, escaped so that it is safe to show in a terminal.

    Characters that control the terminal or change the direction or width of later text become Python's escape
    sequences, such as \\x1b or \\u202e.

    Example:
        print(printable(f"Cannot read '{path}'."))
    """
    return "".join(letter if _is_shown(letter) else _escaped(letter) for letter in text)


def composed(text: str) -> str:
    """Returns the text in Unicode's composed form (NFC), so that equivalent texts compare equal.

    Example:
        composed("e\\u0301") == "\\xe9"
    """
    return unicodedata.normalize("NFC", text)


def _is_shown(letter: str) -> bool:
    # The only separator that Python considers printable is the space. Line and paragraph separators stay escaped.
    return letter.isprintable() or (letter.isspace() and letter >= "\xa0" and letter not in "\u2028\u2029")


def _escaped(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
