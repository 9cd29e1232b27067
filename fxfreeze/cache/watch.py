"""Whether the model receives what the loader yields: a stored activation is of that, and of nothing else."""

from collections import deque
from collections.abc import Sequence

from torch import Tensor
from xxhash import xxh3_64_intdigest

from fxfreeze.cache.contents import row_bytes
from fxfreeze.cache.errors import CacheRefusal
from fxfreeze.cache.served import Yielded
from fxfreeze.sizes import dtype_text

__all__ = ["Watch"]

_REMEMBERED = 64


class Watch:
    """names: of the input leaves."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._yielded: deque[Yielded] = deque(maxlen=_REMEMBERED)
        self._stranger: Sequence[Tensor] | None = (
            None  # the last call since the last batch that was none of the batches
        )

    def expect(self, batch: Yielded) -> None:
        self.settle()
        self._yielded.append(batch)

    def settle(self) -> None:
        """CacheRefusal if the model was not given the last batch, but something else in its place."""
        last, stranger = (self._yielded[-1] if self._yielded else None), self._stranger
        self._stranger = None
        if last is None or last.seen or stranger is None:
            return
        self._yielded.clear()
        shapes = ", ".join(f"{dtype_text(t.dtype)} {list(t.shape)}" for t in stranger)
        raise CacheRefusal(
            f"the model was given other values ({shapes}) than the {' and '.join(self._names)} that the loader yielded: "
            "something between them changes the input (mixup, augmentation on the GPU, normalisation, a cast). Activations are "
            "stored by sample, so do it in the data set or in the model, or train without the cache"
        )

    def forget(self) -> None:
        self._yielded.clear()
        self._stranger = None

    def match(self, tensors: Sequence[Tensor], *, training: bool) -> tuple[Yielded, list[int]] | None:
        """The batch whose inputs these are, the last one first, and which input each of them is.

        training: whether another call would be in the batch's place. CacheRefusal if the batch has inputs that these lack.
        """
        if not self._yielded:
            return None
        sums = [list(map(xxh3_64_intdigest, row_bytes(t.detach().cpu()))) if t.dim() else [] for t in tensors]
        for batch in reversed(self._yielded):
            if sums and all(each in batch.sums for each in sums):
                missing = [name for name, each in zip(self._names, batch.sums, strict=True) if each not in sums]
                if missing:
                    raise CacheRefusal(
                        f"the model did not receive {', '.join(missing)}, which counts as its input: name by inputs= what it "
                        "receives"
                    )
                batch.seen = True
                return batch, [batch.sums.index(each) for each in sums]
        if training:
            self._stranger = tensors
        return None
