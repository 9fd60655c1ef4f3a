"""Attention on arrays `b n h k`; imports nothing else of flowgen."""

from flowgen.attention.cache import (
    KERNEL_NAMES,
    CausalKernel,
    KVCache,
    attend_kv_window,
    causal_kernel,
    init_kv_cache,
)
from flowgen.attention.softmax import attend_heads, softmax_attention

__all__ = [
    "KERNEL_NAMES",
    "CausalKernel",
    "KVCache",
    "attend_heads",
    "attend_kv_window",
    "causal_kernel",
    "init_kv_cache",
    "softmax_attention",
]
