"""Every shipped config builds abstractly, round-trips, has its published size, and its debug shrink trains."""

import json
from pathlib import Path

import jax
import pytest

import flowgen
from flowgen.config import from_json, load, shrink, to_json

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))

# Parameters counted by instantiating the published code with the published command lines.
PUBLISHED_SIZES = {
    "tarflow_imagenet64_likelihood": 460_142_784,
    "tarflow_imagenet64": 460_142_784,
    "tarflow_imagenet64_classes": 466_286_784,
    "tarflow_imagenet128_classes": 823_927_552,
    "tarflow_afhq256": 463_481_856,
    "tarflow_mnist": 3_227_776,
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config(path):
    experiment = load(path)
    assert experiment.name == path.stem
    assert from_json(json.loads(json.dumps(to_json(experiment)))) == experiment
    assert f"configs/{path.name}" in path.read_text()
    variables = jax.eval_shape(lambda: flowgen.init(experiment.flow(), jax.random.key(0)))
    size = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert size == PUBLISHED_SIZES.get(path.stem, size)
    small = shrink(experiment)
    assert small.model.transform == experiment.model.transform
    assert bool(small.model.num_classes) == bool(experiment.model.num_classes)
    variables = jax.eval_shape(lambda: flowgen.init(small.flow(), jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables)) < 100_000
    assert len(small.source("train")) > 0


def test_every_published_size_has_its_config():
    assert set(PUBLISHED_SIZES) <= {path.stem for path in CONFIGS}
