"""What an iteration takes by depth: measured on copies, predicted from FLOPs, traced by unit."""

import copy
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from profiles import BACKWARD, DATA, PREFIX, STEP, SUFFIX, FakeClock, recorded
from tiny import Tiny, images
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fxfreeze
from fxfreeze.iterations import Parts
from fxfreeze.profiling import MOST_DEPTHS, profile

BATCH = images(8, 0)
QUICK: dict[str, Any] = {"rounds": 1}


def three_linear() -> nn.Sequential:
    """Three units of as many FLOPs each."""
    return nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(3)])


def flat_batch(count: int = 4) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 8), torch.arange(count) % 8


# ---- what is measured


def test_parts_by_a_clock_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is what passed in it alone, and the prediction falls from depth 0's total as the FLOPs do."""
    clock, batch = FakeClock(monkeypatch), flat_batch()
    given = profile(
        three_linear(), batch, loader=clock.loader(batch), loss=clock.loss, optimizer=clock.optimizer, rounds=5
    )
    assert [each.depth for each in given.iterations] == [0, 1, 2]
    assert given.iterations[0].measured == Parts(DATA, 0.0, SUFFIX, BACKWARD, STEP)
    for each in given.iterations[1:]:
        assert each.measured == Parts(DATA, PREFIX, SUFFIX, BACKWARD, STEP)
        assert each.quartiles == (18, 18)
    assert [each.measured.total for each in given.iterations] == [17, 18, 18]
    # Of nine parts of FLOPs, three forward and six backward, each frozen unit takes two away.
    assert [each.predicted.total for each in given.iterations] == pytest.approx([17, 17 * 7 / 9, 17 * 5 / 9])
    assert given.unit_flops == (2 * 4 * 8 * 8,) * 3
    assert (given.batch, given.rounds, given.fetched) == (4, 5, True)


def test_a_batch_alone_is_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(monkeypatch)
    given = profile(three_linear(), flat_batch(), loss=clock.loss, optimizer=clock.optimizer, **QUICK)
    assert not given.fetched
    assert {each.measured.data for each in given.iterations} == {0.0}


