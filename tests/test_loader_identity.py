"""What a CachedLoader takes for its own: of this frozen part and this data set, and nothing else, row by row."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loader_runs import (
    COUNT,
    PROBES,
    Net,
    Samples,
    Training,
    difference,
    folders,
    fresh_rows,
    make_net,
    wrong_rows,
)
from store_samples import rewrite
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.data import SubsetRandomSampler

import fxfreeze
from fxfreeze.cache import CacheRefusal, Store, probes
from fxfreeze.cache.identity import store_name

STEPS = -(-COUNT // 8)  # an epoch
KEY = {
    *("network", "depth", "unit", "graph", "code", "weights", "dtype", "device", "backend", "numerics"),
    *("inputs", "batch"),
    *("data", "length", "samples", "parts", "views", "stored as"),
}


def manifest(folder: Path) -> Any:
    return json.loads((folder / "manifest.json").read_bytes())


def assert_new(directory: Path, *, straight: Training, cached: Training) -> None:
    """Of a run on a directory with another's store: nothing of that was read, a store of its own was filled."""
    before = set(folders(directory))
    cached.data.taken()
    cached.epochs(2)
    assert difference(cached, straight.epochs(2)) == ""
    [mine] = set(folders(directory)) - before
    read = cached.data.taken()
    assert sorted({*read}) == list(range(len(cached.data)))
    if cached.model.precision is None:
        assert wrong_rows(directory / mine, cached.net, cached.data) == []


# ------------------------------------------------------------------------------------------------------ the frozen part


def _bit(tensor: Tensor) -> None:
    """Changes the last bit of the last number."""
    with torch.no_grad():
        tensor.view(-1).view(torch.int32)[-1] ^= 1


def weight(net: Net) -> None:
    _bit(net.stem[0].weight)


def bias(net: Net) -> None:
    _bit(net.stem[1].bias)


def running_mean(net: Net) -> None:
    _bit(net.stem[1].running_mean)


def running_var(net: Net) -> None:
    _bit(net.stem[1].running_var)


def eps(net: Net) -> None:
    net.stem[1].eps = 2e-5


def padding_mode(net: Net) -> None:
    net.stem[0] = _with_weights_of(nn.Conv2d(1, 4, 3, padding=1, bias=False, padding_mode="circular"), net.stem[0])


def dilation(net: Net) -> None:
    net.stem[0] = _with_weights_of(nn.Conv2d(1, 4, 3, padding=2, dilation=2, bias=False), net.stem[0])


def activation(net: Net) -> None:
    net.stem[2] = nn.GELU()


def slope(net: Net) -> None:
    net.stem[2] = nn.LeakyReLU(0.01)


def steeper(net: Net) -> None:
    net.stem[2] = nn.LeakyReLU(0.02)


def _with_weights_of(new: nn.Module, old: nn.Module) -> nn.Module:
    new.load_state_dict(old.state_dict())
    return new


def double(net: Net) -> None:
    net.double()


Change = Callable[[Net], None]
CHANGES = [weight, bias, running_mean, running_var, eps, padding_mode, dilation, activation]


def changed(change: Change) -> Net:
    net = make_net()
    change(net)
    return net


class Kept(nn.Module):
    """Can't be traced, so it runs as it is. value: what it computes with, kept in one way or another."""

    def __init__(self, name: str, value: Any) -> None:
        super().__init__()
        setattr(self, name, value)
        self._name = name

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 1e9:
            return x
        return torch.sin(x * _number(getattr(self, self._name)))


