"""A profile's JSON, read: what is no such JSON is refused with the name of the field."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from fxfreeze.imports import ChoiceError
from fxfreeze.iterations import Iteration, Parts

__all__ = ["read"]

Kinds = tuple[type, ...]

_NUMBER: Kinds = (int, float)
_PARTS: dict[str, Kinds] = {each.name: _NUMBER for each in fields(Parts)}
_ITERATION: dict[str, Kinds] = {
    "depth": (int,),
    "backend": (str, type(None)),
    "measured": (dict,),
    "quartiles": (list,),
    "predicted": (dict,),
}
_PROFILE: dict[str, Kinds] = {
    "iterations": (list,),
    "units": (list,),
    "unit_flops": (list,),
    "batch": (int,),
    "fetched": (bool,),
    "rounds": (int,),
    "device": (str,),
    "threads": (int,),
    "torch": (str,),
}


def read(text: str) -> dict[str, Any]:
    """The fields of the Profile that ``Profile.json`` wrote as ``text``. Raises ChoiceError for anything else."""
    try:
        given = json.loads(text)
    except json.JSONDecodeError as error:
        raise ChoiceError(f"the text is no JSON ({error}): expected what Profile.json wrote") from error
    found = dict(_object(given, _PROFILE, "the profile"))
    found["units"] = tuple(_items(found["units"], (str,), "units"))
    found["unit_flops"] = tuple(_items(found["unit_flops"], (int,), "unit_flops", len(found["units"])))
    found["iterations"] = tuple(
        _iteration(each, f"iterations[{i}]", len(found["units"])) for i, each in enumerate(found["iterations"])
    )
    if not found["iterations"] or found["iterations"][0].depth:
        raise _refusal("iterations", "the first to be at depth 0")
    return found


def _iteration(given: Any, where: str, units: int) -> Iteration:
    each = _object(given, _ITERATION, where)
    if not 0 <= each["depth"] < units:
        raise _refusal(f"{where}.depth", f"a number from 0 to {units - 1}")
    low, high = _items(each["quartiles"], _NUMBER, f"{where}.quartiles", 2)
    measured, predicted = (
        Parts(**_object(each[name], _PARTS, f"{where}.{name}")) for name in ("measured", "predicted")
    )
    return Iteration(each["depth"], each["backend"], measured, (low, high), predicted)


def _object(given: Any, kinds: Mapping[str, Kinds], where: str) -> dict[str, Any]:
    """``given`` itself, with these fields and no others."""
    if not isinstance(given, dict):
        raise _refusal(where, "an object")
    for name in (*kinds, *given):
        if name not in given:
            raise _refusal(where, f"a field {name!r}")
        if name not in kinds:
            raise _refusal(where, f"no field {name!r}")
        if not _is(given[name], kinds[name]):
            raise _refusal(f"{name!r} of {where}", _words(kinds[name]))
    return given


def _items(given: list[Any], kinds: Kinds, where: str, count: int | None = None) -> list[Any]:
    if count not in (None, len(given)):
        raise _refusal(where, f"{count} items")
    for i, item in enumerate(given):
        if not _is(item, kinds):
            raise _refusal(f"{where}[{i}]", _words(kinds))
    return given


def _is(value: Any, kinds: Kinds) -> bool:
    """Python counts its truth values as numbers; JSON does not."""
    return isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))


def _words(kinds: Kinds) -> str:
    return " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)


def _refusal(where: str, expected: str) -> ChoiceError:
    return ChoiceError(f"{where} is not as Profile.json writes it: expected {expected}")
