"""Building blocks of the networks: layers and the scanned transformer stack."""

from flowgen.nn.layers import MLP, layer_norm, linear, master_dtype, patchify, unpatchify
from flowgen.nn.transformer import TransformerConfig, transformer_stack, unstack_layers

__all__ = [
    "MLP",
    "TransformerConfig",
    "layer_norm",
    "linear",
    "master_dtype",
    "patchify",
    "transformer_stack",
    "unpatchify",
    "unstack_layers",
]
