"""Tile shapes by kernel, architecture and shape class, as data.

Chosen from the machine code: no spills, tensor cores never waiting for one another, 16-byte asynchronous loads, room for
two blocks on a multiprocessor where the tile allows it. Which of them is fastest, no GPU has said yet; what
``fxfreeze kernels tune`` measures on the user's GPU goes before them.
"""

import dataclasses
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fxfreeze.kernels import measured
from fxfreeze.kernels.architectures import ARCHITECTURES, nearest

__all__ = [
    "ALL",
    "EXCEPTIONS",
    "TABLES",
    "CompilerException",
    "Config",
    "candidates",
    "choose",
    "dtype_name",
    "exceptions",
]


@dataclass(frozen=True, order=True)
class Config:
    """The block that one program computes, and how.

    pixels: output pixels or rows; outputs: output channels; channels: input channels a step of the sum, or channels of
    a kernel without one; warps; stages: loads in flight; rows: of a strip, for the rolling kernel.
    """

    pixels: int
    outputs: int = 1
    channels: int = 1
    warps: int = 4
    stages: int = 3
    rows: int = 1

    def __str__(self) -> str:
        rows = f", {self.rows} rows" if self.rows > 1 else ""
        return f"{self.pixels}x{self.outputs}x{self.channels}, {self.warps} warps, {self.stages} stages{rows}"


@dataclass(frozen=True)
class CompilerException:
    """A tile that stands in for the table's under one version of triton; what: that version makes of the table's; spills:
    bytes that the stand-in spills all the same, where no tile was found that does not.
    """

    triton: str
    arch: int
    kernel: str
    bits: int
    most: int
    config: Config
    what: str
    spills: int = 0

    def __str__(self) -> str:
        where = f"triton {self.triton}, sm_{self.arch}, {self.kernel}, {self.bits} bit, up to {self.most} outputs"
        return f"{where}: {self.config}, because {self.what}"


_INTERPRETED = 90  # whose tiles the interpreter takes

ALL = 1 << 30  # channels

Rows = dict[int, tuple[Config, ...]]  # most output channels: the choice, then what else is worth a measurement


def _tile(pixels: int, outputs: int, channels: int, warps: int, stages: int = 3, rows: int = 1) -> Config:
    return Config(pixels, outputs, channels, warps, stages, rows)


def _everywhere(rows: Rows) -> dict[int, Rows]:
    return dict.fromkeys(ARCHITECTURES, rows)


