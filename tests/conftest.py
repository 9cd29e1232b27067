"""What every test needs: a torchvision that imports beside a CPU-only torch, a fixed seed, one thread a worker."""

import importlib.util
import os

import pytest
import torch

# torchvision's wheels are built for CUDA: beside a CPU-only torch their C++ library does not load, and the import then
# fails for want of two operators' schemas. No test calls them. The object must outlive the import, or the schemas go.
_TORCHVISION: torch.library.Library | None = None
if torch.version.cuda is None and importlib.util.find_spec("torchvision") is not None:
    _TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for _name in ("nms", "qnms"):
        _schema = f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
        _TORCHVISION.define(_schema)  # type: ignore[no-untyped-call]

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def storing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches store everything, whether or not it pays, which would depend on the machine."""
    from fxfreeze import CachedLoader

    monkeypatch.setitem(CachedLoader.__init__.__kwdefaults__, "when", "always")


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """What one test measured is not what another goes by, nor what the user's cache folder holds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def _first_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """backend="auto" tries nothing: what is fastest depends on the machine, and on what else it does."""
    monkeypatch.setattr("fxfreeze.builder.rivals", lambda segment: [])
