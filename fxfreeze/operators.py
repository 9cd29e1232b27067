"""What operator a node is: one answer for ``nn.ReLU``, ``F.relu``, ``torch.relu``, ``x.relu()`` and ``x.relu_()``."""

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

__all__ = ["LAYERS", "Op", "op_of"]

LAYERS = ("conv", "conv_transpose", "linear")
"""The kinds with a weight and a bias."""


@dataclass(frozen=True)
class Op:
    """An operator with its arguments by the names of the functional form; weights are tensors or nodes.

    kind: one of LAYERS, or "batch_norm", "layer_norm", "activation", "add", "cat", "avg_pool", "max_pool", "mean_pool" (of
    the whole image, where its output size is 1), "identity"; function: the functional form. ``arguments["name"]`` of an
    activation is its name in ``fxfreeze.kernels``.
    """

    kind: str
    function: Callable[..., Any]
    arguments: dict[str, Any]

    @property
    def input(self) -> Any:
        return self.arguments["input"]


@dataclass(frozen=True)
class _Form:
    """A functional form. names: of its parameters, in order; defaults: of those that have one; fixed: what it implies."""

    kind: str
    function: Callable[..., Any]
    names: tuple[str, ...]
    defaults: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)

    def op(self, *args: Any, **kwargs: Any) -> Op:
        given = dict(zip(self.names, args, strict=False))
        return Op(self.kind, self.function, {**self.defaults, **self.fixed, **given, **kwargs})


def op_of(node: Any, module: GraphModule) -> Op | None:
    """The operator that ``node`` is, written as a module, a function or a method; None: none of those known here."""
    if not isinstance(node, Node):
        return None
    if node.op == "call_module":
        return _module_op(node, module.get_submodule(str(node.target)))
    if node.op not in ("call_function", "call_method") or node.target not in _FORMS:
        return None
    op = _FORMS[node.target].op(*node.args, **node.kwargs)
    does_something = op.kind != "identity" or op.arguments["training"] is False
    return op if does_something else None


