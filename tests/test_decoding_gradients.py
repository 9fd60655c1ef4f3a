"""Derivatives of decoded samples are those of the exact inverse; densities of samples; a flow fitted to an energy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import laws
import numpy as np
import optax
import pytest
from conftest import rows
from tolerances import FORMULA, NETWORK, assert_close

import flowgen
from flowgen.conditioning import TextCondition
from flowgen.decoding import Clip, Guidance, Jacobi, Sequential, SlidingWindow, invert, sample, sample_and_log_prob
from flowgen.flows import STARFlowVConfig

# Six tokens, the first of which a TARFlow passes through. Every second block is reversed.
SMALL = {"image_size": (2, 3), "patch_size": 1, "channels": 1, "dtype": "float64"}
TAR = flowgen.TARFlowConfig(width=8, head_dim=8, num_blocks=2, layers_per_block=1, num_classes=3, **SMALL)
TEXT = flowgen.STARFlowConfig(width=20, head_dim=20, layers_per_block=(1, 1), text_dim=5, text_length=3, **SMALL)
VIDEO = STARFlowVConfig(frames=3, width=20, head_dim=20, layers_per_block=(1, 1), text_dim=5, text_length=3, **SMALL)
VOLUME = dataclasses.replace(TAR, scale_parameterisation="volume_preserving")
NALA = dataclasses.replace(TEXT, attention="nala")
EXACT = (Sequential(), Jacobi(window=4, tol=0.0), Jacobi(tol=0.0, init="zeros"), SlidingWindow(window=4, tol=0.0))


def arrays(config, frames=None):
    """The float64 arrays that samples depend on: parameters, noise, texts, weight of guidance and first frame."""
    _, params = laws.perturbed(config, jax.random.key(0), scale=0.1)
    random = np.random.default_rng(1)
    args = {"params": params, "z": random.standard_normal((2, config.num_tokens, config.token_dim)), "scale": 1.5}
    if config.text_dim:
        args |= {name: random.standard_normal((2, 3, config.text_dim)) for name in ("texts", "null")}
    if frames:
        args["given"] = random.uniform(-1, 1, (2, 1, *config.image_shape))
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), args)


def condition(config, embeddings):
    mask = jnp.arange(3)[None] <= jnp.arange(2)[:, None]
    return TextCondition(embeddings, mask) if config.text_dim else jnp.array([1, 0], jnp.int32)


def decoder(config, plan, rule=None, frames=None):
    """Samples as a function of `arrays`; clips of `frames` frames begin with a given one and need restarts."""
    flow = config.build()

    def decode(args):
        cond, guidance = condition(config, args.get("texts")), None
        if rule:
            null = condition(config, args["null"]) if config.text_dim else None
            guidance = Guidance(scale=args["scale"], rule=rule, anneal=True, null=null)
        if frames is None:
            return invert(flow, args["params"], args["z"], cond, plan=plan, guidance=guidance).x
        clip, key = Clip(frames=frames, context=1, given=args["given"]), jax.random.key(2)
        return sample(flow, args["params"], key, 2, cond, plan=plan, guidance=guidance, clip=clip, denoise=False).x

    return decode


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (TAR, {"plan": Jacobi(window=4, tol=0.0), "rule": "linear"}),
        pytest.param(TEXT, {"plan": SlidingWindow(window=4, tol=0.0)}, marks=SLOW),
        pytest.param(TAR, {"plan": Sequential()}, marks=SLOW),
        pytest.param(VOLUME, {"plan": Jacobi(tol=0.0)}, marks=SLOW),
        pytest.param(TEXT, {"plan": Sequential(), "rule": "product"}, marks=SLOW),
        pytest.param(NALA, {"plan": Jacobi(window=4, tol=0.0)}, marks=SLOW),
        pytest.param(VIDEO, {"plan": SlidingWindow(window=4, tol=0.0)}, marks=SLOW),
        pytest.param(VIDEO, {"plan": Jacobi(tol=0.0, init="previous_frame"), "frames": 6}, marks=SLOW),
        pytest.param(VIDEO, {"plan": Sequential(), "frames": 5, "rule": "product"}, marks=SLOW),
    ],
    ids=str,
)
def test_derivatives_in_both_modes_are_finite_differences(config, options, x64):
    decode, args = decoder(config, **options), arrays(config, options.get("frames"))
    leaves, tree = jax.tree.flatten(args)
    random = np.random.default_rng(3)
    direction = tree.unflatten([jnp.asarray(random.standard_normal(leaf.shape)) for leaf in leaves])

    @jax.jit
    def value(step):
        return decode(jax.tree.map(lambda leaf, change: leaf + step * change, args, direction))

    x = value(0.0)
    weight = jnp.asarray(random.standard_normal(x.shape))

    @jax.jit
    def derivatives(args, direction):
        _, change = jax.jvp(decode, (args,), (direction,))
        slope = jax.grad(lambda args: jnp.vdot(decode(args), weight))(args)
        return change, jax.tree.map(jnp.vdot, slope, direction)

    change, slopes = derivatives(args, direction)
    expected = (value(1e-6) - value(-1e-6)) / 2e-6
    assert_close(change, expected, FORMULA)
    assert_close(sum(jax.tree.leaves(slopes)), jnp.vdot(expected, weight), FORMULA, scale=jnp.abs(expected).sum())
    used = {name for name, slope in slopes.items() if any(float(leaf) != 0 for leaf in jax.tree.leaves(slope))}
    unused = {"z" if "frames" in options else ""} | (set() if "rule" in options else {"scale", "null"})
    assert used == set(args) - unused


@pytest.mark.parametrize("plan", rows(EXACT, EXACT), ids=str)
def test_the_jacobian_is_the_inverse_of_that_of_forward(plan, x64):
    args, cond, flow = arrays(TAR), jnp.array([1, 0], jnp.int32), TAR.build()
    x, back = jax.vjp(lambda z: invert(flow, args["params"], z, cond, plan=plan).x, args["z"])
    size = flow.config.num_dims
    inverses = jax.vmap(back)(jnp.eye(x.size).reshape(x.size, *x.shape))[0].reshape(2, size, 2, size)
    forward = jax.jit(jax.jacfwd(lambda x: laws.apply(flow, args["params"], x, cond)[0]))(x).reshape(2, size, 2, size)
    for index in range(2):
        inverse = jnp.linalg.solve(forward[index, :, index], jnp.eye(size))
        assert_close(inverses[index, :, index], inverse, 1e-10)
        np.testing.assert_array_equal(inverses[index, :, 1 - index], 0)


@SLOW
def test_second_derivatives_are_finite_differences_of_first_ones(x64):
    decode, args = decoder(TAR, Jacobi(window=4, tol=0.0)), arrays(TAR)
    direction = jnp.asarray(np.random.default_rng(4).standard_normal(args["z"].shape))
    slope = jax.jit(jax.grad(lambda z: jnp.square(decode({**args, "z": z})).sum()))
    _, found = jax.jit(lambda z: jax.jvp(slope, (z,), (direction,)))(args["z"])
    expected = (slope(args["z"] + 1e-5 * direction) - slope(args["z"] - 1e-5 * direction)) / 2e-5
    assert_close(found, expected, FORMULA)


@SLOW
def test_a_loose_plan_has_the_derivatives_at_its_own_tokens(x64):
    decode = decoder(TAR, Jacobi(window=4, tol=1e-3))
    exact, args = decoder(TAR, Sequential()), arrays(TAR)
    loose, slopes = (jax.grad(lambda args, f=f: f(args).sum())(args)["z"] for f in (decode, exact))
    assert_close(loose, slopes, 1e-2)


@pytest.mark.parametrize(
    ("config", "plan"),
    [(TAR, Jacobi(tol=0.1)), pytest.param(TEXT, Sequential(), marks=SLOW), pytest.param(VIDEO, "auto", marks=SLOW)],
    ids=["tarflow", "starflow", "video"],
)
def test_samples_come_with_their_density(config, plan):
    config = dataclasses.replace(config, dtype="float32", noise_std=0.3)
    flow, params = laws.perturbed(config, jax.random.key(0))
    cond = laws.labels(config, 3)
    r, log_prob = sample_and_log_prob(flow, params, jax.random.key(1), 3, cond, plan=plan)
    np.testing.assert_array_equal(r.x, sample(flow, params, jax.random.key(1), 3, cond, plan=plan, denoise=False).x)
    assert_close(log_prob, laws.apply(flow, params, r.x, cond, method="log_prob"), NETWORK)


@pytest.mark.parametrize("options", [{"guidance": Guidance(scale=1.0)}, {"denoise": True}], ids=["guidance", "denoise"])
def test_a_density_of_changed_samples_is_refused(options):
    flow, params, _, cond = laws.case("classes")
    (name,) = options
    with pytest.raises(ValueError, match=f"{name} is set, but .* samples have no density"):
        sample_and_log_prob(flow, params, jax.random.key(0), 4, jnp.abs(cond), **options)


@SLOW
def test_a_flow_is_fitted_to_an_energy_by_its_own_samples(x64):
    config = dataclasses.replace(TAR, image_size=(1, 4), num_classes=0)  # four tokens
    flow = config.build()
    params = flowgen.init(flow, jax.random.key(0))
    # A Gaussian chain, E = ½ xᵀ A x, so that the normaliser is known.
    precision = 2 * np.eye(4) - 0.9 * np.eye(4, k=1) - 0.9 * np.eye(4, k=-1)
    log_normaliser = 2 * math.log(2 * math.pi) - 0.5 * np.linalg.slogdet(precision)[1]

    def divergence(params, seed):
        """KL(flow | energy) over 64 samples; with a fixed seed, it is a function of the parameters alone."""
        r, log_prob = sample_and_log_prob(flow, params, jax.random.key(seed), 64)
        x = r.x.reshape(64, 4)
        return (log_prob + 0.5 * jnp.einsum("bi,ij,bj->b", x, precision, x) + log_normaliser).mean()

    optimizer = optax.adam(0.02)

    @jax.jit
    def step(params, state, seed):
        value, slope = jax.value_and_grad(divergence)(params, seed)
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(params, updates), state, value, slope

    state, values = optimizer.init(params), []
    for index in range(120):
        begun = params
        params, state, value, slope = step(params, state, index)
        values.append(float(value))
    assert np.mean(values[:10]) > 0.5
    assert abs(np.mean(values[-30:])) < 0.05  # the mean of 30 x 64 samples of a difference that is nearly 0
    leaves, tree = jax.tree.flatten(slope)
    random = np.random.default_rng(0)
    direction = tree.unflatten([jnp.asarray(random.standard_normal(leaf.shape)) for leaf in leaves])
    sides = [jax.tree.map(lambda leaf, d, h=h: leaf + h * d, begun, direction) for h in (1e-6, -1e-6)]
    above, below = (step(side, state, 119)[2] for side in sides)
    found = sum(jnp.vdot(*pair) for pair in zip(leaves, jax.tree.leaves(direction), strict=True))
    assert_close(found, (above - below) / 2e-6, FORMULA)
