"""The GPU architectures that have tiles of their own: their limits, and the speed of one GPU of each.

Shared memory: CUDA C++ Programming Guide, table of technical specifications, most per block. Speeds: dense, without
sparsity, in TFLOP/s; bandwidth of the memory in GB/s.
"""

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["ARCHITECTURES", "Architecture", "nearest"]


@dataclass(frozen=True)
class Architecture:
    """shared: bytes that a block may have; tensor_core: the instruction that its tensor cores are fed with; tflops: by
    the dtype of the operands; source: what the figures are taken from.
    """

    shared: int
    tensor_core: str
    gpu: str
    tflops: Mapping[str, float]
    bandwidth: float
    source: str

    def ridge(self, dtype: str) -> float:
        """FLOPs per byte above which arithmetic is the limit."""
        return self.tflops[dtype] * 1e3 / self.bandwidth


def _speeds(half: float, tf32: float, fp32: float) -> dict[str, float]:
    return {"fp16": half, "bf16": half, "tf32": tf32, "fp32": fp32}


ARCHITECTURES = {
    80: Architecture(163 << 10, "HMMA", "A100 80GB SXM", _speeds(312, 156, 19.5), 2039, "NVIDIA A100 data sheet, 2021"),
    86: Architecture(99 << 10, "HMMA", "A10", _speeds(125, 62.5, 31.2), 600, "NVIDIA A10 data sheet, 2021"),
    90: Architecture(227 << 10, "HGMMA", "H100 SXM", _speeds(989, 495, 67), 3350, "NVIDIA H100 data sheet, 2023"),
    100: Architecture(
        227 << 10, "UTCHMMA", "B200 of an HGX", _speeds(2250, 1125, 75), 7700, "NVIDIA HGX data sheet, 2025"
    ),
}
_LIKE_86 = range(120, 130)  # the Blackwell of workstations: little shared memory, tensor cores fed with HMMA


def nearest(major: int, minor: int) -> int:
    """The known architecture to treat a compute capability as: the next lower one, and the lowest below all."""
    arch = 10 * major + minor
    if arch in _LIKE_86:
        return 86
    return max((known for known in ARCHITECTURES if known <= arch), default=min(ARCHITECTURES))
