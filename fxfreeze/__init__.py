"""Progressive freezing by graph surgery: layers that have stopped learning should cost nothing."""

from typing import TYPE_CHECKING, Any

from fxfreeze.cost import Plan, plan
from fxfreeze.inputs import TraceRefusal
from fxfreeze.model import FreezableModel, compile
from fxfreeze.optim import FreezeScheduler, scaler_step
from fxfreeze.profiled import Profile
from fxfreeze.profiling import profile
from fxfreeze.schedule import FreezeOut, Milestones
from fxfreeze.stored import Boundary
from fxfreeze.units import Unit

if TYPE_CHECKING:
    from fxfreeze.cache.loader import CachedLoader

__all__ = [
    "Boundary",
    "CachedLoader",
    "FreezableModel",
    "FreezeOut",
    "FreezeScheduler",
    "Milestones",
    "Plan",
    "Profile",
    "TraceRefusal",
    "Unit",
    "compile",
    "plan",
    "profile",
    "scaler_step",
]


def __getattr__(name: str) -> Any:
    if name != "CachedLoader":
        raise AttributeError(f"module 'fxfreeze' has no attribute {name!r}")
    # When it is first asked for: what it needs beside torch is optional.
    try:
        from fxfreeze.cache.loader import CachedLoader
    except ModuleNotFoundError as error:
        if error.name not in ("xxhash", "safetensors"):
            raise
        raise ImportError(f"CachedLoader needs {error.name}: pip install xxhash 'safetensors>=0.8'") from error
    return CachedLoader
