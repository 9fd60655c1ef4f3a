"""Parts of your own, as a module of yours would hold them."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from flowgen.attention import FeatureKernel, FeatureMap, KVCache, causal_kernel, relu_features
from flowgen.matching import Coupled

NUMBER = 3


def softplus(x, positions):
    return jax.nn.softplus(x)


softplus_kernel = FeatureMap(softplus, softplus)


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A kernel with the protocol alone: linear attention times a factor."""

    factor: float = 2.0

    def attend(self, q, k, v, *, mask=None, is_causal=False, segment_ids=None):
        return self.factor * self._kernel.attend(q, k, v, mask=mask, is_causal=is_causal, segment_ids=segment_ids)

    def init_state(self, batch, num_heads, key_dim, value_dim, dtype=jnp.float32):
        return self._kernel.init_state(batch, num_heads, key_dim, value_dim, dtype)

    def prefill(self, q, k, v, *, state=None, mask=None):
        out, state = self._kernel.prefill(q, k, v, state=state, mask=mask)
        return self.factor * out, state

    @property
    def _kernel(self):
        return FeatureKernel(relu_features())


softmax = causal_kernel("softmax")
# Attention with a cache of keys and values of its own.
cached = softmax._replace(init_cache=lambda *sizes: KVCache(*softmax.init_cache(*sizes)))


def bounded(shift, raw):
    return shift, jnp.tanh(raw)


def misshapen(shift, raw):
    return shift, raw.sum()


def as_drawn(key, x0, x1, cond=None):
    return Coupled(x0, x1, cond, jnp.zeros(len(x0)))


def distance(x0, x1):
    return jnp.abs(x0 - x1).reshape(len(x0), -1).sum(axis=1)


@dataclasses.dataclass(frozen=True)
class Ordered:
    """A coupling in the order of the first coordinates."""

    share: float = 1.0

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is {self.share}; it must be from 0 to 1.")

    def __call__(self, key, x0, x1, cond=None):
        count = int(self.share * len(x0))
        order0, order1 = (jnp.argsort(x[:count].reshape(count, -1)[:, 0]) for x in (x0, x1))
        cond = None if cond is None else cond.at[:count].set(cond[order1])
        return Coupled(x0.at[:count].set(x0[order0]), x1.at[:count].set(x1[order1]), cond, jnp.zeros(len(x0)))


@dataclasses.dataclass
class Changeable:
    """A coupling that a program cannot depend on."""

    share: float = 1.0

    def __call__(self, key, x0, x1, cond=None):
        return as_drawn(key, x0, x1, cond)


@dataclasses.dataclass(frozen=True)
class FieldConfig:
    """A velocity network of points."""

    width: int = 8
    num_classes: int = 0
    event_shape = (2,)

    def build(self):
        return FieldNetwork(self)


class FieldNetwork(nn.Module):
    config: FieldConfig

    @nn.compact
    def __call__(self, t, x, cond=None):
        h = nn.tanh(nn.Dense(self.config.width)(jnp.concatenate([x, t[:, None]], axis=1)))
        return nn.Dense(2)(h)


@dataclasses.dataclass(frozen=True)
class ForgetfulConfig(FieldConfig):
    """A config whose network does not hold it."""

    def build(self):
        return FieldNetwork(FieldConfig())
