"""Laws of contexts, over a table of velocity networks and kinds of contexts."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows
from laws import drawn
from tolerances import NETWORK, assert_close

from flowgen import matching as fm
from flowgen.conditioning import ContextTokens, TextCondition, drop_condition
from flowgen.contexts import ImageContext, TokenContext, VectorContext, check_condition
from flowgen.matching.conditions import as_condition, is_conditional
from flowgen.matching.loss import rows_of
from flowgen.matching.mean_flow import guided_target
from flowgen.nn import init

DIT = {"image_size": 4, "channels": 2, "width": 32, "num_layers": 2, "head_dim": 16, "remat": False}
UNET = {
    "image_size": 4,
    "channels": 2,
    "width": 8,
    "multipliers": (1, 2),
    "num_groups": 4,
    "head_dim": 8,
    "dropout": 0.0,
}
VECTOR, TOKENS = VectorContext(dim=5), TokenContext(length=3, dim=5)
SAME = ImageContext(image_size=4, channels=1, patch_size=2)
OTHER = ImageContext(image_size=(6, 4), channels=1, patch_size=2)
NETWORKS = {
    "mlp, vector": fm.MLPConfig(dim=3, width=16, context=VECTOR),
    "mlp, tokens": fm.MLPConfig(dim=3, width=16, context=TOKENS, intervals=True),
    "dit, vector": fm.DiTConfig(**DIT, context=VECTOR),
    "dit, tokens": fm.DiTConfig(**DIT, context=TOKENS, intervals=True),
    "dit nala, tokens": fm.DiTConfig(**{**DIT, "remat": True}, context=TOKENS, attention="nala"),
    "dit soft, tokens": fm.DiTConfig(**DIT, context=TOKENS, attention="soft"),
    "dit, image of the same size": fm.DiTConfig(**DIT, context=SAME),
    "dit, image of another size": fm.DiTConfig(**DIT, context=OTHER),
    "unet, vector": fm.UNetConfig(**UNET, context=VECTOR),
    "unet, tokens": fm.UNetConfig(**UNET, context=TOKENS),
    "unet, image": fm.UNetConfig(**UNET, context=SAME),
}
RARE = ("dit nala, tokens", "dit soft, tokens", "unet, vector", "unet, tokens", "unet, image")
each = pytest.mark.parametrize("name", rows(NETWORKS, RARE))
BATCH = 4


@cache
def case(name):
    """Returns (network, perturbed variables, t, x, context), in which row 1 has padding and row 2 no context."""
    config = NETWORKS[name]
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    variables = drawn(init, config.build(), jax.random.key(0), scale=0.1)
    context = config.context
    mask = np.ones((BATCH, context.length), bool)
    mask[1, 1:] = False
    mask[2] = False
    given = ContextTokens(normal(BATCH, context.length, context.dim), jnp.asarray(mask))
    return config.build(), variables, jnp.linspace(0, 1, BATCH), normal(BATCH, *config.event_shape), given


@cache
def compiled(name):
    return jax.jit(case(name)[0].apply)


@each
def test_a_context_matters_and_padding_does_not_even_if_it_is_nan(name):
    _, variables, t, x, given = case(name)
    run = compiled(name)
    out = run(variables, t, x, given)
    assert out.shape == x.shape
    moved = run(variables, t, x, given._replace(tokens=given.tokens + 1))
    change = jnp.abs(moved - out).reshape(BATCH, -1).max(axis=1)
    assert (change[jnp.array([0, 1, 3])] > 1e-3).all()
    np.testing.assert_array_equal(moved[2], out[2])
    spoilt = given._replace(tokens=jnp.where(given.mask[:, :, None], given.tokens, jnp.nan))
    np.testing.assert_array_equal(run(variables, t, x, spoilt), out)


@each
def test_rows_of_contexts_stay_with_their_samples(name):
    _, variables, t, x, given = case(name)
    order = jnp.array([2, 0, 3, 1])
    out = compiled(name)(variables, t, x, given)
    permuted = jax.tree.map(lambda z: z[order], (t, x, given))
    assert_close(compiled(name)(variables, *permuted), out[order], NETWORK)


@each
def test_none_and_a_dropped_context_are_unconditional(name):
    _, variables, t, x, given = case(name)
    run = compiled(name)
    none = run(variables, t, x, None)
    dropped = drop_condition(jax.random.key(0), given, None, 1.0)
    assert_close(run(variables, t, x, dropped), none, NETWORK)
    assert_close(run(variables, t, x, given)[2], none[2], NETWORK, scale=jnp.abs(none).max())
    assert not is_conditional(dropped).any()


@each
def test_every_parameter_and_every_token_gets_a_gradient(name):
    network, variables, t, x, given = case(name)
    interval = (jnp.full(BATCH, 0.3),) if getattr(network.config, "intervals", False) else ()

    @jax.jit
    @partial(jax.grad, argnums=(0, 1))
    def gradient(variables, tokens):
        return jnp.square(network.apply(variables, t, x, given._replace(tokens=tokens), *interval) - 1).sum()

    of_variables, of_tokens = gradient(variables, given.tokens)
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_variables):
        assert jnp.abs(leaf).max() > 0, jax.tree_util.keystr(path)
    np.testing.assert_array_equal(jnp.abs(of_tokens).max(axis=2) > 0, given.mask)


@pytest.mark.parametrize("name", rows(["mlp, tokens", "dit, tokens", "unet, tokens"], ("unet, tokens",)))
def test_neither_the_order_of_tokens_nor_more_padding_has_an_effect(name):
    network, variables, t, x, given = case(name)
    out = compiled(name)(variables, t, x, given)
    longer = dataclasses.replace(network.config, context=dataclasses.replace(TOKENS, length=6)).build()
    spread = ContextTokens(jnp.zeros((BATCH, 6, 5)), jnp.zeros((BATCH, 6), bool))
    places = jnp.array([4, 0, 3])
    spread = jax.tree.map(lambda wide, narrow: wide.at[:, places].set(narrow), spread, given)
    assert_close(jax.jit(longer.apply)(variables, t, x, spread), out, NETWORK)


@pytest.mark.parametrize("name", rows(["mlp, vector", "mlp, tokens", "dit, tokens"], ("dit, tokens",)))
def test_guidance_of_weight_zero_is_the_conditional_field_and_guidance_is_linear(name):
    _, variables, t, x, given = case(name)
    run = compiled(name)
    velocity = lambda t, x, cond: run(variables, t, x, cond)  # noqa: E731
    conditional = velocity(t, x, given)
    assert_close(fm.guided(velocity, weight=0.0)(t, x, given), conditional, NETWORK)
    guided = fm.guided(velocity, weight=2.0)(t, x, given)
    assert_close(guided, 3 * conditional - 2 * velocity(t, x, None), NETWORK)
    x1, _ = fm.integrate(fm.guided(velocity, weight=1.0), x, given, method="euler", num_steps=2)
    assert jnp.isfinite(x1).all()
    assert fm.log_prob(velocity, x, given, key=jax.random.key(0), num_steps=1).shape == (BATCH,)


def embed(params, points):
    """A user's embedding network of sets: features of every point."""
    return jnp.tanh(points @ params["kernel"] + params["bias"][None, None])