def test_depths_take_turns_and_the_warm_up_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rounds, in which frozen parts are built, are slow, and nobody sees it."""
    clock, turns = FakeClock(monkeypatch), []

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        turns.append(clock.now)
        if len(turns) <= 3 * 3:
            clock.now += 1000
        return clock.loss(outputs, targets)

    told = []
    given = profile(
        three_linear(),
        flat_batch(),
        loss=loss,
        optimizer=clock.optimizer,
        rounds=2,
        progress=lambda *of: told.append(of),
    )
    assert [each.measured.suffix for each in given.iterations] == [SUFFIX] * 3
    assert told == [(done, 15) for done in range(1, 16)]
    frozen = [later - earlier > SUFFIX + BACKWARD + STEP for earlier, later in itertools.pairwise(turns[9:])]
    assert frozen == [True, True, False, True, True]  # before depths 1, 2, 0, 1, 2


def test_the_network_is_left_as_it_was() -> None:
    net = Tiny().eval()
    net.stem[0].weight.requires_grad_(False)
    net.fc.weight.grad = torch.ones_like(net.fc.weight)
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    profile(net, BATCH, **QUICK)
    assert torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any(module.training for module in net.modules())
    assert [name for name, p in net.named_parameters() if not p.requires_grad] == ["stem.0.weight"]
    assert {name for name, p in net.named_parameters() if p.grad is not None} == {"fc.weight"}
    assert torch.equal(net.fc.weight.grad, torch.ones_like(net.fc.weight))


def test_a_compiled_model_is_left_as_frozen_as_it_was() -> None:
    """Its copies train from depth 0 on, with what it has frozen live again."""
    net = Tiny()
    model = fxfreeze.compile(net, fxfreeze.Milestones({"block1.0": 0})).train()
    before, live = copy.deepcopy(model.state_dict()), []

    def optimizer(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        live.append(len(parameters))
        return torch.optim.SGD(parameters, lr=0.1)

    given = profile(model, BATCH, optimizer=optimizer, depths=[1, 3], **QUICK)
    assert [each.depth for each in given.iterations] == [0, 1, 3]
    assert live == [17, 14, 6]  # of 3, 4, 4, 4 and 2 parameters a unit
    assert model.depth == 2
    assert [p.requires_grad for p in net.parameters()] == [False] * 7 + [True] * 10
    assert [net.block1[1].training, net.block2[1].training] == [False, True]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("precision", "autocast"), [(None, None), ("bf16", torch.bfloat16)])
def test_a_compiled_model_says_units_backend_and_precision(
    precision: str | None, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = ["stem", "block2", "fc"]
    model = fxfreeze.compile(Tiny(), fxfreeze.FreezeOut(10), units=named, backend="plain", precision=precision)
    seen, build = set(), fxfreeze.builder.build

    def spy(span: Any, plain: Any, inputs: Any, computation: Any, *rest: Any, **more: Any) -> Any:
        seen.add(computation.autocast)
        return build(span, plain, inputs, computation, *rest, **more)

    monkeypatch.setattr("fxfreeze.builder.build", spy)
    given = profile(model, BATCH, **QUICK)
    assert given.units == tuple(unit.name for unit in model.units)
    assert len(given.units) == 3
    assert [each.backend for each in given.iterations] == [
        None,
        "plain",
        "plain",
    ]  # "auto" would take "library" in fp32
    assert seen == {autocast}


def test_the_callers_autocast_holds() -> None:
    dtypes = set()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        dtypes.add(outputs.dtype)
        return nn.functional.cross_entropy(outputs, targets)

    with torch.autocast("cpu", torch.bfloat16):
        profile(Tiny(), BATCH, loss=loss, depths=[0], **QUICK)
    assert dtypes == {torch.bfloat16}


@pytest.mark.parametrize("fetched", [False, True])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_training_is_measured_whatever_the_callers_mode(mode: Any, fetched: bool) -> None:
    net = three_linear()
    with mode():
        batch = flat_batch()
        given = profile(net, batch, loader=[batch] if fetched else None, **QUICK)
    assert all(each.measured.backward > 0 for each in given.iterations)


class Doubling(nn.Module):
    """Writes into its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        return self.b(self.a(u.mul_(2)))  # type: ignore[no-any-return]


def test_a_forward_that_writes_into_its_input_gets_the_batch_each_time() -> None:
    """Weights stay as they were, so that equal inputs give equal losses."""
    x, y = flat_batch()
    before, losses = x.clone(), set()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        found = nn.functional.cross_entropy(outputs, targets)
        losses.add(found.item())
        return found

    profile(Doubling(), (x, y), loss=loss, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), depths=[0], rounds=3)
    assert torch.equal(x, before)
    assert len(losses) == 1


def test_the_callers_tape_gets_no_gradient() -> None:
    x, y = flat_batch()
    profile(three_linear(), (x.requires_grad_(), y), depths=[0], **QUICK)
    assert x.grad is None


def test_hooks_run_on_the_copies() -> None:
    net, seen = three_linear(), []
    net[0].register_forward_hook(lambda module, *_: seen.append(module is net[0]))
    profile(net, flat_batch(), depths=[0], **QUICK)
    assert seen
    assert not any(seen)


def test_a_loss_that_was_not_finite_is_told_once() -> None:
    """Of all depths, in one warning; also if later ones are."""
    offsets = itertools.chain([float("nan")] * 2, itertools.repeat(0.0))  # which leave the gradients finite
    with pytest.warns(UserWarning, match=r"the loss is not finite at depth 0, 2: .*Try a lower learning rate") as told:
        profile(
            three_linear(),
            flat_batch(),
            loss=lambda outputs, targets: outputs.sum() + next(offsets),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
            depths=[2],
            **QUICK,
        )
    assert [Path(each.filename).name for each in told] == ["test_profile.py"]


