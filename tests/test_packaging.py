"""The wheel and the sdist: what they hold, and that what is installed from them imports outside the checkout."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.slow


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel and an sdist, built from a clean copy of what git tracks."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    _run("git", "checkout-index", "--all", f"--prefix={source}/", cwd=ROOT)
    for kind in ("wheel", "sdist"):
        backend = f"import setuptools.build_meta, sys; print(setuptools.build_meta.build_{kind}(sys.argv[1]))"
        _run(sys.executable, "-W", "ignore", "-c", backend, str(out), cwd=source)
    return out


def test_wheel_holds_every_package(built: Path) -> None:
    [wheel] = built.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    tracked = _run("git", "ls-files", "fxfreeze/*.py", "kernels/*.py", cwd=ROOT).split()
    expected = {name if name.startswith("fxfreeze") else f"fxfreeze/{name}" for name in tracked}
    assert expected | {"fxfreeze/py.typed"} <= names
    assert not any(name.startswith(("kernels/", "tests/", "bench/")) for name in names)


def test_sdist_can_be_built_from(built: Path) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = [name.partition("/")[2] for name in archive.getnames()]
    assert {"pyproject.toml", "README.md", "LICENSE", "fxfreeze/kernels/__init__.py"} <= set(names)


def test_installed_wheel_imports_elsewhere(built: Path, tmp_path: Path) -> None:
    [wheel] = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import sys; sys.path.insert(0, 'site')\n"
        "import fxfreeze, fxfreeze.kernels, torch\n"
        "assert fxfreeze.__file__.startswith(sys.path[0]) or 'site' in fxfreeze.__file__, fxfreeze.__file__\n"
        "net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))\n"
        "print(len(fxfreeze.compile(net, fxfreeze.Milestones({'0': 0})).units))\n"
    )
    assert _run(sys.executable, "-P", "-c", code, cwd=tmp_path).strip() == "2"
