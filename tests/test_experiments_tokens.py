"""Flows of numbers end to end: files and simulators, units, commands, resumption, and what is refused."""

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from commands import one_sentence, refused, succeed
from laws import drawn
from PIL import Image

import flowgen
from flowgen.batch import Batch
from flowgen.conditioning import ContextTokens, Padded
from flowgen.contexts import ImageContext, TokenContext, VectorContext
from flowgen.data import NumbersConfig, SimulatedConfig, load_numbers
from flowgen.experiments import TokenFlowExperiment, TokenSamplingConfig, fit
from flowgen.experiments.row_orders import with_rows_shuffled
from flowgen.experiments.units import context_to_flow, measured_units, to_data, to_flow
from flowgen.flows import TokenFlowConfig
from flowgen.nn import init
from flowgen.rows import Rows
from flowgen.training import LogConfig, OptimConfig, TrainConfig
from flowgen.transforms import MixtureMap

CONFIG = Path(__file__).parent.parent / "configs" / "two_moons.py"
TINY = {"width": 8, "num_blocks": 1, "layers_per_block": 1}
QUIET = LogConfig(log_every=2, eval_every=4, checkpoint_every=4, tensorboard=False, progress=False)
# Sums over grids and round trips of float32 numbers of size 1; the scales of the data multiply the latter.
INTEGRAL, ROUND_TRIP = 2e-3, 1e-5
ROWS = 40


def experiment_of(model, data, **fields):
    train = fields.pop("train", TrainConfig(steps=8, batch_size=8))
    return TokenFlowExperiment(name="own", model=model, data=data, train=train, log=QUIET, **fields)


def saved(path, **arrays):
    """The config of an .npz file with these arrays."""
    np.savez(path, **arrays)
    return NumbersConfig(path=str(path))


def shapes_of(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)


def some(*shape, seed=0, shift=3.0, scale=20.0):
    """Numbers far from standardised."""
    return (shift + scale * np.random.default_rng(seed).normal(size=shape)).astype(np.float32)


