"""Progressive freezing by graph surgery: layers that have stopped learning should cost nothing."""

from fxfreeze.cost import Plan, plan
from fxfreeze.inputs import TraceRefusal
from fxfreeze.model import FreezableModel, compile
from fxfreeze.optim import FreezeScheduler, scaler_step
from fxfreeze.schedule import FreezeOut, Milestones
from fxfreeze.units import Unit

__all__ = [
    "FreezableModel",
    "FreezeOut",
    "FreezeScheduler",
    "Milestones",
    "Plan",
    "TraceRefusal",
    "Unit",
    "compile",
    "plan",
    "scaler_step",
]
