"""Stopping at any step and going on from the saved states is, bit for bit on CPU, not having stopped."""

import contextlib
import copy
import io
import itertools
from typing import Any

import pytest
import torch
from cases import CASES
from families import FAMILIES
from frozen import network
from nets import settle
from reference import ADAM, SGD, STEPS, Run
from test_trajectory import bf16, lstm_in_bf16, parts_kept_whole
from torch import Tensor, nn

import fxfreeze
from fxfreeze import FreezeScheduler, Milestones
from fxfreeze.rows import with_another
from fxfreeze.runtime import Segment

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


@pytest.mark.parametrize("seed", range(3))
def test_resuming_before_a_batch_of_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is computed with as many samples as the others were, though the resumed run has met none of these."""
    batches = [torch.randn(n, 3, 12, 12, generator=torch.Generator().manual_seed(seed)) for n in (16, 16, 1, 16)]

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer, FreezeScheduler]:
        torch.manual_seed(seed)
        model = fxfreeze.compile(network(), Milestones({"blocks.1": 1}), backend="plain")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        return model, optimizer, FreezeScheduler(optimizer, model)

    def train(run: tuple[nn.Module, torch.optim.Optimizer, FreezeScheduler], some: list[Tensor]) -> list[Tensor]:
        model, optimizer, scheduler = run
        outputs = []
        for x in some:
            outputs.append(model(x))
            outputs[-1].square().sum().backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return outputs

    sizes = []
    native = Segment.native
    monkeypatch.setattr(Segment, "native", lambda self, x: sizes.append(len(x)) or native(self, x))
    straight, again = fresh(), fresh()
    train(straight, batches[:2])
    states = copy.deepcopy([part.state_dict() for part in straight])
    for part, state in zip(again, states, strict=True):
        part.load_state_dict(state)
    for a, b in zip(train(straight, batches[2:]), train(again, batches[2:]), strict=True):
        assert torch.equal(a, b)
    assert sizes == [16] * 5


def test_another_sample() -> None:
    """An index stays one, whatever its column."""
    x, mask = torch.tensor([[1, 7, 0]]), torch.tensor([[True, False, True]])
    given = [x, x.float(), mask, x.to(torch.uint16), x.to(torch.float8_e5m2), x.to(torch.complex64), "a setting"]
    numbers, floats, flags, unsigned, small, complexes, setting = with_another(given)
    assert small.float().tolist() == [[1, 7, 0], [0.75, 4, 0.25]]  # two bits after the first
    assert torch.equal(complexes, floats.to(torch.complex64))
    assert numbers.tolist() == unsigned.tolist() == [[1, 7, 0], [0, 3, 0]]
    assert (numbers.dtype, unsigned.dtype) == (torch.int64, torch.uint16)
    assert floats.tolist() == [[1, 7, 0], [0.75, 3.75, 0.25]]
    assert (flags.tolist(), setting) == ([[True, False, True], [False, True, False]], "a setting")
