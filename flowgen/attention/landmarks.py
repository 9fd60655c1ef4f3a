"""A variant of SOFT that has fixed landmarks and can be causal, as a feature map and as a function."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Float

from flowgen.attention.causal import Causal
from flowgen.attention.checks import check_heads, check_mask, hide_keys
from flowgen.attention.equality import ByFields
from flowgen.attention.features import FeatureMap
from flowgen.attention.linear import linear_attention, products
from flowgen.attention.prefix import Features
from flowgen.attention.soft import gaussian_landmark_features


def gaussian_landmark_map(landmarks: Float[Array, "h l k"]) -> FeatureMap:
    """Returns a feature map with one feature, exp(-|x - l|² / (2 √(head width))), for each landmark l of a head.

    landmarks: points in the space of the queries and keys, a separate set for each head. They are the same for all
    inputs, and usually learned.

    Example:
        out, state = prefill(q, k, v, gaussian_landmark_map(landmarks))
    """

    phi = _NearLandmarks(landmarks)
    return FeatureMap(phi, phi)


@dataclass(frozen=True, eq=False)
class _NearLandmarks(ByFields):
    landmarks: Array

    def __call__(self, x, positions):
        return gaussian_landmark_features(x, self.landmarks, whiten=False)


def gaussian_landmark_attention(
    q: Float[Array, "b n h k"],
    k: Float[Array, "b m h k"],
    v: Float[Array, "b m h d"],
    landmarks: Float[Array, "h l k"],
    mask: Array | None = None,
    is_causal: bool | Causal = False,
    *,
    whiten: bool = False,
    ridge: float = 0.01,
) -> Float[Array, "b n h d"]:
    """Returns linear attention with features from fixed landmarks, a variant of SOFT that can be causal.

    mask, is_causal: see `linear_attention`.
    landmarks: see `gaussian_landmark_map`.
    whiten: if False, the features are those of `gaussian_landmark_map`, and the weights of each query are divided by
    their sum. The features of a query or key underflow to 0 if its distance from every landmark is above about 13 (head
    width)^¼; for a query, the output is then 0. If whiten is True, the weights are K(q, L) (K(L, L) + ridge I)⁻¹ K(L,
    k), where L are the landmarks and K(x, y) = exp(-|x - y|² / (2 √(head width))). Weights may then be negative and are
    not divided by their sum; models usually apply a normalisation layer to each head afterwards.
    ridge: used only if whiten is True.

    Raises ValueError if shapes, dtypes or the mask are invalid.

    Example:
        out = gaussian_landmark_attention(q, k, v, landmarks, is_causal=True)
    """
    if not whiten:
        return linear_attention(q, k, v, gaussian_landmark_map(landmarks), mask=mask, is_causal=is_causal)
    check_heads(q, k, v)
    k, v = hide_keys(k, v, check_mask(mask, q, k))
    features = Features(*(gaussian_landmark_features(x, landmarks, ridge=ridge) for x in (q, k)))
    return products(features, v, mask=mask, is_causal=is_causal)[0].astype(v.dtype)
