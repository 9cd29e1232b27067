"""What a sample brings that is no tensor of a fixed shape (a text, boxes of any number), as bytes without pickle.

JSON where it holds no tensors, else a safetensors file of the tensors "0", "1", ... and the JSON in "tree". In the JSON
null, booleans, integers, finite floats and strings stand for themselves, and everything else is a list that begins
with a tag: what follows `_TAGS`.
"""

import base64
import json
import math
from collections.abc import Iterable
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError, TensorSpec, deserialize, serialize
from torch import Tensor

from fxfreeze.cache.columns import DTYPES
from fxfreeze.cache.contents import dense
from fxfreeze.cache.errors import CacheRefusal, CorruptCache
from fxfreeze.cache.trees import Kind, is_named, opened, qualified, rebuild
from fxfreeze.sizes import dtype_text

__all__ = ["ObjectCodec"]

_TAGS = {
    "list": "the values",
    "tuple": "the values",
    "dict": "pairs [key, value]",
    "class": "the qualified name of a namedtuple or mapping, pairs [field or key, value]",
    "tensor": "a number, the tensor's name",
    "bytes": "the bytes in base64",
    "float": "nan, inf or -inf",
}
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}
# What parsing may raise; the last two, what classes of samples may when made of keys that they never have.
_BAD_BYTES = (ValueError, TypeError, LookupError, RuntimeError, SafetensorError, ArithmeticError, AttributeError)


class ObjectCodec:
    """Objects of one leaf of a batch, to bytes and back.

    samples: some of the objects. Namedtuples and mappings that are no dicts are only taken if one of the samples holds
    such: their classes are never imported by a name that a file gives.
    """

    def __init__(self, name: str, samples: Iterable[Any]) -> None:
        self.name = name
        self._classes: dict[str, type] = {}
        for sample in samples:
            self._learn(sample)

    def encode(self, value: Any) -> bytes:
        """CacheRefusal for an object that is more than a tree of tensors, numbers, strings, bytes, bool and None."""
        tensors: list[Tensor] = []
        try:
            text = json.dumps(self._tree(value, tensors), allow_nan=False, separators=(",", ":")).encode()
        except (ValueError, RecursionError) as error:
            if isinstance(error, CacheRefusal):
                raise
            raise CacheRefusal(
                f"{self.name}: an object of a sample can't be stored ({error}); leave it out in the collate function"
            ) from error
        return _pack(text, tensors) if tensors else text

    def decode(self, data: bytes) -> Any:
        """The object that `encode` was given. CorruptCache for bytes that it can't have returned."""
        try:
            text, tensors = _unpack(data) if data[7:8] == b"\0" else (data, {})
            tree = json.loads(text, parse_constant=_no_constant)
            value = self._value(tree, tensors)
            if tensors:
                raise ValueError(f"tensors {sorted(tensors)} that belong nowhere")
        except _BAD_BYTES as error:
            raise CorruptCache(
                f"{self.name}: a row is not an object that was written ({type(error).__name__}: {error}); "
                "drop the store and fill it anew"
            ) from error
        return value

    def _learn(self, sample: Any) -> None:
        found = opened(sample)
        if found is not None:
            if _needs_class(found[0]):
                self._classes[qualified(found[0].type)] = found[0].type
            for value in found[1]:
                self._learn(value)

    def _tree(self, value: Any, tensors: list[Tensor]) -> Any:
        if value is None or type(value) in (bool, int, str):
            return value
        if type(value) is float:
            return value if math.isfinite(value) else ["float", str(value)]
        if type(value) is bytes:
            return ["bytes", base64.b64encode(value).decode()]
        if type(value) is Tensor and value.layout is torch.strided and value.dtype in DTYPES:
            tensors.append(dense(value))
            return ["tensor", len(tensors) - 1]
        found = opened(value)
        if found is None:
            self._refuse(value)
        kind, values = found
        items = [self._tree(item, tensors) for item in values]
        if kind.type in (list, tuple):
            return [kind.type.__name__, *items]
        pairs = [[self._tree(key, tensors), item] for key, item in zip(kind.keys, items, strict=True)]
        if kind.type is dict:
            return ["dict", *pairs]
        if not _needs_class(kind) or self._classes.get(qualified(kind.type)) is not kind.type:
            self._refuse(value)
        return ["class", qualified(kind.type), *pairs]

    def _value(self, tree: Any, tensors: dict[str, Tensor]) -> Any:
        if not isinstance(tree, list):
            if isinstance(tree, dict):
                raise ValueError("a JSON object")
            return tree
        tag, *rest = tree
        if tag in ("list", "tuple"):
            values = [self._value(item, tensors) for item in rest]
            return values if tag == "list" else tuple(values)
        if tag == "tensor":
            return tensors.pop(str(_only(rest)))
        if tag == "bytes":
            return base64.b64decode(_only(rest), validate=True)
        if tag == "float":
            return {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[_only(rest)]
        if tag == "dict":
            kind: type = dict
        elif tag == "class":
            kind = self._classes[rest.pop(0)]
        else:
            raise ValueError(f"the tag {tag!r}")
        pairs = [(self._value(key, tensors), self._value(item, tensors)) for key, item in rest]
        return _of_class(kind, pairs)

    def _refuse(self, value: Any) -> NoReturn:
        kind = type(value)
        what = f"a {value.dtype} {value.layout} {qualified(kind)}" if isinstance(value, Tensor) else qualified(kind)
        raise CacheRefusal(
            f"{self.name}: a sample holds {what}; stored beside the activations can be trees (list, tuple, dict, and "
            "the namedtuples and mappings that the first samples hold) of plain tensors, numbers, strings, bytes, bool "
            "and None; convert it, or leave it out, in the data set or the collate function"
        )


def _needs_class(kind: Kind) -> bool:
    return is_named(kind.type) or (kind.by_key and kind.type is not dict and kind.context is None)


def _of_class(kind: type, pairs: list[tuple[Any, Any]]) -> Any:
    if is_named(kind) and [key for key, _ in pairs] != list(kind._fields):  # type: ignore[attr-defined]
        raise ValueError(f"other fields than those of {kind.__name__}")
    keys = tuple(key for key, _ in pairs)
    if len(set(keys)) < len(keys):
        raise ValueError("a key is there twice")
    return rebuild(Kind(kind, keys), [value for _, value in pairs])


def _pack(text: bytes, tensors: list[Tensor]) -> bytes:
    tree = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    named = {str(number): tensor for number, tensor in enumerate(tensors)} | {"tree": tree}
    # An empty tensor has no address, and the library must be given one even to read nothing.
    specs = {
        name: TensorSpec(
            dtype=dtype_text(tensor.dtype),
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr() or tree.data_ptr(),
            data_len=tensor.nbytes,
        )
        for name, tensor in named.items()
    }
    return bytes(serialize(specs, None))


def _unpack(data: bytes) -> tuple[bytes, dict[str, Tensor]]:
    entries = dict(deserialize(data))  # type: ignore[no-untyped-call]
    text = bytes(entries.pop("tree")["data"])
    return text, {name: _tensor(entry) for name, entry in entries.items()}


def _tensor(entry: Any) -> Tensor:
    dtype, data = _DTYPES[entry["dtype"]], entry["data"]
    if not data:
        return torch.empty(entry["shape"], dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).view(entry["shape"])


def _only(rest: list[Any]) -> Any:
    (value,) = rest
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} in JSON")