class Constant(nn.Module):
    """Traced; its tensor is neither a parameter nor a buffer."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = torch.tensor(factor)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x * self.factor)


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self._factor = factor

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self._factor


class Holder:
    def __init__(self, value: float) -> None:
        self.value = value


def _number(value: Any) -> Any:
    if isinstance(value, Holder):
        return value.value
    if isinstance(value, dict):
        return value["a"]
    if callable(value):
        return value()
    return next(iter(value)) if isinstance(value, list | set) else value


def _hook(net: Net, factor: float) -> None:
    net.stem[1].register_forward_hook(lambda module, inputs, output: torch.sin(output * factor))


def _pre_hook(net: Net, factor: float) -> None:
    net.stem[1].register_forward_pre_hook(lambda module, inputs: (torch.sin(inputs[0] * factor),))


def _parametrized(net: Net, factor: float) -> None:
    parametrize.register_parametrization(net.stem[0], "weight", Scaled(factor))


HELD: dict[str, Callable[[Net, float], Any]] = {
    "a number": lambda net, factor: net.stem.append(Kept("factor", factor)),
    "a private number": lambda net, factor: net.stem.append(Kept("_factor", factor)),
    "a list": lambda net, factor: net.stem.append(Kept("factor", [factor])),
    "a dict": lambda net, factor: net.stem.append(Kept("factor", {"a": factor})),
    "a set": lambda net, factor: net.stem.append(Kept("factor", {factor})),
    "a tensor": lambda net, factor: net.stem.append(Kept("factor", torch.tensor(factor))),
    "an array": lambda net, factor: net.stem.append(Kept("factor", np.float64(factor))),
    "an object": lambda net, factor: net.stem.append(Kept("factor", Holder(factor))),
    "a function": lambda net, factor: net.stem.append(Kept("factor", lambda: factor)),
    "a constant": lambda net, factor: net.stem.append(Constant(factor)),
    "a hook": _hook,
    "a hook before": _pre_hook,
    "a parametrization": _parametrized,
}


@pytest.mark.filterwarnings("ignore:frozen module")
@pytest.mark.parametrize("how", HELD)
def test_what_a_frozen_module_holds_beside_weights(tmp_path: Path, how: str) -> None:
    """Two networks that differ in nothing else never share rows; refused or not stored is right too."""

    def run(directory: Path | None, factor: float) -> Training:
        net = make_net()
        HELD[how](net, factor)
        return Training(directory, net=net, milestones={"mid": 0})

    try:
        run(tmp_path, 2.0).epochs(1)
        other = run(tmp_path, 3.0).epochs(2)
    except CacheRefusal:
        return
    assert difference(other, run(None, 3.0).epochs(2)) == ""


@pytest.mark.filterwarnings("ignore:frozen module")
def test_a_hook_on_a_frozen_module(tmp_path: Path) -> None:
    """It would not be called in a cached epoch, whatever rows of the network without it are there."""
    Training(tmp_path, milestones={"mid": 0}).epochs(1)
    net = make_net()
    _hook(net, 3.0)
    with pytest.raises(CacheRefusal, match=r"the frozen part can't be cached: .* has a forward hook"):
        Training(tmp_path, net=net, milestones={"mid": 0}).epochs(2)


@pytest.mark.parametrize("change", CHANGES)
def test_another_frozen_part(tmp_path: Path, change: Change) -> None:
    Training(tmp_path).epochs(1)
    assert_new(tmp_path, straight=Training(None, net=changed(change)), cached=Training(tmp_path, net=changed(change)))


def test_a_constant_in_the_graph(tmp_path: Path) -> None:
    Training(tmp_path, net=changed(slope)).epochs(1)
    assert_new(tmp_path, straight=Training(None, net=changed(steeper)), cached=Training(tmp_path, net=changed(steeper)))


def test_another_stride_of_a_deeper_unit(tmp_path: Path) -> None:
    options: dict[str, Any] = {"milestones": {"mid": 0}}
    Training(tmp_path, **options).epochs(1)
    other = Training(tmp_path, net=make_net(stride=1), **options)
    assert_new(tmp_path, straight=Training(None, net=make_net(stride=1), **options), cached=other)


def test_a_live_part_does_not_count(tmp_path: Path) -> None:
    """What is after the boundary may be anything: the store is of the prefix."""
    Training(tmp_path).epochs(1)
    other, straight = make_net(), make_net()
    for net in (other, straight):
        _bit(net.mid[0].weight)
        net.fc = _with_weights_of(nn.Linear(6, 3), net.fc)
    training = Training(tmp_path, net=other)
    training.data.taken()
    training.epochs(2)
    assert len(training.data.taken()) == 2 * PROBES
    assert difference(training, Training(None, net=straight).epochs(2)) == ""
    assert len(folders(tmp_path)) == 1


def test_another_precision(tmp_path: Path) -> None:
    Training(tmp_path).epochs(1)
    assert_new(tmp_path, straight=Training(None, precision="bf16"), cached=Training(tmp_path, precision="bf16"))
    assert_new(tmp_path, straight=Training(None, precision="fp16"), cached=Training(tmp_path, precision="fp16"))


def test_under_autocast(tmp_path: Path) -> None:
    Training(tmp_path).epochs(1)
    with torch.autocast("cpu", torch.bfloat16):
        cached = Training(tmp_path).epochs(2)
        straight = Training(None).epochs(2)
    assert difference(cached, straight) == ""
    assert len(folders(tmp_path)) == 2


def test_another_dtype(tmp_path: Path) -> None:
    Training(tmp_path).epochs(1)

    def samples() -> Samples:
        data = Samples()
        data.images = data.images.double()
        return data

    net = changed(double)
    cached = Training(tmp_path, net=net, data=samples())
    assert_new(tmp_path, straight=Training(None, net=changed(double), data=samples()), cached=cached)


def test_another_depth(tmp_path: Path) -> None:
    """A shallower run does not take the deeper store for its own; a deeper one goes on from the shallower."""
    Training(tmp_path, milestones={"mid": 0}).epochs(1)
    assert_new(tmp_path, straight=Training(None), cached=Training(tmp_path))
    assert [manifest(tmp_path / name)["identity"]["depth"] for name in folders(tmp_path)] == [1, 2]


def test_other_units(tmp_path: Path) -> None:
    """The same depth of another list of units."""
    Training(tmp_path).epochs(1)
    grouped = Training(tmp_path)
    grouped.model = fxfreeze.compile(make_net(), fxfreeze.Milestones({"stem": 0}), units=["stem", "deep", "fc"])
    assert grouped.model.depth == 1
    loader = fxfreeze.CachedLoader(grouped.plain, grouped.model, tmp_path, when="always")
    grouped.data.taken()
    for images, *_ in loader:
        grouped.model(images)
    assert len(folders(tmp_path)) == 2


@pytest.mark.parametrize("size", [8, 12])
def test_another_example_shape(tmp_path: Path, size: int) -> None:
    Training(tmp_path, data=Samples(size=20 - size)).epochs(1)
    cached = Training(tmp_path, data=Samples(size=size))
    assert_new(tmp_path, straight=Training(None, data=Samples(size=size)), cached=cached)


def test_another_layout(tmp_path: Path) -> None:
    """The same values in another order in memory: what computes from them may differ in the last bits."""
    Training(tmp_path).epochs(1)
    wrapped = {"collate_fn": _transposed}
    assert_new(tmp_path, straight=Training(None, wrapped=wrapped), cached=Training(tmp_path, wrapped=wrapped))


def _transposed(samples: list[Any]) -> Any:
    images, classes, indices = torch.utils.data.default_collate(samples)
    return [images.transpose(2, 3).contiguous().transpose(2, 3), classes, indices]


# ----------------------------------------------------------------------------------------------------- each field alone


def test_the_key(tmp_path: Path) -> None:
    Training(tmp_path).epochs(1)
    assert manifest(tmp_path / folders(tmp_path)[0])["identity"].keys() == KEY


@pytest.mark.parametrize("moved", [False, True], ids=["in its place", "in that of its key"])
@pytest.mark.parametrize("field", sorted(KEY))
def test_each_field_alone(tmp_path: Path, field: str, moved: bool) -> None:
    """A store, intact but of another key, has rows that must not be read. They are the right ones: reading would show
    in what the data set is asked for alone."""
    Training(tmp_path).epochs(1)
    store = tmp_path / folders(tmp_path)[0]

    def change(body: dict[str, Any]) -> None:
        value = body["identity"][field]
        body["identity"][field] = value + 1 if field == "length" else 2 if field == "depth" else f"{value}."

    rewrite(store, change)
    if moved:
        store.rename(tmp_path / store_name(manifest(store)["identity"]))
    training = Training(tmp_path)
    training.data.taken()
    training.epochs(1)
    read = training.data.taken()
    assert {*read} == {*range(COUNT)}
    assert difference(training, Training(None).epochs(1)) == ""
    training.epochs(1)
    assert training.given[-STEPS:] == [1] * STEPS
    mine = [path for path in tmp_path.iterdir() if store_name(manifest(path)["identity"]) == store.name]
    assert wrong_rows(mine[0], training.net, training.data) == []


# --------------------------------------------------------------------------------------------------------- the data set


def last_pixel(data: Samples, index: int) -> None:
    _bit(data.images[index])


def label(data: Samples, index: int) -> None:
    data.classes[index] = (data.classes[index] + 1) % 3


def swapped(data: Samples, index: int) -> None:
    order = torch.arange(len(data))
    order[[index, 1]] = torch.tensor([1, index])
    data.images, data.classes = data.images[order], data.classes[order]


DataChange = Callable[[Samples, int], None]


def with_change(change: DataChange, index: int) -> Samples:
    data = Samples()
    data.images = data.images.clone()
    change(data, index)
    return data


def test_the_probes() -> None:
    assert len(probes.probed(COUNT)) == PROBES
    assert 1 not in probes.probed(COUNT)  # that samples are swapped with


@pytest.mark.parametrize("index", probes.probed(COUNT))
@pytest.mark.parametrize("change", [last_pixel, label, swapped])
def test_another_data_set(tmp_path: Path, change: DataChange, index: int) -> None:
    """In any probed sample, by a bit."""
    Training(tmp_path).epochs(1)
    cached = Training(tmp_path, data=with_change(change, index))
    assert_new(tmp_path, straight=Training(None, data=with_change(change, index)), cached=cached)


def test_a_longer_or_shorter_data_set(tmp_path: Path) -> None:
    Training(tmp_path).epochs(1)
    for count in (COUNT - 1, COUNT + 1):
        cached = Training(tmp_path, data=Samples(count))
        assert_new(tmp_path, straight=Training(None, data=Samples(count)), cached=cached)


@pytest.mark.parametrize(("index", "placement"), [*zip(probes.probed(COUNT), ["disk", "ram"], strict=False)])
@pytest.mark.parametrize("change", [last_pixel, label, swapped])
def test_the_data_set_changes_between_epochs(tmp_path: Path, change: DataChange, index: int, placement: str) -> None:
    runs = [Training(tmp_path, data=Samples(), placement=placement), Training(None, data=Samples())]
    for training in runs:
        training.epochs(2)
        change(training.data, index)
        training.epochs(2)
    assert difference(*runs) == ""
    assert "the data set is another than it was" in runs[0].notes
    assert runs[0].given == [0] * STEPS + [1] * STEPS + [0] * STEPS + [1] * STEPS


def test_the_data_set_changes_before_anything_is_frozen(tmp_path: Path) -> None:
    """What is stored later is of the data set as it is then, for other runs too."""
    options: dict[str, Any] = {"milestones": {"stem": STEPS}}
    training = Training(tmp_path, data=Samples(), **options).epochs(1)
    before = training.loader._data.identity["samples"]
    last_pixel(training.data, probes.probed(COUNT)[0])
    training.epochs(2)
    straight = Training(None, data=Samples(), **options).epochs(1)
    last_pixel(straight.data, probes.probed(COUNT)[0])
    assert difference(training, straight.epochs(2)) == ""
    [name] = folders(tmp_path)
    held = manifest(tmp_path / name)["identity"]["samples"]
    assert held == training.loader._data.identity["samples"] != before


@pytest.mark.parametrize("count", [COUNT + 12, COUNT - 12])
def test_the_data_set_s_length_changes_between_epochs(tmp_path: Path, count: int) -> None:
    """A data set that grows while training goes on, as one that is being recorded does."""
    runs = [Training(tmp_path, data=Samples()), Training(None, data=Samples())]
    for training in runs:
        training.epochs(2)
        other = Samples(count)
        training.data.images, training.data.classes = other.images, other.classes
        training.epochs(2)
    assert difference(*runs) == ""


def test_fingerprint_in_place_of_probes(tmp_path: Path) -> None:
    """Samples that change under the same fingerprint are the user's word against the probes'; another one is another store."""
    first = Training(tmp_path, fingerprint="v1").epochs(2)
    assert manifest(tmp_path / folders(tmp_path)[0])["identity"]["samples"] == "fingerprint v1"
    assert first.given[-1] == 1
    other = Training(tmp_path, fingerprint="v2")
    assert_new(tmp_path, straight=Training(None), cached=other)
    again = Training(tmp_path, fingerprint="v1", data=with_change(last_pixel, probes.probed(COUNT)[0]))
    again.epochs(1)
    assert again.given == [1] * STEPS  # the user's word


def test_fingerprint_and_samples_that_change(tmp_path: Path) -> None:
    """Between epochs, under one fingerprint: what is said must be what is done."""
    training = Training(tmp_path, fingerprint="v1").epochs(2)
    last_pixel(training.data, probes.probed(COUNT)[0])
    training.epochs(2)
    if "what is stored is not used any more" in training.notes:
        assert training.given[2 * STEPS : 3 * STEPS] == [0] * STEPS
    else:
        assert training.given[2 * STEPS :] == [1] * 2 * STEPS


class Odd:
    """Contents that no checksum can tell."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