@pytest.mark.parametrize("name", rows(["dit, tokens", "dit, vector", "dit, image of the same size"], ("dit, vector",)))
def test_gradients_reach_an_embedding_network_that_is_trained_jointly(name, x64):
    config = dataclasses.replace(NETWORKS[name], dtype="float64")
    network, given = config.build(), case(name)[-1]
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), case(name)[1])
    params = {"kernel": rng.standard_normal((2, config.context.dim)), "bias": rng.standard_normal(config.context.dim)}
    direction = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), params)
    points = jnp.asarray(rng.standard_normal((*given.mask.shape, 2)))
    batch = {"x1": jnp.asarray(rng.standard_normal((BATCH, *config.event_shape)))}
    batch |= {"x0": batch["x1"][::-1], "cond": ContextTokens(points, given.mask)}
    loss_fn = fm.flow_matching_loss(label_dropout=0.3)

    @jax.jit
    def loss(params):
        def velocity(t, x, cond):
            return network.apply(variables, t, x, cond._replace(tokens=embed(params, cond.tokens)))

        return loss_fn(velocity, batch, jax.random.key(0))[0]

    step = 1e-4
    ends = [loss(jax.tree.map(lambda a, b, s=s: a + s * b, params, direction)) for s in (step, -step)]
    slope = sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), jax.grad(loss)(params), direction)))
    assert abs(slope) > 1e-6
    # The embedding of the time and the times themselves stay float32; the difference is of second order in the step.
    assert_close(slope, (ends[0] - ends[1]) / (2 * step), 1e-4)


