"""Code as a checksum: what Python functions and classes do, as far as it can be seen; the same in any process."""

import sys
from collections.abc import Iterable
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch._library.custom_ops import OPDEFS, CustomOpDef
from torch._ops import OpOverload, OpOverloadPacket
from xxhash import xxh3_128

from fxfreeze.cache.contents import ContentsError, checksum
from fxfreeze.cache.trees import qualified

__all__ = ["code_digest", "is_torchs", "named"]

_FAR = 4  # calls away from what is asked for
_PLAIN = (type(None), bool, int, float, complex, str, bytes, tuple, frozenset)
_NO_CODE = frozenset(
    "__module__ __doc__ __dict__ __weakref__ __annotations__ __annotate__ __annotate_func__ __annotations_cache__ "
    "__firstlineno__ __static_attributes__ __qualname__ __parameters__ __orig_bases__ __abstractmethods__ _abc_impl".split()
)


def code_digest(values: Iterable[Any]) -> str:
    """xxh3_128 of functions, classes and operators: bytecode with its constants, class attributes, defaults and closures.

    Followed are the functions, classes and plain values of the same top-level package that they name, a few calls far, and
    custom operators' Python kernels. Not seen are other packages' code, and torch's own, for which their names stand.
    """
    reader = _Reader()
    for value in values:
        reader.read(value, _FAR)
    return reader.digest.hexdigest()


def is_torchs(value: Any) -> bool:
    """Of a function, a class or an operator."""
    return _top(value) == "torch" and _kernels(value) is None


def _kernels(value: Any) -> CustomOpDef | None:
    """What a custom operator written in Python does."""
    if isinstance(value, OpOverload):
        return OPDEFS.get(value._schema.name)
    return OPDEFS.get(value._qualified_op_name) if isinstance(value, OpOverloadPacket) else None


def named(value: Any) -> str:
    """A function or a class by its name, anything else by its class's."""
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(kind, '__module__', '')}.{kind.__qualname__}"


class _Reader:
    def __init__(self) -> None:
        self.digest = xxh3_128()
        self._met: dict[int, tuple[int, Any]] = {}  # by id: which it was, and the thing itself, so that it lives

    def read(self, value: Any, far: int) -> None:
        if id(value) in self._met:
            self._note("again", str(self._met[id(value)][0]))
            return
        if not isinstance(value, _PLAIN):
            self._met[id(value)] = len(self._met), value
        if isinstance(value, staticmethod | classmethod | MethodType):
            self._each("method", [value.__func__], far)
        elif isinstance(value, property):
            self._each("property", [value.fget], far)
        elif isinstance(value, partial):
            self._each("partial", [value.func, *value.args, *value.keywords, *value.keywords.values()], far)
        elif isinstance(value, CustomOpDef):
            self._operator(value, far)
        elif isinstance(value, OpOverload | OpOverloadPacket):
            self._each(str(value), [_kernels(value)], far)
        elif isinstance(value, FunctionType):
            self._function(value, far)
        elif isinstance(value, type):
            self._class(value, far)
        elif isinstance(getattr(value, "fn", None), FunctionType):  # a Triton kernel
            self._each("fn", [value.fn], far)
        else:
            self._note("value", _value(value))

    def _each(self, kind: str, values: Iterable[Any], far: int) -> None:
        self._note(kind)
        for value in values:
            self.read(value, far)

    def _operator(self, value: CustomOpDef, far: int) -> None:
        kernels = sorted(value._backend_fns.items(), key=lambda item: str(item[0]))
        self._note("operator", value._qualname, *(str(device) for device, _ in kernels))
        for function in (value._init_fn, *(function for _, function in kernels)):
            self.read(function, far)

    def _function(self, value: FunctionType, far: int) -> None:
        self._note("function", named(value))
        if not is_torchs(value) and far:
            keywords = value.__kwdefaults__ or {}
            self._code(value.__code__)
            self._each("defaults", [*(value.__defaults__ or ()), *keywords, *keywords.values()], far)
            names = _names(value.__code__)
            for name in names:
                self._named(name, value, far - 1)
            for operator in sorted(OPDEFS):
                if {*operator.split("::")} <= {*names}:  # torch.ops.<namespace>.<name>
                    self.read(OPDEFS[operator], far - 1)
        for cell in value.__closure__ or ():
            try:
                self.read(cell.cell_contents, far)
            except ValueError:  # not bound yet
                self._note("empty")

    def _code(self, code: CodeType) -> None:
        self._note("code", code.co_code, *code.co_names, *code.co_freevars, str(code.co_argcount), str(code.co_flags))
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                self._code(constant)
            else:
                self._note("constant", _value(constant))

    def _named(self, name: str, where: FunctionType, far: int) -> None:
        """What a global name of a function's code is, if it says what the function does."""
        values = where.__globals__
        if name in values:
            value = values[name]
            if isinstance(value, _PLAIN) or (_top(value) == _top(where) and not isinstance(value, ModuleType)):
                self._note(name)
                self.read(value, far)
            elif not isinstance(value, ModuleType):
                self._note(name, named(value))
            elif value.__name__.partition(".")[0] == _top(where):
                own = vars(value)
                for other in _names(where.__code__):
                    if other in own and isinstance(own[other], (*_PLAIN, FunctionType, type, CustomOpDef)):
                        self._note(name, other)
                        self.read(own[other], far)

    def _class(self, value: type, far: int) -> None:
        for base in value.__mro__:
            self._note("class", named(base))
            if _top(base) != "torch" and _top(base) not in sys.stdlib_module_names and far:
                for key, member in sorted(vars(base).items()):
                    if key not in _NO_CODE:
                        self._note(key)
                        self.read(member, far)

    def _note(self, *parts: str | bytes) -> None:
        """Each part after its length, so that no two lists of parts are one text."""
        for part in parts:
            data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
            self.digest.update(len(data).to_bytes(8, "little") + data)


def _names(code: CodeType) -> list[str]:
    """The global names and attributes in a function's code, those of functions within it too, each once."""
    inner = [name for constant in code.co_consts if isinstance(constant, CodeType) for name in _names(constant)]
    return list(dict.fromkeys([*code.co_names, *inner]))


def _top(value: Any) -> str:
    """The top-level package that a function, a class or an object's class is of."""
    return str(getattr(value, "__module__", None) or type(value).__module__).partition(".")[0]


def _value(value: Any) -> str:
    try:
        return checksum(value)
    except ContentsError:
        return qualified(type(value))