_CONV = ("weight", "bias", "stride", "padding", "dilation", "groups")
_CONV_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_TRANSPOSED = ("weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_NORM = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_POOL = ("kernel_size", "stride", "padding")
_AVG = (*_POOL, "ceil_mode", "count_include_pad", "divisor_override")
_MAX = (*_POOL, "dilation", "ceil_mode", "return_indices")
_POOL_DEFAULTS = {"stride": None, "padding": 0, "ceil_mode": False}
_DROPOUT = ("input", "p", "training", "inplace")


def _activation(name: str, function: Callable[..., Any], **defaults: Any) -> _Form:
    return _Form("activation", function, ("input", "inplace"), defaults, {"name": name})


_RELU, _RELU6 = _activation("relu", F.relu), _activation("relu6", F.relu6)
_SILU, _HARDSWISH = _activation("silu", F.silu), _activation("hardswish", F.hardswish)
_GELU = _Form("activation", F.gelu, ("input",), {"approximate": "none"}, {"name": "gelu"})
_ADD = _Form("add", torch.add, ("input", "other"), {"alpha": 1, "out": None})
_AVG_POOL = _Form(
    "avg_pool", F.avg_pool2d, ("input", *_AVG), _POOL_DEFAULTS | {"count_include_pad": True, "divisor_override": None}
)
_MAX_POOL = _Form("max_pool", F.max_pool2d, ("input", *_MAX), _POOL_DEFAULTS | {"dilation": 1, "return_indices": False})
_MEAN_POOL = _Form("mean_pool", F.adaptive_avg_pool2d, ("input", "output_size"))
_LAYER_NORM = _Form(
    "layer_norm",
    F.layer_norm,
    ("input", "normalized_shape", "weight", "bias", "eps"),
    {"weight": None, "bias": None, "eps": 1e-5},
)

_FORMS: dict[Any, _Form] = {
    **{f: _Form("conv", f, ("input", *_CONV), _CONV_DEFAULTS) for f in (F.conv1d, F.conv2d, F.conv3d)},
    **{
        f: _Form("conv_transpose", f, ("input", *_TRANSPOSED), _CONV_DEFAULTS | {"output_padding": 0})
        for f in (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    },
    F.linear: _Form("linear", F.linear, ("input", "weight", "bias"), {"bias": None}),
    F.batch_norm: _Form(
        "batch_norm",
        F.batch_norm,
        ("input", *_NORM),
        {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5},
    ),
    **dict.fromkeys((F.layer_norm, torch.layer_norm), _LAYER_NORM),
    **dict.fromkeys((F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"), _RELU),
    F.relu6: _RELU6,
    F.silu: _SILU,
    F.hardswish: _HARDSWISH,
    F.gelu: _GELU,
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), _ADD),
    **dict.fromkeys(
        (torch.cat, torch.concat, torch.concatenate), _Form("cat", torch.cat, ("tensors", "dim"), {"dim": 0})
    ),
    F.avg_pool2d: _AVG_POOL,
    F.max_pool2d: _MAX_POOL,
    F.adaptive_avg_pool2d: _MEAN_POOL,
    **{
        f: _Form("identity", f, _DROPOUT, {"p": 0.5, "training": True})
        for f in (F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout)
    },
}


@dataclass(frozen=True)
class _Layer:
    """A module: its functional form, and which attributes are the form's parameters of the same name."""

    form: _Form
    attributes: tuple[str, ...] = ()
    fixed: dict[str, Any] = field(default_factory=dict)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_MODULES: dict[type[nn.Module], _Layer] = {
    **{
        layer: _Layer(_FORMS[f], _CONV)
        for layer, f in ((nn.Conv1d, F.conv1d), (nn.Conv2d, F.conv2d), (nn.Conv3d, F.conv3d))
    },
    nn.ConvTranspose1d: _Layer(_FORMS[F.conv_transpose1d], _TRANSPOSED),
    nn.ConvTranspose2d: _Layer(_FORMS[F.conv_transpose2d], _TRANSPOSED),
    nn.ConvTranspose3d: _Layer(_FORMS[F.conv_transpose3d], _TRANSPOSED),
    nn.Linear: _Layer(_FORMS[F.linear], ("weight", "bias")),
    **dict.fromkeys(
        _BATCH_NORMS, _Layer(_FORMS[F.batch_norm], ("running_mean", "running_var", "weight", "bias", "eps"))
    ),
    nn.LayerNorm: _Layer(_LAYER_NORM, ("normalized_shape", "weight", "bias", "eps")),
    nn.ReLU: _Layer(_RELU),
    nn.ReLU6: _Layer(_RELU6),
    nn.SiLU: _Layer(_SILU),
    nn.Hardswish: _Layer(_HARDSWISH),
    nn.GELU: _Layer(_GELU, ("approximate",)),
    nn.AvgPool2d: _Layer(_AVG_POOL, _AVG),
    nn.MaxPool2d: _Layer(_MAX_POOL, _MAX),
    nn.AdaptiveAvgPool2d: _Layer(_MEAN_POOL, ("output_size",)),
    nn.Identity: _Layer(_FORMS[F.dropout], fixed={"training": False}),
    **dict.fromkeys((nn.Dropout, nn.Dropout2d, nn.AlphaDropout), _Layer(_FORMS[F.dropout], ("p", "training"))),
}


def _module_op(node: Node, layer: nn.Module) -> Op | None:
    altered = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    if altered or type(layer) not in _MODULES or len(node.args) != 1 or node.kwargs:
        return None
    known = _MODULES[type(layer)]
    op = known.form.op(node.args[0], **{name: getattr(layer, name) for name in known.attributes}, **known.fixed)
    if op.kind == "batch_norm":
        op.arguments["training"] = layer.training or (layer.running_mean is None and layer.running_var is None)
        del op.arguments["momentum"]
    if op.kind == "identity" and op.arguments["training"] is not False:
        return None
    if getattr(layer, "padding_mode", "zeros") != "zeros":
        padded = {"padding": 0, "pad": layer._reversed_padding_repeated_twice, "mode": layer.padding_mode}
        return Op(op.kind, padded_convolution, op.arguments | padded)
    return op


def padded_convolution(
    input: Tensor, weight: Tensor, bias: Tensor | None, *, pad: list[int], mode: str, **options: Any
) -> Tensor:
    """A convolution whose padding repeats, reflects or wraps the input, as ``nn.Conv*d(padding_mode=mode)`` does."""
    convolution = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[weight.dim()]
    return convolution(F.pad(input, pad, mode=mode), weight, bias, **options)
