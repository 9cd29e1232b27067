"""What each unit costs, when it freezes, and what that is predicted to save."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxfreeze.counting import count, forward_costs
from fxfreeze.model import FreezableModel, traces_of
from fxfreeze.randomness import random_state_kept
from fxfreeze.schedule import Schedule
from fxfreeze.split import split
from fxfreeze.units import Unit, find_units

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["BACKWARD_RATIO", "Plan", "plan"]

BACKWARD_RATIO = 2.0  # backward FLOPs over forward FLOPs of a layer that computes both of its gradients


@dataclass(frozen=True)
class Plan:
    """The cost of a network by unit, and the prediction for a schedule.

    Per unit: unit_flops (forward FLOPs a sample), unit_parameters (elements), unit_saved (bytes that its forward keeps for
    the backward, a sample), boundary_bytes (what crosses the cut after the unit, a sample), freeze_steps (first step at
    which it is frozen, None: never). batch: samples in the example inputs; parameter_bytes per unit.
    """

    units: tuple[Unit, ...]
    unit_flops: tuple[int, ...]
    unit_parameters: tuple[int, ...]
    parameter_bytes: tuple[int, ...]
    unit_saved: tuple[int, ...]
    boundary_bytes: tuple[int, ...]
    freeze_steps: tuple[int | None, ...]
    total_steps: int | None
    batch: int

    def freeze_times(self) -> tuple[float, ...]:
        """When each unit freezes, as a share of training; 1: never. Without a length of training, 0 or 1."""
        if self.total_steps is None:
            return tuple(1.0 if step is None else 0.0 for step in self.freeze_steps)
        return tuple(1.0 if step is None else min(1.0, step / self.total_steps) for step in self.freeze_steps)

    def saving(self, cached: bool) -> float:
        """The predicted share of plain training's FLOPs that freezing saves.

        ``sum c_i (r (1 - t_i) + h (1 - t_i)) / ((1 + r) sum c_i)`` with forward cost c_i, freeze time t_i, backward ratio r,
        and h = 1 when a cache also spares the frozen forward (extends FreezeOut, arXiv 1706.04983, section 3).
        """
        spared = BACKWARD_RATIO + (1.0 if cached else 0.0)
        times = self.freeze_times()
        saved = sum(flops * spared * (1 - t) for flops, t in zip(self.unit_flops, times, strict=True))
        return saved / ((1 + BACKWARD_RATIO) * max(1, sum(self.unit_flops)))

    def memory(self, depth: int) -> int:
        """Bytes that a training step at ``depth`` holds at its peak, by estimate, for the example batch.

        Parameters; gradients and one momentum buffer of the live ones; what the live forward keeps for its backward; and
        the boundary. Temporaries of single operators are not counted.
        """
        live = slice(depth, None)
        state = sum(self.parameter_bytes) + 2 * sum(self.parameter_bytes[live])
        boundary = self.boundary_bytes[depth - 1] if depth else 0
        return state + self.batch * (sum(self.unit_saved[live]) + boundary)

    def table(self) -> "Table":
        """The plan as a rich table, one row a unit."""
        from rich.table import Table

        total = f"{sum(self.unit_parameters):,} parameters, {sum(self.unit_flops) / 1e6:,.1f} MFLOP a sample"
        title = f"{len(self.units)} units, {total}"
        table = Table(title=title, caption=self._caption(), caption_justify="left")
        table.add_column("unit")
        heads = (
            "parameters",
            "forward MFLOP",
            "share",
            "freezes at step",
            "boundary KiB",
            f"step holds MiB (batch {self.batch})",
            "freed",
        )
        for head in heads:
            table.add_column(head, justify="right")
        before = self.memory(0)
        for i, unit in enumerate(self.units):
            step = self.freeze_steps[i]
            after = self.memory(i + 1) if step is not None else None
            table.add_row(
                unit.name,
                f"{self.unit_parameters[i]:,}",
                f"{self.unit_flops[i] / 1e6:,.2f}",
                f"{self.unit_flops[i] / max(1, sum(self.unit_flops)):.1%}",
                "never" if step is None else f"{step:,}",
                f"{self.boundary_bytes[i] / 1024:,.1f}" if step is not None else "",
                "" if after is None else f"{after / 2**20:,.1f}",
                "" if after is None else f"{1 - after / before:.0%}",
            )
        return table

    def _caption(self) -> str:
        plain = "plain training" if self.total_steps is None else f"{self.total_steps:,} steps of plain training"
        when = "" if self.total_steps is not None else " once every milestone has passed"
        return (
            f"predicted saving{when}: {self.saving(cached=False):.1%} of the FLOPs of {plain}, "
            f"{self.saving(cached=True):.1%} with the frozen outputs cached; "
            f"a full step holds {self.memory(0) / 2**20:,.1f} MiB"
        )

    def plot(self, path: str | Path) -> None:
        """Draw cost by unit and the predicted cost of a step over training, to an image file (format by its suffix)."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        names = [unit.name for unit in self.units]
        left.barh(range(len(names)), [flops / 1e6 for flops in self.unit_flops], color="#4477aa")
        every = max(1, len(names) // 24)
        left.set_yticks(range(0, len(names), every), names[::every], fontsize=7)
        left.invert_yaxis()
        left.set_xlabel("forward MFLOP a sample")
        left.set_title("cost by unit")
        steps, plain, cached = zip(*self._staircase(), strict=True)
        right.step(steps, plain, where="post", color="#4477aa", label="frozen part runs forward")
        right.step(steps, cached, where="post", color="#ee6677", label="frozen outputs cached")
        right.set_ylim(0, 1.05)
        right.set_xlabel("step" if self.total_steps is not None else "milestone")
        right.set_ylabel("FLOPs of a step, share of a full one")
        right.set_title("predicted cost of a step")
        right.legend(frameon=False)
        figure.savefig(path, dpi=120)

    def _staircase(self) -> Iterator[tuple[int, float, float]]:
        """(step, relative cost, relative cost with a cache) at the start, at each freeze, and at the end."""
        full = (1 + BACKWARD_RATIO) * max(1, sum(self.unit_flops))
        events = sorted({0, *(step for step in self.freeze_steps if step is not None)})
        end = self.total_steps if self.total_steps is not None else events[-1] + 1
        for step in [*(e for e in events if e <= end), end]:
            frozen = [s is not None and s <= step for s in self.freeze_steps]
            live = sum(flops for flops, f in zip(self.unit_flops, frozen, strict=True) if not f)
            yield (
                step,
                ((1 + BACKWARD_RATIO) * live + sum(self.unit_flops) - live) / full,
                (1 + BACKWARD_RATIO) * live / full,
            )


def plan(net: nn.Module, schedule: Schedule, example_inputs: tuple[Any, ...] | dict[str, Any] | Tensor) -> Plan:
    """Measure ``net`` by unit and predict what ``schedule`` saves.

    net: the network, or a FreezableModel of it; example_inputs: arguments of one call, a tuple, a dict of keyword inputs, or
    the one tensor; dimension 0 of the first tensor is the
    batch. Works on a copy: one forward in train mode is run and counted with torch's own FLOP counter, one in eval mode.
    Raises TraceRefusal when the network can't be traced.
    """
    net = copy.deepcopy(net.original if isinstance(net, FreezableModel) else net)
    if isinstance(example_inputs, Tensor):
        example_inputs = (example_inputs,)
    traces = traces_of(net, example_inputs)
    ownership = find_units(net, traces)
    args = () if isinstance(example_inputs, dict) else example_inputs
    tensors = [
        t for t in torch.utils._pytree.tree_leaves((args, example_inputs if not args else {})) if isinstance(t, Tensor)
    ]
    flops, saved = forward_costs(net, traces[0], ownership, tensors)
    with random_state_kept(), torch.no_grad():
        frozen = count(net.eval(), traces[1], tensors)
    batch = tensors[0].shape[0] if tensors and tensors[0].dim() else 1
    cuts = [split(net, traces[1], ownership, depth).boundary for depth in range(1, len(ownership.units))]
    boundary = [sum(frozen.sizes[name] for name in names) // batch for names in cuts]
    return Plan(
        units=ownership.units,
        unit_flops=tuple(f // batch for f in flops),
        unit_parameters=tuple(sum(net.get_parameter(n).numel() for n in unit.parameters) for unit in ownership.units),
        parameter_bytes=tuple(sum(net.get_parameter(n).nbytes for n in unit.parameters) for unit in ownership.units),
        unit_saved=tuple(s // batch for s in saved),
        boundary_bytes=(*boundary, 0),
        freeze_steps=schedule.freeze_steps(ownership.units),
        total_steps=getattr(schedule, "total_steps", None),
        batch=batch,
    )
