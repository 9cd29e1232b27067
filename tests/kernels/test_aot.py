"""The machine code of the shipped tiles, compiled with no GPU present: what the tables promise, and that a lapse is seen.

A sample in which each tile and each architecture of each kernel appears; all of it, with FXFREEZE_AOT=all, by `make aot`.
"""

import importlib.util
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="what is compiled here, triton compiles")

from fxfreeze.kernels import aot, configs
from fxfreeze.kernels.aot import FORMS, NARROW_FORMS, Variant, look
from fxfreeze.kernels.architectures import ARCHITECTURES
from fxfreeze.kernels.configs import Config
from fxfreeze.kernels.criteria import faults
from fxfreeze.kernels.gpu import conv1x1
from fxfreeze.kernels.machine_code import MachineCode, parse
from fxfreeze.kernels.measured import triton_version
from fxfreeze.kernels.report import Entry, shipped, variants

compiling = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="under TRITON_INTERPRET=1 triton compiles nothing"
)
MOST_COMPILATIONS = 60
ENTRIES = [entry for arch in ARCHITECTURES for entry in shipped(arch)]
CLEAN = MachineCode(
    registers=128,
    shared=1 << 10,
    spills=0,
    tensor_core="HGMMA",
    serialised=False,
    load_bits=128,
    widest_bits=128,
    asynchronous=True,
)
BARE = Variant("conv1x1", Config(128, 64, 64, warps=8), 90, "bf16")


def everything() -> list[Variant]:
    """Each tile in each form, at 16 bytes, and at the 8 that a growth of 12 leaves to 16-bit elements."""
    wanted = {}
    for entry in ENTRIES:
        wanted |= dict.fromkeys(variants(entry, list(FORMS[entry.kernel])))
        if entry.dtype in ("fp16", "bf16"):
            wanted |= dict.fromkeys(variants(entry, NARROW_FORMS.get(entry.kernel, ()), 4))
    return list(wanted)


def sample() -> list[Variant]:
    """Each tile once, on that architecture of its own that its kernel has been least on; forms and dtypes take turns."""
    homes: dict[tuple[str, Config], list[Entry]] = {}
    for entry in ENTRIES:
        homes.setdefault((entry.kernel, replace(entry.config, rows=1)), []).append(entry)
    been: Counter[tuple[str, object]] = Counter()
    wanted = []
    for place, entries in enumerate(homes.values()):
        entry = min(entries, key=lambda e: (been[e.kernel, e.arch], been[e.kernel, e.dtype]))
        been.update([(entry.kernel, entry.arch), (entry.kernel, entry.dtype)])
        first, *_, last = FORMS[entry.kernel]
        wanted += variants(entry, [last if place % 3 else first])
    return wanted


def name(variant: Variant) -> str:
    tile = str(variant.config).replace(", ", "-").replace(" ", "")
    return f"sm_{variant.arch}-{variant.kernel}-{variant.dtype}-{tile}-{variant.form}-unit{variant.unit}"


CASES = everything() if os.environ.get("FXFREEZE_AOT") == "all" else sample()


def test_the_sample_is_small_and_leaves_nothing_out() -> None:
    taken = sample()
    assert len(taken) <= MOST_COMPILATIONS - 6  # what the tests below compile
    both = {"conv1x1", "conv3x3"}  # whose tables differ by architecture; the others have few tiles
    assert {(v.kernel, v.arch) for v in taken} >= {(kernel, arch) for kernel in both for arch in ARCHITECTURES}
    assert {v.kernel for v in taken} == set(FORMS)
    assert {(v.kernel, v.config) for v in taken} == {(e.kernel, replace(e.config, rows=1)) for e in ENTRIES}
    assert {v.dtype for v in taken} == {"fp16", "bf16", "fp32", "tf32"}


@compiling
@pytest.mark.slow
@pytest.mark.parametrize("variant", CASES, ids=name)
def test_machine_code(variant: Variant) -> None:
    assert faults(variant, look(variant)) == []


# ---- that a lapse is seen


@pytest.mark.parametrize(
    ("lapse", "fault"),
    [
        ({"spills": 8}, "spills 8 bytes"),
        ({"shared": (227 << 10) + 1}, "232449 bytes of shared memory, the limit is 232448"),
        ({"load_bits": 64}, "loads 64 bits at a time, 128 are aligned"),
        ({"tensor_core": None}, "multiplies by FFMA, not by HGMMA"),
        ({"tensor_core": "HMMA"}, "multiplies by HMMA, not by HGMMA"),
        ({"serialised": True}, "products wait for one another"),
        ({"asynchronous": False}, "loads pass through registers"),
    ],
)
def test_each_criterion(lapse: dict[str, object], fault: str) -> None:
    assert faults(BARE, CLEAN) == []
    assert faults(BARE, replace(CLEAN, **lapse)) == [fault]


def test_only_a_listed_exception_excuses_spills(monkeypatch: pytest.MonkeyPatch) -> None:
    exception = configs.CompilerException(triton_version(), 90, "conv1x1", 16, 64, BARE.config, "it spills", spills=8)
    monkeypatch.setattr(configs, "EXCEPTIONS", (exception,))
    assert faults(BARE, replace(CLEAN, spills=8)) == []
    assert faults(BARE, replace(CLEAN, spills=12)) == ["spills 12 bytes"]
    assert faults(replace(BARE, config=Config(64, 64, 64)), replace(CLEAN, spills=8)) == ["spills 8 bytes"]


