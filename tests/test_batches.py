"""The order of the data."""

import pytest
import torch

from fxfreeze.batches import Batches, EpochSampler, Split, of_classes
from fxfreeze.imports import ChoiceError


def numbered(count: int) -> Split:
    return Split(torch.arange(count).float().reshape(-1, 1), torch.arange(count))


def test_each_epoch_visits_each_sample_at_most_once_in_an_order_of_its_own() -> None:
    batches = Batches(numbered(23), 5, seed=7)
    epochs = [torch.cat([batches[step].labels for step in range(4 * e, 4 * e + 4)]) for e in range(3)]
    assert batches.steps_per_epoch == 4
    assert all(len(set(epoch.tolist())) == 20 for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3


def test_order_depends_on_seed_and_epoch_alone() -> None:
    forwards, backwards, other = (Batches(numbered(20), 5, seed) for seed in (1, 1, 2))
    expected = [forwards[step].labels.tolist() for step in range(8)]
    torch.rand(100)
    assert [backwards[step].labels.tolist() for step in reversed(range(8))] == expected[::-1]
    assert [other[step].labels.tolist() for step in range(8)] != expected


def test_images_and_labels_stay_together() -> None:
    images, labels = Batches(numbered(20), 5, seed=0)[3]
    assert torch.equal(images.flatten().long(), labels)


def test_a_sampler_draws_the_same_batches_epoch_after_epoch() -> None:
    batches = Batches(numbered(23), 5, seed=7)
    sampler = EpochSampler(batches)
    drawn = [chosen for _ in range(3) for chosen in sampler]
    assert len(sampler) == batches.steps_per_epoch == 4
    assert drawn == [batches[step].labels.tolist() for step in range(12)]
    assert list(EpochSampler(batches, first=2)) == drawn[8:]


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ChoiceError, match=r"batch of 21 .* holds 20: use a smaller batch size"):
        Batches(numbered(20), 21, seed=0)


def test_classes_are_chosen_and_counted_from_zero() -> None:
    chosen = of_classes(Split(torch.arange(6.0), torch.tensor([0, 3, 2, 1, 3, 2])), range(2, 4))
    assert chosen.images.tolist() == [1, 2, 4, 5]
    assert chosen.labels.tolist() == [1, 0, 1, 0]
