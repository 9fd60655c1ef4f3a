"""Samples and contexts of flows of numbers, in the units of the data: bounds, shapes, and what is refused."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import one_sentence
from laws import drawn
from tolerances import NETWORK, assert_close

from flowgen.conditioning import ContextTokens, Padded
from flowgen.contexts import ImageContext, TokenContext, VectorContext
from flowgen.data import NumbersConfig, load_numbers
from flowgen.experiments import TokenFlowExperiment, TokenSamplingConfig
from flowgen.experiments.number_checks import batch_context
from flowgen.experiments.number_plots import number_plot, observation_title
from flowgen.experiments.units import blank_units, log_prob_in_data, measured_units
from flowgen.flows import TokenFlowConfig
from flowgen.nn import init
from flowgen.settings import override
from flowgen.transforms import MixtureMap

TINY = {"width": 8, "num_blocks": 1, "layers_per_block": 1}
INTEGRAL = 2e-3  # sums over grids of float32 numbers of size 1
ROWS = 3


def floats(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


OWN = NumbersConfig("own.npz")


def experiment_of(model, data=OWN, **fields):
    return TokenFlowExperiment(name="own", model=TokenFlowConfig(**model, **TINY), data=data, **fields)


def variables_of(experiment, **units):
    flow = experiment.build()
    return flow, {**drawn(init, flow, jax.random.key(0)), **(units or blank_units(flow.config))}


@pytest.mark.parametrize("words", [["--model.shape", "3"], ["--model.shape=3,"], ["--model.shape", "[3]"]])
def test_a_single_number_is_a_tuple_of_one_on_a_command_line(words):
    assert override(experiment_of({"shape": (2,)}), words).model.shape == (3,)
    one = experiment_of({"shape": (2,), "context": VectorContext(1)})
    assert override(one, ["--sampling.context=0.1"]).sampling.context == (0.1,)


def test_bounds_on_a_command_line_may_differ_between_channels():
    data = override(experiment_of({"shape": (2,)}), ["--data.low", "0,None", "--data.high=10"]).data
    assert (data.low, data.high) == ((0, None), 10)


def test_a_hint_about_tuples_is_a_valid_value():
    with pytest.raises(ValueError, match=r"a tuple of 1 integer or a tuple of 2 integers, as in --model.shape 4\.$"):
        override(experiment_of({"shape": (2,)}), ["--model.shape", "3x"])
    assert override(experiment_of({"shape": (2,)}), ["--model.shape", "4"]).model.shape == (4,)


@pytest.mark.usefixtures("untyped")
def test_numbers_that_are_not_finite_are_called_so():
    with pytest.raises(ValueError, match=r"context has the entry nan, which is not finite") as error:
        TokenSamplingConfig(context=(0.0, float("nan")))
    one_sentence(error)


def test_densities_integrate_to_one_within_the_bounds_of_a_file(tmp_path):
    x = np.random.default_rng(0).uniform(2, 5, size=(200, 1)).astype(np.float32)
    x[:2] = [[2], [5]]  # Rounding may put samples of a prior on its bounds.
    np.savez(tmp_path / "own.npz", x=x)
    data = NumbersConfig(str(tmp_path / "own.npz"), low=2.0, high=(5.0,))
    experiment = experiment_of({"shape": (1,), "mixture": MixtureMap(components=3)}, data)
    flow, variables = variables_of(experiment, **measured_units(experiment.dataset("train"), experiment.box))
    side = 6000
    middles = 2 + 3 * (np.arange(side, dtype=np.float32) + 0.5) / side
    density = np.exp(experiment.log_prob(flow, variables, middles[:, None]))
    assert abs(density.mean() * 3 - 1) < INTEGRAL
    x = np.float32([[1.9], [5.1], [3.0]])
    assert np.isneginf(experiment.log_prob(flow, variables, x)).tolist() == [True, True, False]

    def of_samples_inside(params):
        found = log_prob_in_data({**variables, "params": params}, jnp.asarray(x), None, flow=flow, data=experiment.data)
        return jnp.where(jnp.isfinite(found), found, 0).sum()

    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.grad(of_samples_inside)(variables["params"])))
    samples, _ = experiment.draw_batch(flow, variables, jax.random.key(0), np.arange(200), None)
    assert ((samples > 2) & (samples < 5)).all()


def test_bounds_ignore_the_padding_of_sets(tmp_path):
    mask = np.arange(4)[None] < np.random.default_rng(1).integers(1, 5, size=(40, 1))
    x = np.where(mask[:, :, None], 3 + np.abs(floats(40, 4, 2)), 0)
    np.savez(tmp_path / "own.npz", x=x, mask=mask)
    data = NumbersConfig(str(tmp_path / "own.npz"), low=(3.0, None))
    experiment = experiment_of({"shape": (4, 2), "padded": True}, data)
    units = measured_units(experiment.dataset("all"), experiment.box)
    flow, variables = variables_of(experiment, **units)
    log_prob = experiment.log_prob(flow, variables, x, Padded(mask))
    assert_close(
        experiment.log_prob(flow, variables, np.where(mask[:, :, None], x, 7), Padded(mask)), log_prob, NETWORK
    )
    assert np.isfinite(log_prob).all()
    batch = experiment.dataset("all")[np.arange(8)]
    slopes = jax.grad(lambda v: experiment.objective(flow)({**v, **units}, batch, jax.random.key(0))[0])(
        {"params": variables["params"]}
    )
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(slopes))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("bounds", "words"),
    [
        ({"low": 0.0, "high": 0.0}, "low is 0, but high is 0"),
        ({"low": (0.0, 0.0), "high": (1.0,)}, "low has 2 entries, but high has 1"),
        ({"low": ()}, "low has no entries"),
        ({"low": -1e39}, r"low is -1e\+39; a bound has at most"),
        ({"low": (0.0, 0.0, 0.0)}, "data.low has 3 entries, but x has 2 channels"),
        (
            {"low": -9.0, "high": 2.5},
            r"1 values .* data.low and data.high, .* index \(1, 0\): 3 is not between -9 and 2.5",
        ),
        ({"low": (None, 0.0)}, r"'x' in .* 1 values .* index \(0, 1\): 0 is not between 0 and inf"),
    ],
)
def test_bounds_that_do_not_fit_are_refused(bounds, words, tmp_path):
    np.savez(tmp_path / "own.npz", x=np.float32([[1, 0], [3, 1]]))

    def load():
        data = NumbersConfig(str(tmp_path / "own.npz"), **bounds)
        load_numbers(data, experiment_of({"shape": (2,)}, data).model, "all")

    with pytest.raises(ValueError, match=words) as error:
        load()
    one_sentence(error)


MASK = np.array([[True, True], [False, True], [True, False]])
VECTOR = {"shape": (2,), "context": VectorContext(dim=4)}
SET = {"shape": (2, 2), "padded": True}
TOKENS = {"shape": (2,), "context": TokenContext(length=2, dim=4)}
# Fields of a model, and one context without a batch axis.
SINGLE = {
    "a vector": (VECTOR, floats(4)),
    "tokens": (TOKENS, ContextTokens(floats(2, 4), MASK[1])),
    "an image": ({"shape": (2,), "context": ImageContext(4, 1, 2)}, floats(4, 4, 1)),
    "a label": ({"shape": (2,), "num_classes": 3}, np.array(2)),
    "a mask": (SET, Padded(MASK[1])),
    "a mask and a vector": ({**SET, "context": VectorContext(dim=4)}, Padded(MASK[1], floats(4))),
}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", SINGLE)
def test_one_context_applies_to_all_samples(kind):
    fields, one = SINGLE[kind]
    model = TokenFlowConfig(**fields, **TINY)
    repeated = jax.tree.map(lambda array: np.repeat(array[None], ROWS, axis=0), one)
    for given in (one, jax.tree.map(lambda array: array[None], one), repeated):
        jax.tree.map(np.testing.assert_array_equal, batch_context(model, given, ROWS), repeated)


def test_densities_and_samples_accept_one_context():
    experiment = experiment_of(VECTOR)
    flow, variables = variables_of(experiment)
    x, one = floats(ROWS, 2), floats(4)
    repeated = np.repeat(one[None], ROWS, axis=0)
    expected = flow.apply(variables, jnp.asarray(x), repeated, method="log_prob")
    assert_close(experiment.log_prob(flow, variables, x, one), expected, NETWORK)
    of_one, of_all = (
        experiment.draw_batch(flow, variables, jax.random.key(0), np.arange(ROWS), context)[0]
        for context in (one, repeated)
    )
    np.testing.assert_array_equal(of_one, of_all)


REFUSED = {
    "another width": (
        VECTOR,
        floats(ROWS, 3),
        r"context is float32 of shape \(3, 3\); .* floats of shape \(3, 4\), or",
    ),
    "another number of rows": (VECTOR, floats(2, 4), r"context is float32 of shape \(2, 4\); .* of shape \(3, 4\)"),
    "integers": (VECTOR, np.ones((ROWS, 4), int), r"context is int64 .* floats of shape"),
    "a list": (VECTOR, [0.0] * 4, "context is a list; .* floats of shape"),
    "nothing": (VECTOR, None, r"context is None; .* floats of shape \(3, 4\)"),
    "not a number": (VECTOR, np.full((ROWS, 4), np.nan), r"context has 12 values that are not finite, .* \(0, 0\)"),
    "a context of a model without one": ({"shape": (2,)}, floats(ROWS, 4), "context is .* has no context .* leave it"),
    "a bare mask": (SET, MASK, r"context is bool of shape \(3, 2\); .* give Padded\(mask\)"),
    "another mask": (SET, Padded(np.ones((ROWS, 4), bool)), r"context.mask is bool of .* \(3, 4\); .* \(3, 2\)"),
    "padding without need": (VECTOR, Padded(MASK, floats(ROWS, 4)), "context is Padded, .* give its cond"),
    "numbers for labels": ({"shape": (2,), "num_classes": 3}, floats(ROWS), "context is float32 .* integers"),
    "a label out of range": ({"shape": (2,), "num_classes": 3}, np.array([0, 1, 3]), "label 3 is out of range"),
}


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize("kind", REFUSED)
def test_contexts_that_do_not_fit_are_refused_in_one_sentence(kind):
    fields, context, words = REFUSED[kind]
    experiment = experiment_of(fields)
    x = floats(ROWS, *experiment.model.shape)
    with pytest.raises(ValueError, match=words) as error:
        experiment.log_prob(experiment.build(), {}, x, context)
    one_sentence(error)
    if context is not None:
        with pytest.raises(ValueError, match=words):
            experiment.draw_batch(experiment.build(), {}, jax.random.key(0), np.arange(ROWS), context)


def test_samples_that_are_not_finite_are_refused():
    experiment = experiment_of({"shape": (2,)})
    with pytest.raises(ValueError, match=r"x has 1 value that is not finite, at index \(1, 0\)"):
        experiment.log_prob(experiment.build(), {}, np.float32([[0, 0], [np.inf, 0]]))


def test_plots_name_their_observation():
    model = TokenFlowConfig(**VECTOR, **TINY)
    title = observation_title(TokenSamplingConfig(context=(0.5, -1.0, 2.0, 3.0)), model, of_file=True)
    assert title == "context 0.5, -1, 2, 3"
    assert observation_title(TokenSamplingConfig(observation=2), model, of_file=True) == "context of sample 2"
    assert observation_title(TokenSamplingConfig(observation=2), model, of_file=False) == "observation 2"
    assert observation_title(TokenSamplingConfig(), TokenFlowConfig(shape=(2,), **TINY), of_file=True) == ""
    plain, titled = (number_plot(floats(20, 3), title=given) for given in ("", title))
    assert plain.shape == titled.shape == (600, 600, 3)
    assert not np.array_equal(plain, titled)


def test_half_precision_numbers_with_classes_load_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("own.npz", x=floats(30, 2).astype(np.float16), labels=np.arange(30) % 3)
    experiment = experiment_of({"shape": (2,), "num_classes": 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        job = experiment.job()
    assert job.inventory.line() == "vectors: 27 train, 3 held out, classes: 0, 1, 2"
