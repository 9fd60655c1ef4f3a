"""Feature maps φ, applied to each query and key separately. Linear attention uses the products φ(q)·φ(k) as weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from flowgen.attention.checks import concrete
from flowgen.attention.equality import ByFields
from flowgen.attention.prefix import Features
from flowgen.attention.rotary import Rotary, rotate
from flowgen.backend import keep_axes

DirectionMap = Literal["split", "cosine"]
Map = Callable[[Array, Array], Array]

NORM_EPS = 1e-12  # added inside square roots, so that the norm of a zero vector has a finite gradient
MAX_SHIFT = 60.0  # e^60 and 1e-6 e^60 are well within the range of float32
FOCUSED_FLOOR = 1e-6  # as in the released FLatten: keeps every relu feature positive


@dataclass(frozen=True, eq=False)
class FeatureMap(ByFields):
    """The feature map φ of linear attention, which consists of a function for queries and a function for keys.

    Each function accepts queries or keys x `b n h k` and their positions `n`, counted from 0, and returns features
    `b n h p`. The products of query features and key features must be nonnegative, because linear attention uses them
    as weights.

    query: the function for queries.
    key: the function for keys.
    query_scale: a function of the queries that returns the factors `b n h` by which `query` multiplies its features to
    prevent underflow; None means that there are none. Linear attention multiplies eps by the same factors, so that they
    cancel.
    rotary: the angles by which the features are rotated in the numerator of linear attention, but not in its
    normaliser; None means no rotation.
    max_length: the largest number of tokens in a sequence; None means no limit. If `rotary` is set, the number of its
    positions is the limit instead. Tokens beyond the limit cause a ValueError or, if positions are traced, have NaN
    features.

    If the functions depend on positions, you must set `rotary` or `max_length`. Two maps are equal if their fields are
    equal; JAX arrays are equal only if they are the same object. A map can be pickled if its functions can be.
    """

    query: Map
    key: Map
    query_scale: Callable[[Array], Array] | None = None
    rotary: Rotary | None = None
    max_length: int | None = None

    def __post_init__(self):
        _check_map("query", self.query)
        _check_map("key", self.key)

    @property
    def positional(self) -> bool:
        """Whether features may depend on a token's position, which is so if `rotary` or `max_length` is set."""
        return self.rotary is not None or self.max_length is not None

    @property
    def limit(self) -> int | None:
        """The largest number of tokens in a sequence; None if there is no limit."""
        return self.max_length if self.rotary is None else len(self.rotary.cos)

    def __call__(
        self,
        q: Float[Array, "b n h k"],
        k: Float[Array, "b m g k"],
        start: int | Int[Array, ""] | Int[Array, " b"] = 0,
    ) -> Features:
        """Returns the features, in at least float32, of tokens at the consecutive positions start, start + 1, ...

        start: the position of the first token, one for the whole batch or one per sample.
        """
        q, k = _at_least_float32(q), _at_least_float32(k)
        if not self.positional and jnp.ndim(start):
            start = 0
        if jnp.ndim(start):  # shard `start` over a mesh like the batch
            start = keep_axes(lambda x, q: x, start, q, named=[(q, "b n h k"), (k, "b m g k")], out="b")
        mapped_q, turned_q = self._tokens(self.query, q, start)
        mapped_k, turned_k = self._tokens(self.key, k, start)
        return Features(turned_q, turned_k) if self.rotary is None else Features(turned_q, turned_k, mapped_q, mapped_k)

    def _tokens(self, phi: Map, x: Array, start: int | Array) -> tuple[Array, Array]:
        """Returns the features of queries or keys, and the same features rotated by the table if there is one."""
        limit = self.limit
        if limit is not None:
            _check_length(start, x.shape[1], limit)
        place = jnp.arange(x.shape[1])
        if jnp.ndim(start):
            positions = jnp.asarray(start)[:, None] + place[None]
            mapped = jax.vmap(lambda x, positions: phi(x[None], positions)[0])(x, positions)
        else:
            positions = start + place
            mapped = phi(x, positions)
        if limit is not None:
            exists = positions < limit if positions.ndim == 2 else (positions < limit)[None]
            mapped = jnp.where(exists[..., None, None], mapped, jnp.nan)
        return mapped, mapped if self.rotary is None else rotate(mapped, self.rotary, positions)


def elu_plus_one() -> FeatureMap:
    """Returns the feature map φ(x) = elu(x) + 1 (Katharopoulos et al. 2020, arXiv 2006.16236).

    Example:
        out = linear_attention(q, k, v, elu_plus_one())
    """
    return _same(_elu_plus_one)


