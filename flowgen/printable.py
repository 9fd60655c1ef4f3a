"""Makes untrusted text safe for terminals, and normalises it for comparison."""

from __future__ import annotations

import unicodedata


def printable(text: str) -> str:
    """Returns the text in a form that is safe to show in a terminal.

    Escapes characters that control the terminal, or that change the direction or width of later text. The escapes look
    like those of Python, such as \\x1b or \\u202e.

    Example:
        print(printable(f"Cannot read '{path}'."))
    """
    return "".join(letter if _is_shown(letter) else _escaped(letter) for letter in text)


def composed(text: str) -> str:
    """Returns the text in Unicode's composed form (NFC), in which equivalent texts are equal.

    Example:
        composed("e\\u0301") == "\\xe9"
    """
    return unicodedata.normalize("NFC", text)


def _is_shown(letter: str) -> bool:
    # Of all separators, Python counts only the space as printable. Line and paragraph separators stay escaped.
    return letter.isprintable() or (letter.isspace() and letter >= "\xa0" and letter not in "\u2028\u2029")


def _escaped(letter: str) -> str:
    code = ord(letter)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
