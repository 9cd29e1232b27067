"""The figures of end-to-end runs in a file, from which the runs go on; and the time that they may take."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.end_to_end import Search
from bench.end_to_end_report import NOTE
from fxfreeze.commands import refusing
from fxfreeze.imports import ChoiceError


@dataclass
class Kept:
    """The JSON file that the figures are kept in, written anew whenever a seed came to its end."""

    path: Path
    about: dict[str, Any]
    environment: dict[str, str]

    def load(self, searches: Mapping[str, Search]) -> None:
        """Takes up what the file holds. Raises ChoiceError if it is of other options, or no such file."""
        if not self.path.exists():
            return
        with refusing(f"--out {self.path} can't be read"):
            text = self.path.read_text()
        try:
            content = json.loads(text)
            about, networks = content["about"], content["networks"]
        except (ValueError, LookupError, TypeError) as error:
            raise ChoiceError(f"--out {self.path} exists, and is not of this bench: name another file") from error
        if differing := [key for key in self.about if about.get(key) != self.about[key]]:
            key = differing[0]
            raise ChoiceError(
                f"--out {self.path} holds runs with {key} {about.get(key)!r}, not {self.about[key]!r}: name another file"
            )
        for name, search in searches.items():
            search.load(networks[name])

    def save(self, searches: Mapping[str, Search]) -> None:
        content = {
            "about": self.about,
            "environment": self.environment,
            "note": NOTE,
            "networks": {name: search.state() for name, search in searches.items()},
        }
        with refusing(f"--out {self.path} can't be written"):
            beside = self.path.with_name(f".{self.path.name}.part")
            beside.write_text(json.dumps(content, indent=1, allow_nan=False))
            beside.replace(self.path)


class Deadline:
    """Asks for an end when the minutes are over, or when the user did."""

    def __init__(self, minutes: float | None, interrupted: Callable[[], bool]) -> None:
        self.end = float("inf") if minutes is None else time.monotonic() + 60 * minutes
        self.interrupted = interrupted

    def __call__(self) -> bool:
        return self.interrupted() or self.left < 0

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()
