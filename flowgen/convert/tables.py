"""Rules from the names of published checkpoints to flowgen's parameter trees."""

from __future__ import annotations

import numpy as np

from flowgen.convert.mapping import Requirement, Rule, transpose


def linear(source: str, target: str) -> tuple[Rule, Rule]:
    """Returns the rules of a PyTorch Linear that becomes a Flax Dense.

    Example:
        rules = linear("blocks.{block}.proj_in", "params/blocks_{block}/proj_in")
    """
    return Rule(f"{source}.weight", f"{target}/kernel", transpose), Rule(f"{source}.bias", f"{target}/bias")


def layer_norm(source: str, target: str) -> tuple[Rule, Rule]:
    """Returns the rules of a LayerNorm.

    Example:
        rules = layer_norm("norm", "params/norm")
    """
    return Rule(f"{source}.weight", f"{target}/scale"), Rule(f"{source}.bias", f"{target}/bias")


def transformer(source: str, target: str) -> tuple[Rule, ...]:
    """Returns the rules of a published transformer's layers, numbered {layer}, that become one scanned stack.

    The columns of qkv keep their order: q, k, v, head after head inside each.

    Example:
        rules = transformer("blocks.{block}.attn_blocks.{layer}", "params/blocks_{block}/layers")
    """
    return (
        *layer_norm(f"{source}.attention.norm", f"{target}/attention_norm"),
        *linear(f"{source}.attention.qkv", f"{target}/attention/qkv"),
        *linear(f"{source}.attention.proj", f"{target}/attention/proj"),
        *layer_norm(f"{source}.mlp.norm", f"{target}/mlp_norm"),
        *linear(f"{source}.mlp.main.0", f"{target}/mlp/up"),
        *linear(f"{source}.mlp.main.2", f"{target}/mlp/down"),
    )


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
    # Where the model has no prior to fill.
    Rule("var", None, requirement=ALL_ONES),
    Rule("blocks.{block}.attn_mask", None, requirement=CAUSAL_MASK),
)
