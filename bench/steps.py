"""One training iteration in many ways, all on the same network, batch and optimizer.

The frozen part is the first ``depth`` units. What each way is compared with, in float64: "plain" ones with the network in
train mode, the others with frozen units in eval.
"""

import contextlib
import copy
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxfreeze
from bench.clock import Contender, rotated
from bench.compiling import compiled, quiet
from bench.roofline import Work, flops_of, training
from bench.scale import DEVICE

FOREVER = 10**9  # steps ahead: what is built pays
DTYPE = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32  # under autocast

Forward = Callable[[Any], Tensor]


def _computing() -> torch.autocast:
    return torch.autocast(DEVICE.type, DTYPE, enabled=DTYPE is not torch.float32)


class Step:
    """Forward, backward and an SGD step with momentum when it is called.

    forward: images to logits; live: the parameters that are trained; x: images, or what is stored of them; read: all
    that an iteration must read; idle: parameters that the optimizer holds at a rate of zero.
    """

    def __init__(
        self,
        forward: Forward,
        live: Iterable[nn.Parameter],
        x: Any,
        y: Tensor,
        *,
        read: Iterable[Tensor] = (),
        idle: Iterable[nn.Parameter] = (),
    ) -> None:
        self._forward, self._x, self._y = forward, x, y
        self.live, self._read = list(live), [*read, y]
        groups = [{"params": self.live}, {"params": list(idle), "lr": 0.0}]
        self._optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=1e-3, momentum=0.9)

    def __call__(self) -> None:
        self._run(self._x)

    def _run(self, x: Any) -> None:
        F.cross_entropy(self.logits(x), self._y).backward()
        self._optimizer.step()
        self._optimizer.zero_grad()

    def logits(self, x: Any = None) -> Tensor:
        with _computing():
            return self._forward(self._x if x is None else x)

    def contender(self) -> Contender:
        return rotated(self._run, [self._x]) if isinstance(self._x, Tensor) else self

    def work(self) -> Work:
        """Of one iteration; of a way whose own operators the counter does not know, ask one that computes the same."""
        return training(self._read, self.live, flops_of(self))

    def compiled(self) -> "Step":
        """The same under torch.compile, forward and backward built now; the weights stay."""
        self._forward = compiled(self._forward)
        with quiet():
            F.cross_entropy(self.logits(), self._y).backward()
        self._optimizer.zero_grad()
        return self


def parameters(module: nn.Module, *, live: bool = True) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad is live]


def plain(net: nn.Module, x: Tensor, y: Tensor) -> Step:
    net = copy.deepcopy(net).train()
    return Step(net, net.parameters(), x, y, read=[x, *net.parameters()])


def only_requires_grad(net: nn.Module, depth: int, x: Tensor, y: Tensor) -> Step:
    """Frozen by requires_grad alone: the frozen part stays in train mode, and its statistics move."""
    net = copy.deepcopy(net).train()
    for name in (name for unit in units_of(net)[:depth] for name in unit.parameters):
        net.get_parameter(name).requires_grad_(False)
    return Step(net, parameters(net), x, y, read=[x, *net.parameters()])


def marked(net: nn.Module, depth: int, x: Tensor, y: Tensor) -> Step:
    """The published FreezeOut: frozen units in eval and without gradients, no surgery."""
    model = frozen(net, depth, "plain")
    return Step(model.original, parameters(model), x, y, read=[x, *net.parameters()])


def at_rate_zero(net: nn.Module, depth: int, x: Tensor, y: Tensor) -> Step:
    """Frozen units in eval, at a learning rate of zero: their gradients are computed all the same."""
    model = frozen(net, depth, "plain")
    live, idle = parameters(model), parameters(model, live=False)
    for parameter in idle:
        parameter.requires_grad_(True)
    return Step(model.original, live, x, y, read=[x, *net.parameters()], idle=idle)


def surgery(net: nn.Module, depth: int, x: Tensor, y: Tensor, backend: str) -> Step:
    """The frozen part cut out, rewritten and run by ``backend``."""
    model = frozen(net, depth, backend)
    return Step(model, parameters(model), x, y, read=[x, *net.parameters()])


def cached(net: nn.Module, depth: int, x: Tensor, y: Tensor) -> Step:
    """The frozen part's outputs stored, and their rows in memory; reading them from a disk is bench_cached_epoch's."""
    model = frozen(net, depth, "plain")
    boundary = Stored(model, x, y)
    return Step(lambda _: model(boundary.x), parameters(model), boundary, y, read=parameters(model))


class Stored:
    """A batch as CachedLoader gives it out once its samples are stored."""

    def __init__(self, model: fxfreeze.FreezableModel, x: Tensor, y: Tensor) -> None:
        folder = tempfile.mkdtemp(prefix="fxfreeze-bench-")
        self.close = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        data = DataLoader(TensorDataset(x.cpu(), y.cpu()), batch_size=len(x))
        loader = fxfreeze.CachedLoader(data, model, folder, when="always", placement="ram")
        loader.tell = lambda text: None
        with _computing():
            for images, _ in loader:
                model(images.to(x.device))  # with gradients, as a training step: this stores them
        self.x = next(iter(loader))[0].to(x.device)
        if not isinstance(self.x, fxfreeze.Boundary):
            raise RuntimeError(f"nothing was stored: {'; '.join(loader.notes)}")


def frozen(net: nn.Module, depth: int, backend: str) -> fxfreeze.FreezableModel:
    model = fxfreeze.compile(copy.deepcopy(net), fxfreeze.FreezeOut(FOREVER), backend=backend).train()
    model.freeze(depth)
    model.step = 0
    return model


def units_of(net: nn.Module) -> tuple[Any, ...]:
    return fxfreeze.compile(copy.deepcopy(net), fxfreeze.FreezeOut(1)).units


@contextlib.contextmanager
def _exact(x: Tensor):
    """Autocast off, and the images in float64."""
    with torch.no_grad(), torch.autocast(DEVICE.type, enabled=False):
        yield x.double()


def exact_plain(net: nn.Module, x: Tensor) -> Tensor:
    """Logits of the network in train mode, in float64."""
    with _exact(x) as images:
        return copy.deepcopy(net).double().train()(images)


def exact_frozen(net: nn.Module, depth: int, x: Tensor) -> Tensor:
    """Logits with the first ``depth`` units in eval, in float64."""
    with _exact(x) as images:
        return frozen(copy.deepcopy(net).double(), depth, "plain").original(images)
