"""Known accelerators: memory, bandwidth and peak matrix-multiply throughput, from manufacturers' specifications."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Sources of the numbers. Peak throughput is stated without sparsity. Where a source only gives the throughput with
# sparsity (H100 NVL, H200 and B200), it is twice the number here.
_H100 = "NVIDIA H100 architecture whitepaper, 2023"
_H100_NVL = "NVIDIA H100 product page"
_H200 = "NVIDIA H200 datasheet, 2024"
_A100 = "NVIDIA A100 datasheet, 2021"
_BLACKWELL = "NVIDIA HGX B200 datasheet, 2024"
_L40S = "NVIDIA L40S datasheet, 2023"
_ADA = "NVIDIA Ada architecture whitepaper, 2022"
_RTX_BLACKWELL = "NVIDIA RTX Blackwell architecture whitepaper, 2025"
_TPU = "cloud.google.com/tpu/docs, system architecture"


@dataclass(frozen=True)
class Machine:
    """An accelerator.

    kinds: the values of JAX's `device_kind` that identify the accelerator. memory: the advertised memory, in GB of 10^9
    bytes. bfloat16: peak matrix-multiply throughput in TFLOP/s for bfloat16 or float16 inputs and float32 accumulation.
    float32: peak throughput for float32 inputs at JAX's default precision, which uses TF32 on GPUs and a single
    bfloat16 product on TPUs. bandwidth: memory bandwidth in GB/s. source: where the numbers are published.
    """

    name: str
    kinds: tuple[str, ...]
    memory: int
    bfloat16: float
    float32: float
    bandwidth: int
    source: str

    def peak(self, dtype: str) -> float | None:
        """Returns the peak matrix-multiply throughput in FLOP/s for inputs of a dtype.

        The result is None unless `dtype` is "bfloat16", "float16" or "float32".
        """
        teras = {"bfloat16": self.bfloat16, "float16": self.bfloat16, "float32": self.float32}.get(dtype)
        return None if teras is None else teras * 1e12


MACHINES = (
    Machine("H100 80 GB", ("NVIDIA H100 80GB HBM3",), 80, 989.4, 494.7, 3350, _H100),
    Machine("H100 PCIe", ("NVIDIA H100 PCIe",), 80, 756.0, 378.0, 2000, _H100),
    Machine("H100 NVL", ("NVIDIA H100 NVL",), 94, 835.5, 417.5, 3900, _H100_NVL),
    Machine("H200 141 GB", ("NVIDIA H200",), 141, 989.4, 494.7, 4800, _H200),
    Machine("B200", ("NVIDIA B200",), 180, 2250.0, 1125.0, 8000, _BLACKWELL),
    Machine("A100 40 GB", ("NVIDIA A100-SXM4-40GB", "NVIDIA A100-PCIE-40GB"), 40, 312.0, 156.0, 1555, _A100),
    Machine("A100 80 GB", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe"), 80, 312.0, 156.0, 1935, _A100),
    Machine("L40S", ("NVIDIA L40S",), 48, 362.05, 183.0, 864, _L40S),
    Machine("RTX 3090 24 GB", ("NVIDIA GeForce RTX 3090",), 24, 71.2, 35.6, 936, _RTX_BLACKWELL),
    Machine("RTX 4090 24 GB", ("NVIDIA GeForce RTX 4090",), 24, 165.2, 82.6, 1008, _ADA),
    Machine("RTX 5090 32 GB", ("NVIDIA GeForce RTX 5090",), 32, 209.5, 104.8, 1792, _RTX_BLACKWELL),
    Machine("TPU v4 32 GB", ("TPU v4",), 32, 275.0, 275.0, 1228, _TPU),
    Machine("TPU v5e 16 GB", ("TPU v5 lite", "TPU v5e"), 16, 197.0, 197.0, 819, _TPU),
    Machine("TPU v5p 95 GB", ("TPU v5", "TPU v5p"), 95, 459.0, 459.0, 2765, _TPU),
    Machine("TPU v6e 32 GB", ("TPU v6 lite", "TPU v6e"), 32, 918.0, 918.0, 1640, _TPU),
)


def machine_of(device_kind: str) -> Machine | None:
    """Returns the accelerator in `MACHINES` with this JAX `device_kind`; None for any other device, such as a CPU."""
    return next((machine for machine in MACHINES if device_kind in machine.kinds), None)


def seconds_at_peak(flop: Mapping[str, float], device_kind: str) -> float | None:
    """Returns the seconds in which a device computes `flop` at peak throughput; None if its peak is not known.

    flop: the number of floating-point operations of matrix products, by the name of the dtype of their inputs, such as
    "bfloat16". device_kind: as in JAX.
    """
    machine = machine_of(device_kind)
    if machine is None:
        return None
    peaks = [machine.peak(dtype) for dtype in flop]
    if not all(peaks):
        return None
    return sum((count / peak for count, peak in zip(flop.values(), peaks, strict=True) if peak), start=0.0)


def peak_memory(devices: Iterable[Any]) -> int | None:
    """Returns the largest peak memory use of any device so far, in bytes; None if no device reports its use."""
    known = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    return max((size for size in known if size), default=None)
