"""What hypothesis draws: sizes, layouts and the parts of an op around its sum."""

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from placing import Layout

from fxfreeze.kernels import ACTIVATIONS

# Their greatest common divisors with pitches and offsets give every unit, from 1 to 16 bytes.
CHANNELS = st.sampled_from((1, 2, 3, 4, 5, 6, 8, 12, 16, 20, 24, 33, 40))
ACTIVATION = st.sampled_from((None, *ACTIVATIONS))
IMAGES = st.integers(1, 3)
EXTENT = st.integers(0, 5)  # pixels more than are needed

_BESIDE = st.sampled_from((0, 0, 1, 2, 3, 4, 8, 12, 16))

LAYOUTS = st.builds(
    Layout,
    order=st.sampled_from(("nhw", "nhw", "nwh", "hnw", "whn")),
    crop=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    step=st.sampled_from((1, 1, 2)),
    before=_BESIDE,
    after=_BESIDE,
    lead=st.sampled_from((0, 0, 1, 4, 8)),
)
ROW_LAYOUTS = st.builds(Layout, before=_BESIDE, after=_BESIDE, lead=st.sampled_from((0, 0, 1, 4, 8)))


def pairs(values: st.SearchStrategy[int]) -> st.SearchStrategy[tuple[int, int]]:
    """Of equal or of unequal numbers."""
    return st.one_of(values.map(lambda v: (v, v)), st.tuples(values, values))


def examples(count: int) -> Callable[[Any], Any]:
    """So many, the same on every run; a case of many blocks takes the interpreter a while."""
    return settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
