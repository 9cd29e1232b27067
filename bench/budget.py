"""Time for a whole run: with ``BENCH_SECONDS`` set, what would begin to be measured after so many seconds is left out."""

import math
import os
import time

import pytest

SECONDS = float(os.environ.get("BENCH_SECONDS", math.inf))
BEGAN = time.monotonic()


def spent() -> float:
    """Seconds since the run began."""
    return time.monotonic() - BEGAN


def begin() -> None:
    """Call before a measurement; skips the rows that need it once the time is up."""
    if spent() > SECONDS:
        pytest.skip(f"not begun: the run has taken {spent():.0f} s, and BENCH_SECONDS={SECONDS:.0f}")
