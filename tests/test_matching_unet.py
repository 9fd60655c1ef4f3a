"""The U-Net beside torchcfm's: recorded outputs, parameter counts, and what any velocity network must be.

The recorded side is written by fixtures/record_unet.py, whose `parameter` makes the weights of both sides.
"""

import dataclasses
import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows
from tolerances import NETWORK, assert_close

from flowgen.matching.unet import UNet, UNetConfig
from flowgen.nn import init
from flowgen.settings import from_plain, to_plain

FIXTURES = Path(__file__).parent / "fixtures"
sys.path.insert(0, str(FIXTURES))
import record_unet  # noqa: E402

BFLOAT16 = 0.05  # relative, after a dozen layers of 8 bits each
META = UNetConfig(
    image_size=32,
    multipliers=(2, 2, 2),
    blocks_per_level=4,
    resample="pool",
    head_dim=256,
    dropout=0.3,
    scale_shift_norm=True,
)
TINY = UNetConfig(
    image_size=(4, 6),
    channels=2,
    width=8,
    multipliers=(1, 2),
    blocks_per_level=1,
    head_dim=8,
    num_groups=4,
    dropout=0.5,
    num_classes=3,
    intervals=True,
)
LABELS = jnp.array([0, 2, -1], jnp.int32)


@functools.partial(jax.jit, static_argnums=0, static_argnames="train")
def apply(network, variables, t, x, cond=None, interval=None, *, train=False, key=None):
    """Runs a network compiled, once per config and shape over all tests."""
    rngs = {} if key is None else {"dropout": key}
    return network.apply(variables, t, x, cond, interval, train=train, rngs=rngs)


def parameters(network, shape_of=record_unet.parameter):
    """Returns variables whose every leaf is a function of its path: none is at its initial value."""
    shapes = jax.eval_shape(functools.partial(init, network), jax.random.key(0))

    def leaf(path, shape):
        return jnp.asarray(shape_of("/".join(part.key for part in path[1:]), shape.shape))

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def published(case):
    """Returns (network, variables, recorded arrays by name) of a case."""
    recorded = np.load(FIXTURES / "unet_reference.npz", allow_pickle=False)
    arrays = {name.split("/")[1]: recorded[name] for name in recorded if name.startswith(f"{case}/")}
    network = UNet(UNetConfig(**record_unet.CASES[case]))
    return network, parameters(network), arrays


@functools.cache
def tiny():
    """Returns (network, variables, (t, x, labels, interval))."""
    network = UNet(TINY)
    x = jax.random.normal(jax.random.key(1), (3, *TINY.event_shape))
    return network, parameters(network), (jnp.array([0.0, 0.4, 0.9]), x, LABELS, jnp.array([0.0, 0.1, 0.5]))


