"""`invert` and `sample`: from noise to images in one compiled program per call signature."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Key

from flowgen.attention import causal_kernel
from flowgen.conditioning import TextCondition, unconditional
from flowgen.decoding.guidance import Guidance, linear_rule, product_rule
from flowgen.decoding.jacobi import Conditioner, solve
from flowgen.decoding.plan import DecodePlan, Jacobi, Plan, Sequential, resolve_plan
from flowgen.flows.affine import reorder, to_noise
from flowgen.flows.block import block_parameters, decoding_block, each_frame
from flowgen.flows.density import denoise as tweedie
from flowgen.nn.layers import master_dtype


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
    config = flow.config
    expected = (config.num_tokens, config.token_dim)
    if z.ndim != 3 or z.shape[1:] != expected:
        raise ValueError(f"z has shape {tuple(z.shape)}; this flow takes (batch, {expected[0]}, {expected[1]}).")
    cond = config.check_cond(cond, z.shape[0])
    z = jnp.asarray(z, master_dtype(config.dtype))
    guidance, weights = _active(guidance, cond, config)
    null = None if guidance is None else config.check_null(null, z.shape[0])
    plan = _resolve(plan, guidance, config, z.shape[0])
    return _invert(flow, params, z, (cond, null), weights, plan=plan, guidance=guidance, certify=certify)


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
    config = flow.config
    if num < 1:
        raise ValueError(f"num is {num}; ask for at least one sample.")
    cond = config.check_cond(cond, num)
    guidance, weights = _active(guidance, cond, config)
    null = None if guidance is None else config.check_null(null, num)
    plan = _resolve(plan, guidance, config, num)
    learned = denoise if isinstance(denoise, Denoiser) else None
    strength = 0.0 if isinstance(denoise, Denoiser) else float(denoise)
    if not 0 <= strength < float("inf"):
        raise ValueError(f"denoise is {denoise}; it must be True, False, a strength of at least 0, or a Denoiser.")
    indices = first + jnp.arange(num)
    return _sample(
        flow,
        params,
        key,
        indices,
        (cond, null),
        weights,
        strength,
        None if learned is None else learned.variables,
        plan=plan,
        guidance=guidance,
        score_step=strength > 0 and config.noise_std > 0,
        denoiser=None if learned is None else learned.function,
        certify=certify,
    )


def _active(guidance: Guidance | None, cond: Any, config: Any) -> tuple[Guidance | None, Any]:
    """Guidance as compiled in (its numbers taken out) and its numbers; None where it would change nothing."""
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
    rows = batch * (1 if guidance is None else 2)
    return resolve_plan(plan, num_blocks=config.num_blocks, rows=rows)


@partial(jax.jit, static_argnames=("flow", "plan", "guidance", "certify"))
def _invert(flow, params, z, conds, weights, *, plan, guidance, certify) -> Inversion:
    return _decode(flow, params, z, conds, weights, plan, guidance, certify)


@partial(jax.jit, static_argnames=("flow", "plan", "guidance", "score_step", "denoiser", "certify"))
def _sample(
    flow, params, key, indices, conds, weights, strength, learned, *, plan, guidance, score_step, denoiser, certify
) -> Inversion:
    shape = (flow.config.num_tokens, flow.config.token_dim)
    master = master_dtype(flow.config.dtype)
    noise = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape, master))(indices)
    z = noise * jnp.sqrt(flow.apply(params, method="prior_variance"))[None]
    result = _decode(flow, params, z, conds, weights, plan, guidance, certify)
    x = result.x
    if score_step:
        x = tweedie(flow, params, x, conds[0], strength=strength)
    if denoiser is not None:
        x = denoiser(learned, x, conds[0])
    return result._replace(x=x, finite=jnp.isfinite(x).all(axis=tuple(range(1, x.ndim))))


def _decode(flow, params, z, conds, weights, plan, guidance, certify) -> Inversion:
    reports, errors = [], []
    tokens = z
    for index in reversed(range(len(plan.blocks))):
        noise = tokens
        guided = guidance if guidance is not None and index in guidance.blocks else None
        block = _Block(flow, params, index, conds, guided, weights)
        tokens, solution = block.decode(noise, plan.blocks[index])
        reports.append(solution)
        if certify and guidance is not None:
            errors.append(jnp.abs(block.encode(tokens) - noise).max(axis=(1, 2)))
    x = flow.to_images(tokens)
    if certify and guidance is None:
        errors.append(jnp.abs(flow.apply(params, x, conds[0], method="forward")[0] - z).max(axis=(1, 2)))
    reports.reverse()
    width = max(len(r.sweeps) for r in reports)
    return Inversion(
        x=x,
        sweeps=jnp.stack([jnp.pad(r.sweeps, (0, width - len(r.sweeps))) for r in reports]),
        residual=jnp.stack([r.residual for r in reports]).max(axis=0),
        overflows=jnp.stack([r.overflows for r in reports]).sum(axis=0),
        finite=jnp.isfinite(x).all(axis=tuple(range(1, x.ndim))),
        error=jnp.stack(errors).max(axis=0) if certify else None,
    )


class _Block:
    """One block of a flow with its condition and guidance filled in."""

    def __init__(self, flow, params, index, conds, guidance, weights):
        self.config = flow.config.blocks[index]
        self.module, self.params = decoding_block(self.config, block_parameters(params, index))
        self.guidance, self.weights = guidance, weights
        self.cond, null = conds if self.config.is_conditional else (None, None)
        if guidance is not None and self.cond is not None:
            both = self.cond, unconditional(self.cond, null)
            self.cond = jax.tree.map(lambda *parts: jnp.concatenate(parts), *both)

    def call(self, method, *args):
        return self.module.apply(self.params, *args, method=method)

    def decode(self, z, plan):
        """Raster-order tokens and the report of the solver."""
        frames = self.config.frames
        tokens, solution = self._decode(each_frame(z, frames), plan)
        residual = solution.residual.reshape(len(z), frames).max(axis=1)
        overflows = solution.overflows.reshape(len(z), frames).sum(axis=1)
        return tokens.reshape(z.shape), solution._replace(residual=residual, overflows=overflows)

    def _decode(self, z, plan):
        plan = Jacobi(window=1, tol=0.0) if isinstance(plan, Sequential) else plan
        v = reorder(z, self.config.order)
        conditioner = Conditioner(self.window, self.module.rewind)
        free = self.module.num_free
        solution = solve(
            conditioner,
            self.call("first_previous", v),
            v[:, free:],
            lambda length: self.prefill(len(z), length),
            plan,
        )
        tokens = jnp.concatenate([v[:, :free], solution.x], axis=1)
        return reorder(tokens, self.config.order), solution

    def encode(self, x):
        """Raster-order noise of tokens by one parallel pass, guidance included: the certificate of `decode`."""
        u = reorder(each_frame(x, self.config.frames), self.config.order)
        free = self.module.num_free
        shift, log_scale, _ = self.window(self.call("previous", u), 0, None)
        z, _ = to_noise(u[:, free:], shift, log_scale)
        return reorder(jnp.concatenate([u[:, :free], z], axis=1), self.config.order).reshape(x.shape)

    def prefill(self, batch, length):
        """Caches for `length` tokens behind the condition's prefix, both branches where guided."""
        branches = 1 if self.guidance is None else 2
        return self.call("prefill", branches * batch, length, self.cond, self.inverse_temperature(batch))

    def inverse_temperature(self, batch):
        if self.guidance is None:
            return None
        dtype = master_dtype(self.config.transformer.dtype)
        return jnp.where(jnp.arange(2 * batch) < batch, 1.0, 1.0 / self.weights[1]).astype(dtype)

    def window(self, previous, start, cache):
        """(shift, log_scale, caches) of the tokens after `previous`, both branches in one pass where guided."""
        if self.guidance is None:
            return self.call("conditioner", previous, start, self.cond, cache, None)
        batch, width = previous.shape[:2]
        scale, _ = self.weights
        both = jnp.concatenate([previous, previous])
        cold = self.inverse_temperature(batch)
        shift, log_scale, cache = self.call("conditioner", both, start, self.cond, cache, cold)
        conditional = shift[:batch], log_scale[:batch]
        unconditional = shift[batch:], log_scale[batch:]
        tokens = start + jnp.arange(width) + self.module.num_free
        ramp = tokens / max(self.config.num_tokens - 1, 1) if self.guidance.anneal else jnp.ones(width)
        weight = (scale * ramp)[:, None].astype(both.dtype)
        if self.guidance.rule == "product":
            return *product_rule(conditional, unconditional, weight), cache
        return *linear_rule(conditional, unconditional, weight, self.guidance.parts), cache
