"""Flows on vectors, sequences and sets, and flows of images under a context: the table that laws are checked over.

Also one block as an independent formula.
"""

import dataclasses
from math import erf

import jax
import jax.numpy as jnp
import laws
import numpy as np

import flowgen
from flowgen.conditioning import ContextTokens, Padded
from flowgen.contexts import ImageContext, TokenContext, VectorContext
from flowgen.flows import TokenFlowConfig
from flowgen.transforms import MixtureMap

EXACT = 1e-10  # float64: a few hundred operations on numbers of magnitude 1
SMALL = {"width": 16, "head_dim": 8, "num_blocks": 2, "layers_per_block": 1}
ORDER = (3, 1, 0, 4, 2)
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1]], bool)
TOKENS = TokenContext(length=3, dim=2)
TOKEN_MASK = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 1]], bool)


def floats(*shape, seed=5):
    return np.random.default_rng(seed).standard_normal(shape)


def context():
    return ContextTokens(floats(3, 3, 2), TOKEN_MASK)


STAR = {"image_size": (4, 6), "patch_size": 2, "channels": 1, "width": 20, "head_dim": 20, "layers_per_block": (1, 1)}
CASES = {
    "vector": (TokenFlowConfig(shape=(6,), group=2, **SMALL), lambda: None),
    "one number": (TokenFlowConfig(shape=(1,), **SMALL), lambda: None),
    "permuted": (TokenFlowConfig(shape=(5, 3), orders=(ORDER, ORDER[::-1]), **SMALL), lambda: None),
    "classes": (TokenFlowConfig(shape=(4, 2), num_classes=3, **SMALL), lambda: np.array([0, -1, 2])),
    "padded": (TokenFlowConfig(shape=(5, 2), padded=True, **SMALL), lambda: Padded(MASK)),
    "vector context": (TokenFlowConfig(shape=(4,), context=VectorContext(dim=3), **SMALL), lambda: floats(3, 3)),
    "padded, permuted, context": (
        TokenFlowConfig(shape=(5, 2), padded=True, orders=(ORDER, ORDER[::-1]), context=TOKENS, **SMALL),
        lambda: Padded(MASK, context()),
    ),
    "mixture": (TokenFlowConfig(shape=(4,), mixture=MixtureMap(components=3), **SMALL), lambda: None),
    "padded mixture": (
        TokenFlowConfig(shape=(5, 2), padded=True, mixture=MixtureMap(components=2, kind="logistic"), **SMALL),
        lambda: Padded(MASK),
    ),
    "padded, context, running state": (
        TokenFlowConfig(shape=(5, 2), padded=True, attention="retention", context=TOKENS, **SMALL),
        lambda: Padded(MASK, context()),
    ),
    "image from image": (
        flowgen.TARFlowConfig(image_size=4, channels=1, patch_size=2, context=ImageContext((4, 6), 1, 2), **SMALL),
        lambda: floats(3, 4, 6, 1),
    ),
    "latents from tokens": (
        flowgen.STARFlowConfig(context=TOKENS, conditioned_blocks="all", **STAR),
        context,
    ),
}
# Cases that others cover in part.
ALIKE = (
    *("one number", "permuted", "classes", "padded", "padded mixture", "padded, context, running state"),
    "latents from tokens",
)


def case(name, dtype="float32"):
    """Returns (flow, perturbed variables, samples without values at padding, condition)."""
    config, cond = CASES[name]
    scale = 0.2 if isinstance(config, TokenFlowConfig) else 0.05  # A TARFlow clips no outputs.
    flow, params = laws.perturbed(dataclasses.replace(config, dtype=dtype), jax.random.key(0), scale=scale)
    cond = jax.tree.map(lambda part: jnp.asarray(part, dtype if part.dtype == float else None), cond())
    x = jnp.asarray(floats(3, *config.event_shape, seed=6), dtype)
    return flow, params, exists(x, cond), cond


def exists(x, cond):
    return jnp.where(cond.mask[:, :, None], x, 0) if isinstance(cond, Padded) else x


def sizes(x, cond, index):
    """The indices of a sample's values that exist."""
    of_row = np.ones(x.shape[1:], bool)
    if isinstance(cond, Padded):
        of_row &= np.asarray(cond.mask[index])[:, None]
    return of_row.reshape(-1)


def in_patches(image, side=2):
    """The patches of an image, row by row, without an axis of channels."""
    height, width, _ = image.shape
    corners = [(row, column) for row in range(0, height, side) for column in range(0, width, side)]
    return np.stack([image[row : row + side, column : column + side].reshape(-1) for row, column in corners])


def numpy_block(weights, x, tokens, table=None, head_dim=8, clip=4.0):
    """One block with one layer, token by token: x in the block's order and the context, both without padding.

    table: embeddings of the positions of the context's tokens.
    """
    table = np.zeros((len(tokens), 1)) if table is None else table

    def linear(part, h):
        return h @ part["kernel"] + part["bias"]

    def layer_norm(part, h):
        centred = h - h.mean()
        return centred / np.sqrt(np.square(centred).mean() + 1e-5) * part["scale"] + part["bias"]

    def gelu(h):
        return np.array([0.5 * v * (1 + erf(v / np.sqrt(2))) for v in h])

    layer = jax.tree.map(lambda leaf: leaf[0], weights["layers"])
    previous = [weights["start_token"], *x[:-1]]
    h = [linear(weights["proj_prefix"], token) + place for token, place in zip(tokens, table, strict=True)]
    h += [linear(weights["proj_in"], p) + weights["pos_embed"][i] for i, p in enumerate(previous)]
    qkv = [np.split(linear(layer["attention"]["qkv"], layer_norm(layer["attention_norm"], v)), 3) for v in h]
    after = []
    for t in range(len(h)):
        heads = []
        for head in range(0, len(h[0]), head_dim):
            part = slice(head, head + head_dim)
            logits = np.array([qkv[t][0][part] @ qkv[s][1][part] for s in range(t + 1)]) / np.sqrt(head_dim)
            share = np.exp(logits - logits.max())
            heads.append(sum(w * qkv[s][2][part] for s, w in enumerate(share / share.sum())))
        v = h[t] + linear(layer["attention"]["proj"], np.concatenate(heads))
        after.append(
            v + linear(layer["mlp"]["down"], gelu(linear(layer["mlp"]["up"], layer_norm(layer["mlp_norm"], v))))
        )
    z, log_det = [], 0.0
    for value, v in zip(x, after[len(tokens) :], strict=True):
        normed = v / np.sqrt(np.square(v).mean() + 1e-6) * (1 + weights["final_norm"]["weight"])
        log_scale, shift = np.split(clip * np.tanh(linear(weights["proj_out"], normed) / clip), 2)
        z.append((value - shift) * np.exp(-log_scale))
        log_det -= log_scale.sum()
    return np.array(z), log_det
