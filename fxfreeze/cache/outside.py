"""What a frozen part computes with besides its units' tensors, and what differs once one of these is another."""

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxfreeze.attributes import INTERNAL
from fxfreeze.cache.code import is_torchs
from fxfreeze.cache.contents import ContentsError, checksum

__all__ = ["Outside"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


class Outside:
    """Tensors that the graph reads as attributes, and what modules hold that it calls as they are.

    Settings of torch's own layers are none of it: another trace is made for these.
    """

    def __init__(self, plain: GraphModule) -> None:
        self._plain = plain
        targets = {str(node.target) for node in plain.graph.nodes if node.op == "get_attr"}
        self._read = [operator.attrgetter(target) for target in sorted(targets)]
        self._own = [*_whole(plain)]
        classes = {base: None for part in self._own for base in type(part).__mro__ if not is_torchs(base)}
        self._classes = [(base, [key for key, v in vars(base).items() if isinstance(v, _PLAIN)]) for base in classes]

    def signs(self) -> tuple[Any, ...]:
        """Equal as long as nothing of it has changed. Asked for at each step, so nothing is read that a glance can spare."""
        tensors = [_sign(read(self._plain)) for read in self._read]
        own = [_sign(value) for part in self._own for key, value in vars(part).items() if key not in INTERNAL]
        return tensors, own, [vars(base).get(key) for base, names in self._classes for key in names if key != "__doc__"]


def _whole(plain: GraphModule) -> Iterator[nn.Module]:
    """The parts of called modules that no trace looks into: all of a user's, and what torch's hold of a user's."""
    for node in plain.graph.nodes:
        if node.op == "call_module":
            called = plain.get_submodule(str(node.target))
            yield from (part for part in called.modules() if not (is_torchs(type(called)) and is_torchs(type(part))))


def _sign(value: Any) -> Any:
    if isinstance(value, Tensor):
        address = value.data_ptr() if value.layout is torch.strided else 0
        return id(value), 0 if value.is_inference() else value._version, address
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, dict):
        return [(key, _sign(each)) for key, each in value.items()]
    if isinstance(value, list | tuple):
        return [_sign(each) for each in value]
    if isinstance(value, set | frozenset):
        return frozenset(value)
    try:
        return checksum(value)
    except ContentsError:
        return id(value)
