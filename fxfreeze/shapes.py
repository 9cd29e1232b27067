"""Values of a graph under trace on fake tensors, for control flow that looks at shapes."""

import operator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx import Node
from torch.fx.node import map_arg

from fxfreeze.kept import ModuleState
from fxfreeze.randomness import random_state_kept

__all__ = ["Shapes"]


class Shapes:
    """Evaluates nodes on fake tensors shaped like the examples; runs nothing for real and changes no module.

    examples: a tensor per placeholder; constants: tensors that the trace holds itself, by ``get_attr`` target.
    """

    def __init__(self, net: nn.Module, examples: dict[str, Tensor], constants: dict[str, Tensor]):
        self.running = False
        self._net = net
        self._examples = examples
        self._constants = constants
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._values: dict[Node, Any] = {}

    def evaluate(self, node: Node) -> Any:
        """The value of ``node``; what it depends on is evaluated once and remembered."""
        self.running = True
        try:
            with self._mode, torch.no_grad():
                stack = [node]
                while stack:  # depth-first without recursion: a slice can be thousands of nodes deep
                    missing = [n for n in stack[-1].all_input_nodes if n not in self._values]
                    if missing:
                        stack += missing
                    elif (ready := stack.pop()) not in self._values:
                        self._values[ready] = self._run(ready)
                return self._values[node]
        finally:
            self.running = False

    def forget(self, node: Node) -> None:
        """Drop the value of a node that leaves the graph."""
        self._values.pop(node, None)

    def _run(self, node: Node) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), self._values.__getitem__)
        match node.op:
            case "placeholder":
                return self._fake(self._examples[str(node.target)])
            case "get_attr":
                name = str(node.target)
                return self._fake(
                    self._constants[name] if name in self._constants else operator.attrgetter(name)(self._net)
                )
            case "call_module":
                module = self._net.get_submodule(str(node.target))
                state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
                fakes: dict[str, Tensor] = {name: self._fake(tensor) for name, tensor in state.items()}
                before = ModuleState(module.named_modules())
                try:
                    with random_state_kept(module.modules()):
                        return torch.func.functional_call(module, fakes, args, kwargs)
                finally:
                    before.restore()
            case "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _fake(self, tensor: Tensor) -> Tensor:
        return self._mode.from_tensor(tensor.detach())
