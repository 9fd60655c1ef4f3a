"""Flax modules that add projections, gates, norms and convolutions from the papers to the attention functions.

All modules map `b n d` to `b n width`. Modules that can be causal also support decoding with an explicit state:
`init_state(batch)`, `prefill(x, state)` for several tokens and `step(x, state)` for one.
"""

from __future__ import annotations

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from flowgen.attention.causal import Causal, as_causal
from flowgen.attention.checks import check_key_mask
from flowgen.attention.features import DirectionMap, FeatureMap, nala_features
from flowgen.attention.grids import as_image, as_tokens, check_grid, fold, unfold
from flowgen.attention.kernels import FeatureKernel, Kernel, State, kernel
from flowgen.attention.linear import EPS
from flowgen.attention.prefix import LinearState
from flowgen.attention.rotary import rotary_grid, rotary_line
from flowgen.attention.soft import (
    Landmarks,
    Normalization,
    Solver,
    nystrom_attention,
    pool_landmarks,
    pool_landmarks_2d,
    to_kernel_space,
)
from flowgen.backend import gelu, keep_axes

LandmarkKind = Literal["pool", "conv", "conv_norm_gelu"]
NALA_CONV = 5  # kernel size of the depthwise convolution of values
TORCH_LAYER_NORM_EPS = 1e-5


class LinearAttention(nn.Module):
    """Multi-head attention that computes q, k and v with dense layers and attends with a linear-attention kernel.

    width: width of the output, divisible by num_heads.
    kernel: a name in `flowgen.attention.KERNELS`, your own kernel, or a feature map.
    num_kv_heads: number of key heads, a divisor of num_heads; num_heads / num_kv_heads query heads share each key head.
    None means num_heads.
    is_causal: whether attention is causal; a `Causal` sets options. Decoding requires this, with block_size 1.
    use_bias: whether the dense layers have biases.

    Example:
        y = LinearAttention(width=256, num_heads=8, kernel="focused", is_causal=True).apply(params, x)
    """

    width: int
    num_heads: int
    kernel: str | Kernel | FeatureMap = "elu_plus_one"
    num_kv_heads: int | None = None
    is_causal: bool | Causal = False
    use_bias: bool = True
    dtype: DTypeLike | None = None

    def setup(self):
        groups, head_dim = self.num_kv_heads or self.num_heads, head_width(self.width, self.num_heads)
        dense = partial(nn.DenseGeneral, use_bias=self.use_bias, dtype=self.dtype)
        self.query = dense((self.num_heads, head_dim))
        self.key = dense((groups, head_dim))
        self.value = dense((groups, head_dim))
        self.proj = dense(self.width, axis=(-2, -1))

    def __call__(
        self,
        x: Float[Array, "b n d"],
        context: Float[Array, "b m e"] | None = None,
        *,
        mask: Array | None = None,
        segment_ids: Int[Array, "b n"] | None = None,
    ) -> Float[Array, "b n width"]:
        """Returns the layer's output for each token of x.

        context: the tokens to which the tokens of x attend; None means that they attend to each other.
        mask, segment_ids: see `linear_attention`.
        """
        source = x if context is None else context
        q, k, v = self.query(x), self.key(source), self.value(source)
        options = {"mask": mask, "is_causal": self.is_causal, "segment_ids": segment_ids}
        return self.proj(kernel(self.kernel).attend(q, k, v, **options))

    def init_state(self, batch: int) -> State:
        """Returns the state for decoding `batch` sequences from their first token on.

        Raises ValueError unless attention is causal with block_size 1.
        """
        check_decodes(self.is_causal)
        head_dim = head_width(self.width, self.num_heads)
        dtype = self.dtype or jnp.float32
        return kernel(self.kernel).init_state(batch, self.num_kv_heads or self.num_heads, head_dim, head_dim, dtype)

    def prefill(
        self, x: Float[Array, "b n d"], state: State = None, *, mask: Array | None = None
    ) -> tuple[Float[Array, "b n width"], State]:
        """Returns the outputs of the next n tokens of each sequence, and the state after them.

        state: the state after the earlier tokens, if any. mask: a key mask, True for tokens to keep.

        Raises ValueError unless attention is causal with block_size 1.
        """
        check_decodes(self.is_causal)
        out, state = kernel(self.kernel).prefill(self.query(x), self.key(x), self.value(x), state=state, mask=mask)
        return self.proj(out), state

    def step(self, x: Float[Array, "b d"], state: State) -> tuple[Float[Array, "b width"], State]:
        """Returns the output for one more token of each sequence, and the state after it."""
        check_token(x)
        out, state = self.prefill(x[:, None], state)
        return out[:, 0], state