def test_inputs_by_position_and_by_keyword() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.b(self.a(left).relu() + right)  # type: ignore[no-any-return]

    x, y = flat_batch()
    tupled = profile(Two(), ((x, x), y), **QUICK)
    named = profile(Two(), ({"left": x, "right": x}, y), **QUICK)
    assert tupled.unit_flops == named.unit_flops == (2 * 4 * 8 * 8,) * 2
    assert tupled.batch == named.batch == 4


def test_many_units_are_measured_at_depths_evenly_spread() -> None:
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(30)])
    given = profile(net, (torch.randn(2, 4), torch.zeros(2, dtype=torch.int64)), **QUICK)
    depths = [each.depth for each in given.iterations]
    assert len(depths) == MOST_DEPTHS
    assert (depths[0], depths[-1]) == (0, 29)
    assert {later - earlier for earlier, later in itertools.pairwise(depths)} == {2, 3}


# ---- what is fetched


def test_an_iteration_takes_the_loaders_next_batch() -> None:
    """A last batch of fewer samples is passed over, and the loader begun again."""
    data, seen = TensorDataset(torch.arange(10.0)[:, None].expand(10, 8), torch.zeros(10, dtype=torch.int64)), []
    loader = DataLoader(data, batch_size=4)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        seen.append(len(targets))
        return outputs.square().mean()

    class Listed:
        """Notes what is fetched."""

        first: list[float] = []  # noqa: RUF012

        def __iter__(self) -> Any:
            return recorded(loader, lambda batch: self.first.append(batch[0][0, 0].item()))

    profile(three_linear(), next(iter(loader)), loader=Listed(), loss=loss, depths=[0], rounds=2)
    assert Listed.first == [0, 4, 8, 0, 4, 8, 0]
    assert seen == [4] * 5


def test_a_loader_of_other_batches_is_refused() -> None:
    with pytest.raises(ValueError, match="yields no batch of 4 samples, as the given one has"):
        profile(three_linear(), flat_batch(), loader=[flat_batch(3)], **QUICK)


# ---- what is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"depths": [3]},
            "this network has no depth 3: its depths are 0 to 2, as the last of its 3 units never freezes",
        ),
        ({"depths": [-1]}, "this network has no depth -1"),
        ({"depths": [True]}, "this network has no depth True"),
        ({"depths": 2}, r"depths is 2: expected a list of whole numbers, such as \[2\]"),
        ({"rounds": 0}, "rounds is 0: expected a whole number of at least 1"),
        ({"rounds": 2.0}, r"rounds is 2\.0: expected a whole number"),
        ({"progress": True}, r"progress is True: expected a function of \(iterations done, of how many\)"),
        (
            {"optimizer": torch.optim.Adam([torch.zeros(1)])},
            r"optimizer is an object of type Adam: expected a function .* lambda parameters: torch\.optim\.Adam",
        ),
        ({"optimizer": lambda parameters: None}, "optimizer returned None: expected a torch.optim.Optimizer"),
        ({"optimizer": torch.optim.LBFGS}, "the step of LBFGS needs a closure"),
        (
            {"net": torch.compile(three_linear(), backend="eager")},
            r"pass the network that was compiled, net\._orig_mod",
        ),
        ({"trace": "/absent/t.json"}, "trace '/absent/t.json' can't be written"),
        ({"trace": "/"}, "trace '/' can't be written"),
        ({"batch": torch.zeros(2, 8)}, r"a batch is a Tensor: expected \(inputs, targets\)"),
        ({"batch": (torch.zeros(2, 8),)}, r"a batch is a tuple of 1: expected \(inputs, targets\)"),
        ({"batch": (3, 4)}, "hold no tensor with a dimension of samples"),
        ({"batch": (torch.zeros(()), torch.zeros(()))}, "hold no tensor with a dimension of samples"),
        ({"batch": (torch.zeros(2, 8, device="meta"), 0)}, "the batch is on meta: expected a CPU or CUDA device"),
        ({"net": nn.Sequential(nn.BatchNorm1d(8), nn.BatchNorm1d(8))}, "torch counts no FLOPs in this network"),
        ({"net": three_linear().requires_grad_(False)}, "at depth 0 no parameter requires grad"),
    ],
)
@pytest.mark.filterwarnings("ignore:the network is a single unit")
def test_what_can_t_be_is_refused(change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"net": three_linear(), "batch": flat_batch(), **QUICK, **change}
    with pytest.raises(ValueError, match=message):
        profile(given.pop("net"), given.pop("batch"), **given)


