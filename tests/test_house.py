"""Who imports whom, read from the source: one direction through the house, and a light ``import fxfreeze``."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import fxfreeze

ROOT = Path(fxfreeze.__file__).parent
MODULES = {
    ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in (ROOT, ROOT / "kernels")  # a link, which globs do not follow
    for path in sorted(folder.glob("**/*.py"))
}

# What DESIGN names, from the bottom up: a module may reach only what stands at its own level or below.
LEVELS = [
    ["fxfreeze.kernels"],
    ["fxfreeze.schedule", "fxfreeze.trace", "fxfreeze.units", "fxfreeze.split", "fxfreeze.rewrite"],
    ["fxfreeze.passes"],
    ["fxfreeze.runtime", "fxfreeze.building"],
    ["fxfreeze.model"],
    ["fxfreeze.optim", "fxfreeze.cache", "fxfreeze.cost", "fxfreeze.report"],
    ["fxfreeze.cli"],
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
COMMAND_LINE = {"rich", "matplotlib", "mlxtend", "sklearn", "PIL", "torchvision", "timm", "numpy"}
CACHE = {"xxhash", "safetensors"}


def _type_checking(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _imported(tree: ast.AST, package: str, *, deferred: bool) -> set[str]:
    """Every module that ``import`` statements name; ``deferred``: those inside functions too."""
    found: set[str] = set()
    stack: list[ast.AST] = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package.split(".")[: len(package.split(".")) + 1 - node.level]) if node.level else ""
            module = ".".join(part for part in (base, node.module) if part)
            names = {f"{module}.{alias.name}" for alias in node.names}
            found |= names if names <= MODULES.keys() else {module, *names}  # submodules, by way of their package
        elif deferred or not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            stack += [n for n in ast.iter_child_nodes(node) if not (isinstance(n, ast.stmt) and _type_checking(n))]
    return found


@cache
def imports(name: str, *, deferred: bool = True) -> frozenset[str]:
    """What a module of the package imports, by name: its own modules as far as they exist, others by their first part."""
    path = MODULES[name]
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found = _imported(ast.parse(path.read_text()), package, deferred=deferred)
    own = {module for module in found if module in MODULES}
    return frozenset(own | {module.split(".")[0] for module in found if not module.startswith("fxfreeze")})


def reached(name: str, *, deferred: bool = True) -> set[str]:
    """Every module that importing ``name`` leads to, packages' own ``__init__`` aside."""
    seen: set[str] = set()
    stack = [name]
    while stack:
        for module in imports(stack.pop(), deferred=deferred) - seen:
            seen.add(module)
            if module in MODULES and module != "fxfreeze":
                stack.append(module)
    return seen - {name}


def _level(name: str) -> int | None:
    while name:
        if name in LEVEL:
            return LEVEL[name]
        name = name.rpartition(".")[0]
    return None


def test_the_house_is_as_designed() -> None:
    assert set(LEVEL) <= set(MODULES)
    assert (ROOT / "kernels").is_symlink()
    assert "torch" in reached("fxfreeze.model")  # the reading of imports works at all
    assert "fxfreeze.rewrite" in imports("fxfreeze.passes.fold_batchnorm")


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_imports_run_one_way(name: str) -> None:
    """Directly or through others, also inside functions: nothing leads upwards."""
    members = [m for m in MODULES if m == name or m.startswith(f"{name}.")]
    up = {(m, r) for m in members for r in reached(m) if (level := _level(r)) is not None and level > LEVEL[name]}
    assert up == set()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_cycles(name: str) -> None:
    assert name not in {module for other in reached(name) & MODULES.keys() - {"fxfreeze"} for module in reached(other)}


def test_the_kernels_know_nothing_of_freezing() -> None:
    for name in MODULES:
        if name.startswith("fxfreeze.kernels"):
            assert {m for m in reached(name) if not m.startswith("fxfreeze.kernels")} <= {"torch", "triton"} | set(
                sys.stdlib_module_names
            )


def test_the_schedule_imports_no_torch() -> None:
    """At run time; and neither does anything that it imports."""
    assert not reached("fxfreeze.schedule") & {"torch", "fxfreeze.model", "numpy"}


def test_the_core_needs_torch_alone() -> None:
    """``import fxfreeze`` leads to torch and the standard library, whatever the command line needs."""
    core = reached("fxfreeze", deferred=False)
    third_party = {name for name in core if not name.startswith("fxfreeze")} - set(sys.stdlib_module_names)
    assert third_party == {"torch"}
    assert not {name for name in core if _level(name) == LEVEL["fxfreeze.cli"]}


def test_importing_loads_nothing_of_the_command_line_or_the_cache() -> None:
    """As above, with a real interpreter: torch itself may load numpy, nothing may load the others."""
    code = f"import sys, fxfreeze; print(sorted({(COMMAND_LINE | CACHE) - {'numpy'}!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_kernels_are_imported_by_their_long_name() -> None:
    for name in MODULES:
        assert "kernels" not in imports(name), f"{name} imports a top-level package kernels"
