"""A variant of SOFT that has fixed landmarks and can be causal, as a feature map and as a function."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Array, Float

from flowgen.attention.checks import check_heads, check_mask, hide_keys
from flowgen.attention.equality import ByFields
from flowgen.attention.features import FeatureMap
from flowgen.attention.linear import Causal, linear_attention, products
from flowgen.attention.prefix import Features
from flowgen.attention.soft import gaussian_landmark_features


def gaussian_landmark_map(landmarks: Float[Array, "h l k"]) -> FeatureMap:
    """Returns the positive feature map exp(-|x - l|² / 2√k) for fixed landmarks l, one set per head.

    The landmarks do not depend on the input; they are usually learned.

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
    """Returns a form of SOFT that can be causal: linear attention with features given by fixed landmarks.

    If whiten is False, the function uses the positive features of `gaussian_landmark_map` and normalises as usual. If a
    token is far from every landmark (|x - l| above about 13 k^¼), its features underflow to 0, and its output is 0.

    If whiten is True, the function uses the Nyström kernel K(q, L) (K(L, L) + ridge)⁻¹ K(L, k). This kernel may be
    negative, so the outputs are not normalised; models usually apply a normalisation layer to each head afterwards.

    Raises ValueError if shapes or the mask do not match.

    Example:
        out = gaussian_landmark_attention(q, k, v, landmarks, is_causal=True)
    """
    if not whiten:
        return linear_attention(q, k, v, gaussian_landmark_map(landmarks), mask=mask, is_causal=is_causal)
    check_heads(q, k, v)
    k, v = hide_keys(k, v, check_mask(mask, q, k))
    features = Features(*(gaussian_landmark_features(x, landmarks, ridge=ridge) for x in (q, k)))
    return products(features, v, mask=mask, is_causal=is_causal)[0].astype(v.dtype)
