"""What stands for a stored batch, the rows of a boundary, and when storing pays."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import BATCH, Images, loader_of, network, training
from torch import Tensor, nn

import fxfreeze
from fxfreeze.cache import CacheRefusal
from fxfreeze.rows import contiguous_rows, in_order, like, merged, resized, take
from fxfreeze.rowwise import NotRowwise, Undecided, find_rows
from fxfreeze.split import as_module
from fxfreeze.trace import trace

# ---- a Boundary


@pytest.fixture
def boundary(tmp_path: Path) -> Any:
    each = training(tmp_path, freezes=((0.0, 2),))
    each.epoch()
    x, _ = next(iter(each.loader))
    return x


def test_what_a_boundary_knows(boundary: Any) -> None:
    assert (len(boundary), boundary.shape[0], boundary.size(0), boundary.depth) == (BATCH, BATCH, BATCH, 2)
    assert boundary.device == torch.device("cpu")
    assert repr(boundary) == f"Boundary(depth=2, {BATCH} samples, device='cpu')"
    for moved in (
        boundary.to("cpu"),
        boundary.cpu(),
        boundary.pin_memory(),
        boundary.to(torch.float32),
        copy.copy(boundary),
    ):
        assert isinstance(moved, fxfreeze.Boundary)
        assert moved.batch is boundary.batch
    assert boundary.to("meta").device == torch.device("meta")


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x + 1,
        lambda x: 0.5 * x,
        lambda x: x[0],
        lambda x: x == 0,
        lambda x: x != 0,
        lambda x: list(x),
        lambda x: bool(x),
        lambda x: x.shape[1],
        lambda x: tuple(x.shape),
        lambda x: x.shape == (8, 3),
        lambda x: x.size(),
        lambda x: x.half(),
        lambda x: x.mean(),
        lambda x: x.to(torch.float16),
        lambda x: torch.cat([x, x]),
        lambda x: torch.nn.functional.relu(x),
    ],
)
def test_anything_else_raises_with_what_to_do(boundary: Any, ask: Any) -> None:
    with pytest.raises((TypeError, AttributeError), match="give it to the model as it is"):
        ask(boundary)


def test_a_boundary_goes_to_no_shallower_model(boundary: Any) -> None:
    other = fxfreeze.compile(network(), fxfreeze.FreezeOut(100))
    with pytest.raises(ValueError, match="frozen to depth 0, was given activations stored at depth 2"):
        other(boundary)


def test_a_tensor_beside_a_boundary_is_refused() -> None:
    from fxfreeze.stored import Example, stored_batch

    class Batch:
        size, depth, least = 2, 1, 1

    stored: Any = fxfreeze.Boundary(Batch(), 0, Example(torch.zeros(2, 3)))  # type: ignore[arg-type]
    assert stored_batch([stored, 3, stored]) is stored.batch
    assert stored_batch([torch.zeros(2)]) is None
    with pytest.raises(ValueError, match="together with a tensor"):
        stored_batch([stored, torch.zeros(2)])
    with pytest.raises(ValueError, match="of two batches"):
        stored_batch([stored, fxfreeze.Boundary(Batch(), 0, stored.example)])  # type: ignore[arg-type]


# ---- rows in their layouts

LAYOUTS = [
    torch.randn(6, 3, 4, 5),
    torch.randn(6, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.randn(6, 4, 3).transpose(1, 2),
    torch.randn(6),
]


@pytest.mark.parametrize("tensor", LAYOUTS, ids=lambda t: str(t.stride()))
def test_rows_keep_their_layout(tensor: Tensor) -> None:
    rows, order = contiguous_rows(tensor)
    assert rows.is_contiguous()
    assert torch.equal(in_order(rows, order), tensor)
    samples = torch.tensor([4, 0, 0])
    assert torch.equal(take(tensor, samples), tensor[samples])
    whole = merged(
        6, [(torch.tensor([5, 1, 3]), take(tensor, torch.tensor([5, 1, 3]))), (torch.tensor([0, 2, 4]), tensor[::2])]
    )
    assert torch.equal(whole, tensor)
    if order is not None:
        assert whole.stride() == tensor.stride() == in_order(rows, order).stride()
    assert torch.equal(like(tensor.contiguous(), tensor), tensor)
    assert like(tensor.contiguous(), tensor).stride() == (
        tensor.stride() if order is not None else tensor.contiguous().stride()
    )


def test_a_batch_is_filled_up_with_its_first_sample() -> None:
    x, y = torch.randn(3, 2), torch.arange(3)
    longer = resized([x, y, 7], 5)
    assert torch.equal(longer[1], torch.tensor([0, 1, 2, 0, 0]))
    assert torch.equal(longer[0][3], x[0])
    assert longer[2] == 7
    assert torch.equal(resized([x, y], 2)[1], torch.tensor([0, 1]))
    assert resized([x, torch.zeros(2)], 5)[0] is x


# ---- which values are of a sample


def rows_of(function: Any, *inputs: Tensor) -> tuple[bool, ...]:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4, track_running_stats=False)
            self.linear = nn.Linear(4, 4)

        def forward(self, *given: Tensor) -> Any:
            return function(self, *given)

    torch.manual_seed(0)
    net = Net().eval()
    traced = trace(net, fxfreeze.inputs.flatten_inputs(net, inputs, {})[0], list(inputs))
    outputs = next(node for node in traced.graph.nodes if node.op == "output")
    flat = outputs.args[0] if isinstance(outputs.args[0], tuple | list) else (outputs.args[0],)
    outputs.args = (tuple(flat),)
    return find_rows(
        as_module(net, traced.graph, traced.constants), [f"value {i}" for i, _ in enumerate(flat)], inputs, []
    )


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def test_rows_and_what_all_samples_share() -> None:
    assert rows_of(lambda net, x: (net.linear(x), x.relu()), X) == (True, True)
    assert rows_of(lambda net, x: (x * 2, torch.arange(7) + 0 * x.shape[1], x.shape[0]), X) == (True, False, False)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda net, x: net.norm(x), "^norm mixes the samples"),
        (lambda net, x: net.linear(x) + 1e-4 * net.linear(x).mean(0), "mixes the samples"),
        (lambda net, x: x.roll(1, 0), "roll.* mixes the samples"),
        (lambda net, x: x.sort(0).values, "mixes the samples"),
        (lambda net, x: x + torch.arange(x.shape[0])[:, None], "mixes the samples"),
        (lambda net, x: x / x.abs().max(), "mixes the samples"),
        (lambda net, x: x.t(), "not a row for each sample|mixes"),
        (lambda net, x: x + torch.rand_like(x), "draws random numbers"),
    ],
)
def test_what_mixes_samples_is_named(function: Any, message: str) -> None:
    with pytest.raises(NotRowwise, match=message):
        rows_of(function, X)


def brightest(net: nn.Module, x: Tensor) -> Tensor:
    scale = x.abs().max() / 7
    return (x / scale).round() * scale


MANY = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
FIRST = torch.cat([MANY[:1].sign() * 9, MANY[1:]])  # its first sample is the brightest


@pytest.mark.parametrize(
    ("function", "x"),
    [
        (brightest, FIRST),
        (brightest, FIRST.flip(0)),
        (lambda net, x: x * (torch.ones_like(x).cumsum(0) <= 9), MANY),
        (lambda net, x: x * ((x[:, :1] > 0).to(x.dtype).cumsum(0) <= 9), MANY),
    ],
    ids=["by the first sample", "by the last", "by place", "by how many are alike"],
)
def test_what_mixes_samples_in_a_large_batch_alone(function: Any, x: Tensor) -> None:
    with pytest.raises(NotRowwise, match="mixes the samples"):
        rows_of(function, x)


def test_a_module_that_counts_in_a_buffer() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count.add_(len(x))
            return x + 0 if x.sum() > 1e9 else x * 2

    net = nn.Sequential(Counting(), nn.Linear(4, 4), nn.Linear(4, 3))
    model = fxfreeze.compile(net, fxfreeze.Milestones({"1": 0})).train()
    with pytest.warns(UserWarning, match="frozen module '0' runs as it is"):
        model(MANY)
    output = model(MANY[:5])
    assert int(net[0].count) == 21  # and no more: a small batch is not filled up
    torch.testing.assert_close(output, net(MANY[:5]))


def test_equal_samples_can_t_tell() -> None:
    with pytest.raises(Undecided, match="5 equal samples"):
        rows_of(lambda net, x: net.norm(x), X[:1].expand(5, 4))


def test_what_is_no_number_does_not_count_as_mixed() -> None:
    broken = X.clone()
    broken[0, 0] = float("nan")
    assert rows_of(lambda net, x: net.linear(x), broken) == (True,)


def test_torch_s_own_hooks_only_prepare_weights(tmp_path: Path) -> None:
    """A frozen layer under the older weight norm, which is a hook, is cached like any other."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(net[0])
    model = fxfreeze.compile(net, fxfreeze.Milestones({"0": 0}))
    dataset = Images()
    loader = fxfreeze.CachedLoader(loader_of(dataset), model, tmp_path, when="always")
    with warnings.catch_warnings(action="ignore"):  # it runs as it is, not rewritten
        for _ in range(2):
            for x, _ in loader:
                outputs = model(x)
    assert isinstance(x, fxfreeze.Boundary)
    torch.testing.assert_close(outputs, net(dataset.images[x.batch.keys]))


