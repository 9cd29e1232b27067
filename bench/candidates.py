"""Who competes end to end: plain training at several lengths, and each schedule as published, by surgery, with a cache."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from fxfreeze.imports import ChoiceError
from fxfreeze.recipes import CACHED, Recipe, cached, plain
from fxfreeze.schedule import FreezeOut

PUBLISHED, SURGERY = "freezeout", "fxfreeze"
FORMS = (PUBLISHED, SURGERY, CACHED)
SHORTER = "plain x"  # and the share of plain's steps
_SCHEDULE = re.compile(r"(linear|squared|cubic):(\d*\.?\d+)(:scaled)?(?::x(\d*\.?\d+))?")


@dataclass(frozen=True)
class Candidate:
    """A FreezeOut schedule. longer: its steps per step of plain training."""

    how: str
    t0: float
    scale_lr: bool = False
    longer: float = 1.0

    @classmethod
    def parse(cls, text: str) -> "Candidate":
        """From "cubic:0.8:scaled" or "cubic:0.3:x2". Raises ChoiceError for anything else."""
        match = _SCHEDULE.fullmatch(text)
        if match is None or not 0 < float(match[2]) <= 1 or (match[4] is not None and float(match[4]) <= 0):
            raise ChoiceError(
                f"--schedules has {text!r}; expected HOW:T0, then :scaled and :xSTEPS if wanted, such as cubic:0.3:x2: "
                "HOW linear, squared or cubic, T0 above 0 and up to 1, STEPS per step of plain"
            )
        return cls(match[1], float(match[2]), match[3] is not None, float(match[4] or 1))

    def __str__(self) -> str:
        scaled, longer = ":scaled" if self.scale_lr else "", "" if self.longer == 1 else f":x{self.longer:g}"
        return f"{self.how}:{self.t0:g}{scaled}{longer}"

    def recipe(self, form: str, steps: int) -> Recipe:
        """steps: of plain training."""
        long = max(1, round(steps * self.longer))
        schedule = FreezeOut(long, t0=self.t0, how=self.how, scale_lr=self.scale_lr)
        surgery = Recipe(SURGERY, "the frozen part cut out and rewritten", long, "surgery", False, schedule)
        if form == PUBLISHED:
            chosen = replace(surgery, form="marked", about="the published FreezeOut: frozen units in eval, no surgery")
        else:
            chosen = cached(surgery) if form == CACHED else surgery
        return replace(chosen, name=f"{form} {self}")


def recipes(candidates: Sequence[Candidate], forms: Sequence[str], shares: Sequence[float], steps: int) -> list[Recipe]:
    """Plain first, then the shorter ones, whose cosine falls to zero over their own steps, then each candidate's forms."""
    shorter = [
        replace(plain(max(1, round(share * steps))), name=f"{SHORTER}{share:g}", about="plain, for fewer steps")
        for share in shares
    ]
    return [plain(steps), *shorter, *(each.recipe(form, steps) for each in candidates for form in forms)]


def parted(name: str) -> tuple[str, str]:
    """(form, schedule) of a candidate's row; (name, "") of a plain one."""
    form, _, schedule = name.partition(" ")
    return (form, schedule) if form in FORMS else (name, "")
