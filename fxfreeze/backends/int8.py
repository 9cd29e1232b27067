"""int8 on a CPU: NNCF puts the weights of OpenVINO's graph on 8-bit grids, one a channel, and its activations, one a tensor.

The grids of activations, their ranges, come from one batch. Kept, they make the same model again from another.
"""

import contextlib
import io
import logging
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxfreeze.backends import openvino
from fxfreeze.imports import ChoiceError, optional

__all__ = ["Quantized", "compile", "package"]

_REMEDY = "pip install 'fxfreeze[int8]'"
_ENDS = range(1, 5)  # the inputs of OpenVINO's FakeQuantize that hold a grid's ends


def package() -> ModuleType:
    """NNCF, without its telemetry; raises ChoiceError, with the remedy, where it or OpenVINO can't be imported."""
    openvino.package(_REMEDY)
    loggers = logging.getLoggerClass()
    try:
        with openvino.without_telemetry():
            return optional("nncf", _REMEDY, ChoiceError)
    finally:
        logging.setLoggerClass(loggers)  # it makes all loggers its own kind


class Quantized:
    """A function of tensors. ranges: the least and the largest value of each activation's grid, in the graph's order."""

    def __init__(self, model: Any, ranges: list[float]):
        self.ranges = ranges
        self._request = openvino.request(model, torch.float32)

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        return self._request(*inputs)


def compile(
    module: GraphModule, inputs: Sequence[Tensor], autocast: torch.dtype | None, ranges: Sequence[float] | None = None
) -> Quantized:
    """``module`` for tensors of the shapes of ``inputs``: with ``ranges`` that an earlier one had, else with theirs.

    Raises ValueError for another device, for a graph that has nothing to quantize, and for ranges of another graph;
    ChoiceError without the packages.
    """
    del autocast  # what is not int8 is float32
    nncf = package()
    model = openvino.convert(module, inputs)
    batch = {i: openvino.float32(x).contiguous().numpy() for i, x in enumerate(inputs)}
    # Its correction of biases takes half of the time again, and did not bring the outputs closer (measured).
    advanced = nncf.AdvancedQuantizationParameters(disable_bias_correction=True)
    with _silenced():
        model = nncf.quantize(model, nncf.Dataset([batch]), subset_size=1, advanced_parameters=advanced)
    grids = _activation_grids(model)
    if not grids:
        raise ValueError("NNCF found nothing in it to quantize")
    if ranges is not None:
        _impose(grids, ranges)
    return Quantized(model, _ranges(grids))


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Without NNCF's progress bars and notes, which go to stdout."""
    logger = logging.getLogger("nncf")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _activation_grids(model: Any) -> list[Any]:
    """The nodes that quantize what depends on the inputs; of weights NNCF has made 8-bit constants already."""
    found: list[Any] = []
    given: set[str] = set()
    for node in model.get_ordered_ops():
        sources = {value.get_node().get_friendly_name() for value in node.input_values()}
        if node.get_type_name() == "Parameter" or sources & given:
            given.add(node.get_friendly_name())
            if node.get_type_name() == "FakeQuantize":
                found.append(node)
    return found


def _ranges(grids: Sequence[Any]) -> list[float]:
    """Of each grid the ends before and after, in the order of FakeQuantize's inputs."""
    return [float(end) for values in _ends(grids) for end in values.flatten()]


def _ends(grids: Sequence[Any]) -> Iterator[Any]:
    for node in grids:
        yield from (node.input_value(i).get_node().data for i in _ENDS)


def _impose(grids: Sequence[Any], ranges: Sequence[float]) -> None:
    import numpy
    from openvino import op

    if (expected := len(_ranges(grids))) != len(ranges):
        raise ValueError(
            f"{len(ranges)} ends of ranges were kept, and its activations have {expected}: it is another graph"
        )
    rest = iter(ranges)
    for node in grids:
        for i in _ENDS:
            old = node.input_value(i).get_node().data
            new = numpy.array([next(rest) for _ in range(old.size)], old.dtype).reshape(old.shape)
            node.input(i).replace_source_output(op.Constant(new).output(0))
