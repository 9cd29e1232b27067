"""CachedLoader in loops as people write them: whatever a loop does with a batch, it is what it would be without a cache."""

import copy
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import BATCH, SAMPLES, Images, assert_alike, loader_of, network, training
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, get_worker_info

import fxfreeze
from fxfreeze.cache import CacheRefusal


class Several(nn.Module):
    """-> (what all samples share, embedding, scores): units stem and head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        features = self.stem(x)
        anchors = (torch.arange(features.shape[-1], device=x.device) + 0.5).to(x.dtype)
        embedding = (features + 0 * anchors).mean((2, 3))
        return anchors, embedding, self.head(embedding)


def several() -> Any:
    torch.manual_seed(0)
    net = Several()
    examples = (torch.randn(BATCH, 3, 8, 8),)
    return fxfreeze.compile(net, fxfreeze.Milestones({"stem": 0}), example_inputs=examples, backend="plain").train()


class Dropping(nn.Module):
    """[B, 3, 8, 8] -> [B, 3]: units stem, mid and the head, which draws random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.mid(self.stem(x)).relu().mean((2, 3))))


def wrapped(loader: DataLoader, model: Any, folder: Path, **options: Any) -> Any:
    return fxfreeze.CachedLoader(loader, model, folder, **{"when": "always", **options})


# ---- what a model hands out is the loop's


@pytest.mark.parametrize("cached", [False, True])
def test_a_loop_may_write_into_what_all_samples_share(tmp_path: Path, cached: bool) -> None:
    """In the last batch too, which is smaller and computed as a full one."""
    model = several()
    loader: Any = loader_of(Images())
    if cached:
        loader = wrapped(loader, model, tmp_path)
    sums = []
    for _ in range(3):
        for x, _ in loader:
            anchors, _, _ = model(x)
            anchors *= 2
            sums.append(anchors.sum().item())
    assert set(sums) == {64.0}


@pytest.mark.parametrize("placement", ["disk", "ram"])
def test_a_loop_may_write_into_an_embedding(tmp_path: Path, placement: str) -> None:
    """A second call on the batch gives the values again, in memory of its own."""
    model = several()
    loader = wrapped(loader_of(Images()), model, tmp_path, placement=placement)
    for epoch in range(3):
        for x, _ in loader:
            assert isinstance(x, fxfreeze.Boundary) is (epoch > 0)
            _, first, _ = model(x)
            kept = first.clone()
            first -= first.mean(0)
            _, second, _ = model(x)
            second_kept = second.clone()
            first *= 2
            assert torch.equal(second, kept)
            assert torch.equal(second, second_kept)
            third = model(x)[1]
            assert len({t.untyped_storage().data_ptr() for t in (first, second, third)}) == 3


def test_a_second_call_outlives_its_store(tmp_path: Path) -> None:
    """What can't be read again is computed from the data set."""
    model = several()
    loader = wrapped(loader_of(Images()), model, tmp_path, placement="disk")
    for x, _ in loader:
        model(x)
    x, _ = next(iter(loader))
    _, first, _ = model(x)
    (source, _, _), *_ = x.batch.pieces
    source.read = lambda *_, **__: (_ for _ in ()).throw(fxfreeze.cache.CacheError("gone"))
    torch.testing.assert_close(model(x)[1], first)


# ---- the sampler's random numbers


