"""The checksum of code: another for any edit that can be seen, the same in any process."""

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from fxfreeze.cache.code import code_digest, is_torchs

BEGIN = """
import functools
import torch
import torch.nn.functional as F
from torch import nn
"""


def thing(source: str) -> Any:
    """``thing`` of a module with that source."""
    namespace: dict[str, Any] = {"__name__": "edited.module"}
    exec(BEGIN + source, namespace)  # as an import does
    return namespace["thing"]


FORWARD = """
class thing(nn.Module):
    slope = 0.1
    options = {"a": [1], "b": (2, {3, 4})}
    def __init__(self): super().__init__()
    def forward(self, x): return helper(F.relu(x) * LIMIT, [v for v in x if v in {"p", "q", "r"}])
    @property
    def rate(self): return 1.0
    @staticmethod
    def named(x, *, most=3): return x
LIMIT = 7
def helper(x, y): return deeper(x) + 1
def deeper(x): return x - 2
"""
EDITS = [
    ("F.relu", "F.gelu"),
    ("slope = 0.1", "slope = 0.2"),
    ("[1]", "[2]"),
    ("{3, 4}", "{3, 5}"),
    ("LIMIT = 7", "LIMIT = 8"),
    ("deeper(x) + 1", "deeper(x) + 1.0"),
    ("x - 2", "x - 3"),
    ('"q"', '"s"'),
    ("return 1.0", "return 2.0"),
    ("most=3", "most=4"),
]


def test_the_same_code() -> None:
    assert code_digest([thing(FORWARD)]) == code_digest([thing("# a comment\n\n" + FORWARD)])


@pytest.mark.parametrize(("old", "new"), EDITS)
def test_an_edit(old: str, new: str) -> None:
    assert FORWARD.count(old) == 1
    assert code_digest([thing(FORWARD)]) != code_digest([thing(FORWARD.replace(old, new))])


def _closure(number: float) -> Callable[..., Any]:
    return lambda x: x * number


def _decorated(number: float) -> Callable[..., Any]:
    return torch.no_grad()(_closure(number))


@pytest.mark.parametrize("make", [_closure, _decorated, lambda n: partial(_closure, n), lambda n: partial(F.relu, n=n)])
def test_what_a_function_carries_along(make: Callable[[float], Any]) -> None:
    assert code_digest([make(1.0)]) == code_digest([make(1.0)]) != code_digest([make(2.0)])


def test_a_base_class_and_a_function_of_another_name() -> None:
    source = "class Base:\n  def f(self, x): return x + 1\nclass thing(Base):\n  pass"
    assert code_digest([thing(source)]) != code_digest([thing(source.replace("+ 1", "+ 2"))])
    assert code_digest([F.relu]) != code_digest([torch.tanh])
    imported = "from torch import sin as act\ndef thing(x): return act(x)"
    assert code_digest([thing(imported)]) != code_digest([thing(imported.replace("sin", "cos"))])


def test_a_custom_operator_s_kernel() -> None:
    def operator(name: str, number: float) -> str:
        @torch.library.custom_op(f"fxfreeze_tests::{name}", mutates_args=())
        def scaled(x: torch.Tensor) -> torch.Tensor:
            return x * number

        packet = getattr(torch.ops.fxfreeze_tests, name)
        assert not is_torchs(packet.default)
        caller = thing(f"def thing(x): return torch.ops.fxfreeze_tests.{name}(x)")
        return code_digest([packet.default, packet, caller])

    assert operator("scaled", 1.0) == operator("scaled", 1.0) != operator("scaled", 2.0)
    assert is_torchs(torch.ops.aten.add.Tensor)
    assert is_torchs(torch.tanh)


def test_itself_and_each_other() -> None:
    """Functions that call themselves, and classes that refer to each other."""
    source = "class A:\n  def f(self): return B(), thing\nclass B:\n  def g(self): return A()\ndef thing(x): return thing(x), A"
    assert code_digest([thing(source)]) == code_digest([thing(source)])


def test_another_process() -> None:
    """With other hashes of strings, and so other orders of sets."""
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_code as t; "
        "print(t.code_digest([t.thing(t.FORWARD), t._decorated(1.0)]))"
    )
    done = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert done[0] == done[1] == code_digest([thing(FORWARD), _decorated(1.0)])
