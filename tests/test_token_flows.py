"""Flows on vectors, sequences and sets, and continuous contexts in all flows: laws over a table, mostly in float64."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import laws
import numpy as np
import pytest
from conftest import rows
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from token_cases import (
    ALIKE,
    CASES,
    EXACT,
    MASK,
    ORDER,
    SMALL,
    STAR,
    TOKEN_MASK,
    TOKENS,
    case,
    exists,
    floats,
    in_patches,
    numpy_block,
    sizes,
)
from tolerances import NETWORK, assert_close

from flowgen.conditioning import ContextTokens, Padded, TextCondition
from flowgen.contexts import ImageContext, TokenContext, VectorContext
from flowgen.decoding import (
    Guidance,
    Jacobi,
    LowPrecision,
    Sequential,
    SlidingWindow,
    invert,
    measure_plans,
    sample,
    sample_and_log_prob,
)
from flowgen.flows import AutoregressiveBlock, STARFlowConfig, TARFlowConfig, TokenFlowConfig, block_parameters
from flowgen.flows.jacobi_error import JacobiPenalty, jacobi_penalty
from flowgen.transforms import MixtureMap

PLANS = (Sequential(), Jacobi(window=2, tol=0.0), Jacobi(tol=0.0), SlidingWindow(window=2, tol=0.0))
WITH_CONTEXT = [name for name, (config, _) in CASES.items() if config.context is not None]


def existing_in_order(index):
    """The places of the rows of a sample that exist, in the order of the first permuted block."""
    rows = np.flatnonzero(MASK[index])
    return [rows[number] for number in ORDER if number < len(rows)]


def row(cond, index):
    return jax.tree.map(lambda part: part[index : index + 1], cond)


@pytest.fixture(params=rows(CASES, ALIKE))
def name(request):
    return request.param


def test_logdet_is_slogdet_over_what_exists_and_every_plan_inverts(name, x64):
    flow, params, x, cond = case(name, "float64")
    z, logdet = laws.apply(flow, params, x, cond)

    @jax.jit
    def jacobian(x, cond):
        return jax.jacfwd(lambda x: flow.apply(params, x[None], cond, method="forward")[0][0].reshape(-1))(x)

    for index in range(len(x)):
        kept = sizes(x, cond, index)
        matrix = np.asarray(jacobian(x[index], row(cond, index))).reshape(x[index].size, -1)
        if x.ndim < 4:  # patches have another order of values than images
            assert np.all(matrix[~kept][:, kept] == 0)
            assert np.all(matrix[kept][:, ~kept] == 0)
            matrix = matrix[kept][:, kept]
        np.testing.assert_allclose(logdet[index], np.linalg.slogdet(matrix)[1], atol=EXACT)
    for plan in PLANS:
        r = invert(flow, params, z, cond, plan=plan)
        np.testing.assert_allclose(r.x, x, atol=EXACT)
        assert not r.unsolved.any()


def test_the_density_sums_the_terms_of_the_tokens_that_exist(name, x64):
    flow, params, x, cond = case(name, "float64")
    z, logdet = laws.apply(flow, params, x, cond)
    of_values = -0.5 * (np.square(np.asarray(z)) + np.log(2 * np.pi)).reshape(len(x), -1)
    expected = [of_values[i][sizes(x, cond, i)].sum() + logdet[i] for i in range(len(x))]
    np.testing.assert_allclose(laws.apply(flow, params, x, cond, method="log_prob"), expected, atol=EXACT)
    terms, _ = laws.apply(flow, params, x, cond, method="token_log_prob")
    np.testing.assert_allclose(terms.sum(axis=1), expected, atol=EXACT)


def test_samples_have_the_density_that_is_returned_with_them(name, key):
    flow, params, x, cond = case(name)
    r, log_prob = sample_and_log_prob(flow, params, key, 3, cond)
    assert r.x.shape == x.shape
    assert_close(laws.apply(flow, params, r.x, cond, method="log_prob"), log_prob, NETWORK)
    np.testing.assert_array_equal(r.x, exists(r.x, cond))
    last = sample(flow, params, key, range(2, 3), row(cond, 2), denoise=False).x
    assert_close(last[0], r.x[2], NETWORK)


@pytest.mark.parametrize("name", rows(WITH_CONTEXT, ALIKE))
def test_without_a_context_a_sample_is_unconditional(name):
    flow, params, x, cond = case(name)
    mask = cond.mask if isinstance(cond, Padded) else None
    inner = cond.cond if isinstance(cond, Padded) else cond
    shape = (3, flow.config.context.length, flow.config.context.dim)
    dropped = ContextTokens(jnp.ones(shape), jnp.zeros(shape[:2], bool))
    none, zero, given = (
        laws.apply(flow, params, x, part if mask is None else Padded(mask, part), method="log_prob")
        for part in (None, dropped, inner)
    )
    assert_close(zero, none, NETWORK)
    assert jnp.abs(given - none).max() > 0.01


@pytest.mark.parametrize(
    "name", ["padded, permuted, context", pytest.param("image from image", marks=pytest.mark.slow)]
)
def test_guidance_by_a_context_is_the_same_for_every_plan_and_changes_samples(name, key):
    flow, params, _, cond = case(name)
    draw = partial(sample, flow, params, key, 3, cond, denoise=False, guidance=Guidance(scale=1.0))
    one = draw(plan=Sequential(), certify=True)
    assert_close(draw(plan=Jacobi(tol=0.0)).x, one.x, NETWORK)
    assert one.error.max() < 1e-4
    assert jnp.abs(one.x - sample(flow, params, key, 3, cond, denoise=False).x).max() > 0.01


def test_padding_of_a_context_does_not_turn_the_rotary_angles_of_a_starflow():
    flow, params, x, _ = case("latents from tokens")
    tokens = jnp.asarray(floats(3, 2, 2), jnp.float32)

    def log_prob(places):
        mask = jnp.zeros((3, 3), bool).at[:, np.array(places)].set(True)
        values = jnp.full((3, 3, 2), 9.0).at[:, np.array(places)].set(tokens)
        return laws.apply(flow, params, x, ContextTokens(values, mask), method="log_prob")

    for places in ((0, 2), (1, 2)):
        assert_close(log_prob(places), log_prob((0, 1)), NETWORK)


def test_annealed_guidance_ends_at_the_last_row_that_exists(key):
    config = TokenFlowConfig(shape=(2, 2), padded=True, num_classes=3, orders="raster", **SMALL)
    _, params = laws.perturbed(config, key, scale=0.2)
    z, labels = jnp.asarray(floats(1, 3, 2), jnp.float32), jnp.array([1])

    def guided(rows):
        sized = dataclasses.replace(config, shape=(rows, 2)).build()
        table = jax.tree.map(lambda part: part, params)
        for block in table["params"].values():
            block["pos_embed"] = jnp.resize(block["pos_embed"], (rows, 16))
        cond = Padded(jnp.arange(rows)[None] < 2, labels)
        return invert(sized, table, z[:, :rows], cond, guidance=Guidance(scale=2.0, anneal=True)).x[:, :2]

    assert_close(guided(3), guided(2), NETWORK)


def test_what_stands_at_padding_does_not_enter_the_penalty_or_the_tuning(key):
    flow, params, x, cond = case("padded")
    states, _ = laws.apply(flow, params, x, cond, method="trajectory")
    broken = jnp.where(cond.mask[:, :, None], x, jnp.nan)
    penalty, _ = jacobi_penalty(flow, params, broken, states, cond, JacobiPenalty(sweeps=1))
    expected, _ = jacobi_penalty(flow, params, x, states, cond, JacobiPenalty(sweeps=1))
    assert_close(penalty, expected, NETWORK)
    found = measure_plans(flow, params, broken, cond, windows=(2,), cost=lambda block, plan: 1.0)
    assert all(np.isfinite(measured.error) for measured in found.measurements)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("padded, permuted, context", "int8"),
        pytest.param("padded mixture", "bfloat16", marks=pytest.mark.slow),
        pytest.param("image from image", "int8", marks=pytest.mark.slow),
        pytest.param("padded, context, running state", "int8", marks=pytest.mark.slow),
    ],
)
def test_a_polish_repairs_what_rounded_weights_decode(name, dtype):
    flow, params, x, cond = case(name)
    z, _ = laws.apply(flow, params, x, cond)
    rounded = invert(flow, params, z, cond, plan=LowPrecision(dtype, polish=None))
    assert jnp.abs(rounded.x - x).max() > 1e-4
    polished = invert(flow, params, z, cond, plan=LowPrecision(dtype, polish=Jacobi(tol=0.0)))
    assert_close(polished.x, x, NETWORK)
    np.testing.assert_array_equal(polished.x, exists(polished.x, cond))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("padded, permuted, context", "Explicit"),
        ("image from image", "Explicit"),
        pytest.param("padded, permuted, context", "Auto", marks=pytest.mark.slow),
        pytest.param("image from image", "Auto", marks=pytest.mark.slow),
    ],
)
def test_sharded_rows_have_the_densities_and_samples_of_one_device(name, kind, key):
    flow, params, x, cond = case(name)
    x, cond = x[:2], jax.tree.map(lambda part: part[:2], cond)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType[kind],), devices=jax.devices()[:2])
    shared = jax.device_put((x, cond), NamedSharding(mesh, PartitionSpec("data")))
    log_prob = partial(laws.apply, flow, params, method="log_prob")
    assert_close(log_prob(*shared), log_prob(x, cond), NETWORK)
    draw = partial(sample, flow, params, key, 2, denoise=False)
    found = draw(cond=shared[1])
    assert len(found.x.sharding.device_set) == 2
    assert_close(found.x, draw(cond=cond).x, NETWORK)


def test_guidance_needs_the_affine_map(key):
    config = TokenFlowConfig(shape=(4,), num_classes=3, mixture=MixtureMap(components=2), **SMALL)
    flow, params = laws.perturbed(config, key)
    with pytest.raises(ValueError, match="it combines affine maps, and this flow has another map; leave it out"):
        sample(flow, params, key, 2, jnp.array([0, 1]), guidance=Guidance(scale=1.0))


def test_a_mixture_flow_has_gradients_of_its_samples(x64):
    flow, params, _, _ = case("mixture", "float64")
    z, direction = jnp.asarray(floats(2, 4, 1, seed=11)), jnp.asarray(floats(2, 4, 1, seed=12))

    def loss(z):
        return jnp.square(invert(flow, params, z, plan=Jacobi(tol=0.0)).x).sum()

    slope = (loss(z + 1e-5 * direction) - loss(z - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(z), direction), slope, rtol=1e-6)  # step², third derivative


@pytest.mark.parametrize(
    ("attention", "orders"),
    [
        ("softmax", "alternating"),
        ("retention", "raster"),
        pytest.param("nala", "alternating", marks=pytest.mark.slow),
        pytest.param("softmax", ((2, 0, 1), (1, 2, 0)), marks=pytest.mark.slow),
    ],
)
def test_padding_never_changes_a_density(attention, orders, x64):
    """Neither its values, its places and its amount in a sample, nor those in a context."""
    config = TokenFlowConfig(
        shape=(3, 2), padded=True, orders=orders, context=TOKENS, attention=attention, dtype="float64", **SMALL
    )
    _, params = laws.perturbed(config, jax.random.key(0), scale=0.2)
    x, tokens = floats(1, 3, 2), floats(1, 2, 2, seed=7)

    def log_prob(places, length, context_places, context_length, filler):
        later = tuple(range(3, length))
        kept = orders if isinstance(orders, str) else tuple((*later, *order) for order in orders)
        longer = dataclasses.replace(config, shape=(length, 2), orders=kept, context=TokenContext(context_length, 2))
        padded = jnp.full((1, length, 2), filler).at[:, np.array(places)].set(x)
        mask = jnp.zeros((1, length), bool).at[:, np.array(places)].set(True)
        values = jnp.full((1, context_length, 2), filler).at[:, np.array(context_places)].set(tokens)
        context_mask = jnp.zeros((1, context_length), bool).at[:, np.array(context_places)].set(True)
        table = {
            name: {**block, "pos_embed": jnp.resize(block["pos_embed"], (length, 16))}
            for name, block in params["params"].items()
        }
        cond = Padded(mask, ContextTokens(values, context_mask))
        return longer.build().apply({"params": table}, padded, cond, method="log_prob")[0]

    expected = log_prob((0, 1, 2), 3, (0, 1), 2, 0.0)
    for arguments in (
        ((0, 1, 2), 5, (0, 1), 2, 0.0),
        ((1, 2, 4), 5, (0, 1), 3, 7.0),
        ((0, 2, 4), 8, (1, 3), 4, -1e3),
        ((5, 6, 7), 8, (2, 4), 5, np.nan),
    ):
        np.testing.assert_allclose(log_prob(*arguments), expected, atol=EXACT)


def test_a_block_sees_only_the_tokens_before_it_in_its_order(x64):
    flow, params, x, cond = case("padded, permuted, context", "float64")
    block = AutoregressiveBlock(flow.config.blocks[0])
    jacobian = jax.jacfwd(lambda x: block.apply(block_parameters(params, 0), x, cond, method="parameters")[0])(x)
    depends = np.abs(np.asarray(jacobian)).sum(axis=(2, 5))  # batch, token, batch, token
    for index in range(len(x)):
        order = existing_in_order(index)
        expected = np.zeros((5, 5), bool)
        for number, place in enumerate(order):
            expected[place, order[:number]] = True
        np.testing.assert_array_equal(depends[index, :, index] > 0, expected)


def test_a_masked_contextual_block_equals_an_independent_formula(x64):
    flow, params, x, cond = case("padded, permuted, context", "float64")
    weights = jax.tree.map(np.asarray, params["params"]["blocks_0"])
    z, logdet = AutoregressiveBlock(flow.config.blocks[0]).apply({"params": weights}, x, cond)
    for index in range(len(x)):
        places = existing_in_order(index)
        tokens = np.asarray(cond.cond.tokens)[index][TOKEN_MASK[index]]
        expected, log_det = numpy_block(weights, np.asarray(x)[index][places], tokens)
        np.testing.assert_allclose(np.asarray(z)[index][places], expected, atol=EXACT)
        np.testing.assert_allclose(logdet[index], log_det, atol=EXACT)


def test_a_block_with_an_image_as_context_equals_an_independent_formula(x64):
    """A patch keeps its position if others are padding."""
    config = TokenFlowConfig(shape=(4, 2), context=ImageContext((4, 6), 1, 2), dtype="float64", **SMALL)
    _, params = laws.perturbed(config, jax.random.key(0), scale=0.2)
    weights = jax.tree.map(np.asarray, params["params"]["blocks_0"])
    x, patches = floats(2, 4, 2, seed=6), np.stack([in_patches(image) for image in floats(2, 4, 6, 1)])
    exists = np.array([[1] * 6, [0, 1, 1, 0, 0, 1]], bool)
    cond = ContextTokens(jnp.asarray(patches), jnp.asarray(exists))
    z, logdet = AutoregressiveBlock(config.blocks[0]).apply({"params": weights}, jnp.asarray(x), cond)
    for index in range(2):
        kept = exists[index]
        table = weights["prefix_pos_embed"][kept]
        expected, log_det = numpy_block(weights, x[index], patches[index][kept], table)
        np.testing.assert_allclose(z[index], expected, atol=EXACT)
        np.testing.assert_allclose(logdet[index], log_det, atol=EXACT)


@pytest.mark.parametrize(
    "build", [TokenFlowConfig, TARFlowConfig, pytest.param(STARFlowConfig, marks=pytest.mark.slow)]
)
def test_the_places_of_patches_matter_even_to_blocks_with_one_layer(build, x64):
    """Halves of an image are swapped, or its only patch is moved.

    The tokens of other contexts have no places, unless positions are rotary.
    """
    size = {"shape": (4,)} if build is TokenFlowConfig else {"image_size": 4, "channels": 1, "patch_size": 2}
    small = {**STAR, **size, "conditioned_blocks": "all"} if build is STARFlowConfig else {**SMALL, **size}
    image = floats(3, 4, 6, 1)
    swapped = np.concatenate([image[:, 2:], image[:, :2]], axis=1)

    def change(context, one, other):
        flow, params = laws.perturbed(build(context=context, dtype="float64", **small), jax.random.key(0))
        x = jnp.asarray(floats(3, *flow.config.event_shape, seed=6))
        conds = (jax.tree.map(jnp.asarray, cond) for cond in (one, other))
        before, after = (laws.apply(flow, params, x, cond, method="log_prob") for cond in conds)
        return np.abs(after - before).min()

    described = ImageContext((4, 6), 1, 2)
    assert change(described, image, swapped) > 1e-5
    patch, places = np.ones((3, 6, 4)), np.eye(6, dtype=bool)
    assert change(described, *(ContextTokens(patch, np.tile(places[i], (3, 1))) for i in (1, 5))) > 1e-5
    tokens, moved = (np.stack([in_patches(one) for one in images]) for images in (image, swapped))
    of_tokens = change(TokenContext(length=6, dim=4), tokens, moved)
    assert of_tokens > 1e-5 if build is STARFlowConfig else of_tokens < EXACT


@pytest.mark.parametrize("dim", [1, 2])
def test_densities_of_few_numbers_integrate_to_1(dim, x64):
    config = TokenFlowConfig(shape=(dim,), context=VectorContext(dim=2), dtype="float64", **SMALL)
    flow, params = laws.perturbed(config, jax.random.key(0), scale=0.2)
    side = np.linspace(-40, 40, 801)
    grid = np.stack(np.meshgrid(*[side] * dim, indexing="ij"), axis=-1)
    cond = np.array([0.3, -1.0])
    log_prob = jax.jit(jax.vmap(lambda x: flow.apply(params, x[None], jnp.asarray(cond)[None], method="log_prob")[0]))
    total = np.exp(jax.lax.map(log_prob, grid.reshape(-1, 801, dim))).sum() * (side[1] - side[0]) ** dim
    # The trapezoidal rule is exact to rounding for smooth densities that vanish at the ends.
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_a_network_that_embeds_the_context_is_trained_with_the_flow(x64):
    flow, params, x, cond = case("padded, permuted, context", "float64")
    sets = jnp.asarray(floats(3, 3, 4, seed=8))

    def loss(matrix):
        context = ContextTokens(jnp.tanh(sets @ matrix), cond.cond.mask)
        return flow.apply(params, x, Padded(cond.mask, context), method="log_prob").sum()

    matrix, direction = jnp.asarray(floats(4, 2, seed=9)), jnp.asarray(floats(4, 2, seed=10))
    slope = (loss(matrix + 1e-5 * direction) - loss(matrix - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(jnp.vdot(jax.grad(loss)(matrix), direction), slope, rtol=1e-6)  # step², third derivative


def test_texts_are_contexts_too():
    flow, params, x, cond = case("padded, permuted, context")
    text = TextCondition(cond.cond.tokens, cond.cond.mask)
    of_text = laws.apply(flow, params, x, Padded(cond.mask, text), method="log_prob")
    np.testing.assert_array_equal(of_text, laws.apply(flow, params, x, cond, method="log_prob"))