class Drawing(Sampler[int]):
    """Draws from torch's generator as it goes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        left = list(range(self.count))
        while left:
            yield left.pop(int(torch.randint(len(left), ())))


class DrawingAtOnce(BatchSampler):
    """Draws whenever it is asked for an iterator."""

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.sampler)).tolist()  # type: ignore[arg-type]
        return iter([order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)])


def replacing() -> dict[str, Any]:
    order = torch.Generator().manual_seed(4)
    return {"sampler": RandomSampler(range(SAMPLES), replacement=True, num_samples=6 * SAMPLES, generator=order)}


SAMPLERS: dict[str, Callable[[], dict[str, Any]]] = {
    "with replacement, of its own generator": replacing,
    "torch's generator, as it goes": lambda: {"sampler": Drawing(SAMPLES)},
    "torch's generator, when it begins": lambda: {
        "batch_sampler": DrawingAtOnce(Drawing(SAMPLES), BATCH, False),
        "batch_size": 1,
    },
    "shuffled": lambda: {"shuffle": True},
}


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, False), (2, True)])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_draw_as_without_a_cache(tmp_path: Path, name: str, workers: int, persistent: bool) -> None:
    """Whole epochs and epochs that are cut, with a network that draws too: workers run a sampler ahead."""
    pair = []
    torch.manual_seed(0)
    net = Dropping()
    for folder in (tmp_path, None):
        options = {"num_workers": workers, "persistent_workers": persistent, "generator": None, "shuffle": None}
        each = training(folder, net=net, freezes=((0.0, 2),), options=options | SAMPLERS[name]())
        for steps in (None, 3, None):
            each.epoch(steps=steps)
        pair.append(each)
    assert_alike(*pair)
    assert torch.equal(pair[0].random, pair[1].random)
    assert 2 in pair[0].depths


# ---- workers


class Shifted(Images):
    shift = 0.0

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image + self.shift, label


def _shift(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    assert isinstance(info.dataset, Shifted)
    info.dataset.shift = 5.0


def test_a_worker_s_data_set_is_the_user_s(tmp_path: Path) -> None:
    plain = loader_of(Shifted(), num_workers=1, worker_init_fn=_shift, shuffle=False)
    cached = wrapped(plain, several(), tmp_path)
    for (ours, _), (theirs, _) in zip(cached, plain, strict=True):
        assert torch.equal(ours, theirs)
        assert ours.mean() > 4


# ---- the wrapped loader's attributes


def _doubled(samples: list[Any]) -> Any:
    return [torch.stack([2 * x for x, _ in samples]), torch.tensor([y for _, y in samples])]


@pytest.mark.parametrize("start", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("cache", [{}, {"augmented": "freeze"}])
def test_attributes_are_set_on_the_wrapped_loader(tmp_path: Path, start: float, cache: dict[str, Any]) -> None:
    """A collate function that changes before anything is frozen, or later: what is stored is of the new one."""
    pair = []
    for folder in (tmp_path, None):
        each = training(folder, freezes=((start, 2),), epochs=6, cache=cache)
        for epoch in range(6):
            if epoch == 2:
                each.loader.collate_fn = _doubled
            each.epoch()
        pair.append(each)
    assert_alike(*pair)
    cached = pair[0]
    assert cached.loader.loader.collate_fn is _doubled
    assert (cached.depths[-1] == 2) is (start < 1)
    if start:
        again = training(tmp_path, freezes=((0.0, 2),), cache=cache)  # of the old one nothing was stored
        again.epoch()
        assert set(again.depths) == {None}


def test_attributes_that_can_t_be_set(tmp_path: Path) -> None:
    loader = wrapped(loader_of(Images()), several(), tmp_path)
    with pytest.raises(ValueError, match="batch_size attribute should not be set"):
        loader.batch_size = 3
    loader.mine = 3
    assert not hasattr(loader.loader, "mine")


def test_a_loader_can_t_be_pickled_or_copied(tmp_path: Path) -> None:
    loader = wrapped(loader_of(Images()), several(), tmp_path)
    for copied in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match=r"a CachedLoader can't be pickled or copied.* its \.loader"):
            copied(loader)


# ---- batches that are left out, and batches that are replaced


class Loop:
    """Two loaders of one model, and steps of its training."""

    def __init__(self, folder: Path, *, wrap_both: bool = True, stone: int = 18) -> None:
        net = network()
        unit = fxfreeze.compile(copy.deepcopy(net), fxfreeze.FreezeOut(1)).units[1].name
        self.model = fxfreeze.compile(net, fxfreeze.Milestones({unit: stone}), backend="plain")
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.scheduler = fxfreeze.FreezeScheduler(self.optimizer, self.model)
        plain = loader_of(Images())
        self.a = wrapped(plain, self.model, folder) if wrap_both else plain
        self.b = wrapped(loader_of(Images(SAMPLES + 4), shuffle=False), self.model, folder)

    def step(self, x: Any, y: Tensor) -> None:
        F.cross_entropy(self.model(x), y).backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()


def cut_validation(loop: Loop) -> None:
    for x, y in loop.a:
        loop.step(x, y)
    with torch.no_grad():
        for number, (x, _) in enumerate(loop.b):
            if number >= 1:
                break
            loop.model.eval()(x)
    loop.model.train()


def every_second_step(loop: Loop) -> None:
    for number, ((x, y), (u, v)) in enumerate(zip(loop.a, loop.b, strict=False)):
        loop.step(x, y)
        if number % 2 == 0:
            loop.step(u, v)


def never(loop: Loop) -> None:
    for (x, y), _ in zip(loop.a, loop.b, strict=False):
        loop.step(x, y)


def a_first_look(loop: Loop) -> None:
    for x, y in loop.a:
        next(iter(loop.b))
        loop.step(x, y)


def a_look_that_is_held(loop: Loop) -> None:
    looks = iter(loop.b)
    next(looks)
    for x, y in loop.a:
        loop.step(x, y)
    loop.looks = looks  # type: ignore[attr-defined]


def a_look_at_the_same(loop: Loop) -> None:
    for x, y in loop.a:
        next(iter(loop.a))
        loop.step(x, y)


def two_at_once(loop: Loop) -> None:
    for first, second in zip(loop.a, loop.a, strict=True):
        loop.step(*first)
        loop.step(*second)


LOOPS = [cut_validation, every_second_step, a_first_look, a_look_that_is_held]


@pytest.mark.parametrize(
    ("run", "wrap_both"),
    [
        *[(run, both) for run in LOOPS for both in (True, False)],
        (never, True),
        (a_look_at_the_same, True),
        (two_at_once, True),
    ],
)
def test_batches_that_are_left_out(tmp_path: Path, run: Callable[[Loop], None], wrap_both: bool) -> None:
    """Are no sign that the model is given something else in their place."""
    loop = Loop(tmp_path, wrap_both=wrap_both)
    for _ in range(5):
        run(loop)
    assert loop.model.depth == 2
    if wrap_both:
        assert any("depth 2 is stored" in note for note in loop.a.notes)


def epochs(loop: Loop, count: int, changed: Callable[[int, Any], Any], steps: int | None = None) -> None:
    for epoch in range(count):
        for number, (x, y) in enumerate(loop.a):
            if number == steps:
                break
            loop.step(changed(epoch, x), y)


@pytest.mark.parametrize("stone", [0, 18, 100])
@pytest.mark.parametrize("steps", [None, 4])
def test_batches_that_are_all_replaced(tmp_path: Path, stone: int, steps: int | None) -> None:
    """Within an epoch, or of epochs that are cut; whatever other loaders the model has."""
    loop = Loop(tmp_path, stone=stone)
    with pytest.raises(
        CacheRefusal, match=r"given other values \(float32 \[\d, 3, 8, 8\]\) than input 0 of the batch that the loader"
    ):
        epochs(loop, 1 if steps is None else 3, lambda _, x: 0.5 * x + 0.5 * x.flip(0), steps)


def test_replaced_later(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    with pytest.raises(CacheRefusal, match="given other values"):
        epochs(loop, 6, lambda epoch, x: 2 * x if epoch >= 2 and isinstance(x, Tensor) else x)
    assert loop.model.depth == 2


# ---- under torch.compile


def train(model: Any, loader: Any, run: Any, epochs: int) -> tuple[list[float], list[int]]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    scheduler = fxfreeze.FreezeScheduler(optimizer, model)
    losses, depths = [], []
    for _ in range(epochs):
        for x, y in loader:
            depths.append(x.depth if isinstance(x, fxfreeze.Boundary) else 0)
            loss = F.cross_entropy(run(x)[2], y)
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses, depths


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_takes_what_is_stored(tmp_path: Path, backend: str) -> None:
    """And stores nothing, which is said: the model itself does."""
    torch._dynamo.reset()
    model, straight = several(), several()
    loader = wrapped(loader_of(Images()), model, tmp_path)
    compiled = torch.compile(model, backend=backend)
    losses, depths = [], []
    for run in (compiled, model, compiled):
        more = train(model, loader, run, 1)
        losses += more[0]
        depths.append({*more[1]})
        if run is compiled and len(depths) == 1:
            (note,) = loader.notes
            assert "nothing is stored by a model under torch.compile" in note
    assert depths == [{0}, {0}, {1}]
    expected, _ = train(straight, loader_of(Images()), straight, 3)
    torch.testing.assert_close(losses, expected, rtol=0 if backend == "eager" else 1e-5, atol=0)


# ---- going back, and memory


def test_going_back_to_a_shallower_depth_within_an_epoch(tmp_path: Path) -> None:
    pair = []
    for folder in (tmp_path, None):
        each = training(folder, freezes=((0.1, 1), (0.3, 2)), epochs=6)
        objects = (each.net, each.optimizer, each.scheduler)
        saved = [copy.deepcopy(item.state_dict()) for item in objects]  # type: ignore[attr-defined]
        for epoch in range(6):
            batches = iter(each.loader)
            if epoch == 4:
                each.epoch(iter([next(batches), next(batches)]))
                held = next(batches)
                for item, state in zip(objects, saved, strict=True):
                    item.load_state_dict(state)  # type: ignore[attr-defined]
                assert each.model.depth == 0
                each.epoch(iter([held]))
            each.epoch(batches)
        pair.append(each)
    assert_alike(*pair)
    assert 2 in pair[0].depths


def test_examples_take_the_memory_of_one_batch(tmp_path: Path) -> None:
    """However many sizes batches come in."""
    each = training(tmp_path, freezes=((0.0, 2),))
    each.epoch()
    storages = set()
    for size in (3, 8, 5, 20, 7, 20):
        loader = each.loader
        loader.batch_sampler.batch_size = size
        for x, _ in loader:
            assert len(x.example.tensor) == len(x)
            assert x.example.tensor.is_contiguous()
            (moved,) = {x.to(memory_format=torch.channels_last).example.tensor.stride() for _ in range(2)}
            expected = x.example.tensor.contiguous(memory_format=torch.channels_last).stride()
            assert moved == expected
            storages.add(x.example.tensor.untyped_storage().data_ptr())
    assert len(storages) <= 3  # it grew twice
    assert len(loader._data._examples[0]) == 20


def test_a_model_that_is_never_called_is_told_once(tmp_path: Path) -> None:
    """``net(x)`` in place of ``model(x)``; a part of an epoch, or one before anything is frozen, tells nothing."""
    said = "the model was not called in a whole epoch, so nothing could be stored: call what fxfreeze.compile returned"
    loop = Loop(tmp_path)
    for _ in loop.a:
        pass
    loop.model.freeze(2)
    next(iter(loop.a))
    assert loop.a.notes == []
    for _ in range(2):
        for x, _ in loop.a:
            loop.model.original(x)
    (note,) = loop.a.notes
    assert note.startswith(said)
    for _ in range(2):
        for x, y in loop.a:
            loop.step(x, y)
    assert any("depth 2 is stored" in note for note in loop.a.notes)
    assert sum(said in note for note in loop.a.notes) == 1


FREEZES = {
    "within an epoch": ((0.05, 1), (0.15, 2), (0.5, 4)),
    "at once": ((0.0, 1), (1 / 6, 2), (2 / 6, 4)),
    "faster than a fill": tuple((0.15 + 0.05 * n, n) for n in range(1, 5)),
}


@pytest.mark.parametrize("few", [False, True], ids=["all samples", "most samples"])
@pytest.mark.parametrize("name", FREEZES)
def test_each_store_that_is_begun_is_closed_by_one_line(tmp_path: Path, name: str, few: bool) -> None:
    """The last one too, if the loop asks for all of its samples."""
    sampler = {"sampler": range(SAMPLES - 2), "shuffle": None} if few else {}
    each = training(tmp_path, freezes=FREEZES[name], options=sampler)
    for _ in range(6):
        each.epoch()
    begun = [int(note.split()[2]) for note in each.loader.notes if re.match(r"storing depth \d+ \(", note)]
    closed = [
        int(found[1])
        for note in each.loader.notes
        if (found := re.match(r"(?:storing )?depth (\d+) (?:is stored: |ends with \d+ of \d+ rows: )", note))
    ]
    assert begun
    assert closed == (begun[:-1] if few else begun)
