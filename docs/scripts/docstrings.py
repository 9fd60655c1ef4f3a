"""Shows docstrings on the site: examples as code, and each parameter or field in its own paragraph."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

EXAMPLE = re.compile(r"^Example:\n((?:    .*\n?|\n)+)", re.MULTILINE)


class Paragraphs(griffe.Extension):
    """Rewrites the docstring of each function, class and attribute before it is parsed."""

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        self._rewrite(func, {parameter.name for parameter in func.parameters})

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        names = set(cls.members)
        if isinstance(init := cls.members.get("__init__"), griffe.Function):
            names |= {parameter.name for parameter in init.parameters}
        self._rewrite(cls, names)

    def _rewrite(self, shown: griffe.Object, names: set[str]) -> None:
        if shown.docstring is not None:
            shown.docstring.value = rewritten(shown.docstring.value, names)


def rewritten(text: str, names: set[str]) -> str:
    """Returns a docstring in which `Example:` holds code, and entries of the given names begin paragraphs."""
    if names:
        name = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
        entry = re.compile(rf"(?:^|(?<=[.;] ))((?:{name})(?:, (?:{name}))*): ", re.MULTILINE)
        text = entry.sub(lambda found: f"\n\n`{found[1].replace(', ', '`, `')}`: ", text)
    return EXAMPLE.sub(_as_code, text)


def _as_code(found: re.Match[str]) -> str:
    code = textwrap.dedent(found[1]).strip("\n")
    return f"Example:\n\n```python\n{code}\n```\n"
