"""The examples run, learn, and report every attention they trained."""

import importlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from laws import drawn
from PIL import Image

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
