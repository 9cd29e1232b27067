"""What a user names in text and Python must import: packages that may be missing, and `package.module:callable`."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any


class ChoiceError(ValueError):
    """What the user named can't be had. The message is one line: what was named, what was expected, the remedy."""


def one_line(error: BaseException) -> str:
    """`Type: message` of an exception, whatever line breaks its message has."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def optional(module: str, remedy: str, error: type[ChoiceError]) -> ModuleType:
    """Import `module`, or raise `error` with one line that ends in `remedy`."""
    try:
        return importlib.import_module(module)
    except Exception as cause:
        # A package whose compiled part does not fit this torch raises anything: OSError, RuntimeError, AttributeError.
        package = module.partition(".")[0]
        if isinstance(cause, ModuleNotFoundError) and cause.name == package:
            raise error(f"{package} is not installed; {remedy}") from None
        raise error(f"{package} is installed but can't be imported ({one_line(cause)}); {remedy}") from cause


def resolve(spec: str, error: type[ChoiceError]) -> Callable[..., Any]:
    """The callable that `package.module:name` names; a dotted `name` reaches into classes.

    Raises `error` when the module is not found, or has no such callable. What the module itself raises passes through.
    """
    path, _, attribute = spec.partition(":")
    if not all(part.isidentifier() for part in (*path.split("."), *attribute.split("."))):
        raise error(f"{spec!r} names nothing; expected package.module:callable, such as my_package.my_module:build")
    try:
        found: Any = importlib.import_module(path)
    except ModuleNotFoundError as cause:
        if not f"{path}.".startswith(f"{cause.name}."):
            raise  # the module was found, and lacks something that it imports itself
        raise error(f"{spec}: no module named {cause.name!r}; install it, or put its folder on PYTHONPATH") from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise error(f"{spec}: {path} has no {attribute!r}; name one of the functions or classes that it defines")
        found = getattr(found, part)
    if not callable(found):
        raise error(f"{spec} is of type {type(found).__name__}; expected a function or a class to call")
    return found  # type: ignore[no-any-return]


def call(
    function: Callable[..., Any],
    spec: str,
    offered: Mapping[str, Any],
    error: type[ChoiceError],
    always: tuple[str, ...] = (),
) -> Any:
    """Call `function` with those of `offered` that its signature names, and with `always` too if it takes `**kwargs`.

    Raises `error` when it requires an argument that is not offered. What `function` itself raises passes through.
    """
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:
        raise error(f"{spec} tells no signature; wrap it in a function of your own") from None
    given = {}
    for parameter in parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given.update({name: offered[name] for name in always})
        elif parameter.name in offered and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            given[parameter.name] = offered[parameter.name]
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL:
            names = ", ".join(offered)
            raise error(f"{spec} requires an argument {parameter.name!r}, but can only get {names}; give it a default")
    return function(**given)
