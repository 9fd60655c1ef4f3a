"""The form in which a stack of layers is compiled: which activations are stored for the backward pass, and how."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import jax

from flowgen import huge_pages

Remat = Literal["auto"] | bool
# A stack stores at most this share of the memory: flows have up to about ten stacks, mostly smaller than the last.
SHARE_OF_MEMORY = 1 / 16
# Most layers that a program contains one by one. Compilation and code grow with them: on two cores, a gradient through
# 8 layers was as fast as with recomputation, and one through 24 layers took 1.4 times as long, and 20 s to compile.
MAX_ONE_BY_ONE = 4


class Host(NamedTuple):
    """What the form of a stack depends on.

    platform: "cpu", "gpu" or "tpu". huge_pages: whether malloc gives huge pages. memory: bytes of memory for each
    device; 0 if unknown. processes: number of processes that train together.
    """

    platform: str
    huge_pages: bool
    memory: int
    processes: int = 1


class LayerForm(NamedTuple):
    """recompute: whether the backward pass recomputes the activations of each layer. one_by_one: whether the program
    contains every layer, or a loop over one."""

    recompute: bool
    one_by_one: bool


def layer_form(remat: Remat, num_layers: int, stored_bytes: int, host: Host | None = None) -> LayerForm:
    """Returns the form of a stack that would store `stored_bytes` of activations; results differ only in rounding.

    remat: "auto" stores activations where that was measured to be faster: in stacks of few layers, on a CPU with huge
    pages, if they fit. host: the one that this process runs on, by default.

    Accelerators always loop over the layers. On CPUs, few layers are compiled one by one if their activations are
    stored, because a loop would write these into stacked arrays. Without huge pages, storing takes longer than
    recomputing. Processes that train together must compile the same program, whatever their pages.
    """
    host = this_host() if host is None else host
    few = host.platform == "cpu" and num_layers <= MAX_ONE_BY_ONE
    if remat == "auto":
        fits = isinstance(stored_bytes, int) and stored_bytes <= SHARE_OF_MEMORY * host.memory  # else symbolic
        remat = not (few and fits and host.huge_pages and host.processes == 1)
    return LayerForm(recompute=remat, one_by_one=few and not remat)


def this_host() -> Host:
    """Returns the machine that this process runs on."""
    return Host(
        platform=jax.default_backend(),
        huge_pages=not huge_pages.why_absent(),
        memory=_memory() // jax.local_device_count(),
        processes=jax.process_count(),
    )


def _memory() -> int:
    """Returns the bytes of main memory; 0 if the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 0
