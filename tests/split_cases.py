"""Networks of four blocks whose forward makes one thing hard for a cut, and what they are called with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CASES", "C", "Case", "D", "Net", "conv", "image"]

C = 4
D = torch.float64


def conv(channels: int = C, out: int = C) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, 1, 1, dtype=D), nn.BatchNorm2d(out, dtype=D))


class Net(nn.Module):
    """`function(self, x)`, with three blocks and a head; its units are a, b, c and the head unless it says otherwise."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        self.a, self.b, self.c = conv(3), conv(), conv()
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.fc = nn.Linear(C, 3, dtype=D)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)

    def head(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


def image(n: int = 3) -> Tensor:
    return torch.randn(n, 3, 6, 6, dtype=D, generator=torch.Generator().manual_seed(n))


# ---- memory: in-place operators and views across the cut


def in_place_chain(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    first = h.relu_()
    second = first.add_(1)
    return self.head(self.c(self.b(h) + first) + second * first + h)


def in_place_chain_written(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    first = h.relu_()
    second = first.add_(1)
    z = self.b(h + 1)
    h.mul_(z.detach())
    return self.head(self.c(z + first) + second * first + h)


def written_late(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    z = self.b(h + 1)
    h[:, 0] = z[:, 1].detach()
    y = self.c(z + h)
    h.zero_()
    return self.head(y + h)


def accumulated(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    total = h.clone()
    total += h
    z = self.b(total + 0)
    total += z
    z = self.c(z)
    total += z
    return self.head(total)


def views_of_views(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    v = h.view(h.shape[0], 2, 2, 6, 6)
    w, q = v[:, 1].permute(0, 2, 3, 1), v.unbind(2)[0]
    z = self.b(h + 1)
    w.mul_(z.detach().mean())
    q[..., 0] = 1
    return self.head(self.c(z) + h)


def chunks(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    p, q = h.chunk(2, 1)
    z = self.b(h + 1)
    p += z[:, :2].detach()
    return self.head(self.c(z + torch.cat([q, p], 1)) + h)


def siblings(self: Net, x: Tensor) -> Tensor:
    """Two views cross, their base does not."""
    p, q = self.a(x).split([1, 3], 1)
    z = self.b(torch.cat([p, q], 1))
    q.relu_()
    return self.head(self.c(z) + torch.cat([q, p], 1))


def maybe_views(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    flat = h.flatten(1)
    z = self.b(h + 1)
    flat.mul_(2)
    return self.head(self.c(z) + h)


def maybe_copies(self: Net, x: Tensor) -> Tensor:
    h = self.a(x).transpose(1, 2)
    copy, flat = h.contiguous(), h.reshape(h.shape[0], -1)
    z = self.b(h.transpose(1, 2) + 1)
    copy.mul_(2)
    flat.add_(1)
    return self.head(self.c(z) + h.transpose(1, 2))


def detached(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    d = h.detach()
    z = self.b(h + d)
    d.mul_(0.5)
    return self.head(self.c(z) + h.detach() + z.detach())


def lists(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    k = h * 2
    z = self.b(h + 1)
    torch._foreach_mul_([h, k], 2.0)
    return self.head(self.c(z) + h + k)


def outs(self: Net, x: Tensor) -> Tensor:
    h = self.a(x).detach()
    t = torch.empty_like(h)
    torch.add(h, 1, out=t)
    z = self.b(t + 0)
    u = t.new_empty(0)
    torch.mul(t, 2, out=u)
    torch.mul(z.detach(), 2, out=t)
    return self.head(self.c(z) + t + u)


def two_outs(self: Net, x: Tensor) -> Tensor:
    h = self.a(x).detach()
    values = h.new_zeros(h.shape[0], C, 6)
    torch.max(h, 3, out=(values, values.long()))
    return self.head(self.c(self.b(h) + values[..., None]))


def masks(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    h = torch.where(h > 0, h, 0.1 * h)
    h[h < 0.1] = 0
    z = self.b(h)
    return self.head(self.c(z.masked_fill(z < 0, 0.0)) + h)


def input_written(self: Net, x: Tensor) -> Tensor:
    x.sub_(0.5).div_(2)
    h = self.a(x)
    x += 1
    z = self.b(h) + x.mean()
    x[:, 0] = 0
    return self.head(self.c(z)) + x.mean()


def input_view_written(self: Net, x: Tensor) -> Tensor:
    v = x[:, :1]
    z = self.b(self.a(x))
    v.mul_(2)
    y = x.permute(0, 2, 3, 1)
    y += 1
    return self.head(self.c(z) + v) + x.sum()


def reshaped_in_place(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    n, t = h.shape[1], h.transpose(1, 3)
    z = self.b(h + 1)
    h.transpose_(1, 2)
    m = h.shape[2]
    return self.head(self.c(z + h.sum()) * m * n * t.shape[1])


def reshaped_before_the_cut(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    n, d = h.shape[1], h.dim()
    h.unsqueeze_(1)
    return self.head(self.c(self.b(h.squeeze(1))) * n * d)


def numbers(self: Net, x: Tensor) -> Tensor:
    """Numbers read from values that are written into afterwards."""
    h = self.a(x)
    v, w = h.sum().item(), h[0, 0, 0, 0].item()
    h.mul_(3)
    return self.head(self.c(self.b(h) * w) * v + h)


# ---- values of other kinds


def constant_filled(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    o = torch.zeros(1, C, 6, 6, dtype=D)
    o[:, :2] = h[:1, :2].detach()
    return self.head(self.c(self.b(h) + o) + o)


def constant_filled_through_a_view(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    o = torch.zeros(C, dtype=D)
    v = o.view(2, 2)
    v[0] = h.detach().mean()
    return self.head(self.c(self.b(h) + o.view(-1, 1, 1)) * v.sum())


def constant_filled_later(self: Net, x: Tensor) -> Tensor:
    o = torch.ones(C, 1, 1, dtype=D)
    h = self.a(x) * o
    z = self.b(h)
    o.mul_(z.detach().mean())
    return self.head(self.c(z) + o)


def sizes(self: Net, x: Tensor) -> Tensor:
    n, _, height, width = x.shape
    z = self.b(self.a(x)).view(n, -1, height * width)
    z = self.c(z.reshape(n, C, height, width))
    return self.head(z.reshape(-1, C, height, width)) * n


def sizes_of_what_does_not_cross(self: Net, x: Tensor) -> Tensor:
    n = x.size(0)
    m = x.flatten().numel() // n
    h = self.b(self.a(x))
    return self.head(self.c(h)) / m + torch.zeros((n, 3), dtype=D)


def batch_moved(self: Net, x: Tensor) -> Tensor:
    """No dimension of what crosses is the batch."""
    h = self.a(x).permute(1, 2, 3, 0).flatten()
    z = self.b(h.view(C, 6, 6, -1).permute(3, 0, 1, 2))
    return self.head(self.c(z))


def outputs_of_the_prefix(self: Net, x: Tensor) -> Any:
    h = self.a(x)
    z = self.b(h)
    return {"h": h, "f": [h.flatten(1), z], "o": self.head(self.c(z)), "n": None, "k": 3, "x": x}


def outputs_written(self: Net, x: Tensor) -> Any:
    h = self.a(x)
    o = self.head(self.c(self.b(h + 1)))
    h.mul_(2)
    return h, o, x


def twice(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    return self.head(self.c(self.b(h) + self.b(h * 2)))


def unused(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    self.u(h)
    z = self.b(h)
    self.w(z)
    F.relu(z)
    return self.head(self.c(z))


def tied(self: Net, x: Tensor) -> Tensor:
    h = self.a(x) * self.scale
    return self.head(self.c(self.b(h)) * self.scale)


# ---- buffers


def buffers(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    if self.training:
        with torch.no_grad():
            self.mean.mul_(0.9).add_(h.mean((0, 2, 3)), alpha=0.1)
    z = self.b(h - self.mean[:, None, None])
    self.count.add_(1)
    return self.head(self.c(z)) * self.count


def statistics_read(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    before = self.b[1].running_mean * 1
    z = self.b(h)
    after, other = self.b[1].running_mean.clone(), self.a[1].running_mean
    return self.head(self.c(z + before[:, None, None])) + after.sum() + other.sum()


def statistics_of_a_live_norm(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    z = self.c(h)
    return self.head(self.b(h + self.c[1].running_mean[:, None, None]) + z)


def buffer_view(self: Net, x: Tensor) -> Tensor:
    """A view of a buffer, and what may be one, taken before the cut and read after a write behind it."""
    n = x.shape[1] + 1
    view, maybe = self.mean[:n], self.mean.flatten()
    z = self.b(self.a(x) + view[:, None, None] + maybe[:, None, None])
    self.mean.add_(1)
    return self.head(self.c(z) * view[:, None, None] * maybe[:, None, None])


def buffer_perhaps(self: Net, x: Tensor) -> Tensor:
    """What may be a view of a buffer or of a value, and is read after a write into the buffer behind the cut."""
    h = self.a(x)
    perhaps = torch.broadcast_tensors(self.mean[:, None, None], h)[0]
    z = self.b(h + perhaps)
    self.mean.add_(1)
    return self.head(self.c(z) * perhaps)


# ---- gradients, random numbers, assertions, things kept whole


def gradient_off(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    z = self.b(h)
    with torch.no_grad():
        target = self.c(self.b(h)) / z.norm()
        z.clamp_(-1, 1)
    return self.head(self.c(z) + target)


def noise(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    h = h + torch.randn_like(h) if self.training else h
    z = self.b(h)
    return self.head(self.c(z + torch.randn(z.shape, dtype=D) if self.training else z))


def dead_chance(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    torch.rand_like(h)
    F.dropout(h, 0.5)
    return self.head(F.dropout(self.c(self.b(h)), 0.3, self.training))


class Always(nn.Module):
    """Dropout that no mode turns off, its result used or not."""

    def __init__(self, used: bool = True) -> None:
        super().__init__()
        self.conv, self.used = conv(), used

    def forward(self, x: Tensor) -> Tensor:
        y = F.dropout(self.conv(x), 0.5)
        return y if self.used else self.conv[0](x)


def always_random(self: Net, x: Tensor) -> Tensor:
    return self.head(F.dropout(self.c(self.m(self.a(x))), 0.5))


def parallel_random(self: Net, x: Tensor) -> Tensor:
    """The branch that freezes first draws last."""
    h = self.a(x)
    r, q, p = self.r(h), self.q(h), self.p(h)
    return self.head(p + self.r.conv[0](self.q.conv[0](q + r)))


def asserted(self: Net, x: Tensor) -> Tensor:
    torch._assert(x.shape[1] == 3, "three channels")
    return self.head(self.c(self.b(self.a(x))))


@torch.fx.wrap
def added_to(x: Tensor, y: Any) -> Tensor:
    x += y
    return x


def wrapped_live(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    z = self.b(h + 1)
    added_to(h, z.detach())
    return self.head(self.c(z) + h)


def wrapped_frozen(self: Net, x: Tensor) -> Tensor:
    h = self.a(x)
    w = added_to(h, 1)
    return self.head(self.c(self.b(h + w)) + h)


class Takes(nn.Module):
    """Reads a tuple, and may write into its first part."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.conv, self.writes = conv(), writes

    def forward(self, parts: Any) -> Tensor:
        first, second = parts
        if self.writes:
            first.mul_(2)
        return self.conv(torch.cat([second, first], 1))


def tuple_crosses(self: Net, x: Tensor) -> Tensor:
    h = self.a(x).relu()
    return self.head(self.c(self.m(h.chunk(2, 1)) + h))


def sequence(self: Any, i: Tensor) -> Tensor:
    x = self.embed(i) + self.place(torch.arange(i.shape[1]))
    x = torch.relu_(self.l1(x))
    return self.out((x + self.l2(x)).mean(1))


class Case(NamedTuple):
    function: Callable[..., Any]
    parts: Callable[[], dict[str, Any]] = dict
    calls: Callable[[], list[Any]] = lambda: [(image(3),), (image(5),)]
    units: int = 4


def tokens() -> list[Any]:
    return [(torch.tensor([[1, 2, 3], [4, 5, 6]]),), (torch.tensor([[0, 6, 1]]),)]


def words() -> dict[str, Any]:
    embeddings = {"embed": nn.Embedding(7, 6, dtype=D), "place": nn.Embedding(5, 6, dtype=D)}
    return {
        **embeddings,
        "l1": nn.Linear(6, 6, dtype=D),
        "l2": nn.Linear(6, 6, dtype=D),
        "out": nn.Linear(6, 3, dtype=D),
    }


PLAIN = (
    *(in_place_chain, in_place_chain_written, written_late, accumulated, views_of_views, chunks, siblings, maybe_views),
    *(maybe_copies, detached, lists, outs, two_outs, masks, input_written, input_view_written, reshaped_in_place),
    *(reshaped_before_the_cut, numbers, constant_filled, constant_filled_through_a_view, constant_filled_later, sizes),
    *(sizes_of_what_does_not_cross, batch_moved, outputs_of_the_prefix, outputs_written, twice, statistics_read),
    *(statistics_of_a_live_norm, noise, dead_chance, asserted, wrapped_live, wrapped_frozen),
)
CASES: dict[str, Case] = {
    **{function.__name__: Case(function) for function in PLAIN},
    "unused": Case(unused, lambda: {"u": conv(), "w": conv()}),
    "tied": Case(tied, lambda: {"scale": nn.Parameter(torch.rand(C, 1, 1, dtype=D))}, units=2),
    "buffers": Case(buffers, lambda: {"mean": torch.zeros(C, dtype=D), "count": torch.ones(1, dtype=D)}),
    "buffer_view": Case(buffer_view, lambda: {"mean": torch.ones(C, dtype=D)}),
    "buffer_perhaps": Case(buffer_perhaps, lambda: {"mean": torch.ones(C, dtype=D)}),
    "gradient_off": Case(gradient_off),
    "always_random": Case(always_random, lambda: {"m": Always()}),
    "always_random_unused": Case(always_random, lambda: {"m": Always(used=False)}),
    "parallel_random": Case(parallel_random, lambda: {"p": Always(), "q": Always(), "r": Always()}, units=4),
    "tuple_crosses": Case(tuple_crosses, lambda: {"m": Takes(writes=False)}),
    "tuple_written": Case(tuple_crosses, lambda: {"m": Takes(writes=True)}),
    "sequence": Case(sequence, words, tokens, units=5),
}