# The weights' share of a stage, outputs x channels, gives each thread 16 bytes: with less their loads grow narrow.
_CONV1X1_16: dict[int, Rows] = {
    80: {
        16: (_tile(128, 16, 64, 4), _tile(64, 16, 64, 4)),
        32: (_tile(128, 32, 64, 4), _tile(64, 32, 64, 4)),
        64: (_tile(128, 64, 64, 8), _tile(64, 64, 64, 4)),
        ALL: (_tile(128, 128, 64, 8), _tile(64, 128, 64, 8)),
    },
    86: {
        16: (_tile(128, 16, 64, 4), _tile(64, 16, 64, 4)),
        32: (_tile(128, 32, 64, 4), _tile(64, 32, 64, 4)),
        64: (_tile(128, 64, 64, 8), _tile(64, 64, 64, 4)),
        ALL: (_tile(128, 128, 32, 8), _tile(64, 128, 64, 8)),  # two of 128x128x64 exceed its shared memory
    },
    90: {
        16: (_tile(128, 16, 64, 4), _tile(64, 16, 64, 4)),
        32: (_tile(128, 32, 64, 4), _tile(64, 32, 64, 4)),
        64: (_tile(128, 64, 64, 8), _tile(64, 64, 64, 4)),
        ALL: (_tile(128, 128, 64, 8), _tile(64, 128, 64, 4)),  # 256 outputs spill under a prologue
    },
    100: {
        16: (_tile(128, 16, 64, 4), _tile(64, 16, 64, 4)),
        32: (_tile(128, 32, 64, 4), _tile(64, 32, 64, 4)),
        64: (_tile(128, 64, 64, 8), _tile(64, 64, 64, 4)),
        ALL: (_tile(128, 128, 64, 8), _tile(64, 128, 64, 4)),  # with 4 warps, 128x128 spills under a prologue
    },
}
_CONV3X3_16: dict[int, Rows] = {
    80: {
        16: (_tile(64, 16, 64, 4),),
        32: (_tile(128, 32, 64, 8), _tile(64, 32, 64, 4)),
        64: (_tile(64, 64, 64, 8), _tile(128, 64, 64, 8)),
        ALL: (_tile(128, 128, 32, 8), _tile(128, 128, 64, 8)),
    },
    86: {
        16: (_tile(64, 16, 64, 4),),
        32: (_tile(128, 32, 64, 8), _tile(64, 32, 64, 4)),
        64: (_tile(64, 64, 64, 8), _tile(128, 64, 64, 8)),
        ALL: (_tile(128, 128, 32, 8),),
    },
    90: {
        16: (_tile(64, 16, 64, 4),),
        32: (_tile(128, 32, 64, 8), _tile(64, 32, 64, 4)),
        64: (_tile(128, 64, 64, 8), _tile(64, 64, 64, 4)),
        ALL: (_tile(128, 128, 64, 8),),
    },
    100: {
        16: (_tile(128, 16, 64, 4),),
        32: (_tile(128, 32, 64, 8), _tile(128, 32, 64, 4)),
        64: (_tile(128, 64, 64, 8),),  # spills with 4 warps
        ALL: (_tile(128, 128, 64, 8),),
    },
}
# Four columns an output stand in registers, so 64 channels a step spill for 32 outputs, and so do 4 warps of 128 pixels.
_ROLLING3X3_16: Rows = {
    16: (_tile(128, 16, 32, 8, rows=4), _tile(64, 16, 32, 4, rows=4), _tile(128, 16, 32, 8, rows=8)),
    32: (_tile(64, 32, 32, 8, rows=4), _tile(64, 32, 32, 8, rows=8)),
}
# fp32 and TF32: half the channels a step fill the same bytes.
_CONV1X1_32: Rows = {
    16: (_tile(64, 16, 32, 4),),  # exact products hold both operands in registers, and spill on larger tiles
    32: (_tile(64, 32, 32, 8),),
    ALL: (_tile(64, 64, 16, 4),),
}
_CONV3X3_32: Rows = {
    16: (_tile(64, 16, 32, 4),),
    32: (_tile(64, 32, 32, 8),),
    ALL: (_tile(64, 64, 16, 8),),
}
_ROLLING3X3_32: dict[int, Rows] = {
    **_everywhere({16: (_tile(128, 16, 16, 8, rows=4),), 32: (_tile(64, 32, 16, 8, rows=4),)}),
    # Exact products would spill on these tiles.
    100: {16: (_tile(64, 16, 16, 8, rows=4),), 32: (_tile(64, 32, 16, 8, stages=2, rows=4),)},
}
# Bound by memory: 128 bytes of channels side by side, and enough pixels for 16 bytes a thread and load.
_DEPTHWISE: Rows = {  # with twice the pixels a thread, a 5x5 of fp32 spills; with 4 warps, ptxas saves on registers
    32: (Config(64, channels=32, warps=8),),
    ALL: (Config(32, channels=64, warps=8), Config(16, channels=128, warps=8)),
}
_POINTWISE: Rows = {
    32: (Config(64, channels=32, warps=8),),
    ALL: (Config(32, channels=64, warps=8), Config(64, channels=64, warps=8)),
}
_LAYERNORM: Rows = {  # a row stands in registers
    256: (Config(8, channels=256),),
    1024: (Config(2, channels=1024),),
    4096: (Config(1, channels=4096),),
    16384: (Config(1, channels=16384, warps=16),),
}


