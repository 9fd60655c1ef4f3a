"""Published linear attention methods for arrays `b n h k`: NaLaFormer, FLatten, cosFormer, PolaFormer and InLine."""

from __future__ import annotations

from jaxtyping import Array, Float

from flowgen.attention.causal import Causal
from flowgen.attention.checks import check_heads
from flowgen.attention.features import DirectionMap, cosformer_features, focused_features, nala_features
from flowgen.attention.kernels import InlineKernel, PolaKernel
from flowgen.attention.linear import EPS, linear_attention


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
    """Returns norm-aware linear attention (NaLaFormer, arXiv 2506.21137).

    mask, is_causal: see `linear_attention`.
    power, offset, direction_map: see `nala_features`.
    eps: added to the normaliser, the sum of a query's weights. The released layer adds 1e-6 to the mean weight over m
    keys, which corresponds to eps = m * 1e-6.

    For rotary features, another temperature of the direction map "cosine", or packed segments, call
    `linear_attention(q, k, v, nala_features(...), ...)` instead. Raises ValueError if shapes, dtypes, the mask or
    direction_map are invalid.

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
    """Returns focused linear attention (FLatten, arXiv 2308.00442).

    mask, is_causal: see `linear_attention`.
    power, joint_heads: see `focused_features`.
    eps: added to the normaliser, the sum of a query's weights.

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
    """Returns cosFormer's linear attention (arXiv 2202.08791), whose weights decrease with the distance between tokens.

    mask, is_causal: see `linear_attention`.
    max_length: M of `cosformer_features`, the largest number of queries or keys; with more, the function raises
    ValueError. In the released layer, M is the number of queries or the number of keys, whichever is larger.
    eps: added to the normaliser, the sum of a query's weights. The released layer instead raises the normaliser to at
    least 1e-6, which is the same as eps=0 unless nearly all of a query's weights are 0.

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
    """Returns polarity-aware linear attention (PolaFormer, arXiv 2501.15061), without the gate of PolaFormer's layer.

    Let q+ = relu(q)^power and q- = relu(-q)^power, and likewise k+ and k-. The first half of the channels of v is
    averaged with the weights [q+; q-]·[k+; k-], to which equal signs contribute. The second half is averaged with the
    weights [q-; q+]·[k+; k-], to which opposite signs contribute. Each half has its own normaliser.

    mask, is_causal: see `linear_attention`.
    power: a positive number or, if there are as many key heads as query heads, an array of positive numbers with axes
    `h` or `h k`.
    eps: added to each normaliser, the sum of a query's weights. The released layer adds 1e-6 to the mean weight over m
    keys, which corresponds to eps = m * 1e-6.

    Raises ValueError if the width of v is odd, or if shapes, dtypes or the mask are invalid.

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
    """Returns injective linear attention (InLine, arXiv 2412.06590), without the convolution of InLine's layer.

    If query q attends to N keys, the weight of key k_j is scale q·k_j / N - mean_j(scale q·k_j / N) + 1/N. The weights
    of a query sum to 1 and may be negative. A query that attends to no key has output 0.

    mask, is_causal: see `linear_attention`.
    scale: None means (width of k)^-0.5.

    Example:
        out = inline_attention(q, k, v)
    """
    return InlineKernel(scale).attend(q, k, v, mask=mask, is_causal=is_causal)