@pytest.mark.parametrize("case", rows(record_unet.CASES, ("plain",)))
def test_the_velocity_is_the_published_one(case):
    network, variables, arrays = published(case)
    cond = arrays.get("labels")
    v = apply(network, variables, arrays["t"], arrays["x"], None if cond is None else jnp.asarray(cond))
    assert v.dtype == jnp.float32
    assert_close(v, arrays["v"], NETWORK)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (UNetConfig(image_size=32), 35_746_307),
        (META, 55_676_419),
        (UNetConfig(image_size=32, num_classes=10), 35_746_307 + 11 * 512),
    ],
    ids=["torchcfm", "meta", "classes"],
)
def test_parameter_counts_are_the_published_ones(config, count):
    shapes = jax.eval_shape(functools.partial(init, UNet(config)), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


@pytest.mark.slow  # beside its parity
def test_a_fresh_network_is_zero_and_its_layers_start_as_published(key):
    config = dataclasses.replace(TINY, multipliers=(1,), attention_factors=(), num_classes=0, intervals=False)
    network, variables = UNet(config), init(UNet(config), key)
    leaves = {"/".join(part.key for part in path[1:]): leaf for path, leaf in jax.tree.leaves_with_path(variables)}
    zeros = {name.rpartition("/")[0] for name, leaf in leaves.items() if not leaf.any() and "norm" not in name}
    blocks = ("down_0_0", "middle_0", "middle_1", "up_0_0", "up_0_1")
    assert zeros == {"conv_out", "middle_0/attention/proj", *(f"{block}/conv_out" for block in blocks)}
    for module in {name.rpartition("/")[0] for name in leaves if "norm" not in name} - zeros:
        kernel, bias = leaves[f"{module}/kernel"], leaves[f"{module}/bias"]
        bound = (kernel.size / kernel.shape[-1]) ** -0.5
        for leaf in (kernel, bias):
            assert 0.7 * bound < jnp.abs(leaf).max() <= bound
    x = jax.random.normal(jax.random.key(1), (1, *config.event_shape))
    assert not apply(network, variables, jnp.array([0.5]), x).any()


def test_samples_do_not_see_each_other():
    network, variables, (t, x, labels, interval) = tiny()
    v = apply(network, variables, t, x, labels, interval)
    changed = apply(
        network, variables, t.at[1].set(0.7), x.at[1].add(1.0), labels.at[1].set(1), interval.at[1].set(0.3)
    )
    np.testing.assert_array_equal(v[jnp.array([0, 2])], changed[jnp.array([0, 2])])
    assert jnp.abs(v[1] - changed[1]).max() > 0.1


@pytest.mark.parametrize("name", ["t", "labels", "interval"])
def test_every_condition_matters(name):
    network, variables, (t, x, labels, interval) = tiny()
    inputs = {"t": t, "labels": labels, "interval": interval}
    changed = inputs | {name: jnp.array([1, -1, 0]) if name == "labels" else inputs[name] + 0.05}
    v, moved = (apply(network, variables, i["t"], x, i["labels"], i["interval"]) for i in (inputs, changed))
    assert (jnp.abs(v - moved).max(axis=(1, 2, 3)) > 1e-3).all()


@pytest.mark.slow
def test_every_parameter_receives_gradient_and_recomputing_changes_no_value():
    _, _, inputs = tiny()
    network = UNet(dataclasses.replace(TINY, scale_shift_norm=True, resample="pool", remat=True))
    variables = parameters(network)
    value, gradient = jax.jit(jax.value_and_grad(lambda v: jnp.square(network.apply(v, *inputs)).mean()))(variables)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        rows = leaf[LABELS] if path[-1].key == "class_embed" else leaf[None]
        assert (jnp.abs(rows).reshape(len(rows), -1).max(axis=1) > 1e-6).all(), jax.tree_util.keystr(path)
    stored = UNet(dataclasses.replace(network.config, remat=False))
    assert_close(value, jnp.square(apply(stored, variables, *inputs)).mean(), NETWORK)


def test_dropout_acts_in_training_alone(key):
    network, variables, inputs = tiny()
    first, second = (apply(network, variables, *inputs, train=True, key=k) for k in jax.random.split(key))
    still = apply(network, variables, *inputs)
    assert jnp.abs(first - second).max() > 0.01
    assert jnp.abs(first - still).max() > 0.01


@pytest.mark.slow  # beside the other networks
def test_bfloat16_is_close_to_float32():
    network, variables, inputs = tiny()
    half = UNet(dataclasses.replace(TINY, dtype="bfloat16"))
    v, rounded = apply(network, variables, *inputs), apply(half, variables, *inputs)
    assert rounded.dtype == jnp.float32
    assert jax.tree.map(jnp.shape, parameters(half)) == jax.tree.map(jnp.shape, variables)
    error = jnp.linalg.norm(v - rounded) / jnp.linalg.norm(v)
    assert 0 < error < BFLOAT16


def test_labels_of_no_class_give_nan_and_minus_one_is_none(untyped):
    network, variables, (t, x, _, interval) = tiny()
    v = apply(network, variables, t, x, jnp.array([-2, 3, -1]), interval)
    assert jnp.isnan(v[:2]).all()
    assert_close(v[2], apply(network, variables, t, x, None, interval)[2], NETWORK)


def test_times_are_stretched_before_the_sinusoids():
    _, variables, (_, x, _, _) = tiny()
    raw, stretched = (UNet(dataclasses.replace(TINY, time_scale=scale)) for scale in (1.0, 1000.0))
    t = jnp.array([0.125, 0.5, 1.0])
    assert_close(apply(raw, variables, 1000 * t, x, LABELS), apply(stretched, variables, t, x, LABELS), NETWORK)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("image_size", "32", "image_size is '32'; it must be an integer or a tuple"),
        ("image_size", (32,), r"image_size is \(32,\); it must be an integer or a tuple"),
        ("image_size", (32, 12), "image_size has width 12, which cannot be halved 3 times; use a multiple of 8"),
        ("channels", 0, "channels is 0; it must be at least 1."),
        ("width", 0, "width is 0; it must be at least 1."),
        ("width", 48, "num_groups is 32, which does not divide the 48 channels of level 0; change width"),
        ("multipliers", (), r"multipliers has 0 entries; it must have 1 to 8."),
        ("multipliers", (1, 0.5), r"multipliers is \(1, 0.5\); it must be a tuple of integers"),
        (
            "attention_factors",
            (16,),
            "attention_factors contains 16; choose from the factors of this network's levels: 1, 2, 4, 8.",
        ),
        ("head_dim", 96, "head_dim is 96, which does not divide the 256 channels of level 1; change"),
        ("dropout", 1.0, "dropout is 1.0; it must be below 1."),
        ("num_classes", -1, "num_classes is -1"),
        ("time_scale", 0.0, "time_scale is 0.0; it must be positive."),
        ("resample", "mean", "resample is 'mean'; it must be 'conv' or 'pool'"),
        ("dtype", "float16", "dtype is 'float16'; it must be 'float32' or 'bfloat16'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(field, value, message, untyped):
    with pytest.raises(ValueError, match=message):
        UNetConfig(**{"image_size": 32, field: value})


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match=r"width is 9; it must be even"):
        UNetConfig(image_size=8, width=9, num_groups=3)


def test_configs_survive_json_and_lists(untyped):
    config = UNetConfig(image_size=[32, 48], multipliers=[1, 2], attention_factors=[])
    assert config.event_shape == config.image_shape == (32, 48, 3)
    assert config.num_dims == 32 * 48 * 3
    assert from_plain(UNetConfig, json.loads(json.dumps(to_plain(config)))) == config


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(image_size=(32, 48), num_classes=1000, intervals=True),
        META,
        UNetConfig(image_size=1, multipliers=(3,), attention_factors=(1,)),
    ],
    ids=["default", "meta", "one level"],
)
def test_a_shrunk_config_is_tiny_and_of_the_same_kind(config):
    tiny = config.shrunk()
    assert max(tiny.image_shape) <= 8
    assert len(tiny.level_widths) == min(2, len(config.level_widths))
    assert bool(tiny.num_classes) == bool(config.num_classes)
    same = ("channels", "resample", "attention_factors", "scale_shift_norm", "intervals", "dropout", "time_scale")
    assert all(getattr(tiny, name) == getattr(config, name) for name in same)


def test_inputs_that_do_not_fit_are_refused(untyped):
    network, variables, (t, x, labels, _) = tiny()
    with pytest.raises(ValueError, match=r"x has shape \(3, 6, 4, 2\); this network requires \(batch, 4, 6, 2\)."):
        network.apply(variables, t, x.swapaxes(1, 2))
    with pytest.raises(ValueError, match=r"t is float32 of shape \(1,\)"):
        network.apply(variables, t[:1], x)
    with pytest.raises(ValueError, match="label 3 is out of range"):
        network.apply(variables, t, x, labels + 1)
    with pytest.raises(ValueError, match="num_classes is 0"):
        UNet(dataclasses.replace(TINY, num_classes=0)).apply(variables, t, x, labels)