def relu_features(power: int = 1) -> FeatureMap:
    """Returns the feature map φ(x) = relu(x)^power.

    In linear attention, the output of a query is 0 if φ(q)·φ(k) is 0 for all keys k.

    Example:
        out = linear_attention(q, k, v, relu_features(power=2))
    """
    return _same(_Relu(power))


def focused_features(power: float = 3.0, scale: float | Array = 1.0, *, joint_heads: bool = False) -> FeatureMap:
    """Returns the feature map φ(x) = ‖y‖ y^power / ‖y^power‖ with y = (relu(x) + 1e-6) / scale.

    This is the map of FLatten (arXiv 2308.00442). Powers are elementwise, and ‖·‖ is the L2 norm over the channels of
    one head.

    scale: a positive number, or an array of positive numbers that broadcasts to `b n h k`.
    joint_heads: if True, each norm is over the channels of all heads together, as in the released code.

    Example:
        out = linear_attention(q, k, v, focused_features(power=3.0))
    """
    return _same(_Focused(power, scale, joint_heads))


def nala_features(
    power: float | Float[Array, "#h"] = 3.0,
    offset: float | Float[Array, "#h"] = 0.5,
    direction_map: DirectionMap = "split",
    *,
    temperature: float = 1.0,
    rotary: Rotary | None = None,
) -> FeatureMap:
    """Returns the norm-aware feature map of NaLaFormer (arXiv 2506.21137), which has two features per channel.

        φ(q) = |d(q)|^(power·(offset + tanh ‖q‖)) · D(d(q)),    φ(k) = |k|^power · D(d(k)),    d(x) = x / ‖x‖

    Here ‖·‖ is the L2 norm over channels, and all other operations in these formulas are elementwise. D returns two
    factors per channel, concatenated as [first factors; second factors].

    power, offset: one number, or one per head; both may be learned.
    direction_map: "split" means D(d) = [d > 0; d < 0], as in the released code. "cosine" means D(d) = [cos a; sin a]
    with a = π/4 · tanh(temperature · d), as in the paper. Any other value raises ValueError.
    temperature: as it grows, the products φ(q)·φ(k) of "cosine" approach those of "split", which ignores it.
    rotary: see `FeatureMap`.

    To prevent underflow, the features of each query are also multiplied by a factor that cancels in linear attention.

    Example:
        out = linear_attention(q, k, v, nala_features(rotary=rotary_grid(14, 14, 64)))
    """
    if direction_map not in ("split", "cosine"):
        raise ValueError(f"direction_map must be 'split' or 'cosine', not {direction_map!r}.")
    nala = _Nala(power, offset, direction_map, temperature)
    return FeatureMap(nala.query, nala.key, nala.query_scale, rotary)


def cosformer_features(max_length: int) -> FeatureMap:
    """Returns cosFormer's feature map (arXiv 2202.08791).

    At position i, counted from 0, φ(x) = [relu(x) cos(π i / 2M); relu(x) sin(π i / 2M)] with M = max_length, where [a;
    b] concatenates channels. In the paper, M is the length of the sequence. Here it is fixed, so that decoding token by
    token gives the same outputs as attention over the whole sequence.

    max_length: M, the largest number of tokens in a sequence, at least 1; see `FeatureMap` for longer sequences.

    Example:
        out = linear_attention(q, k, v, cosformer_features(max_length=1024), is_causal=True)
    """
    if max_length < 1:
        raise ValueError(f"max_length, the largest number of tokens, must be at least 1, not {max_length}.")
    phi = _Cosformer(max_length)
    return FeatureMap(phi, phi, max_length=max_length)


def _elu_plus_one(x: Array, positions: Array) -> Array:
    return jax.nn.elu(x) + 1


@dataclass(frozen=True, eq=False)
class _Relu(ByFields):
    power: int

    def __call__(self, x, positions):
        return jax.nn.relu(x) ** self.power


@dataclass(frozen=True, eq=False)
class _Focused(ByFields):
    power: float
    scale: float | Array
    joint_heads: bool

    def __call__(self, x, positions):
        axes = (-2, -1) if self.joint_heads else (-1,)
        y = (jax.nn.relu(x) + FOCUSED_FLOOR) / self.scale
        # Dividing by the largest entry prevents all the powers from underflowing at once. The divisor cancels in
        # sharp / |sharp| and in the gradients.
        sharp = (y / jax.lax.stop_gradient(y.max(axis=axes, keepdims=True))) ** self.power
        return sharp * (_norm(y, axes) / _norm(sharp, axes))


