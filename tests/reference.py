"""Training in lock step beside a reference: the original module, its frozen units set to eval and detached by hand.

Before every step the reference is given our weights, buffers, optimizer state and random state, so that what is compared
is one step and no error accumulates.
"""

import contextlib
import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from nets import Call, Case
from torch import Tensor, nn
from torch.optim import Optimizer

import fxfreeze
from fxfreeze import FreezableModel, FreezeOut, FreezeScheduler

__all__ = [
    "ADAM",
    "FLOOR",
    "SGD",
    "STEPS",
    "Run",
    "Step",
    "gap",
    "gaps",
    "leaves",
    "lock_step",
    "measure",
    "norm",
    "put_in_eval",
]

STEPS = 12
# A gradient this much smaller than all of them together is judged against them: that of a bias before a batch norm is
# zero but for rounding, and has no relative error.
FLOOR = 1e-3

Optimise = Callable[[list[dict[str, Any]]], Optimizer]
Context = Callable[[], contextlib.AbstractContextManager[Any]]


def SGD(groups: list[dict[str, Any]]) -> Optimizer:  # noqa: N802
    return torch.optim.SGD(groups, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-3)


def ADAM(groups: list[dict[str, Any]]) -> Optimizer:  # noqa: N802
    return torch.optim.Adam(groups, lr=1e-3, weight_decay=1e-3)


def leaves(output: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def measure(output: Any, seed: int) -> Tensor:
    """A loss of everything that the network returns: squared distance from random targets."""
    generator = torch.Generator().manual_seed(seed)
    wide = [t if t.dtype == torch.float64 else t.float() for t in leaves(output)]
    targets = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in wide]
    return torch.stack([(t - target).square().mean() for t, target in zip(wide, targets, strict=True)]).sum()


def norm(tensors: dict[str, Tensor]) -> float:
    """The 2-norm of all tensors together."""
    return math.sqrt(sum(float(torch.linalg.vector_norm(t.double())) ** 2 for t in tensors.values()))


def gap(ours: Tensor, theirs: Tensor, least: float = 0.0) -> float:
    """``|ours - theirs| / max(|theirs|, least)`` by the 2-norm; infinite for another shape, or a NaN."""
    if ours.shape != theirs.shape:
        return math.inf
    distance = float(torch.linalg.vector_norm(ours.double() - theirs.double()))
    if not math.isfinite(distance):
        return math.inf
    return distance / max(float(torch.linalg.vector_norm(theirs.double())), least) if distance else 0.0


def gaps(ours: dict[str, Tensor], theirs: dict[str, Tensor], floor: float = 0.0) -> float:
    """The largest gap among tensors of the same names; one below ``floor`` of all together is judged against that."""
    assert ours.keys() == theirs.keys()
    least = floor and floor * norm(theirs)
    return max((gap(ours[name], theirs[name], least) for name in theirs), default=0.0)


@dataclass
class Step:
    """What one training step did, and left behind. random: the numbers drawn next."""

    output: Any
    loss: Tensor
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    random: Tensor

    @classmethod
    def take(cls, net: nn.Module, optimizer: Optimizer, call: Call, seed: int, context: Context) -> "Step":
        optimizer.zero_grad()  # not at the end: units freeze while their gradients are there
        with context():
            output = net(*call.args, **call.kwargs)
            loss = measure(output, seed)
        loss.backward()
        optimizer.step()
        gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
        state = torch.get_rng_state()
        random = torch.rand(3)
        torch.set_rng_state(state)
        parameters = {name: p.detach() for name, p in net.named_parameters()}
        output = pytree.tree_map_only(Tensor, Tensor.detach, output)
        return cls(output, loss.detach(), gradients, parameters, dict(net.named_buffers()), random)

    def assert_same_form(self, reference: "Step") -> None:
        """Outputs of the same structure and dtypes, gradients of the same parameters, the same random numbers drawn."""
        assert pytree.tree_structure(self.output) == pytree.tree_structure(reference.output)
        assert [t.dtype for t in leaves(self.output)] == [t.dtype for t in leaves(reference.output)]
        assert self.gradients.keys() == reference.gradients.keys()
        assert torch.equal(self.random, reference.random), "random numbers drawn"

    def gaps_from(self, reference: "Step") -> dict[str, float]:
        """By kind, the largest relative difference from the reference."""
        return {
            "output": max(map(gap, leaves(self.output), leaves(reference.output))),
            "loss": gap(self.loss, reference.loss),
            "gradients": gaps(self.gradients, reference.gradients, FLOOR),
            "weights": gaps(self.parameters, reference.parameters),
            "buffers": gaps(self.buffers, reference.buffers),
        }

    def assert_like(self, reference: "Step", tolerance: float) -> None:
        for kind, difference in self.gaps_from(reference).items():
            assert difference <= tolerance, kind


def put_in_eval(net: nn.Module, model: FreezableModel) -> None:
    """Freezing by hand: in another copy of its network, the frozen units of ``model`` in eval and detached."""
    net.train()
    for unit in model.units[: model.depth]:
        for name in unit.modules:
            net.get_submodule(name).training = False
        for name in unit.parameters:
            net.get_parameter(name).requires_grad_(False)


