"""Estimates the memory and FLOP of training and sampling from shapes, without computing any arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp

from flowgen.batch import Batch, Moments
from flowgen.conditioning import Condition, ContextTokens, Padded, TextCondition
from flowgen.counting import bytes_of, flop_of, peak_of
from flowgen.decoding.plan import DecodePlan, RoundedDtype, rounded_dtypes
from flowgen.decoding.weights import new_rounded_weights, unstacked_weights
from flowgen.experiments.experiment import Experiment, SamplingCost
from flowgen.flows import ClipDenoiser, denoiser_variables
from flowgen.flows.block import AutoregressiveBlock, BlockConfig, block_parameters
from flowgen.training.frozen import trained
from flowgen.training.sharding import bytes_per_device, gathered_bytes
from flowgen.training.step import init_state


class TrainingCost(NamedTuple):
    """The memory and FLOP that training needs on one device, counted from shapes.

    parameters, gradient, moments, average: bytes of the parameters, the gradient, the optimizer's moments and
    the parameter average. With gradient accumulation, `gradient` includes the sum over micro-batches.
    carried: bytes of the rest of the training state.
    stored: bytes of the activations if the backward pass recomputes none of them.
    recomputed: bytes of the activations if the backward pass recomputes each layer; None if the model cannot recompute.
    If the parameters are divided among devices, `stored` and `recomputed` include gathered copies of the kernels.
    recomputes: whether the model is configured to recompute its layers.
    flop: FLOP per sample, without recomputation.
    """

    parameters: int
    gradient: int
    moments: int
    average: int
    carried: int
    stored: int
    recomputed: int | None
    recomputes: bool
    flop: float

    @property
    def state(self) -> int:
        """Bytes of the training state and the gradient, which do not depend on the batch."""
        return self.parameters + self.gradient + self.moments + self.average + self.carried

    @property
    def activations(self) -> int:
        """Bytes of the activations: `recomputed` if the model recomputes its layers, otherwise `stored`."""
        return self.recomputed if self.recomputes and self.recomputed is not None else self.stored


def training_cost(experiment: Experiment, rows: int, axes: Mapping[str, int] | None = None) -> TrainingCost | None:
    """Returns the cost, on one device, of a training step on `rows` samples per device and micro-batch.

    Returns None if the experiment's `rehearsal` returns None.

    axes: the sizes of the axes "fsdp" and "tensor" of the mesh over which the parameters are divided; None if every
    device stores a copy of the parameters.

    The bytes of the training state are exact. The bytes of the activations are an estimate, the peak memory of the
    forward and backward pass without the gradient (see `peak_of`), as if every device computed all heads.

    Example:
        cost = training_cost(load_config("tarflow_digits"), rows=64, axes={"fsdp": 4, "tensor": 1})
    """
    size = bytes_of if axes is None else partial(bytes_per_device, axes=axes)
    has_choice = hasattr(experiment.model, "remat")
    recomputes = has_choice and experiment.model.remat is not False
    activations, flop = {}, 0.0
    for remat in (True, False) if has_choice else (False,):
        model = dataclasses.replace(experiment.model, remat=remat) if has_choice else experiment.model
        variant = dataclasses.replace(experiment, model=model)
        rehearsal = variant.rehearsal(variant.build(), rows)
        if rehearsal is None:
            return None
        objective, key = rehearsal.objective, jax.eval_shape(lambda: jax.random.key(0))
        variables = jax.eval_shape(rehearsal.init, key)

        def gradient(variables, batch, key, objective=objective):
            def loss(params):
                value, *rest = objective({**variables, "params": params}, batch, key)
                return value, rest

            return jax.grad(loss, has_aux=True)(variables["params"])

        traced = jax.make_jaxpr(gradient)(variables, rehearsal.batch, key).jaxpr
        activations[remat] = max(0, peak_of(traced) - bytes_of(variables["params"]))
        flop = _flop(traced)
    train = experiment.train
    one, every = gathered_bytes(_in_dtype(variables["params"], experiment.model), axes) if axes else (0, 0)
    state = jax.eval_shape(
        lambda variables: init_state(variables, experiment.optim, train.steps, frozen=train.frozen), variables
    )
    return TrainingCost(
        parameters=size(state.params),
        gradient=size(trained(state.params, train.frozen)) * (1 + (train.accumulation > 1)),
        moments=size(state.opt_state),
        average=size(state.ema),
        carried=size(state.collections) + size(state.step),
        stored=activations[False] + every,
        recomputed=activations[True] + one if True in activations else None,
        recomputes=recomputes,
        flop=flop / rows,
    )


def _in_dtype(params: Any, model: Any) -> Any:
    """Returns the shapes of parameters in the dtype of a model's matrix products."""
    dtype = getattr(model, "dtype", "float32")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), params)