@dataclass(frozen=True, eq=False)
class _Cosformer(ByFields):
    max_length: int

    def __call__(self, x, positions):
        angle = (jnp.pi / 2 * positions / self.max_length)[None, :, None, None].astype(x.dtype)
        positive = jax.nn.relu(x)
        return jnp.concatenate([positive * jnp.cos(angle), positive * jnp.sin(angle)], axis=-1)


@dataclass(frozen=True, eq=False)
class _Nala(ByFields):
    """The query and key functions of the map that `nala_features` returns."""

    power: float | Array
    offset: float | Array
    direction_map: DirectionMap
    temperature: float

    def query(self, q, positions):
        log, shift = self._logs(q)
        return self._directed(jnp.where(q != 0, jnp.exp(self._exponent(q) * log + shift), 0), q)

    def key(self, k, positions):
        return self._directed(signless_power(k, per_head(self.power, k)), k)

    def query_scale(self, q):
        return jnp.exp(self._logs(_at_least_float32(q))[1])[..., 0]

    def _directed(self, magnitude, x):
        if self.direction_map == "split":
            return jnp.concatenate([jnp.where(x > 0, magnitude, 0), jnp.where(x < 0, magnitude, 0)], axis=-1)
        angle = jnp.pi / 4 * jnp.tanh(self.temperature * x / _norm(x, (-1,)))
        return jnp.concatenate([magnitude * jnp.cos(angle), magnitude * jnp.sin(angle)], axis=-1)

    def _exponent(self, q):
        return per_head(self.power, q) * (per_head(self.offset, q) + jnp.tanh(_norm(q, (-1,))))

    def _logs(self, q):
        """Returns log |d(q)|, with 0 in place of -inf, and a shift that raises each token's largest log feature to 0.

        The shift is at most 60.
        """
        nonzero = q != 0
        log = jnp.where(nonzero, jnp.log(jnp.where(nonzero, jnp.abs(q / _norm(q, (-1,))), 1)), 0)
        top = jnp.where(nonzero, log, -jnp.inf).max(axis=-1, keepdims=True)
        top = jnp.where(jnp.isfinite(top), top, 0)
        # The factor exp(shift) cancels, so it needs no gradient.
        return log, jax.lax.stop_gradient(jnp.minimum(-self._exponent(q) * top, MAX_SHIFT))


def signless_power(x: Array, power: float | Array) -> Array:
    """Returns |x|^power for any positive power, with value 0 and finite gradients at x = 0."""
    nonzero = x != 0
    return jnp.where(nonzero, jnp.where(nonzero, jnp.abs(x), 1) ** power, 0)


def per_head(value: float | Array, x: Float[Array, "b n h k"]) -> Array:
    """Returns a parameter, reshaped so that it broadcasts to `b n h k`.

    value: one number, one per head (`h`), or one per head and channel (`h k`). Raises ValueError for other shapes.
    """
    value = jnp.asarray(value, x.dtype)
    if value.ndim == 0:
        return value
    want = x.shape[2 : 2 + value.ndim]
    if value.ndim > 2 or any(have not in (1, size) for have, size in zip(value.shape, want, strict=True)):
        raise ValueError(
            f"power or offset has shape {value.shape}, but (heads, width) is {x.shape[2:]}; pass one number, one per "
            "head, or one per head and channel."
        )
    return value[None, None, :, None] if value.ndim == 1 else value[None, None]


def _check_map(name: str, phi: Map) -> None:
    try:
        signature = inspect.signature(phi)
    except (TypeError, ValueError):  # the function has no signature to inspect
        return
    try:
        signature.bind(None, None)
    except TypeError:
        raise ValueError(
            f"{name} has the signature {signature}, but must be a function of (x, positions), such as "
            f"`lambda x, positions: ...`."
        ) from None


def _check_length(start: int | Array, num_tokens: int, limit: int) -> None:
    starts = concrete(jnp.asarray(start))
    if starts is None or not isinstance(num_tokens, int):
        return
    end = int(starts.max(initial=0)) + num_tokens
    if end > limit:
        raise ValueError(f"there are {end} tokens, but the feature map has {limit} positions; create one with more.")


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
    """Returns the feature map with the given name in `FEATURE_MAPS`; returns a `FeatureMap` unchanged.

    Raises ValueError if `features` is an unknown name or has another type.

    Example:
        phi = feature_map("nala")
    """
    if isinstance(features, FeatureMap):
        return features
    if not isinstance(features, str) or features not in FEATURE_MAPS:
        raise ValueError(
            f"feature map {features!r} is unknown; choose one of {', '.join(FEATURE_MAPS)}, or pass a FeatureMap. "
            "For pola, inline and retention, use flowgen.attention.kernel instead."
        )
    return FEATURE_MAPS[features]
