"""Feature maps: the token-local functions φ of queries and keys whose products are the weights of linear attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flowgen.attention.prefix import Features
from flowgen.attention.rotary import Rotary, rotate

DirectionMap = Literal["split", "cosine"]
Map = Callable[[Array, Array], Array]

NORM_EPS = 1e-12  # inside square roots, so that a zero vector has a norm with a gradient
MAX_SHIFT = 60.0  # e^60 is far inside float32, and so is 1e-6 times it
FOCUSED_FLOOR = 1e-6  # of the released FLatten: keeps every relu feature positive


@dataclass(frozen=True)
class FeatureMap:
    """φ of a kernel: (x, positions) -> features, for queries and for keys, on arrays `b n h k` and `n`.

    Features must be nonnegative for the normaliser to be positive. query_scale: where queries are multiplied by a
    factor per token for the sake of precision, that factor `b n h`, by which eps is multiplied too, so that it
    cancels. rotary: turns the features in the numerator, not in the normaliser. max_length: how many positions there
    are, where there is a limit; tokens beyond it raise ValueError, or become NaN where positions are traced.
    """

    query: Map
    key: Map
    query_scale: Callable[[Array], Array] | None = None
    rotary: Rotary | None = None
    max_length: int | None = None

    @property
    def positional(self) -> bool:
        """Whether features depend on where a token stands."""
        return self.rotary is not None or self.max_length is not None

    def __call__(
        self, q: Float[Array, "b n h k"], k: Float[Array, "b m g k"], start: int | Int[Array, ""] = 0
    ) -> Features:
        """Returns the features of tokens at positions start.., at least float32."""
        positions_q, positions_k = start + jnp.arange(q.shape[1]), start + jnp.arange(k.shape[1])
        mapped_q = self.query(_at_least_float32(q), positions_q)
        mapped_k = self.key(_at_least_float32(k), positions_k)
        limit = self.max_length if self.rotary is None else len(self.rotary.cos)
        if limit is not None:
            _check_length(start, max(q.shape[1], k.shape[1]), limit)
            mapped_q, mapped_k = _until(limit, mapped_q, positions_q), _until(limit, mapped_k, positions_k)
        if self.rotary is None:
            return Features(mapped_q, mapped_k)
        turned_q, turned_k = rotate(mapped_q, self.rotary, positions_q), rotate(mapped_k, self.rotary, positions_k)
        return Features(turned_q, turned_k, mapped_q, mapped_k)


def elu_plus_one() -> FeatureMap:
    """Returns φ(x) = elu(x) + 1 (Katharopoulos et al. 2020, arXiv 2006.16236).

    Example:
        out = linear_attention(q, k, v, elu_plus_one())
    """
    return _same(lambda x, positions: jax.nn.elu(x) + 1)


def relu_features(power: int = 1) -> FeatureMap:
    """Returns φ(x) = relu(x)^power; power 2 is the squared ReLU. A row may have no positive product and gives 0.

    Example:
        out = linear_attention(q, k, v, relu_features(power=2))
    """
    return _same(lambda x, positions: jax.nn.relu(x) ** power)


def focused_features(power: float = 3.0, scale: float | Array = 1.0, *, joint_heads: bool = False) -> FeatureMap:
    """Returns the focused map (FLatten, arXiv 2308.00442): y = (relu(x) + 1e-6) / scale, then |y| y^p / |y^p|.

    scale: positive, a number or an array that broadcasts to `b n h k`. joint_heads: take both norms over all heads
    together, as the released code does, instead of per head.

    Example:
        out = linear_attention(q, k, v, focused_features(power=3.0))
    """
    axes = (-2, -1) if joint_heads else (-1,)

    def phi(x, positions):
        y = (jax.nn.relu(x) + FOCUSED_FLOOR) / scale
        # The largest entry cancels between the norms, also in gradients: divided by it, no power underflows as a whole.
        sharp = (y / jax.lax.stop_gradient(y.max(axis=axes, keepdims=True))) ** power
        return sharp * (_norm(y, axes) / _norm(sharp, axes))

    return _same(phi)


def nala_features(
    power: float | Float[Array, "#h"] = 3.0,
    offset: float | Float[Array, "#h"] = 0.5,
    direction_map: DirectionMap = "split",
    *,
    temperature: float = 1.0,
    rotary: Rotary | None = None,
) -> FeatureMap:
    """Returns the norm-aware map of NaLaFormer (arXiv 2506.21137), 2k features.

        φ(q) = |d(q)|^(power·(offset + tanh|q|)) · D(d(q)),    φ(k) = |k|^power · D(d(k)),    d(x) = x / |x|

    direction_map: D(d) is [d > 0; d < 0] for "split", the released code, and [cos a; sin a] with the angle
    a = π/4 · tanh(temperature · d) for "cosine", the paper; it tends to "split" as the temperature grows.
    power, offset: numbers or one per head, learnable. Powers of queries are taken in log space and divided by the
    largest. Raises ValueError for another direction_map.

    Example:
        out = linear_attention(q, k, v, nala_features(rotary=rotary_grid(14, 14, 64)))
    """
    if direction_map not in ("split", "cosine"):
        raise ValueError(f"direction_map is {direction_map!r}; choose 'split' or 'cosine'.")

    def directed(magnitude, x):
        if direction_map == "split":
            return jnp.concatenate([jnp.where(x > 0, magnitude, 0), jnp.where(x < 0, magnitude, 0)], axis=-1)
        angle = jnp.pi / 4 * jnp.tanh(temperature * x / _norm(x, (-1,)))
        return jnp.concatenate([magnitude * jnp.cos(angle), magnitude * jnp.sin(angle)], axis=-1)

    def exponent(q):
        return per_head(power, q) * (per_head(offset, q) + jnp.tanh(_norm(q, (-1,))))

    def logs(q):
        """log |d(q)|, 0 where it is -inf; and a shift that lifts the token's largest log feature to 0, if it can."""
        nonzero = q != 0
        log = jnp.where(nonzero, jnp.log(jnp.where(nonzero, jnp.abs(q / _norm(q, (-1,))), 1)), 0)
        top = jnp.where(nonzero, log, -jnp.inf).max(axis=-1, keepdims=True)
        top = jnp.where(jnp.isfinite(top), top, 0)
        # The factor exp(shift) cancels, so it takes no part in gradients.
        return log, jax.lax.stop_gradient(jnp.minimum(-exponent(q) * top, MAX_SHIFT))

    def query(q, positions):
        log, shift = logs(q)
        return directed(jnp.where(q != 0, jnp.exp(exponent(q) * log + shift), 0), q)

    def query_scale(q):
        return jnp.exp(logs(_at_least_float32(q))[1])[..., 0]

    def key(k, positions):
        return directed(signless_power(k, per_head(power, k)), k)

    return FeatureMap(query, key, query_scale, rotary)


