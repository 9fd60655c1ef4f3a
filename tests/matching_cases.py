"""Pairs, paths and Gaussian closed forms that the tests of flow matching share."""

import jax.numpy as jnp
import numpy as np

from flowgen import matching as fm

X0 = jnp.array([[0.0, 0.0], [1.0, -1.0], [2.0, 0.5]])
X1 = jnp.array([[1.0, 2.0], [-1.0, 0.0], [0.5, -2.0]])
T = jnp.array([0.25, 0.5, 0.8])
NOISE = jnp.array([[1.0, -1.0], [0.5, 0.0], [-1.0, 2.0]])

PATHS = {
    "cond_ot": fm.CondOT(),
    "target": fm.Target(sigma_min=0.1),
    "trigonometric": fm.Trigonometric(),
    "polynomial": fm.Polynomial(degree=3.0),
    "variance preserving": fm.VariancePreserving(),
    "linear variance preserving": fm.LinearVariancePreserving(),
}

# Dataset N(0, 1), data N(MEAN, STD²), paired independently.
MEAN, STD = 1.0, 0.5


def gaussian_velocity(path, t, x):
    """Returns the exact velocity of a path between noise and data, `b 1`."""
    alpha, beta, d_alpha, d_beta = (number[:, None] for number in path.schedule(t))
    variance = beta**2 + alpha**2 * STD**2
    return d_alpha * MEAN + (beta * d_beta + alpha * d_alpha * STD**2) / variance * (x - alpha * MEAN)


def gaussian_score(path, t, x):
    """Returns the exact ∇ log p_t of a path between noise and data, `b 1`."""
    alpha, beta, _, _ = (number[:, None] for number in path.schedule(t))
    return -(x - alpha * MEAN) / (beta**2 + alpha**2 * STD**2)


def gaussian_pairs(num=10_000):
    """Independent pairs of N(0, 1) and N(MEAN, STD²)."""
    x0, noise = np.random.default_rng(1).standard_normal((2, num, 1)).astype(np.float32)
    return jnp.asarray(x0), jnp.asarray(MEAN + STD * noise)


def labelled_pairs():
    """128 pairs of N(0, 1) and N(2, 1/4) with labels."""
    random = np.random.default_rng(0)
    x0, noise = random.standard_normal((2, 128, 1)).astype(np.float32)
    return {"x0": jnp.asarray(x0), "x1": jnp.asarray(2 + 0.5 * noise), "cond": jnp.arange(128) % 3}
