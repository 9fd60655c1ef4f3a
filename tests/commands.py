"""Commands as a user types them, run in this process: what they print, and the one sentence of what is refused."""

import io
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

from flowgen.cli import EXIT_MISTAKE, main


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


def outcome_of(command, *words):
    """The exit code and streams of a command line; words are added as they are, for paths with spaces."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([*shlex.split(command), *map(str, words)])
    return Outcome(code, out.getvalue(), err.getvalue())


def succeed(command, *words):
    """The standard output of a command that must succeed."""
    outcome = outcome_of(command, *words)
    assert outcome.code == 0, outcome
    return outcome.out


def refused(command, *words):
    """The sentence of a command that must refuse what it is given, in one line."""
    outcome = outcome_of(command, *words)
    assert outcome.code == EXIT_MISTAKE, outcome
    assert re.fullmatch(r"flowgen: [^\n]+\n", outcome.err), outcome.err
    return outcome.err


def one_sentence(error):
    """The message of a caught error, which must be one line that ends as a sentence does."""
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith((".", "?")), message
    assert len(message) < 2000
    return message
