"""Whole networks on the kernels: frozen prefixes equal eval mode, nothing is left that a kernel should have taken, and
training follows the original with its frozen part set to eval by hand."""

import copy

import pytest
import torch
import torch.nn.functional as F
from frozen import dispatched, settle
from reference import put_in_eval
from small_networks import CLASSES, NETWORKS
from torch import Tensor

import fxfreeze
from fxfreeze import FreezableModel, FreezeScheduler, Milestones
from fxfreeze.fidelity import BOUNDS, relative_error

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


# What a kernel takes, in the names of ATen's operators.
TAKEN = {
    "cat",
    "convolution",
    "native_batch_norm",
    "cudnn_batch_norm",
    "relu",
    "relu_",
    "hardtanh",
    "hardtanh_",
    "addcmul",
}


def images(device: torch.device, count: int = 5) -> Tensor:
    return torch.randn(count, 3, 8, 8, device=device)


def frozen(name: str, device: torch.device) -> FreezableModel:
    net = settle(NETWORKS[name]()).to(device)
    return fxfreeze.compile(net, fxfreeze.FreezeOut(100), backend="triton").eval()


@pytest.mark.parametrize("name", NETWORKS)
def test_prefixes_equal_eval_mode(name: str, device: torch.device) -> None:
    """At four depths, and with nothing beside kernels but what joins them."""
    model, x = frozen(name, device), images(device)
    with torch.no_grad():
        expected = model.original(x)
        most = len(model.units) - 1
        for depth in sorted({1, most // 3, 2 * most // 3, most}):
            model.freeze(depth)
            assert relative_error(model(x), expected) <= BOUNDS[torch.float32]
            (segment,) = model.prefix.segments
            assert (segment.backend, segment.reason) == ("triton", None)
            counts = dispatched(lambda: segment(x))  # noqa: B023 - called at once
            assert not {op: counts[op] for op in TAKEN if counts[op]}
            assert counts["conv1x1"] + counts["conv3x3"] + counts["depthwise"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["densenet-bc", "mobilenet"])
def test_low_precision(name: str, dtype: torch.dtype, device: torch.device) -> None:
    model, x = frozen(name, device), images(device)
    model.freeze(len(model.units) - 1)
    with torch.no_grad():
        expected = model.original(x)
        with torch.autocast(device.type, dtype):
            output = model(x)
    assert model.prefix.segments[0].backend == "triton"
    assert relative_error(output.float(), expected) <= BOUNDS[dtype]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_few_steps_of_training(name: str, device: torch.device) -> None:
    net = settle(NETWORKS[name]()).to(device)
    theirs = copy.deepcopy(net).train()
    names = [unit.name for unit in fxfreeze.compile(net, fxfreeze.FreezeOut(100)).units]
    third = max(len(names) // 3, 1)
    model = fxfreeze.compile(net, Milestones({names[third - 1]: 1, names[2 * third - 1]: 3}), backend="triton").train()
    ours_sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    theirs_sgd = torch.optim.SGD(theirs.parameters(), lr=0.02, momentum=0.9)
    scheduler = FreezeScheduler(ours_sgd, model)
    for _ in range(5):
        x, y = images(device, 6), torch.randint(0, CLASSES, (6,), device=device)
        put_in_eval(theirs, model)
        losses = []
        for network, optimizer in ((model, ours_sgd), (theirs, theirs_sgd)):
            optimizer.zero_grad()
            loss = F.cross_entropy(network(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        scheduler.step()
        assert relative_error(losses[0], losses[1]) <= BOUNDS[torch.float32]
    assert model.depth == 2 * third
    assert all(segment.backend == "triton" and segment.reason is None for segment in model.prefix.segments)
