"""Training in lock step beside a reference: the original module, its frozen units set to eval and detached by hand.

Before every step the reference is given our weights, buffers, optimizer state and random state, so that what is compared
is one step and no error accumulates.
"""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from nets import Call
from torch import Generator, Tensor, nn
from torch.optim import Optimizer

import fxfreeze
from fxfreeze import FreezableModel, FreezeOut

__all__ = ["ADAM", "SGD", "STEPS", "Frozen", "Step", "drive", "gap", "gaps", "lock_step", "measure"]

STEPS = 12
# A tensor this much smaller than all of them together is judged against them: the gradient of a bias before a batch norm
# is zero but for rounding, and has no relative error.
FLOOR = 1e-3

Optimise = Callable[[list[dict[str, Any]]], Optimizer]
Calls = Callable[[Generator, int], Call]


def SGD(groups: Any) -> Optimizer:  # noqa: N802
    return torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3)


def ADAM(groups: Any) -> Optimizer:  # noqa: N802
    return torch.optim.Adam(groups, lr=1e-3, weight_decay=1e-3)


def schedule() -> FreezeOut:
    """Unit i of N + 1 freezes at step 3 + 9 i / N."""
    return FreezeOut(STEPS, t0=0.25, how="linear")


def example_inputs(call: Call) -> Any:
    return call.kwargs or call.args


def cast(call: Call, dtype: torch.dtype) -> Call:
    """Floating-point arguments in ``dtype``."""
    return pytree.tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, call)


def leaves(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def measure(output: Any, seed: int) -> Tensor:
    """A loss of everything that the network returns: squared distance from random targets."""
    generator = torch.Generator().manual_seed(seed)
    wide = [t if t.dtype == torch.float64 else t.float() for t in leaves(output)]
    return sum(
        (torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) - t).square().mean() for t in wide
    )  # type: ignore[return-value]


def gap(ours: Tensor, theirs: Tensor, least: float = 0.0) -> float:
    """``|ours - theirs| / max(|theirs|, least)`` by the 2-norm; infinite for another shape or dtype, or a NaN."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype or not bool(ours.isfinite().all()):
        return float("inf")
    distance = float(torch.linalg.vector_norm(ours.double() - theirs.double()))
    return distance / max(float(torch.linalg.vector_norm(theirs.double())), least) if distance else 0.0


def gaps(ours: dict[str, Tensor], theirs: dict[str, Tensor], floor: float = FLOOR) -> float:
    """The largest gap among tensors of the same names; below ``floor`` of all together counts as ``floor``."""
    assert ours.keys() == theirs.keys()
    whole = sum(float(t.double().square().sum()) for t in theirs.values()) ** 0.5
    return max((gap(ours[name], theirs[name], floor * whole) for name in theirs), default=0.0)


@dataclass
class Step:
    """What one training step did. random: the numbers drawn next."""

    output: Any
    loss: Tensor
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    random: Tensor

    def assert_like(self, reference: "Step", tolerance: float, exact: float) -> None:
        """Loss and gradients within ``tolerance`` of the reference, weights and buffers within ``exact``."""
        assert pytree.tree_structure(self.output) == pytree.tree_structure(reference.output)
        assert gap(self.loss, reference.loss) <= tolerance, "loss"
        for ours, theirs in zip(leaves(self.output), leaves(reference.output), strict=True):
            assert gap(ours, theirs) <= tolerance, "output"
        assert gaps(self.gradients, reference.gradients) <= tolerance, "gradients"
        assert gaps(self.parameters, reference.parameters, floor=0.0) <= exact, "weights"
        assert gaps(self.buffers, reference.buffers, floor=0.0) <= exact, "buffers"
        assert torch.equal(self.random, reference.random), "random numbers drawn"


def take_step(net: nn.Module, optimizer: Optimizer, call: Call, seed: int, context: Any) -> Step:
    """One training step of ``net``; gradients are dropped at its end."""
    with context():
        output = net(*call.args, **call.kwargs)
        loss = measure(output, seed)
    loss.backward()  # type: ignore[no-untyped-call]
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    optimizer.step()
    optimizer.zero_grad()
    state = torch.get_rng_state()
    random = torch.rand(3)
    torch.set_rng_state(state)
    parameters = {name: p.detach().clone() for name, p in net.named_parameters()}
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    output = pytree.tree_map_only(Tensor, Tensor.detach, output)
    return Step(output, loss.detach(), gradients, parameters, buffers, random)


def put_in_eval(net: nn.Module, model: FreezableModel) -> None:
    """What freezing by hand is: the frozen units of ``model`` in eval and detached, in another copy of its network."""
    net.train()
    for unit in model.units[: model.depth]:
        for name in unit.modules:
            net.get_submodule(name).training = False
        for name in unit.parameters:
            net.get_parameter(name).requires_grad_(False)


class Reference:
    """A copy of the original that takes the same steps. freeze: how the frozen part is put in eval by hand."""

    def __init__(self, model: FreezableModel, optimise: Optimise, freeze: Callable[..., None] = put_in_eval) -> None:
        self.model = model
        self.net = copy.deepcopy(model.original)
        self.optimise = optimise
        self.freeze = freeze

    def step(self, before: "Snapshot", call: Call, number: int, context: Any) -> Step:
        self.net.load_state_dict(before.weights)
        self.freeze(self.net, self.model)
        optimizer = self.optimise(self._groups(number))
        for name, state in before.optimizer.items():
            optimizer.state[self.net.get_parameter(name)] = copy.deepcopy(state)
        torch.set_rng_state(before.random)
        return take_step(self.net, optimizer, call, number, context)

    def _groups(self, number: int) -> list[dict[str, Any]]:
        """A group for every live unit, at the schedule's rate."""
        factors = self.model.schedule.factors(number, self.model.units)
        rate = self.optimise([{"params": [nn.Parameter(torch.zeros(1))]}]).defaults["lr"]
        return [
            {"params": [self.net.get_parameter(name) for name in unit.parameters], "lr": rate * factor}
            for unit, factor in list(zip(self.model.units, factors, strict=True))[self.model.depth :]
        ]


