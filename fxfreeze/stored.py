"""What stands for a batch's model inputs when they need not be computed from: activations that were stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch import nn

    from fxfreeze.chain import Chain

__all__ = ["Boundary", "Fill", "Part", "StoredBatch", "Tap", "stored_batch"]


class Part(NamedTuple):
    """Samples of a batch as far as they were computed.

    depth: of the boundary that ``rows`` are of, 0 for the model's inputs; places: (k,) int64 in the batch, None for all of
    it; rows: of each value that has one per sample, (k, ...) as they were computed.
    """

    depth: int
    places: Tensor | None
    rows: Sequence[Tensor]


class Fill(Protocol):
    """Takes what was computed at ``depth`` for the samples of one batch: the values that hold rows."""

    depth: int

    def take(self, places: Tensor | None, rows: Sequence[Tensor]) -> None:
        """places: as in Part; rows: (k, ...) each."""
        ...


class Tap(Protocol):
    """Looks at the tensors of every call of a model; ``chain`` is None where nothing is frozen."""

    def received(self, tensors: Sequence[Tensor], chain: Chain | None) -> Fill | None: ...


class StoredBatch(Protocol):
    """size: its samples; depth: of the deepest boundary that some of them are at; least: that all of them have passed."""

    size: int
    depth: int
    least: int

    def parts(self, chain: Chain, tensors: Sequence[Tensor], slots: Sequence[int]) -> list[Part]:
        """What is known of the samples at depths that reach that of ``chain``.

        tensors: of a call like this one; slots: which input of the loader's each of them is.
        """
        ...

    def fill(self, chain: Chain, tensors: Sequence[Tensor], slots: Sequence[int]) -> Fill | None: ...

    def inputs(self) -> list[Tensor]:
        """What the Boundaries of the batch stand for, by slot, as the loader would have given it."""
        ...

    def is_for(self, net: nn.Module) -> bool:
        """Whether it is of the loader of this network."""
        ...


class Boundary:
    """Stands for one input tensor of the model in a batch whose activations are stored; give it to the model.

    It can be moved with ``.to``, ``.cuda``, ``.cpu`` and ``.pin_memory``, and knows its ``.device``, ``len()``,
    ``.shape[0]``, ``.size(0)`` and ``.depth`` (how many frozen units it has passed). Everything else raises: there are no
    values of the input here.

    batch: what all Boundaries of a batch share; slot: which of the model's inputs; example: an input like it, (n, ...),
    which tells the model what it would have been given.
    """

    def __init__(self, batch: StoredBatch, slot: int, example: Example) -> None:
        self.batch = batch
        self.slot = slot
        self.example = example

    @property
    def depth(self) -> int:
        return self.batch.depth

    @property
    def device(self) -> torch.device:
        return self.example.tensor.device

    @property
    def shape(self) -> _Shape:
        return _Shape(self)

    def size(self, dim: int | None = None) -> int:
        return self.batch.size if dim == 0 else self._refuse(f"size({'' if dim is None else dim})")

    def to(self, *args: Any, **kwargs: Any) -> Boundary:
        """As of a tensor; to its own dtype only."""
        if args and isinstance(args[0], Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        kwargs.pop("copy", None)
        device, dtype, _, layout = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and dtype != self.example.tensor.dtype:
            self._refuse(f"conversion to {dtype}")
        return Boundary(self.batch, self.slot, self.example.to(device, layout))

    def cuda(self, device: Any = None, non_blocking: bool = False, memory_format: Any = None) -> Boundary:
        where = torch.device("cuda", torch.cuda.current_device()) if device is None else torch.device(device)
        return Boundary(self.batch, self.slot, self.example.to(where, memory_format))

    def cpu(self) -> Boundary:
        return Boundary(self.batch, self.slot, self.example.to(torch.device("cpu"), None))

    def pin_memory(self, device: Any = None) -> Boundary:
        return self

    def __len__(self) -> int:
        return self.batch.size

    def __bool__(self) -> bool:
        return self._refuse("its truth value")

    def __repr__(self) -> str:
        return f"Boundary(depth={self.depth}, {self.batch.size} samples, device={str(self.device)!r})"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("batch", "slot", "example"):  # asked for while a copy is made
            raise AttributeError(name)
        raise AttributeError(self._message(f".{name}"))

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:
        found = next(a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, cls))
        found._refuse(f"torch's {getattr(function, '__name__', function)}")

    def _refuse(self, what: str) -> NoReturn:
        raise TypeError(self._message(what))

    def _message(self, what: str) -> str:
        return (
            f"{what} was asked of a batch of which only the activations after the first {self.depth} units are stored, not "
            f"the model's input: give it to the model as it is. What changes the input (augmentation, mixup, a cast) belongs "
            f"into the data set, or trains without the cache"
        )


def _refused(name: str) -> Any:
    def operator(self: Boundary, *_: Any) -> NoReturn:
        self._refuse(name)

    return operator


for _name in (
    "add radd iadd sub rsub isub mul rmul imul truediv rtruediv itruediv floordiv mod pow rpow matmul rmatmul neg abs and or "
    "xor invert eq ne lt le gt ge getitem setitem iter contains int float index array complex"
).split():
    setattr(Boundary, f"__{_name}__", _refused(f"__{_name}__"))
Boundary.__hash__ = object.__hash__  # type: ignore[method-assign]


class _Shape:
    """The shape of an input of which only the number of samples is known."""

    def __init__(self, boundary: Boundary) -> None:
        self._boundary = boundary

    def __getitem__(self, dim: Any) -> int:
        return len(self._boundary) if dim == 0 and isinstance(dim, int) else self._boundary._refuse(f"shape[{dim}]")

    def __iter__(self) -> Any:
        self._boundary._refuse("all of its shape")

    def __eq__(self, other: object) -> bool:
        return self._boundary._refuse("comparison of its shape")

    __hash__ = object.__hash__

    def __len__(self) -> int:
        return self._boundary._refuse("the length of its shape")

    def __repr__(self) -> str:
        return f"({len(self._boundary)}, ?)"


class Example:
    """An input like those of a batch; copies on other devices and in other layouts are made once.

    whole: an example of more samples, of which these are the first: it has the copies.
    """

    def __init__(self, tensor: Tensor, whole: Example | None = None) -> None:
        self.tensor = tensor
        self._whole = whole
        self._copies: dict[tuple[Any, ...], Example] = {}

    def first(self, count: int) -> Example:
        """Its first samples, in its memory."""
        return self if count == len(self.tensor) else Example(self.tensor[:count], self)

    def to(self, device: torch.device | None, layout: torch.memory_format | None) -> Example:
        if self._whole is not None:
            return self._whole.to(device, layout).first(len(self.tensor))
        key = (device, layout)
        if key not in self._copies:
            format = torch.preserve_format if layout is None else layout
            moved = self.tensor.to(self.tensor.device if device is None else device, memory_format=format)
            self._copies[key] = self if moved is self.tensor else Example(moved)
        return self._copies[key]


def stored_batch(leaves: Sequence[Any]) -> StoredBatch | None:
    """The batch that the Boundaries among a call's arguments belong to. ValueError for several, or tensors beside them."""
    batches = {id(leaf.batch): leaf.batch for leaf in leaves if isinstance(leaf, Boundary)}
    if len(batches) > 1:
        raise ValueError("the model was given stored activations of two batches in one call: call it once for each")
    if batches and any(isinstance(leaf, Tensor) for leaf in leaves):
        raise ValueError(
            "the model was given stored activations together with a tensor, which they may depend on: let it come from the "
            "data set, and name it by inputs= of CachedLoader"
        )
    return next(iter(batches.values()), None)
