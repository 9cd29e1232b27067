"""Whether a frozen model computes what the original does with its frozen units in eval and without gradients.

Everything is compared in float64: outputs, gradients of the live parameters, buffers and random numbers drawn. What
the suffix must not write into, boundary tensors and the caller's inputs, is compared with copies, and by version.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

import fxfreeze
from fxfreeze.fidelity import relative_error
from fxfreeze.forward import Forward
from fxfreeze.inputs import flatten_inputs
from fxfreeze.split import between, split
from fxfreeze.trace import trace
from fxfreeze.units import Unit

TOLERANCE = 1e-10  # relative error by norm, float64


class Never:
    """A schedule that freezes nothing, so that tests set the depth by hand."""

    def depth(self, step: int, units: Sequence[Unit]) -> int:
        return 0

    def factors(self, step: int, units: Sequence[Unit]) -> tuple[float, ...]:
        return (1.0,) * len(units)

    def freeze_steps(self, units: Sequence[Unit]) -> tuple[int | None, ...]:
        return (None,) * len(units)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert not state


def freezable(net: nn.Module, **options: Any) -> fxfreeze.FreezableModel:
    """`net` compiled at depth 0."""
    return fxfreeze.compile(net, Never(), **options)


def settle(net: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """`net` in `dtype` with no parameter constant, no gain near zero, and running statistics that are not 0 and 1."""
    net = net.to(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            if p.dim() < 2:
                p.add_(0.3 * torch.rand(p.shape, generator=generator, dtype=p.dtype) + 0.1)
        for name, buffer in net.named_buffers():
            if name.endswith("running_mean"):
                buffer.copy_(0.3 * torch.randn(buffer.shape, generator=generator, dtype=buffer.dtype))
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator, dtype=buffer.dtype) + 0.5)
    return net


def freeze_by_hand(net: nn.Module, units: Sequence[Unit]) -> None:
    """The reference: modules of frozen units in eval, their parameters without gradient."""
    for unit in units:
        for name in unit.modules:
            net.get_submodule(name).training = False
        for name in unit.parameters:
            net.get_parameter(name).requires_grad_(False)


def assert_parity(
    net: nn.Module,
    calls: Sequence[Any],
    *,
    depths: Sequence[int] | None = None,
    modes: Sequence[bool] = (True, False),
    surgery: bool = True,
    **options: Any,
) -> fxfreeze.FreezableModel:
    """Compare at every depth, in train and in eval mode, over `calls` in turn; the last model made is returned.

    calls: the arguments of one forward each, a tuple or a dict; surgery: whether a prefix must have run.
    """
    net.train()
    unfrozen = freezable(copy.deepcopy(net), **options)
    assert len(unfrozen.units) > 1, "a network of one unit freezes nothing"
    for depth in range(1, len(unfrozen.units)) if depths is None else depths:
        for training in modes:
            reference, model = copy.deepcopy(net), copy.deepcopy(unfrozen)
            model.freeze(depth)
            where = f"depth {depth} of {len(model.units)}, {'train' if training else 'eval'}"
            for number, call in enumerate(calls):
                model.train(training)
                reference.train(training)
                freeze_by_hand(reference, model.units[:depth])
                compare(model, reference, call, number, f"{where}, call {number}", surgery)
    return model


def compare(
    model: fxfreeze.FreezableModel, reference: nn.Module, call: Any, seed: int, where: str, surgery: bool = True
) -> None:
    """One forward and backward of both, with everything that must be equal."""
    args, kwargs = ((), call) if isinstance(call, dict) else (call, {})
    expected_args, expected_kwargs = copy.deepcopy((args, kwargs))  # inputs that share memory still do
    versions = [t._version for t in _tensors((args, kwargs))]
    kept = [t.clone() for t in _tensors((args, kwargs))]

    torch.manual_seed(seed)
    expected = reference(*expected_args, **expected_kwargs)
    expected_grads = _backward(reference, expected)
    drawn = torch.get_rng_state()
    torch.manual_seed(seed)
    with boundaries() as crossed:
        outputs = model(*args, **kwargs)
        grads = _backward(model, outputs)

    assert torch.equal(torch.get_rng_state(), drawn), f"{where}: other random numbers were drawn"
    assert pytree.tree_structure(outputs) == pytree.tree_structure(expected), f"{where}: another output structure"
    for ours, theirs in zip(pytree.tree_leaves(outputs), pytree.tree_leaves(expected), strict=True):
        _assert_close(ours, theirs, f"{where}: an output")
    assert grads.keys() == expected_grads.keys(), f"{where}: other parameters have gradients"
    # Some gradients are zero but for rounding (of a bias before a batch norm), so all are measured against the largest.
    largest = max((float(g.norm()) for g in expected_grads.values()), default=0.0)
    for name, grad in grads.items():
        error = float((grad - expected_grads[name]).norm())
        assert error <= TOLERANCE * largest, (
            f"{where}: gradient of {name} is off by {error:.1e} (largest: {largest:.1e})"
        )
    for (name, ours), (_, theirs) in zip(model.named_buffers(), reference.named_buffers(), strict=True):
        _assert_close(ours, theirs, f"{where}: buffer {name}")
    for now, before, version in zip(_tensors((args, kwargs)), kept, versions, strict=True):
        assert torch.equal(now, before), f"{where}: the caller's input was written into"
        assert now._version == version, f"{where}: the caller's input was written into"
    assert crossed or not surgery, f"{where}: no prefix ran"
    for tensor, version, copied in crossed:
        assert torch.equal(tensor, copied), f"{where}: the suffix wrote into a boundary tensor"
        assert tensor._version == version, f"{where}: the suffix wrote into a boundary tensor"


def assert_segments_chain(model: fxfreeze.FreezableModel, args: tuple[Any, ...], training: bool) -> int:
    """At each depth, every shallower boundary leads to the same values as the inputs do; returns how many were tried."""
    net, tried = model.original, 0
    for end in range(2, len(model.units)):
        model.freeze(end)
        model.train(training)
        inputs, tensors = flatten_inputs(net, args, {})
        traced = trace(net, inputs, tensors)
        torch.manual_seed(0)
        expected = _run(split(net, traced, model._ownership, end).prefix, tensors)
        for start in range(1, end):
            where = f"{start} to {end} of {len(model.units)}, {'train' if training else 'eval'}"
            torch.manual_seed(0)
            boundary = _run(split(net, traced, model._ownership, start).prefix, tensors)
            before = copy.deepcopy(boundary)
            segment = between(net, traced, model._ownership, start, end)
            if segment is None:
                continue
            tried += 1
            for ours, theirs in zip(_run(segment, boundary), expected, strict=True):
                assert type(ours) is type(theirs), where
                assert torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs, where
            for ours, theirs in zip(_tensors(boundary), _tensors(before), strict=True):
                assert torch.equal(ours, theirs), f"{where}: wrote into the boundary"
    return tried


def _run(graph: nn.Module, inputs: Sequence[Any]) -> tuple[Any, ...]:
    with torch.no_grad():
        return tuple(graph(*inputs))


@contextmanager
def boundaries() -> Iterator[list[tuple[Tensor, int, Tensor]]]:
    """Collects what prefixes hand over: (tensor, its version, a copy)."""
    crossed: list[tuple[Tensor, int, Tensor]] = []
    run: Callable[..., tuple[Any, ...]] = Forward.boundary

    def recorded(self: Forward, *call: Any) -> tuple[Any, ...]:
        outputs = run(self, *call)
        crossed.extend((t, t._version, t.clone()) for t in _tensors(outputs))
        return outputs

    Forward.boundary = recorded  # type: ignore[method-assign]
    try:
        yield crossed
    finally:
        Forward.boundary = run  # type: ignore[method-assign]


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def loss(outputs: Any) -> Tensor | None:
    """A sum over all outputs that weighs no two elements alike; None where none of them has a gradient."""
    terms = []
    for i, t in enumerate(_tensors(outputs)):
        if t.requires_grad:
            weights = torch.linspace(-1, 1 + i, max(1, t.numel()), dtype=t.dtype)[: t.numel()].view(t.shape)
            terms.append((t.sin() * weights).sum())
    return torch.stack(terms).sum() if terms else None


def _backward(net: nn.Module, outputs: Any) -> dict[str, Tensor]:
    """Gradients by parameter."""
    for p in net.parameters():
        p.grad = None
    if (value := loss(outputs)) is not None:
        value.backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def _assert_close(ours: Any, theirs: Any, what: str) -> None:
    if not isinstance(theirs, Tensor):
        assert ours == theirs, f"{what} is {ours!r}, not {theirs!r}"
        return
    error = relative_error(ours.detach(), theirs.detach())
    assert error <= TOLERANCE, f"{what} has the relative error {error:.1e}"
