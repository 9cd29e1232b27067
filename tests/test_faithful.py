"""The frozen part computes what the original computes in eval mode, by other means, and leaves no trace on the tape."""

import copy
import weakref
from typing import Any

import pytest
import torch
from cases import CASES
from families import FAMILIES
from frozen import norms_run
from nets import Case, settle
from reference import FLOOR, SGD, Run, gap, gaps, leaves, measure, put_in_eval
from test_trajectory import long_if, parts_kept_whole
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fxfreeze.runtime import Segment

ALL = CASES | FAMILIES
SMALL = [*CASES, "densenet-bc", "wrn", "resnet"]


def run_of(name: str) -> tuple[Run, Case]:
    case = ALL[name]
    return Run(settle(case.make()), case, SGD), case


def frozen_by_hand(run: Run) -> nn.Module:
    net = copy.deepcopy(run.model.original)
    put_in_eval(net, run.model)
    return net


@pytest.mark.parametrize("name", ALL)
def test_units_hold_everything_once(name: str) -> None:
    """Each module and each parameter is in one unit, a container in the last that it has a part in."""
    case = ALL[name]
    model = Run(case.make(), case, SGD).model
    net = model.original
    modules = [name for unit in model.units for name in unit.modules]
    assert sorted(modules) == sorted(name for name, _ in net.named_modules() if name)
    parameters = [name for unit in model.units for name in unit.parameters]
    assert sorted(parameters) == sorted(name for name, _ in net.named_parameters())
    owner = {net.get_parameter(name): i for i, unit in enumerate(model.units) for name in unit.parameters}
    for i, unit in enumerate(model.units):
        for name in unit.modules:
            assert i == max((owner[p] for p in net.get_submodule(name).parameters()), default=i), name


@pytest.mark.parametrize(
    "name", [long_if(name in ("densenet121", "vgg16_bn"), name) for name in ALL if name != "densenet121_drop"]
)
def test_eval_is_the_original_s_at_every_depth(name: str) -> None:
    run, case = run_of(name)
    model, call = run.model, run.call(1)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.eval()
    with torch.no_grad(), parts_kept_whole(case):
        expected = model.original(*call.args, **call.kwargs)
        for depth in range(1, len(model.units)):
            model.freeze(depth)
            call = run.call(1)
            output = model(*call.args, **call.kwargs)
            run.assert_rewritten()
            assert type(output) is type(expected)
            for ours, theirs in zip(leaves(output), leaves(expected), strict=True):
                assert gap(ours, theirs) <= 1e-10, f"at depth {depth}"
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("name", SMALL)
def test_a_trained_state_loads_into_the_bare_network(name: str) -> None:
    run, case = run_of(name)
    with parts_kept_whole(case):
        for number in range(8):
            run.step(number)
            run.scheduler.step()
        run.step(8)  # at this depth, training comes before eval
    assert run.model.depth
    bare = case.make().double()
    bare.load_state_dict(run.model.state_dict(), strict=True)
    with parts_kept_whole(case):
        ours, theirs = (leaves(net.eval()(*run.call(20).args, **run.call(20).kwargs)) for net in (run.model, bare))
    assert max(gap(a.detach(), b.detach()) for a, b in zip(ours, theirs, strict=True)) <= 1e-10


