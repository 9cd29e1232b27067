"""The arguments of a forward call: what a trace bakes in, and the tensors that flow through the graph."""

import inspect
import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

__all__ = ["BAKED", "Inputs", "TraceRefusal", "flatten_inputs", "required_inputs"]

BAKED = (
    *(type(None), bool, int, float, complex, str, bytes),
    *(torch.dtype, torch.device, torch.memory_format, torch.layout, type),
)


class TraceRefusal(ValueError):  # noqa: N818 - a refusal is not a defect of the user's program
    """A network that can't be traced; the message says where and what to do."""


@dataclass(frozen=True)
class Inputs:
    """The arguments of a forward call: which leaves are tensors, and the values of those that are not.

    names: one name per tensor leaf; leaves: the constants, with ``Tensor`` standing where a tensor was.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    names: tuple[str, ...]

    def unflatten(self, tensors: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with the tensor leaves replaced, in order, by ``tensors``."""
        supply = iter(tensors)
        args, kwargs = pytree.tree_unflatten(
            [next(supply) if leaf is Tensor else leaf for leaf in self.leaves], self.spec
        )
        return args, kwargs


def flatten_inputs(net: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Inputs, list[Tensor]]:
    """Split the arguments of a call into what a trace bakes in and the tensors that flow through the graph.

    Raises TraceRefusal for a leaf that is neither a tensor nor a plain constant: its contents would be baked in.
    """
    with_paths, spec = pytree.tree_flatten_with_path((args, kwargs))
    parameters = _parameter_names(net)
    leaves: list[Any] = []
    names: list[str] = []
    tensors: list[Tensor] = []
    for path, leaf in with_paths:
        name = _leaf_name(path, parameters)
        if isinstance(leaf, Tensor):
            leaves.append(Tensor)
            names.append(name)
            tensors.append(leaf)
        elif isinstance(leaf, BAKED):
            leaves.append(leaf)
        else:
            raise TraceRefusal(
                f"input {name!r} is a {type(leaf).__qualname__}, whose contents a traced graph can't see: pass tensors, or "
                f"register the class with torch.utils._pytree.register_pytree_node"
            )
    return Inputs(spec, tuple(leaves), tuple(names)), tensors


def required_inputs(net: nn.Module) -> Inputs:
    """The inputs of a call that gives a tensor for every parameter of ``net.forward`` without a default."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    required = [p for p in inspect.signature(net.forward).parameters.values() if p.default is p.empty]
    args = tuple(torch.empty(0) for p in required if p.kind in kinds)
    kwargs = {p.name: torch.empty(0) for p in required if p.kind is keyword_only}
    return flatten_inputs(net, args, kwargs)[0]


def _parameter_names(net: nn.Module) -> list[str]:
    return [p.name for p in inspect.signature(net.forward).parameters.values()]


def _leaf_name(path: tuple[Any, ...], parameters: list[str]) -> str:
    """A readable identifier for the leaf at a key path of ``(args, kwargs)``."""
    where, first, *rest = (getattr(key, "idx", getattr(key, "key", getattr(key, "name", key))) for key in path)
    head = parameters[first] if where == 0 and first < len(parameters) else str(first)
    return re.sub(r"\W", "_", "_".join([head, *map(str, rest)]))