MASK = np.arange(4)[None] < np.random.default_rng(1).integers(1, 5, size=(ROWS, 1))
# Each kind of file: fields of the model, and the arrays.
KINDS = {
    "vectors": ({"shape": (3,)}, {"x": some(ROWS, 3)}),
    "sequences": ({"shape": (4, 2)}, {"x": some(ROWS, 4, 2)}),
    "sets": ({"shape": (4, 2), "padded": True}, {"x": some(ROWS, 4, 2), "mask": MASK}),
    "vector context": (
        {"shape": (2,), "context": VectorContext(dim=3)},
        {"x": some(ROWS, 2), "context": some(ROWS, 3, seed=1)},
    ),
    "token context": (
        {"shape": (2,), "context": TokenContext(length=4, dim=3)},
        {"x": some(ROWS, 2), "context": some(ROWS, 4, 3, seed=1), "context_mask": MASK},
    ),
    "image context": (
        {"shape": (2,), "context": ImageContext(image_size=4, channels=2, patch_size=2)},
        {"x": some(ROWS, 2), "context": some(ROWS, 4, 4, 2, seed=1)},
    ),
    "classes": (
        {"shape": (2,), "num_classes": 3},
        {"x": some(ROWS, 2), "labels": np.arange(ROWS) % 4 - 1},
    ),
    "sets under a context": (
        {"shape": (4, 2), "padded": True, "context": VectorContext(dim=3)},
        {"x": some(ROWS, 4, 2), "mask": MASK, "context": some(ROWS, 3, seed=1)},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_standardised_and_fit_the_model(kind, tmp_path):
    fields, arrays = KINDS[kind]
    experiment = experiment_of(TokenFlowConfig(**fields, **TINY), saved(tmp_path / "own.npz", **arrays))
    dataset = experiment.dataset("all")
    units = measured_units(dataset, None)
    batch = dataset[np.arange(ROWS)]
    u, context, logdet = to_flow(units, batch.x, batch.context, None)
    mask = np.ones(u.shape[:-1], bool)
    if isinstance(context, Padded):
        mask, context = MASK, context.cond
    np.testing.assert_allclose(u[mask].mean(axis=0), 0, atol=ROUND_TRIP)
    np.testing.assert_allclose(u[mask].std(axis=0), 1, rtol=ROUND_TRIP)
    rows = mask.reshape(ROWS, -1).sum(axis=1) / (1 if u.ndim == 3 else mask[0].size)
    expected = -rows * np.log(arrays["x"].reshape(-1, u.shape[-1])[mask.reshape(-1)].std(axis=0)).sum()
    np.testing.assert_allclose(logdet, expected, rtol=ROUND_TRIP)
    back = to_data(units, u, batch.context, None)
    np.testing.assert_allclose(back, batch.x, atol=ROUND_TRIP * 100)
    if isinstance(context, ContextTokens):
        np.testing.assert_allclose(np.asarray(context.tokens)[MASK].std(axis=0), 1, rtol=ROUND_TRIP)
    elif "context" in arrays:
        np.testing.assert_allclose(np.asarray(context).reshape(-1, context.shape[-1]).std(axis=0), 1, rtol=ROUND_TRIP)
    # A whole training step, traced with the shapes of the data and with those of the rehearsal.
    flow, rehearsal = experiment.build(), experiment.rehearsal(experiment.build(), ROWS)
    variables = jax.eval_shape(rehearsal.init, jax.random.key(0))
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, dataset[np.arange(ROWS)]))
    assert shapes_of(shapes) == shapes_of(rehearsal.batch)
    assert shapes_of(units["units"]) == shapes_of(variables["units"])
    loss, _ = jax.eval_shape(experiment.objective(flow), variables, shapes, jax.random.key(0))
    assert loss.shape == ()


def test_densities_of_one_number_integrate_to_one_in_its_units(tmp_path):
    model = TokenFlowConfig(shape=(1,), mixture=MixtureMap(components=3), **TINY)
    experiment = experiment_of(model, saved(tmp_path / "own.npz", x=some(200, 1, shift=50.0, scale=7.0)))
    units = measured_units(experiment.dataset("train"), None)
    flow = experiment.build()
    variables = {**drawn(init, flow, jax.random.key(0)), **units}
    x = np.linspace(-150, 250, 8001, dtype=np.float32)
    density = np.exp(experiment.log_prob(flow, variables, x[:, None]))
    assert abs(np.trapezoid(density, x) - 1) < INTEGRAL


def test_densities_of_parameters_integrate_to_one_over_the_prior():
    context = VectorContext(dim=2)
    experiment = experiment_of(TokenFlowConfig(shape=(2,), context=context, **TINY), SimulatedConfig(simulations=500))
    flow = experiment.build()
    variables = {**drawn(init, flow, jax.random.key(0)), **measured_units(experiment.dataset("train"), experiment.box)}
    side = 300
    middles = (np.arange(side, dtype=np.float32) + 0.5) / side * 2 - 1
    grid = np.stack(np.meshgrid(middles, middles), axis=-1).reshape(-1, 2)
    observed = np.tile(np.float32([[0.1, -0.2]]), (len(grid), 1))
    total = np.exp(experiment.log_prob(flow, variables, grid, observed)).sum() * (2 / side) ** 2
    assert abs(total - 1) < 10 * INTEGRAL  # the density may have steep edges near the bounds
    outside = experiment.log_prob(flow, variables, np.float32([[1.5, 0.0], [0.0, -1.0]]), observed[:2])
    assert np.isneginf(outside).all()


