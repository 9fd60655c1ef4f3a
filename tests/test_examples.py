"""The examples run, learn, and report every attention they trained."""

import importlib
import itertools
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from laws import drawn
from PIL import Image
from tolerances import NETWORK, assert_close

from flowgen import checkpoint, experiments
from flowgen.nn import init

EXAMPLES = Path(__file__).parent.parent / "examples"
TINY = ["--epochs=2", "--width=16", "--heads=2", "--depth=1", "--canvas=9", "--batch=64", "--learning-rate=0.01"]


@pytest.fixture
def vision_transformer(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("vision_transformer")


@pytest.mark.slow
def test_vision_transformer(vision_transformer, capsys):
    results = vision_transformer.main(["--attention", "softmax", "nala", *TINY])
    assert [result.attention for result in results] == ["softmax", "nala"]
    for result in results:
        first, last = result.losses
        assert last < first
    report = vision_transformer.table(results)
    assert report in capsys.readouterr().out
    assert [line.split()[0] for line in report.splitlines()] == ["attention", "softmax", "nala"]


def test_every_attention_fits(vision_transformer, key):
    settings = vision_transformer.Settings(width=16, heads=2, depth=1)
    images = jax.ShapeDtypeStruct((2, settings.canvas, settings.canvas, 1), jnp.float32)
    for name in vision_transformer.ATTENTIONS:
        logits, _ = jax.eval_shape(vision_transformer.VisionTransformer(name, settings).init_with_output, key, images)
        assert logits.shape == (2, vision_transformer.CLASSES)


@pytest.mark.slow
def test_decoding_movie(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES)
    experiment = experiments.load_config("tarflow_digits").debug()
    checkpoint.write_run(tmp_path / "run", experiment, drawn(init, experiment.build(), jax.random.key(0)))
    movie, out = importlib.import_module("decoding_movie"), tmp_path / "movie.gif"
    movie.main(["--checkpoint", str(tmp_path / "run"), "--out", str(out), "--rows", "1", "--scale", "1"])
    with Image.open(out) as animation:
        config = experiment.model
        assert animation.size == (10 * config.image_hw[1], config.image_hw[0])
        assert animation.n_frames <= 2 + config.num_blocks * -(-config.num_tokens // 7)
        assert animation.n_frames > config.num_blocks


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name."""
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


@pytest.mark.slow
def test_many_well(example, capsys):
    found = example("many_well").main(["--dim=4", "--steps=60", "--batch=32", "--width=8", "--samples=200"])
    assert found.loss < 0  # nats; -log Z is -20.6, and the loss of an untrained flow is 38
    assert 0 < found.ess <= 1
    assert "log Z" in capsys.readouterr().out


def test_the_density_of_a_set_of_points_is_that_of_all_places_on_the_ring(example):
    sets = example("point_sets")
    points, mask = sets.draw(jax.random.key(0), 8)
    # Given the places r of its points, a set is jointly Gaussian: its points share the centre.
    exact = []
    for row, exists in zip(np.asarray(points, np.float64), np.asarray(mask), strict=True):
        count = min(3, exists.sum())
        covariance = np.kron(np.ones((count, count)) + sets.STD**2 * np.eye(count), np.eye(2))
        places = (sets.RING[list(chosen)].ravel() for chosen in itertools.product(range(4), repeat=count))
        logs = [scipy.stats.multivariate_normal.logpdf(row[:count].ravel(), place, covariance) for place in places]
        exact.append(scipy.special.logsumexp(logs) - count * np.log(4))
    first = mask & (jnp.arange(sets.MOST) < 3)[None]
    assert_close(sets.exact_log_prob(points, first), exact, NETWORK)


@pytest.mark.slow
def test_point_sets(example, capsys):
    found = example("point_sets").main(["--steps=4", "--batch=8", "--width=8", "--held-out=20"])
    assert found.difference.value > 0
    assert "nats per set" in capsys.readouterr().out


def test_the_expert_passes_the_obstacle_on_both_sides(example):
    policy = example("policy")
    observed, _, reached = jax.jit(policy.episodes, static_argnums=(0, 2, 3))(policy.expert, jax.random.key(0), 64, 6)
    assert reached.mean() > 0.95
    assert 0.2 < (observed[3, :, 1] > 0).mean() < 0.8


@pytest.mark.slow
def test_policy(example, capsys):
    small = ["--demonstrations=64", "--steps=4", "--batch=16", "--width=8", "--environments=4", "--chunks=4"]
    found = example("policy").main(small)
    assert found.steps_per_second > 0
    assert "steps per second" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "words", "told"),
    [
        ("many_well", ["--dim=3"], "--dim is 3; give an even number"),
        ("many_well", ["--steps=0"], "--steps is 0; give at least 1"),
        ("policy", ["--chunks=3"], "--chunks is 3, .* give at least 4"),
    ],
)
def test_options_of_examples_that_do_not_fit_are_refused(example, name, words, told, capsys):
    with pytest.raises(SystemExit):
        example(name).main(words)
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_all_options_of_examples_have_help(example, name, capsys):
    with pytest.raises(SystemExit):
        example(name).main(["--help"])
    options = capsys.readouterr().out.partition("options:")[2]
    # An option without help is a line with nothing after its name and value, before a line that does not continue it.
    lines = [line for line in options.splitlines() if line.strip()]
    bare = [
        line
        for line, after in zip(lines, [*lines[1:], ""], strict=True)
        if line.startswith("  --") and "  " not in line.strip() and not after.startswith("      ")
    ]
    assert not bare
