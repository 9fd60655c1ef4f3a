"""Repeated calls outside jit compile nothing, and annealing does not mix conditions."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from matching_cases import X0, X1, T
from tolerances import FORMULA, NETWORK, assert_close

import flowgen.matching as fm
from flowgen import inference
from flowgen.conditioning import ContextTokens
from flowgen.flows import TARFlowConfig, density
from flowgen.inference import MALA, Component, ManyWell
from flowgen.transforms import MixtureMap

COMPILED = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, seconds, **_: COMPILED.append(event) if "backend_compile" in event else None
)

CONFIG = TARFlowConfig(
    image_size=2, patch_size=1, channels=1, width=8, head_dim=8, num_blocks=2, layers_per_block=1, num_classes=2
)
LABELS = np.zeros(4, np.int32)
BETAS = np.linspace(0, 1, 3)
WELL = ManyWell(4)
LOSS = fm.flow_matching_loss(coupling=fm.MinibatchOT())


@cache
def arguments():
    """(flow, params, samples) of a small flow."""
    return *laws.perturbed(CONFIG, jax.random.key(0)), laws.images(CONFIG, jax.random.key(1))


def log_q():
    flow, params, _ = arguments()
    return inference.flow_log_density(flow, params, LABELS)


def annealed(**options):
    given = {"log_q": log_q(), "log_target": ManyWell(4).log_density, "move": MALA(0.05), "betas": BETAS} | options
    return inference.anneal(jax.random.key(0), arguments()[2], **given)


def adaptive():
    x = arguments()[2]
    return inference.anneal_adaptively(jax.random.key(0), x, log_q(), WELL.log_density, MALA(0.05), max_stages=3)


def coupled():
    flow, params, x = arguments()
    return fm.FlowDistilled(flow, params)(jax.random.key(0), x, x, LABELS)


def mixed():
    flow, params, _ = arguments()
    return inference.sample_mixture([Component(flow, params, label) for label in range(2)], jax.random.key(0), 4)


CALLS = {
    "log_prob": lambda: density.log_prob(*arguments(), [0, 1, 0, 1]),
    "flow_log_density": lambda: log_q()(arguments()[2]),
    "score": lambda: density.score(*arguments(), LABELS),
    "class_posterior": lambda: density.class_posterior(*arguments()),
    "forward_kl": lambda: inference.forward_kl(*arguments(), jnp.zeros(4), LABELS),
    "FlowDistilled": coupled,
    "sample_mixture": mixed,
    "MixtureMap.to_data": lambda: MixtureMap(2).to_data(jnp.ones((1, 2, 1)), jnp.ones((1, 2, 6))),
    "next_beta": lambda: inference.next_beta(jnp.arange(4.0), jnp.zeros(4), 0.0),
    "MALA": lambda: MALA(0.05)(jax.random.key(0), arguments()[2], inference.tempered(log_q(), WELL.log_density, 0.5)),
    "anneal": annealed,
    "anneal_adaptively": adaptive,
    "MinibatchOT": lambda: fm.MinibatchOT()(jax.random.key(0), X0, X1),
    "MinibatchOT of Sinkhorn": lambda: fm.MinibatchOT(method="sinkhorn")(jax.random.key(0), X0, X1),
    "GibbsWeights": lambda: fm.GibbsWeights(1.0, sinkhorn_sweeps=2)(jax.random.key(0), X0, X1),
    "sinkhorn_potentials": lambda: fm.sinkhorn_potentials(X0 @ X1.T, 3),
    "wasserstein": lambda: fm.wasserstein(X0, X1),
    "tilted_wasserstein": lambda: fm.tilted_wasserstein(X0, X1, 2.0),
    "choose_epsilon": lambda: fm.choose_epsilon(X0, X1, ess=0.7, sinkhorn_sweeps=2),
    "choose_epsilon of a tilt": lambda: fm.choose_epsilon(X0, X1, ess=None, tilt=0.3),
    "change_path": lambda: fm.change_path(lambda t, x, _: -x, fm.CondOT(), fm.Trigonometric())(T, X0, None),
    "flow_matching_loss": lambda: LOSS(lambda t, x, _: -x, {"x0": X0, "x1": X1}, jax.random.key(0)),
}


@pytest.mark.parametrize("name", CALLS)
def test_calling_again_compiles_nothing(name):
    jax.block_until_ready(CALLS[name]())
    COMPILED.clear()
    jax.block_until_ready(CALLS[name]())
    assert not COMPILED


@dataclasses.dataclass(frozen=True)
class Shifted:
    """A target of a user, whose fields or class may refer to values that change."""

    shift: list

    def log_density(self, x):
        return WELL.log_density(x) + self.shift[0]

    def __hash__(self):
        return id(self.shift)


SHIFTED = {
    "function": lambda shift: lambda x: WELL.log_density(x) + shift[0],
    "Partial": lambda shift: jax.tree_util.Partial(lambda x: WELL.log_density(x) + shift[0]),
    "method of a frozen dataclass": lambda shift: Shifted(shift).log_density,
    "inside tempered": lambda shift: inference.tempered(WELL.log_density, Shifted(shift).log_density, 1.0),
}


@pytest.mark.parametrize("name", SHIFTED)
def test_a_target_of_your_own_may_read_values_that_change(name):
    shift = [jnp.zeros(())]
    target = SHIFTED[name](shift)
    first = annealed(log_target=target).log_normaliser
    shift[0] = jnp.ones(())
    assert_close(annealed(log_target=target).log_normaliser, first + 1, FORMULA)


def test_a_move_of_your_own_may_have_whole_numbers():
    def split(num, key, x, log_density):
        return x + 0 * jax.random.normal(jax.random.split(key, num)[0], x.shape), 1.0

    annealed(move=jax.tree_util.Partial(split, 3))


def test_new_parameters_count_in_a_kept_program():
    flow, params, x = arguments()
    zeros = jax.tree.map(jnp.zeros_like, params)
    annealed()
    r = annealed(log_q=inference.flow_log_density(flow, zeros, LABELS), move=stay, resample_below=0.0)
    normal = -0.5 * (np.square(x).sum(axis=(1, 2, 3)) + 4 * math.log(2 * math.pi))
    assert_close(r.log_weight, WELL.log_density(x) - normal, NETWORK)


def stay(key, x, log_density):
    return x, 1.0


def test_samples_of_different_conditions_are_not_resampled():
    flow, params, x = arguments()
    labels = np.array([0, 0, 1, 1])
    mixed = inference.flow_log_density(flow, params, labels)
    with pytest.raises(ValueError, match="the rows of cond in flow_log_density differ"):
        annealed(log_q=mixed)
    with pytest.raises(ValueError, match="the rows of cond in flow_log_density differ"):
        annealed(log_q=inference.flow_log_density(flow, params, labels.tolist()))
    with pytest.raises(ValueError, match="the rows of cond in flow_log_density differ"):
        annealed(log_target=inference.tempered(mixed, WELL.log_density, 0.5))
    with pytest.raises(ValueError, match="label 2 is out of range"):
        annealed(log_q=inference.flow_log_density(flow, params, LABELS + 2))

    @jax.jit
    def traced(labels):
        return annealed(log_q=inference.flow_log_density(flow, params, labels)).log_weight

    assert jnp.isnan(traced(labels)).all()
    assert jnp.isfinite(traced(LABELS)).all()
    # Without resampling, each row has its own condition.
    r = annealed(log_q=mixed, move=stay, resample_below=0.0)
    expected = WELL.log_density(x) - laws.apply(flow, params, x, jnp.asarray(labels), method="log_prob")
    assert_close(r.log_weight, expected, NETWORK)


@pytest.mark.parametrize("traced", [False, True])
def test_numbers_at_padding_do_not_make_conditions_differ(traced):
    mask = np.array([[True, False]] * 4)

    def same(tokens, first):
        cond = ContextTokens(tokens.at[0, 0].add(first), mask)
        return inference.flow_log_density(arguments()[0], arguments()[1], cond).has_one_condition()

    tokens = jnp.ones((4, 2, 3)).at[:, 1].set(jnp.nan)
    found = [(jax.jit(same) if traced else same)(tokens, first) for first in (0.0, 1.0)]
    assert list(map(bool, found)) == [True, False]


def test_annealing_is_mapped_over_conditions():
    flow, params, x = arguments()

    @jax.vmap
    def run(label, key):
        log_q = inference.flow_log_density(flow, params, jnp.full(len(x), label))
        return inference.anneal(key, x, log_q, WELL.log_density, stay, betas=BETAS, resample_below=1.0)

    with jax.debug_key_reuse(False):  # It takes the keys of nested scans under vmap for used ones (jax 0.10).
        found = run(jnp.arange(2), jax.random.split(jax.random.key(0)))
    for label in range(2):
        log_p = laws.apply(flow, params, x, jnp.full(4, label), method="log_prob")
        assert jnp.isfinite(found.log_normaliser[label])
        assert_close(found.ess[label, 0], inference.effective_sample_size((WELL.log_density(x) - log_p) / 2), NETWORK)
    with pytest.raises(ValueError, match="read the schedule of each run"):
        found.schedule  # noqa: B018


def test_a_move_with_an_array_of_steps_is_kept():
    x = jnp.zeros((3, 4))
    steps = [jnp.full(4, value).reshape(1, 4) for value in (0.1, 0.2)]
    moved, _ = MALA(steps[0])(jax.random.key(0), x, WELL.log_density)
    COMPILED.clear()
    other, _ = MALA(steps[1])(jax.random.key(0), x, WELL.log_density)
    assert not COMPILED
    assert (moved != other).any()
    assert dataclasses.replace(MALA(0.1), num_steps=2) == MALA(0.1, 2)
