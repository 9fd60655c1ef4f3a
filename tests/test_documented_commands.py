"""Commands of docs/commands.md run in the order of the page, with tiny models, few steps and few samples."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from commands import succeed
from pages import commands, sections
from PIL import Image

PROJECT = Path(__file__).parent.parent
PAGE = sections(PROJECT / "docs" / "commands.md")
FEWER = {"--num": "2", "--samples": "24", "--steps": "4"}
RUN_OPTIONS = ("--checkpoint", "--init-from")
LINES = [
    pytest.param(words, id=f"{heading}-{words[0]}")
    for heading in ("Train", "Sample and evaluate", "Flow matching")
    for words in commands(PAGE[heading])
    if words[0] != "convert"  # published weights have gigabytes
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files that the page names, in which its commands leave their runs."""
    root = tmp_path_factory.mktemp("pasted")
    (root / "configs").symlink_to(PROJECT / "configs")
    generator = np.random.default_rng(0)
    for place, name in itertools.product(("photos", "other_photos"), ("cat", "dog", "fox")):
        (root / place / name).mkdir(parents=True)
        for number in range(8):
            pixels = generator.integers(0, 256, (40, 36, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / place / name / f"{number}.png")
    return root


def shorter(words):
    """The words with fewer steps and samples; models are trained in their debug form."""
    pairs = itertools.pairwise(["", *words])
    fewer = [FEWER.get(before, word) for before, word in pairs]
    return [*fewer, "--debug"] if words[0] == "train" and "--debug" not in words else fewer


def value_of(words, *options):
    return next((value for option, value in itertools.pairwise(words) if option in options), None)


def run(words):
    """Runs a command, after the one that trains the model that it opens."""
    opened = value_of(words, *RUN_OPTIONS) or (words[1] if words[0] in ("export", "report") else None)
    if opened is not None and not Path(opened).exists():
        every = itertools.chain.from_iterable(map(commands, PAGE.values()))
        run(next(words for words in every if value_of(words, "--workdir") == opened))
    succeed("", *shorter(words))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # as in a user's process
@pytest.mark.parametrize("words", LINES)
def test_a_command_runs_in_debug_form(folder, monkeypatch, words):
    monkeypatch.chdir(folder)
    run(words)
