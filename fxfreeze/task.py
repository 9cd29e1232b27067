"""What the command line trains on what: a network by name, and a data set in memory on the device that trains."""

from dataclasses import dataclass, replace

import torch
from torch import nn

from fxfreeze import data, zoo
from fxfreeze.batches import Batches, Split, of_classes
from fxfreeze.imports import ChoiceError
from fxfreeze.recipes import Settings


@dataclass(frozen=True)
class Task:
    """A network's name, a data set's name, and the data set."""

    model: str
    data: str
    train: Split
    val: Split
    test: Split
    num_classes: int
    in_channels: int
    image_size: int

    @property
    def device(self) -> torch.device:
        return self.train.images.device

    def build(self, seed: int) -> nn.Module:
        """The untrained network; its weights follow from `seed`, and torch's random state is left as it was."""
        sizes = {"num_classes": self.num_classes, "in_channels": self.in_channels, "image_size": self.image_size}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return zoo.load(self.model, **sizes).to(self.device)

    def steps(self, settings: Settings) -> int:
        """Steps of plain training."""
        return settings.epochs * Batches(self.train, settings.batch_size, settings.seed).steps_per_epoch

    def of_classes(self, classes: range) -> "Task":
        """The same task on some of the classes only."""
        train, val, test = (of_classes(split, classes) for split in (self.train, self.val, self.test))
        return replace(self, train=train, val=val, test=test, num_classes=len(classes))


def prepare(model: str, data_name: str, *, root: str | None, download: bool, device: str, shapes: bool = False) -> Task:
    """The task of these names; shapes: no more than those of the data count. Raises ChoiceError for what can't be had."""
    where = find_device(device)
    loaded = (data.shaped if shapes else data.load)(data_name, root=root, download=download)
    train, val, test = (
        Split(*(tensor.to(where) for tensor in split.tensors)) for split in (loaded.train, loaded.val, loaded.test)
    )
    return Task(model, data_name, train, val, test, loaded.num_classes, loaded.in_channels, loaded.image_size)


def find_device(name: str) -> torch.device:
    """The device that `name` names ("auto": a GPU if there is one), tried out."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ChoiceError(
            f"--device {name} can't be used here ({str(error).splitlines()[0]}); try --device cpu"
        ) from error
    return device
