"""Every kernel's formula in NumPy, written over all pairs of tokens, and calls of the kernels by name."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import rows
from tolerances import LAYER, assert_close

from flowgen.attention import (
    KERNELS,
    Causal,
    FeatureKernel,
    Kernel,
    PolaKernel,
    cosformer_features,
    gaussian_landmark_map,
    nala_features,
    retention,
    rotary_line,
)

EPS = 1e-6  # of the kernels: added to the sum of the weights
EXACT = 1e-9  # float64; norms have 1e-12 inside their square root

BATCH, HEADS, KEY_HEADS, WIDTH, VALUES = 2, 4, 2, 4, 6
LENGTH, KEYS = 10, 7  # tokens; keys of cross attention
MAX_LENGTH = 160

POWER, OFFSET = np.float32([1.5, 2.0, 3.0, 4.0]), np.float32([0.3, 0.5, 0.7, 1.0])
CHANNEL_POWER = np.linspace(1.2, 4.0, HEADS * WIDTH, dtype=np.float32).reshape(HEADS, WIDTH)
LANDMARKS = np.random.default_rng(7).normal(size=(HEADS, 5, WIDTH)).astype(np.float32)


def dots(x, y):
    return np.einsum("bnhf,bmhf->bhnm", x, y)


def weighted(weights, v):
    return np.einsum("bhnm,bmhd->bnhd", weights, v)


def average(weights, v, keep, norm=None):
    total = ((weights if norm is None else norm) * keep).sum(-1)
    return weighted(weights * keep, v) / (total + EPS).swapaxes(1, 2)[..., None]


def separable(phi):
    return lambda q, k, v, keep: average(dots(phi(q), phi(k)), v, keep)


def relu(x):
    return np.maximum(x, 0)


def focused(x):
    y = relu(x) + 1e-6
    norms = [np.sqrt((z**2).sum(-1, keepdims=True) + 1e-12) for z in (y, y**3)]
    # The norm of the sharpened vector is taken of a rescaled one, where 1e-12 does not count.
    return y**3 * norms[0] / np.sqrt((y**6).sum(-1, keepdims=True))


def nala(q, k, v, keep, power=3.0, offset=0.5, directed=None, turns=None):
    power, offset = np.reshape(power, (-1, 1)), np.reshape(offset, (-1, 1))
    length = np.sqrt((q**2).sum(-1, keepdims=True))
    magnitudes = np.abs(q / length) ** (power * (offset + np.tanh(length))), np.abs(k) ** power
    phi_q, phi_k = ((directed or split)(m, x) for m, x in zip(magnitudes, (q, k), strict=True))
    norm = dots(phi_q, phi_k)
    if turns is None:
        return average(norm, v, keep)
    turned = []
    for x in (phi_q, phi_k):
        z = (x[..., 0::2] + 1j * x[..., 1::2]) * turns[None, : x.shape[1], None, :]
        turned.append(np.concatenate([z.real, z.imag], axis=-1))
    return average(dots(*turned), v, keep, norm)


def split(magnitude, x):
    return np.concatenate([magnitude * (x > 0), magnitude * (x < 0)], axis=-1)


def cosine(magnitude, x):
    angle = np.pi / 4 * np.tanh(2.0 * x / np.sqrt((x**2).sum(-1, keepdims=True)))
    return np.concatenate([magnitude * np.cos(angle), magnitude * np.sin(angle)], axis=-1)


def distances(q, k):
    return np.arange(q.shape[1])[:, None] - np.arange(k.shape[1])[None, :]


def cosformer(q, k, v, keep):
    return average(dots(relu(q), relu(k)) * np.cos(np.pi / 2 * distances(q, k) / MAX_LENGTH), v, keep)


def gaussian(x):
    squares = ((x[:, :, :, None] - LANDMARKS) ** 2).sum(-1)
    return np.exp(-squares / (2 * np.sqrt(WIDTH)))


def pola(q, k, v, keep, power=3.0):
    (qp, qn), (kp, kn) = ([relu(x) ** power, relu(-x) ** power] for x in (q, k))
    halves = (dots(qp, kp) + dots(qn, kn), dots(qn, kp) + dots(qp, kn))
    return np.concatenate([average(w, x, keep) for w, x in zip(halves, np.split(v, 2, axis=-1), strict=True)], axis=-1)


def inline(q, k, v, keep):
    count = np.maximum(keep.sum(-1, keepdims=True), 1)
    share = dots(q, k) / np.sqrt(q.shape[-1]) / count * keep
    return weighted((share - share.sum(-1, keepdims=True) / count + 1 / count) * keep, v)


def decayed(q, k, v, keep):
    # Query head i reads key head i // 2, whose number sets the decay.
    gamma = (1 - 2.0 ** (-5 - np.arange(HEADS) // (HEADS // KEY_HEADS)))[:, None, None]
    time = np.cumsum((keep > 0).any(axis=2), axis=-1)  # tokens that no query sees do not count as time
    ago = np.abs(time[..., :, None] - time[..., None, :])
    return weighted(dots(q, k) / np.sqrt(q.shape[-1]) * gamma**ago * keep, v)


@dataclass(frozen=True)
class Row:
    """A kernel and its formula (q, k, v, keep) over all pairs, with as many key heads as query heads.

    grouped: takes fewer key heads. causal_only: has no other form. positional: weights depend on where tokens are.
    tolerance: in float64.
    """

    kernel: Kernel
    formula: Callable
    grouped: bool = True
    causal_only: bool = False
    positional: bool = False
    tolerance: float = EXACT


ANGLES = np.arange(MAX_LENGTH)[:, None] * 10_000.0 ** (-np.arange(0, WIDTH, 2) / WIDTH)
TURNS = np.tile(np.exp(1j * ANGLES), (1, 2))  # both halves of the features turn alike
ROWS = {
    "elu_plus_one": Row(KERNELS["elu_plus_one"], separable(lambda x: np.where(x > 0, x + 1, np.exp(x)))),
    "relu": Row(KERNELS["relu"], separable(relu)),
    "squared_relu": Row(KERNELS["squared_relu"], separable(lambda x: relu(x) ** 2)),
    "focused": Row(KERNELS["focused"], separable(focused)),
    "nala": Row(KERNELS["nala"], nala),
    "pola": Row(KERNELS["pola"], pola),
    "inline": Row(KERNELS["inline"], inline),
    "retention": Row(KERNELS["retention"], decayed, causal_only=True, positional=True),
    "nala cosine": Row(
        FeatureKernel(nala_features(direction_map="cosine", temperature=2.0)),
        lambda *x: nala(*x, directed=cosine),
    ),
    "nala rotary": Row(
        FeatureKernel(nala_features(rotary=rotary_line(MAX_LENGTH, WIDTH))),
        lambda *x: nala(*x, turns=TURNS),
        positional=True,
    ),
    "nala power per head": Row(
        FeatureKernel(nala_features(jnp.asarray(POWER), jnp.asarray(OFFSET))),
        lambda *x: nala(*x, power=POWER, offset=OFFSET),
        grouped=False,
    ),
    "pola power per channel": Row(
        PolaKernel(jnp.asarray(CHANNEL_POWER)),
        lambda *x: pola(*x, power=CHANNEL_POWER),
        grouped=False,
    ),
    "cosformer": Row(FeatureKernel(cosformer_features(MAX_LENGTH)), cosformer, positional=True),
    "gaussian landmarks": Row(
        FeatureKernel(gaussian_landmark_map(jnp.asarray(LANDMARKS))),
        separable(gaussian),
        grouped=False,
        tolerance=1e-6,  # its landmarks are scaled in float32
    ),
}
# Options of named kernels, and feature maps that differ from others by a function.
ALIKE = (
    "nala cosine",
    "nala rotary",
    "nala power per head",
    "pola power per channel",
    "gaussian landmarks",
    "relu",
    "squared_relu",
)
each_kernel = pytest.mark.parametrize("name", rows(ROWS, ALIKE))


def draw(name, n=LENGTH, m=None, batch=BATCH, seed=0):
    """q, k, v in float64; grouped heads where the kernel has them."""
    rng, heads = np.random.default_rng(seed), KEY_HEADS if ROWS[name].grouped else HEADS
    m = n if m is None else m
    shapes = (batch, n, HEADS, WIDTH), (batch, m, heads, WIDTH), (batch, m, heads, VALUES)
    return tuple(rng.normal(size=shape) for shape in shapes)


def as_jax(arrays, dtype=jnp.float32):
    return tuple(jnp.asarray(x, dtype) for x in arrays)


def formula(name, q, k, v, keep):
    """The row's formula with keys and values repeated to the heads of the queries."""
    repeats = q.shape[2] // k.shape[2]
    keep = np.broadcast_to(keep, (q.shape[0], q.shape[2], q.shape[1], k.shape[1])).astype(float)
    return ROWS[name].formula(q, *(np.repeat(x, repeats, axis=2) for x in (k, v)), keep)


