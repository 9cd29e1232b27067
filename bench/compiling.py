"""torch.compile without the warnings of what it imports, which pytest would make errors of."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``function`` under TorchInductor, with its options; it is built at the first call."""
    with quiet():
        return torch.compile(function, options=options or None)
