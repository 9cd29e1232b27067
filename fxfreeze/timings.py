"""What backends were measured to take, kept in the user's cache folder so that no later run needs to find it out again.

A lost or unreadable file costs the measurements, no more.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import operator
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxfreeze.layouts import kind_of
from fxfreeze.machine import chip

__all__ = ["Times", "Timings", "case_of", "default_path"]

_MOST = 2000  # cases kept
_PACKAGES = ("fxfreeze", "torch", "triton", "openvino")


class Times(NamedTuple):
    """call: seconds of one call and of a little that follows it; build: seconds of building it."""

    call: float
    build: float

    @property
    def possible(self) -> bool:
        return 0 < self.call < math.inf and 0 <= self.build < math.inf


def default_path() -> Path | None:
    """``backends.json`` in $XDG_CACHE_HOME/fxfreeze, or in ~/.cache/fxfreeze; None for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fxfreeze" / "backends.json"
    except RuntimeError:
        return None


class Timings:
    """Times by case and backend, in a JSON file that several processes may write: each adds what it measured.

    A case is a graph with the shapes, dtypes and device that it runs with, on a machine with its versions of packages.
    """

    def __init__(self, path: Path | None = None):
        self.path = default_path() if path is None else path
        self._cases = self._read()

    def get(self, case: str) -> dict[str, Times]:
        """What is known of a case, by backend."""
        return dict(self._cases.get(case, {}))

    def add(self, case: str, times: Mapping[str, Times]) -> None:
        """Keep what was measured. A folder that can't be written to is told of once, and forgotten."""
        merged = self._read() | {case: self._cases.get(case, {}) | dict(times)}
        self._cases = dict(list(merged.items())[-_MOST:])
        if self.path is None:
            return
        text = json.dumps({case: {name: list(t) for name, t in known.items()} for case, known in self._cases.items()})
        partial = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(text)
            partial.replace(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            warnings.warn(
                f"the times of backends can't be kept: {error}. A later run measures them again", stacklevel=2
            )

    def _read(self) -> dict[str, dict[str, Times]]:
        if self.path is None:
            return {}
        try:
            cases = json.loads(self.path.read_text())
            read = {case: {name: Times(*map(float, t)) for name, t in known.items()} for case, known in cases.items()}
            return {case: {name: t for name, t in known.items() if t.possible} for case, known in read.items()}
        except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            return {}  # none yet, or not ours: measured again


def case_of(graph: GraphModule, inputs: Sequence[Any], autocast: torch.dtype | None, device: torch.device) -> str:
    """The name of a case: a digest of all that its times depend on."""
    given = [(tuple(x.shape), str(kind_of(x))) if isinstance(x, Tensor) else repr(x) for x in inputs]
    layers = [str(graph.get_submodule(str(n.target))) for n in graph.graph.nodes if n.op == "call_module"]
    dtypes = [str(p.dtype) for n in graph.graph.nodes if n.op == "call_module" for p in _parameters(n, graph)]
    held = [_held(operator.attrgetter(str(n.target))(graph)) for n in graph.graph.nodes if n.op == "get_attr"]
    text = json.dumps([str(graph.graph), layers, dtypes, held, given, str(autocast), _machine(device)])
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def _parameters(node: Node, graph: GraphModule) -> Iterator[Tensor]:
    return graph.get_submodule(str(node.target)).parameters()


def _held(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    return tuple(tensor.shape), str(tensor.dtype)


def _machine(device: torch.device) -> list[str]:
    return [chip(device), str(torch.get_num_threads()), *(f"{name} {_version(name)}" for name in _PACKAGES)]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
