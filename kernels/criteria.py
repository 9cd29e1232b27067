"""What the machine code of a shipped tile must be: each fault in words."""

from dataclasses import replace

from fxfreeze.kernels import configs
from fxfreeze.kernels.aot import Variant
from fxfreeze.kernels.architectures import ARCHITECTURES
from fxfreeze.kernels.machine_code import MachineCode

__all__ = ["MATRIX_PRODUCTS", "dtypes", "faults"]

MATRIX_PRODUCTS = ("conv1x1", "linear", "conv3x3", "rolling3x3")


def dtypes(kernel: str) -> tuple[str, ...]:
    """What a kernel computes in: "tf32" is fp32 to all but the matrix products."""
    return ("fp16", "bf16", "fp32", *(("tf32",) if kernel in MATRIX_PRODUCTS else ()))


def faults(variant: Variant, code: MachineCode) -> list[str]:
    """Nothing for a clean one."""
    found = []
    limit = ARCHITECTURES[variant.arch].shared
    if code.spills > _excused(variant):
        found.append(f"spills {code.spills} bytes")
    if code.shared > limit:
        found.append(f"{code.shared} bytes of shared memory, the limit is {limit}")
    bits = variant.unit * (16 if variant.dtype in ("fp16", "bf16") else 32)
    narrowest = code.load_bits if variant.form == "bare" else code.widest_bits  # other forms load vectors beside x
    if narrowest < bits:
        found.append(f"loads {narrowest} bits at a time, {bits} are aligned")
    return found + (_product_faults(variant, code) if variant.kernel in MATRIX_PRODUCTS else [])


def _excused(variant: Variant) -> int:
    """Bytes of spills that the compiler of a listed exception leaves no way to avoid."""
    listed = configs.exceptions(variant.kernel, variant.arch, variant.dtype)
    return max((e.spills for e in listed if replace(e.config, rows=variant.config.rows) == variant.config), default=0)


def _product_faults(variant: Variant, code: MachineCode) -> list[str]:
    found = []
    # Exact products of fp32 are for the ordinary cores.
    expected = None if variant.dtype == "fp32" else ARCHITECTURES[variant.arch].tensor_core
    if code.tensor_core != expected:
        found.append(f"multiplies by {code.tensor_core or 'FFMA'}, not by {expected or 'FFMA'}")
    if not code.asynchronous:
        found.append("loads pass through registers")
    if code.serialised:
        found.append("products wait for one another")
    return found
