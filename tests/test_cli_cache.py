"""`fxfreeze cache`: what it lists, what it finds wrong, and what it removes and leaves alone."""

import fcntl
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from store_samples import COLUMNS, IDENTITY, LENGTH, values, writer

from fxfreeze.cache import Column, StoreWriter
from fxfreeze.caches import COLUMNS as HEADS
from fxfreeze.caches import find
from fxfreeze.cli import main

NAMED = {"network": "ResNet", "depth": 3, "unit": "layer1.0", "data": "MNIST", "dtype": "float32", "views": 1}
CACHE = Path("cache")
SHARD = "00000.safetensors"


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def fill(name: str, rows: int = LENGTH, folder: Path = CACHE, **identity: str | int) -> Path:
    """A store of `rows` rows, in shards of a few; its folder."""
    with StoreWriter(
        folder / name, identity=IDENTITY | identity, length=LENGTH, columns=COLUMNS, shard_bytes=8000
    ) as store:
        for samples in torch.arange(rows).split(7):
            store.append(samples, values(COLUMNS, samples.tolist()))
    return folder / name


def run(*arguments: str) -> int:
    """The exit status, by whichever way the command leaves."""
    try:
        return main(["cache", *arguments])
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else -1


def cells(out: str) -> dict[str, dict[str, str]]:
    """The printed table: each store's cells by column, those of several lines joined."""
    table: dict[str, dict[str, str]] = {}
    for line in out.splitlines():
        if line.startswith("│"):
            row = dict(zip(HEADS, (cell.strip() for cell in line.strip("│").split("│")), strict=True))
            if row["store"]:
                name = row["store"]
                table[name] = row
            else:
                table[name] = {head: f"{table[name][head]} {cell}".strip() for head, cell in row.items()}
    return table


def snapshot(folder: Path = CACHE) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def size(*folders: Path) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.iterdir())


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ---- ls


def test_ls_shows_what_each_store_is(capsys: pytest.CaptureFixture[str]) -> None:
    whole, part = fill("whole", **NAMED), fill("part", 11)
    os.utime(whole / "manifest.json", (0, 86400 * 365.25 * 30))
    assert run("ls") == 0
    out, err = capsys.readouterr()
    table = cells(out)
    assert list(table) == ["part", "whole"]
    row = table["whole"]
    assert (row["network"], row["depth"], row["up to"], row["data"]) == ("ResNet", "3", "layer1.0", "MNIST")
    assert (row["rows"], row["state"]) == ("40 of 40", "complete")
    assert row["size"] == f"{size(whole) / 1e3:.1f} kB"
    assert row["dtype"] == "bfloat16, float32, int64, bytes, float16"
    assert row["last used"].startswith("1999-12-31") or row["last used"].startswith("2000-01-01")
    assert (table["part"]["network"], table["part"]["up to"], table["part"]["data"]) == ("-", "-", "-")
    assert (table["part"]["rows"], table["part"]["state"]) == ("11 of 40", "partial")
    assert out.splitlines()[-1] == f"2 stores, {size(whole, part) / 1e3:.1f} kB."
    assert err == ""


