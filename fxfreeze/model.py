"""The stand-in for the user's network, and ``compile`` which makes it."""

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from fxfreeze.auto import UNKNOWN_STEPS
from fxfreeze.backends import check_backend, check_int8
from fxfreeze.builder import Decision
from fxfreeze.derived import Derived
from fxfreeze.forward import Forward
from fxfreeze.inputs import Inputs, flatten_inputs, required_inputs
from fxfreeze.prefix import Prefix
from fxfreeze.schedule import Schedule, until_next_freeze
from fxfreeze.trace import Traced, trace
from fxfreeze.units import Ownership, Unit, find_units

__all__ = ["FreezableModel", "compile"]

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_PREFIX_PRECISIONS = {**PRECISIONS, "int8": torch.int8}


def compile(
    net: nn.Module,
    schedule: Schedule,
    *,
    example_inputs: tuple[Any, ...] | dict[str, Any] | Tensor | None = None,
    units: Iterable[str | Sequence[str]] | None = None,
    backend: str = "auto",
    precision: torch.dtype | str | None = None,
) -> "FreezableModel":
    """Make ``net`` freeze on ``schedule``; the result stands in for it in any training loop.

    example_inputs: arguments of one call (a tuple, a dict of keyword inputs, or a tensor), needed only when the forward
    looks at shapes; units: names of modules, or groups of names, that start a unit each, in place of the automatic list
    (what runs next belongs to it too, up to the next name); precision: compute dtype of the frozen part (float32, float16
    or bfloat16, or "fp32", "fp16", "bf16"; None: what the model runs in, autocast's dtype included; "int8": quantized by
    NNCF for OpenVINO, on a CPU, calibrated on the first batch after a freeze); backend: what the
    frozen part runs on, "plain" (folded, PyTorch's operators), "library" (oneDNN's or cuDNN's fused convolutions),
    "inductor", "openvino" (on a CPU), "triton" (fused kernels), or "auto", which tries what may pay and takes the fastest.
    Units that the schedule freezes at step 0 are frozen at once.

    Raises TypeError for a ``net`` that is no plain module, TraceRefusal when its forward can't be traced, ValueError for
    other impossible arguments.
    """
    _check_net(net)
    if isinstance(schedule, type) or not (hasattr(schedule, "depth") and hasattr(schedule, "factors")):
        raise TypeError(
            f"schedule is a {type(schedule).__qualname__}: expected FreezeOut, Milestones or another schedule; "
            f"to freeze by hand, Milestones({{}})"
        )
    if isinstance(units, str) or not isinstance(units, Iterable | None):
        raise TypeError(f"units is {units!r}: expected a list of module names, such as ['layer1', 'layer2']")
    check_backend(backend)
    dtype = _dtype(precision)
    if dtype is torch.int8:
        check_int8(backend)
    ownership = find_units(net, traces_of(net, example_inputs), units)
    if len(ownership.units) == 1:
        warnings.warn(
            f"the network is a single unit, and the last unit never freezes: nothing will be frozen{_tie(net)}",
            stacklevel=2,
        )
    return FreezableModel(net, schedule, ownership, backend, dtype)


def _check_net(net: nn.Module) -> None:
    if not isinstance(net, nn.Module):
        raise TypeError(f"net is a {type(net).__qualname__}: expected a torch.nn.Module")
    if isinstance(net, FreezableModel):
        raise TypeError("net is a FreezableModel already: compile its .original, or use it as it is")
    if (
        isinstance(net, (nn.DataParallel, nn.parallel.DistributedDataParallel))
        or type(net).__name__ == "OptimizedModule"
    ):
        raise TypeError(
            f"net is a {type(net).__qualname__}: compile the network with fxfreeze first, then wrap the result"
        )
    if isinstance(net, torch.jit.ScriptModule):
        raise TypeError("net is a TorchScript module, which has no Python forward to trace: compile the Python network")


def _tie(net: nn.Module) -> str:
    """Two parameters that are one, if there are any: all between their uses freezes together."""
    names: dict[int, str] = {}
    for name, parameter in net.named_parameters(remove_duplicate=False):
        if first := names.get(id(parameter)):
            return f" ({first} and {name} are one parameter, so all between its uses freezes together)"
        names[id(parameter)] = name
    return ""


