"""Optimizers: the authors' steps, each layer of a stack by itself, decay masks, schedules, and their config."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tolerances import FORMULA, NETWORK, assert_close, assert_trees_close

from flowgen.optimizers import (
    OPTIMIZERS,
    adamp,
    are_kernels,
    are_matrices,
    auon,
    conda,
    keep_norms,
    make_named,
    muon,
    options_of,
    per_layer,
)
from flowgen.settings import FieldError, from_plain, override, to_plain
from flowgen.training import OptimConfig, make_optimizer, make_schedule

RECORDED = np.load(Path(__file__).parent / "fixtures" / "optimizers.npz")
PUBLISHED = {
    "adamp": adamp(0.01, weight_decay=0.1),
    "adamp_nesterov": adamp(0.01, weight_decay=0.1, nesterov=True, delta=0.5),
    "auon": auon(0.05, weight_decay=0.1),
    "conda_wide": conda(0.01, scale=0.25, update_every=3),
    "conda_tall": conda(0.01, scale=0.25, update_every=3),
    "conda_square": conda(0.01, scale=0.25, update_every=3),
}
LAYERS, STEPS = 3, 5


@pytest.mark.parametrize("name", PUBLISHED)
def test_steps_are_the_authors(x64, name):
    """Their matrices are (outputs, inputs). Conda's code finds singular vectors in float32."""
    tx, step = PUBLISHED[name], jax.jit(PUBLISHED[name].update)
    params = {"kernel": jnp.asarray(RECORDED[f"{name}_start"].T)}
    state = tx.init(params)
    for grads, expected in zip(RECORDED[f"{name}_grads"], RECORDED[f"{name}_steps"], strict=True):
        updates, state = step({"kernel": jnp.asarray(grads.T)}, state, params)
        params = optax.apply_updates(params, updates)
        assert_close(params["kernel"].T, expected, FORMULA if name.startswith("conda") else 1e-14)


def stacked_params():
    draw = np.random.default_rng(0).normal
    params = {
        "embed": draw(size=(5, 4)),
        "head": {"kernel": draw(size=(4, 2)), "bias": draw(size=2)},
        "layers": {
            "up": {"kernel": draw(size=(LAYERS, 4, 6)), "bias": draw(size=(LAYERS, 6))},
            "down": {"kernel": draw(size=(LAYERS, 6, 4))},
            "conv": {"kernel": draw(size=(LAYERS, 2, 2, 3, 4))},
        },
    }
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def unrolled(params):
    layers = {f"layer_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"]) for i in range(LAYERS)}
    return {**{name: tree for name, tree in params.items() if name != "layers"}, **layers}


def after_steps(tx, params):
    """The parameters after some steps on a loss that treats every array by itself."""

    def loss(params):
        return sum(jnp.sum(jnp.cos(leaf) * leaf**2 - leaf) for leaf in jax.tree.leaves(params))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    return params


# The others of optax are elementwise, or norms of an array like these.
QUICK = ("adamw", "adamp", "auon", "conda", "muon", "lamb", "adafactor", "novograd")


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        *((name, False) if name in QUICK else pytest.param(name, False, marks=pytest.mark.slow) for name in OPTIMIZERS),
        ("adamw", True),
        ("conda", True),
    ],
)
def test_stacked_layers_are_updated_as_if_they_were_not_stacked(name, keep):
    tx = make_named(OPTIMIZERS[name], lambda count: 0.01, options={}, weight_decay=0.1, mask=are_kernels)
    tx = keep_norms(tx) if keep else tx
    params = stacked_params()
    stacked, separate = after_steps(per_layer(tx), params), after_steps(tx, unrolled(params))
    assert_trees_close(unrolled(stacked), separate, NETWORK)
    moved = jax.tree.map(lambda new, old: float(jnp.abs(new - old).max()), stacked, params)
    assert min(jax.tree.leaves(moved)) > 0