class Tape:
    """Tensors that the autograd tape holds: those saved for backward and not dropped since."""

    def __init__(self) -> None:
        self.held: weakref.WeakSet[Tape.Saved] = weakref.WeakSet()

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def pack(self, tensor: Tensor) -> "Tape.Saved":
        saved = Tape.Saved(tensor)
        self.held.add(saved)
        return saved

    def run(self, net: nn.Module, call: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(self.pack, lambda saved: saved.tensor):
            return net(*call.args, **call.kwargs)

    def storages(self) -> set[int]:
        return {saved.tensor.untyped_storage().data_ptr() for saved in self.held}


class Watch(TorchDispatchMode):
    """Notes every tensor made, and keeps it, lest its address be used again."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += leaves(result)
        return result


@pytest.mark.parametrize("name", SMALL)
def test_the_tape_holds_nothing_of_the_prefix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tensors as when the frozen part is put in eval by hand, and none that the prefix made for itself."""
    watch, boundary = Watch(), list[Tensor]()
    run_segment = Segment.__call__

    def watched(segment: Segment, *inputs: Any) -> tuple[Any, ...]:
        with watch:
            outputs = run_segment(segment, *inputs)
        boundary.extend(leaves(outputs))
        return outputs

    monkeypatch.setattr(Segment, "__call__", watched)
    run, case = run_of(name)
    for depth in range(1, len(run.model.units)):
        run.model.freeze(depth)
        by_hand, call = frozen_by_hand(run), run.call(1)
        ours, theirs = Tape(), Tape()
        with parts_kept_whole(case):
            output = ours.run(run.model, call)
        reference = theirs.run(by_hand, run.call(1))
        assert len(ours.held) == len(theirs.held), f"at depth {depth}"
        assert boundary
        assert not any(t.requires_grad or t.grad_fn or t.is_inference() for t in boundary)
        inner = {t.untyped_storage().data_ptr() for t in watch.made}
        inner -= {t.untyped_storage().data_ptr() for t in [*boundary, *leaves(call)]}
        assert not inner & ours.storages(), f"at depth {depth}"
        del output, reference
        watch.made.clear()
        boundary.clear()


@pytest.mark.parametrize("name", SMALL)
def test_nothing_that_is_handed_over_is_written_into(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the caller's inputs nor the boundary, which a cache or a replay may own."""
    handed: list[tuple[Tensor, Tensor]] = []
    run_segment = Segment.__call__

    def kept(segment: Segment, *inputs: Any) -> tuple[Any, ...]:
        outputs = run_segment(segment, *inputs)
        handed.extend((t, t.clone()) for t in leaves(outputs))
        return outputs

    monkeypatch.setattr(Segment, "__call__", kept)
    run, case = run_of(name)
    for depth in range(1, len(run.model.units)):
        run.model.freeze(depth)
        call = run.call(1)
        handed.extend((t, t.clone()) for t in leaves(call))
        with parts_kept_whole(case):
            measure(run.model(*call.args, **call.kwargs), depth).backward()
        assert all(torch.equal(t, before) for t, before in handed), f"at depth {depth}"
        handed.clear()


@pytest.mark.parametrize("name", SMALL)
def test_three_forwards_before_one_backward(name: str) -> None:
    run, case = run_of(name)
    run.model.freeze(len(run.model.units) // 2)
    by_hand = frozen_by_hand(run)
    gradients = []
    for net in (run.model, by_hand):
        torch.manual_seed(3)
        with parts_kept_whole(case):
            outputs = [net(*call.args, **call.kwargs) for call in map(run.call, (1, 2, 4))]
        torch.stack([measure(output, seed) for seed, output in enumerate(outputs)]).sum().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters() if p.grad is not None})
    assert gradients[0]
    assert gaps(*gradients, FLOOR) <= 1e-10


def test_gradients_flow_where_the_first_forward_ran_without() -> None:
    """A forward under ``torch.no_grad()`` shows no difference between what the network itself keeps from the tape."""
    run, _ = run_of("no_grad")
    run.model.freeze(2)
    run.model.eval()
    call = run.call(1)
    with torch.no_grad():
        run.model(*call.args)
    measure(run.model(*call.args), 0).backward()
    by_hand = frozen_by_hand(run).eval()
    measure(by_hand(*call.args), 0).backward()
    gradients = [{n: p.grad for n, p in net.named_parameters() if p.grad is not None} for net in (run.model, by_hand)]
    assert gaps(*gradients, FLOOR) <= 1e-10


FOLDABLE = (
    "tied_weights",
    "keywords",
    "functional_dropout",
    "two_users",
    "conv_used_twice",
    "norm_after_concat",
    "unet",
    "list_loop",
    "volumes",
    *(name for name in FAMILIES if name != "googlenet"),  # whose auxiliary heads stay live, norms and all
)


@pytest.mark.parametrize("name", FOLDABLE)
def test_no_batch_norm_runs_with_all_but_the_head_frozen(name: str) -> None:
    """In training, where frozen units that are merely in eval run all of theirs."""
    run, _ = run_of(name)
    run.model.freeze(len(run.model.units) - 1)
    call, by_hand = run.call(1), frozen_by_hand(run)
    run.model(*call.args, **call.kwargs)
    assert norms_run(lambda: run.model(*call.args, **call.kwargs)) == 0
    norms = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in by_hand.modules())
    assert norms_run(lambda: by_hand(*call.args, **call.kwargs)) >= norms