def test_simulations_are_the_same_every_time_and_split_without_overlap():
    data, model = SimulatedConfig(simulations=50), TokenFlowConfig(shape=(2,), context=VectorContext(dim=2), **TINY)
    whole = load_numbers(data, model, "all")
    train, held_out = (load_numbers(data, model, split) for split in ("train", "eval"))
    assert (len(whole), len(train), len(held_out)) == (50, 45, 5)
    joined = np.concatenate([train.x, held_out.x])
    assert {row.tobytes() for row in joined} == {row.tobytes() for row in whole.x}
    other = load_numbers(dataclasses.replace(data, seed=1), model, "all")
    assert not np.array_equal(other.x, whole.x)


VECTOR = {"shape": (2,), "context": VectorContext(dim=3)}
GOOD = {"x": some(ROWS, 2), "context": some(ROWS, 3)}


@pytest.mark.parametrize(
    ("fields", "arrays", "words"),
    [
        (VECTOR, {"context": GOOD["context"]}, "no 'x'"),
        (VECTOR, GOOD | {"x": some(ROWS, 3)}, r"'x' .* floats of shape \(40, 2\)"),
        (VECTOR, GOOD | {"x": np.arange(80).reshape(40, 2)}, "'x' .* int64"),
        (VECTOR, {"x": GOOD["x"]}, "'context' .* is missing"),
        (VECTOR, GOOD | {"context": some(ROWS - 1, 3)}, r"'context' .* \(40, 3\)"),
        (VECTOR, GOOD | {"labels": np.zeros(ROWS, int)}, "'labels', which this model does not use"),
        (VECTOR, GOOD | {"x": np.where(np.arange(80).reshape(40, 2) == 5, np.nan, GOOD["x"])}, "not finite"),
        (VECTOR, GOOD | {"x": np.where(np.arange(80).reshape(40, 2) == 5, 1e39, 0.1)}, r"'x' .* up to 1e\+39, but"),
        (VECTOR, GOOD | {"x": 1e-50 * some(ROWS, 2).astype(float)}, "channel 0 of 'x' .* in smaller units"),
        (VECTOR, GOOD | {"x": 1.7e9 + some(ROWS, 2).astype(float)}, "channel 0 of 'x' .* subtract an offset"),
        (VECTOR, GOOD | {"context": some(ROWS, 3) + np.array([0, 0, 1e8])}, "channel 2 of 'context' .* subtract an"),
        ({"shape": (4, 2), "padded": True}, {"x": some(ROWS, 4, 2), "mask": MASK & False}, "'mask' .* split 'train'"),
        (VECTOR, GOOD | {"x": np.array([{}], object)}, "not a readable .npz file of plain arrays"),
        ({"shape": (2,), "num_classes": 2}, {"x": GOOD["x"], "labels": np.full(ROWS, 2)}, "labels from 0 to 1"),
        ({"shape": (4, 2), "padded": True}, {"x": some(ROWS, 4, 2)}, "'mask' .* is missing"),
        ({"shape": (4, 2), "padded": True}, {"x": some(ROWS, 4, 2), "mask": np.ones(ROWS, bool)}, "'mask' .* booleans"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(fields, arrays, words, tmp_path):
    experiment = experiment_of(TokenFlowConfig(**fields, **TINY), saved(tmp_path / "own.npz", **arrays))
    with pytest.raises(ValueError, match=words) as error:
        experiment.dataset("train")
    assert str(tmp_path) in one_sentence(error)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"model": TokenFlowConfig(shape=(3,), context=VectorContext(dim=2))}, r"shape \(3,\)"),
        ({"sampling": TokenSamplingConfig(observation=9)}, "fixed observations 0 to 3"),
        ({"sampling": TokenSamplingConfig(context=(0.1,))}, "give 2 entries"),
        ({"sampling": TokenSamplingConfig(guidance=1.0)}, "train.label_dropout"),
        ({"data": NumbersConfig(path="own.npz", shuffle_rows=True)}, "data.shuffle_rows is true"),
    ],
)
def test_parts_that_do_not_fit_are_refused(fields, words):
    parts = {"model": TokenFlowConfig(shape=(2,), context=VectorContext(dim=2)), "data": SimulatedConfig(), **fields}
    with pytest.raises(ValueError, match=words) as error:
        experiment_of(parts.pop("model"), parts.pop("data"), **parts)
    one_sentence(error)


