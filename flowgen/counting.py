"""Counts the FLOP, memory traffic and kernels of a jaxpr, and estimates its peak memory.

XLA's own cost analysis counts the body of a loop only once, and its buffer assignment is specific to one backend. The
functions here need no compiler, so their counts are the same on every machine.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Var, jaxprs_in_params

from flowgen import backend

# The name scope of the operations that `jax.checkpoint` recomputes.
RECOMPUTED = "rematted_computation"
OPTIMIZER = "optimizer_update"  # the scope in which a training step calls its optimizer
# Operations whose results XLA does not store, because it fuses them into the operations that use them.
NOT_STORED = frozenset({"broadcast_in_dim", "iota"})
# Operations whose results cannot reuse the memory of an operand.
PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
# Operations that need a kernel of their own, besides products.
LAUNCHED = frozenset(
    {"reduce_max", "reduce_min", "reduce_sum", "cumsum", "cumprod", "dynamic_update_slice", "scatter", "sort"}
)


def flop_of(jaxpr: Jaxpr) -> dict[str, float]:
    """Returns the FLOP of a traced program, grouped by the dtype of the operands.

    A multiplication and the addition after it count as 2 FLOP. Only matrix products, convolutions and fused attention
    are counted, as is usual for model FLOP (arXiv 2204.02311, appendix B). Operations that `jax.checkpoint` recomputes,
    and those of the optimizer, are not counted. The body of a scan is counted once per iteration, and the body of a
    loop of unknown length only once. Of the branches of a conditional, only the most expensive one is counted.

    Example:
        flop = flop_of(jax.make_jaxpr(step)(state, batch).jaxpr)
    """
    total: defaultdict[str, float] = defaultdict(float)
    for eqn in jaxpr.eqns:
        if any(scope in str(eqn.source_info.name_stack) for scope in (RECOMPUTED, OPTIMIZER)):
            continue
        if (count := _FORMULAS.get(_name(eqn))) is not None:
            left, right = [x for x in _arrays(eqn.invars) if jnp.issubdtype(x.dtype, jnp.floating)][:2]
            total[jnp.promote_types(left.dtype, right.dtype).name] += count(eqn)
            continue
        bodies = [flop_of(body) for body in jaxprs_in_params(eqn.params)]
        if eqn.primitive.name == "cond":
            bodies = [max(bodies, key=lambda flop: sum(flop.values()))]
        for body in bodies:
            for dtype, flop in body.items():
                total[dtype] += _iterations(eqn) * flop
    return dict(total)


def peak_of(jaxpr: Jaxpr) -> int:
    """Estimates the peak memory of a traced program, excluding its arguments, in bytes.

    The operations are assumed to run in the order in which they were traced. An array is stored from the operation that
    computes it to the last operation that uses it. A result reuses the memory of an operand that is not used again.
    Compilers fuse and reorder operations, so a compiled program may need less memory, or somewhat more.

    Example:
        size = peak_of(jax.make_jaxpr(jax.grad(loss))(params, batch).jaxpr)
    """
    last = {var: index for index, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if isinstance(var, Var)}
    kept = {var for var in jaxpr.outvars if isinstance(var, Var)}
    stored: dict[Var, int] = {}
    now = peak = 0
    for index, eqn in enumerate(jaxpr.eqns):
        name, used = eqn.primitive.name, {var for var in eqn.invars if isinstance(var, Var)}
        freed = sum(stored.pop(var) for var in used - kept if last[var] == index and var in stored)
        made = {var: _bytes(var.aval) for var in eqn.outvars if var in last or var in kept}
        if name in NOT_STORED:
            made = dict.fromkeys(made, 0)
        out, inside = sum(made.values()), max((peak_of(body) for body in jaxprs_in_params(eqn.params)), default=0)
        # A scan stores the results of all iterations. For other operations, the results of the body are the final
        # results.
        during = out + inside if name == "scan" else max(out, inside)
        peak = max(peak, now + during - (0 if inside or name in PRODUCTS else freed))
        stored |= made
        now += out - freed
    return peak


def traffic_of(jaxpr: Jaxpr) -> float:
    """Returns the bytes that the matrix products of a traced program read and write.

    Each product is assumed to read its operands and to write its result once. All other operations are assumed to be
    fused into the products. The body of a scan is counted once per iteration, and the bodies of other loops once.

    Example:
        traffic = traffic_of(jax.make_jaxpr(step)(state, batch).jaxpr)
    """
    total = 0.0
    for eqn in jaxpr.eqns:
        if _name(eqn) in PRODUCTS:
            total += sum(_bytes(x) for x in _arrays([*eqn.invars, *eqn.outvars]))
        total += _iterations(eqn) * sum(traffic_of(body) for body in jaxprs_in_params(eqn.params))
    return total


def kernels_of(jaxpr: Jaxpr) -> int:
    """Estimates how many kernels an accelerator launches for a traced program.

    Elementwise operations are assumed to be fused into their neighbours. One kernel is counted for each matrix product,
    reduction and update of a part of an array. The body of a scan is counted once per iteration, and the bodies of
    other loops once.

    Example:
        kernels = kernels_of(jax.make_jaxpr(step)(state, batch).jaxpr)
    """
    total = 0
    for eqn in jaxpr.eqns:
        total += _name(eqn) in LAUNCHED or _name(eqn) in _FORMULAS
        total += _iterations(eqn) * sum(kernels_of(body) for body in jaxprs_in_params(eqn.params))
    return total


def bytes_of(tree: Any) -> int:
    """Returns the total size of the arrays in a tree, in bytes. The leaves need only a shape and a dtype.

    Example:
        size = bytes_of(jax.eval_shape(init, key))
    """
    return sum(_bytes(leaf) for leaf in jax.tree.leaves(tree))


def _iterations(eqn: JaxprEqn) -> int:
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name == "pallas_call":
        return math.prod(size for size in eqn.params["grid_mapping"].grid if isinstance(size, int))
    return 1


def _arrays(variables: Sequence[Any]) -> list[Any]:
    """Returns the shapes and dtypes of variables."""
    return [var.aval for var in variables]


def _of_product(eqn: JaxprEqn) -> float:
    (summed, _), _ = eqn.params["dimension_numbers"]
    left, out = _arrays([eqn.invars[0], eqn.outvars[0]])
    return 2.0 * out.size * math.prod(left.shape[axis] for axis in summed)


def _of_convolution(eqn: JaxprEqn) -> float:
    """Returns the FLOP of a convolution. Multiplications by zeros that are inserted between inputs are not counted."""
    kernel, out = _arrays([eqn.invars[1], eqn.outvars[0]])
    channels = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * out.size * kernel.size / channels / math.prod(eqn.params["lhs_dilation"])


def _of_cudnn(eqn: JaxprEqn) -> float:
    """Returns the FLOP of cuDNN's attention, for arrays `b n h k`."""
    q, k = _arrays(eqn.invars[:2])
    return _of_pairs(q, q.shape[1], k.shape[1], is_causal="CAUSAL" in str(eqn.params["mask_type"]))


