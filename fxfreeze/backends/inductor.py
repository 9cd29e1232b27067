"""TorchInductor: the frozen weights become constants of the C++ or Triton code that it generates."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule

__all__ = ["compile"]


def compile(
    module: GraphModule, inputs: Sequence[Tensor], autocast: torch.dtype | None
) -> Callable[..., Sequence[Tensor]]:
    """``module`` for tensors of the shapes of ``inputs``, under autocast as it is now."""
    del autocast  # it is on where it matters
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        return torch._inductor.compile(module, list(inputs), options={"freezing": True})  # type: ignore[no-any-return]
