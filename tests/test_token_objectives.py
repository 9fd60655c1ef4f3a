"""Objectives of flows on vectors, sequences and sets: batches, padding, dropout, and what is refused."""

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from conftest import rows
from token_cases import ALIKE, CASES, EXACT, MASK, SMALL, TOKEN_MASK, case, floats, sizes
from tolerances import NETWORK, assert_close

import flowgen
from flowgen.conditioning import ContextTokens, Padded
from flowgen.contexts import VectorContext
from flowgen.data import Batch
from flowgen.data.numbers import NumbersDataset
from flowgen.decoding import sample
from flowgen.evaluation import flow_bits_per_dim, flow_nats
from flowgen.flows import TokenFlowConfig
from flowgen.flows.batches import batch_condition
from flowgen.flows.jacobi_error import JacobiPenalty
from flowgen.flows.objective import nll_objective
from flowgen.training import OptimConfig, make_step
from flowgen.training.fsdp import FullySharded
from flowgen.training.parallel import DataParallel
from flowgen.training.step import init_state
from flowgen.transforms import MixtureMap


@pytest.fixture(params=rows(CASES, ALIKE))
def name(request):
    return request.param


def test_the_objective_is_the_density_of_batches_of_numbers(name, key):
    flow, params, x, cond = case(name)
    if x.ndim == 4:
        return
    loss, metrics = jax.jit(nll_objective(flow))(params, Batch(x, cond), key)
    log_prob = laws.apply(flow, params, x, cond, method="log_prob")
    num_dims = np.mean([sizes(x, cond, index).sum() for index in range(len(x))])
    assert_close(metrics["nats_per_dim"], -log_prob.mean() / num_dims, NETWORK)
    gradient = jax.jit(jax.grad(lambda p: nll_objective(flow)(p, Batch(x, cond), jax.random.key(1))[0]))(params)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert jnp.isfinite(loss)


def longer(length, places, x, params):
    """A flow of `length` rows, with the rows of padded samples x in these places, and its parameters."""
    config = TokenFlowConfig(shape=(length, 2), padded=True, dtype="float64", **SMALL)
    moved = jnp.full((len(x), length, 2), 9.0).at[:, np.array(places)].set(x)
    table = jax.tree.map(lambda part: part, params)
    for block in table["params"].values():
        block["pos_embed"] = jnp.resize(block["pos_embed"], (length, 16))
    mask = jnp.zeros((len(x), length), bool).at[:, np.array(places)].set(MASK)
    return config.build(), table, Batch(moved, Padded(mask))


def test_padding_changes_neither_loss_nor_gradient(x64):
    _, params, x, _ = case("padded", "float64")
    penalties = {"norm_penalty": 0.1, "jacobi": JacobiPenalty(sweeps=2)}

    def outcome(length, places):
        flow, table, batch = longer(length, places, x, params)
        loss = nll_objective(flow, **penalties)
        (value, metrics), slopes = jax.jit(jax.value_and_grad(loss, has_aux=True))(table, batch, jax.random.key(0))
        for block in slopes["params"].values():
            assert not block["pos_embed"][5:].any()
            block["pos_embed"] = block["pos_embed"][:5]
        return value, metrics, slopes

    expected = outcome(5, range(5))
    found = outcome(9, (0, 2, 3, 6, 8))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=EXACT), found, expected)


def test_a_batch_of_padding_alone_has_no_loss():
    flow, params, x, _ = case("padded")
    batch = Batch(x, Padded(jnp.zeros(MASK.shape, bool)))
    loss, slopes = jax.jit(jax.value_and_grad(lambda p: nll_objective(flow)(p, batch, jax.random.key(0))[0]))(params)
    assert loss == 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(slopes))


LAYOUTS = {
    "devices": (lambda: DataParallel(jax.devices()[:2]), 1),
    "micro-batches": (lambda: DataParallel(jax.devices()[:1]), 2),
    "devices and micro-batches": (lambda: DataParallel(jax.devices()[:2]), 2),
    "sharded": (lambda: FullySharded(jax.devices()[:2]), 1),
}


