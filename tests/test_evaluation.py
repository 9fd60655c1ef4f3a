"""Bits/dim of a flow and of a Gaussian, against independent numpy and the same noise."""

import jax
import laws
import numpy as np
import pytest

from flowgen.data import ArraySource
from flowgen.evaluation import flow_bits_per_dim, gaussian_bits_per_dim


def source(count, shape=(2, 2, 1), seed=0):
    random = np.random.default_rng(seed)
    mixing = random.standard_normal((int(np.prod(shape)),) * 2)
    latent = random.standard_normal((count, mixing.shape[0])) @ mixing * 20 + 128
    images = np.clip(latent, 0, 255).astype(np.uint8).reshape(count, *shape)
    return ArraySource(images, np.full(count, -1, np.int32))


@pytest.mark.parametrize("noise_std", [0.0, 0.2])
def test_gaussian_baseline_is_the_mean_density_of_noised_images(noise_std):
    train, held_out = source(3000), source(2500, seed=1)
    random = np.random.default_rng(2)

    def noised(s):
        flat = s.images.reshape(len(s), -1).astype(np.float64)
        if noise_std:
            return flat / 127.5 - 1 + noise_std * random.standard_normal(flat.shape)
        return (flat + random.random(flat.shape)) / 128 - 1

    x, y = noised(train), noised(held_out)
    covariance = np.cov(x.T, bias=True)
    deviation = y - x.mean(axis=0)
    nats = 0.5 * np.einsum("bi,ij,bj->b", deviation, np.linalg.inv(covariance), deviation)
    nats += 0.5 * np.linalg.slogdet(2 * np.pi * covariance)[1]
    expected = (nats.mean() / 4 + np.log(128)) / np.log(2)
    np.testing.assert_allclose(gaussian_bits_per_dim(train, held_out, noise_std=noise_std), expected, atol=0.02)


def test_gaussian_baseline_of_few_images_is_diagonal_and_sane():
    # 30 images of 64 dimensions: a full covariance would be singular but for the noise.
    bits = gaussian_bits_per_dim(source(30, (8, 8, 1)), source(20, (8, 8, 1), seed=1), noise_std=0.0)
    assert bits < 10


def test_flow_bits_do_not_depend_on_the_batch_and_ignore_padding():
    flow, params, _, _ = laws.case("affine")
    images = source(7, flow.config.image_shape)
    bits = [flow_bits_per_dim(flow, params, images, jax.random.key(0), batch_size=size) for size in (7, 3, 100)]
    np.testing.assert_allclose(bits, bits[0], rtol=1e-5)
