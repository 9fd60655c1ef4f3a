"""Density: Gaussian constant, bits per dimension, dequantisation, likelihood objective, score, denoising, Bayes.

For a flow z = f(x) with prior N(0, v):  log p(x) = Σ log N(z; 0, v) + log|det dz/dx|.  All in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from flowgen.arrays import at_least_float32, check_bytes, check_key, shown
from flowgen.conditioning import Condition, TextCondition, drop_labels, drop_texts
from flowgen.rows import Rows, batch_rows
from flowgen.sharding import keep_rows

LEVELS = 256
PRIOR_VARIANCE_RATE = 0.1


@runtime_checkable
class Flow(Protocol):
    """What density and decoding ask of a flow: a Flax module with these methods and a config."""

    config: Any

    def apply(self, variables: Any, *args: Any, method: str) -> Any: ...

    def at(self, height: int, width: int) -> Any: ...


def check_flow(flow: Any, variables: Any) -> None:
    """Raises ValueError unless these are a flow and its variables, in this order.

    Example:
        check_flow(flow, params)
    """
    if not isinstance(flow, Flow):
        raise ValueError(f"flow is {shown(flow)}; give a flow, such as TARFlow(config), and then its params.")
    if not (isinstance(variables, Mapping) and "params" in variables):
        given = f"a dict of {', '.join(map(str, variables))}" if isinstance(variables, Mapping) else shown(variables)
        raise ValueError(f"params is {given}; give the dict with 'params' that flowgen.init and flowgen.load return.")


def gaussian_log_prob(z: Float[Array, "b n c"], variance: Float[Array, "n c"] | None = None) -> Float[Array, " b"]:
    """Returns log N(z; 0, variance) summed over tokens and channels, variance 1 by default.

    Example:
        lp = gaussian_log_prob(z) + logdet
    """
    if variance is None:
        variance = jnp.ones(z.shape[1:], z.dtype)
    terms = jnp.square(z) / variance[None] + jnp.log(2 * math.pi * variance)[None]
    return -0.5 * terms.sum(axis=(1, 2))


def bits_per_dim(log_prob: Float[Array, "*b"], num_dims: int) -> Float[Array, "*b"]:
    """Returns bits/dim on the 8-bit scale from nats of images in [-1, 1): (-log p / num_dims + log 128) / log 2.

    Example:
        bpd = bits_per_dim(flow.apply(params, x, method="log_prob"), flow.config.num_dims)
    """
    return (-log_prob / num_dims + math.log(LEVELS / 2)) / math.log(2)


def dequantise(key: Key[Array, ""], images: UInt8[Array, "b *event"]) -> Float[Array, "b *event"]:
    """Returns 8-bit images with uniform noise of one level, in [-1, 1): 2 (x + U[0, 1)) / 256 - 1.

    The expected bits/dim of dequantised images bounds the discrete bits/dim from above.

    Example:
        x = dequantise(key, batch["image"])
    """
    check_bytes("images", images)
    noise = jax.random.uniform(key, images.shape)
    return (images.astype(jnp.float32) + noise) * (2 / LEVELS) - 1


def add_noise(key: Key[Array, ""], images: UInt8[Array, "b *event"], noise_std: float) -> Float[Array, "b *event"]:
    """Returns images as the flow is trained on them: σ > 0, x + σ N(0, I) on [-1, 1]; σ = 0, dequantised.

    Example:
        x = add_noise(key, batch["image"], flow.config.noise_std)
    """
    if noise_std == 0:
        return dequantise(key, images)
    noise = jax.random.normal(key, images.shape)
    # As `from_uint8`, in the precision of the noise: float64 where that is switched on.
    return images.astype(noise.dtype) / (LEVELS // 2 - 0.5) - 1 + noise_std * noise


def check_batch(batch: Any) -> None:
    """Raises ValueError unless a batch is a dict that has pictures, or moments of latents.

    Example:
        check_batch({"image": images})
    """
    if not isinstance(batch, Mapping) or not ("image" in batch or {"mean", "std"} <= batch.keys()):
        given = list(batch) if isinstance(batch, Mapping) else shown(batch)
        raise ValueError(f"batch is {given}; give a dict with 'image', or with 'mean' and 'std' of latents.")


def batch_input(key: Key[Array, ""], batch: Any, noise_std: float) -> Float[Array, "b *event"]:
    """Returns the input of a flow in training, from pictures or from moments of latents.

    `image` uint8: see `add_noise`. `mean` and `std` `b height width c`, an autoencoder's posterior: a draw from it, and
    σ N(0, I) on top.

    Example:
        x = batch_input(key, {"mean": mean, "std": std}, flow.config.noise_std)
    """
    check_batch(batch)
    if "image" in batch:
        return add_noise(key, batch["image"], noise_std)
    posterior_key, key = jax.random.split(key)
    mean, std = (jnp.asarray(batch[name], jnp.float32) for name in ("mean", "std"))
    latents = mean + std * jax.random.normal(posterior_key, mean.shape)
    return latents + noise_std * jax.random.normal(key, mean.shape)


def nll_objective(
    flow: Flow,
    *,
    label_dropout: float = 0.0,
    norm_penalty: float = 0.0,
    loss_scale: float = 1.0,
    null_text: Callable[[tuple[int, ...]], TextCondition] | None = None,
) -> Callable[..., tuple]:
    """Returns the maximum-likelihood objective (variables, batch, key) -> (loss, metrics[, carried state]).

    loss = loss_scale (½ mean z² - mean logdet / num_dims) + norm_penalty Σ_k mean x_k², in nats per dimension, without
    constants (TARFlow, eq. of the loss; the penalty, on the tokens that enter each block, is STARFlow's).
    batch: what `batch_input` takes, of any size that `flow.at` takes; and `label` int32 `b` where the flow has classes,
    `text`, the features `b l e` and mask `b l` of a `TextCondition`, where it has texts. With probability
    `label_dropout` labels become -1, and texts null_text(([frames,] height, width)) of the batch, the encoded "".
    metrics: loss, bits_per_dim (of the noised pictures; of latents nats_per_dim), mean_square_z, logdet_per_dim, and
    mean_square/<block> of the tokens after each block.
    Volume-preserving flows return their tracked prior variance, v + 0.1 (mean_b z² - v), as carried state.

    Raises ValueError where texts are to be dropped and there is no null_text.

    Example:
        loss, metrics, *state = nll_objective(flow, label_dropout=0.1)(params, batch, key)
    """
    condition = batch_condition(flow, label_dropout, null_text)

    def objective(variables, batch, key):
        x, cond = noisy_batch(flow, condition, batch, key)
        loss, metrics, z = nll(flow, variables, x, cond, norm_penalty=norm_penalty, loss_scale=loss_scale)
        metrics |= {"loss": loss, **density_metric(flow, metrics.pop("nats_per_dim"), batch)}
        if flow.config.transform != "volume_preserving":
            return loss, metrics
        variance = variables["prior"]["variance"]
        batch_variance = jax.lax.stop_gradient(jnp.square(z).mean(axis=0))  # Linear: its mean over devices is right.
        tracked = variance + PRIOR_VARIANCE_RATE * (batch_variance - variance)
        return loss, metrics, {"prior": {"variance": tracked}}

    return objective


def batch_condition(
    flow: Flow, label_dropout: float, null_text: Callable[[tuple[int, ...]], TextCondition] | None
) -> Callable[..., Condition | None]:
    """Returns (rows, batch, ([frames,] height, width)) -> the condition of a batch in training, some of it dropped.

    Raises ValueError where texts are to be dropped and there is no null_text.

    Example:
        cond = batch_condition(flow, 0.1, None)(batch_rows(batch, key, num=16), batch, (4, 4))
    """
    if label_dropout and flow.config.text_dim and null_text is None:
        raise ValueError(f"label_dropout is {label_dropout}, but no null_text is given for dropped texts; encode ''.")

    def condition(rows: Rows, batch: Any, shape: tuple[int, ...]):
        cond = condition_of(flow, batch)
        if cond is None or not label_dropout:
            return cond
        if isinstance(cond, TextCondition):
            assert null_text is not None  # checked above
            null = null_text(shape)
            return rows.draw(lambda key, texts: drop_texts(key, texts, null, label_dropout), cond)
        return rows.draw(lambda key, labels: drop_labels(key, labels, label_dropout), cond)

    return condition


def noisy_batch(
    flow: Flow, condition: Callable[..., Condition | None], batch: Any, key: Key[Array, ""]
) -> tuple[Float[Array, "b *event"], Condition | None]:
    """Returns what a flow is trained on: the noisy input and the condition of a batch, drawn row by row.

    condition: of `batch_condition`.

    Example:
        x, cond = noisy_batch(flow, batch_condition(flow, 0.1, None), batch, key)
    """
    check_batch(batch)
    check_key(key)
    arrays = {name: batch[name] for name in ("image", "mean", "std") if name in batch}
    noise_rows, label_rows = batch_rows(batch, key, len(next(iter(arrays.values())))).split(2)
    x = noise_rows.draw(lambda key, one: batch_input(key, one, flow.config.noise_std), arrays)
    return x, condition(label_rows, batch, x.shape[1:-1])


def condition_of(flow: Flow, batch: Any) -> Condition | None:
    """Returns the labels or texts of a batch where the flow takes them, none of them dropped.

    Example:
        nats = -flow.apply(params, x, condition_of(flow, batch), method="log_prob")
    """
    needed = "text" if flow.config.text_dim else "label" if flow.config.num_classes else None
    if needed is not None and needed not in batch:
        raise ValueError(f"batch has {', '.join(map(repr, batch))} and no {needed!r}, which this flow takes; give it.")
    if flow.config.text_dim:
        features, mask = batch["text"]
        return TextCondition(jnp.asarray(features, jnp.float32), jnp.asarray(mask))
    return jnp.asarray(batch["label"]) if flow.config.num_classes else None


def nll(
    flow: Flow,
    variables: Any,
    x: Float[Array, "b *event"],
    cond: Condition | None,
    *,
    norm_penalty: float = 0.0,
    loss_scale: float = 1.0,
) -> tuple[Float[Array, ""], dict[str, Array], Float[Array, "b n token"]]:
    """Returns the loss of `nll_objective` on noisy x of any size that the flow takes, its metrics, and z.

    Example:
        loss, metrics, z = nll(flow, params, x, labels)
    """
    sized = on_samples_like(flow, x)
    num_dims = sized.config.num_dims
    states, logdet = sized.apply(variables, x, cond, method="trajectory")
    z = states[-1]
    mean_square_z = jnp.square(z).mean()
    logdet_per_dim = logdet.mean() / num_dims
    loss = loss_scale * (0.5 * mean_square_z - logdet_per_dim)
    metrics = {"mean_square_z": mean_square_z, "logdet_per_dim": logdet_per_dim}
    for index, state in enumerate(states):
        metrics[f"mean_square/{index}"] = jnp.square(state).mean()
    if norm_penalty:
        entering = jnp.square(x).mean() + sum(metrics[f"mean_square/{index}"] for index in range(len(states) - 1))
        loss = loss + norm_penalty * entering
    log_prob = (gaussian_log_prob(z, sized.apply(variables, method="prior_variance")) + logdet).mean()
    return loss, metrics | {"nats_per_dim": -log_prob / num_dims}, z


def density_metric(flow: Flow, nats_per_dim: Float[Array, ""], batch: Any) -> dict[str, Array]:
    """Returns the metric of the density by its name: bits/dim of pictures, nats/dim of latents.

    Example:
        metrics |= density_metric(flow, nats_per_dim, batch)
    """
    if "image" in batch:
        return {"bits_per_dim": bits_per_dim(-nats_per_dim, 1)}
    return {"nats_per_dim": nats_per_dim}


def on_samples_like(flow: Any, x: Float[Array, "b *event"]) -> Any:
    """Returns the flow of the same parameters on samples of the size of x, and with its frames where x is clips.

    Example:
        sized = on_samples_like(flow, x)
    """
    sized = flow.at(*x.shape[-3:-1])
    return sized.of_frames(x.shape[1]) if x.ndim == 5 else sized


def score(
    flow: Flow, variables: Any, x: Float[Array, "b *event"], cond: Condition | None = None
) -> Float[Array, "b *event"]:
    """Returns ∇_x log p(x | cond).

    Example:
        s = score(flow, params, x, cond)
    """
    check_flow(flow, variables)
    x = at_least_float32("x", x)

    def slope(variables, x, cond):
        return jax.grad(lambda x: flow.apply(variables, x, cond, method="log_prob").sum())(x)

    return keep_rows(slope, variables, x, cond)


def denoise(
    flow: Flow,
    variables: Any,
    x: Float[Array, "b *event"],
    cond: Condition | None = None,
    *,
    noise_std: float | None = None,
    strength: Float[Array, ""] | float = 1.0,
) -> Float[Array, "b *event"]:
    """Returns E[clean | x] by Tweedie's formula, x + strength · σ² ∇_x log p(x | cond), not clipped.

    noise_std: σ; None takes the one in the flow's config. With σ = 0 there is nothing to remove.

    Example:
        clean = denoise(flow, params, sample.x, cond)
    """
    check_flow(flow, variables)
    x = at_least_float32("x", x)
    sigma = flow.config.noise_std if noise_std is None else noise_std
    if sigma == 0:
        return x
    return x + strength * sigma**2 * score(flow, variables, x, cond)


def class_posterior(
    flow: Flow,
    variables: Any,
    x: Float[Array, "b *event"],
    log_prior: Float[Array, " classes"] | None = None,
) -> Float[Array, "b classes"]:
    """Returns p(class | x) ∝ p(x | class) p(class) by Bayes' rule, one likelihood per class, uniform prior.

    Raises ValueError where the flow has no classes.

    Example:
        labels = class_posterior(flow, params, x).argmax(axis=-1)
    """
    check_flow(flow, variables)
    num_classes = flow.config.num_classes
    if num_classes == 0:
        raise ValueError("class_posterior needs a flow with classes; this one has num_classes 0.")
    flow.config.check_samples(x)
    if log_prior is not None and jnp.shape(log_prior) != (num_classes,):
        raise ValueError(f"log_prior is {shown(log_prior)}; give one number per class, of shape ({num_classes},).")

    def log_likelihood(label):
        cond = jnp.full(x.shape[0], label, jnp.int32)
        return flow.apply(variables, x, cond, method="log_prob")

    logits = jax.lax.map(log_likelihood, jnp.arange(num_classes)).T
    if log_prior is not None:
        logits = logits + jnp.asarray(log_prior)[None]
    return jax.nn.softmax(logits, axis=-1)