class NaLaState(NamedTuple):
    """Decoding state of `NaLaAttention`: running sums of attention, and recent values for the convolution."""

    attention: LinearState
    values: Float[Array, "b recent d"]


class NaLaAttention(nn.Module):
    """The attention layer of NaLaFormer (arXiv 2506.21137): proj(silu(g) · LayerNorm(NaLa(q, k, v) + conv(v))).

    A dense layer computes q, k, v and the gate g from the input. NaLa is `nala_attention`, conv a depthwise convolution
    and proj a dense layer.

    power, offset, direction_map: see `nala_features`.
    learnable: whether to train power and offset, with a separate value for each head.
    gate, norm, conv: whether the layer has the factor silu(g), LayerNorm, and the summand conv(v), respectively. The
    convolution covers 5 x 5 tokens of the grid or, if is_causal is True, each token and the 4 tokens before it.
    rotary: whether to rotate features by their positions, in the numerator of attention only.
    max_length: the largest number of tokens in a sequence; used only if both is_causal and rotary are True.
    eps: added to the normaliser, the sum of a query's weights; the released code adds n · 1e-6 for n keys.

    Example:
        y = NaLaAttention(width=256, num_heads=4).apply(params, x, grid=(14, 14))
    """

    width: int
    num_heads: int
    is_causal: bool = False
    power: float = 3.0
    offset: float = 0.5
    direction_map: DirectionMap = "split"
    learnable: bool = False
    gate: bool = True
    norm: bool = True
    conv: bool = True
    rotary: bool = True
    max_length: int = 4096
    eps: float = EPS
    dtype: DTypeLike | None = None

    def setup(self):
        head_width(self.width, self.num_heads)
        self.qkvg = nn.Dense((4 if self.gate else 3) * self.width, dtype=self.dtype)
        self.proj = nn.Dense(self.width, dtype=self.dtype)
        if self.norm:
            self.out_norm = nn.LayerNorm(epsilon=TORCH_LAYER_NORM_EPS, dtype=self.dtype)
        if self.conv:
            size = (NALA_CONV,) if self.is_causal else (NALA_CONV, NALA_CONV)
            padding = "VALID" if self.is_causal else "SAME"
            self.value_conv = nn.Conv(
                self.width, size, padding=padding, feature_group_count=self.width, dtype=self.dtype
            )
        if self.learnable:
            self.learned_power = self.param("power", nn.initializers.constant(self.power), (self.num_heads,))
            self.learned_offset = self.param("offset", nn.initializers.constant(self.offset), (self.num_heads,))

    def __call__(
        self, x: Float[Array, "b n d"], grid: tuple[int, int] | None = None, *, mask: Array | None = None
    ) -> Float[Array, "b n width"]:
        """Returns the layer's output.

        grid: (height, width) of the grid of tokens in row-major order; None if is_causal is True. mask: a key mask
        `b 1 1 n`, True for tokens to keep.

        Raises ValueError if the grid does not match the number of tokens, or is missing but required by conv or rotary.
        """
        if self.is_causal:
            if grid is not None:
                raise ValueError(f"grid is {grid}, but causal attention has no grid; leave it out.")
            return self.prefill(x, mask=mask)[0]
        q, k, v, g = self._project(x, mask)
        out = FeatureKernel(self._features(grid, x.shape[1]), self.eps).attend(q, k, v, mask=mask)
        local = None
        if self.conv:
            height, width = check_grid(grid, x.shape[1])
            local = as_tokens(self.value_conv(as_image(rearrange(v, "b n h k -> b n (h k)"), height, width)))
        return self._finish(out, local, g)

    def init_state(self, batch: int) -> NaLaState:
        """Returns the state for decoding `batch` sequences from their first token on.

        Raises ValueError unless is_causal is True.
        """
        check_decodes(self.is_causal)
        head_dim = head_width(self.width, self.num_heads)
        dtype = self.dtype or jnp.float32
        state = FeatureKernel(nala_features()).init_state(batch, self.num_heads, head_dim, head_dim, dtype)
        return NaLaState(state, jnp.zeros((batch, NALA_CONV - 1, self.width), dtype))

    def prefill(
        self, x: Float[Array, "b n d"], state: NaLaState | None = None, *, mask: Array | None = None
    ) -> tuple[Float[Array, "b n width"], NaLaState]:
        """Returns the outputs of the next n tokens of each sequence, and the state after them.

        state: the state after the earlier tokens, if any. mask: a key mask `b 1 1 n`, True for tokens to keep.

        Raises ValueError unless is_causal is True.
        """
        check_decodes(self.is_causal)
        state = self.init_state(x.shape[0]) if state is None else state
        q, k, v, g = self._project(x, mask)
        attention = FeatureKernel(self._features(None, self.max_length), self.eps)
        out, sums = attention.prefill(q, k, v, state=state.attention, mask=mask)
        values = _join(state.values, rearrange(v, "b n h k -> b n (h k)"))
        local = self.value_conv(values) if self.conv else None
        absorbed = sums.length - state.attention.length
        return self._finish(out, local, g), NaLaState(sums, _window(values, absorbed, NALA_CONV - 1))

    def step(self, x: Float[Array, "b d"], state: NaLaState) -> tuple[Float[Array, "b width"], NaLaState]:
        """Returns the output for one more token of each sequence, and the state after it."""
        check_token(x)
        out, state = self.prefill(x[:, None], state)
        return out[:, 0], state

    def _project(self, x, mask):
        parts = jnp.split(self.qkvg(x), 4 if self.gate else 3, axis=-1)
        q, k, v = (rearrange(part, "b n (h k) -> b n h k", h=self.num_heads) for part in parts[:3])
        if mask is not None:
            keep = check_key_mask(mask, q, k)[:, :, 0].swapaxes(1, 2)[..., None]
            v = jnp.where(keep, v, 0)
        return q, k, v, parts[3] if self.gate else None

    def _features(self, grid, num_tokens) -> FeatureMap:
        power, offset = self.power, self.offset
        if self.learnable:
            power, offset = jnp.asarray(self.learned_power), jnp.asarray(self.learned_offset)
        rotary = None
        if self.rotary:
            head_dim = self.width // self.num_heads
            line = self.is_causal
            rotary = rotary_line(num_tokens, head_dim) if line else rotary_grid(*check_grid(grid, num_tokens), head_dim)
        return nala_features(power, offset, self.direction_map, rotary=rotary)

    def _finish(self, out, local, g):
        out = rearrange(out, "b n h k -> b n (h k)")
        out = out if local is None else out + local
        out = self.out_norm(out) if self.norm else out
        return self.proj(out if g is None else out * jax.nn.silu(g))


