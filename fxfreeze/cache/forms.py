"""What a loader's batches are made of: the model's inputs, what each sample brings beside them, and what is the same in all."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from fxfreeze.cache.columns import DTYPES, Blob, Column
from fxfreeze.cache.contents import checksum, row_bytes
from fxfreeze.cache.errors import BY_SAMPLE, CacheRefusal
from fxfreeze.cache.generators import generators_kept
from fxfreeze.cache.objects import ObjectCodec
from fxfreeze.cache.structure import (
    Constant,
    Fork,
    Node,
    Objects,
    Rows,
    assemble,
    derive,
    leaves,
    part_text,
    part_values,
)
from fxfreeze.cache.trees import fresh, is_named, qualified
from fxfreeze.sizes import dtype_text

__all__ = ["BatchForm"]

Collate = Callable[[list[Any]], Any]
Inputs = str | int | Sequence[str | int] | None


class BatchForm:
    """The parts of every batch of a loader. CacheRefusal from any method for a batch that is not so made.

    columns: of the rest, one for each leaf that is neither an input nor a constant, in the order of the batch;
    names: of the input leaves, in the order of the batch.
    """

    def __init__(self, tree: Node, chosen: Sequence[int], probe: Any) -> None:
        """chosen: which of the tree's leaves are inputs; probe: a batch, whose objects tell the classes to decode."""
        parts = list(leaves(tree))
        self._tree = tree
        self._chosen = list(chosen)
        self._inputs = [_input(parts[place]) for place in chosen]
        self.names = tuple(part.name for part in self._inputs)
        self._rest = [
            place for place, part in enumerate(parts) if place not in set(chosen) and not isinstance(part, Constant)
        ]
        self.columns = tuple(_column(f"rest.{number}", parts[place]) for number, place in enumerate(self._rest))
        values = part_values(tree, probe)
        self._codecs = {
            place: ObjectCodec(part_text(parts[place].name), values[place])
            for place in self._rest
            if isinstance(parts[place], Objects)
        }

    @classmethod
    def learn(cls, collate: Collate, samples: Sequence[Any], inputs: Inputs, parameters: Sequence[str]) -> "BatchForm":
        """The form of the batches that `collate` makes, from some samples of the data set; the more, the surer.

        inputs: what of a batch the model receives, as keys of a dict, positions in a tuple or list, or fields of a
        namedtuple; None: the first element, the keys that are among `parameters` (the names that the model's forward
        takes), or the tensor that the batch is.

        CacheRefusal where rows depend on the other samples of a batch, or for what can't be stored. Neither the samples
        nor random generators are changed.
        """
        if not samples:
            raise CacheRefusal("the data set has no samples: there is nothing to cache")
        # A lone sample twice, so that there are batches of two sizes.
        trials = _Trials(collate, list(samples) if len(samples) > 1 else [samples[0]] * 2)
        with generators_kept(collate):
            whole, half = trials.batch(trials.whole), trials.batch(trials.half)
            tree = derive(whole, half, (len(trials.whole), len(trials.half)))
            form = cls(tree, _chosen(tree, inputs, parameters), whole)
            form._check_round_trip(whole)
            trials.check(tree, whole)
        return form

    def inputs(self, batch: Any) -> list[Tensor]:
        """The input leaves, each (n, ...), as they are in the batch."""
        values = part_values(self._tree, batch)
        return [values[place] for place in self._chosen]

    def rest(self, batch: Any) -> dict[str, Any]:
        """A value for each column: the batch's tensor (n, *shape), or the n objects as bytes."""
        values = part_values(self._tree, batch)
        return {
            column.name: [self._codecs[place].encode(item) for item in values[place]]
            if place in self._codecs
            else values[place]
            for column, place in zip(self.columns, self._rest, strict=True)
        }

    def build(self, inputs: Sequence[Any], rest: Mapping[str, Any]) -> Any:
        """A batch of `inputs`, anything for each of `names`, and of a value for each column as `rest` gives it.

        CorruptCache for bytes that `rest` did not give.
        """
        parts = list(leaves(self._tree))
        values = dict(zip(self._chosen, inputs, strict=True))
        for column, place in zip(self.columns, self._rest, strict=True):
            value, part = rest[column.name], parts[place]
            values[place] = part.type(map(self._codecs[place].decode, value)) if isinstance(part, Objects) else value
        return assemble(self._tree, (values[place] for place in sorted(values)))

    def checksums(self, batch: Any) -> list[list[int]]:
        """Per input leaf the xxh3_64 of each row's bytes in contiguous order, whatever the memory layout."""
        return [list(map(xxh3_64_intdigest, row_bytes(leaf))) for leaf in self.inputs(batch)]

    def _check_round_trip(self, batch: Any) -> None:
        rest = self.rest(batch)
        try:
            built = self.build(self.inputs(batch), rest)
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise CacheRefusal(
                f"a batch can't be built from its parts ({type(error).__name__}: {error}): "
                f"{', '.join(_classes(self._tree))} must be made from its values alone; let the collate function return a dict"
            ) from error
        if _row_sums(self._tree, built) != _row_sums(self._tree, batch):
            raise CacheRefusal(
                "a batch differs when it is built from its parts: let the collate function return tensors, lists and dicts"
            )


