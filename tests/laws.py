"""Laws of invertible flows, checked over a table of flows whose every parameter is perturbed.

Heads start at zero, and most bugs of a flow (a log-det sign, a scale sign, unpermuted positions, a mean for a
sum) do not show there.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np

import flowgen
import flowgen.flows
from flowgen.conditioning import TextCondition
from flowgen.data import Batch

SMALL = {"channels": 2, "patch_size": 2, "width": 32, "num_blocks": 2, "layers_per_block": 2, "head_dim": 16}

# Heads need 20 channels at least for positions on three axes.
STAR = {"channels": 2, "patch_size": 2, "width": 40, "layers_per_block": (1, 2), "head_dim": 20}

FLOWS = {
    "affine": flowgen.TARFlowConfig(image_size=6, **SMALL),
    "classes": flowgen.TARFlowConfig(image_size=6, num_classes=3, **SMALL),
    "volume preserving": flowgen.TARFlowConfig(
        image_size=6, scale_parameterisation="volume_preserving", num_classes=3, **SMALL
    ),
    "rectangular": flowgen.TARFlowConfig(image_size=(4, 10), num_classes=3, **SMALL),
    "no remat": flowgen.TARFlowConfig(image_size=6, remat=False, activation="silu", **SMALL),
    "nala": flowgen.TARFlowConfig(image_size=6, attention="nala", num_classes=3, **SMALL),
    "one block": flowgen.TARFlowConfig(image_size=6, **{**SMALL, "num_blocks": 1, "layers_per_block": 1}),
    "starflow class prefix": flowgen.STARFlowConfig(image_size=6, num_classes=3, **STAR),
    "starflow added class": flowgen.STARFlowConfig(
        image_size=6, num_classes=3, class_conditioning="add", conditioned_blocks="all", order="raster", **STAR
    ),
    "starflow text": flowgen.STARFlowConfig(image_size=6, text_dim=5, text_length=3, rope_base_grid=4.0, **STAR),
    "starflow options": flowgen.STARFlowConfig(
        image_size=6,
        num_classes=3,
        conditioned_blocks="all",
        num_kv_heads=1,
        qk_norm=True,
        post_norm=True,
        norm="rms_norm",
        activation="geglu",
        use_bias=False,
        **STAR,
    ),
    "starflow rectangular": flowgen.STARFlowConfig(
        image_size=(4, 10), deep_width=80, soft_clip=0.0, **{**STAR, "layers_per_block": (1, 0, 2)}
    ),
    "starflow video": flowgen.flows.STARFlowVConfig(image_size=(4, 2), frames=4, text_dim=5, text_length=3, **STAR),
    "starflow nala": flowgen.STARFlowConfig(image_size=6, attention="nala", text_dim=5, text_length=3, **STAR),
}
# Far from the identity, and still well conditioned in float32.
PERTURBATION = 0.05


def drawn(init, *args, scale=PERTURBATION):
    """Variables of the shapes that `init(*args)` has, as large as fresh ones, with noise on every leaf.

    Unlike init itself, this compiles nothing; kernels of zero, as heads have, are small.
    """
    random = np.random.default_rng(0)

    def fresh(path, shape):
        *_, parent, name = ("", *(key.key for key in path))
        if name == "kernel" and parent != "proj_out":
            return random.uniform(-1, 1, shape) / np.sqrt(np.prod(shape[:-1] if len(shape) > 3 else shape[-2]))
        return random.standard_normal(shape) if name == "start_token" else float(name in ("scale", "variance"))

    def leaf(path, struct):
        noise = scale * random.standard_normal(struct.shape)
        value = fresh(path, struct.shape) + noise
        return np.asarray(np.abs(value) + 0.1 if path[-1].key == "variance" else value, struct.dtype)

    return jax.tree_util.tree_map_with_path(leaf, jax.eval_shape(lambda: init(*args)))


def perturbed(config, key, scale=PERTURBATION):
    """Returns (flow, variables) with noise on every leaf, the prior variance kept positive."""
    flow = config.build()
    return flow, jax.tree.map(jnp.asarray, drawn(flowgen.init, flow, key, scale=scale))


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
    """Returns images, or clips, in [-1, 1] of the flow's shape."""
    return jax.random.uniform(key, (batch, *config.event_shape), minval=-1.0, maxval=1.0)


def labels(config, batch=4):
    """Returns labels with one unconditional among them, texts of unequal length, or None for a flow without either."""
    if config.text_dim:
        random = np.random.default_rng(2)
        embeddings = random.standard_normal((batch, config.text_length, config.text_dim))
        mask = np.arange(config.text_length)[None] <= np.arange(batch)[:, None] % config.text_length
        return TextCondition(jnp.asarray(embeddings, jnp.float32), jnp.asarray(mask))
    return jnp.arange(batch, dtype=jnp.int32) % config.num_classes - 1 if config.num_classes else None


def batch_of(x, cond):
    """Returns the batch of 8-bit images that an objective takes."""
    return Batch(jnp.asarray((x + 1) * 127, jnp.uint8), cond)