class SOFTAttention(nn.Module):
    """The attention layer of SOFT (arXiv 2110.11945), which cannot be causal: proj(SOFT(q, k, v) + conv(v)).

    Dense layers compute q, k and v. SOFT is `soft_attention`, conv a convolution on the grid, and proj a dense layer.

    tied: whether the queries are also used as keys, as in the paper.
    landmarks: how landmarks are computed from the keys. "pool" averages `num_landmarks` runs of consecutive keys or, if
    the layer is called with a grid, cells of the grid. "conv" applies a convolution on the grid whose kernel size and
    stride are both `stride`; all heads share its weights. "conv_norm_gelu" then also applies LayerNorm and GELU, as in
    the released code.
    num_landmarks: used only by "pool". With a grid, it is the largest number of cells.
    value_conv: the kernel size of conv, which has one filter per head; 0 leaves conv(v) out.
    ridge, solver, normalize: see `soft_attention`.

    Example:
        y = SOFTAttention(width=64, num_heads=2, value_conv=9).apply(params, x, grid=(56, 56))
    """

    width: int
    num_heads: int
    tied: bool = True
    landmarks: LandmarkKind = "pool"
    num_landmarks: int = 49
    stride: int = 2
    value_conv: int = 0
    ridge: float = 0.01
    solver: Solver = "newton"
    normalize: Normalization = None
    dtype: DTypeLike | None = None

    def setup(self):
        head_dim = head_width(self.width, self.num_heads)
        if self.landmarks not in get_args(LandmarkKind):
            raise ValueError(f"landmarks is {self.landmarks!r}; choose one of {', '.join(get_args(LandmarkKind))}.")
        self.query = nn.Dense(self.width, dtype=self.dtype)
        self.value = nn.Dense(self.width, dtype=self.dtype)
        self.proj = nn.Dense(self.width, dtype=self.dtype)
        if not self.tied:
            self.key = nn.Dense(self.width, dtype=self.dtype)
        if self.landmarks != "pool":
            window = (self.stride, self.stride)
            self.landmark_conv = nn.Conv(head_dim, window, window, padding="VALID", use_bias=False)
        if self.landmarks == "conv_norm_gelu":
            self.landmark_norm = nn.LayerNorm(epsilon=TORCH_LAYER_NORM_EPS)
        if self.value_conv:
            size = (self.value_conv, self.value_conv)
            self.local = nn.Conv(
                self.num_heads, size, feature_group_count=self.num_heads, use_bias=False, dtype=self.dtype
            )

    def __call__(
        self, x: Float[Array, "b n d"], grid: tuple[int, int] | None = None, *, mask: Array | None = None
    ) -> Float[Array, "b n width"]:
        """Returns the layer's output.

        grid: (height, width) of the grid of tokens in row-major order; None only if landmarks is "pool" and value_conv
        is 0. mask: a key mask `b 1 1 n`, True for tokens to keep; None unless landmarks is "pool".

        Raises ValueError if the grid or the mask does not fit.
        """

        def heads(y):
            return rearrange(y, "b n (h k) -> b n h k", h=self.num_heads)

        q, v = heads(self.query(x)), heads(self.value(x))
        k = q if self.tied else heads(self.key(x))
        if mask is not None and check_key_mask(mask, q, k).shape[1] > 1:
            raise ValueError(
                f"mask has shape {mask.shape}, but SOFT requires the same mask for all heads, (batch, 1, 1, keys)."
            )
        keep = None if mask is None else mask[:, 0, 0]
        if keep is not None:
            keep = jnp.broadcast_to(keep, x.shape[:2])
            v = jnp.where(keep[..., None, None], v, 0)
        q, k = to_kernel_space(q), to_kernel_space(k)
        options = {"ridge": self.ridge, "solver": self.solver, "normalize": self.normalize}
        out = nystrom_attention(q, k, v, self._landmarks(k, grid, keep), mask=keep, **options)
        if self.value_conv:
            height, width = check_grid(grid, x.shape[1])
            image = fold(v.swapaxes(2, 3), height, width)  # each channel becomes an image with one channel per head
            out = out + unfold(self.local(image), v.swapaxes(2, 3)).swapaxes(2, 3)
        return self.proj(rearrange(out, "b n h k -> b n (h k)"))

    def _landmarks(self, k, grid, keep) -> Landmarks:
        if self.landmarks == "pool":
            if grid is None:
                return pool_landmarks(k, self.num_landmarks, keep)
            return pool_landmarks_2d(k, check_grid(grid, k.shape[1]), self.num_landmarks, keep)
        if keep is not None:
            raise ValueError(
                'convolved landmarks do not support a mask, because they mix in masked tokens; use landmarks="pool".'
            )
        height, width = check_grid(grid, k.shape[1])
        if self.stride > min(height, width):
            raise ValueError(f"stride is {self.stride}, but must not exceed either side of the grid, {grid}.")
        points = unfold(self.landmark_conv(fold(k, height, width)), k)
        if self.landmarks == "conv_norm_gelu":
            points = gelu(self.landmark_norm(points))
        return Landmarks(points)