class OddSamples(Samples):
    def __getitem__(self, index: int) -> Any:
        image, label, _ = super().__getitem__(index)
        return image, label, Odd(index)


def _collate_odd(samples: list[Any]) -> Any:
    images, labels, odd = zip(*samples, strict=True)
    return [torch.stack(images), torch.stack(labels), torch.tensor([each.value for each in odd])]


def test_fingerprint_for_samples_whose_contents_can_not_be_told(tmp_path: Path) -> None:
    """The refusal names fingerprint= as the way out."""
    wrapped = {"collate_fn": _collate_odd}
    with pytest.raises(ValueError, match="fingerprint="):
        Training(tmp_path, data=OddSamples(), wrapped=wrapped)
    training = Training(tmp_path, data=OddSamples(), wrapped=wrapped, fingerprint="v1").epochs(2)
    assert training.given[-1] == 1


# ---------------------------------------------------------------------------------------- weights that change meanwhile


def _loaded(training: Training) -> None:
    torch.manual_seed(5)
    other = Net()
    other.load_state_dict(training.net.state_dict())
    with torch.no_grad():
        other.stem[0].weight.mul_(1.5)
    training.model.load_state_dict(other.state_dict())


def _in_place(training: Training) -> None:
    with torch.no_grad():
        training.net.stem[0].weight.add_(0.25)


