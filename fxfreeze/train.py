"""One training run: a network under a recipe, its optimizer and schedules, the order of its data, and its whole state.

A run trains in blocks, so that several runs can take turns. Each run has its own random state, so taking turns changes
nothing, and every run with the same seed sees the same batches in the same order.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fxfreeze.batches import Batches, Split
from fxfreeze.cached import CachedBatches, CacheRecord
from fxfreeze.imports import ChoiceError
from fxfreeze.model import FreezableModel, compile
from fxfreeze.optim import FreezeScheduler, scaler_step
from fxfreeze.recipes import Recipe, Settings
from fxfreeze.stored import Boundary

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
EVALUATION_BATCH = 250


class Score(NamedTuple):
    """loss: mean cross-entropy; accuracy: a fraction; correct: [N] bool, by sample."""

    loss: float
    accuracy: float
    correct: Tensor


@dataclass
class Evaluation:
    """The validation split after `step` steps and `seconds` of training."""

    step: int
    seconds: float
    loss: float
    accuracy: float


@dataclass
class Record:
    """What a run did, step by step. Seconds are those of training, freeze events included.

    depths: units frozen; served: of how many of them the cache gave the activations of the whole batch.
    """

    seconds: float = 0.0
    evaluation_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    served: list[int] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)

    @property
    def diverged(self) -> int | None:
        """The number, from 1, of the first loss of all those at the end that are not finite; None if the last one is."""
        finite = max((number for number, loss in enumerate(self.losses, 1) if math.isfinite(loss)), default=0)
        return finite + 1 if finite < len(self.losses) else None


class Run:
    """Trains `net` in place by `recipe` on `batches`."""

    def __init__(self, net: nn.Module, recipe: Recipe, settings: Settings, batches: Batches) -> None:
        self.recipe, self.settings, self.batches = recipe, settings, batches
        self.device = batches.split.images.device
        self.net = net.to(self.device)
        self.step = 0
        self.record = Record()
        self._compile_seconds = 0.0
        self.model: FreezableModel | None = None
        self.scheduler: FreezeScheduler | None = None
        stand_in: nn.Module = net
        if recipe.schedule is not None:
            example = batches.split.images[:2]
            start = time.perf_counter()
            precision = "int8" if recipe.int8 else None
            stand_in = self.model = compile(
                net, copy.deepcopy(recipe.schedule), example_inputs=(example,), precision=precision
            )
            if self._operated:  # the others want only to know the units
                self._compile_seconds = self.record.seconds = time.perf_counter() - start
        self.stand_in = stand_in.train()
        self.forward: Callable[[Tensor], Any] = stand_in if self._operated else net
        if recipe.form == "by hand":
            assert self.model is not None, "what is frozen by hand is what the schedule marks"
            self.forward = _without_tape_before_head(self.model)
        self.optimizer = torch.optim.SGD(
            stand_in.parameters(),
            lr=settings.lr,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
            weight_decay=settings.weight_decay,
        )
        if self.model is not None:
            self.scheduler = FreezeScheduler(self.optimizer, self.model)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=settings.precision == "fp16")
        self._random = _seeded_random(settings.seed, self.device)
        self._cached: CachedBatches | None = None
        if recipe.form == "cached":
            assert self.model is not None, "what is stored is what the schedule freezes"
            start = time.perf_counter()
            self._cached = CachedBatches(batches, self.model)
            self.record.seconds += time.perf_counter() - start

    @property
    def depth(self) -> int:
        """Units frozen now."""
        return 0 if self.model is None else self.model.depth

    @property
    def cache(self) -> CacheRecord | None:
        """What the cache did so far; None without one."""
        return None if self._cached is None else self._cached.record()

    @property
    def _operated(self) -> bool:
        return self.recipe.form in ("surgery", "cached")

    @property
    def build_seconds(self) -> float:
        """Seconds spent on surgery so far: `compile`, and each freeze's traces, splits, passes and self-checks."""
        if self.model is None or not self._operated:
            return 0.0
        return self._compile_seconds + self.model.prefix.build_seconds

    @property
    def done(self) -> bool:
        return self.step >= self.recipe.steps

    def train(self, steps: int, stop: Callable[[], bool] = lambda: False) -> None:
        """Trains up to `steps` steps more, fewer at the recipe's end or as soon as `stop()`; evaluates nothing."""
        losses: list[Tensor] = []
        ticks = [self._now()]
        with self._own_random():
            for _ in range(min(steps, self.recipe.steps - self.step)):
                if stop():
                    break
                self.record.depths.append(self.depth)
                losses.append(self._step())
                ticks.append(time.perf_counter())
            ticks[-1] = self._now()
        seconds = [later - earlier for earlier, later in pairwise(ticks)]
        if self.device.type != "cpu":  # kernels run on after their launch: only the whole block was timed
            seconds = [(ticks[-1] - ticks[0]) / len(seconds)] * len(seconds) if seconds else []
        self.record.seconds += sum(seconds)
        self.record.step_seconds += seconds
        self.record.losses += torch.stack(losses).tolist() if losses else []

    def evaluate(self, split: Split) -> Score:
        """Scores the network as the user gets it back: the original in eval mode.

        The stand-in computes the same, but would build its prefix for eval mode too, at no row's charge.
        """
        self.net.eval()
        with torch.no_grad(), self._autocast():
            batches = torch.split(split.images, EVALUATION_BATCH)
            logits = torch.cat([logits_of(self.net(images)).float() for images in batches])
        self.stand_in.train()  # frozen modules stay in eval
        correct = (logits.argmax(1) == split.labels).cpu()
        return Score(F.cross_entropy(logits, split.labels).item(), correct.float().mean().item(), correct)

    def validate(self, split: Split) -> Evaluation:
        """Scores `split` and records it; its time is kept apart from training's."""
        start = self._now()
        score = self.evaluate(split)
        self.record.evaluation_seconds += self._now() - start
        evaluation = Evaluation(self.step, self.record.seconds, score.loss, score.accuracy)
        self.record.evaluations.append(evaluation)
        return evaluation

    def lr(self, step: int) -> float:
        """The rate that the optimizer's groups hold at `step`; a schedule's factors come on top."""
        if not self.recipe.cosine:
            return self.settings.lr
        return self.settings.lr * (1 + math.cos(math.pi * step / self.recipe.steps)) / 2

    def rates(self, step: int) -> list[float]:
        """Each unit's learning rate at `step`, 0 once frozen; of a bare network, the one rate."""
        if self.model is None:
            return [self.lr(step)]
        return [self.lr(step) * factor for factor in self.model.schedule.factors(step, self.model.units)]

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on; the order of the data follows from the step and the seed."""
        return {
            "step": self.step,
            "model": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": self._random,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state` was taken, from a run of the same recipe, settings and data."""
        self.net.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        self.scaler.load_state_dict(state["scaler"])
        self._random = {device: random.cpu() for device, random in state["random"].items()}
        self.step = state["step"]

    def _step(self) -> Tensor:
        images, labels = self.batches[self.step] if self._cached is None else next(self._cached)
        self.record.served.append(images.batch.least if isinstance(images, Boundary) else 0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.step)
        with self._autocast():
            loss = F.cross_entropy(
                logits_of(self.forward(images)), labels.to(self.device)
            )  # stored ones are read to RAM
        if self.scaler.is_enabled():
            self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler_step(self.scaler, self.optimizer)
            self.scaler.update()
        else:
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad()
        self.step += 1
        return loss.detach()

    def _autocast(self) -> torch.autocast:
        dtype = PRECISIONS.get(self.settings.precision)  # int8 is the frozen part's alone
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def _own_random(self) -> Iterator[None]:
        outer = _get_random(self.device)
        _set_random(self._random, self.device)
        try:
            yield
        finally:
            self._random = _get_random(self.device)
            _set_random(outer, self.device)


def logits_of(output: Any) -> Tensor:
    """The main output of networks that return auxiliary ones beside it."""
    logits = output if isinstance(output, Tensor) else output[0]
    assert isinstance(logits, Tensor)
    return logits


def _without_tape_before_head(model: FreezableModel) -> Callable[[Tensor], Any]:
    """The original under `no_grad` until its head runs: what a user writes by hand for a backbone."""
    head = model.units[-1]
    owners = {name.rpartition(".")[0] for name in head.parameters}
    if not owners <= set(head.modules):
        raise ChoiceError(
            f"the head {head.name!r} owns parameters outside its modules: {sorted(owners - set(head.modules))}"
        )

    def tape(*_: Any) -> None:
        torch.set_grad_enabled(True)

    for name in owners:
        model.original.get_submodule(name).register_forward_pre_hook(tape)

    def forward(images: Tensor) -> Any:
        with torch.no_grad():  # on leaving, the caller's mode is back, whatever the hooks set
            return model.original(images)

    return forward


def _seeded_random(seed: int, device: torch.device) -> dict[str, Tensor]:
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        return _get_random(device)


def _get_random(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _set_random(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