def _join(before: Float[Array, "b m d"], values: Float[Array, "b n d"]) -> Float[Array, "b mn d"]:
    """Returns the earlier values followed by the new ones."""

    def run(before, values):
        return jnp.concatenate([before.astype(values.dtype), values], axis=1)

    return keep_axes(run, before, values, named=[(values, "b n d")], out="b m d")


def _window(values: Float[Array, "b m d"], start: Int[Array, " b"], size: int) -> Float[Array, "b size d"]:
    """Returns `size` consecutive values of each sample, beginning at the sample's `start`."""

    def run(values, start):
        places = start[:, None] + jnp.arange(size)[None]
        return jnp.take_along_axis(values, places[..., None], axis=1)

    return keep_axes(run, values, start, named=[(values, "b n d")], out="b m d")


def head_width(width: int, num_heads: int) -> int:
    """Returns the width of one head; raises ValueError unless num_heads divides width."""
    if num_heads < 1 or width % num_heads:
        raise ValueError(f"width {width} is not divisible by num_heads {num_heads}; change one of them.")
    return width // num_heads


def check_decodes(is_causal: bool | Causal) -> None:
    """Raises ValueError unless attention is causal token by token, which a running state requires."""
    causal = as_causal(is_causal)
    if causal is None or causal.block_size != 1:
        raise ValueError(f"is_causal is {is_causal}, but decoding with a running state needs is_causal=True.")


def check_token(x: Array) -> None:
    """Raises ValueError unless x is one token per sample."""
    if x.ndim != 2:
        raise ValueError(
            f"x has shape {x.shape}, but step expects one token per sample, (batch, width); use prefill for several."
        )
