"""Laws that every velocity network obeys, over one table of them."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows
from laws import drawn
from tolerances import NETWORK, assert_close

from flowgen import matching as fm
from flowgen.nn import init

SMALL_DIT = {"image_size": 4, "channels": 2, "width": 32, "num_layers": 2, "head_dim": 16, "num_classes": 3}
SMALL_UNET = {"image_size": 4, "channels": 2, "width": 8, "multipliers": (1, 2), "num_groups": 4, "head_dim": 8}
NETWORKS = {
    "mlp": fm.MLPConfig(dim=3, width=16, num_classes=3, intervals=True),
    "dit": fm.DiTConfig(**SMALL_DIT),
    "dit rectangular, intervals": fm.DiTConfig(
        **{**SMALL_DIT, "image_size": (4, 8), "intervals": True, "num_classes": 0}
    ),
    "dit nala": fm.DiTConfig(**SMALL_DIT, attention="nala"),
    "dit soft": fm.DiTConfig(**SMALL_DIT, attention="soft", remat=False),
    "unet": fm.UNetConfig(**SMALL_UNET, num_classes=3, dropout=0.0),
}
BATCH = 3
# bfloat16 has 8 bits of mantissa: about 4e-3 per operation, over a few layers.
BFLOAT16 = 0.05


@cache
def case(name, **changes):
    """Returns (network, perturbed variables, t, x, labels) of a row."""
    config = dataclasses.replace(NETWORKS[name], **changes)
    network = config.build()
    rng = np.random.default_rng(0)
    variables = drawn(init, network, jax.random.key(0), scale=0.1)
    x = jnp.asarray(rng.standard_normal((BATCH, *config.event_shape)), jnp.float32)
    labels = jnp.arange(BATCH) - 1 if config.num_classes else None
    return network, variables, jnp.array([0.0, 0.4, 1.0]), x, labels


@cache
def compiled(name, **changes):
    network = case(name, **changes)[0]
    return jax.jit(network.apply)


each = pytest.mark.parametrize("name", NETWORKS)
# The U-Net takes long to compile; tests/test_matching_unet.py looks at it alone.
slow_unet = pytest.param("unet", marks=pytest.mark.slow)
each_but_unet = pytest.mark.parametrize("name", [*(name for name in NETWORKS if name != "unet"), slow_unet])


@each_but_unet
def test_samples_do_not_see_each_other(name):
    _, variables, t, x, labels = case(name)
    run = compiled(name)
    out = run(variables, t, x, labels)
    assert out.shape == x.shape
    assert out.dtype == jnp.float32
    changed = run(variables, t, x.at[0].add(1.0), labels)
    np.testing.assert_array_equal(out[1:], changed[1:])
    assert jnp.abs(out[0] - changed[0]).max() > 0.01


@each_but_unet
def test_time_class_and_interval_matter_and_missing_ones_have_their_meaning(name):
    network, variables, t, x, labels = case(name)
    run = compiled(name)
    out = run(variables, t, x, labels)
    assert jnp.abs(out[1] - run(variables, t.at[1].set(0.5), x, labels)[1]).max() > 1e-3
    if labels is not None:
        other = run(variables, t, x, labels.at[1].set(2))
        assert jnp.abs(out[1] - other[1]).max() > 1e-3
        np.testing.assert_array_equal(out[::2], other[::2])
        nobody = run(variables, t, x, jnp.full(BATCH, -1))
        assert_close(run(variables, t, x, None), nobody, NETWORK)
        for label in (3, -2):
            assert jnp.isnan(run(variables, t, x, jnp.full(BATCH, label))).all()
    if network.config.intervals:
        assert_close(run(variables, t, x, labels, jnp.zeros(BATCH)), out, NETWORK)
        assert jnp.abs(run(variables, t, x, labels, jnp.full(BATCH, 0.5)) - out).max() > 1e-3


@each_but_unet
def test_every_parameter_gets_a_gradient(name):
    network, variables, t, x, labels = case(name)
    interval = (jnp.full(BATCH, 0.3),) if network.config.intervals else ()

    @jax.jit
    @jax.grad
    def gradient(variables):
        return jnp.square(network.apply(variables, t, x, labels, *interval) - 1).sum()

    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient(variables)):
        assert jnp.abs(leaf).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.parametrize("name", rows(["dit", "unet"], ("unet",)))
def test_bfloat16_stays_near_float32(name):
    _, variables, t, x, labels = case(name)
    full = compiled(name)(variables, t, x, labels)
    half = compiled(name, dtype="bfloat16")(variables, t, x, labels)
    assert half.dtype == jnp.float32
    scale = jnp.abs(full).max()
    assert 0 < jnp.abs(half - full).max() < BFLOAT16 * scale


def test_a_fresh_dit_gives_zero_and_recomputing_changes_nothing():
    network, _, t, x, labels = case("dit")
    np.testing.assert_array_equal(network.apply(init(network, jax.random.key(1)), t, x, labels), 0)
    _, variables, *_ = case("dit")
    assert_close(
        compiled("dit", remat=False)(variables, t, x, labels), compiled("dit")(variables, t, x, labels), NETWORK
    )


def test_a_dit_has_the_size_of_the_papers_table():
    # DiT-XL/2 on 32x32x4 latents, 675,129,632 parameters, predicts a variance beside the mean and counts its fixed
    # table of 256 positions; ours has neither.
    network = fm.DiTConfig(image_size=32, channels=4, width=1152, num_layers=28, head_dim=72, num_classes=1000).build()
    sizes = jax.tree.leaves(jax.eval_shape(lambda: init(network, jax.random.key(0))))
    assert sum(leaf.size for leaf in sizes) == 675_129_632 - (1152 + 1) * 16 - 256 * 1152


REFUSED = {
    "patch": ({"image_size": 5}, "image_size has height 5 and width 5, which patch_size 2 does not divide"),
    "heads": ({"head_dim": 24}, "width is 32, which is not a multiple of head_dim 24"),
    "attention": ({"attention": "flash"}, "attention is 'flash'; choose one of softmax, soft"),
    "causal attention": ({"attention": "retention"}, "attention is 'retention'; choose one of softmax, soft"),
    "layers": ({"num_layers": 0}, "num_layers is 0; it must be at least 1"),
    "classes": ({"num_classes": -1}, "num_classes is -1"),
    "size": ({"image_size": (4, 4, 4)}, "image_size is (4, 4, 4)"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_configs_that_do_not_fit_are_refused(what, untyped):
    changes, part = REFUSED[what]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        fm.DiTConfig(**{**SMALL_DIT, **changes})
    assert part in str(error.value)


@each_but_unet
def test_inputs_that_do_not_fit_are_refused(name, untyped):
    network, variables, t, x, _ = case(name)
    with pytest.raises(ValueError, match=r"x has shape .*; this network requires \(batch, "):
        network.apply(variables, t, x[:, :-1])
    with pytest.raises(ValueError, match="one time per sample"):
        network.apply(variables, t[:2], x)
    if not network.config.num_classes:
        with pytest.raises(ValueError, match="the model has no classes"):
            network.apply(variables, t, x, jnp.zeros(BATCH, jnp.int32))