@pytest.mark.parametrize(("width", "head_dim"), [(24, 12), (40, 20), (64, 64), (16, 4), (12, 6), (8, 64)])
def test_a_debug_run_has_heads_that_fit_its_width(width, head_dim):
    model = TokenFlowConfig(shape=(4,), width=width, head_dim=head_dim)
    small = experiment_of(model, NumbersConfig(path="own.npz")).debug().model
    assert small.width == min(width, 16)
    assert small.width % small.head_dim == 0 or small.head_dim > small.width


def test_constant_entries_are_refused_in_samples_and_shifted_in_contexts(tmp_path):
    model = TokenFlowConfig(**VECTOR, **TINY)
    constant = {name: np.concatenate([array[:, :1] * 0 + 5, array[:, 1:]], axis=1) for name, array in GOOD.items()}
    of_context = saved(tmp_path / "context.npz", **GOOD | {"context": constant["context"]})
    dataset = load_numbers(of_context, model, "all")
    assert not np.asarray(context_to_flow(measured_units(dataset, None), dataset.context))[:, 0].any()
    with pytest.raises(ValueError, match="channel 0"):
        measured_units(load_numbers(saved(tmp_path / "x.npz", **GOOD | {"x": constant["x"]}), model, "all"), None)


def test_large_numbers_that_vary_enough_keep_their_digits(tmp_path):
    """The limit leaves 2^7 or more numbers in a standard deviation, and depends on neither the unit nor padding."""
    x = 1e6 + 32.0 * np.random.default_rng(0).normal(size=(200, 4, 1))
    mask = np.arange(4)[None] < np.full((200, 1), 3)
    model = TokenFlowConfig(shape=(4, 1), padded=True, **TINY)
    for unit in (1.0, 1e-30, 1e29):
        data = saved(tmp_path / "x.npz", x=unit * np.where(mask[..., None], x, 0), mask=mask)
        whole = load_numbers(data, model, "all")
        u, *_ = to_flow(measured_units(whole, None), whole.x, whole.context, None)
        rows = x[mask]
        np.testing.assert_allclose(np.asarray(u)[mask], (rows - rows.mean()) / rows.std(), atol=2.0**-8)


@pytest.mark.parametrize("kind", ["sets", "token context"])
def test_numbers_at_padding_are_ignored(kind, tmp_path):
    fields, arrays = KINDS[kind]
    name, model = "x" if kind == "sets" else "context", TokenFlowConfig(**fields, **TINY)
    odd = np.resize([np.nan, np.inf, 1e300], MASK.shape)[..., None]
    changed = arrays | {name: np.where(MASK[..., None], arrays[name].astype(float), odd)}
    plain, padded = (load_numbers(saved(tmp_path / "x.npz", **each), model, "all") for each in (arrays, changed))
    values = padded.x if kind == "sets" else padded.context.tokens
    np.testing.assert_array_equal(values, np.where(MASK[..., None], arrays[name], 0))
    jax.tree.map(np.testing.assert_array_equal, measured_units(plain, None), measured_units(padded, None))


def test_a_context_of_padding_alone_is_left_as_it_is(tmp_path):
    fields, arrays = KINDS["token context"]
    data = saved(tmp_path / "x.npz", **arrays | {"context_mask": MASK & False})
    dataset = load_numbers(data, TokenFlowConfig(**fields, **TINY), "all")
    units = measured_units(dataset, None)
    np.testing.assert_array_equal(units["units"]["context"]["mean"], 0)
    np.testing.assert_array_equal(units["units"]["context"]["scale"], 1)
    empty = dataclasses.replace(dataset, x=some(ROWS, 4, 2), context=Padded(MASK & False))
    with pytest.raises(ValueError, match="mask is False everywhere"):
        measured_units(empty, None)


