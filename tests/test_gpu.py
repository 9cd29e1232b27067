"""The same promises on a CUDA device: run by ``pytest -m gpu``."""

import copy

import pytest
import torch
import torch.nn.functional as F

import fxfreeze
from fxfreeze import zoo
from fxfreeze.fidelity import BOUNDS, TF32_BOUND, relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NETWORKS = ("densenet-bc-8-16", "wrn-10-1", "resnet-8")


def _net(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return zoo.load(name, num_classes=10, in_channels=3, image_size=32).cuda()


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_frozen_forward_is_the_originals(name: str, autocast: torch.dtype | None) -> None:
    model = fxfreeze.compile(_net(name), fxfreeze.FreezeOut(100)).eval()
    x = torch.randn(16, 3, 32, 32, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", autocast, enabled=autocast is not None):
        expected = model.original(x)
        for depth in range(1, len(model.units)):
            model.freeze(depth)
            assert relative_error(model(x), expected) <= (TF32_BOUND if autocast is None else BOUNDS[autocast])
            assert model.prefix.segments[0].reason is None


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_of_the_live_part(name: str) -> None:
    net = _net(name).double()
    model = fxfreeze.compile(copy.deepcopy(net), fxfreeze.FreezeOut(100))
    depth = len(model.units) // 2
    model.freeze(depth)
    reference = net.train()
    for unit in model.units[:depth]:
        for module in unit.modules:
            reference.get_submodule(module).training = False
        for parameter in unit.parameters:
            reference.get_parameter(parameter).requires_grad_(False)
    x, y = torch.randn(8, 3, 32, 32, device="cuda").double(), torch.randint(0, 10, (8,), device="cuda")
    for module in (model, reference):
        F.cross_entropy(module(x), y).backward()
    for name_, parameter in model.named_parameters():
        twin = reference.get_parameter(name_)
        assert (parameter.grad is None) == (twin.grad is None)
        if twin.grad is not None:
            assert relative_error(parameter.grad, twin.grad) < 1e-8


def test_moving_to_the_device_rebuilds() -> None:
    model = fxfreeze.compile(_net("resnet-8").cpu(), fxfreeze.FreezeOut(100)).eval()
    model.freeze(2)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        on_cpu = model(x)
        on_cuda = model.to("cuda")(x.cuda())
    assert relative_error(on_cuda.cpu(), on_cpu) <= TF32_BOUND
