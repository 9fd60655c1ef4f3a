"""`invert` and `sample`: from noise to images in one compiled program per call signature."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from flowgen.arrays import check_count, check_floating, check_key, shown
from flowgen.attention import causal_kernel
from flowgen.conditioning import TextCondition
from flowgen.decoding.block import DecodingBlock
from flowgen.decoding.guidance import Guidance
from flowgen.decoding.jacobi import Solution
from flowgen.decoding.plan import DecodePlan, MovingJacobi, Plan, resolve_plan
from flowgen.flows.density import check_flow
from flowgen.flows.density import denoise as tweedie
from flowgen.nn.layers import master_dtype
from flowgen.sharding import check_unmapped, keep_rows


class Denoiser(NamedTuple):
    """A learned denoiser in place of the score step: clean = function(variables, noisy, cond), images all of them.

    Example:
        r = sample(flow, params, key, 16, labels, denoise=Denoiser(network.apply, network_variables))
    """

    function: Callable[..., Float[Array, "b *event"]]
    variables: Any


class Inversion(NamedTuple):
    """Images and the account of how they were decoded.

    x: images `b height width c`, not clipped.
    sweeps: network passes per block (data side first) and window; 0 where a block has fewer windows.
    residual: largest change in the last sweep over all blocks and windows, max norm; 0 where exact by count.
    overflows: iterates that were not finite or beyond 1e6 on the way. finite: whether x is finite.
    error: None, or with `certify` the largest |forward(x) - z| over tokens, before denoising. Under guidance, which
    has no forward pass, the largest such difference of any one guided block.
    """

    x: Float[Array, "b *event"]
    sweeps: Int[Array, "blocks windows"]
    residual: Float[Array, " b"]
    overflows: Int[Array, " b"]
    finite: Bool[Array, " b"]
    error: Float[Array, " b"] | None


def invert(
    flow: Any,
    params: Any,
    z: Float[Array | np.ndarray, "b n c"],
    cond: Integer[Array | np.ndarray, " b"] | list[int] | TextCondition | None = None,
    *,
    plan: Plan | str = "sequential",
    guidance: Guidance | None = None,
    null: TextCondition | None = None,
    certify: bool = False,
) -> Inversion:
    """Returns the images whose `forward` is z, decoded by `plan` and steered by `guidance`.

    z: noise tokens in raster order, as `forward` gives them. null: the text of the unconditional branch of guidance,
    one or `b`, for flows of texts. certify: run one forward pass on the result and report
    the reconstruction error, guidance included. Raises ValueError where z, cond, plan or guidance do
    not fit the flow. The scale and temperature of guidance can change without recompiling.

    Example:
        r = invert(flow, params, z, cond, plan=Jacobi(window=32))
    """
    check_flow(flow, params)
    check_floating("z", z)
    config = flow.config
    expected = (config.num_tokens, config.token_dim)
    if z.ndim != 3 or z.shape[1:] != expected:
        raise ValueError(f"z has shape {tuple(z.shape)}; this flow takes (batch, {expected[0]}, {expected[1]}).")
    z = jnp.asarray(z, master_dtype(config.dtype))
    plan, guidance, conds, weights = steering(config, z.shape[0], cond, plan, guidance, null)
    check_unmapped("decoding", (params, z, conds))
    decode = partial(_invert, flow, plan=plan, guidance=guidance, certify=certify)
    return keep_rows(decode, params, z, conds, weights)


def sample(
    flow: Any,
    params: Any,
    key: Key[Array, ""],
    num: int,
    cond: Integer[Array | np.ndarray, " b"] | list[int] | TextCondition | None = None,
    *,
    plan: Plan | str = "auto",
    guidance: Guidance | None = None,
    null: TextCondition | None = None,
    denoise: bool | float | Denoiser = True,
    first: int = 0,
    certify: bool = False,
) -> Inversion:
    """Returns `num` images drawn from the flow, with the noise it was trained under removed.

    null: as for `invert`. denoise: one score step x + strength · σ² ∇ log p(x | cond), σ from the flow's config; a
    number is the strength; or a learned `Denoiser`.
    first: index of the first image. Image i depends on (key, i) alone, so a large job can be cut anyhow.
    Raises ValueError as `invert` does, and where `num` is not positive.

    Example:
        r = sample(flow, params, jax.random.key(0), 16, labels, guidance=Guidance(scale=1.5))
    """
    check_flow(flow, params)
    check_key(key)
    check_count("num", num)
    config = flow.config
    plan, guidance, conds, weights = steering(config, num, cond, plan, guidance, null)
    how, numbers = denoising(denoise, config)
    indices = first + jnp.arange(num)
    check_unmapped("sampling", (params, key, conds))
    draw = partial(_sample, flow, plan=plan, guidance=guidance, how=how, certify=certify)
    return keep_rows(draw, params, key, indices, conds, weights, numbers)


def steering(
    config: Any, batch: int, cond: Any, plan: Plan | str, guidance: Guidance | None, null: TextCondition | None
) -> tuple[DecodePlan, Guidance | None, tuple, tuple[float, float] | None]:
    """Returns plan and guidance as compiled in, (condition, null), and the numbers of guidance, all of them checked.

    Example:
        plan, guidance, conds, weights = steering(flow.config, 4, labels, "auto", Guidance(scale=1.5), None)
    """
    cond = config.check_cond(cond, batch)
    guidance, weights = _active(guidance, cond, config)
    null = None if guidance is None else config.check_null(null, batch)
    return _resolve(plan, guidance, config, batch), guidance, (cond, null), weights


def _active(guidance: Guidance | None, cond: Any, config: Any) -> tuple[Guidance | None, Any]:
    """Guidance as compiled in (its numbers taken out) and its numbers; None where it would change nothing."""
    if guidance is not None and not isinstance(guidance, Guidance):
        raise ValueError(f"guidance is {shown(guidance)}; give Guidance(scale=...), or None.")
    if guidance is None or guidance.scale == 0 or (guidance.temperature == 1 and cond is None):
        return None, None
    blocks = tuple(range(config.num_blocks)) if guidance.blocks is None else guidance.blocks
    outside = [index for index in blocks if not 0 <= index < config.num_blocks]
    if outside:
        raise ValueError(f"guidance blocks name {outside[0]}; this flow has blocks 0..{config.num_blocks - 1}.")
    if guidance.temperature == 1:  # then the two branches of a block without condition are the same
        blocks = tuple(index for index in blocks if config.blocks[index].is_conditional)
    if not blocks:
        return None, None
    attention = config.blocks[0].transformer.attention
    if guidance.temperature != 1 and not causal_kernel(attention).has_temperature:
        raise ValueError(
            f"guidance temperature is {guidance.temperature}; {attention!r} attention has none, unlike softmax; "
            "set it to 1."
        )
    static = Guidance(scale=1.0, rule=guidance.rule, parts=guidance.parts, blocks=blocks, anneal=guidance.anneal)
    return static, (float(guidance.scale), float(guidance.temperature))


def _resolve(plan: Plan | str, guidance: Guidance | None, config: Any, batch: int) -> DecodePlan:
    guided = () if guidance is None or guidance.blocks is None else guidance.blocks
    rows = [batch * block.frames * (2 if index in guided else 1) for index, block in enumerate(config.blocks)]
    resolved = resolve_plan(plan, rows=rows)
    attention = config.blocks[0].transformer.attention
    if any(isinstance(block, MovingJacobi) for block in resolved.blocks) and not causal_kernel(attention).has_slots:
        raise ValueError(
            f"plan has a MovingJacobi; the running state of {attention!r} attention cannot be taken up at any token, "
            "unlike the cache of softmax; use Jacobi or Sequential."
        )
    return resolved


@partial(jax.jit, static_argnames=("flow", "plan", "guidance", "certify"))
def _invert(flow, params, z, conds, weights, *, plan, guidance, certify) -> Inversion:
    return _decode(flow, params, z, conds, weights, plan, guidance, certify)


@partial(jax.jit, static_argnames=("flow", "plan", "guidance", "how", "certify"))
def _sample(flow, params, key, indices, conds, weights, numbers, *, plan, guidance, how, certify) -> Inversion:
    shape = (flow.config.num_tokens, flow.config.token_dim)
    master = master_dtype(flow.config.dtype)
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape, master))(indices)
    z = noise * jnp.sqrt(flow.apply(params, method="prior_variance"))[None]
    result = _decode(flow, params, z, conds, weights, plan, guidance, certify)
    step = partial(tweedie, flow, params)
    return with_finite(result._replace(x=denoised(step, result.x, conds[0], how, numbers)))


class Removal(NamedTuple):
    """How noise is removed, as compiled in: by a score step or not, by a learned function or None."""

    score_step: bool
    function: Callable[..., Array] | None


def denoising(denoise: bool | float | Denoiser, config: Any) -> tuple[Removal, tuple[float, Any]]:
    """Returns how noise is removed and with what: the strength of a score step and the variables of a denoiser.

    Example:
        how, numbers = denoising(True, flow.config)
    """
    if isinstance(denoise, Denoiser):
        return Removal(False, denoise.function), (0.0, denoise.variables)
    strength = float(denoise) if isinstance(denoise, bool | int | float | np.number) else -1.0
    if not 0 <= strength < float("inf"):
        raise ValueError(
            f"denoise is {shown(denoise)}; it must be True, False, a strength of at least 0, or a Denoiser."
        )
    return Removal(strength > 0 and config.noise_std > 0, None), (strength, None)


def denoised(step: Callable[..., Array], x: Array, cond: Any, how: Removal, numbers: tuple[Any, Any]) -> Array:
    """Returns x without its noise; step(x, cond, strength=) -> x is the score step of the flow.

    Example:
        x = denoised(partial(density.denoise, flow, params), x, labels, *denoising(True, flow.config))
    """
    strength, variables = numbers
    if how.score_step:
        x = step(x, cond, strength=strength)
    return x if how.function is None else how.function(variables, x, cond)


def _decode(flow, params, z, conds, weights, plan, guidance, certify) -> Inversion:
    tokens, solutions, errors = decode_blocks(
        flow, params, z, conds, weights, plan, guidance, certify and guidance is not None
    )
    x = flow.to_images(tokens)
    if certify and guidance is None:
        errors.append(jnp.abs(flow.apply(params, x, conds[0], method="forward")[0] - z).max(axis=(1, 2)))
    return report(x, solutions, errors)


def decode_blocks(flow, params, tokens, conds, weights, plan: DecodePlan, guidance, certify):
    """Returns tokens that the blocks which `plan` speaks of make of noise, their solutions, and certificates if any.

    Example:
        x, solutions, errors = decode_blocks(flow, params, z, (labels, None), None, plan, None, certify=False)
    """
    solutions, errors = [], []
    for index in reversed(range(len(plan.blocks))):
        noise = tokens
        block = DecodingBlock(flow, params, index, conds, guidance, weights)
        tokens, solution = block.decode(noise, plan.blocks[index])
        solutions.append(solution)
        if certify:
            errors.append(jnp.abs(block.encode(tokens) - noise).max(axis=(1, 2)))
    return tokens, solutions[::-1], errors


def report(x: Array, solutions: list[Solution], errors: list[Array]) -> Inversion:
    """Returns images with what their blocks, data side first, have to report.

    Example:
        r = report(flow.to_images(tokens), solutions, errors)
    """
    width = max(len(r.sweeps) for r in solutions)
    return with_finite(
        Inversion(
            x=x,
            sweeps=jnp.stack([jnp.pad(r.sweeps, (0, width - len(r.sweeps))) for r in solutions]),
            residual=jnp.stack([r.residual for r in solutions]).max(axis=0),
            overflows=jnp.stack([r.overflows for r in solutions]).sum(axis=0),
            finite=jnp.ones(len(x), bool),
            error=jnp.stack(errors).max(axis=0) if errors else None,
        )
    )


def with_finite(result: Inversion) -> Inversion:
    """Returns the result with `finite` as its images are now.

    Example:
        r = with_finite(r._replace(x=clean))
    """
    return result._replace(finite=jnp.isfinite(result.x).all(axis=tuple(range(1, result.x.ndim))))
