"""The form in which a stack of layers is compiled: which activations are stored for the backward pass, and how."""

from __future__ import annotations

import os
from typing import Literal, NamedTuple

import jax

from flowgen import huge_pages

Remat = Literal["auto"] | bool
# A stack stores at most this share of the memory: flows have up to about ten stacks, mostly smaller than the last.
SHARE_OF_MEMORY = 1 / 16


class Machine(NamedTuple):
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


def layer_form(remat: Remat, stored_bytes: int, machine: Machine | None = None) -> LayerForm:
    """Returns the form of a stack that would store `stored_bytes` of activations; results differ only in rounding.

    remat: "auto" stores activations where that is known to be faster: on a CPU with huge pages, if they fit.
    machine: the one that this process runs on, by default.

    Accelerators loop over the layers. On CPUs, stored activations are not stacked over the layers, because writing the
    stacks takes longer than all else that a loop saves. Without huge pages, storing takes longer than recomputing. If
    several processes train together, all of them must compile the same program, whatever their pages.
    """
    machine = this_machine() if machine is None else machine
    if machine.platform != "cpu":
        return LayerForm(recompute=remat is not False, one_by_one=False)
    if remat == "auto":
        fits = isinstance(stored_bytes, int) and stored_bytes <= SHARE_OF_MEMORY * machine.memory
        remat = not (fits and machine.huge_pages and machine.processes == 1)
    return LayerForm(recompute=remat, one_by_one=not remat)


def this_machine() -> Machine:
    """Returns the machine that this process runs on."""
    return Machine(
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