def test_the_objective_accepts_raw_contexts_and_compiles_once():
    network, variables, _, x, _ = case("dit, image of the same size")
    traces = []

    def pairs(key, batch):
        traces.append(None)
        return {"x1": batch["x"], "cond": batch["image"]}

    loss_fn = fm.flow_matching_loss(label_dropout=0.5, coupling=fm.MinibatchOT())
    objective = jax.jit(fm.matching_objective(network, loss_fn, pairs))
    batch = {"x": x, "image": x[..., :1]}
    losses = [objective(variables, batch, jax.random.key(seed))[0] for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert len(traces) == 1


@pytest.mark.parametrize("coupling", [fm.Independent(), fm.MinibatchOT(), fm.MinibatchOT(method="sinkhorn")])
def test_contexts_stay_with_their_data_and_are_dropped_by_row(coupling):
    # Every value of a sample's context is the sample itself.
    x1 = jnp.arange(64.0)[:, None]
    cond = {"vector": x1, "tokens": ContextTokens(jnp.tile(x1[:, None], (1, 3, 1)), jnp.ones((64, 3), bool))}

    def pairs_of(cond, rate=0.0):
        rows = rows_of({"x1": x1}, jax.random.key(0))
        return fm.draw_pairs(rows, {"x1": x1, "cond": cond}, coupling, label_dropout=rate)

    kept = pairs_of(cond)
    np.testing.assert_array_equal(kept.cond["vector"], kept.x1)
    np.testing.assert_array_equal(kept.cond["tokens"].tokens[:, 0], kept.x1)
    for one in (cond["vector"], cond["tokens"], TextCondition(*cond["tokens"])):
        pairs = pairs_of(one, 0.5)
        np.testing.assert_array_equal(pairs.cond.tokens[:, 0], pairs.x1)
        assert 0.25 < is_conditional(pairs.cond).mean() < 0.75
        np.testing.assert_array_equal(pairs_of(jnp.arange(64), 0.5).cond != -1, is_conditional(pairs.cond))


def test_semidiscrete_transport_takes_the_context_of_each_partner():
    y = jnp.array([[0.0], [10.0]])
    coupling = fm.SemidiscreteOT(y, jnp.zeros(2), labels={"vector": y, "label": jnp.arange(2)})
    x0 = jnp.array([[9.0], [1.0], [8.0]])
    pairs = coupling(jax.random.key(0), x0, x0, {"vector": x0, "label": jnp.zeros(3, jnp.int32)})
    np.testing.assert_array_equal(pairs.cond["vector"], pairs.x1)
    np.testing.assert_array_equal(pairs.cond["label"], [1, 0, 1])


def test_mean_flow_guides_only_samples_with_a_context():
    x, given = jnp.ones((3, 2)), ContextTokens(jnp.ones((3, 1, 1)), jnp.array([[True], [False], [True]]))
    field = lambda t, x, cond, interval: x * cond.mask.astype(x.dtype)  # noqa: E731
    v = guided_target(field, jnp.zeros(3), x, given, 3 * x, weight=0.5)
    np.testing.assert_allclose(v, [[4.5, 4.5], [3.0, 3.0], [4.5, 4.5]])


def test_networks_without_a_context_have_their_old_parameters():
    # Numbers of parameters before networks had contexts.
    for config, num in (
        (fm.MLPConfig(dim=3, width=16), 675),
        (fm.DiTConfig(**DIT), 49768),
        (fm.UNetConfig(**UNET), 64338),
    ):
        leaves = jax.tree.leaves_with_path(jax.eval_shape(lambda c=config: init(c.build(), jax.random.key(0))))
        assert sum(leaf.size for _, leaf in leaves) == num
        assert not any("context" in jax.tree_util.keystr(path) for path, _ in leaves)


X, LABELS = jnp.zeros((2, 3)), jnp.zeros(2, jnp.int32)
REFUSED = {
    "classes and a context": (lambda: fm.MLPConfig(num_classes=3, context=VECTOR), "one condition, so set num_classes"),
    "image in an MLP": (lambda: fm.MLPConfig(context=SAME), "an MLP accepts no images"),
    "image of another size in a U-Net": (
        lambda: fm.UNetConfig(**UNET, context=OTHER),
        "context has image_size (6, 4), but image_size is 4; resize",
    ),
    "vector of another size": (lambda: check_condition(NETWORKS["mlp, vector"], X, 2), "floats of shape (2, 5)"),
    "labels for a context": (
        lambda: check_condition(NETWORKS["mlp, vector"], LABELS, 2),
        "cond is int32 of shape (2,)",
    ),
    "a context for no context": (
        lambda: check_condition(fm.MLPConfig(), ContextTokens(X[:, None], X[:, :1] > 0), 2),
        "cond is ContextTokens",
    ),
    "tokens of another number": (
        lambda: check_condition(NETWORKS["dit, tokens"], ContextTokens(X[:, None], X[:, :1] > 0), 2),
        "floats of shape (2, 3, 5)",
    ),
    "images of another size": (
        lambda: check_condition(NETWORKS["unet, image"], jnp.zeros((2, 4, 5, 1)), 2),
        "floats of shape (2, 4, 4, 1)",
    ),
    "images to drop": (lambda: as_condition(jnp.zeros((2, 4, 4, 1))), "config.context.tokens(cond, b)"),
    "contexts as classes": (
        lambda: fm.MinibatchOT(class_aware=True)(None, X, X, ContextTokens(X[:, None], X[:, :1] > 0)),
        "cond is a ContextTokens; class_aware transport needs one label per sample",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_conditions_that_do_not_fit_are_refused_in_one_sentence(what, untyped):
    run, part = REFUSED[what]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        run()
    assert part in str(error.value)
    assert len(str(error.value)) < 400