def test_every_order_of_the_existing_rows_is_as_likely():
    mask = np.array([False, True, True, False, True])
    count = 6000
    x = np.tile(np.arange(5, dtype=np.float32)[None, :, None], (count, 1, 2))
    batch = Batch(x, Padded(np.tile(mask, (count, 1))))
    found = np.asarray(jax.jit(with_rows_shuffled)(batch, jax.random.key(0)).x)
    np.testing.assert_array_equal(found[:, ~mask], x[:, ~mask])
    np.testing.assert_array_equal(found[..., 0], found[..., 1])
    orders, times = np.unique(found[:, mask, 0], axis=0, return_counts=True)
    assert {tuple(order) for order in orders} == set(itertools.permutations((1, 2, 4)))
    assert scipy.stats.chisquare(times).pvalue > 1e-3
    whole = np.asarray(with_rows_shuffled(Batch(x[:20], None), jax.random.key(1)).x)
    np.testing.assert_array_equal(np.sort(whole, axis=1), x[:20])
    assert len(np.unique(whole, axis=0)) > 10


def test_rows_are_shuffled_by_their_place_in_the_whole_batch():
    """Half of a batch on each of two devices gets the orders of the whole."""
    batch = Batch(some(8, 4, 2), Padded(MASK[:8]))

    def shuffled(half):
        rows = Rows(jax.random.key(0), jnp.arange(8)[half], size=8)
        part = jax.tree.map(lambda array: array[half], batch)
        return with_rows_shuffled(part._replace(rows=rows), jax.random.key(1)).x

    whole = shuffled(slice(0, 8))
    assert (whole != batch.x).any()
    for half in (slice(0, 4), slice(4, 8)):
        np.testing.assert_array_equal(shuffled(half), whole[half])


def test_only_training_shuffles_rows(tmp_path):
    fields, arrays = KINDS["sets"]
    data = dataclasses.replace(saved(tmp_path / "x.npz", **arrays), shuffle_rows=True)
    experiment = experiment_of(TokenFlowConfig(noise_std=0.0, **fields, **TINY), data)
    fixed = dataclasses.replace(experiment, data=dataclasses.replace(data, shuffle_rows=False))
    flow, dataset = experiment.build(), experiment.dataset("all")
    np.testing.assert_array_equal(dataset.x[MASK], arrays["x"][MASK])
    variables = {**drawn(init, flow, jax.random.key(0)), **measured_units(dataset, None)}
    batch = jax.tree.map(jnp.asarray, dataset[np.arange(ROWS)])

    def loss_of(each, batch):
        return jax.jit(each.objective(flow))(variables, batch, jax.random.key(1))[0]

    loss, other = (loss_of(each, batch) for each in (experiment, fixed))
    again = loss_of(fixed, with_rows_shuffled(batch, jax.random.key(1)))
    np.testing.assert_allclose(loss, again, rtol=ROUND_TRIP)
    assert abs(loss - other) > 100 * ROUND_TRIP
    scores = [each.log_prob(flow, variables, dataset.x, dataset.context) for each in (experiment, fixed)]
    np.testing.assert_array_equal(*scores)


def test_own_datasets_are_refused(tmp_path):
    experiment = experiment_of(TokenFlowConfig(**VECTOR, **TINY), NumbersConfig(path="own.npz"))
    with pytest.raises(ValueError, match="NumbersConfig"):
        fit(experiment, tmp_path, dataset=flowgen.data.NumbersDataset(some(4, 2)))


@pytest.fixture(scope="module")
def moons(tmp_path_factory):
    """A debug run of the shipped config, by the command."""
    path = tmp_path_factory.mktemp("runs") / "moons"
    words = "train --debug --log.progress false --model.num_blocks 1 --model.mixture null --config"
    return path, succeed(words, CONFIG, "--workdir", path)