def _dtype(precision: torch.dtype | str | None) -> torch.dtype | None:
    dtype = _PREFIX_PRECISIONS.get(precision) if isinstance(precision, str) else precision
    if precision is not None and dtype not in _PREFIX_PRECISIONS.values():
        raise ValueError(
            f"precision {precision!r} is unknown: expected None, {', '.join(_PREFIX_PRECISIONS)} or their torch dtypes"
        )
    return dtype


def traces_of(net: nn.Module, example_inputs: tuple[Any, ...] | dict[str, Any] | Tensor | None) -> list[Traced]:
    """``net`` traced in train and in eval mode; its modules' modes are left as they were."""
    if not isinstance(example_inputs, tuple | dict | Tensor | None):
        raise TypeError(
            f"example_inputs is a {type(example_inputs).__qualname__}: expected the arguments of one call, a tuple, a dict of "
            f"keyword inputs, or a tensor"
        )
    inputs: Inputs
    tensors: list[Tensor] | None
    if example_inputs is None:
        inputs, tensors = required_inputs(net), None
    else:
        args = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        named = example_inputs if isinstance(example_inputs, dict) else {}
        inputs, tensors = flatten_inputs(net, () if named else args, named)
    modes = [(module, module.training) for module in net.modules()]
    try:
        traces = []
        for mode in (True, False):
            for module, _ in modes:
                module.training = mode
            traces.append(trace(net, inputs, tensors))
        return traces
    finally:
        for module, mode in modes:
            module.training = mode


class _Forward:
    """``model.forward``: callable, with the original's signature."""

    def __init__(self, model: "FreezableModel"):
        self._model = model
        functools.update_wrapper(self, model.original.forward)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._model.original.forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._model._run(args, kwargs)


class _ForwardDescriptor:
    """A non-data descriptor, so that ``model.forward = patched`` works as on any module."""

    def __get__(self, model: "FreezableModel | None", owner: type) -> Any:
        return self if model is None else _Forward(model)