def test_equal_layers_without_a_stack_are_matrices():
    """A list of layers has arrays of its own for each layer, even if the module that holds it is called layers."""
    dense = {"kernel": jnp.eye(8), "bias": jnp.ones(8)}
    params = {"layers": {"layers_0": dense, "layers_1": dense}}
    updates = lambda tx: tx.update(params, tx.init(params), params)[0]  # noqa: E731
    assert_trees_close(updates(per_layer(muon(0.1))), updates(muon(0.1)), FORMULA)


@pytest.mark.parametrize(
    ("shape", "matrix"), [((4, 6), True), ((3, 3, 2, 4), True), ((16, 4, 4), False), ((3, 3, 1, 4), False)]
)
def test_only_dense_and_convolution_kernels_are_matrices(shape, matrix):
    assert are_matrices({"kernel": jnp.zeros(shape), "scale": jnp.zeros(shape)}) == {"kernel": matrix, "scale": False}


def test_kept_norms_are_those_of_the_start():
    params = stacked_params()
    params["head"]["kernel"] = jnp.zeros((4, 2))
    after = after_steps(per_layer(keep_norms(optax.adam(0.1))), params)
    norms = lambda x: jnp.sqrt((x**2).sum(axis=tuple(range(1, x.ndim))))  # noqa: E731
    for name in ("up", "down", "conv"):
        assert_close(norms(after["layers"][name]["kernel"]), norms(params["layers"][name]["kernel"]), FORMULA)
    # Nothing holds back what starts at 0, or what is not a matrix.
    assert float(jnp.abs(after["head"]["kernel"] - 0.0).max()) > 0.3
    assert float(jnp.abs(norms(after["layers"]["up"]["bias"]) - norms(params["layers"]["up"]["bias"])).min()) > 0.01


def test_muon_steps_are_nearly_orthogonal():
    params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 8, 16)), jnp.float32)}
    tx = muon(1.0, consistent_rms=0.2)
    updates, _ = tx.update(params, tx.init(params), params)
    values = np.linalg.svd(updates["kernel"].reshape(32, 16), compute_uv=False) / (0.2 * 32**0.5)
    assert values.min() > 0.6
    assert values.max() < 1.3


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("lion", "adafactor", "auon")]  # as their neighbours


@pytest.mark.parametrize("name", ["adamw", "adamp", "conda", "muon", "sgd", *OTHERS])
def test_only_matrices_decay_if_the_config_says_so(name):
    config = {"name": name, "lr": 0.1, "min_lr": 0.1, "schedule": "constant", "clip_norm": 0.0}
    masked = OptimConfig(**config, weight_decay=0.5, decayed="matrices", not_decayed=("layers/down/*",))
    none = OptimConfig(**config, weight_decay=0.0)
    params = stacked_params()
    zero = jax.tree.map(jnp.zeros_like, params)

    def updates(config):
        tx = make_optimizer(config, steps=10)
        return jax.jit(lambda: tx.update(zero, tx.init(params), params)[0])()

    decayed = jax.tree.map(lambda a, b: a - b, updates(masked), updates(none))
    factor = 0.1 if name == "adamp" else 1.0  # A gradient of 0 is orthogonal to every weight.
    for kernel in (("head", "kernel"), ("layers", "up", "kernel"), ("layers", "conv", "kernel")):
        change, leaf = decayed, params
        for part in kernel:
            change, leaf = change[part], leaf[part]
        assert_close(change, -0.05 * factor * leaf, FORMULA)
    still = [decayed["embed"], decayed["head"]["bias"], decayed["layers"]["up"]["bias"]]
    assert all(not jnp.any(x) for x in [*still, decayed["layers"]["down"]["kernel"]])


def test_other_parameters_have_their_own_learning_rate():
    params = {"kernel": jnp.ones((3, 3)), "bias": jnp.ones(3)}
    config = OptimConfig(name="muon", lr=0.1, min_lr=0.0, adam_lr=0.01, weight_decay=0.0, clip_norm=0.0)
    tx = make_optimizer(config, steps=10)
    updates, _ = tx.update(params, tx.init(params), params)
    assert_close(updates["bias"], np.full(3, -0.01), FORMULA)


