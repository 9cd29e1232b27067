"""What a command line's options are read as; what can't be is refused by argparse, with what was given."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

__all__ = ["number", "whole", "wholes", "writable"]


def whole(least: int) -> Callable[[str], int]:
    """A whole number of at least ``least``."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def wholes(text: str) -> list[int]:
    """Whole numbers of at least 0, with commas between."""
    return [whole(0)(part) for part in text.split(",")]


def number(least: float, most: float = math.inf, *, zero: bool = False) -> Callable[[str], float]:
    """A finite number above ``least`` (or equal to it if ``zero``) and up to ``most``."""
    limits = f"{'at least' if zero else 'above'} {least}" + (f" and up to {most}" if math.isfinite(most) else "")

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and (value > least or (zero and value == least)) and value <= most):
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {limits}")
        return value

    return parse


def writable(text: str) -> Path:
    """A file that may be written: no folder, in one that exists."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} can't be a file: name one in a folder that exists")
    return path
