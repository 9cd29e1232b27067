"""What a forward may assign on modules, kept while it is traced and put back afterwards."""

from collections.abc import Iterable
from typing import Any

from torch import nn

__all__ = ["ModuleState"]

_DICTIONARIES = ("_parameters", "_buffers", "_modules")


class ModuleState:
    """A snapshot of modules' attributes, of the entries of their dictionaries, and of the lists among their attributes."""

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]):
        self._dictionaries: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self._lists: list[tuple[str, list[Any], list[Any]]] = []
        for name, module in modules:
            own = vars(module)
            for live in (own, *(own[key] for key in _DICTIONARIES if key in own)):  # TorchScript keeps them elsewhere
                self._dictionaries.append((name, live, dict(live)))
            lists = [(key, value) for key, value in vars(module).items() if type(value) is list]
            self._lists += [(_join(name, key), value, list(value)) for key, value in lists]

    def restore(self) -> str | None:
        """Put everything back; the qualified name of the first attribute that had changed, or None."""
        changed = [_join(name, key) for name, live, before in self._dictionaries for key in _restore(live, before)]
        for name, live, before in self._lists:
            if len(live) != len(before):
                live[:] = before
                changed.append(name)
        return changed[0] if changed else None


def _restore(live: dict[str, Any], before: dict[str, Any]) -> list[str]:
    changed = [key for key in {**live, **before} if live.get(key, live) is not before.get(key, live)]
    for key in changed:
        if key in before:
            live[key] = before[key]
        else:
            del live[key]
    return changed


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)
