"""Rules that map the tensor names of published checkpoints to flowgen's parameter trees."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from flowgen.convert.mapping import Requirement, Rule, as_is, transpose


def linear(source: str, target: str) -> tuple[Rule, Rule]:
    """Returns the rules that turn a PyTorch Linear into a Flax Dense.

    Example:
        rules = linear("blocks.{block}.proj_in", "params/blocks_{block}/proj_in")
    """
    return Rule(f"{source}.weight", f"{target}/kernel", transpose), Rule(f"{source}.bias", f"{target}/bias")


def conv(source: str, target: str) -> tuple[Rule, Rule]:
    """Returns the rules that turn a PyTorch convolution, (out, in, ...) with any number of axes, into a Flax one.

    Example:
        rules = conv("encoder.conv_in", "params/encoder/conv_in")
    """
    kernel = Rule(f"{source}.weight", f"{target}/kernel", lambda x: np.moveaxis(x, (0, 1), (-1, -2)))
    return kernel, Rule(f"{source}.bias", f"{target}/bias")


def point(source: str, target: str) -> tuple[Rule, Rule]:
    """Returns the rules that turn a Linear, or in some files a convolution with a kernel of size 1, into a Dense.

    Example:
        rules = point("quant_conv", "params/quant_conv")
    """
    return Rule(f"{source}.weight", f"{target}/kernel", _point_kernel), Rule(f"{source}.bias", f"{target}/bias")


def _point_kernel(x: np.ndarray) -> np.ndarray:
    """Returns a kernel (in, out) from a weight (out, in, 1, ...)."""
    return x.reshape(x.shape[:2]).T


def layer_norm(source: str, target: str) -> tuple[Rule, Rule]:
    """Returns the rules for a LayerNorm.

    Example:
        rules = layer_norm("norm", "params/norm")
    """
    return Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")


def rms_norm(source: str, target: str) -> tuple[Rule]:
    """Returns the rule for an RMSNorm. In both the published code and flowgen, its weight is the offset from 1.

    Example:
        rules = rms_norm("final_norm", "params/final_norm")
    """
    return (Rule(f"{source}.weight", f"{target}/weight"),)


def transformer(source: str, target: str, mlp: dict[str, str] | None = None) -> tuple[Rule, ...]:
    """Returns the rules that turn a published transformer's layers, numbered {layer}, into one scanned stack.

    The columns of qkv keep their order: q, k, v, each head by head. mlp: flowgen's names for the MLP's maps, by
    their published names.

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
    """Returns the rules for a published STARFlow for images, with plain or gated MLPs.

    The rules for an option that is off fill nothing, because the model lacks their leaves.

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
        # Buffers that the published code keeps for old files but never reads.
        *(Rule(name, None) for name in ("var", f"{source}.attn_mask", "feat_rope.freqs_cos", "feat_rope.freqs_sin")),
    )


def starflow_v(*, gated: bool, denoiser_scale: float) -> tuple[Rule, ...]:
    """Returns the rules for a published STARFlow-V: its flow and its denoiser, whose output is scaled.

    Example:
        variables, dropped = fill(target, state_dict, starflow_v(gated=False, denoiser_scale=0.6))
    """
    # The denoiser has some of a block's parts, under the same names.
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
    """Returns a function that transforms a tensor of any dtype and then multiplies it by `factor` in float32.

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

# Published TARFlow, K blocks of L layers: 1 + K (2 + [classes] + 4 + 12 L) tensors.
TARFLOW = (
    Rule("blocks.{block}.pos_embed", "params/blocks_{block}/pos_embed"),
    Rule("blocks.{block}.class_embed", "params/blocks_{block}/class_embed", _drop_token_axis),
    *linear("blocks.{block}.proj_in", "params/blocks_{block}/proj_in"),
    *transformer("blocks.{block}.attn_blocks.{layer}", "params/blocks_{block}/layers"),
    *linear("blocks.{block}.proj_out", "params/blocks_{block}/proj_out"),
    Rule("var", "prior/variance", requirement=POSITIVE),
    # For models without a prior variance.
    Rule("var", None, requirement=ALL_ONES),
    Rule("blocks.{block}.attn_mask", None, requirement=CAUSAL_MASK),
)
