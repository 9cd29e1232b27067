"""Stopping at any step and going on from the saved states is, bit for bit on CPU, not having stopped."""

import contextlib
import io
import itertools
from typing import Any

import pytest
import torch
from cases import CASES
from families import FAMILIES
from nets import settle
from reference import ADAM, SGD, STEPS, Run
from test_trajectory import bf16, lstm_in_bf16, parts_kept_whole
from torch import Tensor

# convolutions folded, scaled and shifted, a shape-bound trace, dropout, tuples that cross, a part kept whole
NAMES = ("functional_dropout", "norm_after_concat", "position_embedding", "unet", "recurrent", "hooked", "densenet-bc")


def go_on(run: Run, steps: range, context: Any) -> dict[int, dict[str, Tensor]]:
    """Train from one step to another; the state after each."""
    states = {}
    for number in steps:
        run.step(number, context)
        run.scheduler.step()
        states[number] = {name: t.detach().clone() for name, t in run.model.state_dict().items()}
    return states


def saved(run: Run) -> bytes:
    file = io.BytesIO()
    states = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    torch.save({**states, "scheduler": run.scheduler.state_dict(), "random": torch.get_rng_state()}, file)
    return file.getvalue()


def resumed(run: Run, file: bytes) -> None:
    states = torch.load(io.BytesIO(file), weights_only=True)
    run.model.load_state_dict(states["model"])
    run.optimizer.load_state_dict(states["optimizer"])
    run.scheduler.load_state_dict(states["scheduler"])
    torch.set_rng_state(states["random"])


@pytest.mark.parametrize("context", [contextlib.nullcontext, bf16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("optimise", [SGD, ADAM])
@pytest.mark.parametrize("name", NAMES)
def test_resuming_is_not_having_stopped(name: str, optimise: Any, context: Any) -> None:
    case = (CASES | FAMILIES)[name]
    if name == "recurrent" and context is bf16 and not lstm_in_bf16():
        pytest.skip("oneDNN has no LSTM in bf16 for this processor: the original can't run either")

    def fresh(seed: int) -> Run:
        torch.manual_seed(seed)
        return Run(settle(case.make(), seed), case, optimise, torch.float32)

    with parts_kept_whole(case):
        run = fresh(0)
        files, depths, straight = {0: saved(run)}, [run.model.depth], {}
        for number in range(STEPS):
            straight |= go_on(run, range(number, number + 1), context)
            files[number + 1] = saved(run)
            depths.append(run.model.depth)
        freezes = [step for step, (a, b) in enumerate(itertools.pairwise(depths), 1) if a < b]
        assert len(freezes) > 2
        for stop in sorted({freezes[1] - 1, freezes[1], freezes[1] + 1, freezes[-1]} - {STEPS}):
            run = fresh(1)  # other weights
            resumed(run, files[stop])
            assert run.model.depth == depths[stop]
            for number, state in go_on(run, range(stop, STEPS), context).items():
                different = [name for name, t in state.items() if not torch.equal(t, straight[number][name])]
                assert not different, f"stopped at {stop}, after step {number}"