class FreezableModel(nn.Module):
    """Stands in for a network, which it shares everything with, and freezes it from the input side.

    original: the user's module, always valid; units: the ordered ``Unit``s; depth: how many are frozen; schedule; step:
    that a FreezeScheduler has come to, None without one.
    Attributes that are not listed here are the original's.
    """

    original: nn.Module
    schedule: Schedule
    forward = _ForwardDescriptor()

    _OWN = frozenset(
        [
            "original",
            "schedule",
            "backend",
            "precision",
            "forward",
            "_ownership",
            "_depth",
            "_required_grad",
            "step",
            "_derived",
            "_forward",
        ]
    )

    def __init__(
        self, net: nn.Module, schedule: Schedule, ownership: Ownership, backend: str, precision: torch.dtype | None
    ) -> None:
        # Names, order, hooks and nesting are the original's because the dictionaries are; flags are looked up there.
        shared = [key for key, value in vars(nn.Module()).items() if isinstance(value, (dict, set))]
        self.__dict__.update({key: vars(net)[key] for key in shared})
        self.original = net
        self.schedule = schedule
        self.backend = backend
        self.precision = precision
        self._ownership = ownership
        self._depth = 0
        self.step: int | None = None
        self._required_grad: dict[str, bool] = {}  # of frozen parameters, before they froze
        self._derived = Derived(net, ownership, precision, self._wanted, self._steps_ahead)
        self._forward = Forward(net)
        self.freeze(schedule.depth(0, self.units))

    # ---- freezing

    @property
    def units(self) -> tuple[Unit, ...]:
        """What freezes as one, from the input side; the last is the head, which never does."""
        return self._ownership.units

    @property
    def depth(self) -> int:
        """How many units are frozen."""
        return self._depth

    @property
    def prefix(self) -> Prefix:
        """What runs for the frozen part; print it."""
        return self._derived.surgery.prefix

    def freeze(self, depth: int) -> None:
        """Freeze the first ``depth`` units for good: eval mode, ``requires_grad`` False, ``grad`` None.

        The frozen part is rebuilt at the next forward. Raises ValueError for a depth below the current one, or one that
        would freeze the head.
        """
        if isinstance(depth, bool) or not isinstance(depth, int):
            raise TypeError(f"depth is {depth!r}: expected an int")
        if depth < self.depth:
            raise ValueError(
                f"depth {depth} is below the current depth {self.depth}: frozen units stay frozen; "
                f"FreezeScheduler.load_state_dict restores an earlier state"
            )
        if depth >= len(self.units):
            last = self.units[-1].name
            raise ValueError(
                f"depth {depth} would freeze the head {last!r}: at most {len(self.units) - 1} of {len(self.units)} units"
            )
        if depth == self.depth:
            return
        for unit in self.units[self.depth : depth]:
            for name in unit.parameters:
                parameter = self.original.get_parameter(name)
                self._required_grad[name] = parameter.requires_grad
                parameter.requires_grad_(False)
                parameter.grad = None
        self._depth = depth
        self.refresh()
        self._derived.assert_frozen()

    def refresh(self) -> None:
        """Forget everything derived from the frozen weights; it is built anew at the next forward.

        Needed after a write through ``.data``, which leaves no trace; any other change is noticed.
        """
        self._derived.start(self.depth)

    def _restore_depth(self, depth: int) -> None:
        """Set the depth to any value, as a saved state says; ``requires_grad`` of thawed parameters is restored."""
        for unit in self.units[depth : self.depth]:
            for name in unit.parameters:
                self.original.get_parameter(name).requires_grad_(self._required_grad.pop(name))
            for name in unit.modules:
                self.original.get_submodule(name).training = self.training
        self._depth = min(depth, self.depth)
        self.refresh()
        self.freeze(depth)

    @property
    def _wanted(self) -> str:
        """The backend to build by: int8 has one."""
        return "openvino" if self.precision is torch.int8 else self.backend

    def _steps_ahead(self) -> float:
        """How many training steps will run the prefix of now; none where a cache may store what it computes, once."""
        if self._forward.taps:
            return 0
        steps = until_next_freeze(self.schedule, self.units, self.step)
        return UNKNOWN_STEPS if steps == math.inf else steps

    def _decisions(self) -> dict[str, Any]:
        """What a resumed run must compute its prefix by."""
        segments = [decision._asdict() for decision in self._derived.decisions.values()]
        return {"batch_size": self._forward.batch_size, "segments": segments}

    def _load_decisions(self, decisions: dict[str, Any]) -> None:
        self._forward.batch_size = decisions["batch_size"]
        loaded = [Decision(**decision) for decision in decisions["segments"]]
        self._derived.decisions = {decision.key: decision for decision in loaded}
        self.refresh()

    # ---- running

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.depth:
            self._derived.assert_frozen()
            current = self._derived.current  # it looks at addresses, which Dynamo can't trace
            (torch.compiler.disable(current) if torch.compiler.is_compiling() else current)()  # type: ignore[no-untyped-call]
        return self._forward(self._derived, args, kwargs)

    # ---- standing in

    def train(self, mode: bool = True) -> Self:
        self.original.train(mode)
        self._derived.assert_frozen()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        self.original.requires_grad_(requires_grad)
        for unit in self.units[: self.depth]:
            for name in unit.parameters:
                self.original.get_parameter(name).requires_grad_(False)
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.original.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.original._load_from_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        before = self._derived.signs()
        self.original._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._derived.signs() != before:  # now, for a second move may end up at the first one's addresses
            self.refresh()
        return self

    def _replicate_for_data_parallel(self) -> Self:
        raise RuntimeError(
            "nn.DataParallel copies modules in a way that a frozen part can't follow: use DistributedDataParallel"
        )

    def extra_repr(self) -> str:
        return f"{type(self.original).__qualname__}, {self.depth} of {len(self.units)} units frozen"

    def __getattr__(self, name: str) -> Any:
        if name in self._OWN:  # not set yet: an object being unpickled
            raise AttributeError(name)
        return getattr(self.original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            object.__setattr__(self, name, value)
            return
        if isinstance(getattr(type(self), name, None), property):
            raise AttributeError(
                f"{name} can't be assigned: model.freeze(depth) freezes, and units= of compile sets the units"
            )
        setattr(self.original, name, value)
        if isinstance(value, nn.Module):
            self.refresh()

    def __delattr__(self, name: str) -> None:
        delattr(self.original, name)
        self.refresh()

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_derived"] = list(self._derived.decisions.values())  # the rest is made again
        state["_forward"] = self._forward.batch_size
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        decisions, batch_size = state.pop("_derived"), state.pop("_forward")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._derived = Derived(self.original, self._ownership, self.precision, self._wanted, self._steps_ahead)
        self._derived.decisions.update({decision.key: decision for decision in decisions})
        self._forward = Forward(self.original)
        self._forward.batch_size = batch_size
        self.refresh()
