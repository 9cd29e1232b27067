"""A frozen prefix as a user could make it fast without fxfreeze; every way gets channels_last and the same dtype."""

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from bench.clock import Contender, rotated
from bench.compiling import compiled, quiet
from bench.scale import DEVICE, SMALL
from fxfreeze.backends import openvino

Run = Callable[[Tensor], Any]


def eager(graph: GraphModule, images: Tensor) -> Run:
    """The original's modules in eval mode."""
    return graph.to(images.dtype, memory_format=torch.channels_last)


def fx_fuse(graph: GraphModule, images: Tensor) -> Run:
    """torch.fx's own folding of batch norms."""
    with quiet():
        from torch.fx.experimental.optimization import fuse
    return eager(fuse(graph), images)


def fx_fuse_captured(graph: GraphModule, images: Tensor) -> Run:
    """The same as one CUDA graph, its input copied into place."""
    run, place = fx_fuse(graph, images), images.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(place)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        result = run(place)

    def replay(x: Tensor) -> Any:
        place.copy_(x)
        captured.replay()
        return result

    return replay


def inductor(graph: GraphModule, images: Tensor) -> Run:
    """torch.compile with freezing."""
    return compiled(eager(graph, images), freezing=True)


def inductor_autotuned(graph: GraphModule, images: Tensor) -> Run:
    """The same with max-autotune, in CUDA graphs."""
    options = {"freezing": True, "max_autotune": True, "triton.cudagraphs": True}
    return compiled(eager(graph, images), **options)


def tensorrt(graph: GraphModule, images: Tensor) -> Run:
    import torch_tensorrt

    module = eager(graph, images)
    return torch_tensorrt.compile(module, ir="dynamo", inputs=[images], enabled_precisions={images.dtype})


def openvino_native(graph: GraphModule, images: Tensor) -> Run:
    """As OpenVINO's documentation says, with torch's number of threads and the images' dtype."""
    import openvino as ov

    x = images.float().contiguous()
    with quiet():
        converted = ov.convert_model(torch.export.export(graph, (x,)), input=[tuple(x.shape)])
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if images.dtype is torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    model, given = ov.Core().compile_model(converted, "CPU", settings), x.numpy()
    return lambda _: (torch.from_numpy(model(given, share_inputs=True)[0]),)


def _ways() -> dict[str, Callable[[GraphModule, Tensor], Run]]:
    ways = {"eager": eager, "eager, again": eager, "fx fuse": fx_fuse}
    if SMALL:
        return ways
    if DEVICE.type == "cuda":
        ways |= {"fx fuse, CUDA graph": fx_fuse_captured, "Inductor": inductor}
        ways |= {"Inductor, max-autotune, CUDA graphs": inductor_autotuned}
        return ways | ({"TensorRT": tensorrt} if importlib.util.find_spec("torch_tensorrt") else {})
    return ways | {"Inductor": inductor} | ({"OpenVINO": openvino_native} if openvino.here() else {})


WAYS = _ways()  # those that this machine has


def contender(way: str, traced: GraphModule, x: Tensor, dtype: torch.dtype) -> Contender:
    """``traced`` made fast in that way, for images like ``x``: [N, C, H, W] in float32."""
    images = x.to(dtype, memory_format=torch.channels_last)
    return rotated(WAYS[way](copy.deepcopy(traced).eval(), images), [images])
