"""Copies that stand in for an optimizer's parameter groups while its step runs."""

from __future__ import annotations

import functools
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

# The entries of a group that list its parameters. Beside lr, only in these does a copy differ from the user's group.
_MEMBERS = ("params", "param_names")


class GroupCopy(NamedTuple):
    """One copy of a user's group: what the optimizer sees during a step."""

    user: dict[str, Any]
    entries: dict[str, Any]  # the copy itself, which the step may change
    given: dict[str, Any]  # its entries before the step
    versions: dict[str, int]  # and the versions of those that are tensors
    factor: float
    place: float  # the last of its units: the larger, the nearer to the head

    @classmethod
    def of(cls, group: dict[str, Any], indices: list[int], factor: float, place: float) -> GroupCopy:
        # A tensor entry is cloned: a step that counts in place would otherwise count once for every copy.
        entries = {key: value.clone() if isinstance(value, Tensor) else value for key, value in group.items()}
        entries["lr"] = group["lr"] * factor
        for key in _MEMBERS:
            if key in group:
                entries[key] = [group[key][i] for i in indices]
        versions = {key: value._version for key, value in entries.items() if isinstance(value, Tensor)}
        return cls(group, entries, dict(entries), versions, factor, place)

    def write_back(self) -> None:
        """Bring what the step changed into the user's group."""
        for key, value in self.entries.items():
            if key in _MEMBERS or not self._is_changed(key, value):
                continue
            if key != "lr":
                new = value
            elif self.factor:
                new = value / self.factor
            else:
                continue  # a rate of 0 says nothing about the user's
            if isinstance(value, Tensor) and value is self.given.get(key):
                with torch.no_grad():
                    self.user[key].copy_(new)  # changed in place, so the user's tensor is as well
            else:
                self.user[key] = new

    def _is_changed(self, key: str, value: object) -> bool:
        if key not in self.given or isinstance(value, Tensor) != isinstance(self.given[key], Tensor):
            return True
        if isinstance(value, Tensor):
            return value is not self.given[key] or value._version != self.versions[key]
        return value is not self.given[key] and not (isinstance(value, int | float) and value == self.given[key])


class GroupSwap:
    """Copies that stand in for an optimizer's groups while its step runs."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups: list[dict[str, Any]] | None = None  # the user's, while copies stand in for them
        self._copies: list[GroupCopy] = []
        self._is_guarded = False
        self._nested = 0

    def guard(self) -> None:
        """Restore the groups as soon as a step raises: an LR scheduler may look at them next, and calls no hook.

        A compiled caller runs the step as it is: a compiled one would pass the hooks by (measured on torch 2.13).
        """
        step = self._optimizer.step

        @functools.wraps(step)
        def guarded(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
            self._is_guarded = True
            try:
                return step(*args, **kwargs)
            finally:
                self._is_guarded = False
                self.restore()

        self._optimizer.step = MethodType(torch.compiler.disable(guarded), self._optimizer)  # type: ignore[method-assign, no-untyped-call]

    def user_groups(self) -> list[dict[str, Any]]:
        return self._optimizer.param_groups if self._groups is None else self._groups

    def nested(self) -> bool:
        """Whether a step begins inside a step: torch runs the hooks again when a subclass calls super().step().

        Without the guard, which a step called by another way passes by, copies still standing in are those of a step
        that raised.
        """
        if self._groups is not None and self._is_guarded:
            self._nested += 1
            return True
        self.restore()
        return False

    def begin(self, copies: list[GroupCopy]) -> None:
        self._groups, self._copies = self._optimizer.param_groups, copies
        # With nothing live, one group without parameters: some optimizers read param_groups[0].
        alone = {**self._groups[0], "params": []}
        self._optimizer.param_groups = [copy.entries for copy in copies] or [alone]

    def end(self) -> None:
        if self._nested:
            self._nested -= 1
        else:
            self.restore()

    def restore(self) -> None:
        """Put the user's groups back, if copies stand in for them, with what the step changed."""
        self._nested = 0
        if self._groups is None:
            return
        self._optimizer.param_groups, self._groups = self._groups, None
        copies, self._copies = self._copies, []
        for copy in sorted(copies, key=lambda copy: copy.place):
            copy.write_back()