def _of_splash(eqn: JaxprEqn) -> float:
    """Returns the FLOP of JAX's attention for TPUs, for arrays `h n k` or `b h n k`.

    Causal kernels have an additional operand, the positions of the queries.
    """
    arrays = _arrays(eqn.invars)
    q, k = [x for x in arrays if x.ndim >= 3 and jnp.issubdtype(x.dtype, jnp.floating)][:2]
    is_causal = any(x.ndim == 2 and x.dtype == jnp.int32 for x in arrays)
    return _of_pairs(q, q.shape[-2], k.shape[-2], is_causal=is_causal)


def _of_pairs(q: Any, queries: int, keys: int, *, is_causal: bool) -> float:
    """Returns the FLOP of two products per (query, key) pair.

    For causal attention, counts only the pairs that the sliced form computes, so that a model has the same FLOP in all
    forms.
    """
    return 4.0 * q.size * keys * (backend.causal_share(queries) if is_causal else 1.0)


def _name(eqn: JaxprEqn) -> str:
    """Returns the name of an operation or, for a Pallas call, the name of its kernel."""
    if eqn.primitive.name != "pallas_call":
        return eqn.primitive.name
    return str(eqn.params.get("name_and_src_info") or eqn.params.get("name")).split(" ")[0]


# The backward pass of attention has four products, so each of its two splash kernels counts as two products.
_FORMULAS: dict[str, Callable[[JaxprEqn], float]] = {
    "dot_general": _of_product,
    "conv_general_dilated": _of_convolution,
    "dot_product_attention_fwd_wrapper": _of_cudnn,
    "dot_product_attention_bwd_wrapper": lambda eqn: 2 * _of_cudnn(eqn),
    "splash_mha_fwd_no_residuals": _of_splash,
    "splash_mha_fwd_residuals": _of_splash,
    "splash_mha_dkv_no_residuals": _of_splash,
    "splash_mha_dq_no_residuals": _of_splash,
}


def _bytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize
