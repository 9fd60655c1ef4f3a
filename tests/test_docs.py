"""README and docs do what they say: every block of Python runs when pasted alone, every command line is understood."""

import re
import sys
from pathlib import Path

import jax
import pytest
import video_weights
from laws import drawn
from pages import blocks, commands, commands_of_docstring, titled_blocks
from published_files import publish

from flowgen import checkpoint, cli, experiments
from flowgen.attention import CAUSAL_KERNEL_NAMES
from flowgen.cli.grammar import apply_words, load_experiment, split_names
from flowgen.nn import init

PROJECT = Path(__file__).parent.parent

PAGES = [PROJECT / "README.md", *sorted((PROJECT / "docs").rglob("*.md")), *sorted((PROJECT / "configs").glob("*.py"))]
# What blocks find in the folder that they run in: runs of these configs in their debug form, and a small autoencoder
# where the published one would take minutes and gigabytes.
RUNS = {"runs/digits": "tarflow_digits", "runs/wcfm": "wcfm_digits"}
AUTOENCODER = "Wan2.2-TI2V-5B-Diffusers"
SMALLER = {"(1, 81, 480, 848, 3)": "(1, 5, 32, 32, 3)"}


PYTHON = [(page, number, text) for page in PAGES for number, text in enumerate(blocks(page.read_text(), "python"))]


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """The blocks with a title, as modules that other blocks and commands import."""
    for page in PAGES:
        for title, text in titled_blocks(page.read_text()).items():
            (tmp_path / title).write_text(text)
            monkeypatch.delitem(sys.modules, Path(title).stem, raising=False)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with all that blocks of Python open."""
    root = tmp_path_factory.mktemp("docs")
    for run, name in RUNS.items():
        experiment = experiments.load_config(PROJECT / "configs" / f"{name}.py").debug()
        variables = drawn(init, experiment.build(), jax.random.key(0))
        checkpoint.write_run(root / run, experiment, variables)
    weights = video_weights.state_dict("wan_2_2")
    publish(root / AUTOENCODER, video_weights.CONFIGS["wan_2_2"], weights, "diffusion_pytorch_model.safetensors")
    return root


# The others compile a network each.
SHOWN = (("README.md", 0), ("classes.md", 0), ("importance.md", 0), ("points.md", 0))


@pytest.mark.parametrize(
    ("page", "number", "text"),
    [
        pytest.param(
            *row, id=f"{row[0].name}-{row[1]}", marks=[pytest.mark.slow] * ((row[0].name, row[1]) not in SHOWN)
        )
        for row in PYTHON
    ],
)
@pytest.mark.usefixtures("untyped", "modules")
def test_a_block_of_python_runs_when_pasted_alone(folder, monkeypatch, page, number, text):
    monkeypatch.chdir(folder)
    for large, small in SMALLER.items():
        text = text.replace(large, small)
    # As in a user's process, where ranks are promoted; blocks draw from a key twice to show that samples are the same.
    with jax.numpy_rank_promotion("allow"), jax.debug_key_reuse(False):
        exec(compile(text, f"{page.name}, block {number}", "exec"), {"__name__": "pasted"})


COMMANDS = [
    (page, words)
    for page in PAGES
    for words in (commands_of_docstring(page) if page.suffix == ".py" else commands(page.read_text()))
]
# Of each kind of experiment one, by whose options the words of `sample` and `evaluate` are understood.
KINDS = (
    "tarflow_digits",
    "starflow_t2i_256",
    "starflow_v_480p",
    "two_moons",
    "cfm_moons",
    "cfm_digits",
    "autoencoder_digits",
)


def takes(name, command, words):
    """Whether the command takes these words for a run of a config."""
    experiment = experiments.load_config(name)
    options = experiment.draw_options if command == "sample" else experiment.evaluate_options
    try:
        apply_words(words, experiment, options and options(), groups=("data", "sampling", "codec", "text"))
    except ValueError:
        return False
    return True


def test_pages_have_blocks_and_commands():
    assert len(PYTHON) >= 15
    assert {words[0] for _, words in COMMANDS} >= {"train", "sample", "info", "evaluate", "encode", "convert"}


@pytest.mark.parametrize(
    ("page", "words"), COMMANDS, ids=[f"{page.name}-{index}" for index, (page, _) in enumerate(COMMANDS)]
)
@pytest.mark.usefixtures("modules")
def test_a_command_line_is_understood(monkeypatch, page, words):
    monkeypatch.chdir(PROJECT)
    options, rest = cli.make_parser().parse_known_args(words)
    if options.command in ("train", "encode", "info") and options.config is not None:
        load_experiment(options, split_names(rest)[1])
    elif rest:  # Another kind takes other options: one of all kinds must take these.
        assert any(takes(kind, options.command, rest) for kind in KINDS), rest


def test_the_attention_page_names_the_kernels_that_flows_take():
    text = (PROJECT / "docs" / "attention.md").read_text()
    sentence = re.search(r"Flows accept\s+(`[^.]+)\. A DiT", text)
    assert set(re.findall(r"`(\w+)`", sentence[1])) == set(CAUSAL_KERNEL_NAMES) - {"softmax"}