def test_the_learning_rate_stays_and_then_falls():
    config = OptimConfig(lr=1.0, min_lr=0.1, schedule="wsd", warmup_steps=4, decay_steps=5)
    schedule = make_schedule(config, 20)
    rates = [float(schedule(step)) for step in range(21)]
    warmup, fall = [0.1, 0.325, 0.55, 0.775], [1.0, 0.82, 0.64, 0.46, 0.28, 0.1]
    assert_close(rates, [*warmup, *[1.0] * 11, *fall], FORMULA)
    tenth = make_schedule(dataclasses.replace(config, decay_steps=0, warmup_steps=0), 20)
    assert_close([float(tenth(step)) for step in (17, 18, 19, 20)], [1.0, 1.0, 0.55, 0.1], FORMULA)
    with pytest.raises(ValueError, match=r"optim.decay_steps is 5, but only 4 steps follow the warm-up"):
        make_schedule(config, 8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adamwx"}, "name is 'adamwx'"),
        ({"name": "lion", "options": {"beta": 0.9}}, r"options has beta, .*; choose from b1, b2, mu_dtype"),
        ({"name": "sgd", "options": {"nesterov": "no"}}, "options.nesterov is 'no'; it must be true or false"),
        ({"name": "lion", "options": {"b1": "nan"}}, "options.b1 is 'nan'; it must be a number"),
        ({"name": "muon", "options": {"ns_steps": 2.5}}, "options.ns_steps is 2.5; it must be an integer"),
        ({"name": "muon", "options": {"ns_steps": 0}}, "ns_steps is 0; it must be at least 1"),
        ({"name": "conda", "options": {"update_every": 0}}, "update_every is 0; it must be at least 1"),
        ({"name": "lion", "options": {"mu_dtype": "bogus"}}, "options {'mu_dtype': 'bogus'} does not make"),
        ({"name": lambda rate: 3}, "name does not make an optax optimizer"),
        ({"name": lambda: optax.sgd(1.0)}, "name"),
        ({"name": lambda rate: optax.polyak_sgd(rate)}, "name does not make an optax optimizer"),
        ({"name": lambda rate: optax.noisy_sgd(rate, key=0)}, "keeps random keys"),
        ({"name": "sign_sgd", "options": {"b1": 0.9}}, "options has b1, .* it has none"),
        ({"options": {"b1": 0.9}}, "options.b1 is not one of the options; set the field b1 instead"),
        ({"adam_lr": 0.1}, "adam_lr is 0.1, but only muon, auon, conda"),
        ({"decay_steps": 5}, "decay_steps is 5, but only schedule 'wsd'"),
    ],
)
def test_wrong_optimizers_are_refused(fields, message):
    with pytest.raises(FieldError, match=message):
        OptimConfig(**fields)


def test_options_are_set_by_dotted_names_and_stored():
    words = ["--name", "sgd", "--options.momentum", "0.9", "--options.nesterov", "true"]
    config = override(OptimConfig(), words)
    assert config.options == {"momentum": 0.9, "nesterov": True}
    assert from_plain(OptimConfig, json.loads(json.dumps(to_plain(config)))) == config
    assert set(config.options) < set(options_of(OPTIMIZERS["sgd"]))


def halved(rate, **options):
    return optax.sgd(rate, momentum=options["factor"] / 2)


def test_an_own_optimizer_is_a_function():
    config = OptimConfig(name=halved, options={"factor": 0.5}, lr=0.1, weight_decay=0.0, clip_norm=0.0)
    params = stacked_params()
    tx = make_optimizer(config, steps=10)
    updates, _ = tx.update(params, tx.init(params), params)
    assert_trees_close(updates, jax.tree.map(lambda leaf: -0.1 * leaf, params), FORMULA)
    assert from_plain(OptimConfig, to_plain(config)) == config