def test_a_trace_that_can_t_be_written_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with pytest.raises(ValueError, match="can't be written"):
        profile(three_linear(), flat_batch(), trace=tmp_path, progress=lambda *of: told.append(of), **QUICK)
    assert told == []


def test_a_batch_of_another_shape_is_refused_in_a_line() -> None:
    with pytest.raises(ValueError, match=r"have the shapes \(4, 9\): RuntimeError: mat1 and mat2") as refused:
        profile(three_linear(), (torch.randn(4, 9), torch.zeros(4, dtype=torch.int64)), **QUICK)
    assert "\n" not in str(refused.value)
    assert "traceback" not in str(refused.value)


def test_a_network_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        net = three_linear()
    with pytest.raises(ValueError, match=r"0\.weight was made under torch\.inference_mode"):
        profile(net, flat_batch(), **QUICK)


def test_what_compile_refuses_is_refused() -> None:
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        profile(lambda x: x, flat_batch())  # type: ignore[arg-type]


# ---- the trace


def inside(inner: dict[str, Any], outer: dict[str, Any]) -> bool:
    return bool(outer["ts"] <= inner["ts"] and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"])


def test_a_trace_is_written_in_silence(tmp_path: Path) -> None:
    """By a process of its own, since what is told is decided at its first trace."""
    code = (
        "import torch; from torch import nn; from fxfreeze.profiling import profile; "
        "net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)); batch = torch.randn(4, 8), torch.arange(4); "
        "profile(net, batch, rounds=1, trace='t.json')"
    )
    silent = {name: value for name, value in os.environ.items() if name != "KINETO_LOG_LEVEL"}
    silent["PYTHONPATH"] = str(Path(fxfreeze.__file__).parents[1])
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=silent, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert (tmp_path / "t.json").exists()


def test_the_trace_names_units_within_each_iteration(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    given = profile(Tiny(), BATCH, depths=[0, 2], trace=path, **QUICK)
    events = [each for each in json.loads(path.read_text())["traceEvents"] if each.get("cat") == "user_annotation"]
    assert given.units == ("stem.0", "block1.0", "block2.0", "block3.0", "fc")
    for depth in (0, 2):
        (iteration,) = [each for each in events if each["name"] == f"iteration at depth {depth}"]
        within = [each for each in events if inside(each, iteration) and each is not iteration]
        names = [each["name"] for each in within if not each["name"].startswith("Optimizer.")]
        prefix = ["prefix 0-2"] if depth else []
        assert names == ["data", "forward", *prefix, *given.units[depth:], "loss", "backward", "optimizer"]
        (forward,) = [each for each in within if each["name"] == "forward"]
        units = [each for each in within if each["name"] in (*prefix, *given.units, "loss")]
        assert all(inside(each, forward) for each in units)
        for earlier, later in itertools.pairwise(units):
            assert earlier["ts"] + earlier["dur"] <= later["ts"]


def test_nothing_is_traced_while_the_profiler_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an iteration does only once is not in its picture."""
    looking, trace = [], fxfreeze.trace.trace

    def spy(*given: Any) -> Any:
        looking.append(torch.autograd._profiler_enabled())  # type: ignore[attr-defined]
        return trace(*given)

    monkeypatch.setattr("fxfreeze.watched.trace", spy)
    profile(three_linear(), flat_batch(), depths=[0], trace=tmp_path / "trace.json", **QUICK)
    assert looking == [False]
