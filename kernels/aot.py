"""Compiles any kernel for a named architecture with no GPU present, and reads its machine code.

A ``Variant`` is one specialisation as a launcher would ask for it: the arguments that are there, and the unit that
strides and channels are counted in. ``FORMS`` holds, for each kernel, those that a frozen network needs, from the
bare one, whose loads are those of the operands alone, to the one with most to do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fxfreeze.kernels import machine_code
from fxfreeze.kernels.configs import Config
from fxfreeze.kernels.gpu import conv1x1, conv3x3, depthwise, layernorm, pointwise, rolling3x3
from fxfreeze.kernels.machine_code import MachineCode

__all__ = ["FORMS", "NARROW_FORMS", "Variant", "compiled", "look"]

_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
_POINTERS = {"fp16": "*fp16", "bf16": "*bf16", "fp32": "*fp32", "tf32": "*fp32"}
_VECTORS = ("bias", "scale", "shift")  # fp32 of a folded batch norm, whatever the images are
_IMAGES = ("x", "w", "residual", "y")
_ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Form:
    """What a kernel is asked for: which optional tensors are there, and its constants."""

    tensors: frozenset[str]
    constants: Mapping[str, Any]


def _form(tensors: str = "", **constants: Any) -> Form:
    return Form(frozenset(tensors.split()), constants)


_PLAIN = {"PRO": "none", "ACT": "relu"}
_PROLOGUE = {"PRO": "relu", "ACT": "relu"}
_GEMM = {
    "bare": _form("bias", **_PLAIN),
    "prologue": _form("scale shift bias", **_PROLOGUE),
    "full": _form("scale shift bias residual", **_PROLOGUE),
}


def _gemm(**constants: Any) -> dict[str, Form]:
    return {name: Form(form.tensors, {**form.constants, **constants}) for name, form in _GEMM.items()}


FORMS: dict[str, dict[str, Form]] = {
    "conv1x1": {**_gemm(FLAT=True), "strided": _gemm(FLAT=False)["full"]},
    "linear": {"bare": _form("bias", FLAT=True, **_PLAIN), "gelu": _form("bias", PRO="none", ACT="gelu", FLAT=True)},
    "conv3x3": _gemm(KH=3, KW=3),
    "rolling3x3": _gemm(),
    "depthwise": {
        "bare": _form(ACT="none", KH=3, KW=3, PACKED=True),
        "3x3": _form("bias", ACT="relu6", KH=3, KW=3, PACKED=True),
        "5x5": _form("bias", ACT="hardswish", KH=5, KW=5, PACKED=True),
    },
    "pointwise": {
        "bare": _form(ACT="relu", POOL="none", KH=1, KW=1, COUNT_PAD=True),
        "affine": _form("scale shift", ACT="relu", POOL="none", KH=1, KW=1, COUNT_PAD=True),
        "average": _form("scale shift", ACT="relu", POOL="avg", KH=2, KW=2, COUNT_PAD=True),
        "maximum": _form("scale shift", ACT="relu", POOL="max", KH=3, KW=3, COUNT_PAD=True),
        "global": _form("scale shift", ACT="relu", POOL="global"),
    },
    "layernorm": {"bare": _form(), "full": _form("weight bias")},
}
# Those that networks ask for whose channels are multiples of 4 only: DenseNets of growth 12. Where another form is asked
# for so, half as wide loads need twice the addresses, and the larger tiles spill some.
NARROW_FORMS: dict[str, tuple[str, ...]] = {
    "conv1x1": ("bare", "prologue"),
    "linear": ("bare", "gelu"),
    "rolling3x3": ("bare", "prologue", "full"),
    "pointwise": ("bare", "affine", "average", "global"),
}
_FUNCTIONS = {
    "conv1x1": conv1x1.conv1x1_kernel,
    "linear": conv1x1.conv1x1_kernel,
    "conv3x3": conv3x3.conv3x3_kernel,
    "rolling3x3": rolling3x3.rolling3x3_kernel,
    "depthwise": depthwise.depthwise_kernel,
    "pointwise": pointwise.pointwise_kernel,
    "layernorm": layernorm.layernorm_kernel,
}


@dataclass(frozen=True)
class Variant:
    """One specialisation. arch: 90 for sm_90; dtype: fp16, bf16, fp32 or tf32 (fp32 images, products in TF32); unit:
    elements that every start, stride and number of channels is a multiple of.
    """

    kernel: str
    config: Config
    arch: int
    dtype: str
    form: str = "bare"
    unit: int = 8


def look(variant: Variant) -> MachineCode:
    """The machine code of a variant."""
    kernel = compiled(variant)
    return machine_code.read(kernel.asm["cubin"], kernel.metadata.shared, _TOOLS)


def compiled(variant: Variant) -> Any:
    """Triton's compiled kernel, from its cache if it is there; what triton raises passes through."""
    form = FORMS[variant.kernel][variant.form]
    function = _FUNCTIONS[variant.kernel]
    if form.constants.get("POOL") == "global":
        function = pointwise.global_mean_kernel
    given = {**form.constants, **_constants(variant)}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(function.arg_names):
        pointer = _pointer(name, variant)
        if function.params[place].is_constexpr:
            signature[name], constants[place,] = "constexpr", given[name]
        elif pointer and (name in form.tensors or name in ("x", "w", "y")):
            signature[name], attributes[place,] = pointer, _ALIGNED
        elif pointer:
            signature[name], constants[place,] = "constexpr", None
        else:
            signature[name] = "fp32" if name == "eps" else "i32"
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": variant.config.warps, "num_stages": variant.config.stages}
    return triton.compile(source, target=GPUTarget("cuda", variant.arch, 32), options=options)


def _pointer(name: str, variant: Variant) -> str | None:
    if name in _IMAGES:
        return _POINTERS[variant.dtype]
    return "*fp32" if name in (*_VECTORS, "weight") else None


def _constants(variant: Variant) -> dict[str, Any]:
    """What a launcher sets from a configuration, by the names that the kernels have for it."""
    config, unit = variant.config, variant.unit
    precision = "tf32" if variant.dtype == "tf32" else "ieee"
    block = {"BP": config.pixels, "BR": config.pixels, "BO": config.outputs, "BC": config.channels}
    return {"PRECISION": precision, "VC": unit, "VO": unit, "V": unit, **block}
