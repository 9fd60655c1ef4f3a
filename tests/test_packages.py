"""What is told of packages: our own name on the index is flowgen-jax, and what is missing is named itself."""

import ast
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
TEXTS = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "configs").glob("*.py"), *SOURCES]


def test_the_distribution_is_our_own():
    assert PROJECT["name"] == "flowgen-jax"


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_nothing_tells_to_install_the_stranger(path):
    strangers = re.findall(r"pip install[^`\n]*?[ \"']flowgen(?![-\w])[^`\n]*", path.read_text())
    assert not strangers


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_one_function_words_what_is_missing(path):
    made = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    if path.name != "packages.py":
        assert not made & {"ModuleNotFoundError", "ImportError"}


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
