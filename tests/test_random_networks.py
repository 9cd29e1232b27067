"""Random networks, at every depth and in both modes, beside the original with its frozen units in eval.

Deeper boundaries are made from shallower ones too.

Blocks, branches, concatenations, strides, groups, shared modules, views, in-place operators with used and unused
results, writes through items, slices, views and `out=`, dropout of all kinds, training branches, regions without
gradients, buffers that are read and updated, sizes, and dead code.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.utils._pytree as pytree
from hypothesis import HealthCheck, Phase, given, note, settings
from parity import assert_segments_chain, compare, freezable, freeze_by_hand, loss, settle
from random_nets import networks
from torch import Tensor, nn

from fxfreeze.fidelity import BOUNDS, relative_error
from fxfreeze.nans import swallowed_nan

Check = Callable[[nn.Module, Counter[str]], None]

# What PyTorch says of networks that write into what their own backward needs: the original can't train these.
_OWN_FAULTS = (
    "modified by an inplace operation",
    "has been modified inplace",
    "is being modified inplace",
    "single memory location",
    "unsupported operation",
)


def inputs() -> list[Tensor]:
    """Two batches of different sizes."""
    return [torch.randn(n, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (3, 2)]


def runs(net: nn.Module, x: Tensor, backward: bool) -> bool:
    """Whether the original itself can do this."""
    try:
        outputs = copy.deepcopy(net)(x.clone())
        if not all(bool(t.isfinite().all()) for t in pytree.tree_leaves(outputs)):
            return False
        if backward and (value := loss(outputs)) is not None:
            value.backward()
    except RuntimeError as error:
        if any(fault in str(error) for fault in _OWN_FAULTS):
            return False
        raise
    return True


def check(net: nn.Module, seen: Counter[str]) -> None:
    """Every depth, both modes, two batches; `seen` counts what was compared."""
    settle(net)
    if not all(runs(net.train(mode), inputs()[0], backward=False) for mode in (True, False)):
        seen["could not run"] += 1
        return
    unfrozen = freezable(copy.deepcopy(net.train()))
    for training in (True, False):
        seen["segments"] += assert_segments_chain(copy.deepcopy(unfrozen), (inputs()[0],), training)
    for depth in range(1, len(unfrozen.units)):
        for training in (True, False):
            model, reference = copy.deepcopy(unfrozen), copy.deepcopy(net)
            model.freeze(depth)
            for number, x in enumerate(inputs()):
                model.train(training)
                reference.train(training)
                freeze_by_hand(reference, model.units[:depth])
                if not runs(reference, x, backward=True):
                    seen["could not train"] += 1
                    break
                where = f"depth {depth} of {len(model.units)}, {'train' if training else 'eval'}, call {number}"
                compare(model, reference, (x,), number, where)
                seen["compared"] += 1


def run(examples: int, check: Check = check, dtype: torch.dtype = torch.float64) -> Counter[str]:
    """``check`` on so many networks; what it counted."""
    seen: Counter[str] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],  # to shrink a failing network takes longer than all others together
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(networks(dtype))
    def every_network(drawn: tuple[str, nn.Module]) -> None:
        source, net = drawn
        note(source)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "unit .* holds|the network is a single unit")
            warnings.filterwarnings("ignore", "frozen module .* runs as it is|backend 'triton' has no kernels")
            check(net, seen)
        seen["networks"] += 1

    every_network()
    return seen


def test_some_random_networks() -> None:
    seen = run(40)
    assert seen["compared"] > 5 * seen["networks"]
    assert seen["segments"] > 2 * seen["networks"]
    assert seen["could not run"] + seen["could not train"] < seen["networks"] / 4


@pytest.mark.slow
def test_many_random_networks() -> None:
    seen = run(300)
    assert seen["networks"] >= 300
    assert seen["compared"] > 8 * seen["networks"]


def check_rewritten(backend: str, net: nn.Module, seen: Counter[str]) -> None:
    """In float32, where layouts change and kernels lower: every depth computes the original's, with nothing rejected."""
    net = settle(net, dtype=torch.float32).eval()
    x = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    if not runs(net, x, backward=False):
        seen["could not run"] += 1
        return
    model = freezable(copy.deepcopy(net), backend=backend).eval()
    for depth in range(1, len(model.units)):
        model.freeze(depth)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".* might make a number of a NaN, which ")
            ours, theirs = (pytree.tree_leaves(run(x.clone())) for run in (model, copy.deepcopy(net)))
        assert all(relative_error(a, b) <= BOUNDS[torch.float32] for a, b in zip(ours, theirs, strict=True))
        (segment,) = model.prefix.segments
        unfused = backend == "library" and segment.backend == "plain" and swallowed_nan(segment.plain) is not None
        assert unfused or segment.backend == backend
        assert segment.reason is None
        seen["unfused"] += unfused
        seen["compared"] += 1


@pytest.mark.parametrize("backend", ["plain", "library", "triton"])
def test_some_rewritten_networks(backend: str) -> None:
    seen = run(60, partial(check_rewritten, backend), torch.float32)
    assert seen["compared"] > seen["networks"]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["plain", "library", "triton"])
def test_many_rewritten_networks(backend: str) -> None:
    seen = run(400, partial(check_rewritten, backend), torch.float32)
    assert seen["networks"] >= 400
    assert seen["unfused"] < seen["compared"] / 4
    assert seen["compared"] > seen["networks"]