def _buffer(training: Training) -> None:
    training.net.stem[1].running_mean.add_(0.25)


def _replaced(training: Training) -> None:
    training.net.stem[0].weight = nn.Parameter(training.net.stem[0].weight.detach() * 2)


def _through_data(training: Training) -> None:
    training.net.stem[0].weight.data.add_(0.25)
    training.model.refresh()


MEANWHILE = [_loaded, _in_place, _buffer, _replaced, _through_data]


@pytest.mark.parametrize(
    ("change", "at"),
    [*((_loaded, at) for at in (2, STEPS + 3, 2 * STEPS, 3 * STEPS + 1)), *((c, 2 * STEPS + 2) for c in MEANWHILE)],
)
def test_frozen_weights_change_while_a_batch_is_held(
    tmp_path: Path, change: Callable[[Training], None], at: int
) -> None:
    """Between the loader's giving it and the model's taking it: one of those that fill, one within a cached epoch, the
    first of one, one of the epoch in which mid is stored."""
    options: dict[str, Any] = {"milestones": {"stem": 0, "mid": 3 * STEPS}}
    runs = [Training(tmp_path, **options), Training(None, **options)]
    for training in runs:
        training.epochs(6, before=lambda step, run=training: change(run) if step == at else None)
    assert difference(*runs) == ""
    assert runs[0].given[-1] == 2
    for name in folders(tmp_path):
        if name.startswith("002") and Store(tmp_path / name).complete:
            assert wrong_rows(tmp_path / name, runs[0].net, runs[0].data) == []


