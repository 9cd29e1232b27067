"""`fxfreeze cache`: its actions, their options, and which of the words after them is the directory."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fxfreeze.imports import ChoiceError, optional

__all__ = ["add_actions", "run"]

DEFAULT = Path("cache")


def add_actions(verb: argparse.ArgumentParser, add: Callable[[Any, str, str], argparse.ArgumentParser]) -> None:
    """Gives the verb its actions and their options; ``add``: an action, by its name and what it is about."""
    actions = verb.add_subparsers(dest="action", required=True, metavar="ls|verify|rm")
    ls = add(actions, "ls", "what a cache directory holds")
    verify = add(actions, "verify", "read every byte of the stores; status 1 if anything is wrong")
    rm = add(actions, "rm", "remove stores, but no other files; status 1 if one is being written, and stays")
    about = "a cache directory, or one store's folder (default: cache)"
    ls.add_argument("directory", nargs="?", type=_word, metavar="DIR", help=about)
    rule = f"; where there is a folder {DEFAULT}, a first word that is no folder and has no {os.sep} is a NAME in that"
    for action in (verify, rm):
        action.add_argument("directory", nargs="?", type=_word, metavar="DIR", help=about + rule)
        action.add_argument(
            "names", nargs="*", metavar="NAME", help="a store, by its name or a beginning that no other has"
        )
    rm.add_argument("--all", dest="everything", action="store_true", help="every store of DIR")
    for action in (ls, verify, rm):
        action.epilog = "Status 2 for what can't be done, such as a DIR that there is not."


def run(verb: str, directory: str | None = None, names: Sequence[str] = (), everything: bool = False) -> int:
    """Runs an action with the options that were given; the exit status."""
    for module in ("xxhash", "safetensors", "fxfreeze.cache"):
        optional(module, "the cache needs it: pip install xxhash 'safetensors>=0.8'", ChoiceError)
    from fxfreeze import caches  # not above: the other verbs need neither package

    if verb == "cache ls":
        return caches.run_list(Path(directory or DEFAULT))
    where, names = _told_apart(directory, names)
    return caches.run_verify(where, names) if verb == "cache verify" else caches.run_remove(where, names, everything)


def _told_apart(first: str | None, names: Sequence[str]) -> tuple[Path, Sequence[str]]:
    """The directory and the names, from the first word and the others."""
    if first is None:
        return DEFAULT, names
    if os.sep in first or os.path.isdir(first) or not DEFAULT.is_dir():
        return Path(first), names
    return DEFAULT, [first, *names]


def _word(text: str) -> str:
    if not text:  # an unset variable of the shell, which Path would take for the current folder
        raise argparse.ArgumentTypeError(f"{text!r} names no folder")
    return text
