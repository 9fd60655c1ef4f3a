"""What is told of packages: flowgen is installed from a checkout, and what is missing is named itself."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

from flowgen.packages import missing
from flowgen.training import LogConfig
from flowgen.training.options import check_packages

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = sorted((ROOT / "flowgen").rglob("*.py"))
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "flowgen").rglob("*.md")]
TEXTS = [*PAGES, *(ROOT / "configs").glob("*.py"), *SOURCES]


def test_the_distribution_is_our_own():
    assert PROJECT["name"] == "flowgen-jax"


def test_nothing_tells_to_install_what_is_not_ours_on_the_index():
    """There, flowgen is another project, and flowgen-jax has no release yet: anyone could register it."""
    stranger = re.compile(r"pip install[^`\n#]*?[ \"']flowgen[^`\n]*")
    assert not [(path, found) for path in TEXTS for found in stranger.findall(path.read_text())]


def test_one_function_words_what_is_missing():
    makes = re.compile(r"\b(ModuleNotFound|Import)Error\(")
    assert [path.name for path in SOURCES if makes.search(path.read_text())] == ["packages.py"]


def test_reports_name_all_that_they_miss(monkeypatch):
    for module in ("tensorboardX", "tqdm"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboardX tqdm"):
        check_packages(LogConfig())
    check_packages(LogConfig(tensorboard=False, progress=False))


def test_the_sentence_names_the_package_and_the_command():
    error = missing("Reading video", "av", options="--no-deps", otherwise="use images")
    assert str(error) == (
        "Reading video needs the package av; install it with `pip install --no-deps av`, or use images."
    )
