"""``profile``: what an iteration of training takes at each depth, part by part, measured on copies."""

import copy
import os
import statistics
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfreeze.counting import forward_costs
from fxfreeze.feed import Feed
from fxfreeze.imports import ChoiceError
from fxfreeze.iterations import Iteration, Parts, midmean, predict
from fxfreeze.machine import chip
from fxfreeze.model import FreezableModel, compile, traces_of
from fxfreeze.profile_checks import (
    check_call,
    check_device,
    check_net,
    check_options,
    check_trace,
    depths_among,
    made_by,
)
from fxfreeze.profiled import Profile
from fxfreeze.randomness import random_state_kept
from fxfreeze.ranges import Named, Watch, stopwatch_for
from fxfreeze.schedule import Milestones
from fxfreeze.watched import ForwardByPart, ForwardByUnit, prefix_name

__all__ = ["MOST_DEPTHS", "ROUNDS", "profile"]

ROUNDS = 20
MOST_DEPTHS = 12  # measured where the caller names none
_WARM_UP = 3  # rounds: the first makes what is frozen, and allocators settle in the next

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def _sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)


def profile(
    net: nn.Module,
    batch: Sequence[Any],
    *,
    loader: Iterable[Any] | None = None,
    loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
    optimizer: MakeOptimizer = _sgd,
    depths: Iterable[int] | None = None,
    rounds: int = ROUNDS,
    trace: str | Path | None = None,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Profile:
    """Measure what an iteration of training ``net`` takes at each depth, and predict it from the FLOPs.

    net: a network, which is frozen as ``compile`` would with nothing said, or a FreezableModel, by whose units, backend and
    precision; batch: (inputs, targets), on the device of ``net``, inputs a tensor, a tuple or a dict of keyword inputs,
    dimension 0 of the first tensor the samples; loader: yields such batches, one fetched an iteration (without one, there
    is no time of fetching); loss: of (outputs, targets), a scalar; optimizer: makes one from a list of parameters; depths:
    numbers of frozen units (None: all, or MOST_DEPTHS evenly spread), 0 always among them; trace: a file that a Chrome
    trace of one iteration at each depth goes to, ranges named by unit; progress: told (iterations done, of how many).
    Without a loader each iteration gets a copy of the batch, so that a forward may write into its inputs.

    Depths take turns in ``rounds`` rounds, after some that are not counted. Iterations run in train mode, under the
    caller's autocast, one after another: what a loader or a GPU could do meanwhile is waited for. Copies are trained, one
    a depth, so ``net`` and torch's random state are left as they were; hooks are copied with it, and run. On CUDA, events
    measure (not tried on a GPU yet). Warns of a loss that is not finite.

    Raises ChoiceError, a ValueError, for arguments that can't be, a batch that ``net`` does not take among them; TypeError
    or TraceRefusal for a ``net`` that ``compile`` refuses.
    """
    check_options(optimizer, progress, depths, rounds)
    check_net(net)
    if trace is not None:
        check_trace(trace)
    with torch.inference_mode(False), torch.enable_grad():
        feed = Feed(batch, loader)
        check_device(feed.device)
        model = net if isinstance(net, FreezableModel) else compile(net, Milestones({}), example_inputs=feed.example)
        chosen = depths_among(depths, len(model.units), MOST_DEPTHS)
        with random_state_kept(model.original.modules()):
            check_call(model.original, feed)
            flops = _flops(model, feed)
            trials = [_Trial(model, depth, feed, loss, optimizer) for depth in chosen]
            for done in _turns(trials, rounds):
                progress(done, len(trials) * (_WARM_UP + rounds))
            if trace is not None:
                _write_trace(trials, trace)
    _warn_of_infinite(trials)
    unfrozen = midmean(trials[0].taken)
    return Profile(
        iterations=tuple(trial.iteration(predict(unfrozen, flops, trial.depth)) for trial in trials),
        units=tuple(unit.name for unit in model.units),
        unit_flops=flops,
        batch=feed.samples,
        fetched=feed.fetches,
        rounds=rounds,
        device=chip(feed.device),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
    )


def _flops(model: FreezableModel, feed: Feed) -> tuple[int, ...]:
    """Of a forward of the batch, by unit."""
    net = copy.deepcopy(model.original)
    flops, _ = forward_costs(net, traces_of(net, feed.example)[0], model._ownership, feed.tensors)
    if not sum(flops):
        raise ChoiceError(
            "torch counts no FLOPs in this network, so there is nothing to predict an iteration's time by"
        )
    return tuple(flops)


def _warn_of_infinite(trials: "Sequence[_Trial]") -> None:
    if depths := [str(trial.depth) for trial in trials if not trial.finite]:
        warnings.warn(
            f"the loss is not finite at depth {', '.join(depths)}: what is measured there may not be what a training takes. "
            f"Try a lower learning rate, and look for such numbers in the batch",
            stacklevel=3,
        )


def _turns(trials: "Sequence[_Trial]", rounds: int) -> Iterator[int]:
    """Each trial's iteration in each round, those of the warm-up forgotten; yields how many there have been."""
    done = 0
    for number in range(_WARM_UP + rounds):
        for trial in trials:
            trial.measure(counted=number >= _WARM_UP)
            done += 1
            yield done


class _Trial:
    """A copy of the model frozen to one depth, and what its iterations took."""

    def __init__(
        self,
        model: FreezableModel,
        depth: int,
        feed: Feed,
        loss: Callable[[Any, Any], Tensor],
        optimizer: MakeOptimizer,
    ) -> None:
        self.depth, self.feed, self.loss = depth, feed, loss
        net = copy.deepcopy(model.original)
        # What the model itself has frozen trains here until ``depth``.
        for name, required in model._required_grad.items():
            net.get_parameter(name).requires_grad_(required)
        self.model = FreezableModel(net, Milestones({}), model._ownership, model.backend, model.precision).train()
        self.model.freeze(depth)
        self.model.zero_grad()
        self.stopwatch = stopwatch_for(feed.device)
        self.model._forward = ForwardByPart(net, self.stopwatch)
        live = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not live:
            raise ChoiceError(
                f"at depth {depth} no parameter requires grad, so there is nothing to train: name other depths"
            )
        self.optimizer = made_by(optimizer, live)
        self.taken: list[Parts] = []
        self.finite = True

    def step(self, watch: Watch) -> Tensor:
        """One iteration; its loss."""
        with watch.range("data"):
            args, kwargs, targets = self.feed.next()
        with watch.range("forward"):
            outputs = self.model(*args, **kwargs)
            with watch.range("loss"):
                loss = self.loss(outputs, targets)
        with watch.range("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        with watch.range("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()

    def measure(self, *, counted: bool) -> None:
        """One iteration, timed."""
        loss = self.step(self.stopwatch)
        seconds = self.stopwatch.seconds()
        self.finite = self.finite and bool(loss.isfinite().all())
        prefix = seconds.get(prefix_name(self.depth), 0.0)
        if counted:
            self.taken.append(
                Parts(
                    data=seconds["data"] if self.feed.fetches else 0.0,
                    prefix=prefix,
                    suffix=seconds["forward"] - prefix,
                    backward=seconds["backward"],
                    optimizer=seconds["optimizer"],
                )
            )

    def iteration(self, predicted: Parts) -> Iteration:
        totals = [parts.total for parts in self.taken]
        low, _, high = statistics.quantiles(totals, n=4, method="inclusive") if len(totals) > 1 else totals * 3
        segments = self.model.prefix.segments
        backend = segments[0].runs_by if segments else None
        return Iteration(self.depth, backend, midmean(self.taken), (low, high), predicted)


def _write_trace(trials: Sequence[_Trial], path: str | Path) -> None:
    """A Chrome trace of an iteration of each; what is run for the first time runs before it."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler tells of each start and stop on stderr
    device = trials[0].feed.device
    named = Named(device)
    cuda = [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    for trial in trials:
        trial.model._forward = ForwardByUnit(trial.model.original, named, trial.model._ownership)
        trial.step(named)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU, *cuda]) as profiler:
        for trial in trials:
            with named.range(f"iteration at depth {trial.depth}"):
                trial.step(named)
    profiler.export_chrome_trace(str(path))
