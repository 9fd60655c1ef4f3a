"""Building blocks of the networks: layers, the scanned transformer stack, convolution blocks and embeddings."""

from flowgen.nn.convolution import ResidualBlock, SpatialAttention
from flowgen.nn.embeddings import ConditionEmbedding, class_rows, grid_positions, time_features
from flowgen.nn.init import init
from flowgen.nn.layers import MLP, RMSNorm, layer_norm, linear, master_dtype, patchify, unpatchify
from flowgen.nn.transformer import TransformerConfig, transformer_stack, unstack_layers

__all__ = [
    "MLP",
    "ConditionEmbedding",
    "RMSNorm",
    "ResidualBlock",
    "SpatialAttention",
    "TransformerConfig",
    "class_rows",
    "grid_positions",
    "init",
    "layer_norm",
    "linear",
    "master_dtype",
    "patchify",
    "time_features",
    "transformer_stack",
    "unpatchify",
    "unstack_layers",
]
