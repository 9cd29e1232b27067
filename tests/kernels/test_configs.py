"""The tables of tiles: every shape class has one, the nearest architecture serves, exceptions and measurements go first."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fxfreeze.kernels import configs, measured
from fxfreeze.kernels.architectures import ARCHITECTURES, nearest
from fxfreeze.kernels.configs import ALL, TABLES, CompilerException, Config, candidates, choose

KERNELS = sorted({kernel for kernel, _ in TABLES})
MOST = {"rolling3x3": 32, "layernorm": 16384}  # what their ops take
GPU = "NVIDIA Test"
OTHER = Config(64, 64, 64, warps=4)  # in the table of sm_90 for up to 64 outputs, and not its choice


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "triton_version", lambda: "9.9.9")
    configs._choose.cache_clear()
    measured.load.cache_clear()
    yield
    configs._choose.cache_clear()
    measured.load.cache_clear()


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: GPU)


def on_gpu(outputs: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(1, outputs, 4, 4))


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "tf32"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_shape_class_has_a_tile(kernel: str, arch: int, dtype: str) -> None:
    rows = candidates(kernel, arch, dtype)
    assert max(rows) == MOST.get(kernel, ALL)
    for most, tiles in rows.items():
        assert len(set(tiles)) == len(tiles) >= 1
        for tile in tiles:
            assert all(n & (n - 1) == 0 and n >= 1 for n in (tile.pixels, tile.outputs, tile.channels, tile.warps))
            if kernel == "rolling3x3":
                assert tile.outputs >= most  # it has no second block of outputs
            if kernel == "layernorm":
                assert tile.channels == most  # nor of channels


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("outputs", [1, 12, 16, 17, 32, 33, 64, 65, 16384, 1 << 20])
def test_any_output_gets_the_tile_of_the_least_class_that_holds_it(kernel: str, outputs: int) -> None:
    if outputs > MOST.get(kernel, ALL):
        return
    out = torch.empty(0, outputs, 1, 1, dtype=torch.float16)
    rows = candidates(kernel, 90, "fp16")
    assert choose(kernel, out) == rows[min(most for most in rows if most >= outputs)][0]


def test_the_class_of_a_few_outputs_has_small_blocks() -> None:
    few, many = (choose("conv1x1", torch.empty(1, n, 1, 1, dtype=torch.float16)) for n in (16, 512))
    assert (few.outputs, many.outputs) == (16, 128)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((7, 5), 80),
        ((8, 0), 80),
        ((8, 6), 86),
        ((8, 7), 86),
        ((8, 9), 86),
        ((9, 0), 90),
        ((10, 0), 100),
        ((10, 3), 100),
    ],
)
def test_an_unknown_architecture_is_treated_as_the_next_lower_one(capability: tuple[int, int], arch: int) -> None:
    assert nearest(*capability) == arch


@pytest.mark.parametrize("capability", [(12, 0), (12, 1)])
def test_workstations_do_not_have_what_their_number_says(capability: tuple[int, int]) -> None:
    assert nearest(*capability) == 86


def test_an_exception_stands_in_under_its_compiler_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    exception = CompilerException("3.6.0", 90, "conv1x1", 16, 64, OTHER, "it spills")
    monkeypatch.setattr(configs, "EXCEPTIONS", (exception,))
    before = TABLES["conv1x1", 16][90]
    assert candidates("conv1x1", 90, "bf16", "3.6.0") == {**before, 64: (OTHER,)}
    assert candidates("conv1x1", 90, "bf16", "3.7.1") == before
    assert candidates("conv1x1", 90, "bf16") == before
    assert candidates("conv1x1", 100, "bf16", "3.6.0") == TABLES["conv1x1", 16][100]
    assert candidates("conv1x1", 90, "fp32", "3.6.0") == TABLES["conv1x1", 32][90]
    assert str(exception).startswith("triton 3.6.0, sm_90, conv1x1, 16 bit, up to 64 outputs: 64x64x64, 4 warps")
    assert str(exception).endswith("because it spills")


@pytest.mark.usefixtures("hopper")
def test_a_measured_tile_goes_before_the_tables() -> None:
    built_in = candidates("conv1x1", 90, "bf16")[64]
    assert choose("conv1x1", on_gpu(48)) == built_in[0] != OTHER
    measured.save(GPU, {measured.key("conv1x1", "bf16", 64): dataclasses.asdict(OTHER)})
    configs._choose.cache_clear()
    assert choose("conv1x1", on_gpu(48)) == OTHER
    assert choose("conv1x1", on_gpu(48, torch.float16)) == built_in[0]
    assert choose("conv1x1", on_gpu(128)) == candidates("conv1x1", 90, "bf16")[ALL][0]


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("tile", [dataclasses.asdict(Config(512, 512, 512)), {"pixels": 64}, {}])
def test_a_measured_tile_that_the_tables_do_not_hold_is_left_alone(tile: dict[str, int]) -> None:
    measured.save(GPU, {measured.key("conv1x1", "bf16", 64): tile})
    assert choose("conv1x1", on_gpu(48)) == candidates("conv1x1", 90, "bf16")[64][0]


@pytest.mark.usefixtures("hopper")
def test_tf32_is_a_class_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(measured, "key", lambda kernel, dtype, most: asked.append(dtype) or "")
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            choose("conv1x1", on_gpu(48, torch.float32))
    finally:
        torch.set_float32_matmul_precision(before)
    assert asked == ["fp32", "tf32"]
