"""Identities go, and nothing else."""

from typing import Any

import torch
import torch.nn.functional as F
from passing import calls, done, passed
from torch import Tensor, nn
from torch.fx import symbolic_trace

from fxfreeze.passes.remove_identity import remove_identity


def test_dropout_in_eval_mode_and_identity_go() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        y = net.none(net.drop(x.sin()))
        return F.dropout(y, 0.3, training=net.training).cos()

    segment = passed([remove_identity], run, drop=nn.Dropout(0.5), none=nn.Identity())
    assert len(done(segment, "remove_identity")) == 3
    assert set(calls(segment)) == {"placeholder", "sin", "cos", "output"}


def test_a_writer_behind_an_identity_writes_into_the_same_memory() -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        y = x.sin()
        net.drop(y).mul_(2)
        return y + 1

    assert done(passed([remove_identity], run, drop=nn.Dropout(0.5)), "remove_identity")


def test_an_active_dropout_stays() -> None:
    graph = symbolic_trace(nn.Sequential(nn.Dropout(), nn.Dropout2d()))
    assert remove_identity(graph) == []
    assert [n.op for n in graph.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]


def test_other_dtypes() -> None:
    segment = passed([remove_identity], lambda net, x: net.drop(x.sin()), dtype=torch.float64, drop=nn.Dropout())
    assert done(segment, "remove_identity")