@dataclass
class Snapshot:
    """Copies of everything that a step starts from."""

    weights: dict[str, Tensor]
    optimizer: dict[str, dict[str, Any]]
    random: Tensor

    @classmethod
    def of(cls, model: FreezableModel, optimizer: Optimizer) -> "Snapshot":
        states = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
        weights = {name: t.clone() for name, t in model.state_dict().items()}
        return cls(weights, copy.deepcopy(states), torch.get_rng_state())


@dataclass
class Frozen:
    """The tensors of frozen units as they were when they froze."""

    model: FreezableModel
    optimizer: Optimizer
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def assert_still(self) -> None:
        """Bit for bit as at the freeze, without ``requires_grad``, gradient or optimizer state; newly frozen: noted."""
        named = dict(self.model.named_parameters())
        for name in self._parameters():
            p = named[name]
            assert not p.requires_grad, name
            assert p.grad is None, name
            assert p not in self.optimizer.state, name
        now = {name: self.model.state_dict()[name] for name in [*self._parameters(), *self._buffers()]}
        for name, tensor in self.tensors.items():
            assert torch.equal(tensor, now[name]), name
        self.tensors |= {name: t.clone() for name, t in now.items() if name not in self.tensors}

    def _parameters(self) -> list[str]:
        return [name for unit in self.model.units[: self.model.depth] for name in unit.parameters]

    def _buffers(self) -> Iterator[str]:
        """Those of modules with a frozen parameter, whatever the units say, and of the units' modules."""
        modules = {name for unit in self.model.units[: self.model.depth] for name in unit.modules}
        modules |= {name.rpartition(".")[0] for name in self._parameters()}
        for name, _ in self.model.named_buffers():
            if name.rpartition(".")[0] in modules and name in self.model.state_dict():
                yield name


def drive(
    net: nn.Module, calls: Calls, optimise: Optimise, examples: bool = False, dtype: torch.dtype = torch.float64
) -> tuple[FreezableModel, Optimizer, fxfreeze.FreezeScheduler, Callable[[int], Call]]:
    """Our side of a training run: model, optimizer, scheduler, and the call of each step."""

    def call(step: int) -> Call:
        return cast(calls(torch.Generator().manual_seed(1000 + step), step), dtype)

    model = fxfreeze.compile(net, schedule(), example_inputs=example_inputs(call(1)) if examples else None)
    optimizer = optimise(list(model.parameters()))  # type: ignore[arg-type]
    return model, optimizer, fxfreeze.FreezeScheduler(optimizer, model), call


def lock_step(
    net: nn.Module,
    calls: Calls,
    optimise: Optimise,
    tolerance: float,
    *,
    exact: float | None = None,
    examples: bool = False,
    freeze: Callable[..., None] = put_in_eval,
    dtype: torch.dtype = torch.float64,
    context: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
) -> FreezableModel:
    """Train ``net`` for STEPS steps in ``dtype`` and compare each with the reference.

    tolerance: relative, for outputs, loss and gradients; exact: for weights and buffers, if another.
    """
    model, optimizer, scheduler, call = drive(net.to(dtype).train(), calls, optimise, examples, dtype)
    reference = Reference(model, optimise, freeze)
    frozen = Frozen(model, optimizer)
    depths = [model.depth]
    for number in range(STEPS):
        model.train()  # as some trainers do at every step
        before = Snapshot.of(model, optimizer)
        ours = take_step(model, optimizer, call(number), number, context)
        after = torch.get_rng_state()
        frozen.assert_still()
        theirs = reference.step(before, call(number), number, context)
        ours.assert_like(theirs, tolerance, tolerance if exact is None else exact)
        torch.set_rng_state(after)
        scheduler.step()
        frozen.assert_still()
        depths.append(model.depth)
    assert len(set(depths[:-1])) > 3, f"three freezes are to be crossed, and the depths were {depths}"
    return model