@pytest.mark.parametrize("change", MEANWHILE)
def test_frozen_weights_change_between_epochs(tmp_path: Path, change: Callable[[Training], None]) -> None:
    runs = [Training(tmp_path), Training(None)]
    for training in runs:
        training.epochs(2)
        change(training)
        training.epochs(3)
    assert difference(*runs) == ""
    assert len(folders(tmp_path)) == 2
    assert runs[0].given[-2 * STEPS :] == [1] * 2 * STEPS


def test_weights_that_come_back(tmp_path: Path) -> None:
    """An average swapped in for an epoch, as evaluation does, and the old weights after it: their store serves again."""
    training, straight = Training(tmp_path).epochs(2), Training(None).epochs(2)
    for run in (training, straight):
        before = {name: t.clone() for name, t in run.net.stem.state_dict().items()}
        _in_place(run)
        run.epochs(1)
        run.net.stem.load_state_dict(before)
        run.epochs(2)
    assert difference(training, straight) == ""
    training.data.taken()
    training.epochs(1)
    assert len(training.data.taken()) == PROBES


def test_all_batches_held_before_any_is_used(tmp_path: Path) -> None:
    """And the weights change between."""
    runs = [Training(tmp_path), Training(None)]
    for training in runs:
        training.epochs(1)
        training.order.manual_seed(1)
        batches = list(training.loader)
        training.step(batches[3])
        _in_place(training)
        for batch in (*batches[:3], *batches[4:]):
            training.step(batch)
    assert difference(*runs) == ""
    assert runs[0].given[STEPS:] == [1] * STEPS


