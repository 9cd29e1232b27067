"""What counts for the frozen part's values and changes, while training goes on or between two runs."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loader_runs import BATCH, COUNT, PROBES, Net, Samples, Training, difference, folders, make_net
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.utils.data import DataLoader

from fxfreeze.cache.loader import CachedLoader

STEPS = -(-COUNT // BATCH)  # an epoch

pytestmark = pytest.mark.filterwarnings("ignore:frozen module")


# ------------------------------------------------------------------------------------------------------------- settings


class Kept(nn.Module):
    """Can't be traced, so it runs as it is."""

    slope = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Conv2d(4, 4, 1)
        self.number, self.tensor, self.options, self.act = 1.0, torch.ones(1), {"a": [1.0]}, nn.LeakyReLU(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.linear(x))
        if x.sum() > 1e9:
            return x
        return torch.sin(x * self.number * self.tensor * self.options["a"][0] * self.slope)


class Doubled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 2.0

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.factor


def net_with(*layers: nn.Module) -> Net:
    net = make_net()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for layer in layers:
            net.stem.append(layer)
            if isinstance(layer, Kept):
                layer.linear.reset_parameters()
    return net


def _scaled() -> Net:
    net = make_net()
    parametrize.register_parametrization(net.stem[0], "weight", Doubled())
    return net


CHANGES: dict[str, tuple[Callable[[], Net], Callable[[Any], Any]]] = {
    "a slope": (lambda: net_with(nn.LeakyReLU(0.1)), lambda stem: setattr(stem[3], "negative_slope", 0.5)),
    "a word": (lambda: net_with(nn.GELU()), lambda stem: setattr(stem[3], "approximate", "tanh")),
    "a group norm's eps": (lambda: net_with(nn.GroupNorm(2, 4)), lambda stem: setattr(stem[3], "eps", 0.5)),
    "padding": (make_net, lambda stem: setattr(stem[0], "padding", (0, 0))),
    "a batch norm's eps": (make_net, lambda stem: setattr(stem[1], "eps", 0.5)),
    "a number": (lambda: net_with(Kept()), lambda stem: setattr(stem[3], "number", 2.0)),
    "another tensor": (lambda: net_with(Kept()), lambda stem: setattr(stem[3], "tensor", torch.ones(1) * 2)),
    "a tensor": (lambda: net_with(Kept()), lambda stem: stem[3].tensor.add_(1)),
    "an option": (lambda: net_with(Kept()), lambda stem: stem[3].options["a"].__setitem__(0, 2.0)),
    "a class's number": (lambda: net_with(Kept()), lambda stem: setattr(stem[3], "slope", 2.0)),
    "a slope within": (lambda: net_with(Kept()), lambda stem: setattr(stem[3].act, "negative_slope", 0.9)),
    "a parametrization's": (_scaled, lambda stem: setattr(stem[0].parametrizations.weight[0], "factor", -1.0)),
    "pruning": (make_net, lambda stem: prune.l1_unstructured(stem[0], "weight", 0.5)),
    "a parametrization": (make_net, lambda stem: parametrize.register_parametrization(stem[0], "weight", Doubled())),
}


@pytest.mark.parametrize(
    "at", [2, 2 * STEPS, 2 * STEPS + 2], ids=["while it fills", "between epochs", "while it serves"]
)
@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_of_the_frozen_part(tmp_path: Path, name: str, at: int) -> None:
    """Nothing that was computed with another is served, nor stored for it."""
    make, change = CHANGES[name]
    runs = [Training(directory, net=make()) for directory in (tmp_path, None)]
    for run in runs:
        run.epochs(5, before=lambda step, run=run: change(run.net.stem) if step == at else None)
    assert difference(*runs) == ""
    assert all(runs[0].given[-STEPS:])
    again = [Training(directory, net=make()).epochs(1) for directory in (tmp_path, None)]
    assert difference(*again) == ""


def test_a_class_s_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [Training(directory, net=net_with(Kept())) for directory in (tmp_path, None)]
    for number in (1.0, 2.0):
        monkeypatch.setattr(Kept, "slope", number)
        for run in runs:
            run.epochs(2)
    assert difference(*runs) == ""


def test_switches_of_torch(tmp_path: Path) -> None:
    """The same convolution by another library has other last bits."""
    runs = [Training(tmp_path), Training(None)]
    for epoch in range(6):
        before = torch.backends.mkldnn.set_flags(epoch % 2 == 0)[0]
        try:
            for run in runs:
                run.epochs(1)
        finally:
            torch.backends.mkldnn.set_flags(before)
    assert difference(*runs) == ""
    assert len(folders(tmp_path)) == 2
    assert runs[0].given[-2 * STEPS :] == [1] * 2 * STEPS


# ----------------------------------------------------------------------------------------------------------------- code

