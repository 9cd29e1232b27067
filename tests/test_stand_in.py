"""The model in the network's place: names, attributes, hooks, nesting, copies, saving."""

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Chain, ConvNorm, settle
from torch import Tensor, nn

import fxfreeze
from fxfreeze import FreezableModel, Milestones
from fxfreeze.fidelity import BOUNDS, relative_error

NEVER = Milestones({"stem": 10**6})


class Named(Chain):
    """With what a user's class has besides layers; at module level, so that it pickles."""

    label: str
    scale: Tensor

    def __init__(self) -> None:
        super().__init__(ConvNorm(8, 8), ConvNorm(8, 8))
        self.label = "mine"
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)
        self.extra = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor, *, gain: float = 1.0) -> Tensor:
        """Logits of images."""
        return super().forward(x) * self.scale * gain

    def describe(self) -> str:
        return f"{self.label} {type(self).__name__}"

    @property
    def width(self) -> int:
        return int(self.get_parameter("stem.0.weight").shape[0])


def network() -> Named:
    net = settle(Named())
    assert isinstance(net, Named)
    return net


def images(count: int = 6, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 8, 8, dtype=dtype)


def assert_same(values: Tensor, expected: Tensor) -> None:
    assert relative_error(values.detach(), expected.detach()) <= BOUNDS[torch.float32]


