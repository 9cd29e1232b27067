"""OpenVINO on a CPU, by its native API: the graph is exported, converted and compiled, and reads and writes torch's memory.

``torch.compile(backend="openvino")`` is not used: it may fall back to TorchInductor in silence.
"""

import contextlib
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxfreeze.imports import ChoiceError, optional
from fxfreeze.sizes import dtype_text

__all__ = ["compile", "convert", "float32", "here", "package", "request", "without_telemetry"]

_REMEDY = "pip install 'fxfreeze[openvino]'"
_PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def package(remedy: str = _REMEDY) -> ModuleType:
    """OpenVINO, without its telemetry; raises ChoiceError, with the remedy, where it can't be imported."""
    if "openvino" in sys.modules:
        return optional("openvino", remedy, ChoiceError)
    with without_telemetry():
        optional("openvino.tools.ovc.convert_impl", remedy, ChoiceError)
        return sys.modules["openvino"]


@contextlib.contextmanager
def without_telemetry() -> Iterator[None]:
    """Within, what is imported finds no telemetry, and takes a stub of its own.

    The real one forks a process to tell its makers of each import and conversion.
    """
    known = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["openvino_telemetry"]
        if known is not None:
            sys.modules["openvino_telemetry"] = known


def here() -> bool:
    """Whether it can be imported."""
    try:
        package()
    except ChoiceError:
        return False
    return True


def compile(
    module: GraphModule, inputs: Sequence[Tensor], autocast: torch.dtype | None
) -> Callable[..., Sequence[Tensor]]:
    """``module`` for tensors of the shapes of ``inputs``, computed in float32, or bfloat16 if autocast or weights say so.

    With bfloat16 the processor may use it, and what goes in and comes out is float32 all the same.
    Raises ValueError for another device or dtype, ChoiceError without the package.
    """
    dtype = _dtype(module, autocast)
    return request(convert(module, inputs), dtype)


def convert(module: GraphModule, inputs: Sequence[Tensor]) -> Any:
    """``module`` as OpenVINO's model, in float32, for tensors of the shapes of ``inputs``."""
    openvino = package()
    if any(t.device.type != "cpu" for t in inputs):
        raise ValueError("OpenVINO runs here on a CPU only")
    with warnings.catch_warnings(), torch.autocast("cpu", enabled=False):
        warnings.simplefilter("ignore")  # of torch.export's and OpenVINO's own doing
        exported = torch.export.export(module.float(), tuple(map(float32, inputs)))
        model = openvino.convert_model(exported)
        model.reshape({i: tuple(x.shape) for i, x in enumerate(inputs)})
    return model


def request(model: Any, dtype: torch.dtype) -> Callable[..., Sequence[Tensor]]:
    """OpenVINO's ``model`` as a function of tensors, its floating point computed in ``dtype``."""
    settings = {
        "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype],
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    return _Request(_core().compile_model(model, "CPU", settings))


@cache
def _core() -> Any:
    """One for the process, and never let go.

    Each sets the thread's alternate signal stack and, when it goes, the one before it, which may be freed by then: after
    two that went in the order they came, the next Ctrl-C ends the process by SIGSEGV.
    """
    return package().Core()


def _dtype(module: GraphModule, autocast: torch.dtype | None) -> torch.dtype:
    held = {t.dtype for t in module.state_dict().values() if t.is_floating_point()}
    used = held | ({autocast} if autocast else set())
    if refused := used - _PRECISIONS.keys():
        raise ValueError(
            f"OpenVINO computes float32 and bfloat16 here, not {dtype_text(refused.pop())}: see precision= of compile"
        )
    return torch.bfloat16 if torch.bfloat16 in used else torch.float32


def float32(x: Tensor) -> Tensor:
    """As OpenVINO is given it."""
    return x.float() if x.is_floating_point() else x


class _Request:
    """A compiled model as a function of tensors; each call makes new tensors for its outputs."""

    def __init__(self, model: Any):
        self._request = model.create_infer_request()
        self._outputs = [(tuple(o.shape), _torch_dtype(o.get_element_type())) for o in model.outputs]
        self._lock = threading.Lock()

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        from openvino import Tensor as Shared

        made = tuple(torch.empty(shape, dtype=dtype) for shape, dtype in self._outputs)
        with self._lock:
            given = [float32(x.detach()).contiguous() for x in inputs]  # alive until the request is done
            for i, x in enumerate(given):
                self._request.set_input_tensor(i, Shared(x.numpy(), shared_memory=True))
            for i, y in enumerate(made):
                self._request.set_output_tensor(i, Shared(y.numpy(), shared_memory=True))
            self._request.infer()
        return made


def _torch_dtype(element: Any) -> torch.dtype:
    import numpy

    return torch.from_numpy(numpy.empty(0, element.to_dtype())).dtype