# --------------------------------------------------------------------------------------------------------- row by row


@pytest.mark.parametrize("placement", ["disk", "ram"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_row_is_what_a_fresh_prefix_computes(tmp_path: Path, depth: int, placement: str) -> None:
    training = Training(tmp_path, milestones={("stem", "mid", "deep")[depth - 1]: 0}, placement=placement).epochs(1)
    received = training.rows_received()
    training.epochs(2)
    right = fresh_rows(training.net, depth, training.data.images)
    assert sorted(received) == list(range(COUNT))
    assert all(len(rows) == 2 for rows in received.values())
    assert all(torch.equal(row, right[index]) for index, rows in received.items() for row in rows)
    assert training.given[STEPS:] == [depth] * 2 * STEPS


def test_a_deeper_store_is_made_from_the_shallower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not from the data set; and the shallower one goes when the deeper is there whole."""
    training = Training(tmp_path, milestones={"stem": 0, "mid": 2 * STEPS}).epochs(2)
    [first] = folders(tmp_path)
    states: list[tuple[str, bool, int]] = []

    def look(name: str) -> None:
        rows = {
            path.parent.name[:3]: sum(shard["rows"] for shard in manifest(path.parent)["shards"])
            for path in tmp_path.glob("*/manifest.json")
        }
        states.append((name, "001" in rows, rows.get("002", 0)))

    monkeypatch.setattr("fxfreeze.cache.files.point", look)
    training.data.taken()
    received = training.rows_received()
    training.epochs(1)
    assert sorted(training.data.taken()) == probes.probed(COUNT)
    assert training.given[-STEPS:] == [1] * STEPS
    assert not (tmp_path / first).exists()
    assert all(there or rows == COUNT for _, there, rows in states)
    assert any(there and rows > 0 for _, there, rows in states)
    right = fresh_rows(training.net, 2, training.data.images)
    assert all(torch.equal(rows[0], right[index]) for index, rows in received.items())
    training.epochs(1)
    assert sorted(training.data.taken()) == probes.probed(COUNT)
    assert training.given[-STEPS:] == [2] * STEPS
    assert difference(training, Training(None, milestones={"stem": 0, "mid": 2 * STEPS}).epochs(4)) == ""


def test_a_part_of_a_deeper_store_takes_nothing_away(tmp_path: Path) -> None:
    """Committed as far as an epoch came that was broken off; then both serve, until the deeper one is whole."""
    options: dict[str, Any] = {"milestones": {"stem": 0, "mid": 2 * STEPS}}
    runs = [Training(tmp_path, **options), Training(None, **options)]
    for run in runs:
        run.epochs(2)
        run.order.manual_seed(2)
        with run.own_random():
            for number, batch in enumerate(run.loader):
                run.step(batch)
                if number == 3:
                    break
        del batch
    rows = [sum(shard["rows"] for shard in manifest(tmp_path / name)["shards"]) for name in folders(tmp_path)]
    assert rows == [COUNT, 4 * 8]
    runs[0].data.taken()
    runs = [run.epochs(2) for run in runs]
    assert sorted(runs[0].data.taken()) == sorted(2 * probes.probed(COUNT))
    assert difference(*runs) == ""
    assert [name[:3] for name in folders(tmp_path)] == ["002"]


def test_holes_that_drop_last_leaves(tmp_path: Path) -> None:
    """Each sample is read once, when it is first asked for."""
    wrapped = {"drop_last": True}
    training, straight = Training(tmp_path, wrapped=wrapped), Training(None, wrapped=wrapped)
    training.data.taken()
    seen: set[int] = set()
    for _ in range(6):
        training.epochs(1)
        straight.data.taken()
        straight.epochs(1)
        asked = straight.data.taken()
        read = training.data.taken()
        assert sorted(read) == sorted([*probes.probed(COUNT), *({*asked} - seen)])
        seen |= {*asked}
    assert len(seen) == COUNT
    assert difference(training, straight) == ""
    assert wrong_rows(tmp_path / folders(tmp_path)[0], training.net, training.data) == []


def test_holes_that_a_sampler_leaves(tmp_path: Path) -> None:
    """A subset first, then others: read are those that no epoch had."""
    subset = list(range(0, COUNT, 2))

    def make(directory: Path | None) -> Training:
        order = torch.Generator()
        sampler = SubsetRandomSampler(list(subset), generator=order)
        run = Training(directory, wrapped={"sampler": sampler, "shuffle": None, "generator": order})
        run.order, run.sampler = order, sampler
        return run

    runs = [make(tmp_path), make(None)]
    for run in runs:
        run.epochs(2)
    assert runs[0].given == [0] * 3 + [1] * 3
    runs[0].data.taken()
    for run in runs:
        run.sampler.indices = list(range(0, COUNT, 2)) + list(range(1, COUNT, 4))
        run.epochs(1)
    read = runs[0].data.taken()
    assert sorted(read) == sorted([*probes.probed(COUNT), *range(1, COUNT, 4)])
    for run in runs:
        run.epochs(1)
    assert sorted(runs[0].data.taken()) == probes.probed(COUNT)
    assert difference(*runs) == ""


def test_a_sampler_that_repeats_samples(tmp_path: Path) -> None:
    """With replacement: the same sample twice in a batch."""

    def make(directory: Path | None) -> Training:
        order = torch.Generator()
        sampler = torch.utils.data.WeightedRandomSampler([1.0] * 5 + [0.1] * (COUNT - 5), COUNT, generator=order)
        return _ordered(Training(directory, wrapped={"sampler": sampler, "shuffle": None, "generator": order}), order)

    training, straight = make(tmp_path).epochs(5), make(None).epochs(5)
    assert difference(training, straight) == ""
    assert wrong_rows(tmp_path / folders(tmp_path)[0], training.net, training.data) == []


def _ordered(training: Training, order: torch.Generator) -> Training:
    training.order = order
    return training


def test_holes_are_filled_through_the_deeper_part(tmp_path: Path) -> None:
    """Of a batch some rows are at mid, some at stem, some nowhere: all come out as a fresh prefix computes them."""
    options: dict[str, Any] = {"milestones": {"stem": 0, "mid": 2 * STEPS - 2}, "wrapped": {"drop_last": True}}
    training, straight = Training(tmp_path, **options), Training(None, **options)
    received = training.rows_received()
    training.epochs(6)
    straight.epochs(6)
    assert difference(training, straight) == ""
    stem, mid = (fresh_rows(training.net, depth, training.data.images) for depth in (1, 2))
    for index, rows in received.items():
        for row in rows:
            assert torch.equal(row, (stem if row.shape == stem[0].shape else mid)[index])


class Flat(nn.Module):
    """[B, 1, 8, 8] -> [B, 3]: a row of a batch of two is another in the last bits than one of eight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid, self.fc = nn.Linear(64, 100), nn.Linear(100, 30), nn.Linear(30, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.mid(self.stem(x.flatten(1)).relu()).relu())


def flat() -> Flat:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Flat()


@pytest.mark.parametrize("count", [41, 42])
def test_a_pass_in_eval_mode_before_training(tmp_path: Path, count: int) -> None:
    """Whose last batch is a small one, and is not computed as a training step computes it."""
    runs = [Training(directory, net=flat(), data=Samples(count)) for directory in (tmp_path, None)]
    for run in runs:
        run.model.eval()
        run.order.manual_seed(55)
        with torch.no_grad():
            for images, *_ in run.loader:
                run.model(images)
        run.model.train()
        run.epochs(3)
    assert difference(*runs) == ""
    assert runs[0].given[-1] == 1


class Growing:
    """Batches of 2, 2, 8, 8, ..."""

    def __init__(self, order: torch.Generator) -> None:
        self.order = order

    def __iter__(self) -> Any:
        samples = torch.randperm(COUNT, generator=self.order).tolist()
        yield from (samples[:2], samples[2:4])
        yield from (samples[start : start + 8] for start in range(4, COUNT, 8))

    def __len__(self) -> int:
        return 2 + (COUNT - 4) // 8


def test_batches_that_grow(tmp_path: Path) -> None:
    """Rows stored of a small batch before there was a larger one."""
    runs = []
    for directory in (tmp_path, None):
        order = torch.Generator()
        wrapped = {"batch_sampler": Growing(order), "batch_size": 1, "shuffle": None, "generator": order}
        runs.append(_ordered(Training(directory, net=flat(), wrapped=wrapped), order).epochs(4))
    assert difference(*runs) == ""


def test_another_run_s_batch_size(tmp_path: Path) -> None:
    """What a run with batches of two has stored, for one with eight."""
    Training(tmp_path, net=flat(), wrapped={"batch_size": 2}).epochs(1)
    assert difference(Training(tmp_path, net=flat()).epochs(3), Training(None, net=flat()).epochs(3)) == ""


def test_another_run_s_store_does_not_take_the_workers(tmp_path: Path) -> None:
    """A complete store of another frozen part is of no use: the samples are read by the loader's workers as without it."""
    Training(tmp_path).epochs(1)
    training = Training(tmp_path, net=changed(weight), wrapped={"num_workers": 1})
    training.data.taken()
    training.epochs(1)
    # By this process: what was asked of the workers before the first call told that the store is of another.
    assert len(training.data.taken()) <= PROBES + 4 * 8


def test_an_iterator_draws_when_it_is_made(tmp_path: Path) -> None:
    """As a DataLoader's: two at once, which share a generator."""
    runs = [Training(tmp_path), Training(None)]
    for run in runs:
        for epoch in range(3):
            run.order.manual_seed(epoch)
            with run.own_random():
                for first, second in zip(run.loader, run.loader, strict=True):
                    run.step(first)
                    run.step(second)
    assert difference(*runs) == ""


def test_epochs_broken_off(tmp_path: Path) -> None:
    runs = [Training(tmp_path), Training(None)]
    for run in runs:
        for epoch in range(8):
            run.order.manual_seed(epoch)
            with run.own_random():
                for number, batch in enumerate(run.loader):
                    run.step(batch)
                    if number == 3:
                        break
    assert difference(*runs) == ""
    assert runs[0].given[-1] == 1


# ------------------------------------------------------------------------------------------------- memory and the tape


@pytest.mark.parametrize("placement", ["disk", "ram"])
def test_batches_are_not_written_over_while_a_tape_holds_them(tmp_path: Path, placement: str) -> None:
    """Three forwards before one backward; the live part's first convolution saves what it was given."""
    weights = []
    for directory in (tmp_path, None):
        training = Training(directory, placement=placement) if directory else Training(None)
        training.epochs(2)
        held: list[Tensor] = []
        for epoch in range(3):
            training.order.manual_seed(10 + epoch)
            for images, classes, _ in training.loader:
                with training.own_random():
                    held.append(F.cross_entropy(training.model(images), classes))
                if len(held) == 3:
                    torch.stack(held).sum().backward()
                    training.optimizer.step()
                    training.optimizer.zero_grad()
                    held.clear()
        weights.append({name: t.clone() for name, t in training.net.state_dict().items()})
        if directory:
            assert training.given[-1] == 1
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("placement", ["disk", "ram"])
def test_rows_are_nobody_else_s(tmp_path: Path, placement: str) -> None:
    """A live part that writes into what it is given: neither the store nor a batch held beside it changes."""

    class Writes(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            x.mul_(1.5)
            return self.fc(self.drop(self.deep(self.mid(x)).mean((2, 3))))

    torch.manual_seed(0)
    net = Writes()
    training = Training(tmp_path, net=copy.deepcopy(net), placement=placement)
    straight = Training(None, net=net)
    for run in (training, straight):
        run.epochs(2)
        run.order.manual_seed(3)
        for batch in list(run.loader):
            run.step(batch)
            run.step(batch)  # the same one again
        run.epochs(1)
    assert difference(training, straight) == ""
    assert training.given[-1] == 1
