"""CachedLoader: training from stored activations is the training that it stands in for."""

import copy
import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from cached import BATCH, SAMPLES, Images, Training, assert_alike, loader_of, network, training
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, SubsetRandomSampler

import fxfreeze
from fxfreeze.cache import CacheRefusal

EPOCHS = 6


def both(folder: Path, **options: Any) -> tuple[Training, Training]:
    """Trained with and without a cache."""
    pair = training(folder, epochs=EPOCHS, **options), training(None, epochs=EPOCHS, **options)
    for each in pair:
        for _ in range(EPOCHS):
            each.epoch()
    return pair


# ---- bit for bit


@pytest.mark.parametrize("name", ["resnet-8", "densenet-bc-4-10", "vgg-16-bn", "wrn-10-1"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_cached_training_is_bit_identical(tmp_path: Path, name: str, drop_last: bool) -> None:
    """Across three freezes within epochs, with shuffling, dropout (VGG) and a last batch of four."""
    cached, plain = both(tmp_path, net=network(name), options={"drop_last": drop_last})
    assert_alike(cached, plain)
    assert {1, 2, 4} <= {*cached.depths} or name == "vgg-16-bn"
    assert cached.depths[-1] is not None


@pytest.mark.parametrize("persistent", [False, True])
def test_with_workers(tmp_path: Path, persistent: bool) -> None:
    options = {"num_workers": 2, "persistent_workers": persistent, "generator": None}
    cached, plain = both(tmp_path, options=options)
    assert_alike(cached, plain)
    assert cached.depths[-1] is not None


def test_random_numbers_are_drawn_as_without_a_cache(tmp_path: Path) -> None:
    """The loader's own too: seeds of workers and of the sampler come from torch's generator when it has none."""
    cached, plain = both(tmp_path, options={"generator": None})
    assert torch.equal(cached.random, plain.random)
    assert_alike(cached, plain)


def test_under_autocast(tmp_path: Path) -> None:
    """In bf16, which is what is stored."""
    pair = training(tmp_path, epochs=EPOCHS), training(None, epochs=EPOCHS)
    for each in pair:
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(EPOCHS):
                each.epoch()
    assert_alike(*pair)
    assert pair[0].depths[-1] is not None


def test_channels_last_inputs(tmp_path: Path) -> None:
    pair = training(tmp_path, epochs=EPOCHS), training(None, epochs=EPOCHS)
    for each in pair:
        each.inputs = lambda batch: batch[0].to(memory_format=torch.channels_last)
        for _ in range(EPOCHS):
            each.epoch()
    assert_alike(*pair)
    assert pair[0].depths[-1] is not None


@pytest.mark.parametrize("at", [(1, 2), (2, 3), (4, 1)], ids=["within a fill", "within a deeper fill", "when cached"])
def test_resuming_within_an_epoch(tmp_path: Path, at: tuple[int, int]) -> None:
    """Everything is built anew from saved states, the batches that were trained on are skipped."""
    epoch, step = at
    first = training(tmp_path, epochs=EPOCHS)
    for _ in range(epoch):
        first.epoch()
    order = first.loader.loader.generator.get_state()
    first.epoch(steps=step)
    saved = {
        "net": copy.deepcopy(first.net.state_dict()),
        "optimizer": copy.deepcopy(first.optimizer.state_dict()),
        "scheduler": json.loads(json.dumps(first.scheduler.state_dict())),
    }
    resumed = training(tmp_path, epochs=EPOCHS)
    resumed.net.load_state_dict(saved["net"])
    resumed.optimizer.load_state_dict(saved["optimizer"])
    resumed.scheduler.load_state_dict(saved["scheduler"])
    resumed.random = first.random
    resumed.loader.loader.generator.set_state(order)
    del first.loader
    batches = iter(resumed.loader)
    for _ in range(step):
        next(batches)
    resumed.epoch(batches)
    for _ in range(EPOCHS - epoch - 1):
        resumed.epoch()
    plain = training(None, epochs=EPOCHS)
    for _ in range(EPOCHS):
        plain.epoch()
    first.losses += resumed.losses
    resumed.losses = first.losses
    assert_alike(resumed, plain)


def test_freezes_faster_than_a_fill(tmp_path: Path) -> None:
    """Several in one epoch: each row is computed once more at most, and none wrongly."""
    freezes = tuple((0.15 + 0.05 * n, n) for n in range(1, 5))
    cached, plain = both(tmp_path, freezes=freezes)
    assert_alike(cached, plain)
    assert cached.depths[-1] == 4


def test_three_forwards_before_one_backward(tmp_path: Path) -> None:
    """Batches that a tape refers to stay as they are."""

    def run(each: Training) -> list[Tensor]:
        for _ in range(2):
            each.epoch()
        total = torch.zeros(())
        for number, (x, y) in enumerate(each.loader):
            total = total + nn.functional.cross_entropy(each.model(x), y)
            if number % 3 == 2:
                total.backward()
                total = torch.zeros(())
        return [p.grad for p in each.net.parameters() if p.grad is not None]

    freezes = ((0.0, 2),)
    cached, plain = training(tmp_path, freezes=freezes), training(None, freezes=freezes)
    ours, theirs = run(cached), run(plain)
    assert len(ours) == len(theirs) > 0
    assert all(map(torch.equal, ours, theirs))
    assert cached.depths[-1] == 2


# ---- rows, and who reads the data set


def frozen(folder: Path | None, dataset: Any = None, units: int = 2, **options: Any) -> Training:
    return training(folder, dataset=dataset, freezes=((0.0, units),), **options)


def test_every_row_is_what_the_prefix_computes(tmp_path: Path) -> None:
    """Over two shuffled epochs, in whatever batch a sample is."""
    each = frozen(tmp_path)
    each.epoch()
    images = each.loader.dataset.images
    fresh = {}
    for start in range(0, SAMPLES, BATCH):
        samples = [index % SAMPLES for index in range(start, start + BATCH)]
        chain = chain_of(each.model, images[samples])
        *_, (_, values) = chain.advance(0, [images[samples]], [images[samples]])
        fresh |= {index: values[0][place].clone() for place, index in enumerate(samples)}
    for _ in range(2):
        met = []
        for x, _ in each.loader:
            (_, places, rows), *rest = x.batch.pieces
            assert not rest
            assert x.batch.fetched is None
            for place, key in zip(places.tolist(), x.batch.keys.tolist(), strict=True):
                assert torch.equal(rows.boundary[0][place], fresh[key])
                met.append(key)
        assert sorted(met) == list(range(SAMPLES))


def chain_of(model: Any, images: Tensor) -> Any:
    model(images)
    (plan,) = [plan for plan in model._derived.surgery._plans.values() if plan.chain.prefix.segments]
    return plan.chain


def test_a_cached_epoch_reads_the_probes_alone(tmp_path: Path) -> None:
    dataset = Images()
    each = frozen(tmp_path, dataset)
    each.epoch()
    dataset.reads.clear()
    each.epoch()
    assert len(dataset.reads) == 4
    assert sorted(dataset.reads) == sorted({*dataset.reads})


def test_a_deeper_store_is_made_from_the_shallower_one(tmp_path: Path) -> None:
    dataset = Images()
    each = training(tmp_path, dataset=dataset, freezes=((0.0, 1), (2 / EPOCHS, 3)))
    each.epoch()
    (shallow,) = tmp_path.iterdir()
    each.epoch()
    assert each.model.depth == 3
    dataset.reads.clear()
    for number, _ in enumerate(range(2)):
        assert shallow.exists() == (number == 0)  # it goes when the deeper one is complete
        each.epoch()
    assert len(dataset.reads) == 2 * 4
    (deep,) = tmp_path.iterdir()
    assert (shallow.name[:3], deep.name[:3]) == ("001", "003")


def test_holes_are_filled_when_they_are_asked_for(tmp_path: Path) -> None:
    """A sampler that skips samples leaves them out; later only they are read from the data set."""
    dataset = Images()
    each = frozen(tmp_path, dataset)
    half = DataLoader(dataset, batch_size=BATCH, sampler=SubsetRandomSampler(range(0, SAMPLES, 2)))
    each.loader = fxfreeze.CachedLoader(half, each.model, tmp_path, when="always")
    each.epoch()
    each.loader = fxfreeze.CachedLoader(loader_of(dataset), each.model, tmp_path, when="always")
    dataset.reads.clear()
    each.epoch()
    assert len(dataset.reads) <= 4 + BATCH + SAMPLES // 2
    odd = [index for index in dataset.reads[4:] if index % 2]
    assert sorted({*odd}) == list(range(1, SAMPLES, 2))
    dataset.reads.clear()
    each.epoch()
    assert len(dataset.reads) == 4


def test_a_second_run_reads_what_the_first_stored(tmp_path: Path) -> None:
    """As in a search over heads: another head, the same backbone and data."""
    first = frozen(tmp_path)
    first.epoch()
    dataset = Images()
    second = frozen(tmp_path, dataset)
    nn.init.zeros_(
        second.net.head.weight if hasattr(second.net, "head") else next(reversed([*second.net.parameters()]))
    )
    reads = len(dataset.reads)
    second.epoch()
    assert len(dataset.reads) == reads + 4
    assert set(second.depths) == {2}


# ---- samples and samplers

Sample = namedtuple("Sample", "weight image label name")


class Named(Images):
    """Samples of every kind of part. kind: what a sample is."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self.kind = kind

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        parts = {"weight": 0.5 + index, "image": image, "label": label, "name": f"sample {index}"}
        return parts if self.kind is dict else self.kind(**parts)


@pytest.mark.parametrize("kind", [dict, Sample])
def test_samples_of_named_parts(tmp_path: Path, kind: type) -> None:
    """What is not the model's input comes back as it was: numbers, labels, strings."""

    def part(name: str) -> Any:
        return lambda batch: batch[name] if kind is dict else getattr(batch, name)

    options: dict[str, Any] = {"dataset": Named(kind), "inputs": part("image"), "labels": part("label")}
    cached, plain = both(tmp_path, cache={"inputs": "image"}, freezes=((0.0, 2),), **options)
    assert_alike(cached, plain)
    assert cached.depths[-1] == 2
    for ours, theirs in zip(cached.loader, plain.loader, strict=True):
        assert type(ours) is type(theirs)
        for name in ("weight", "label", "name"):
            assert (
                torch.equal(torch.as_tensor(part(name)(ours)), torch.as_tensor(part(name)(theirs)))
                if (name != "name")
                else part(name)(ours) == part(name)(theirs)
            )


def test_a_dict_s_inputs_are_the_forward_s_parameters(tmp_path: Path) -> None:
    each = frozen(tmp_path)
    assert "x" in fxfreeze.model.inspect.signature(each.model.forward).parameters
    loader = loader_of(Named(dict), collate_fn=lambda samples: {"x": torch.stack([s["image"] for s in samples])})
    cached = fxfreeze.CachedLoader(loader, each.model, tmp_path / "dict", when="always")
    for _ in range(2):
        for batch in cached:
            each.model(**batch)
    assert isinstance(batch["x"], fxfreeze.Boundary)


def test_a_subset_s_rows_are_its_own(tmp_path: Path) -> None:
    subset = Subset(Images(), range(40, 4, -2))
    assert_alike(*both(tmp_path, dataset=subset))


def test_a_distributed_sampler_s_epochs(tmp_path: Path) -> None:
    """Each epoch another half of the data: what is not stored yet is read."""
    dataset = Images()

    def run(folder: Path | None) -> Training:
        sampler: Any = DistributedSampler(dataset, num_replicas=2, rank=0, shuffle=True)
        each = training(folder, dataset=dataset, epochs=EPOCHS, options={"sampler": sampler, "shuffle": None})
        for epoch in range(EPOCHS):
            each.loader.sampler.set_epoch(epoch)
            each.epoch()
        return each

    cached = run(tmp_path)
    assert_alike(cached, run(None))
    assert any(depth is not None for depth in cached.depths)


def test_it_looks_like_the_loader_that_it_wraps(tmp_path: Path) -> None:
    cached, plain = frozen(tmp_path), frozen(None)
    assert len(cached.loader) == len(plain.loader) == -(-SAMPLES // BATCH)
    assert cached.loader.batch_size == BATCH
    assert cached.loader.dataset is cached.loader.loader.dataset
    with pytest.raises(AttributeError):
        _ = cached.loader.nothing


# ---- refusals


def test_other_values_between_loader_and_model_are_refused(tmp_path: Path) -> None:
    """Before anything is frozen, and after."""
    for units in ((0.9, 1), (0.0, 1)):
        each = training(tmp_path, freezes=(units,))
        each.inputs = lambda batch: batch[0] * 0.5 + batch[0].flip(0) * 0.5
        with pytest.raises(
            CacheRefusal,
            match=r"the model was given other values .* than input 0 of the batch that the loader yielded.* mix samples in",
        ):
            each.epoch()
        assert len(each.losses) == len(each.loader)


class Iterable(IterableDataset):
    def __iter__(self) -> Any:
        return iter([(torch.zeros(3, 8, 8), 0)])


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: DataLoader(Iterable()), "is iterable"),
        (lambda: DataLoader(Images(), batch_size=None), "batch_size=None"),
        (lambda: DataLoader(Images(), in_order=False, num_workers=1), "in_order=False"),
        (lambda: [1, 2], "expected a torch.utils.data.DataLoader"),
    ],
)
def test_loaders_that_can_t_be_cached(tmp_path: Path, loader: Any, message: str) -> None:
    with pytest.raises(CacheRefusal, match=message):
        fxfreeze.CachedLoader(loader(), frozen(None).model, tmp_path)


