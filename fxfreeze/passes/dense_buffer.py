"""Concatenations of channels as slices of one buffer, which each image is written into when it is made.

Where images are concatenated again and again, one more each time, every concatenation is a slice of the longest: each
image has one place in it, so nothing is copied, and a dense block moves its features once instead of once a layer.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxfreeze.operators import op_of
from fxfreeze.passes.buffers import allocate, joined, placed
from fxfreeze.passes.fold_batchnorm import scale_shift
from fxfreeze.passes.specified import unsuited
from fxfreeze.rewrite import Outcome, Writes, forget_unread, place

__all__ = ["dense_buffer"]


@dataclass
class _Block:
    """Images that share a buffer, in its order, and the concatenations of some that lie side by side."""

    images: tuple[Node, ...]
    cats: dict[Node, int]  # where each begins among the images

    def channels(self, images: Iterable[Node]) -> int:
        return sum(int(n.meta["value"].shape[1]) for n in images)


def dense_buffer(module: GraphModule) -> list[Outcome]:
    """Give a buffer to each family of concatenations."""
    parts, outcomes = _concatenations(module)
    for block in _blocks(parts, outcomes):
        _build(block, parts, module)
        outcomes += [Outcome("dense_buffer", place(cat), True, "made a slice of a buffer") for cat in block.cats]
    return outcomes


def _concatenations(module: GraphModule) -> tuple[dict[Node, tuple[Node, ...]], list[Outcome]]:
    """Each concatenation of images with the images it is made of in the end, and why some are left alone."""
    parts: dict[Node, tuple[Node, ...]] = {}
    outcomes, writes = [], Writes(module)
    for node in module.graph.nodes:
        op = op_of(node, module)
        if op is None or op.kind != "cat":
            continue
        if (reason := _check(node, op.arguments, module, writes)) is not None:
            outcomes.append(Outcome("dense_buffer", place(node), False, "left alone", reason))
            continue
        parts[node] = tuple(part for n in op.arguments["tensors"] for part in parts.get(n, (n,)))
    return parts, outcomes


def _check(node: Node, arguments: dict[str, object], module: GraphModule, writes: Writes) -> str | None:
    images = arguments["tensors"]
    if arguments.get("out") is not None:
        return "it writes into a tensor that it is given"
    if not isinstance(images, (list, tuple)) or not all(isinstance(n, Node) for n in images):
        return "the list that it joins is computed at run time"
    if (reason := next(filter(None, map(unsuited, (node, *images))), None)) is not None:
        return reason
    if arguments["dim"] not in (1, -3):
        return f"it joins dimension {arguments['dim']}, not the channels"
    if any(n.meta["value"].dtype != node.meta["value"].dtype for n in images):
        return "it joins several dtypes"
    for n in (node, *images):
        if (writer := writes.after(n)) is not None:
            return f"{writer.name} writes into {place(n)} after it was made"
    for n in images:
        if not (_made_with_fixed(n, module) or _read_with_fixed(n, module)):
            return f"how many channels {place(n)} has is not fixed by a weight"
    return None


# What keeps the channels of its input.
_KEEPS = ("activation", "identity", "avg_pool", "max_pool", "mean_pool", "add")


def _made_with_fixed(node: Node, module: GraphModule) -> bool:
    """Whether a weight says how many channels ``node`` makes, so that they are as many at any size of the input."""
    op = op_of(node, module)
    if op is None:
        return node.target is scale_shift
    if op.kind in _KEEPS or op.kind == "cat":
        return all(_made_with_fixed(n, module) for n in node.all_input_nodes)
    return op.kind in ("conv", "conv_transpose", "batch_norm")


def _read_with_fixed(node: Node, module: GraphModule) -> bool:
    """Whether a weight says how many channels ``node``, or what it is joined to, must have for who reads it."""
    for user in node.users:
        op = op_of(user, module)
        if user.target is scale_shift or (op is not None and op.kind in ("conv", "batch_norm")):
            return True
        if op is not None and (op.kind in _KEEPS or op.kind == "cat") and _read_with_fixed(user, module):
            return True
    return False


def _blocks(parts: dict[Node, tuple[Node, ...]], outcomes: list[Outcome]) -> list[_Block]:
    """Families in which every concatenation is a stretch of the longest; an image has its place in one buffer only."""
    blocks: list[_Block] = []
    taken: set[Node] = set()
    for cat, images in sorted(parts.items(), key=lambda item: -len(item[1])):
        block, at = next(((b, at) for b in blocks if (at := _stretch(images, b.images)) is not None), (None, 0))
        if block is not None:
            block.cats[cat] = at
        elif len(set(images)) < len(images) or taken & set(images):
            twice = next(n for i, n in enumerate(images) if n in taken or n in images[:i])
            why = f"{place(twice)} has another place already: in memory it can lie in one only"
            outcomes.append(Outcome("dense_buffer", place(cat), False, "left alone", why))
        else:
            blocks.append(_Block(images, {cat: 0}))
            taken |= set(images)
    return blocks


def _stretch(images: tuple[Node, ...], longest: tuple[Node, ...]) -> int | None:
    """Where ``images`` lie, one after the other, among the longest."""
    return next((i for i in range(len(longest)) if longest[i : i + len(images)] == images), None)


def _build(block: _Block, parts: dict[Node, tuple[Node, ...]], module: GraphModule) -> None:
    graph, first = module.graph, min(block.images)
    with graph.inserting_after(first):
        buffer = graph.call_function(allocate, (first, block.channels(block.images)))
    buffer.meta.update(first.meta, value=None)
    homes = {}
    for i, image in enumerate(block.images):
        readers = [user for user in image.users if user is not buffer]
        with graph.inserting_after(buffer if image is first else image):
            home = homes[image] = graph.call_function(placed, (buffer, block.channels(block.images[:i]), image))
        home.meta.update(image.meta)
        for reader in readers:
            reader.replace_input_with(image, home)
    for cat, at in block.cats.items():
        start, channels = block.channels(block.images[:at]), block.channels(parts[cat])
        with graph.inserting_before(cat):
            whole = graph.call_function(joined, (buffer, start, channels, *[homes[n] for n in parts[cat]]))
        whole.meta.update(cat.meta)
        cat.replace_all_uses_with(whole)
    for cat in sorted(block.cats, reverse=True):
        forget_unread(module, cat)