def train(model: nn.Module, steps: int = 3) -> list[Tensor]:
    """A few steps of SGD on fixed data; the parameters afterwards."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(steps):
        x = torch.randn(6, 3, 8, 8, generator=generator, dtype=dtype)
        optimizer.zero_grad()
        F.cross_entropy(model(x), torch.arange(6) % 5).backward()
        optimizer.step()
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- names


@pytest.mark.parametrize("depth", [0, 2, 4])
def test_names_and_their_order(depth: int) -> None:
    net = network()
    reference = copy.deepcopy(net)
    model = fxfreeze.compile(net, NEVER)
    model.freeze(depth)
    model(images())
    for listed in ("named_parameters", "named_buffers", "named_modules", "named_children"):
        ours, theirs = getattr(model, listed)(), list(getattr(net, listed)())
        expected = [name for name, _ in getattr(reference, listed)()]
        pairs = list(ours)
        assert [name for name, _ in pairs] == [name for name, _ in theirs] == expected
        assert all(a is b for (name, a), (_, b) in zip(pairs, theirs, strict=True) if name)
    assert list(model.state_dict()) == list(reference.state_dict())
    assert model.state_dict()._metadata == reference.state_dict()._metadata  # type: ignore[attr-defined]
    assert next(iter(model.parameters())) is next(net.parameters())


def test_signature() -> None:
    net = network()
    model = fxfreeze.compile(net, NEVER)
    assert inspect.signature(model.forward) == inspect.signature(net.forward)
    assert model.forward.__doc__ == "Logits of images."
    assert model.forward.__name__ == "forward"
    x = images()
    model.eval()
    assert torch.equal(model.forward(x, gain=2.0), net.forward(x, gain=2.0))


def test_attributes_fall_through() -> None:
    net = network()
    model = fxfreeze.compile(net, NEVER)
    assert model.label == "mine"
    assert model.width == 8
    assert model.describe() == "mine Named"
    assert model.blocks is net.blocks
    assert model.scale is net.scale
    with pytest.raises(AttributeError, match="'Named' object has no attribute 'nothing'"):
        _ = model.nothing
    assert not hasattr(model, "nothing")


def test_setting_goes_to_the_original() -> None:
    net = network()
    model = fxfreeze.compile(net, Milestones({"stem": 0}))
    model.label = "yours"
    assert net.describe() == "yours Named"
    model.scale = torch.full((1,), 3.0)
    assert dict(net.named_buffers())["scale"] is model.scale
    x = images()
    assert_same(model.eval()(x), net(x))
    model.extra = nn.Parameter(torch.zeros(1))
    assert dict(model.named_parameters())["extra"] is net.extra
    model.register_buffer("more", torch.zeros(1))
    assert "more" in net.state_dict()
    del model.more
    assert "more" not in net.state_dict()
    with pytest.raises(AttributeError):
        del model.nothing


def test_a_forward_of_the_users_own() -> None:
    """``model.forward = wrapped`` works as on any module, and is undone by deleting it."""
    model = fxfreeze.compile(network(), Milestones({"stem": 0})).eval()
    x = images()
    plain, forward = model(x), model.forward
    model.forward = lambda x: forward(x) * 2
    assert torch.equal(model(x), plain * 2)


def test_the_training_flag_is_the_originals() -> None:
    net = network()
    model = fxfreeze.compile(net, NEVER)
    for flag in (False, True):
        assert model.train(flag) is model
        assert model.training is net.training is flag
        net.train(not flag)
        assert model.training is net.training is (not flag)
        model.training = flag
        assert model.training is net.training is flag
    assert model.eval() is model


def test_printed() -> None:
    model = fxfreeze.compile(network(), Milestones({"stem": 0}))
    lines = repr(model).splitlines()
    assert lines[:2] == ["FreezableModel(", "  Named, 1 of 5 units frozen"]
    assert lines[2:] == repr(model.original).splitlines()[1:]


# ---- dtypes and devices


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", ["to", "method", "parent", "original"])
def test_casts(depth: int, dtype: torch.dtype, how: str) -> None:
    """After a forward in the old dtype; and back."""
    net = network().eval()
    model = fxfreeze.compile(net, NEVER).eval()
    model.freeze(depth)
    parent = nn.Sequential(model)
    for wanted in (torch.float32, dtype, torch.float32):
        method = {torch.float32: "float", torch.float64: "double", torch.bfloat16: "bfloat16"}[wanted]
        subject = {"to": model, "method": model, "parent": parent, "original": net}[how]
        moved = subject.to(wanted) if how != "method" else getattr(subject, method)()
        assert moved is subject
        assert {p.dtype for p in model.parameters()} == {wanted}
        x = images(dtype=wanted)
        values = model(x)
        assert values.dtype == wanted
        assert relative_error(values.detach(), net(x).detach()) <= BOUNDS[wanted]
    assert [p.requires_grad for p in model.parameters()] == [
        not any(name in unit.parameters for unit in model.units[:depth]) for name, _ in model.named_parameters()
    ]


# ---- hooks on the root


REGISTER: dict[str, Callable[[nn.Module, Callable[..., None]], Any]] = {
    "forward": lambda m, f: m.register_forward_hook(f),
    "forward with keywords": lambda m, f: m.register_forward_hook(f, with_kwargs=True),
    "forward pre": lambda m, f: m.register_forward_pre_hook(f),
    "full backward": lambda m, f: m.register_full_backward_hook(f),
    "full backward pre": lambda m, f: m.register_full_backward_pre_hook(f),
}


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("name", REGISTER)
def test_hooks_on_the_root_fire_once(name: str, before: bool) -> None:
    """Registered on the network before compile, or on the model after: one call a step, at every depth."""
    net, fired = network(), []
    model = None if before else fxfreeze.compile(net, NEVER)
    handle = REGISTER[name](model or net, lambda *args: fired.append(args))
    model = model or fxfreeze.compile(net, NEVER)
    for depth in range(len(model.units)):
        model.freeze(depth)
        for mode in (True, False):
            fired.clear()
            model.train(mode)(images(), gain=0.5).sum().backward()
            assert len(fired) == 1
    handle.remove()
    model(images()).sum().backward()
    assert len(fired) == 1


def test_hooks_of_saving_and_loading() -> None:
    net = network()
    model = fxfreeze.compile(net, NEVER)
    seen: list[str] = []
    model.register_state_dict_pre_hook(lambda module, prefix, keep: seen.append(f"save {prefix}"))
    model.register_load_state_dict_post_hook(lambda module, keys: seen.append("load"))
    model.load_state_dict(model.state_dict())
    nn.Sequential(model).state_dict()
    assert seen == ["save ", "load", "save 0."]


# ---- inside another module


def test_nesting() -> None:
    """A parent trains, saves, loads, casts and thaws it like any child; names have no level in between."""
    net = network()
    reference = nn.Sequential(nn.Identity(), copy.deepcopy(net), nn.Linear(5, 5))
    model = fxfreeze.compile(net, Milestones({"blocks.0": 0}))
    parent = nn.Sequential(nn.Identity(), model, nn.Linear(5, 5))
    assert list(parent.state_dict()) == list(reference.state_dict())
    assert [name for name, _ in parent.named_modules()] == [name for name, _ in reference.named_modules()]
    model(images())
    parent.load_state_dict(reference.state_dict())
    x = images()
    assert_same(parent.eval()(x), reference.eval()(x))
    parent.train()
    assert net.last.training
    assert not net.stem.training
    frozen = [p for unit in model.units[: model.depth] for p in map(net.get_parameter, unit.parameters)]
    before = [p.clone() for p in frozen]
    parent.requires_grad_(True)  # some trainers do, before every phase
    parent(x).sum().backward()
    assert not any(p.requires_grad for p in frozen)
    assert all(p.grad is None for p in frozen)
    assert all(p.grad is not None for p in (*net.last.parameters(), *net.head.parameters()))
    train(parent)
    assert equal([p.detach() for p in frozen], before)
    parent.zero_grad()
    parent.double()
    assert parent(images(dtype=torch.float64)).dtype == torch.float64


def test_two_models_in_one_parent() -> None:
    """Each half freezes by itself; what feeds the second comes from the first without a gradient there."""
    encoder = settle(nn.Sequential(nn.Sequential(*ConvNorm(3, 8)), nn.Sequential(*ConvNorm(8, 3)))).eval()
    first, second = (
        fxfreeze.compile(net.eval(), Milestones({name: 0})) for net, name in ((encoder, "0"), (network(), "stem"))
    )
    reference = nn.Sequential(copy.deepcopy(encoder), copy.deepcopy(second.original))
    parent = nn.Sequential(first, second)
    x = images()
    with pytest.raises(RuntimeError, match="an input requires grad, but the first 1 units are frozen"):
        parent(x)
    with torch.no_grad():
        assert_same(parent(x), reference.eval()(x))


# ---- copies and files


def copied(model: FreezableModel) -> FreezableModel:
    return copy.deepcopy(model)


def pickled(model: FreezableModel) -> FreezableModel:
    result: FreezableModel = pickle.loads(pickle.dumps(model))
    return result


def saved(model: FreezableModel) -> FreezableModel:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    result: FreezableModel = torch.load(file, weights_only=False)
    return result


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("duplicate", [copied, pickled, saved])
def test_copies(duplicate: Callable[[FreezableModel], FreezableModel], depth: int, after: bool) -> None:
    """A copy, made before a forward or after, shares nothing, is frozen alike, and trains to the same bits."""
    model = fxfreeze.compile(network(), NEVER)
    model.freeze(depth)
    if after:
        model(images())
    twin = duplicate(model)
    assert type(twin) is FreezableModel
    assert twin.depth == depth
    assert twin.units == model.units
    assert twin.original is not model.original
    assert twin.describe() == model.describe()
    assert list(twin.state_dict()) == list(model.state_dict())
    ours = {t.data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert ours.isdisjoint(t.data_ptr() for t in (*twin.parameters(), *twin.buffers()))
    assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in model.parameters()]
    assert next(iter(twin.original.parameters())) is next(iter(twin.parameters()))
    assert [m.training for m in twin.modules()] == [m.training for m in model.modules()]
    x = images()
    assert equal(train(twin), train(model))
    assert torch.equal(twin.eval()(x), model.eval()(x))
    twin.freeze(3)
    assert model.depth == depth
    twin._restore_depth(0)
    assert all(p.requires_grad for p in twin.parameters())
    assert_same(twin(x), twin.original(x))


def test_a_copy_of_the_original_is_an_ordinary_network() -> None:
    model = fxfreeze.compile(network(), Milestones({"blocks.0": 0}))
    model(images())
    twin = copy.deepcopy(model.original)
    assert type(twin) is Named
    x = images()
    assert_same(model.eval()(x), twin.eval()(x))


def test_state_through_a_file() -> None:
    """Into the bare network, and into a model frozen elsewhere."""
    model = fxfreeze.compile(network(), Milestones({"blocks.0": 0}))
    train(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    bare = Named().eval()
    assert bare.load_state_dict(state) == ([], [])
    other = fxfreeze.compile(Named(), Milestones({"last": 0})).eval()
    other(images())
    assert other.load_state_dict(state) == ([], [])
    x = images()
    for net in (bare, other):
        assert_same(net(x), model.eval()(x))
    with pytest.raises(RuntimeError, match=r"Missing key.*stem\.0\.weight"):
        model.load_state_dict({k: v for k, v in state.items() if k != "stem.0.weight"})
    missing, unexpected = model.load_state_dict({"other": torch.ones(1)}, strict=False)
    assert "stem.0.weight" in missing
    assert unexpected == ["other"]


class WithExtraState(nn.Module):
    """Saves more than tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last, self.fc = ConvNorm(3, 4), ConvNorm(4, 4), nn.Linear(4, 2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.last(self.stem(x)).mean((2, 3)))

    def get_extra_state(self) -> int:
        return self.calls

    def set_extra_state(self, state: int) -> None:
        self.calls = state


def test_extra_state() -> None:
    model = fxfreeze.compile(WithExtraState(), Milestones({"stem": 0}))
    model.calls = 7
    other = fxfreeze.compile(WithExtraState(), NEVER)
    other.load_state_dict(model.state_dict())
    assert other.calls == other.original.calls == 7


def test_averaged_models() -> None:
    """torch's own averaging copies the model and updates the copy in place, frozen part and all."""
    model = fxfreeze.compile(network(), NEVER)
    averaged = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    model.freeze(2)
    for _ in range(2):
        train(model, 1)
        averaged.update_parameters(model)
        x = images()
        assert_same(averaged.module.eval()(x), averaged.module.original(x))
        averaged.module.train()
    assert all(
        torch.equal(a, b) for a, b in zip(averaged.module.stem.parameters(), model.stem.parameters(), strict=True)
    )
