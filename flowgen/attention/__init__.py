"""Attention functions for arrays with axes `b n h k` (batch, tokens, heads, width).

Of the rest of flowgen, this package imports only `flowgen.backend`.

softmax        softmax_attention
fused          the fused kernels that compute softmax attention on GPUs and TPUs
frames         attention of video frames to nearby frames
linear         linear_attention and its running state: init_state, prefill, step
features       the feature maps of linear attention
rotary         rotary position embeddings for sequences and grids
kernels        all kernels by name, for whole sequences and with a running state
functions      nala, focused, cosformer, pola and inline attention as functions
decay          retention and gated linear attention (simple GLA)
delta          the delta rule and its gated form
soft           SOFT and SOFT++
landmarks      a variant of SOFT that has fixed landmarks and can be causal
modules        Flax modules; flowgen.attention.nnx has their NNX versions
slices         slices of tokens that may begin at a different position in each sample
masks          conversion of query-key masks, such as Flax's, to key masks
hooks          make_attention_fn, for Flax's attention modules
cache          causal kernels for the decoders of flows
"""

from flowgen.attention.cache import (
    CAUSAL_KERNEL_NAMES,
    CausalKernel,
    KVCache,
    attend_kv_window,
    causal_kernel,
    init_kv_cache,
)
from flowgen.attention.causal import Causal
from flowgen.attention.decay import gated_linear_attention, retention, retention_log_decay
from flowgen.attention.delta import DeltaState, delta_rule, gated_delta_rule, gated_delta_step, init_delta_state
from flowgen.attention.features import (
    FEATURE_MAPS,
    FeatureMap,
    cosformer_features,
    elu_plus_one,
    feature_map,
    focused_features,
    nala_features,
    relu_features,
)
from flowgen.attention.frames import FrameWindow
from flowgen.attention.functions import (
    cosformer_attention,
    focused_attention,
    inline_attention,
    nala_attention,
    pola_attention,
)
from flowgen.attention.hooks import make_attention_fn
from flowgen.attention.kernels import (
    KERNELS,
    FeatureKernel,
    InlineKernel,
    Kernel,
    PolaKernel,
    RetentionKernel,
    kernel,
)
from flowgen.attention.landmarks import gaussian_landmark_attention, gaussian_landmark_map
from flowgen.attention.linear import attend_features, init_state, linear_attention, prefill, quadratic_products, step
from flowgen.attention.masks import own_keys
from flowgen.attention.modules import LinearAttention, NaLaAttention, SOFTAttention
from flowgen.attention.prefix import Features, LinearState, prefix_product
from flowgen.attention.rotary import Rotary, rotary_grid, rotary_line, rotate
from flowgen.attention.soft import gaussian_landmark_features, soft_attention
from flowgen.attention.softmax import attend_heads, softmax_attention
from flowgen.backend import AttentionPlan, attention_plan

__all__ = [
    "CAUSAL_KERNEL_NAMES",
    "FEATURE_MAPS",
    "KERNELS",
    "AttentionPlan",
    "Causal",
    "CausalKernel",
    "DeltaState",
    "FeatureKernel",
    "FeatureMap",
    "Features",
    "FrameWindow",
    "InlineKernel",
    "KVCache",
    "Kernel",
    "LinearAttention",
    "LinearState",
    "NaLaAttention",
    "PolaKernel",
    "RetentionKernel",
    "Rotary",
    "SOFTAttention",
    "attend_features",
    "attend_heads",
    "attend_kv_window",
    "attention_plan",
    "causal_kernel",
    "cosformer_attention",
    "cosformer_features",
    "delta_rule",
    "elu_plus_one",
    "feature_map",
    "focused_attention",
    "focused_features",
    "gated_delta_rule",
    "gated_delta_step",
    "gated_linear_attention",
    "gaussian_landmark_attention",
    "gaussian_landmark_features",
    "gaussian_landmark_map",
    "init_delta_state",
    "init_kv_cache",
    "init_state",
    "inline_attention",
    "kernel",
    "linear_attention",
    "make_attention_fn",
    "nala_attention",
    "nala_features",
    "own_keys",
    "pola_attention",
    "prefill",
    "prefix_product",
    "quadratic_products",
    "relu_features",
    "retention",
    "retention_log_decay",
    "rotary_grid",
    "rotary_line",
    "rotate",
    "soft_attention",
    "softmax_attention",
    "step",
]
