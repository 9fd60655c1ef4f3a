"""Rules that map the tensor names of published checkpoints to flowgen's parameter trees."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from flowgen.convert.mapping import Requirement, Rule, as_is, transpose


def linear(source: str, target: str) -> tuple[Rule, Rule]:
    """Returns the rules that copy a PyTorch Linear to a Flax Dense.

    source, target: templates for the name of the Linear and for the path of the Dense, with indices as in `Rule`.

    Example:
        rules = linear("blocks.{block}.proj_in", "params/blocks_{block}/proj_in")
    """
    return Rule(f"{source}.weight", f"{target}/kernel", transpose), Rule(f"{source}.bias", f"{target}/bias")


def conv(source: str, target: str) -> tuple[Rule, Rule]:
    """Returns the rules that turn a PyTorch convolution into a Flax one, for any number of spatial axes.

    Example:
        rules = conv("encoder.conv_in", "params/encoder/conv_in")
    """
    kernel = Rule(f"{source}.weight", f"{target}/kernel", lambda x: np.moveaxis(x, (0, 1), (-1, -2)))
    return kernel, Rule(f"{source}.bias", f"{target}/bias")


def point(source: str, target: str) -> tuple[Rule, Rule]:
    """Returns the rules that turn a position-wise PyTorch layer into a Flax Dense.

    Depending on the file, the layer is a Linear or a convolution with a kernel of size 1.

    Example:
        rules = point("quant_conv", "params/quant_conv")
    """
    return Rule(f"{source}.weight", f"{target}/kernel", _point_kernel), Rule(f"{source}.bias", f"{target}/bias")


def _point_kernel(x: np.ndarray) -> np.ndarray:
    """Converts a weight of shape (out, in, 1, ...) to a kernel of shape (in, out)."""
    return x.reshape(x.shape[:2]).T


def layer_norm(source: str, target: str) -> tuple[Rule, Rule]:
    """Returns the rules that copy a PyTorch LayerNorm or GroupNorm to the same layer of Flax.

    source, target: templates for the name of the PyTorch layer and for the path of the Flax layer, as for `linear`.

    Example:
        rules = layer_norm("norm", "params/norm")
    """
    return Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")


def rms_norm(source: str, target: str) -> tuple[Rule]:
    """Returns the rule for an RMSNorm. Both the published code and flowgen multiply by 1 + weight.

    Example:
        rules = rms_norm("final_norm", "params/final_norm")
    """
    return (Rule(f"{source}.weight", f"{target}/weight"),)


def transformer(source: str, target: str, mlp: dict[str, str] | None = None) -> tuple[Rule, ...]:
    """Returns the rules that turn the layers of a published transformer into one stack of scanned layers.

    The columns of qkv keep their order: all heads of q, then all heads of k, then all heads of v.

    source: template for the names of the layers, in which {layer} is the number of the layer.
    mlp: maps the published names of the MLP's linear layers to flowgen's names.

    Example:
        rules = transformer("blocks.{block}.attn_blocks.{layer}", "params/blocks_{block}/layers")
    """
    mlp = {"main.0": "up", "main.2": "down"} if mlp is None else mlp
    maps = (linear(f"{source}.mlp.{theirs}", f"{target}/mlp/{ours}") for theirs, ours in mlp.items())
    return (
        *layer_norm(f"{source}.attention.norm", f"{target}/attention_norm"),
        *linear(f"{source}.attention.qkv", f"{target}/attention/qkv"),
        *linear(f"{source}.attention.proj", f"{target}/attention/proj"),
        *layer_norm(f"{source}.mlp.norm", f"{target}/mlp_norm"),
        *itertools.chain.from_iterable(maps),
    )


def starflow(*, gated: bool) -> tuple[Rule, ...]:
    """Returns the rules that import a published STARFlow for images. gated: whether its MLPs are gated.

    The rules also cover optional parts. If a model lacks such a part, the rules for this part have no effect.

    Example:
        variables, dropped = fill(target, state_dict, starflow(gated=False))
    """
    names = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down"} if gated else None
    source, target = "blocks.{block}", "params/blocks_{block}"
    layer, layers = f"{source}.attn_blocks.{{layer}}", f"{target}/layers"
    return (
        Rule(f"{source}.sos_embed", f"{target}/start_token", _drop_batch_and_token_axes),
        *linear(f"{source}.proj_in", f"{target}/proj_in"),
        *linear(f"{source}.proj_txt", f"{target}/proj_prefix"),
        *transformer(layer, layers, names),
        *rms_norm(f"{layer}.attention.norm", f"{layers}/attention_norm"),
        *rms_norm(f"{layer}.mlp.norm", f"{layers}/mlp_norm"),
        *rms_norm(f"{layer}.attention.query_norm", f"{layers}/attention/query_norm"),
        *rms_norm(f"{layer}.attention.key_norm", f"{layers}/attention/key_norm"),
        *rms_norm(f"{layer}.attention.post_norm", f"{layers}/attention_post_norm"),
        *rms_norm(f"{layer}.mlp.post_norm", f"{layers}/mlp_post_norm"),
        *rms_norm(f"{source}.final_norm", f"{target}/final_norm"),
        *linear(f"{source}.proj_out", f"{target}/proj_out"),
        # The published code keeps these buffers so that it can load old files, but never reads them.
        *(Rule(name, None) for name in ("var", f"{source}.attn_mask", "feat_rope.freqs_cos", "feat_rope.freqs_sin")),
    )


def starflow_v(*, gated: bool, denoiser_scale: float) -> tuple[Rule, ...]:
    """Returns the rules for a published STARFlow-V, which consists of a flow and a denoiser.

    denoiser_scale: the factor by which the output of the denoiser is multiplied.

    Example:
        variables, dropped = fill(target, state_dict, starflow_v(gated=False, denoiser_scale=0.6))
    """
    # The denoiser has some of the layers of a block, under the same names.
    source, target = "learnable_self_denoiser", "params/denoiser"
    parts = (
        dataclasses.replace(
            rule,
            source=rule.source.replace("blocks.{block}", source),
            target=rule.target.replace("params/blocks_{block}", target),
        )
        for rule in starflow(gated=gated)
        if rule.target is not None and not rule.target.endswith(("start_token", "proj_out/kernel", "proj_out/bias"))
    )
    return (
        *starflow(gated=gated),
        *parts,
        Rule(f"{source}.proj_out.weight", f"{target}/proj_out/kernel", scaled(denoiser_scale, transpose)),
        Rule(f"{source}.proj_out.bias", f"{target}/proj_out/bias", scaled(denoiser_scale)),
    )


def scaled(factor: float, transform: Callable[[np.ndarray], np.ndarray] = as_is) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function that transforms a tensor and then multiplies it by `factor` in float32.

    Example:
        Rule("proj.weight", "params/proj/kernel", scaled(0.5, transpose))
    """
    return lambda x: transform(x).astype(np.float32) * np.float32(factor)