def test_a_kernel_without_products_needs_no_tensor_cores() -> None:
    variant = Variant("pointwise", Config(32, channels=64), 90, "bf16")
    assert faults(variant, replace(CLEAN, tensor_core=None, asynchronous=False)) == []


def test_loads_of_vectors_may_be_narrow_where_those_of_operands_are_not() -> None:
    full = replace(BARE, form="full")
    assert faults(full, replace(CLEAN, load_bits=32)) == []
    assert faults(full, replace(CLEAN, load_bits=32, widest_bits=64)) != []


@compiling
@pytest.mark.slow
def test_a_tile_that_is_too_large_spills() -> None:
    code = look(replace(BARE, config=Config(128, 256, 64, warps=8), form="full"))
    assert code.spills > 0
    assert code.registers == 255


@compiling
@pytest.mark.slow
def test_channels_that_are_no_multiple_of_the_unit_make_loads_narrow() -> None:
    code = look(replace(BARE, unit=1))
    assert code.load_bits == 16
    assert not code.asynchronous


@compiling
@pytest.mark.slow
def test_weights_too_few_for_the_threads_are_loaded_narrowly() -> None:
    assert look(replace(BARE, config=Config(128, 16, 64, warps=8))).load_bits == 64


@compiling
@pytest.mark.slow
def test_a_way_round_the_loop_serialises_the_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the loops of the kernels never make zero turns."""
    variant = replace(BARE, form="prologue")
    assert not look(variant).serialised
    text = Path(conv1x1.__file__).read_text()
    changed = text.replace("tl.maximum(tl.cdiv(C * VC, BC), 1)", "tl.cdiv(C * VC, BC)")
    assert changed != text
    path = tmp_path / "changed.py"
    path.write_text(changed)
    spec = importlib.util.spec_from_file_location("changed", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(aot._FUNCTIONS, "conv1x1", module.conv1x1_kernel)
    code = look(variant)
    assert code.serialised
    assert faults(variant, code) == ["products wait for one another"]


# ---- the reading of a disassembly


def listing(*lines: str) -> str:
    return "\n".join(
        line if line.startswith(".L") else f"        /*{16 * i:04x}*/                   {line} ;"
        for i, line in enumerate(lines)
    )


def loop(*lines: str) -> str:
    """A main loop between loads before it and behind it, and out of the way a wait that branches back into it."""
    return listing(
        "LDG.E R1, desc[UR4][R2.64]",
        ".L_x_1:",
        "LDGSTS.E.BYPASS.128 [R13+0xc000], desc[UR18][R4.64+0x100], P6",
        ".L_x_2:",
        *lines,
        "BRA `(.L_x_1)",
        "STG.E.64 desc[UR4][R2.64], R24",
        "LDG.E.U16 R1, desc[UR4][R2.64]",
        "EXIT",
        "SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR11], R56",
        "BRA `(.L_x_2)",
        ".L_x_9:",
        "BRA `(.L_x_9)",
    )


FIRST, LAST = "HGMMA.64x128x16.F32.BF16 R24, R88, gdesc[UR8], R24", "HGMMA.64x128x16.F32.BF16 R24, R92, R24, gsb0"
ONE_UNDER_WAY, NONE_UNDER_WAY = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def test_the_main_loop_is_read_alone() -> None:
    code = parse(loop(FIRST, LAST, ONE_UNDER_WAY), registers=99, shared=5)
    assert code == MachineCode(
        registers=99,
        shared=5,
        spills=0,
        tensor_core="HGMMA",
        serialised=False,
        load_bits=128,
        widest_bits=128,
        asynchronous=True,
    )


@pytest.mark.parametrize(
    ("lines", "serialised"),
    [
        ((FIRST, LAST, NONE_UNDER_WAY), False),  # waits once a turn, for what it is about to overwrite
        ((FIRST, LAST, ONE_UNDER_WAY, FIRST, LAST, ONE_UNDER_WAY), False),
        ((LAST, NONE_UNDER_WAY, LAST, NONE_UNDER_WAY), True),
        ((NONE_UNDER_WAY, FIRST, LAST), False),
    ],
)
def test_products_that_wait_for_one_another(lines: tuple[str, ...], serialised: bool) -> None:
    assert parse(loop(*lines), 99, 5).serialised is serialised


def test_spills_are_counted_in_bytes_wherever_they_are() -> None:
    code = parse(loop("HMMA.16816.F32.BF16 R4, R8, R12, R4", "@P0 STL.64 [R1], R2", "LDL.LU.128 R4, [R1]"), 99, 5)
    assert (code.tensor_core, code.spills) == ("HMMA", 24)


def test_a_kernel_without_a_loop_is_read_as_a_whole() -> None:
    code = parse(listing("LDG.E.128 R4, [R2]", "@!P1 LDG.E.U8 R4, [R2]", "LDG.E.64.CONSTANT R4, [R2]", "EXIT"), 9, 0)
    assert (code.load_bits, code.widest_bits, code.asynchronous, code.tensor_core) == (8, 128, False, None)