class Augmented(Images):
    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return image + 0.1 * torch.randn(image.shape), label


def test_random_augmentation_is_refused(tmp_path: Path) -> None:
    model = frozen(None).model
    before = torch.get_rng_state()
    with pytest.raises(CacheRefusal, match=r"differs between two reads .* views=K .* augmented=\"freeze\""):
        fxfreeze.CachedLoader(loader_of(Augmented()), model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


class BatchStatistics(nn.Module):
    """A batch norm without running statistics, in the second unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm = nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.second(self.first(x))).mean((2, 3)))


def test_a_prefix_that_mixes_samples_is_refused_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    each = training(tmp_path, net=BatchStatistics(), freezes=((0.0, 2),))
    with pytest.raises(CacheRefusal, match=r"the frozen part can't be cached: norm mixes the samples of a batch"):
        each.epoch()
    shallow = training(tmp_path, net=BatchStatistics(), freezes=((0.0, 1),))
    for _ in range(2):
        shallow.epoch()
    assert shallow.depths[-1] == 1


def test_arguments_are_checked(tmp_path: Path) -> None:
    each = frozen(None)
    for options, message in (
        ({"when": "never"}, "when is 'never'"),
        ({"augmented": True}, "augmented is True"),
        ({"placement": "gpu"}, "placement is 'gpu'"),
        ({"views": 0}, "views is 0"),
        ({"views": "rotate"}, "views is 'rotate'"),
        ({"inputs": 7}, "the batch has no 7"),
        ({"max_bytes": "1GB"}, r"max_bytes is '1GB': expected None or a number of bytes from 0, such as 2 \* 10\*\*9"),
        ({"max_bytes": -1}, "max_bytes is -1"),
        ({"max_bytes": True}, "max_bytes is True"),
        ({"max_bytes": 0.5}, "max_bytes is 0.5"),
        (
            {"store_dtype": "half"},
            "store_dtype is 'half': expected None, 'fp32', 'fp16', 'bf16', or a floating point dtype",
        ),
        ({"store_dtype": torch.int8}, "store_dtype is torch.int8"),
    ):
        with pytest.raises(ValueError, match=message):
            fxfreeze.CachedLoader(each.loader, each.model, tmp_path, **options)
    with pytest.raises(TypeError, match="CachedLoader needs a FreezableModel, and got a ResNet"):
        fxfreeze.CachedLoader(each.loader, each.net, tmp_path)
    (tmp_path / "file").write_text("mine")
    for directory, message in (
        (tmp_path / "file", "can't hold a cache .*file is not a folder.*: name a folder that can be written"),
        (tmp_path / "file" / "below", "can't hold a cache .* is not a folder"),
        (tmp_path / ("x" * 300), "can't hold a cache .*too long"),
        ("/proc/cache", "directory '/proc/cache' can't hold a cache"),
        ("", "directory is '', which names no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            fxfreeze.CachedLoader(each.loader, each.model, directory)
    with pytest.raises(TypeError, match="directory is None: expected the path of a folder"):
        fxfreeze.CachedLoader(each.loader, each.model, None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    fxfreeze.CachedLoader(each.loader, each.model, tmp_path / "new" / "cache", max_bytes=2e9, store_dtype="bf16")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # the folder is made when it is needed


def test_an_input_that_the_model_does_not_get_is_named(tmp_path: Path) -> None:
    each = frozen(tmp_path, cache={"inputs": (0, 1)})
    with pytest.raises(CacheRefusal, match="the model did not receive input 1 of the batch: name by inputs="):
        each.epoch()


# ---- views


def test_views_are_stored_and_shown_in_turn(tmp_path: Path) -> None:
    dataset = Augmented()
    each = training(tmp_path, dataset=dataset, freezes=((0.0, 2),), cache={"views": 4})
    for _ in range(4):
        each.epoch()
        assert set(each.depths) == {None}
    dataset.reads.clear()
    seen: dict[int, set[int]] = {index: set() for index in range(SAMPLES)}
    for _ in range(4):
        for x, _ in each.loader:
            for key in x.batch.keys.tolist():
                seen[key // 4].add(key % 4)
    assert all(views == {0, 1, 2, 3} for views in seen.values())
    assert not dataset.reads
    assert any("4 views" in note or "176 rows" in note for note in each.loader.notes)


def crossing(chain: Any, images: Tensor) -> Tensor:
    *_, (_, values) = chain.advance(0, [images], [images])
    return values[0]


class Flipped(Images):
    """Every second read is mirrored, whatever is read."""

    def __getitem__(self, index: int) -> Any:
        image, label = super().__getitem__(index)
        return (image.flip(-1) if len(self.reads) % 2 else image), label


def test_flips_are_stored_as_exact_pairs(tmp_path: Path) -> None:
    each = training(tmp_path, dataset=Flipped(), freezes=((0.0, 1),), cache={"views": "flip"})
    for _ in range(2):
        each.epoch()
    images = Images().images
    chain = None
    for x, _ in each.loader:
        (_, places, rows), *_ = x.batch.pieces
        assert len(places) == len(x)
        chain = chain or chain_of(each.model, images[:BATCH])
        both = [crossing(chain, view[x.batch.keys // 2]) for view in (images, images.flip(-1))]
        for place in range(len(x)):
            assert any(torch.allclose(rows.boundary[0][place], view[place], atol=1e-6) for view in both)


def test_the_first_view_of_each_sample(tmp_path: Path) -> None:
    each = training(tmp_path, dataset=Augmented(), freezes=((0.0, 2),), cache={"augmented": "freeze"})
    for _ in range(3):
        each.epoch()
    assert each.depths[-1] == 2


def test_rounded_rows(tmp_path: Path) -> None:
    """fp32 stored as bf16: the error is measured and told, and training goes on near the exact one."""
    cached = training(tmp_path, freezes=((0.0, 2),), cache={"store_dtype": torch.bfloat16})
    plain = frozen(None)
    for each in (cached, plain):
        for _ in range(3):
            each.epoch()
    assert cached.losses != plain.losses
    assert cached.losses[: len(cached.loader)] == plain.losses[: len(plain.loader)]
    assert abs(cached.losses[-1] - plain.losses[-1]) < 0.05
    assert any("bfloat16" in note and "relative error" in note for note in cached.loader.notes)
