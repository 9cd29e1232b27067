"""What determines the values of a store: the frozen part that computed them, and the data set that they are of."""

import operator
from collections.abc import Iterable, Sequence
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from xxhash import xxh3_64_hexdigest, xxh3_128

from fxfreeze.attributes import INTERNAL
from fxfreeze.cache.code import code_digest, is_torchs, named
from fxfreeze.cache.contents import ContentsError, checksum, dense
from fxfreeze.cache.errors import CacheRefusal
from fxfreeze.cache.manifest import Identity
from fxfreeze.cache.memory import tensor_bytes
from fxfreeze.chain import Chain
from fxfreeze.derived import frozen_tensors
from fxfreeze.layouts import order_of
from fxfreeze.numerics import numerics
from fxfreeze.sizes import dtype_text
from fxfreeze.units import Unit

__all__ = ["prefix_identity", "store_name", "weights_digest"]

_WITH_CODE = (FunctionType, MethodType, type)
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    torch.dtype,
    torch.device,
    torch.memory_format,
    torch.layout,
)


def prefix_identity(
    chain: Chain, depth: int, tensors: Sequence[Tensor], slots: Sequence[int], batch: int, backend: str
) -> Identity:
    """Of the boundary at ``depth``, as ``chain`` computes it from a call with ``tensors``.

    slots: which of the loader's inputs each of them is; batch: how many samples it computes at a time.
    CacheRefusal for a module whose settings can't be told.
    """
    plain, units = chain.frontier(depth).plain, chain.ownership.units
    return {
        "network": type(chain.net).__qualname__,
        "depth": depth,
        "unit": units[depth - 1].name,
        "graph": xxh3_64_hexdigest("\n".join(_lines(plain)).encode()),
        "code": code_digest(_code(plain)),
        "weights": weights_digest(chain.net, units, depth),
        "dtype": dtype_text(chain.computation.autocast) if chain.computation.autocast else "model",
        "device": chain.computation.device,
        "backend": backend,
        "numerics": numerics(chain.computation.device),
        "batch": batch,
        "inputs": "; ".join(
            f"{slot}: {dtype_text(t.dtype)} {list(t.shape[1:])} {order_of(t)}"
            for slot, t in zip(slots, tensors, strict=True)
        ),
    }


def weights_digest(net: nn.Module, units: Sequence[Unit], depth: int) -> str:
    """xxh3_128 of all parameters and buffers of the first ``depth`` units."""
    digest = xxh3_128()
    for name, owner, key in frozen_tensors(net, units, depth):
        tensor = owner.get(key)
        if tensor is not None:
            held = dense(tensor.detach().cpu())
            digest.update(f"{name} {dtype_text(held.dtype)} {list(held.shape)};".encode())
            digest.update(tensor_bytes(held))
    return digest.hexdigest()


def store_name(identity: Identity) -> str:
    """The folder of a store: its depth, for people, and a checksum of its whole identity."""
    text = "\n".join(f"{key}={identity[key]!r}" for key in sorted(identity))
    return f"{identity['depth']:03d}-{xxh3_64_hexdigest(text.encode())}"


def _lines(plain: GraphModule) -> Iterable[str]:
    """A graph as text that is the same in any process: no addresses, no names that a trace made up."""
    number = {node: i for i, node in enumerate(plain.graph.nodes)}
    for node in plain.graph.nodes:
        yield f"{node.op} {_target(node)} {_text(node.args, number)} {_text(node.kwargs, number)}"
        if node.op == "call_module":
            yield from _settings(plain.get_submodule(str(node.target)))
    for name, tensor in _attributes(plain):
        yield f"{name} {checksum(tensor)}"


def _attributes(plain: GraphModule) -> Iterable[tuple[str, Tensor]]:
    for node in plain.graph.nodes:
        if node.op == "get_attr":
            value = operator.attrgetter(str(node.target))(plain)
            if isinstance(value, Tensor):
                yield str(node.target), value


def _code(plain: GraphModule) -> Iterable[Any]:
    """What of a graph has code that is not in it."""
    for node in plain.graph.nodes:
        if node.op == "call_function" and not is_torchs(node.target):
            yield node.target
        elif node.op == "call_module":
            for part in plain.get_submodule(str(node.target)).modules():
                yield type(part)
                yield from (v for k, v in vars(part).items() if k not in INTERNAL and isinstance(v, _WITH_CODE))


def _target(node: Node) -> str:
    if node.op in ("placeholder", "output"):
        return ""
    return node.target if isinstance(node.target, str) else named(node.target)


def _text(value: Any, number: dict[Node, int]) -> str:
    if isinstance(value, Node):
        return f"%{number[value]}"
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}({', '.join(_text(item, number) for item in value)})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_text(item, number)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice{_text((value.start, value.stop, value.step), number)}"
    return repr(value) if isinstance(value, _PLAIN) else named(value)


def _settings(module: nn.Module) -> Iterable[str]:
    """What a module that is called as a whole computes with, besides its weights."""
    for name, part in module.named_modules():
        own = {key: value for key, value in vars(part).items() if key not in INTERNAL}
        if type(part).__module__.startswith("torch.nn.") and type(part) is not nn.Module:
            own = {key: _text(value, {}) for key, value in own.items() if not key.startswith("_")}
        for key, value in own.items():
            try:
                yield f"  {name}.{key} {checksum(value)}"
            except ContentsError as error:
                raise CacheRefusal(
                    f"the frozen part can't be cached: {type(part).__qualname__}.{key} is a {error.kind}, and what it computes "
                    "with can't be told: let it be tensors, numbers or strings, or freeze to a depth before it"
                ) from error
        yield f"  {name} {named(type(part))} {part.training}"