def decoding_cost(
    flow: Any,
    variables: Any,
    num: int,
    *,
    guided: Collection[int],
    by_score: bool,
    plan: DecodePlan | None = None,
) -> SamplingCost:
    """Returns the cost of decoding `num` samples at a time, token by token.

    variables: the shapes and dtypes of the variables. guided: numbers of the guided blocks, which compute two branches.
    by_score: whether the score of the flow is used to remove the training noise. plan: the plan of each block, used to
    count the rounded weights of low-precision plans; None if no plan has any.

    Decoding token by token computes the matrix products of one forward pass; parallel decoding computes them again in
    each pass. Only one block is decoded at a time, so only its cache is in use. The score needs the activations of all
    blocks.

    Example:
        cost = decoding_cost(flow, jax.eval_shape(lambda: flowgen.init(flow, key)), 16, guided=(), by_score=True)
    """
    config, flop, cache = flow.config, 0.0, 0
    cond, conds = (jax.eval_shape(lambda rows=rows: some_condition(config, rows)) for rows in (1, num))
    tokens = jax.ShapeDtypeStruct((1, config.num_tokens, config.token_dim), jnp.float32)
    known: dict[BlockConfig, float] = {}
    for index, block in enumerate(config.blocks):
        branches, shape = 1 + (index in guided), dataclasses.replace(block, order="raster")
        # Most blocks have the same shape. Each shape is traced only once.
        if shape not in known:
            run = AutoregressiveBlock(shape).apply
            known[shape] = _flop(jax.make_jaxpr(run)(block_parameters(variables, index), tokens, cond).jaxpr)
        flop += branches * known[shape]
        cache = max(cache, branches * _cache_bytes(block))
    memory = num * cache
    if by_score:
        x = jax.ShapeDtypeStruct((num, *config.event_shape), jnp.float32)

        def score(variables, x, cond):
            return jax.grad(lambda x: flow.apply(variables, x, cond, method="log_prob").sum())(x)

        traced = jax.make_jaxpr(score)(variables, x, conds).jaxpr
        flop, memory = flop + _flop(traced) / num, max(memory, peak_of(traced))
    elif getattr(config, "denoiser_layers", 0):
        x = jax.ShapeDtypeStruct((1, *config.event_shape), jnp.float32)
        run = ClipDenoiser(config, parent=None).apply
        traced = jax.make_jaxpr(run)(denoiser_variables(variables), x, cond).jaxpr
        flop, memory = flop + _flop(traced), max(memory, num * peak_of(traced))
    read = weight_bytes(config, variables)
    dtypes = (None,) * config.num_blocks if plan is None else rounded_dtypes(plan)
    return SamplingCost(flop, cache, memory, read[config.dtype] + _rounded_bytes(config, variables, dtypes), read)


def weight_bytes(config: Any, variables: Any) -> dict[str, int]:
    """Returns the bytes of a flow's weights in decoding, and of their rounded copies for `LowPrecision`, by dtype.

    Example:
        weight_bytes(flow.config, params)  # {"float32": ..., "int8": ..., "bfloat16": ...}
    """
    own = bytes_of(jax.eval_shape(lambda variables: unstacked_weights(config, variables), variables))
    others = {dtype: (dtype,) * config.num_blocks for dtype in get_args(RoundedDtype) if dtype != config.dtype}
    return {config.dtype: own} | {dtype: _rounded_bytes(config, variables, dtypes) for dtype, dtypes in others.items()}


def _rounded_bytes(config: Any, variables: Any, dtypes: tuple[RoundedDtype | None, ...]) -> int:
    return bytes_of(jax.eval_shape(lambda variables: new_rounded_weights(config, variables, dtypes), variables))


def some_condition(config: Any, rows: int) -> Condition | None:
    """Returns a placeholder condition for `rows` samples, or None if the flow or network accepts no conditions.

    Example:
        cond = jax.eval_shape(lambda: some_condition(flow.config, 4))
    """
    if getattr(config, "text_dim", 0):
        embeddings = jnp.zeros((rows, config.text_length, config.text_dim))
        return TextCondition(embeddings, jnp.zeros(embeddings.shape[:2], bool))
    cond = jnp.zeros(rows, jnp.int32) if config.num_classes else None
    if described := getattr(config, "context", None):
        tokens = jnp.zeros((rows, described.length, described.dim))
        cond = ContextTokens(tokens, jnp.ones(tokens.shape[:2], bool))
    if getattr(config, "padded", False):
        return Padded(jnp.ones((rows, config.num_tokens), bool), cond)
    return cond


def tokens_of(config: Any, batch: Batch) -> int:
    """Returns the number of tokens in a batch, for a flow with this config; the images may have any size.

    Example:
        tokens = tokens_of(flow.config, batch)
    """
    x = batch.x.mean if isinstance(batch.x, Moments) else batch.x
    return x.size * config.num_tokens // math.prod(config.event_shape)


def _flop(jaxpr: Any) -> float:
    return sum(flop_of(jaxpr).values(), start=0.0)


def _cache_bytes(block: BlockConfig) -> int:
    """Returns the bytes of a block's caches for all frames of one sample."""
    return block.frames * bytes_of(jax.eval_shape(lambda: AutoregressiveBlock(block).init_caches(1, block.num_tokens)))
