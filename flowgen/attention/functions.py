"""Published linear attention methods for arrays `b n h k`: NaLaFormer, FLatten, cosFormer, PolaFormer and InLine."""

from __future__ import annotations

from jaxtyping import Array, Float

from flowgen.attention.checks import check_heads
from flowgen.attention.features import DirectionMap, cosformer_features, focused_features, nala_features
from flowgen.attention.kernels import InlineKernel, PolaKernel
from flowgen.attention.linear import EPS, Causal, linear_attention


def nala_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m g k"],
    v: Float[Array, "b m g d"],
    mask: Array | None = None,
    is_causal: bool | Causal = False,
    power: float | Array = 3.0,
    offset: float | Array = 0.5,
    direction_map: DirectionMap = "split",
    *,
    eps: float = EPS,
) -> Float[Array, "b n h d"]:
    """Returns norm-aware linear attention (NaLaFormer, arXiv 2506.21137); see `nala_features` for the other options.

    eps: added to the sum of the weights. The released layer adds 1e-6 to the mean weight over m keys, which corresponds
    to eps = m * 1e-6.

    For rotary features, a temperature for the cosine map, or packed segments, use `linear_attention(q, k, v,
    nala_features(...), ...)`. Raises ValueError if shapes or the mask do not match.

    Example:
        out = nala_attention(q, k, v, is_causal=True)
    """
    features = nala_features(power, offset, direction_map)
    return linear_attention(q, k, v, features, mask=mask, is_causal=is_causal, eps=eps)


def focused_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m g k"],
    v: Float[Array, "b m g d"],
    mask: Array | None = None,
    is_causal: bool | Causal = False,
    power: float = 3.0,
    *,
    joint_heads: bool = False,
    eps: float = EPS,
) -> Float[Array, "b n h d"]:
    """Returns focused linear attention (FLatten, arXiv 2308.00442); see `focused_features` for `power`.

    joint_heads: whether to compute the norms over all heads together, as in the released layer, instead of per head.
    eps: added to the sum of the weights.

    Example:
        out = focused_attention(q, k, v, power=3.0)
    """
    features = focused_features(power, joint_heads=joint_heads)
    return linear_attention(q, k, v, features, mask=mask, is_causal=is_causal, eps=eps)


def cosformer_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m g k"],
    v: Float[Array, "b m g d"],
    mask: Array | None = None,
    is_causal: bool | Causal = False,
    *,
    max_length: int,
    eps: float = EPS,
) -> Float[Array, "b n h d"]:
    """Returns cosFormer attention (arXiv 2202.08791), whose weights decrease with distance; see `cosformer_features`.

    eps: added to the sum of the weights. The released layer instead clamps this sum to at least 1e-6, which is the
    same as eps=0 except for queries whose weights are nearly all 0. In that layer, max_length is the number of queries
    or the number of keys, whichever is larger. Raises ValueError if there are more tokens than max_length.

    Example:
        out = cosformer_attention(q, k, v, max_length=1024)
    """
    check_heads(q, k, v)
    if isinstance(q.shape[1], int) and max(q.shape[1], k.shape[1]) > max_length:
        raise ValueError(f"there are {max(q.shape[1], k.shape[1])} tokens, but max_length is {max_length}; raise it.")
    return linear_attention(q, k, v, cosformer_features(max_length), mask=mask, is_causal=is_causal, eps=eps)


def pola_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m g k"],
    v: Float[Array, "b m g d"],
    mask: Array | None = None,
    is_causal: bool | Causal = False,
    power: float | Array = 3.0,
    *,
    eps: float = EPS,
) -> Float[Array, "b n h d"]:
    """Returns polarity-aware attention (PolaFormer, arXiv 2501.15061), without its gate.

    With q± = relu(±q)^power and k± = relu(±k)^power, the first half of each value is averaged with the same-sign
    weights [q+; q-]·[k+; k-], and the second half with the opposite-sign weights [q-; q+]·[k+; k-]. Each half has its
    own normaliser.

    power: a positive number, or an array of positive numbers with the shape `h` or `h k`.
    eps: added to the sum of the weights. The released layer adds 1e-6 to the mean weight over m keys, which corresponds
    to eps = m * 1e-6.

    Raises ValueError if the width of v is odd.

    Example:
        out = pola_attention(q, k, v)
    """
    return PolaKernel(power, eps).attend(q, k, v, mask=mask, is_causal=is_causal)


def inline_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m g k"],
    v: Float[Array, "b m g d"],
    mask: Array | None = None,
    is_causal: bool | Causal = False,
    scale: float | None = None,
) -> Float[Array, "b n h d"]:
    """Returns injective linear attention (InLine, arXiv 2412.06590), without its convolution.

    With N keys, the weights are scale q·k_j / N - mean_j(scale q·k_j / N) + 1/N. They sum to one and may be negative.
    In causal attention, N and the means include only the keys up to the query's position.

    scale: None means (width of k)^-0.5.

    Example:
        out = inline_attention(q, k, v)
    """
    return InlineKernel(scale).attend(q, k, v, mask=mask, is_causal=is_causal)