@pytest.fixture(scope="module")
def one_device():
    return step_of_unequal_lengths(DataParallel(jax.devices()[:1]), 1)


@pytest.mark.parametrize("layout", rows(LAYOUTS, rare=("devices and micro-batches",)))
def test_samples_of_unequal_lengths_are_weighted_alike_in_every_layout(layout, one_device):
    parallel, accumulation = LAYOUTS[layout]
    found = step_of_unequal_lengths(parallel(), accumulation)
    for name in ("loss", "nats_per_dim", "grad_norm"):
        assert_close(found[name], one_device[name], NETWORK)


def step_of_unequal_lengths(parallel, accumulation):
    """The metrics of a training step whose devices and micro-batches have different numbers of rows that exist."""
    flow, params, _, _ = case("padded, permuted, context")
    ends = np.array([5, 1, 4, 0, 5, 2, 1, 1])
    mask, context = np.arange(5) < ends[:, None], ContextTokens(floats(8, 3, 2), np.resize(TOKEN_MASK, (8, 3)))
    x = floats(8, 5, 2, seed=6)
    batch = jax.tree.map(lambda part: np.asarray(part, bool if part.dtype == bool else "f4"), (x, mask, context))
    batch = Batch(batch[0], Padded(*batch[1:]))

    objective, optim = nll_objective(flow, label_dropout=0.5), OptimConfig()
    step = make_step(objective, optim, steps=2, accumulation=accumulation, axis_name=parallel.axis_name)
    state, key = parallel.place(init_state(params, optim, 2)), parallel.replicate_key(jax.random.key(1))
    return parallel.to_host(parallel.compile(step)(state, parallel.shard(batch), key)[1])


def test_lists_in_a_batch_are_refused_by_name(untyped):
    flow, params, x, cond = case("padded, permuted, context")
    lists = cond.cond.tokens.tolist()
    for batch, part in (
        (Batch(x.tolist(), cond), "batch.x is a list"),
        (Batch(x, Padded(MASK.tolist(), cond.cond)), "batch.context.mask is a list"),
        (Batch(x, cond._replace(cond=ContextTokens(lists, TOKEN_MASK))), "batch.context.cond.tokens is a list"),
        (Batch(x, ([1, 2, 3],)), "batch.context is a tuple"),
        (Batch(x, 3), "batch.context is 3"),
    ):
        with pytest.raises(ValueError, match=f"{part}; give an array with one row per sample"):
            nll_objective(flow)(params, batch, jax.random.key(0))
    with pytest.raises(ValueError, match=r"batch.context is a list; .* np.asarray converts a list"):
        _ = Batch(x, [0, 1, 2]).labels


def test_numbers_have_no_bits(untyped):
    flow, params, x, _ = case("vector")
    with pytest.raises(ValueError, match="this flow models numbers; use nats per dimension"):
        flow.apply(params, x, method="bits_per_dim")
    with pytest.raises(ValueError, match="the data are numbers; use flow_nats_per_dim"):
        flow_bits_per_dim(flow, params, NumbersDataset(np.asarray(x), None, ()), jax.random.key(0))


def test_the_likelihood_of_a_dataset_counts_what_exists():
    flow, params, x, cond = case("padded")
    dataset = NumbersDataset(np.asarray(x), jax.tree.map(np.asarray, cond), ())
    log_prob = laws.apply(flow, params, x, cond, method="log_prob")
    found = flow_nats(flow, params, dataset, jax.random.key(0), batch_size=2)
    assert_close(found, -log_prob / (2 * MASK.sum(axis=1)), NETWORK)


def test_dropout_makes_that_share_of_contexts_unconditional(key):
    flow = TokenFlowConfig(shape=(2,), context=VectorContext(dim=1), **SMALL).build()
    batch = Batch(jnp.zeros((4000, 2)), jnp.ones((4000, 1)))
    condition = batch_condition(flow, 0.25, None)
    dropped = condition(flowgen.rows.batch_rows(batch, key, 4000), batch, ())
    share = 1 - dropped.mask.mean()
    assert abs(share - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 4000)


def test_a_context_or_a_mask_that_the_flow_does_not_know_is_not_dropped_silently():
    flow, params, x, _ = case("vector")
    for context, message in (
        (jnp.ones((3, 2)), "this flow has no context; describe it by the model's `context`"),
        (Padded(jnp.asarray(MASK)), "this flow's samples have no padding; give its cond"),
    ):
        with pytest.raises(ValueError, match=message):
            nll_objective(flow)(params, Batch(x, context), jax.random.key(0))


@pytest.mark.usefixtures("untyped")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 4}, r"group is 4, which does not divide shape\[0\] 6; use a divisor"),
        ({"shape": (6, 2), "group": 2, "padded": True}, r"padded is True, which needs sequences"),
        ({"orders": ((0, 1, 2, 3, 4, 5),)}, r"orders has 1 permutations, but num_blocks is 2"),
        ({"orders": ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4))}, r"orders\[1\] has 5 entries, but there are 6 tokens"),
        ({"orders": ((0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 4))}, r"orders\[1\] is not a permutation of 0..5"),
        (
            {"orders": ((0, 1, 2, 3, 4, -1),) * 2},
            r"orders has the entry \(0, .*, -1\), which has the entry -1; it must be",
        ),
        ({"orders": ((), ())}, r"orders has the entry \(\), which has 0 entries; it must have 1 to"),
        ({"orders": ((0.5,), (0,))}, "must be 'alternating' or 'raster' or a tuple of tuples of integers"),
        ({"num_classes": 3, "context": VectorContext(2)}, r"num_classes is 3 and context is a VectorContext"),
        ({"mixture": MixtureMap(), "scale_parameterisation": "softplus"}, r"leave it at 'exponential'"),
        ({"width": 20}, r"width is 20, which is not a multiple of head_dim 8"),
    ],
)
def test_a_config_that_cannot_work_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TokenFlowConfig(**{"shape": (6,), **SMALL, **change})


@pytest.mark.usefixtures("untyped")
def test_permutations_of_numpys_integers_become_integers():
    config = TokenFlowConfig(shape=(3,), **{**SMALL, "orders": [list(np.array([2, 0, 1])), tuple(np.arange(3))]})
    assert config.orders == ((2, 0, 1), (0, 1, 2))
    assert {type(place) for order in config.orders for place in order} == {int}


@pytest.mark.parametrize(
    ("name", "cond", "message"),
    [
        ("vector", ContextTokens(floats(3, 1, 2), np.ones((3, 1), bool)), r"set its context, or give labels"),
        ("padded", None, r"cond is None; this model's samples are padded, so give Padded\(mask, cond\)"),
        ("padded", Padded(MASK[:, :4]), r"cond.mask must be bool of shape \(3, 5\)"),
        ("padded", Padded(MASK.astype(np.float32)), r"cond.mask must be bool of shape \(3, 5\)"),
        ("vector", Padded(MASK), r"cond is Padded, but this model's samples have no padding"),
        ("vector", np.zeros((3, 2), np.float32), r"num_classes is 0"),
        ("vector context", np.zeros((3, 2), np.float32), r"needs one vector per sample, as floats of shape \(3, 3\)"),
        ("vector context", np.array([0, 1, 2]), r"needs one vector per sample"),
        ("classes", ContextTokens(np.zeros((3, 1, 1)), np.ones((3, 1), bool)), r"set its context, or give labels"),
        ("image from image", np.zeros((3, 4, 4, 1), np.float32), r"needs one image per sample"),
    ],
)
def test_a_condition_that_does_not_fit_is_refused(name, cond, message, untyped):
    flow, params, x, _ = case(name)
    with pytest.raises(ValueError, match=message):
        flow.apply(params, x, cond, method="log_prob")
    with pytest.raises(ValueError, match=message):
        sample(flow, params, jax.random.key(0), 3, cond)
