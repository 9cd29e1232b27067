"""One call of a model: its inputs, or what is stored of them, through the frozen prefix and the live suffix."""

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from fxfreeze.chain import Chain
from fxfreeze.derived import Derived
from fxfreeze.inputs import TraceRefusal
from fxfreeze.rows import batch_size, like, merged, repeated, resized, take, with_another
from fxfreeze.rowwise import NotRowwise, Undecided
from fxfreeze.stored import Boundary, Fill, Part, StoredBatch, Tap, stored_batch
from fxfreeze.surgery import Given, Plan, Surgery, plan_key

__all__ = ["Forward"]

_WITNESSES = 4


class Forward:
    """Runs a network of which the first units may be frozen.

    batch_size: the most samples that a training step has had. The prefix computes a smaller batch with as many, its first
    sample repeated: rows of small batches differ in the last bits, and a stored row must be what any step would compute.
    compiled: whether a call ran under torch.compile; witnesses: some samples, by which to tell what a batch of one does not.
    """

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.batch_size = 0
        self.compiled = False
        self.witnesses: list[Tensor] = []
        self._taps: list[weakref.ref[Tap]] = []

    def attach(self, tap: Tap) -> None:
        """Let ``tap`` see every call from now on, as long as it lives."""
        self._taps = [*(ref for ref in self._taps if ref() is not None), weakref.ref(tap)]

    @property
    def taps(self) -> list[Tap]:
        return [tap for ref in self._taps if (tap := ref()) is not None]

    def __call__(self, derived: Derived, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _Call(derived, args, kwargs)
        if call.batch is not None and call.batch.depth > derived.depth:
            call.check_batch(call.batch, self.net)  # it was made before the depth was lowered
            return self(derived, *call.fetched(call.batch))
        if self.training and self._learn(call.tensors):
            derived.start(derived.depth)  # what was compiled is for fewer samples
        if not derived.depth:
            self._show(call)
            return self.net.forward(*args, **kwargs)
        try:
            plan = call.plan(partial(self._given, call))
        except TraceRefusal as error:
            refusal = error
        else:
            boundary = self.boundary(call, plan)
            if plan.chain.prefix.whole:
                derived.look_again()  # what modules kept whole wrote into their own buffers is nobody else's change
            if boundary is not None:
                return self.live(plan, boundary)
        if call.batch is not None:
            return self(derived, *call.fetched(call.batch))
        self._show(call)
        outputs = self.net.forward(*args, **kwargs)  # says itself what is wrong with a call that it can't run either
        call.surgery.refuse(call.key, refusal)
        return outputs

    def _learn(self, tensors: Sequence[Tensor]) -> bool:
        """Take note of a training batch; whether those before had fewer samples."""
        count = batch_size(tensors) or 0
        grows = 0 < self.batch_size < count
        self.batch_size = max(self.batch_size, count)
        if not self.witnesses and count > 1:
            self.witnesses = [t[:_WITNESSES].detach().clone() for t in tensors]
        return grows

    @property
    def training(self) -> bool:
        return self.net.training and torch.is_grad_enabled()

    def _show(self, call: "_Call", chain: Chain | None = None) -> list[Fill]:
        """Let the taps see the tensors of a call; ``chain``: what computes the boundary from them."""
        if torch.compiler.is_compiling():
            self.compiled = True
            return []  # Dynamo can't follow what looks at values
        return [fill for tap in self.taps if (fill := tap.received(call.tensors, chain)) is not None]

    def boundary(self, call: "_Call", plan: Plan) -> tuple[Any, ...] | None:
        """What the prefix hands over to the suffix; None where the model must be given the inputs of a stored batch."""
        if call.batch is None:
            return self._frozen(call, plan)
        # What is stored is not for Dynamo to trace. Where nothing compiles, this costs nothing.
        stored = torch.compiler.disable(self._stored) if torch.compiler.is_compiling() else self._stored  # type: ignore[no-untyped-call]
        return stored(call, plan, call.batch)

    def live(self, plan: Plan, boundary: tuple[Any, ...]) -> Any:
        """What the suffix makes of the boundary, as the original returns it."""
        return pytree.tree_unflatten(plan.suffix(*boundary), plan.outputs)

    def _frozen(self, call: "_Call", plan: Plan) -> tuple[Any, ...]:
        """From the tensors of a call."""
        chain, tensors = plan.chain, call.tensors
        fills = self._show(call, chain)
        if not self.training and not self.batch_size:
            fills = []  # it is not known yet how training will compute a row
        count = batch_size(tensors)
        if (self._steady(chain) or fills) and count and count != self.batch_size:
            if self._pads(chain, tensors):
                rows = self._rows(call, plan, Part(0, None, tensors), fills)
                return chain.handed_over(chain.frontier(chain.depth).completed(rows, tensors), tensors)
            fills = []  # no training step would compute these rows
        if not fills:
            return chain.segment((0, chain.depth), tensors, tensors)(*tensors)
        values: Sequence[Any] = ()
        for depth, values in chain.advance(0, tensors, tensors, stops={fill.depth for fill in fills}):
            _hand_out(fills, depth, None, chain.frontier(depth).chosen(values, tensors))
        return chain.handed_over(values, tensors)

    def _given(self, call: "_Call", chain: Chain) -> Sequence[Tensor]:
        """The tensors of a call with as many samples as the prefix computes at once."""
        count = batch_size(call.tensors)
        whole = not self._steady(chain) or not count or count == self.batch_size or chain.traced.shape_bound
        return call.tensors if whole or not self._pads(chain, call.tensors) else resized(call.tensors, self.batch_size)

    def _steady(self, chain: Chain) -> bool:
        """Whether a batch of any size is computed as training computes one: so does int8, whose code is for that many."""
        return self.training or (chain.computation.quantized and self.batch_size > 0)

    def _pads(self, chain: Chain, tensors: Sequence[Tensor]) -> bool:
        """Whether a batch can be computed with other samples, or in pieces, and nothing else notices.

        What a batch of one does not tell, samples met earlier do; a resumed run has met none, and makes one of that one.
        """
        frontier = chain.frontier(chain.depth)
        for samples in (tensors, *([self.witnesses] if self.witnesses else [])):
            try:
                frontier.rows(repeated(samples, self.batch_size))
                return True
            except Undecided:
                continue
            except NotRowwise:
                return False
        return frontier.tells(repeated(with_another(tensors), self.batch_size))

    def _stored(self, call: "_Call", plan: Plan, batch: StoredBatch) -> tuple[Any, ...] | None:
        """From what is stored of a batch."""
        chain, tensors = plan.chain, call.tensors
        try:
            parts = batch.parts(chain, tensors, call.slots)
            fill = batch.fill(chain, tensors, call.slots) if self.training or self.batch_size else None
            rows = [(part.places, self._rows(call, plan, part, [] if fill is None else [fill])) for part in parts]
            values = chain.frontier(chain.depth).completed(_together(batch.size, rows), tensors)
        except NotRowwise:
            return None
        return chain.handed_over(values, tensors)

    def _rows(self, call: "_Call", plan: Plan, part: Part, fills: Sequence[Fill]) -> Sequence[Tensor]:
        """The rows at the model's depth of some samples, computed with as many as training has.

        More are computed in pieces, if they are stored, or int8, whose code is for that many.
        """
        if part.depth == plan.chain.depth:
            return part.rows
        count = len(part.rows[0])
        if not (fills or plan.chain.computation.quantized) or count <= self.batch_size:
            return self._piece(call, plan, part, fills)
        where = torch.split(torch.arange(count), self.batch_size)
        places = where if part.places is None else torch.split(part.places, self.batch_size)
        pieces = [
            Part(part.depth, at, [take(r, own) for r in part.rows]) for at, own in zip(places, where, strict=True)
        ]
        columns = zip(*(self._piece(call, plan, piece, fills) for piece in pieces), strict=True)
        return [merged(count, [*zip(where, rows, strict=True)]) for rows in columns]

    def _piece(self, call: "_Call", plan: Plan, part: Part, fills: Sequence[Fill]) -> Sequence[Tensor]:
        count = len(part.rows[0])
        size = max(self.batch_size, count)
        inputs = resized(part.rows if part.depth == 0 else call.tensors, size)
        chain = plan.chain if not plan.bound else call.like(inputs).plan().chain
        start = chain.frontier(part.depth)
        known = inputs if part.depth == 0 else start.completed(resized(part.rows, size), inputs)
        rows: Sequence[Tensor] = ()
        for depth, values in chain.advance(part.depth, known, inputs, stops={fill.depth for fill in fills}):
            rows = [row[:count] for row in chain.frontier(depth).chosen(values, inputs)]
            _hand_out(fills, depth, part.places, rows)
        return rows


def _hand_out(fills: Sequence[Fill], depth: int, places: Tensor | None, rows: Sequence[Tensor]) -> None:
    for fill in fills:
        if fill.depth == depth:
            fill.take(places, rows)


def _together(size: int, pieces: list[tuple[Tensor | None, Sequence[Tensor]]]) -> Sequence[Tensor]:
    """The rows of a whole batch, from those of its parts."""
    if len(pieces) == 1:
        return pieces[0][1]
    columns = zip(*(rows for _, rows in pieces), strict=True)
    places = [torch.arange(size) if where is None else where for where, _ in pieces]
    return [merged(size, list(zip(places, column, strict=True))) for column in columns]


class _Call:
    """The arguments of a call, with examples in place of what is stored. batch: what they are stored in."""

    def __init__(self, derived: Derived, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.derived = derived
        self.given, self.spec = pytree.tree_flatten((args, kwargs))
        self.batch = stored_batch(self.given)
        self.leaves = [leaf.example.tensor if isinstance(leaf, Boundary) else leaf for leaf in self.given]
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.slots = [leaf.slot for leaf in self.given if isinstance(leaf, Boundary)]
        if derived.depth and torch.is_grad_enabled() and any(t.requires_grad for t in self.tensors):
            raise RuntimeError(
                f"an input requires grad, but the first {derived.depth} units are frozen and run without a tape: "
                f"detach the input, or call model.original(...) for gradients with respect to it"
            )

    @property
    def surgery(self) -> Surgery:
        return self.derived.surgery

    @property
    def key(self) -> tuple[Any, ...]:
        """What a plan is made for."""
        device = self.tensors[0].device.type if self.tensors else "cpu"
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return plan_key(self.leaves, self.spec), self.derived.modes(), autocast, torch.is_grad_enabled()

    def plan(self, given: Given | None = None) -> Plan:
        """given: of a chain, what its prefix is built from; without it, the call's tensors."""
        args, kwargs = pytree.tree_unflatten(self.leaves, self.spec)
        given = (lambda _: self.tensors) if given is None else given
        return self.surgery.plan(self.key, self.leaves, args, kwargs, given if self.batch is None else None)

    def like(self, tensors: Sequence[Tensor]) -> "_Call":
        """The same call with other tensors."""
        supply = iter(tensors)
        leaves = [next(supply) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        return _Call(self.derived, *pytree.tree_unflatten(leaves, self.spec))

    def check_batch(self, batch: StoredBatch, net: nn.Module) -> None:
        """ValueError for what is stored of another network, and deeper than this one is frozen."""
        if not batch.is_for(net):
            raise ValueError(
                f"the model, frozen to depth {self.derived.depth}, was given activations stored at depth {batch.depth}: "
                f"a CachedLoader serves the model that it was made with"
            )

    def fetched(self, batch: StoredBatch) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the inputs that the stored batch stands for."""
        inputs = batch.inputs()
        leaves = [
            like(inputs[leaf.slot], leaf.example.tensor) if isinstance(leaf, Boundary) else leaf for leaf in self.given
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        return args, kwargs