class _Trials:
    """The same samples in several batches: whole, the first half, in reverse, and each alone."""

    def __init__(self, collate: Collate, samples: list[Any]) -> None:
        self._collate = collate
        self._samples = samples
        self.whole = list(range(len(samples)))
        self.half = self.whole[: len(samples) // 2]

    def batch(self, order: list[int]) -> Any:
        try:
            return self._collate([fresh(self._samples[place]) for place in order])
        except Exception as error:
            raise CacheRefusal(
                f"collating {len(order)} samples of the data set failed ({type(error).__name__}: {error}); batches of "
                "any size and order must be possible"
            ) from error

    def check(self, tree: Node, whole: Any) -> None:
        """CacheRefusal if a sample's rows are not the same in every batch."""
        expected = _row_sums(tree, whole)
        for order in (self.half, self.whole[::-1], *([place] for place in self.whole)):
            met = _row_sums(tree, self.batch(order))
            for (name, sums), (_, found) in zip(expected, met, strict=True):
                if found != [sums[place] for place in order]:
                    self._refuse(tree, name, order)

    def _refuse(self, tree: Node, name: str, order: list[int]) -> None:
        if _row_sums(tree, self.batch(order)) != _row_sums(tree, self.batch(order)):
            raise CacheRefusal(
                f"{part_text(name)}: collating the same samples again gives other rows: the collate function draws random "
                f"numbers (mixup, say). {BY_SAMPLE}"
            )
        raise CacheRefusal(
            f"{part_text(name)}: a sample's row depends on the samples that it is collated with, or on their order: the "
            f"collate function must neither sort nor look at the whole batch (normalise, shuffle, drop). {BY_SAMPLE}"
        )


def _row_sums(tree: Node, batch: Any) -> list[tuple[str, list[str]]]:
    """Each leaf's name, and a checksum of each of its rows."""
    values = zip(leaves(tree), part_values(tree, batch), strict=True)
    return [
        (part.name, list(map(xxh3_128_hexdigest, row_bytes(value)) if isinstance(part, Rows) else map(checksum, value)))
        for part, value in values
        if not isinstance(part, Constant)
    ]


def _chosen(tree: Node, inputs: Inputs, parameters: Sequence[str]) -> list[int]:
    """Which leaves are inputs."""
    if isinstance(tree, Objects):
        raise CacheRefusal(
            f"the collate function returns the samples as a {tree.type.__name__}; the model's inputs must be tensors "
            "with a row per sample: collate them"
        )
    if not isinstance(tree, Fork):
        if inputs is not None:
            raise CacheRefusal(f"inputs={inputs!r}: the batch has no parts, it is {tree}; leave inputs= out")
        return [0]
    wanted = _wanted(tree, inputs, parameters)
    owners = [key for key, child in enumerate(tree.children) for _ in leaves(child)]
    chosen = [place for place, owner in enumerate(owners) if owner in wanted]
    if not chosen:
        raise CacheRefusal("the model's inputs hold no tensors; name others by inputs=")
    return chosen


def _wanted(tree: Fork, inputs: Inputs, parameters: Sequence[str]) -> set[int]:
    """The positions of the root's children that are inputs."""
    keys = tree.kind.keys
    if inputs is None and (not tree.kind.by_key or is_named(tree.kind.type)):
        return {0}
    if inputs is None:
        wanted = {place for place, key in enumerate(keys) if key in parameters}
        if not wanted:
            raise CacheRefusal(
                f"the batch is a {tree.kind}, and the model takes {', '.join(parameters) or 'nothing by name'}; name "
                "by inputs= what the model receives"
            )
        return wanted
    names = [inputs] if isinstance(inputs, str | int) else list(inputs)
    return {_position(tree, inputs, name) for name in names}


def _position(tree: Fork, inputs: Inputs, name: str | int) -> int:
    keys = tree.kind.keys
    if name in keys:
        return keys.index(name)
    if is_named(tree.kind.type) and type(name) is int and 0 <= name < len(keys):
        return name
    raise CacheRefusal(
        f"inputs={inputs!r}: the batch has no {name!r}; it has {', '.join(map(repr, keys)) or 'nothing'}"
    )


def _input(part: Any) -> Rows:
    if not isinstance(part, Rows):
        raise CacheRefusal(
            f"{part_text(part.name, 'input')} is {part}, not a tensor with a row per sample; collate it into one, or name by "
            "inputs= what the model receives"
        )
    _check_dtype(part, part_text(part.name, "input"))
    return part


def _column(name: str, part: Any) -> Column | Blob:
    if isinstance(part, Objects):
        return Blob(name)
    _check_dtype(part, part_text(part.name))
    if part.type is not Tensor:
        raise CacheRefusal(
            f"{part_text(part.name)} is a {qualified(part.type)}, whose class would be lost; let the collate function return "
            "value.as_subclass(torch.Tensor)"
        )
    return Column(name, part.dtype, part.shape)


def _check_dtype(part: Rows, what: str) -> None:
    if part.dtype not in DTYPES:
        held = ", ".join(dtype_text(dtype) for dtype in DTYPES)
        raise CacheRefusal(f"{what} has {part}, which can't be stored; convert it to one of {held}")


def _classes(node: Node) -> Iterator[str]:
    if isinstance(node, Fork):
        yield qualified(node.kind.type)
        for child in node.children:
            yield from _classes(child)
