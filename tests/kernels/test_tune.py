"""What `fxfreeze kernels tune` measures, keeps and finds again, on a clock that tells what the test wants."""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="tiles are for its kernels")

from fxfreeze.kernels import configs, measured, reference, tune
from fxfreeze.kernels.architectures import ARCHITECTURES
from fxfreeze.kernels.configs import Config
from fxfreeze.kernels.problems import multiplying, problem
from fxfreeze.kernels.traffic import SHAPES, Shape

GPU = "NVIDIA H200 (test) / 1"
CHOICE, OTHER, THIRD = Config(128, 64, 64), Config(64, 64, 64), Config(32, 64, 64)
REFERENCES: dict[str, Callable[..., torch.Tensor]] = {
    **dict.fromkeys(["conv1x1", "conv3x3", "rolling3x3"], reference.conv),
    "linear": reference.linear,
    "depthwise": reference.depthwise,
    "pointwise": reference.pointwise,
    "layernorm": reference.layernorm,
}


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured.load.cache_clear()
    yield tmp_path / "fxfreeze" / "kernels"
    measured.load.cache_clear()


# ---- measuring


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ((1.0, 0.9), OTHER),
        ((1.0, 0.99), CHOICE),  # within noise
        ((0.9, 1.0), CHOICE),
        ((1.0, 1.0), CHOICE),
        ((1.0, 0.9, 0.8), THIRD),
    ],
)
def test_the_fastest_is_kept_if_it_beats_the_tables_choice_clearly(times: tuple[float, ...], expected: Config) -> None:
    assert tune.best(dict(zip((CHOICE, OTHER, THIRD), times, strict=False))) == expected


def test_runs_are_interleaved_and_judged_by_their_medians() -> None:
    ran: list[Config] = []
    times = {CHOICE: iter([9.0] * 7 + [1.0] * 8), OTHER: iter([0.1] * 7 + [2.0] * 8)}

    def clock(run: Callable[[], None]) -> float:
        run()
        return next(times[ran[-1]])

    assert tune._measure((CHOICE, OTHER), ran.append, clock) == {CHOICE: 1.0, OTHER: 2.0}
    assert ran == [CHOICE, OTHER] * (1 + tune.ROUNDS)  # once to compile


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_class_with_a_choice_is_tried_once(arch: int) -> None:
    trials = list(tune.trials(arch))
    assert len({trial.key for trial in trials}) == len(trials)
    assert {trial.kernel for trial in trials} >= {"conv1x1", "linear", "conv3x3", "rolling3x3", "pointwise"}
    for trial in trials:
        assert trial.tiles == configs.candidates(trial.kernel, arch, trial.dtype)[trial.most]
        assert len(trial.tiles) > 1


def test_all_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    trial = tune.Trial("conv1x1", "bf16", 64, (CHOICE, OTHER))
    monkeypatch.setattr(tune, "trials", lambda arch: iter([trial]))
    monkeypatch.setattr(tune, "GpuClock", lambda device: lambda run: run() or clocked[-1])
    monkeypatch.setattr(tune.Trial, "prepare", lambda self, device: lambda tile: clocked.append(tile.pixels))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: warnings.catch_warnings())
    clocked: list[float] = []
    said: list[Any] = []
    found = tune.tune(torch.device("cuda"), lambda *what: said.append(what))
    assert found == {"conv1x1 bf16 64": dataclasses.asdict(OTHER)}
    assert said == [("conv1x1 bf16 64", {CHOICE: 128, OTHER: 64})]


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("kernel", REFERENCES)
def test_problems_are_what_the_reference_takes(kernel: str, dtype: str) -> None:
    *arguments, out = problem(kernel, dtype, 32, torch.device("meta"))
    result = REFERENCES[kernel](*arguments)
    assert (result.shape, result.dtype) == (out.shape, out.dtype)
    assert out.dim() == 2 or out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="the kernels run in the interpreter")
@pytest.mark.parametrize("kernel", REFERENCES)
def test_a_trial_runs_its_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    channels = SHAPES[kernel].inputs
    monkeypatch.setitem(SHAPES, kernel, Shape(2, 5, 4, inputs=min(channels, 24), taps=SHAPES[kernel].taps))
    made: list[Any] = []
    monkeypatch.setattr(tune, "problem", lambda *asked: made.append(problem(*asked)) or made[-1])
    rows = configs.candidates(kernel, 90, "fp32")
    run = tune.Trial(kernel, "fp32", min(rows), rows[min(rows)]).prepare(torch.device("cpu"))
    run(rows[min(rows)][0])
    *arguments, out = made[-1]
    assert torch.allclose(out, REFERENCES[kernel](*arguments), rtol=1e-4, atol=1e-4)


def test_the_precision_of_products_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    with multiplying("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    with pytest.raises(KeyError), multiplying("fp32"):
        raise KeyError
    assert torch.get_float32_matmul_precision() == before


# ---- what is kept


def test_what_was_saved_is_found_again(folder: Path) -> None:
    assert measured.load(GPU) == {}
    tiles = {"conv1x1 bf16 64": dataclasses.asdict(OTHER)}
    path = measured.save(GPU, tiles)
    assert measured.load(GPU) == tiles
    assert [path] == list(folder.iterdir())
    assert folder.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600
    assert json.loads(path.read_text())["device"] == GPU


def test_devices_and_versions_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    measured.save(GPU, {"conv1x1 bf16 64": {"pixels": 1}})
    assert measured.load("NVIDIA A100") == {}
    monkeypatch.setattr(measured, "triton_version", lambda: "0.1")
    measured.load.cache_clear()
    assert measured.load(GPU) == {}


def test_saving_replaces_all_that_was_there(folder: Path) -> None:
    measured.save(GPU, {"a": {"pixels": 1}})
    measured.save(GPU, {"b": {"pixels": 2}})
    assert measured.load(GPU) == {"b": {"pixels": 2}}
    assert len(list(folder.iterdir())) == 1


def test_a_save_that_fails_leaves_what_was_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured.save(GPU, {"a": {"pixels": 1}})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        measured.save(GPU, {"b": {"pixels": 2}})
    assert measured.load(GPU) == {"a": {"pixels": 1}}
    assert len(list(folder.iterdir())) == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"tiles": 3}', '{"tiles": {"a": 3}}', '{"tiles": {"a": {"b": "c"}}}', "\xff"]
)
def test_a_file_that_is_not_one_is_ignored_with_a_warning(text: str) -> None:
    path = measured.save(GPU, {})
    path.write_bytes(text.encode("latin-1"))
    measured.load.cache_clear()
    with pytest.warns(UserWarning, match=r"is ignored .*`fxfreeze kernels tune` writes it anew"):
        assert measured.load(GPU) == {}


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert measured.path(GPU).is_relative_to(tmp_path / ".cache" / "fxfreeze" / "kernels")
