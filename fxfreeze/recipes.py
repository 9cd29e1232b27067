"""The contenders: which ways of training one network are compared, and why each is there."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

from fxfreeze.imports import ChoiceError
from fxfreeze.inputs import TraceRefusal
from fxfreeze.model import compile
from fxfreeze.schedule import FreezeOut, Milestones, Schedule
from fxfreeze.units import Unit

CACHED = "fxfreeze+cache"
INT8 = "fxfreeze+int8"  # beside the others where the precision is int8
# Plain training cut to the time that a freezing row took, and that row.
SHORTS = {"plain-short": "fxfreeze", "plain-short+cache": CACHED}
FROM_SCRATCH = ("plain", "freezeout", "fxfreeze", CACHED, *SHORTS)
FINETUNE = ("plain", "by-hand", "fxfreeze", CACHED, "freezeout", *SHORTS)


@dataclass(frozen=True)
class Settings:
    """What determines a training, apart from its network and its data; the defaults are those of the command line.

    lr: of SGD with Nesterov momentum; how, t0, scale_lr: see FreezeOut; steps_scale: steps under a FreezeOut schedule
    per step of plain training; precision: "fp32", autocast's "bf16" or "fp16", or "int8", which is fp32 with one row more.
    """

    epochs: int = 12
    batch_size: int = 32
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    how: Literal["linear", "squared", "cubic"] = "cubic"
    t0: float = 0.3
    scale_lr: bool = False
    steps_scale: float = 2.0
    precision: str = "fp32"
    seed: int = 0

    def freezeout(self, steps: int) -> FreezeOut:
        return FreezeOut(steps, t0=self.t0, how=self.how, scale_lr=self.scale_lr)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    form: "bare", the network itself; "marked", frozen units in eval and without gradient under the ordinary forward,
    which is the published FreezeOut; "surgery", `fxfreeze.compile`; "cached", that with `fxfreeze.CachedLoader`; "by hand",
    marked, the frozen part under `no_grad`.
    cosine: the optimizer's rate falls to zero over `steps`; otherwise it stays, and the schedule alone shapes it.
    int8: the frozen prefix is quantized; the network is scored as it is all the same, in floating point.
    """

    name: str
    about: str
    steps: int
    form: Literal["bare", "marked", "surgery", "cached", "by hand"] = "bare"
    cosine: bool = True
    schedule: Schedule | None = None
    int8: bool = False


def plain(steps: int) -> Recipe:
    return Recipe("plain", "every layer trained to the end, cosine rate", steps)


def plain_short(name: str, steps: int) -> Recipe:
    about = f"plain, its steps cut (and its cosine re-annealed) to take the time that {SHORTS[name]} took"
    return replace(plain(steps), name=name, about=about)


def cached(recipe: Recipe) -> Recipe:
    """The same with the activations of what is frozen stored."""
    about = f"{recipe.about}; its activations stored once and read in its place"
    return replace(recipe, name=CACHED, about=about, form="cached")


def _quantized(recipe: Recipe, settings: Settings) -> dict[str, Recipe]:
    """The same with its prefix in int8, where that was asked for."""
    about = f"{recipe.about}, and quantized"
    return {INT8: replace(recipe, name=INT8, about=about, int8=True)} if settings.precision == "int8" else {}


def from_scratch(settings: Settings, steps: int) -> dict[str, Recipe]:
    """Recipes by name, but for those cut short, whose length is known last; `steps` are those of plain."""
    long = max(1, round(steps * settings.steps_scale))
    schedule = settings.freezeout(long)
    surgery = Recipe(
        "fxfreeze", "the same schedule; the frozen prefix cut out and rewritten", long, "surgery", False, schedule
    )
    published = "the published FreezeOut: frozen blocks in eval, no surgery"
    return {
        "plain": plain(steps),
        "freezeout": Recipe("freezeout", published, long, "marked", False, schedule),
        "fxfreeze": surgery,
        **_quantized(surgery, settings),
        CACHED: cached(surgery),
    }


def finetune(settings: Settings, steps: int, units: tuple[Unit, ...]) -> dict[str, Recipe]:
    """As `from_scratch`, for a pretrained network with a new head, the last of `units`."""
    long = max(1, round(steps * settings.steps_scale))
    backbone = Milestones({units[-2].name: 0})
    surgery = Recipe("fxfreeze", "the same backbone frozen from step 0, rewritten", steps, "surgery", True, backbone)
    return {
        "plain": plain(steps),
        "by-hand": Recipe("by-hand", "backbone in eval under no_grad, head trained", steps, "by hand", True, backbone),
        "fxfreeze": surgery,
        **_quantized(surgery, settings),
        CACHED: cached(surgery),
        "freezeout": Recipe(
            "freezeout",
            f"the published FreezeOut from an early t0 ({settings.t0:g})",
            long,
            "marked",
            False,
            settings.freezeout(long),
        ),
    }


def units_of(net: nn.Module, example: Tensor) -> tuple[Unit, ...]:
    """The freeze units of `net`, which is left as it is. Raises ChoiceError where there is nothing that can freeze."""
    with warnings.catch_warnings(action="ignore"):  # the one unit that it warns of is refused here
        try:
            units = compile(net, FreezeOut(1), example_inputs=(example,)).units
        except (TraceRefusal, TypeError) as error:
            raise ChoiceError(f"the network can't be frozen: {' '.join(str(error).split())}") from error
    if len(units) < 2:
        raise ChoiceError(f"the network is one unit ({units[0].name!r}), and the last unit never freezes")
    return units


def renew_head(build: Callable[[], nn.Module], pretrained: nn.Module, head: Unit) -> nn.Module:
    """A network from `build` with every tensor of `pretrained` but those of the last weighted module in `head`."""
    owners = [name.rpartition(".")[0] for name in head.parameters if pretrained.get_parameter(name).dim() > 1]
    if not owners:
        raise ChoiceError(f"the head unit {head.name!r} has no weight of two or more dimensions to start afresh")
    net = build()
    kept = {key: value for key, value in pretrained.state_dict().items() if key.rpartition(".")[0] != owners[-1]}
    missing, unexpected = net.load_state_dict(kept, strict=False)
    assert not unexpected, unexpected
    assert {key.rpartition(".")[0] for key in missing} == {owners[-1]}, missing
    return net
