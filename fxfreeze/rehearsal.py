"""Runs of a frozen part for a look at it, of which the user's own modules and hooks must notice nothing."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.fx import GraphModule

from fxfreeze.kept import ModuleState
from fxfreeze.randomness import random_state_kept

__all__ = ["kept_whole", "rehearsed", "state_of"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def kept_whole(graph: GraphModule) -> list[nn.Module]:
    """The modules that ``graph`` calls and that may do more than compute: the user's own, and those with hooks."""
    called = [graph.get_submodule(str(node.target)) for node in graph.graph.nodes if node.op == "call_module"]
    return [module for module in called if not _computes_only(module)]


def _computes_only(module: nn.Module) -> bool:
    hooked = any(getattr(m, hooks) for m in module.modules() for hooks in _HOOKS)
    return type(module).__module__.startswith("torch.nn.") and not hooked


def state_of(whole: Sequence[nn.Module]) -> ModuleState:
    """What these modules, and those within, hold now."""
    modules = {id(m): m for each in whole for m in each.modules()}.values()
    return ModuleState((str(i), module) for i, module in enumerate(modules))


@contextlib.contextmanager
def rehearsed(whole: Sequence[nn.Module]) -> Iterator[None]:
    """Within, the hooks of these modules are off; attributes and buffers that they change are put back at the end."""
    modules = {id(m): m for each in whole for m in each.modules()}.values()
    state = state_of(whole)
    buffers = [(b, b._version, b.clone()) for m in modules for b in m._buffers.values() if b is not None]
    hooks = [(live, dict(live)) for module in modules for live in (getattr(module, name) for name in _HOOKS)]
    for live, _ in hooks:
        live.clear()
    try:
        with random_state_kept(modules):
            yield
    finally:
        for live, own in hooks:
            live.update(own)
        state.restore()
        with torch.no_grad():
            for buffer, version, before in buffers:
                if buffer._version != version:
                    buffer.copy_(before)
