"""What ``profile`` is asked for, looked at before anything is measured: each refusal is a ChoiceError in one line."""

import copy
import inspect
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxfreeze.feed import Feed
from fxfreeze.imports import ChoiceError, one_line

__all__ = ["check_call", "check_device", "check_net", "check_options", "check_trace", "depths_among", "made_by"]


def check_options(optimizer: Any, progress: Any, depths: Any, rounds: int) -> None:
    """Types, so that no mistake of them is found in the middle."""
    if isinstance(optimizer, torch.optim.Optimizer) or not callable(optimizer):
        raise ChoiceError(
            f"optimizer is {_a(optimizer)}: expected a function that makes one from a list of parameters, such as "
            f"lambda parameters: torch.optim.Adam(parameters, lr=1e-3)"
        )
    if not callable(progress):
        raise ChoiceError(f"progress is {progress!r}: expected a function of (iterations done, of how many)")
    if not isinstance(depths, Iterable | None):
        raise ChoiceError(f"depths is {depths!r}: expected a list of whole numbers, such as [{depths!r}]")
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise ChoiceError(f"rounds is {rounds!r}: expected a whole number of at least 1")


def check_trace(path: str | Path) -> None:
    """The profiler would say nothing of a file that it can't write."""
    file = Path(path)
    if file.is_dir() or not file.parent.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise ChoiceError(f"trace {str(path)!r} can't be written: name a file in a folder that exists and is yours")


def check_device(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise ChoiceError(f"the batch is on {device}: expected a CPU or CUDA device, which profile knows how to time")


def check_net(net: Any) -> None:
    """What ``compile`` does not refuse, or with a remedy that is not this one."""
    if not isinstance(net, nn.Module):
        return
    if type(net).__name__ == "OptimizedModule":
        raise ChoiceError("net is what torch.compile returned: pass the network that was compiled, net._orig_mod")
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if tensor.is_inference():
            raise ChoiceError(
                f"{name} was made under torch.inference_mode(), and can't train: make the network outside"
            )


def check_call(net: nn.Module, feed: Feed) -> None:
    """A copy of ``net`` takes the batch: a traced graph's own errors would speak of the graph."""
    args, kwargs, _ = feed.copied()
    try:
        with torch.no_grad():
            copy.deepcopy(net).train()(*args, **kwargs)
    except Exception as error:  # a network may raise anything
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in feed.tensors)
        raise ChoiceError(
            f"the network does not take the batch, whose inputs have the shapes {shapes}: {one_line(error)}"
        ) from error


def depths_among(wanted: Iterable[int] | None, units: int, most: int) -> list[int]:
    """In order, 0 first; None: all depths of a network of ``units``, or ``most``, evenly spread."""
    if wanted is None:
        count = min(most, units)
        return [round(i * (units - 1) / max(1, count - 1)) for i in range(count)]
    chosen = list(wanted)
    for depth in chosen:
        if isinstance(depth, bool) or not isinstance(depth, int) or not 0 <= depth < units:
            raise ChoiceError(
                f"this network has no depth {depth!r}: its depths are 0 to {units - 1}, as the last of its {units} units "
                f"never freezes"
            )
    return sorted({0, *chosen})


def made_by(make: Any, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer that ``make`` makes, whose step can be called alone."""
    made = make(parameters)
    if not isinstance(made, torch.optim.Optimizer):
        raise ChoiceError(
            f"optimizer returned {_a(made)}: expected a torch.optim.Optimizer of the parameters it is given"
        )
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ChoiceError(
            f"the step of {type(made).__qualname__} needs a closure that computes the loss anew: expected an optimizer that "
            f"steps once after a backward, such as SGD or Adam"
        )
    return made


def _a(value: Any) -> str:
    if isinstance(value, Tensor | nn.Module | torch.optim.Optimizer):  # their repr is long
        return f"an object of type {type(value).__qualname__}"
    return repr(value)
