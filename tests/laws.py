"""Laws of invertible flows, checked over a table of flows whose every parameter is perturbed.

Heads start at zero, and most bugs of a flow (a log-det sign, a scale sign, unpermuted positions, a mean for a
sum) do not show there.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

import flowgen

SMALL = {"channels": 2, "patch_size": 2, "width": 32, "num_blocks": 2, "layers_per_block": 2, "head_dim": 16}

FLOWS = {
    "affine": flowgen.TARFlowConfig(image_size=6, **SMALL),
    "classes": flowgen.TARFlowConfig(image_size=6, num_classes=3, **SMALL),
    "volume preserving": flowgen.TARFlowConfig(image_size=6, transform="volume_preserving", num_classes=3, **SMALL),
    "rectangular": flowgen.TARFlowConfig(image_size=(4, 10), num_classes=3, **SMALL),
    "no remat": flowgen.TARFlowConfig(image_size=6, remat=False, activation="silu", **SMALL),
    "nala": flowgen.TARFlowConfig(image_size=6, attention="nala", num_classes=3, **SMALL),
    "one block": flowgen.TARFlowConfig(image_size=6, **{**SMALL, "num_blocks": 1, "layers_per_block": 1}),
}
# Far from the identity, and still well conditioned in float32.
PERTURBATION = 0.05


def perturbed(config, key, scale=PERTURBATION):
    """Returns (flow, variables) with noise on every leaf, the prior variance kept positive."""
    flow = flowgen.TARFlow(config)
    variables = flowgen.init(flow, key)
    random = np.random.default_rng(0)  # compiles nothing, unlike one jax.random call per shape
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(leaf + scale * random.standard_normal(leaf.shape), leaf.dtype), variables
    )
    if "prior" in variables:
        variables["prior"] = jax.tree.map(lambda v: jnp.abs(v) + 0.1, variables["prior"])
    return flow, variables


@partial(jax.jit, static_argnames=("flow", "method"))
def apply(flow, variables, x, cond=None, *, method="forward"):
    """Runs a method of a flow compiled, once per flow and shape over all tests."""
    return flow.apply(variables, x, cond, method=method)


@cache
def case(name):
    """Returns (flow, variables, images, labels) of a row of the table."""
    flow, variables = perturbed(FLOWS[name], jax.random.key(0))
    return flow, variables, images(FLOWS[name], jax.random.key(1)), labels(FLOWS[name])


def images(config, key, batch=4):
    """Returns images in [-1, 1] of the flow's shape."""
    return jax.random.uniform(key, (batch, *config.image_shape), minval=-1.0, maxval=1.0)


def labels(config, batch=4):
    """Returns labels with one unconditional among them, or None for a flow without classes."""
    return jnp.arange(batch, dtype=jnp.int32) % config.num_classes - 1 if config.num_classes else None