def close(name, out, expected, message=""):
    tolerance = ROWS[name].tolerance if out.dtype == jnp.float64 else LAYER
    assert_close(out, expected, tolerance, err_msg=message)


@jax.jit(static_argnames=("name", "is_causal"))
def attend(name, q, k, v, mask=None, segment_ids=None, is_causal=False):
    return ROWS[name].kernel.attend(q, k, v, mask=mask, is_causal=is_causal, segment_ids=segment_ids)


def in_chunks(name, q, k, v, chunk_size):
    if ROWS[name].causal_only:
        return retention(q, k, v, chunk_size=chunk_size)[0]
    return ROWS[name].kernel.attend(q, k, v, is_causal=Causal(chunk_size=chunk_size))


SEGMENTS = np.array([[0, 0, 0, 1, 1, 1, 1, 1, 2, 3], [5] * 10])
SAME_SEGMENT = (SEGMENTS[:, :, None] == SEGMENTS[:, None, :])[:, None]
PAIRS = np.random.default_rng(5).random((BATCH, HEADS, LENGTH, LENGTH)) < 0.6
PAIRS[0, :, 4] = False
VALID = np.ones((BATCH, 1, 1, LENGTH), bool)
VALID[0, ..., :3] = VALID[1, ..., 6:] = False  # padded on the left, and on the right
PADDING = ~VALID[:, 0, 0]
TRIL = np.tri(LENGTH, dtype=bool)
BLOCKS = np.array([[j // 3 <= i // 3 for j in range(LENGTH)] for i in range(LENGTH)])

# Options of attend, and which pairs of tokens see each other.
FORMS = {
    "causal": ({"is_causal": True}, TRIL),
    "blocks in small chunks": ({"is_causal": Causal(block_size=3, chunk_size=4)}, BLOCKS),
    "packed": ({"segment_ids": SEGMENTS}, SAME_SEGMENT),
    "packed causal": ({"segment_ids": SEGMENTS, "is_causal": True}, SAME_SEGMENT & TRIL),
    "pairs, packed causal": ({"mask": PAIRS, "segment_ids": SEGMENTS, "is_causal": True}, PAIRS & SAME_SEGMENT & TRIL),
    "keys per head": ({"mask": PAIRS[:, :, :1]}, PAIRS[:, :, :1]),
}
CAUSAL_FORMS = ("causal", "packed causal", "pairs, packed causal")  # of a kernel that has no others