# ---- whether it pays


def test_what_does_not_fit_is_not_stored(tmp_path: Path) -> None:
    each = training(tmp_path, freezes=((0.0, 2),), cache={"max_bytes": 1000})
    for _ in range(2):
        each.epoch()
    assert set(each.depths) == {None}
    assert not list(tmp_path.iterdir())
    assert any(
        "depth 2 is not stored: it takes" in note and "max_bytes is 1.0 kB" in note for note in each.loader.notes
    )


def test_the_last_of_a_disk_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fxfreeze.cache.worth.shutil.disk_usage", lambda path: type("", (), {"free": 10**6, "total": 10**8})()
    )
    each = training(tmp_path, freezes=((0.0, 2),))
    each.epoch()
    assert any("of which 5% of its 100.0 MB stay so" in note for note in each.loader.notes)


@pytest.mark.parametrize(("compute", "stores"), [(1.0, True), (1e-9, False)])
def test_storing_is_weighed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compute: float, stores: bool) -> None:
    """Against a frozen part that takes a second a sample, and one that takes nothing."""
    monkeypatch.setattr("fxfreeze.cache.worth.stored", lambda *_: (1e-4, 1e-5))
    computed = fxfreeze.cache.worth.computed

    def slow(*call: Any) -> Any:
        _, rows = computed(*call)
        return compute * len(rows[0]), rows

    monkeypatch.setattr("fxfreeze.cache.worth.computed", slow)
    each = training(tmp_path, freezes=((0.0, 2),), cache={"when": "auto"})
    for _ in range(2):
        each.epoch()
    assert (each.depths[-1] == 2) is stores
    verb = "storing depth 2" if stores else "depth 2 is not stored"
    (note,) = [note for note in each.loader.notes if note.startswith(verb)]
    assert "a sample takes" in note
    assert "will be read" in note


