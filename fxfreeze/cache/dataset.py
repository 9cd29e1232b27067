"""The data set behind a loader, as the cache knows it: what its batches are made of, and by what it is recognised."""

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import DataLoader

from fxfreeze.cache import probes
from fxfreeze.cache.contents import checksum
from fxfreeze.cache.errors import CacheRefusal
from fxfreeze.cache.fetch import collated
from fxfreeze.cache.forms import BatchForm, Inputs
from fxfreeze.cache.manifest import Identity
from fxfreeze.cache.views import Views
from fxfreeze.rows import repeated

__all__ = ["KnownData"]

_FORM_SAMPLES = 8
_LEAST_PAIRS = 32


class KnownData:
    """form: of the loader's batches; views: of each sample; identity: what of a store's identity tells the data set.

    CacheRefusal for data that can't be cached with right results.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        parameters: Sequence[str],
        *,
        inputs: Inputs,
        fingerprint: str | None,
        views: Views,
        augmented: Literal["refuse", "freeze"],
    ) -> None:
        self.views = views
        self._loader = loader
        self._fingerprint = fingerprint
        dataset = loader.dataset
        probes.check_dataset(dataset)
        self.length = len(loader.dataset)  # type: ignore[arg-type]
        self._probed = probes.probed(self.length)
        self.fixed = views.count == 1 and augmented == "refuse"
        if self.fixed:
            _refuse_augmentation(dataset, self._probed, sure=fingerprint is not None)
        samples = self._read()
        self.form = BatchForm.learn(loader.collate_fn, samples[:_FORM_SAMPLES], inputs, parameters)
        self._digest = ""
        self._know(samples)

    def _read(self) -> list[Any]:
        read = probes.read if self.fixed else probes.read_seeded
        return read(self._loader.dataset, self._probed)

    def _know(self, samples: list[Any]) -> None:
        before, self._collate = self._digest, self._loader.collate_fn
        self._digest = self._find_digest(samples)
        if self._digest != before:
            self._examples = self.form.inputs(collated(self._collate, samples[:_FORM_SAMPLES]))

    def _find_digest(self, samples: list[Any]) -> str:
        """A checksum of what the samples are as a batch, the collate function's part in it included."""
        if self._fingerprint is not None:
            return f"fingerprint {self._fingerprint}"
        batch = collated(self._collate, samples)
        columns = self.form.rest(batch)
        return checksum([self.form.checksums(batch), [columns[column.name] for column in self.form.columns]])

    @property
    def identity(self) -> Identity:
        kind = type(self._loader.dataset)
        return {
            "data": f"{kind.__module__}.{kind.__qualname__}",
            "length": self.length,
            "samples": self._digest,
            "parts": f"{', '.join(self.form.names)}; {', '.join(map(str, self.form.columns))}",
            "views": str(self.views),
        }

    def changed(self, *, reread: bool) -> bool:
        """Whether the data set is another than it was; from now on it is what it is now.

        reread: the probed samples too, if they tell.
        """
        length = len(self._loader.dataset)  # type: ignore[arg-type]
        before = self.length, self._digest
        if length != self.length:
            self.length, self._probed = length, probes.probed(length)
        other = length != before[0] or self._loader.collate_fn != self._collate
        if other or (reread and self.fixed and self._fingerprint is None):
            self._know(self._read())
        return (self.length, self._digest) != before

    def examples(self, size: int) -> list[Tensor]:
        """Inputs like those of a batch of ``size``, in the memory of the largest batch that was asked for."""
        held = len(self._examples[0])
        if size > held:
            self._examples = [*repeated(self._examples, size)]
        return [example[:size] for example in self._examples]


def _refuse_augmentation(dataset: Any, probed: Sequence[int], *, sure: bool) -> None:
    """sure: the user vouches for samples whose contents can't be told."""
    # A transform that acts on every second sample escapes one pair of reads in two.
    try:
        index = probes.differing(dataset, [*probed] * -(-_LEAST_PAIRS // len(probed)) if probed else [])
    except CacheRefusal:
        if not sure:
            raise
        return
    if index is None:
        return
    names = probes.random_transforms(dataset)
    cause = f"{', '.join(names)} draws random numbers" if names else "something in it draws random numbers"
    raise CacheRefusal(
        f"sample {index} of the data set differs between two reads ({cause}): stored activations would be of one of them only. "
        f'Use views=K to store K views of each sample, views="flip" if all it does is a horizontal flip, or augmented="freeze" '
        f"to train on the first view of each sample"
    )