@pytest.mark.slow
def test_commands_on_a_simulator(moons, tmp_path):
    run, told = moons
    assert "nats_per_dim" in told
    assert np.asarray(Image.open(max(run.glob("samples/*.png")))).shape == (500, 500, 3)
    assert "model.shape" in succeed("info --checkpoint", run, "model", "sampling")
    out = tmp_path / "samples.npz"
    succeed("sample --num 12 --sampling.context 0.1,0.2 --checkpoint", run, "--out", out)
    with np.load(out) as arrays:
        assert arrays["x"].shape == (12, 2)
        assert (np.abs(arrays["x"]) < 1).all()
        np.testing.assert_array_equal(arrays["context"], np.tile(np.float32([0.1, 0.2]), (12, 1)))
    succeed("sample --num 12 --sampling.observation 1 --checkpoint", run, "--out", tmp_path / "samples.png")
    assert "fixed observations" in refused("sample --sampling.observation 7 --checkpoint", run, "--out", out)
    told = succeed("evaluate --samples 20 --calibration 20 --checkpoint", run, "--out", tmp_path / "metrics.json")
    assert all(word in told for word in ("nats", "C2ST", "SBC", "coverage"))
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert {"nats", "c2st", "c2st/3", "sbc_p_value", "coverage_area"} <= set(found["metrics"])
    assert found["c2st"]["samples"] == 20
    assert found["metrics"]["nats"]["standard_error"] > 0
    succeed("export", run, "--out", tmp_path / "exported")
    of_run, of_export = (flowgen.load(place) for place in (run, tmp_path / "exported"))
    jax.tree.map(np.testing.assert_array_equal, of_run[1], of_export[1])
    succeed("report", run, "--out", tmp_path / "report.html")


@pytest.mark.slow
def test_a_stopped_run_on_shuffled_sets_resumes_bitwise(tmp_path):
    fields, arrays = KINDS["sets"]
    data = dataclasses.replace(saved(tmp_path / "own.npz", **arrays), shuffle_rows=True)
    optim = OptimConfig(schedule="constant", lr=1e-2)
    whole = experiment_of(TokenFlowConfig(**fields, **TINY), data, optim=optim)
    half = dataclasses.replace(whole, train=dataclasses.replace(whole.train, steps=4))
    one = fit(whole, tmp_path / "whole")
    fit(half, tmp_path / "halves")
    other = fit(whole, tmp_path / "halves")
    jax.tree.map(np.testing.assert_array_equal, one.state, other.state)


@pytest.mark.slow
def test_a_stopped_run_resumes_bitwise_and_samples_without_its_data(tmp_path):
    data = saved(tmp_path / "own.npz", x=some(ROWS, 2))
    optim = OptimConfig(schedule="constant", lr=1e-2)
    whole = experiment_of(TokenFlowConfig(shape=(2,), **TINY), data, optim=optim)
    half = dataclasses.replace(whole, train=dataclasses.replace(whole.train, steps=4))
    one = fit(whole, tmp_path / "whole")
    fit(half, tmp_path / "halves")
    other = fit(whole, tmp_path / "halves")
    jax.tree.map(np.testing.assert_array_equal, one.state, other.state)
    assert {"nats", "nats_per_dim"} <= set(one.metrics)
    Path(data.path).unlink()
    flow, variables, experiment = flowgen.load(tmp_path / "halves")
    small = dataclasses.replace(experiment, sampling=TokenSamplingConfig(num=200))
    samples = small.draw(flow, variables, small.draw_options())
    # Hardly trained, the flow gives standard normal numbers, which the saved units map to those of the data.
    np.testing.assert_allclose(samples.arrays.std(axis=0), some(ROWS, 2).std(axis=0), rtol=0.5)
