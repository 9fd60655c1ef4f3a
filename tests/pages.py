"""Blocks of code and command lines in README, docs and docstrings."""

import ast
import re
import shlex
import textwrap

FENCE = re.compile(r"^( *)```(\w*)(?: title=\"(\S+)\")?\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)


def blocks(text, language):
    """The untitled blocks of a language in a page's text."""
    found = FENCE.findall(text)
    return [textwrap.dedent(block) for _, name, title, block in found if name == language and not title]


def titled_blocks(text):
    """The blocks with a title, by title."""
    return {title: block for _, _, title, block in FENCE.findall(text) if title}


def sections(page):
    """The text under each heading of the second level, by heading."""
    _, *parts = re.split(r"^## (.+)$", page.read_text(), flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def commands(text):
    """The words of the commands in a page's text, comments taken off and continued lines joined."""
    return [words for block in blocks(text, "") for words in commands_in(block)]


def commands_of_docstring(file):
    """The words of the commands in the docstring of a Python file."""
    return list(commands_in(ast.get_docstring(ast.parse(file.read_text())) or ""))


def commands_in(block):
    for line in block.replace("\\\n", " ").splitlines():
        if line.strip().startswith("python "):
            words = shlex.split(line, comments=True)[1:]
            yield words[2:] if words[:2] == ["-m", "flowgen"] else [words[0].removesuffix(".py"), *words[1:]]
