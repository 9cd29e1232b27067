"""A frozen part's kernels launched as one CUDA graph, recorded from a call and replayed for inputs like that call's.

A replay computes into the memory of its recording. So a recording is replayed only once nothing alive refers to what it
computed before; where all are in use, a further one is made, up to a few, and beyond these the call runs unrecorded.
"""

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxfreeze.backends.compiled import kinds_of
from fxfreeze.layouts import is_transformed
from fxfreeze.numerics import switches
from fxfreeze.observers import observed

__all__ = ["AFTER", "CudaGraphs", "Recorded", "graphs_on"]

AFTER = 3  # calls with inputs of a kind that run unrecorded: libraries choose their algorithms in them
_MOST_COUNTED = 64  # kinds whose calls are counted
_MOST_KINDS = 4
_MOST_AT_ONCE = 3  # recordings of a kind: each keeps memory for all that it computes

Function = Callable[..., Sequence[Any]]


@dataclass(frozen=True)
class Recorded:
    """What a recording reads, what it writes, and what runs it; lasting: outputs that no replay writes, such as weights."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]
    lasting: frozenset[int] = frozenset()


def graphs_on(device: str) -> "CudaGraphs | None":
    """What launches a segment's kernels on a type of device, where that can be recorded."""
    return CudaGraphs() if device == "cuda" and torch.version.hip is None else None


class CudaGraphs:
    """Calls functions of tensors, and from some call on replays a recording of what they do for inputs of that kind.

    failed: why calls of some kind can't be recorded. A recording is for one stream, on which a replay follows whatever
    read the outputs of the one before.
    """

    def __init__(self, record: Callable[[Function, Sequence[Tensor]], Recorded] | None = None):
        self.failed: dict[Any, str] = {}
        self._record = record or _record
        self._calls: Counter[Any] = Counter()
        self._recordings: dict[Any, list[_Recording]] = {}
        self._lock = threading.Lock()

    def __call__(self, function: Function, inputs: Sequence[Any]) -> tuple[Any, ...]:
        """What ``function`` returns for ``inputs``, which must depend on nothing else and leave all else as it is."""
        if _recordable(inputs):
            with self._lock:
                recording = self._free(function, inputs)
                if recording is not None:
                    return recording.replayed(inputs)
        return tuple(function(*inputs))

    def __str__(self) -> str:
        shapes = ", ".join(made[0].shapes for made in self._recordings.values() if made)
        recorded = [f"CUDA graphs recorded for {shapes}"] if shapes else []
        return "; ".join([*recorded, *(f"no CUDA graph: {why}" for why in dict.fromkeys(self.failed.values()))])

    def _free(self, function: Function, inputs: Sequence[Tensor]) -> "_Recording | None":
        """A recording of which nothing alive is left, made if there may be another."""
        device = inputs[0].device
        kind = function, kinds_of(inputs), _stream(device), switches(device.type)
        made = self._recordings.get(kind, [])
        made[:] = [recording for recording in made if recording.whole]
        if (free := next((recording for recording in made if recording.free), None)) is not None:
            return free
        if kind in self.failed or not self._may_record(kind, made):
            return None
        try:
            recording = _Recording(self._record(function, inputs))
        except Exception as error:  # noqa: BLE001 - whatever keeps it from being recorded, it can be run
            self.failed[kind] = f"{type(error).__name__}: {error}"
            return None
        self._recordings.setdefault(kind, made).append(recording)
        return recording

    def _may_record(self, kind: Any, made: Sequence["_Recording"]) -> bool:
        """Whether calls of a kind are frequent enough, and memory is left for another."""
        if made:
            return len(made) < _MOST_AT_ONCE
        if len(self._calls) > _MOST_COUNTED:
            self._calls.clear()
        self._calls[kind] += 1
        return self._calls[kind] > AFTER and len(self._recordings) < _MOST_KINDS


class _Recording:
    """One CUDA graph, with the memory that it reads and writes."""

    def __init__(self, recorded: Recorded):
        self._recorded = recorded
        self.shapes = " and ".join("x".join(map(str, t.shape)) for t in recorded.inputs)
        storages = {s._cdata: s for s in (t.untyped_storage() for t in recorded.outputs)}
        self._written = [s for s in storages.values() if s.data_ptr() not in recorded.lasting]
        storages.clear()
        self._places = self._where()
        self._idle = self._references()

    @property
    def free(self) -> bool:
        """Whether nothing refers to what the last replay wrote: no tensor, no tape, no storage."""
        return self._references() == self._idle

    @property
    def whole(self) -> bool:
        """Whether its memory is where it was: whoever held an output may have resized it."""
        return self._where() == self._places

    def _where(self) -> list[tuple[int, int]]:
        return [(s.data_ptr(), s.nbytes()) for s in self._written]

    def _references(self) -> list[int]:
        """Of each written storage, how many tensors, and how many names in Python, refer to it.

        In Python it is one object, whoever asks a tensor for it, and its names are not counted with the tensors.
        """
        return [torch._C._storage_Use_Count(s._cdata) + sys.getrefcount(s) for s in self._written]

    def replayed(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs for ``inputs``, as tensors that are counted."""
        with torch.no_grad():
            for kept, given in zip(self._recorded.inputs, inputs, strict=True):
                kept.copy_(given)
            self._recorded.replay()
            return tuple([t.detach() for t in self._recorded.outputs])


def _recordable(inputs: Sequence[Any]) -> bool:
    """Whether a recording can stand for a call with these: plain tensors of one device, with nobody recording already."""
    if observed() or not inputs:
        return False
    if not all(type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided for x in inputs):
        return False
    if any(is_transformed(x) or x.device != inputs[0].device for x in inputs):
        return False
    return not (inputs[0].is_cuda and torch.cuda.is_current_stream_capturing())


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def _record(function: Function, inputs: Sequence[Tensor]) -> Recorded:
    """The kernels of a call, as a CUDA graph with memory of its own; raises what CUDA raises for what can't be recorded."""
    with torch.cuda.device(inputs[0].device), torch.inference_mode(False), torch.no_grad():
        kept = tuple([torch.empty_like(x).copy_(x) for x in inputs])
        current, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with torch.cuda.stream(side):
            _outputs(function, kept)  # what a stream's first call allocates for the next ones
            unrecorded = _outputs(function, kept)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as one that pins memory, may go on meanwhile.
            with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                outputs = _outputs(function, kept)
        except Exception:
            with contextlib.suppress(RuntimeError):  # the first error tells more
                _capture_again(side)
            raise
    lasting = frozenset(t.untyped_storage().data_ptr() for t in unrecorded)  # both calls have these at the same place
    given = {x.untyped_storage().data_ptr() for x in kept}
    if given & {t.untyped_storage().data_ptr() for t in outputs}:
        raise ValueError("it hands over memory of its input")
    return Recorded(kept, outputs, graph.replay, lasting)


def _outputs(function: Function, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    outputs = tuple(function(*inputs))
    if not all(isinstance(t, Tensor) and t.device == inputs[0].device for t in outputs):
        raise ValueError(f"its outputs are not all tensors on {inputs[0].device}")
    return outputs


def _capture_again(stream: torch.cuda.Stream) -> None:
    """Capture, with success, after a capture that failed, which may leave the random-number generator as if capturing."""
    room = torch.zeros((), device=stream.device)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=stream, capture_error_mode="thread_local"):
        room.add_(1)
