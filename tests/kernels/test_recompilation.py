"""A kernel is compiled once for every batch size: nothing that follows the batch is part of what it is compiled for."""

import importlib
import os
from typing import Any

import pytest
import torch
from samples import NAMES, sample

_INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_FILES = ("conv1x1", "conv3x3", "rolling3x3", "depthwise", "pointwise", "layernorm")
_compiling = pytest.mark.skipif(_INTERPRETING, reason="TRITON_INTERPRET=1 compiles nothing")
_each = pytest.mark.parametrize("name", NAMES)


def _kernels() -> dict[str, tuple[Any, Any]]:
    """Every kernel by name, with the module that launches it."""
    pytest.importorskip("triton")
    modules = [importlib.import_module(f"fxfreeze.kernels.gpu.{file}") for file in _FILES]
    return {n: (module, v) for module in modules for n, v in vars(module).items() if n.endswith("_kernel")}


class _Launch:
    """Stands in for a kernel and notes what it would have been compiled for."""

    def __init__(self, kernel: Any, keys: list[Any]) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        backend = make_backend(GPUTarget("cuda", 90, 32))
        self.kernel, self.keys = kernel, keys
        self.binder = create_function_from_signature(kernel.signature, kernel.params, backend)

    def __getitem__(self, grid: tuple[int, ...]) -> "_Launch":
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        _, specialisation, options = self.binder(*arguments, **options)
        self.keys.append((self.kernel, specialisation, options))


@_compiling
@_each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_kernel_is_compiled_for(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[Any] = []
    for kernel_name, (module, kernel) in _kernels().items():
        monkeypatch.setattr(module, kernel_name, _Launch(kernel, keys))
    monkeypatch.setattr(importlib.import_module("fxfreeze.kernels.engine"), "engine", lambda *given: "triton")
    batches = (1, 2, 3, 16, 17, 64)
    for n in batches:
        sample(name, n, dtype=dtype)()
    assert len(keys) == len(batches)
    assert all(key == keys[0] for key in keys)


@_compiling
def test_every_size_is_kept_out_of_what_a_kernel_is_compiled_for() -> None:
    tensors = {"x", "w", "weight", "bias", "scale", "shift", "residual", "y"}
    for _, kernel in _kernels().values():
        specialised = {p.name for p in kernel.params if not p.is_constexpr and not p.do_not_specialize}
        assert specialised <= tensors


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@_each
def test_another_batch_size_compiles_nothing(name: str) -> None:
    def compiled() -> int:
        device = torch.cuda.current_device()
        return sum(len(kernel.device_caches[device][0]) for _, kernel in _kernels().values())

    sample(name, 3, "cuda")()
    before = compiled()
    assert before
    for n in (1, 5, 16, 17, 64):
        sample(name, n, "cuda")()
    assert compiled() == before
