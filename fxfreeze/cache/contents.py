"""The contents of a sample as a checksum: the same in any process, another wherever one bit of the sample is."""

import dataclasses
import sys
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor
from xxhash import xxh3_128

from fxfreeze.cache.memory import tensor_bytes
from fxfreeze.cache.trees import opened, qualified

__all__ = ["ContentsError", "checksum", "dense", "row_bytes"]

_SCALARS = (bool, int, float, complex, str, bytes, bytearray)  # a class before those it inherits from
_BY_NAME = (torch.dtype, torch.device, torch.layout, torch.memory_format, PurePath)


class ContentsError(TypeError):
    """A value of a class whose contents nobody can tell; `kind` is the class."""

    def __init__(self, kind: type) -> None:
        super().__init__(qualified(kind))
        self.kind = kind


def checksum(value: Any) -> str:
    """Hex xxh3_128 of a tree of tensors, arrays, images, numbers, strings, bytes. ContentsError for other leaves.

    Counted are containers' classes and keys (a mapping's in any order), dtypes, shapes and bytes; not devices, memory
    layouts, or which NaN a Python float is.
    """
    digest = xxh3_128()
    _absorb(digest, value)
    return digest.hexdigest()


def dense(tensor: Tensor) -> Tensor:
    """The same numbers in a contiguous CPU tensor."""
    return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()


def row_bytes(tensor: Tensor) -> Iterable[memoryview]:
    """Each row's bytes in logical order. The views must not outlive the iteration."""
    tensor = dense(tensor)
    data, width = tensor_bytes(tensor), tensor.nbytes // max(1, len(tensor))
    for row in range(len(tensor)):
        yield data[row * width : (row + 1) * width]


def _absorb(digest: xxh3_128, value: Any) -> None:
    if isinstance(value, Tensor):
        _absorb_tensor(digest, value)
    elif isinstance(value, _arrays()):
        _absorb_array(digest, value)
    elif isinstance(value, _images()):
        palette = bytes(value.getpalette() or ()) if value.mode in ("P", "PA") else b""
        _update(digest, "image", value.mode, str(value.size), palette, value.tobytes())
    elif value is None:
        _update(digest, "None")
    elif isinstance(value, Enum):
        _update(digest, type(value).__qualname__, value.name)
    elif isinstance(value, _SCALARS):
        _update(digest, type(value).__qualname__, _scalar_bytes(value))
    elif isinstance(value, _BY_NAME):
        _update(digest, type(value).__qualname__, str(value))
    elif isinstance(value, set | frozenset):
        _update(digest, type(value).__qualname__, *sorted(map(checksum, value)))
    else:
        _absorb_container(digest, value)


def _absorb_tensor(digest: xxh3_128, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise ContentsError(type(tensor))
    tensor = dense(tensor)
    _update(digest, type(tensor).__qualname__, str(tensor.dtype), str(list(tensor.shape)), tensor_bytes(tensor))


def _absorb_array(digest: xxh3_128, array: Any) -> None:
    _update(digest, type(array).__qualname__, str(array.dtype), str(array.shape))
    if array.dtype.hasobject:
        _absorb(digest, array.tolist())
    else:
        _update(digest, array.tobytes())


def _absorb_container(digest: xxh3_128, value: Any) -> None:
    found = opened(value)
    if found is not None:
        kind, values = found
        pairs = list(zip(map(checksum, kind.keys), values, strict=True))
        if issubclass(kind.type, Mapping):
            pairs.sort(key=lambda pair: pair[0])
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        pairs = [(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)]
    else:
        raise ContentsError(type(value))
    _update(digest, type(value).__qualname__, str(len(pairs)))
    for key, item in pairs:
        _update(digest, key)
        _absorb(digest, item)


def _update(digest: xxh3_128, *parts: str | bytes | memoryview) -> None:
    """Each part after its length, so that no two lists of parts are one text."""
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)


def _scalar_bytes(value: Any) -> bytes:
    # By the built-in class's own method: a subclass may print itself as it likes.
    base = next(base for base in _SCALARS if isinstance(value, base))
    if issubclass(base, str):
        return str.encode(value, "utf-8", "surrogatepass")
    if issubclass(base, bytes | bytearray):
        return bytes(value)
    return hex(value).encode() if base is int else base.__repr__(value).encode()


def _arrays() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    return (numpy.ndarray, numpy.generic) if numpy else ()


def _images() -> tuple[Any, ...]:
    pillow = sys.modules.get("PIL.Image")
    return (pillow.Image,) if pillow else ()