def test_ls_takes_a_directory_or_a_store(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    fill("one", folder=Path("elsewhere"))
    fill("two", folder=Path("elsewhere"))
    assert run("ls", "elsewhere") == 0
    assert list(cells(capsys.readouterr().out)) == ["one", "two"]
    assert run("ls", "elsewhere/one") == 0
    assert list(cells(capsys.readouterr().out)) == ["one"]
    monkeypatch.chdir("elsewhere/two")
    assert run("ls", ".") == 0
    assert list(cells(capsys.readouterr().out)) == ["two"]


def test_ls_tells_whether_a_store_is_being_written(capsys: pytest.CaptureFixture[str]) -> None:
    fill("quiet")
    with writer(CACHE / "busy"):
        assert run("ls") == 0
        states = {name: row["state"] for name, row in cells(capsys.readouterr().out).items()}
        assert states == {"busy": "being written", "quiet": "complete"}
    with writer(CACHE / "quiet"):  # looking has left no lock behind
        assert run("ls") == 0
        states = {name: row["state"] for name, row in cells(capsys.readouterr().out).items()}
        assert states == {"busy": "partial", "quiet": "being written"}


def test_two_who_look_do_not_see_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with (fill("store") / "lock").open() as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        assert run("ls") == 0
    assert cells(capsys.readouterr().out)["store"]["state"] == "complete"


def test_ls_finds_a_store_by_its_manifest_alone(capsys: pytest.CaptureFixture[str]) -> None:
    (fill("copied", 0) / "lock").unlink()
    assert run("ls") == 0
    assert cells(capsys.readouterr().out)["copied"]["rows"] == "0 of 40"


def test_ls_passes_by_a_folder_that_is_closed_to_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fill("store")
    (CACHE / "lost+found").mkdir()
    original = os.listdir

    def listdir(path: Path) -> list[str]:
        if "lost+found" in str(path):
            raise PermissionError(13, "Permission denied")
        return original(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert run("ls") == 0
    assert list(cells(capsys.readouterr().out)) == ["store"]


def test_ls_disturbs_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill("store")
    before, used = snapshot(), (folder / "manifest.json").stat().st_mtime_ns
    assert run("ls") == 0
    assert "complete" in capsys.readouterr().out
    assert snapshot() == before
    assert (folder / "manifest.json").stat().st_mtime_ns == used


def broken_manifest(folder: Path) -> str:
    flip(folder / "manifest.json", 40)
    return "manifest.json"


def missing_manifest(folder: Path) -> str:
    (folder / "manifest.json").unlink()
    return "it has no manifest"


def other_format(folder: Path) -> str:
    (folder / "manifest.json").write_text('{"format": 7}')
    return "the store's format is 7"


def missing_shard(folder: Path) -> str:
    (folder / SHARD).unlink()
    return f"{SHARD} is missing"


def cut_shard(folder: Path) -> str:
    os.truncate(folder / SHARD, 100)
    return f"{SHARD} has 100 bytes instead of"


DAMAGES = [broken_manifest, missing_manifest, other_format, missing_shard, cut_shard]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_listed_verified_and_removed(
    damage: Callable[[Path], str], capsys: pytest.CaptureFixture[str]
) -> None:
    fill("sound")
    message = damage(fill("ill"))
    assert run("ls") == 0
    out = capsys.readouterr().out
    assert {name: row["state"] for name, row in cells(out).items()} == {"ill": "damaged", "sound": "complete"}
    [line] = [line for line in out.splitlines() if line.startswith("ill: ")]
    assert message in line
    assert run("verify") == 1
    ill, sound = capsys.readouterr().out.splitlines()
    assert ill.startswith("ill: ")
    assert message in ill
    assert sound.startswith("sound: ok")
    assert run("rm", "cache", "ill") == 0
    assert sorted(path.name for path in CACHE.iterdir()) == ["sound"]


def test_ls_of_nothing_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    CACHE.mkdir()
    assert run("ls") == 0
    assert capsys.readouterr().out == "cache has no stores.\n"


@pytest.mark.parametrize("arguments", [["ls"], ["verify"], ["rm", "--all"], ["rm", "one"], ["verify", "one", "two"]])
def test_a_missing_folder_is_named_as_missing(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The first word is the folder where there is no ./cache."""
    missing = "one" if "one" in arguments else "cache"
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"error: there is no folder {missing}; name the directory that the CachedLoader was given\n" in err
    assert not Path(missing).exists()


def test_names_alone_are_those_of_the_default_directory(capsys: pytest.CaptureFixture[str]) -> None:
    fill("003-22c93eebd01d7533")
    fill("005-aa")
    fill("005-bb")
    assert run("verify", "003-2", "005-a") == 0
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "003-22c93eebd01d7533",
        "005-aa",
    ]
    assert run("rm", "003-2", "005-b") == 0
    assert [path.name for path in CACHE.iterdir()] == ["005-aa"]


def test_a_first_word_that_is_a_folder_is_the_directory() -> None:
    """Though there is a ./cache, even one with a store of that name."""
    fill("one")
    fill("one", folder=Path("one"))
    assert run("rm", "one", "one") == 0
    assert [path.name for path in CACHE.iterdir()] == ["one"]
    assert not list(Path("one").iterdir())


def test_names_and_manifests_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill("a\n\x1b[31m[bold]b\udcff", network="\x1b[2J[red]net")
    assert run("ls") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    [(name, row)] = cells(out).items()
    assert (name, row["network"]) == ("a??[31m[bold]b?", "?[2J[red]net")
    flip(folder / SHARD, -1)
    assert run("verify") == 1
    assert capsys.readouterr().out.startswith("a??[31m[bold]b?: ")


# ---- verify


def test_verify_says_a_line_for_each_store(capsys: pytest.CaptureFixture[str]) -> None:
    fill("part", 11)
    fill("whole")
    assert run("verify") == 0
    part, whole = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"part: ok, 11 of 40 rows, [\d.]+ kB at [\d,]+ MB/s", part)
    assert re.fullmatch(r"whole: ok, 40 of 40 rows, [\d.]+ kB at [\d,]+ MB/s", whole)


def test_verify_reads_every_byte(capsys: pytest.CaptureFixture[str]) -> None:
    columns = (Column("x", torch.float32, (5,)),)
    with StoreWriter("cache/store", identity=IDENTITY, length=LENGTH, columns=columns) as store:
        store.append(range(3), {"x": torch.randn(3, 5)})
    path = CACHE / "store" / SHARD
    length = path.stat().st_size
    for at in (*range(0, 4096, 97), *range(4096, length)):  # the header's page, most of it blank, and the rest
        flip(path, at)
        assert run("verify") == 1, at
        flip(path, at)
    capsys.readouterr()
    assert run("verify") == 0


def test_verify_of_some(capsys: pytest.CaptureFixture[str]) -> None:
    flip(fill("ill") / SHARD, -1)
    flip(fill("ill-too") / SHARD, -1)
    fill("sound")
    assert run("verify", "cache", "so") == 0
    assert capsys.readouterr().out.startswith("sound: ok")
    assert run("verify", "cache", "sound", "ill") == 1
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == ["sound", "ill"]


def test_several_damages_of_a_store_are_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill("ill")
    flip(folder / SHARD, -1)
    flip(folder / "00001.safetensors", -1)
    assert run("verify") == 1
    [line] = capsys.readouterr().out.splitlines()
    assert SHARD in line
    assert "00001.safetensors" in line


# ---- rm


def test_rm_removes_what_is_named_and_says_how_much(capsys: pytest.CaptureFixture[str]) -> None:
    gone, too, _ = fill("one-and-only"), fill("two"), fill("two-more")
    kept, freed = snapshot(CACHE / "two-more"), size(gone, too)
    assert run("rm", "cache", "one", "two", "two") == 0
    assert capsys.readouterr().out.splitlines() == [
        "one-and-only: removed",
        "two: removed",
        f"Freed {freed / 1e3:.1f} kB ({freed:,} bytes).",
    ]
    assert [path.name for path in CACHE.iterdir()] == ["two-more"]
    assert snapshot(CACHE / "two-more") == kept


def test_rm_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    one = fill("one")
    (one / "00009.safetensors.tmp").write_bytes(bytes(1000))  # what a kill in a commit leaves
    freed = size(one, fill("two"))
    assert run("rm", "--all") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Freed {freed / 1e3:.1f} kB ({freed:,} bytes)."
    assert list(CACHE.iterdir()) == []
    assert run("rm", "--all") == 0
    assert capsys.readouterr().out == "cache has no stores.\n"


def test_rm_of_a_store_by_its_folder() -> None:
    fill("one")
    fill("two")
    assert run("rm", "cache/one") == 2
    assert run("rm", "cache/one", "--all") == 0
    assert [path.name for path in CACHE.iterdir()] == ["two"]


def test_rm_leaves_what_is_not_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Files beside a store's, and folders that look like one at first sight."""
    foreign = [
        "notes.txt",
        "manifest.json",  # of a web page
        "model/00001.safetensors",
        "model/00002.safetensors",
        "page/manifest.json",
        "locked/lock",
        "other/x/y",
    ]
    for name in foreign:
        (CACHE / name).parent.mkdir(parents=True, exist_ok=True)
        (CACHE / name).write_text('{"name": "page", "format": 7}')
    before = snapshot()
    mine = fill("mine") / "mine.txt"
    freed = size(CACHE / "mine")
    mine.write_text("kept")
    assert [path.name for path in find(CACHE)] == ["mine"]
    assert run("rm", "--all") == 0
    out = capsys.readouterr().out
    assert "mine: removed; its folder stays, for the other files in it" in out
    assert f"({freed:,} bytes)" in out
    assert snapshot() == before | {"mine/mine.txt": b"kept"}


def test_rm_refuses_a_store_that_is_being_written(capsys: pytest.CaptureFixture[str]) -> None:
    busy, freed = fill("b-busy"), size(fill("a"), fill("c"))
    with writer(busy):
        before = snapshot(busy)
        assert run("rm", "--all") == 1
        assert snapshot(busy) == before
    out, err = capsys.readouterr()
    assert err.startswith("b-busy: not removed: ")
    assert f"is being written by process {os.getpid()}" in err
    assert err.count("\n") == 1
    assert out.splitlines() == ["a: removed", "c: removed", f"Freed {freed / 1e3:.1f} kB ({freed:,} bytes)."]
    assert [path.name for path in CACHE.iterdir()] == ["b-busy"]


def test_a_removal_that_a_kill_broke_off_is_seen_and_ended(capsys: pytest.CaptureFixture[str]) -> None:
    folder = fill("half")
    (folder / "manifest.json").rename(folder / "manifest.json.dropped")
    for shard in folder.glob("*.safetensors"):
        shard.unlink()
    assert run("ls") == 0
    assert "its making or removal was broken off" in capsys.readouterr().out
    assert run("rm", "cache", "half") == 0
    assert list(CACHE.iterdir()) == []


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: ls|verify|rm"),
        (["burn"], "invalid choice: 'burn'"),
        (["ls", "cache", "one"], "unrecognized arguments: one"),
        (["ls", ""], "'' names no folder"),
        (["ls", "file"], "error: file can't be read: Not a directory"),
        (["ls", "x" * 300], "can't be read: File name too long"),
        (["ls", "absent"], "there is no folder absent; name the directory"),
        (
            ["verify", "absent"],
            "'absent' means no store of cache, which has one, two, two-more; nor is there such a folder",
        ),
        (["verify", "./absent"], "there is no folder absent; name the directory"),
        (["verify", "empty"], "empty has no stores; there is nothing to verify"),
        (["verify", "cache", "three"], "'three' means no store of cache, which has one, two, two-more"),
        (["rm"], "name the stores of cache that shall go, or give --all; it has one, two, two-more"),
        (["rm", "empty"], "it has none"),
        (["rm", "absent", "--all"], "names (absent) and --all were given"),
        (["rm", "cache", "one", "--all"], "names (one) and --all were given"),
        (["rm", "cache", "one", "three"], "'three' means no store of cache, which has one, two, two-more"),
        (["rm", "cache", "one", "tw"], "'tw' means 2 stores of cache, which has one, two, two-more"),
        (["rm", "cache/one", ""], "'' means no store of cache/one, which has one"),
        (["rm", "cache", "../cache/one"], "'../cache/one' means no store"),
        (["rm", "absent", "one"], "'absent' means no store of cache"),
        (["rm", "./absent", "one"], "there is no folder absent; name the directory"),
        (["rm", "--al"], "unrecognized arguments: --al"),
    ],
)
def test_misuse_gets_one_line_and_removes_nothing(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("one", "two", "two-more"):
        fill(name)
    Path("file").touch()
    Path("empty").mkdir()
    before = snapshot(Path())
    assert run(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.match("fxfreeze( cache( ls| verify| rm)?)?: error: ", err)
    assert message in err
    assert snapshot(Path()) == before


@pytest.mark.parametrize("action", ["ls", "verify", "rm"])
def test_help(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(action, "--help") == 0
    assert "(default: cache)" in " ".join(capsys.readouterr().out.split())


BLOCKED = """
import sys
sys.modules |= dict.fromkeys({packages!r})
from fxfreeze.cli import main
sys.exit(main({arguments!r}))
"""


def without(packages: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    code = BLOCKED.format(packages=packages, arguments=list(arguments))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("package", ["xxhash", "safetensors"])
def test_what_is_missing_is_named_with_its_remedy(package: str) -> None:
    done = without([package], "cache", "ls")
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"fxfreeze cache ls: error: {package} .*pip install xxhash 'safetensors>=0.8'\n", done.stderr)


def test_the_other_verbs_need_no_cache() -> None:
    arguments = ["--model", "tiny:Tiny", "--data", "tiny:data", "--batch-size", "8"]
    done = without(["xxhash", "safetensors"], "plan", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "Picture: " in done.stdout


def test_the_command_line_loads_no_cache_before_it_is_asked_to() -> None:
    code = (
        "import json, sys, fxfreeze.cli; print(json.dumps(sorted({'xxhash', 'fxfreeze.caches'} & sys.modules.keys())))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
