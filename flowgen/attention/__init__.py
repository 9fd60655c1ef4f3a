"""Attention on arrays `b n h k`; imports nothing else of flowgen."""

from flowgen.attention.cache import (
    KERNEL_NAMES,
    CausalKernel,
    KVCache,
    attend_kv_window,
    causal_kernel,
    init_kv_cache,
)
from flowgen.attention.softmax import masked_softmax, softmax_attention

__all__ = [
    "KERNEL_NAMES",
    "CausalKernel",
    "KVCache",
    "attend_kv_window",
    "causal_kernel",
    "init_kv_cache",
    "masked_softmax",
    "softmax_attention",
]
