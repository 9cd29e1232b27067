"""Concatenations as slices of one buffer: families, what is left alone and why, and the numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from passing import calls, done, passed, reasons
from torch import Tensor, nn

from fxfreeze.passes.dense_buffer import dense_buffer


def layers() -> dict[str, nn.Module]:
    """Each makes 3 channels of 8, 11 or 14."""
    return {f"conv{c}": nn.Conv2d(c, 3, 3, padding=1) for c in (8, 11, 14)}


def as_list(net: Any, x: Tensor) -> Tensor:
    """As torchvision's DenseNet does it."""
    features = [x]
    for c in (8, 11, 14):
        features.append(net.get_submodule(f"conv{c}")(torch.cat(features, 1)))
    return torch.cat(features, 1)


def running(net: Any, x: Tensor) -> Tensor:
    """As DenseNet's own code does it."""
    for c in (8, 11, 14):
        x = torch.cat((x, net.get_submodule(f"conv{c}")(x)), 1)
    return x


def newest_first(net: Any, x: Tensor) -> Tensor:
    for c in (8, 11, 14):
        x = torch.cat((net.get_submodule(f"conv{c}")(x), x), dim=-3)
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("run", [as_list, running, newest_first])
def test_a_dense_block_has_one_buffer(run: Callable[..., Tensor], dtype: torch.dtype) -> None:
    segment = passed([dense_buffer], run, dtype=dtype, **layers())
    left = calls(segment)
    assert left["cat"] == 0
    assert (left["allocate"], left["placed"]) == (1, 4)
    assert left["joined"] == len(done(segment, "dense_buffer"))


def test_a_skip_and_an_intermediate_result() -> None:
    """As in a U-Net; what else reads the parts or a part of the sum reads the buffer."""

    def run(net: Any, x: Tensor) -> tuple[Tensor, ...]:
        skip, up = net.conv8(x), x.sin()
        both = torch.cat([skip, up], 1)
        return net.conv11(both), skip, torch.cat([both, net.conv8(up)], 1)

    segment = passed([dense_buffer], run, **layers())
    assert calls(segment)["cat"] == 0
    assert calls(segment)["allocate"] == 1


def test_a_boundary_out_of_a_buffer_is_memory_of_its_own() -> None:
    """What the original hands over is packed: slices of a buffer would keep all of it alive, in other strides."""
    segment = passed([dense_buffer], as_list, **layers())
    x = torch.randn(3, 8, 6, 6)
    first, again = segment(x)[0], segment(x)[0]
    assert first.is_contiguous()
    assert first.untyped_storage().data_ptr() != again.untyped_storage().data_ptr()


def test_a_slice_of_one_pixel_is_memory_of_its_own() -> None:
    """Of one image of one pixel a slice of the buffer is packed as it is, and must be copied all the same."""

    def run(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y = net.conv8(x)
        return y, torch.cat([x, y], 1)

    segment = passed([dense_buffer], run, torch.randn(1, 8, 1, 1), **layers())
    part, whole = segment(torch.randn(1, 8, 1, 1))
    before = whole.clone()
    part.add_(100)
    assert torch.equal(whole, before)


MISSES: dict[str, tuple[Callable[..., Any], str]] = {
    "rows": (lambda net, x: torch.cat([x, x.sin()], 2), "it joins dimension 2, not the channels"),
    "signals": (lambda net, x: torch.cat([x[0], x[0].sin()], 1), "has 3 dimensions, not 4"),
    "twice the same": (lambda net, x: torch.cat([y := net.conv8(x), y], 1), "has another place already"),
    "two orders": (
        lambda net, x: (y := net.conv8(x), torch.cat([x, y], 1), torch.cat([y, x], 1))[1:],
        "has another place already",
    ),
    "two dtypes": (lambda net, x: torch.cat([x, x.double().sin()], 1), "cat is float64"),
    "half and single": (lambda net, x: torch.cat([x, x.half().sin()], 1), "it joins several dtypes"),
    "written into": (
        lambda net, x: (y := x.sin(), z := torch.cat([x, y], 1), y.mul_(2), z + 1, y.cos())[-2:],
        "mul_ writes into sin after it was made",
    ),
    "the result written into": (
        lambda net, x: torch.cat([x, x.sin()], 1).relu_(),
        "relu_ writes into cat after it was made",
    ),
    "no channels": (
        lambda net, x: (y := net.conv8(x).permute(0, 2, 3, 1), torch.cat([y, y.flip(1)], 1))[1],
        "how many channels permute has is not fixed by a weight",
    ),
    "into a tensor": (
        lambda net, x: (y := x.new_empty(3, 16, 6, 6), torch.cat([x, x.sin()], 1, out=y), y + 0)[-1],
        "it writes into a tensor that it is given",
    ),
    "a list of chunks": (lambda net, x: torch.cat(x.chunk(2, 1), 1), "the list that it joins is computed at run time"),
}


@pytest.mark.parametrize("name", MISSES)
def test_left_alone(name: str) -> None:
    run, why = MISSES[name]
    segment = passed([dense_buffer], run, **layers())
    assert why in "; ".join(reasons(segment, "dense_buffer"))
    assert calls(segment)["cat"] >= 1


def test_the_longest_of_two_families_wins() -> None:
    """An image lies in one buffer; the other concatenation still joins what lies there with a copy."""

    def run(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y, z = net.conv8(x), net.conv8(x.cos())
        return torch.cat([x, y, z], 1), torch.cat([z, x], 1)

    segment = passed([dense_buffer], run, **layers())
    assert len(done(segment, "dense_buffer")) == 1
    assert calls(segment)["cat"] == 1


def test_any_number_of_samples() -> None:
    """The buffer is as large as the batch, whatever the batch that it was built with."""
    segment = passed([dense_buffer], running, **layers())
    x = torch.randn(7, 8, 9, 4)
    assert torch.allclose(segment(x)[0], segment.plain(x)[0], atol=1e-5)
