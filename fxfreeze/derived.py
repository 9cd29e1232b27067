"""State derived from a frozen network, and the signs that it is out of date.

It may be dropped at any time and is never saved; only the decisions outlive it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fxfreeze.builder import Decision, DecisionKey
from fxfreeze.readings import Readings, Sign, sign_of
from fxfreeze.surgery import Surgery
from fxfreeze.units import Ownership, Unit

__all__ = ["Derived", "frozen_tensors"]


class Derived:
    """Plans at the current depth, and lists that save walking the modules at each forward.

    decisions: how each segment was decided to run; ahead: how many training steps will run what is built now.
    """

    surgery: Surgery

    def __init__(
        self,
        net: nn.Module,
        ownership: Ownership,
        precision: torch.dtype | None,
        backend: str,
        ahead: Callable[[], float],
    ):
        self.net = net
        self.ownership = ownership
        self.precision = precision
        self.backend = backend
        self.decisions: dict[DecisionKey, Decision] = {}
        self.warned: set[str] = set()
        self.ahead = ahead
        self.changes: Counter[str] = Counter()  # of tensors that frozen parts read from outside
        self.start(0)

    def start(self, depth: int) -> None:
        """Forget everything derived; what is asked for next is made for ``depth``."""
        frozen = self.ownership.units[:depth]
        self.depth = depth
        self.modules = list(self.net.modules())
        self._parents = [m for m in self.modules if m._modules]
        self._children = self._tree()
        self.frozen = [self.net.get_submodule(name) for unit in frozen for name in unit.modules]
        self._slots = [(held, key) for _, held, key in frozen_tensors(self.net, self.ownership.units, depth)]
        self._seen: list[Sign] = []
        spent = self.surgery.seconds if "surgery" in self.__dict__ else 0.0
        self.surgery = Surgery(
            self.net,
            self.ownership,
            depth,
            self.precision,
            self.backend,
            self.decisions,
            self.ahead,
            Readings({(id(held), key) for held, key in self._slots}),
            self.changes,
            self.warned,
            spent,
        )

    def current(self) -> Surgery:
        """The plans: new ones if a frozen tensor, or one that they read, is another, lies elsewhere, or was written into."""
        for owner, name in self._slots:
            tensor = owner.get(name)
            if isinstance(tensor, nn.Parameter) and tensor.requires_grad and tensor.is_leaf:
                tensor.requires_grad_(False)  # thawed behind the model's back, or put in another's place
        seen = self.signs()
        changed = self.surgery.readings.changed()
        if changed is not None:
            self.changes[changed] += 1
        if changed is not None or seen != self._seen or self._children != self._tree():
            self.start(self.depth)
            self._seen = self.signs()
        return self.surgery

    def signs(self) -> list[Sign]:
        """What differs once a frozen tensor is another, lies elsewhere, or was written into."""
        tensors = [tensor for owner, name in self._slots if (tensor := owner.get(name)) is not None]
        return [sign_of(tensor) for tensor in tensors]

    def _tree(self) -> list[int]:
        """What differs once a module was put in another's place, added or taken away."""
        return [id(child) for parent in self._parents for child in parent._modules.values()]

    def look_again(self) -> None:
        """Take what the frozen tensors are now for what they were when the plans were made."""
        self._seen = self.signs()

    def assert_frozen(self) -> None:
        """Frozen modules stay in eval, whatever the trainer's ``model.train()`` did."""
        for module in self.frozen:
            if module.training:
                module.training = False

    def modes(self) -> tuple[Any, ...]:
        """Training flags and numbers of hooks: what besides the inputs decides a trace."""
        hooks = [
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) + len(m._backward_pre_hooks)
            for m in self.modules
        ]
        return tuple([m.training for m in self.modules]), tuple(hooks) if any(hooks) else ()


def frozen_tensors(net: nn.Module, units: Sequence[Unit], depth: int) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Where the tensors of the first ``depth`` units are kept now: (qualified name, dictionary, key in it).

    Parameters that were registered since, by a parametrization or by pruning, are their module's.
    """
    live = {name for unit in units[depth:] for name in (*unit.parameters, *unit.modules)}
    seen = {id(module) for name, module in net.named_modules() if name in live}
    found: dict[str, tuple[dict[str, Any], str]] = {}
    for unit in units[:depth]:
        for name in unit.modules:
            for path, module in net.get_submodule(name).named_modules(prefix=name):
                if id(module) not in seen:
                    seen.add(id(module))
                    for held in (module._buffers, module._parameters):
                        found |= {f"{path}.{key}": (held, key) for key in held}
        for name in unit.parameters:
            path, _, key = name.rpartition(".")
            parameters: dict[str, Any] = net.get_submodule(path)._parameters
            found[name] = parameters, key
    yield from ((name, held, key) for name, (held, key) in found.items() if name not in live)