@pytest.mark.parametrize("placement", ["disk", "ram", "device", "auto"])
def test_where_a_store_serves_from(tmp_path: Path, placement: str) -> None:
    each = training(tmp_path, freezes=((0.0, 2),), cache={"placement": placement})
    for _ in range(4):
        each.epoch()
    tier = "disk" if placement == "disk" else "ram"
    assert [*each.loader.traffic[-1].samples] == [tier]
    assert [*each.loader.traffic[0].samples] == ["forward"]
    assert each.loader.traffic[-1].bytes > 0
    assert [epoch.cold for epoch in each.loader.traffic] == [False, True, False, False]


def test_views_of_no_image_are_refused(tmp_path: Path) -> None:
    dataset = torch.utils.data.TensorDataset(torch.randn(20, 3), torch.zeros(20, dtype=torch.int64))
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    model = fxfreeze.compile(net, fxfreeze.Milestones({"0": 0}))
    loader = fxfreeze.CachedLoader(loader_of(dataset), model, tmp_path, views="flip", when="always")
    with pytest.raises(CacheRefusal, match='views="flip" mirrors images'):
        next(iter(loader))


def test_a_small_batch_is_computed_as_a_full_one() -> None:
    """With a cache or without: its rows have the bits that they have in any training step."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 100), nn.Linear(100, 30), nn.Linear(30, 3))
    model = fxfreeze.compile(net, fxfreeze.Milestones({"2": 0}))
    images = Images().images
    outputs = [model(images[samples]) for samples in ([*range(8)], [3], [5, 6], [0, 1, 2])]
    assert torch.equal(outputs[1][0], outputs[0][3]) or torch.allclose(outputs[1][0], outputs[0][3], rtol=1e-6)
    chain = next(iter(model._derived.surgery._plans.values())).chain
    *_, (_, full) = chain.advance(0, [images[:8]], [images[:8]])
    with torch.no_grad():
        suffix = next(iter(model._derived.surgery._plans.values())).suffix
        for output, samples in zip(outputs[1:], ([3], [5, 6], [0, 1, 2]), strict=True):
            assert torch.equal(output, suffix(full[0][samples])[0])
