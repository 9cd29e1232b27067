"""Whether the model receives what the loader yields: a stored activation is of that, and of nothing else."""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NoReturn, Self

from torch import Tensor
from xxhash import xxh3_64_intdigest

from fxfreeze.cache.contents import row_bytes
from fxfreeze.cache.errors import BY_SAMPLE, CacheRefusal
from fxfreeze.cache.served import Yielded
from fxfreeze.cache.structure import part_text
from fxfreeze.sizes import dtype_text

__all__ = ["Watch"]

_REMEMBERED = 64
_MANY = 8  # batches in a row that never reached the model, and in place of which it was trained on something else

Sums = list[list[int]]


class Watch:
    """names: of the input leaves. blind: whether the last batch is not one that was to be remembered.

    A batch that is left out (an epoch that is cut, a look at a first batch) is no sign of anything, nor is a training step
    on another loader's: only many batches in a row, or all of an epoch, each with other values in its place, are.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.blind = False
        self._names = names
        self._yielded: deque[Yielded] = deque(maxlen=_REMEMBERED)
        self._replaced = 0  # batches in a row

    def expect(self, batch: Yielded) -> None:
        self.blind = False
        self._yielded.append(batch)

    def settle(self, batch: Yielded) -> bool:
        """Whether the model was trained on other values in place of a batch, now that the next one is asked for.

        CacheRefusal if it was in place of many.
        """
        replaced = not batch.seen and batch.instead is not None
        self._replaced = 0 if batch.seen else self._replaced + replaced
        if self._replaced >= _MANY:
            self.refuse(batch)
        return replaced

    def refuse(self, batch: Yielded) -> NoReturn:
        """CacheRefusal: nothing that the loader yields, of which this is the last, comes to the model as it is."""
        self.forget()
        self._replaced = 0
        raise CacheRefusal(
            f"the model was given other values ({batch.instead}) than {_inputs(self._names)} that the loader yielded: "
            f"something between them changes the input (mixup, augmentation on the GPU, normalisation, a cast). {BY_SAMPLE}"
        )

    def forget(self) -> None:
        self._yielded.clear()

    def match(
        self, tensors: Sequence[Tensor], *, training: bool, beside: Iterable[Self] = ()
    ) -> tuple[Yielded, list[int]] | None:
        """The batch whose inputs these are, the last one first, and which input each of them is.

        training: whether another call would be in the batch's place; beside: watches of the model's other loaders, whose
        batch it may be. CacheRefusal if the batch has inputs that these lack.
        """
        if not self._yielded:
            return None
        sums = [list(map(xxh3_64_intdigest, row_bytes(t.detach().cpu()))) if t.dim() else [] for t in tensors]
        batch = self._found(sums)
        if batch is not None:
            missing = [name for name, each in zip(self._names, batch.sums, strict=True) if each not in sums]
            if missing:
                raise CacheRefusal(f"the model did not receive {_inputs(missing)}: name by inputs= what it receives")
            batch.seen = True
            return batch, [batch.sums.index(each) for each in sums]
        if training and not any(other.blind or other._found(sums) for other in beside):
            text = ", ".join(f"{dtype_text(t.dtype)} {list(t.shape)}" for t in tensors)
            for unseen in (batch for batch in self._yielded if not batch.seen):
                unseen.instead = text
        return None

    def _found(self, sums: Sums) -> Yielded | None:
        return next((b for b in reversed(self._yielded) if sums and all(each in b.sums for each in sums)), None)


def _inputs(names: Sequence[str]) -> str:
    """Positions in the batch, or keys, told from values."""
    return part_text(" and ".join(names), "input" if len(names) == 1 else "inputs")
