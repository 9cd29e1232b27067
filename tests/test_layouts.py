"""Boundaries lie in memory as the original's do, whichever batch came first: dropout draws in that order."""

import copy

import pytest
import torch
from parity import compare, freezable, freeze_by_hand, settle
from split_cases import D, Net, conv, image
from torch import Tensor, nn

from fxfreeze.layouts import Layouts, order_of


class SequenceFirst(nn.Module):
    """What crosses is transposed; with one sample it looks contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.drop = nn.Linear(6, 8, dtype=D), nn.Dropout(0.2)
        self.mix, self.head = nn.Linear(8, 8, dtype=D), nn.Linear(8, 3, dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.drop(self.embed(x).transpose(0, 1))).relu().mean(0))


def sequences(n: int) -> Tensor:
    return torch.randn(n, 5, 6, dtype=D, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("first", [1, 2, 8])
def test_the_first_batch_s_size_decides_nothing(first: int) -> None:
    net = settle(SequenceFirst())
    model, reference = freezable(copy.deepcopy(net)), copy.deepcopy(net)
    model.freeze(1)
    model.eval()
    with torch.no_grad():
        model(sequences(first))
    for number, n in enumerate((8, 1, 8, 2)):
        model.train()
        reference.train()
        freeze_by_hand(reference, model.units[:1])
        compare(model, reference, (sequences(n),), number, f"batch of {n} after one of {first}")


class Pooled(nn.Module):
    """One pixel or many: with one, channels-last and contiguous are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 3, dtype=D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.b(nn.functional.dropout(self.a(x), 0.3, self.training)).mean((2, 3)))


def test_images_of_one_pixel_first() -> None:
    net = settle(Pooled()).float()
    model, reference = freezable(copy.deepcopy(net)), copy.deepcopy(net)
    model.freeze(1)
    for number, size in enumerate((1, 6, 1)):
        x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(size))
        freeze_by_hand(reference, model.units[:1])
        values = []
        for each in (model, reference):
            torch.manual_seed(number)
            values.append(each(x))
        torch.testing.assert_close(*values)


def test_inputs_in_other_layouts_are_cut_for_themselves() -> None:
    net = settle(SequenceFirst())
    model, reference = freezable(copy.deepcopy(net)), copy.deepcopy(net)
    model.freeze(1)
    freeze_by_hand(reference, model.units[:1])
    turned = sequences(5).transpose(0, 1).contiguous().transpose(0, 1)
    assert turned.stride() != sequences(5).stride()
    for number, x in enumerate(
        (sequences(5), turned, sequences(5)[:, ::2], sequences(8).permute(2, 1, 0).permute(2, 1, 0))
    ):
        compare(model, reference, (x,), number, f"strides {x.stride()}")


def test_orders() -> None:
    x = torch.zeros(2, 3, 4, 5)
    assert order_of(x) is None
    assert order_of(x[:, :, ::2]) is None
    assert order_of(x.to(memory_format=torch.channels_last)) == (0, 2, 3, 1)
    assert order_of(x.transpose(0, 1)) == (1, 0, 2, 3)
    assert order_of(torch.eye(3).to_sparse()) is None


def test_layouts_are_asked_for_again_only_where_other_dimensions_are_one() -> None:
    asked = []

    def original(inputs: tuple[Tensor]) -> tuple[Tensor]:
        asked.append(inputs[0].shape)
        return (inputs[0].transpose(0, 1),)

    layouts = Layouts(original)  # type: ignore[arg-type]
    for shape in ((2, 3, 4), (5, 3, 4), (1, 3, 4), (1, 2, 4), (3, 3, 3)):
        x = torch.randn(shape)
        (value,) = layouts.imposed((x.transpose(0, 1).contiguous(),), (x,))
        assert torch.equal(value, x.transpose(0, 1))
        assert value.stride() == x.transpose(0, 1).stride() or 1 in shape
    assert asked == [(2, 3, 4), (1, 3, 4)]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_inputs(layout: torch.layout) -> None:
    class Graph(Net):
        def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:  # type: ignore[override]
            y = self.a(x)
            mixed = (adjacency @ y.flatten(1)).unflatten(1, y.shape[1:])
            return self.head(self.c(self.b(mixed)))

    net = settle(Graph(None))  # type: ignore[arg-type]
    model, reference = freezable(copy.deepcopy(net)), copy.deepcopy(net)
    model.freeze(2)
    freeze_by_hand(reference, model.units[:2])
    for number in (6, 8):
        adjacency = (torch.rand(number, number, dtype=D) > 0.5).to(D).to_sparse(layout=layout)
        torch.testing.assert_close(model(image(number), adjacency), reference(image(number), adjacency))
