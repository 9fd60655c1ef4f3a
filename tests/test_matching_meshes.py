"""Couplings and diagnostics of arrays that are divided over a mesh with explicit axes: the numbers of one device."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tolerances import LAYER, assert_close

from flowgen import matching as fm

BATCH = 16
EVENT = (2, 3)


def key():
    return jax.random.key(3)


def weighed(x0, x1):
    return jnp.abs(x0 - x1).sum(axis=(1, 2))


def semidiscrete(x0, x1, labels):
    return fm.SemidiscreteOT(x1, jnp.linspace(0, 1, BATCH), labels)(key(), x0, x1, labels)


def loss_of(coupling):
    def call(x0, x1, labels):
        loss_fn = fm.flow_matching_loss(coupling=coupling, label_dropout=0.5)
        return loss_fn(lambda t, x, cond: -x, {"x0": x0, "x1": x1, "cond": labels}, key())

    return call


CALLS = {
    "exact": lambda *x: fm.MinibatchOT()(key(), *x),
    "exact, by class": lambda *x: fm.MinibatchOT(class_aware=True)(key(), *x),
    "sinkhorn": lambda *x: fm.MinibatchOT(method="sinkhorn")(key(), *x),
    "sinkhorn, by class": lambda *x: fm.MinibatchOT(method="sinkhorn", class_aware=True)(key(), *x),
    "weights": lambda *x: fm.GibbsWeights(epsilon=2.0, normalize="batch")(key(), *x),
    "weights, swept": lambda *x: fm.GibbsWeights(epsilon=2.0, sinkhorn_sweeps=5)(key(), *x),
    "weights of a function": lambda *x: fm.GibbsWeights(epsilon=2.0, cost=weighed, sinkhorn_sweeps=5)(key(), *x),
    "semidiscrete": semidiscrete,
    "report": lambda x0, x1, _: fm.weight_report(x0, x1, 2.0),
    "distances of tilt": lambda x0, x1, _: fm.tilted_wasserstein(x0, x1, 2.0),
    "sphere": lambda x0, x1, _: fm.to_sphere(x1),
    "loss, exact": loss_of(fm.MinibatchOT()),
    "loss, weights": loss_of(fm.GibbsWeights(epsilon=2.0, sinkhorn_sweeps=5)),
    "loss, semidiscrete": lambda *x: loss_of(fm.SemidiscreteOT(X1, jnp.linspace(0, 1, BATCH), LABELS))(*x),
}
X0, X1 = jax.random.normal(jax.random.key(0), (2, BATCH, *EVENT))
LABELS = jnp.arange(BATCH) % 3


def divided(x0=X0, x1=X1):
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Explicit,), devices=jax.devices()[:4])
    return jax.device_put((x0, x1, LABELS), NamedSharding(mesh, PartitionSpec("data")))


# Outside of jit the vmap of a loss wants a mesh as context, which jax says; distances are made on the host.
RUNS = [
    (name, jitted)
    for name in CALLS
    for jitted in (False, True)
    if not (jitted and name == "distances of tilt") and not (name.startswith("loss") and not jitted)
]
# What compiles, and one that runs operation by operation.
SHOWN = [(name, jitted) for name, jitted in RUNS if jitted and name != "report"] + [("weights", False)]


@pytest.mark.parametrize(
    ("name", "jitted"),
    [pytest.param(*run, marks=[] if run in SHOWN else [pytest.mark.slow]) for run in RUNS],
)
def test_explicit_axes_give_the_numbers_of_one_device(name, jitted):
    call = jax.jit(CALLS[name]) if jitted else CALLS[name]
    results, expected = call(*divided()), call(X0, X1, LABELS)
    for x, y in zip(jax.tree.leaves(results), jax.tree.leaves(expected), strict=True):
        assert_close(x, y, LAYER)


def test_guidance_and_likelihood_under_a_mesh_that_is_set():
    velocity = lambda t, x, cond: x * (t * (1 + cond.astype(t.dtype)))[:, None, None]  # noqa: E731
    guided = fm.guided(velocity, -1, weight=1.0)

    def run(x0, labels):
        options = {"num_steps": 2, "method": "euler"}
        return fm.integrate(guided, x0, labels, **options)[0], fm.log_prob(guided, x0, labels, key=key(), **options)

    x0, _, labels = divided()
    expected = run(X0, LABELS)
    with jax.set_mesh(x0.sharding.mesh):
        for found in (run(x0, labels), jax.jit(run)(x0, labels)):
            for x, y in zip(found, expected, strict=True):
                assert jax.typeof(x).sharding.spec[0] == "data"
                assert_close(x, y, LAYER)


def test_pairs_stay_divided_as_the_batch_is():
    for coupling in (fm.MinibatchOT(), fm.GibbsWeights(epsilon=2.0, sinkhorn_sweeps=5)):
        pairs = coupling(key(), *divided())
        for x in (pairs.x0, pairs.x1):
            assert jax.typeof(x).sharding.spec[0] == "data"


def test_epsilon_is_chosen_from_divided_data():
    for options in ({"ess": 0.5}, {"ess": 0.5, "sinkhorn_sweeps": 5}, {"ess": None, "tilt": 0.1}):
        x0, x1, _ = divided()
        assert_close(fm.choose_epsilon(x0, x1, **options), fm.choose_epsilon(X0, X1, **options), LAYER)


def test_costs_that_are_nan_are_still_refused():
    with pytest.raises(ValueError, match="costs are NaN"):
        fm.MinibatchOT()(key(), *divided(x1=X1.at[3].set(jnp.nan)))
    x0, x1, labels = divided()
    with pytest.raises(ValueError, match="num_sweeps is 1"):
        fm.MinibatchOT(method="sinkhorn", num_sweeps=1, epsilon=0.001)(key(), x0, x1, labels)