def _wide(rows: Rows) -> Rows:
    """Without the classes of a few outputs: no linear layer worth a kernel has so few."""
    return {most: tiles for most, tiles in rows.items() if most > 32}


# Kernel and bits of an element: architecture: rows.
TABLES: dict[tuple[str, int], dict[int, Rows]] = {
    ("conv1x1", 16): _CONV1X1_16,
    ("linear", 16): {arch: _wide(rows) for arch, rows in _CONV1X1_16.items()},
    ("conv3x3", 16): _CONV3X3_16,
    ("rolling3x3", 16): _everywhere(_ROLLING3X3_16),
    ("conv1x1", 32): _everywhere(_CONV1X1_32),
    ("linear", 32): _everywhere(_wide(_CONV1X1_32)),
    ("conv3x3", 32): _everywhere(_CONV3X3_32),
    ("rolling3x3", 32): _ROLLING3X3_32,
    **{("depthwise", bits): _everywhere(_DEPTHWISE) for bits in (16, 32)},
    **{("pointwise", bits): _everywhere(_POINTWISE) for bits in (16, 32)},
    **{("layernorm", bits): _everywhere(_LAYERNORM) for bits in (16, 32)},
}
EXCEPTIONS = (
    CompilerException(
        *("3.6.0", 100, "conv3x3", 16, 32), _tile(128, 32, 64, 4), "128x32x64 with 8 warps spills under a prologue"
    ),
    CompilerException(
        *("3.6.0", 100, "conv1x1", 16, ALL), _tile(64, 128, 64, 4), "128x128x64 with 8 warps spills under a prologue"
    ),
    CompilerException(
        *("3.6.0", 100, "rolling3x3", 32, 32),
        _tile(64, 32, 16, 8, stages=2, rows=4),
        "exact products of fp32 spill on every tile tried, on this one least",
        spills=40,
    ),
)


def choose(kernel: str, out: Tensor) -> Config:
    """The tile for an output (N, O, ...) on its device: measured there, or the table's."""
    return _choose(kernel, out.device, dtype_name(out.dtype), out.shape[1])


@cache
def _choose(kernel: str, device: torch.device, dtype: str, outputs: int) -> Config:
    on_gpu = device.type == "cuda"
    arch = nearest(*torch.cuda.get_device_capability(device)) if on_gpu else _INTERPRETED
    rows = candidates(kernel, arch, dtype)
    most = min(most for most in rows if most >= outputs)
    best = measured.load(torch.cuda.get_device_name(device)).get(measured.key(kernel, dtype, most)) if on_gpu else None
    # Measured by another version, a tile may be one that has been found wanting since.
    return next((config for config in rows[most] if dataclasses.asdict(config) == best), rows[most][0])


def candidates(kernel: str, arch: int, dtype: str, triton: str | None = None) -> Rows:
    """The tiles of a kernel by the most output channels that they serve, the choice first; triton: None for that here."""
    stand_ins = {exception.most: (exception.config,) for exception in exceptions(kernel, arch, dtype, triton)}
    return {**TABLES[kernel, _bits(dtype)][arch], **stand_ins}


def exceptions(kernel: str, arch: int, dtype: str, triton: str | None = None) -> list[CompilerException]:
    """Those of a version of triton; None: the one here."""
    mine = [e for e in EXCEPTIONS if (e.kernel, e.arch, e.bits) == (kernel, arch, _bits(dtype))]
    return [e for e in mine if e.triton == (triton or measured.triton_version())]


def _bits(dtype: str) -> int:
    return 16 if dtype in ("fp16", "bf16") else 32


def dtype_name(dtype: torch.dtype) -> str:
    """fp16, bf16 or fp32, or tf32 for fp32 that is multiplied so."""
    if dtype is torch.float32:
        return "fp32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    return {torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
