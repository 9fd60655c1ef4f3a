"""What a training step is given and gives back: wrong batches and objectives are refused in one sentence."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flowgen.training import OptimConfig, make_step
from flowgen.training.parallel import DataParallel
from flowgen.training.step import init_state

X = np.zeros((8, 3), np.float32)

BATCHES = {
    "a number": ({"x": X, "weight": 3.0}, ["batch['weight'] is 3.0"]),
    "a scalar": ({"x": X, "weight": np.float32(3)}, ["batch['weight'] is float32 of shape ()"]),
    "a list": ({"x": X, "y": [1, 2]}, ["batch['y'][0] is 1"]),
    "strings": ({"x": X, "name": np.array(["a"] * 8)}, ["batch['name'] is <U1 of shape (8,)"]),
    "a string": ({"x": X, "name": "abc"}, ["batch['name'] is 'abc'"]),
    "objects": ({"x": X, "name": np.array([None] * 8)}, ["batch['name'] is object of shape (8,)"]),
    "keys": ({"x": X, "key": jax.random.split(jax.random.key(0), 8)}, ["batch['key'] is key<fry>"]),
    "other rows": ({"x": X, "part": {"y": X[:4]}}, ["batch['part']['y']", "4", "8"]),
    "no multiple": ({"x": X[:6]}, ["batch['x'] has 6 rows", "multiple of 4"]),
    "no rows": (X[:0], ["batch has 0 rows", "multiple of 4"]),
    "no arrays": ({}, ["the batch contains no arrays"]),
    "an object": ({"x": X, "y": object()}, ["batch['y'] is an object"]),
}


@pytest.mark.parametrize(("batch", "parts"), BATCHES.values(), ids=BATCHES)
def test_a_batch_that_cannot_be_shared_is_refused(batch, parts):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        DataParallel(jax.devices()[:4]).shard(batch)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_rows_are_counted_if_their_number_is_known():
    parallel = DataParallel(jax.devices()[:4])
    shared = parallel.shard({"x": X, "y": jnp.arange(8), "kept": X[:, 0] > 0}, 8)
    assert {name: x.shape for name, x in shared.items()} == {"x": (4, 2, 3), "y": (4, 2), "kept": (4, 2)}
    with pytest.raises(ValueError, match=r"batch\['x'\] has 8 rows; it must have 16"):
        parallel.shard({"x": X}, 16)


def step_of(outcome, accumulation=1, rows=8):
    """One step of an objective that returns what is given, on one device."""
    parallel = DataParallel(jax.devices()[:1])
    optim = OptimConfig(lr=1.0)
    update = parallel.compile(make_step(lambda *_: outcome, optim, steps=2, accumulation=accumulation))
    state = init_state({"params": {"w": jnp.ones(1)}}, optim, 2)
    key = parallel.replicate_key(jax.random.key(0))
    return update(parallel.replicate(state), parallel.shard({"x": X[:rows]}), key)


LOSS = np.float32(1)
OUTCOMES = {
    "a loss alone": (LOSS, ["returned float32 of shape ()", "(loss, metrics)"]),
    "a tuple of one": ((LOSS,), ["returned a tuple of 1", "(loss, metrics)"]),
    "a tuple of four": ((LOSS, {}, {}, {}), ["returned a tuple of 4"]),
    "nothing": (None, ["returned None"]),
    "a loss of each row": ((np.ones(8, np.float32), {}), ["loss is float32 of shape (8,)"]),
    "a whole loss": ((np.int32(1), {}), ["loss is int32 of shape ()"]),
    "no metrics": ((LOSS, None), ["metrics must be a dict, not None"]),
    "metrics in a list": ((LOSS, [1.0]), ["metrics must be a dict, not a list"]),
    "a vector": ((LOSS, {"error": np.ones(3, np.float32)}), ["metric 'error' is float32 of shape (3,)"]),
    "a name": ((LOSS, {"error": "large"}), ["metric 'error' is 'large'"]),
    "a dict": ((LOSS, {"error": {"a": LOSS}}), ["metric 'error' is a dict"]),
    "collections of nothing": ((LOSS, {}, None), ["collections must be a dict, not None"]),
}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(("outcome", "parts"), OUTCOMES.values(), ids=OUTCOMES)
def test_an_objective_that_returns_something_else_is_refused(outcome, parts, accumulation):
    with pytest.raises(ValueError, match=re.escape(parts[0])) as caught:
        step_of(outcome, accumulation)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_micro_batches_must_share_rows_equally():
    with pytest.raises(ValueError, match=r"has 6 rows .* train.accumulation, which is 4"):
        step_of((LOSS, {}), accumulation=4, rows=6)


def test_numbers_of_python_are_metrics():
    metrics = step_of((LOSS, {"whole": 3, "yes": True, "half": 0.5}))[1]
    assert [float(metrics[name][0]) for name in ("whole", "yes", "half")] == [3, 1, 0.5]