def _drop_batch_and_token_axes(x: np.ndarray) -> np.ndarray:
    return np.squeeze(x, axis=(0, 1))


def _drop_token_axis(x: np.ndarray) -> np.ndarray:
    return np.squeeze(x, axis=1)


CAUSAL_MASK = Requirement("a lower triangle of ones", lambda x: x.ndim == 2 and np.array_equal(x, np.tri(*x.shape)))
ALL_ONES = Requirement("all ones", lambda x: bool((x == 1).all()))
POSITIVE = Requirement("positive everywhere", lambda x: bool((x > 0).all()))

# A published TARFlow of K blocks with L layers each has 1 + K (6 + 12 L) tensors, and K more if it has classes.
TARFLOW = (
    Rule("blocks.{block}.pos_embed", "params/blocks_{block}/pos_embed"),
    Rule("blocks.{block}.class_embed", "params/blocks_{block}/class_embed", _drop_token_axis),
    *linear("blocks.{block}.proj_in", "params/blocks_{block}/proj_in"),
    *transformer("blocks.{block}.attn_blocks.{layer}", "params/blocks_{block}/layers"),
    *linear("blocks.{block}.proj_out", "params/blocks_{block}/proj_out"),
    Rule("var", "prior/variance", requirement=POSITIVE),
    # In models without a learned prior variance, all values of this buffer are 1.
    Rule("var", None, requirement=ALL_ONES),
    Rule("blocks.{block}.attn_mask", None, requirement=CAUSAL_MASK),
)