def cosformer_features(max_length: int) -> FeatureMap:
    """Returns φ(x)_i = [relu(x) cos(π i / 2M); relu(x) sin(π i / 2M)] with M = max_length (cosFormer, 2202.08791).

    M is a constant, so that decoding agrees with the parallel form; products are nonnegative for positions < M.

    Example:
        out = linear_attention(q, k, v, cosformer_features(max_length=1024), is_causal=True)
    """
    if max_length < 1:
        raise ValueError(f"max_length is {max_length}; it must be the largest number of tokens, at least 1.")

    def phi(x, positions):
        angle = (jnp.pi / 2 * positions / max_length)[None, :, None, None].astype(x.dtype)
        positive = jax.nn.relu(x)
        return jnp.concatenate([positive * jnp.cos(angle), positive * jnp.sin(angle)], axis=-1)

    return FeatureMap(phi, phi, max_length=max_length)


def signless_power(x: Array, power: float | Array) -> Array:
    """Returns |x|^power, 0 with finite gradients where x is 0, for any positive power.

    Example:
        y = signless_power(k, 3.0)
    """
    nonzero = x != 0
    return jnp.where(nonzero, jnp.where(nonzero, jnp.abs(x), 1) ** power, 0)


def per_head(value: float | Array, x: Float[Array, "b n h k"]) -> Array:
    """Returns a number, one per head (`h`) or per head and channel (`h k`), in the shape that multiplies `b n h k`.

    Raises ValueError for other shapes.

    Example:
        y = per_head(jnp.ones(8), x) * x
    """
    value = jnp.asarray(value, x.dtype)
    if value.ndim == 0:
        return value
    want = x.shape[2 : 2 + value.ndim]
    if value.ndim > 2 or any(have not in (1, size) for have, size in zip(value.shape, want, strict=True)):
        raise ValueError(f"a parameter per head has shape {value.shape}; heads and their width are {x.shape[2:]}.")
    return value[None, None, :, None] if value.ndim == 1 else value[None, None]


def _check_length(start: int | Array, num_tokens: int, limit: int) -> None:
    try:
        end = int(start) + num_tokens
    except jax.errors.ConcretizationTypeError:
        return
    if end > limit:
        raise ValueError(f"there are {end} tokens; the feature map has {limit} positions, so make it for more.")


def _until(limit: int, features: Array, positions: Array) -> Array:
    return jnp.where((positions < limit)[None, :, None, None], features, jnp.nan)


def _same(phi: Map) -> FeatureMap:
    return FeatureMap(phi, phi)


def _at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _norm(x: Array, axes: tuple[int, ...]) -> Array:
    return jnp.sqrt(jnp.square(x).sum(axis=axes, keepdims=True) + NORM_EPS)


FEATURE_MAPS: dict[str, FeatureMap] = {
    "elu_plus_one": elu_plus_one(),
    "relu": relu_features(),
    "squared_relu": relu_features(power=2),
    "focused": focused_features(),
    "nala": nala_features(),
}


def feature_map(features: FeatureMap | str) -> FeatureMap:
    """Returns the feature map itself, or the one of that name; ValueError lists the names there are.

    Example:
        phi = feature_map("nala")
    """
    if isinstance(features, FeatureMap):
        return features
    if features not in FEATURE_MAPS:
        raise ValueError(
            f"features {features!r} are unknown; choose one of {', '.join(FEATURE_MAPS)} or give a FeatureMap "
            "(pola, inline and retention are more than a feature map: flowgen.attention.kernel runs them)."
        )
    return FEATURE_MAPS[features]
