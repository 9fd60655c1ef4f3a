"""Laws of invertible flows, checked over a table of flows whose every parameter is perturbed.

Heads start at zero, and most bugs of a flow (a log-det sign, a scale sign, unpermuted positions, a mean for a
sum) do not show there.
"""

import jax
import jax.numpy as jnp

import flowgen

SMALL = {"channels": 2, "patch_size": 2, "width": 32, "num_blocks": 3, "layers_per_block": 2, "head_dim": 16}

FLOWS = {
    "affine": flowgen.TARFlowConfig(image_size=6, **SMALL),
    "classes": flowgen.TARFlowConfig(image_size=6, num_classes=3, **SMALL),
    "volume preserving": flowgen.TARFlowConfig(image_size=6, transform="volume_preserving", num_classes=3, **SMALL),
    "rectangular": flowgen.TARFlowConfig(image_size=(4, 10), num_classes=3, **SMALL),
    "remat": flowgen.TARFlowConfig(image_size=6, remat=True, activation="silu", **SMALL),
    "one block": flowgen.TARFlowConfig(image_size=6, **{**SMALL, "num_blocks": 1, "layers_per_block": 1}),
}
PERTURBATION = 0.15


def perturbed(config, key, scale=PERTURBATION):
    """Returns (flow, variables) with noise on every leaf, the prior variance kept positive."""
    flow = flowgen.TARFlow(config)
    init_key, noise_key = jax.random.split(key)
    variables = flowgen.init(flow, init_key)
    leaves, tree = jax.tree.flatten(variables)
    keys = jax.random.split(noise_key, len(leaves))
    noisy = [leaf + scale * jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    variables = jax.tree.unflatten(tree, noisy)
    if "prior" in variables:
        variables["prior"] = jax.tree.map(lambda v: jnp.abs(v) + 0.1, variables["prior"])
    return flow, variables


def images(config, key, batch=4):
    """Returns images in [-1, 1] of the flow's shape."""
    return jax.random.uniform(key, (batch, *config.image_shape), minval=-1.0, maxval=1.0)


def labels(config, batch=4):
    """Returns labels with one unconditional among them, or None for a flow without classes."""
    return jnp.arange(batch, dtype=jnp.int32) % config.num_classes - 1 if config.num_classes else None
