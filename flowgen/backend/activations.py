"""Decides how a stack of layers is compiled: whether it stores activations, and whether it loops over its layers."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import jax

from flowgen import huge_pages

Remat = Literal["auto"] | bool
# Activations of a stack are stored only if they need at most this fraction of the memory. Flows have up to about ten
# stacks, most of which are smaller than the last one.
SHARE_OF_MEMORY = 1 / 16
# Largest number of layers that are compiled one by one. Compile time and code size grow with this number. On two cores,
# a gradient through 8 such layers was as fast as with recomputation; a gradient through 24 such layers took 1.4 times
# as long, and 20 s to compile.
MAX_ONE_BY_ONE = 4


class Host(NamedTuple):
    """The properties of a host that determine how a stack of layers is compiled.

    platform: "cpu", "gpu" or "tpu". huge_pages: whether malloc returns memory in huge pages. memory: bytes of main
    memory divided by the number of this process's devices; 0 if unknown. processes: number of processes that train
    together.
    """

    platform: str
    huge_pages: bool
    memory: int
    processes: int = 1


class LayerForm(NamedTuple):
    """The form in which a stack of layers is compiled.

    recompute: whether the backward pass recomputes the activations of each layer. one_by_one: whether each layer is
    compiled separately; otherwise, one layer is compiled and called in a loop.
    """

    recompute: bool
    one_by_one: bool


def layer_form(remat: Remat, num_layers: int, stored_bytes: int, host: Host | None = None) -> LayerForm:
    """Returns the form in which to compile `num_layers` equal layers whose activations would take `stored_bytes` bytes.

    All forms give the same results up to rounding.

    remat: whether the backward pass recomputes the activations of each layer. "auto" recomputes them unless there are
    at most 4 layers, the platform is a CPU with huge pages, only one process trains, and the activations fit in 1/16 of
    the memory of a device. In this case, storing was measured to be faster. host: None means the host of this process.

    Accelerators always loop over the layers. On CPUs, a stack of at most 4 layers is compiled layer by layer if its
    activations are stored, because a loop would copy them into stacked arrays; all other stacks are loops. Without huge
    pages, storing takes longer than recomputing. Processes that train together must compile the same program, even if
    only some of them have huge pages; with "auto", they therefore recompute.
    """
    host = this_host() if host is None else host
    few = host.platform == "cpu" and num_layers <= MAX_ONE_BY_ONE
    if remat == "auto":
        # If a size is symbolic, stored_bytes is not an int.
        fits = isinstance(stored_bytes, int) and stored_bytes <= SHARE_OF_MEMORY * host.memory
        remat = not (few and fits and host.huge_pages and host.processes == 1)
    return LayerForm(recompute=remat, one_by_one=few and not remat)


def this_host() -> Host:
    """Returns the properties of the host that this process runs on."""
    return Host(
        platform=jax.default_backend(),
        huge_pages=not huge_pages.why_absent(),
        memory=_memory() // jax.local_device_count(),
        processes=jax.process_count(),
    )


def _memory() -> int:
    """Returns the size of the main memory in bytes; 0 if the system does not report it."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