class Run:
    """Our side of a training run in ``dtype``, on a schedule by which unit i of N + 1 freezes at step 3 + 9 i / N."""

    def __init__(self, net: nn.Module, case: Case, optimise: Optimise, dtype: torch.dtype = torch.float64) -> None:
        self.case = case
        self.dtype = dtype
        example = self.call(1)
        self.model = fxfreeze.compile(
            net.to(dtype).train(),
            FreezeOut(STEPS, t0=0.25, how="linear"),
            example_inputs=(example.kwargs or example.args) if case.examples else None,
        )
        self.optimise = optimise
        self.optimizer = optimise(list(self.model.parameters()))
        self.scheduler = FreezeScheduler(self.optimizer, self.model)
        self._frozen: dict[str, Tensor] = {}

    def call(self, step: int) -> Call:
        call = self.case.calls(torch.Generator().manual_seed(1000 + step), step)
        return pytree.tree_map_only(Tensor, lambda t: t.to(self.dtype) if t.is_floating_point() else t, call)

    def step(self, number: int, context: Context = contextlib.nullcontext) -> Step:
        self.model.train()  # as some trainers do at every step
        return Step.take(self.model, self.optimizer, self.call(number), number, context)

    def assert_rewritten(self) -> None:
        """What was compared is the surgery's work, not the original that runs where surgery fails."""
        segments = self.model.prefix.segments
        assert bool(segments) == bool(self.model.depth)
        assert all(segment.rewritten is not None for segment in segments), self.model.prefix

    def assert_frozen(self) -> None:
        """Frozen tensors are bit for bit as at their freeze, without ``requires_grad``, gradient or optimizer state."""
        model, named, state = self.model, dict(self.model.named_parameters()), self.model.state_dict()
        parameters = {name for unit in model.units[: model.depth] for name in unit.parameters}
        for name in parameters:
            assert not named[name].requires_grad, name
            assert named[name].grad is None, name
            assert named[name] not in self.optimizer.state, name
        # the buffers of modules that have a frozen parameter, whatever the units say, and of the units' modules
        modules = {name for unit in model.units[: model.depth] for name in unit.modules}
        modules |= {name.rpartition(".")[0] for name in parameters}
        buffers = {name for name, _ in model.named_buffers() if name.rpartition(".")[0] in modules}
        for name in parameters | (buffers & state.keys()):
            assert torch.equal(self._frozen.setdefault(name, state[name].clone()), state[name]), name


@dataclass
class Reference:
    """A copy of the original that repeats our steps. freeze: how the frozen part is put in eval by hand."""

    run: Run
    context: Context
    freeze: Callable[[nn.Module, FreezableModel], None]
    net: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.net = copy.deepcopy(self.run.model.original)

    def follow(self, number: int) -> None:
        """Take over the weights, buffers, optimizer state and random state that our step starts from."""
        self.net.load_state_dict(self.run.model.state_dict())
        self.net.zero_grad()
        self.freeze(self.net, self.run.model)
        self.optimizer = self.run.optimise(self._groups(number))
        for name, p in self.run.model.named_parameters():
            if p in self.run.optimizer.state:
                self.optimizer.state[self.net.get_parameter(name)] = copy.deepcopy(self.run.optimizer.state[p])
        self.random = torch.get_rng_state()

    def step(self, number: int) -> Step:
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.random)
            return Step.take(self.net, self.optimizer, self.run.call(number), number, self.context)

    def _groups(self, number: int) -> list[dict[str, Any]]:
        """A group for every live unit, at the schedule's rate."""
        model, rate = self.run.model, self.run.optimizer.defaults["lr"]
        factors = model.schedule.factors(number, model.units)
        return [
            {"params": [self.net.get_parameter(name) for name in unit.parameters], "lr": rate * factor}
            for unit, factor in list(zip(model.units, factors, strict=True))[model.depth :]
        ]


def lock_step(
    run: Run,
    contexts: tuple[Context, ...] = (contextlib.nullcontext,),
    freeze: Callable[[nn.Module, FreezableModel], None] = put_in_eval,
) -> Iterator[tuple[Step, ...]]:
    """Each step of ours, under the first context, with the same step of a reference under each context.

    Frozen tensors and the form of what comes out are checked at every step, and at the end that three freezes were crossed.
    """
    references = [Reference(run, context, freeze) for context in contexts]
    depths = set()
    for number in range(STEPS):
        depths.add(run.model.depth)
        for reference in references:
            reference.follow(number)
        ours = run.step(number, contexts[0])
        run.assert_rewritten()
        run.assert_frozen()
        theirs = [reference.step(number) for reference in references]
        ours.assert_same_form(theirs[0])
        yield ours, *theirs
        run.scheduler.step()
        run.assert_frozen()
    assert len(depths) > 3, f"three freezes are to be crossed, and the depths were {sorted(depths)}"