HEAD = """
import torch
import torch.nn.functional as F
from torch import nn
"""
CODES = {
    "a module kept whole": """
class Part(nn.Module):
    def forward(self, x):
        return x if x.sum() > 1e9 else ACT(x)
""",
    "a class's constant": """
class Part(nn.Module):
    scale = len("ACT")
    def forward(self, x):
        return x if x.sum() > 1e9 else x * self.scale
""",
    "a function that is wrapped": """
def act(x):
    return ACT(x)
class Part(nn.Module):
    def forward(self, x):
        return torch.fx._symbolic_trace._create_wrapped_func(act)(x)
""",
    "an autograd function": """
class Act(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return ACT(x)
    @staticmethod
    def backward(ctx, grad):
        return grad
class Part(nn.Module):
    def forward(self, x):
        return Act.apply(x)
""",
    "a custom operator": """
@torch.library.custom_op("fxfreeze_tests::act", mutates_args=())
def act(x: torch.Tensor) -> torch.Tensor:
    return ACT(x).clone()
@act.register_fake
def _(x):
    return torch.empty_like(x)
class Part(nn.Module):
    def forward(self, x):
        return torch.ops.fxfreeze_tests.act(x)
""",
    "a parametrization": """
class Weight(nn.Module):
    def forward(self, weight):
        return ACT(weight)
class Part(nn.Conv2d):
    def __init__(self):
        super().__init__(4, 4, 1)
        nn.init.constant_(self.weight, -0.5)
        nn.init.zeros_(self.bias)
        nn.utils.parametrize.register_parametrization(self, "weight", Weight())
""",
}


def edited(source: str, act: str) -> Net:
    """With a part of a module that has this source."""
    namespace: dict[str, Any] = {"__name__": "edited.module"}
    exec(HEAD + source.replace("ACT", act), namespace)
    return net_with(namespace["Part"]())


@pytest.mark.parametrize("name", CODES)
def test_code_that_was_edited_between_two_runs(tmp_path: Path, name: str) -> None:
    Training(tmp_path, net=edited(CODES[name], "F.relu")).epochs(1)
    again = Training(tmp_path, net=edited(CODES[name], "F.relu"))
    assert all(again.epochs(2).given[1:])
    runs = [Training(directory, net=edited(CODES[name], "torch.cos")) for directory in (tmp_path, None)]
    for run in runs:
        run.epochs(2)
    assert difference(*runs) == ""
    assert len(folders(tmp_path)) == 2


# ---------------------------------------------------------------------------------------------------------- batch sizes


class Whole(nn.Module):
    """Can't be traced; a row of a batch of two is another in the last bits than one of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1))
        return x if x.sum() > 1e9 else nn.functional.gelu(self.second(x))


class Flat(nn.Module):
    """[B, 1, 8, 8] -> [B, 3]"""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.stem = Whole() if whole else nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU())
        self.mid, self.fc = nn.Linear(64, 64), nn.Linear(64, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mid(self.stem(x)).tanh())


def flat(*, whole: bool) -> Flat:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Flat(whole)


@pytest.mark.parametrize("count", [33, 35, 41])
def test_a_partial_batch_of_a_module_kept_whole(tmp_path: Path, count: int) -> None:
    runs = [Training(folder, net=flat(whole=True), data=Samples(count)) for folder in (tmp_path, None)]
    for run in runs:
        run.epochs(4)
    assert difference(*runs) == ""
    assert runs[0].given[-1] == 1


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("size", [3, 50])
def test_an_evaluation_in_other_batches(tmp_path: Path, size: int, whole: bool) -> None:
    """Of the training set, in the same folder, by a loader of its own: what it stores serves training."""
    options: dict[str, Any] = {"milestones": {"stem": 25}, "wrapped": {"batch_size": 2}}
    runs = [Training(folder, net=flat(whole=whole), data=Samples(50), **options) for folder in (tmp_path, None)]
    evaluation = DataLoader(Samples(50), batch_size=size)
    cached = CachedLoader(evaluation, runs[0].model, tmp_path, when="always")
    for run, loader in zip(runs, (cached, evaluation), strict=True):
        for _ in range(4):
            run.epochs(1)
            run.model.eval()
            outputs = []
            with torch.no_grad():
                for images, *_ in loader:
                    outputs.append(run.model(images))
            run.model.train()
        torch.testing.assert_close(torch.cat(outputs), run.net.eval()(evaluation.dataset.images), rtol=1e-5, atol=1e-6)
        run.model.train()
    assert difference(*runs) == ""
    assert runs[0].given[-1] == 1


# ------------------------------------------------------------------------------------------------------ what is left


def test_an_average_swapped_in_for_each_evaluation(tmp_path: Path) -> None:
    """Its stores do not pile up, and that of the weights in training stays."""
    training = Training(tmp_path).epochs(2)
    [kept] = folders(tmp_path)
    validation = CachedLoader(DataLoader(Samples(20), batch_size=BATCH), training.model, tmp_path, when="always")
    for round in range(5):
        before = copy.deepcopy(training.net.state_dict())
        with torch.no_grad():
            training.net.stem[0].weight.mul_(1.01 + round)
        training.model.eval()
        with torch.no_grad():
            for images, *_ in validation:
                training.model(images)
        training.model.load_state_dict(before)
        training.model.train()
        training.data.taken()
        training.epochs(1)
        assert len(training.data.taken()) == PROBES
        assert len(folders(tmp_path)) <= 3
        assert kept in folders(tmp_path)


def test_another_run_s_store_is_left_alone(tmp_path: Path) -> None:
    """Only what this loader itself began is out of date by its weights."""
    Training(tmp_path).epochs(1)
    [kept] = folders(tmp_path)
    training = Training(tmp_path).epochs(1)
    for _ in range(4):
        with torch.no_grad():
            training.net.stem[0].weight.mul_(1.5)
        training.epochs(1)
    assert len(folders(tmp_path)) == 3
    assert kept in folders(tmp_path)
