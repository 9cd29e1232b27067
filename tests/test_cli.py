"""The command line: refusals in one line, whole runs of each verb, resuming, and Ctrl-C."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import Tiny
from torch import Tensor

from fxfreeze import checkpoint
from fxfreeze.cli import main
from fxfreeze.recipes import FINETUNE, FROM_SCRATCH, SHORTS
from fxfreeze.train import Run

TINY = ["--model", "tiny:Tiny", "--data", "tiny:data", "--epochs", "2", "--batch-size", "8"]
QUIET = ["--no-progress", "--block", "4"]
PROFILED = ["--model", "tiny:Tiny", "--data", "tiny:data", "--batch-size", "8", "--no-progress"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(Path(__file__).parent)


Interrupt = Callable[[int], None]


@pytest.fixture
def interrupt(monkeypatch: pytest.MonkeyPatch) -> Interrupt:
    """Presses Ctrl-C in the n-th step that any run takes."""

    def press(after: int) -> None:
        steps, original = [0], Run._step

        def step(run: Run) -> Tensor:
            steps[0] += 1
            if steps[0] == after:
                signal.raise_signal(signal.SIGINT)
            return original(run)

        monkeypatch.setattr(Run, "_step", step)

    return press


def files() -> list[str]:
    return sorted(str(path) for path in Path().rglob("*") if path.is_file())


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    return err


# ---- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: compare|train|plan|profile"),
        (["race"], "invalid choice: 'race'"),
        (["compare", "--epochs", "0"], "--epochs: '0' is not a whole number of at least 1"),
        (["compare", "--epochs", "many"], "--epochs: 'many' is not a whole number"),
        (["compare", "--epoch", "3"], "--epoch"),
        (["compare", "--lr", "0"], "--lr: '0' is not a number above 0"),
        (["compare", "--lr", "nan"], "--lr: 'nan' is not a number"),
        (["compare", "--t0", "1.5"], "--t0: '1.5' is not a number above 0 and up to 1"),
        (["compare", "--how", "quartic"], "--how: invalid choice: 'quartic'"),
        (["compare", "--precision", "int4"], "--precision: invalid choice: 'int4'"),
        (["train", "--precision", "int8"], "--precision: invalid choice: 'int8'"),
        (["compare", "--device", "abacus"], "--device abacus can't be used here"),
        (["compare", "--device", "cuda:99"], "--device cuda:99 can't be used here"),
        (["compare", "--model", "densenot"], "no network is named 'densenot'"),
        (["compare", "--data", "cifar11"], "no data set is named 'cifar11'"),
        (["compare", "--data", "folder:absent"], "absent"),
        (["compare", *TINY, "--batch-size", "85"], "a batch of 85 samples was asked for"),
        (["compare", *TINY, "--rows", "plain,fast"], "--rows has 'fast'"),
        (["compare", *TINY, "--rows", "plain,by-hand"], "--rows has 'by-hand'"),
        (["compare", *TINY, "--model", "tiny:Flat"], "one unit"),
        (["compare", *TINY, "--out", "taken/in"], "--out taken/in can't be a folder to write to"),
        (["compare", "--save", "x"], "unrecognized arguments: --save x"),
        (["train", "--resume", "absent.pt"], "no checkpoint at absent.pt"),
        (["train", "--save", "absent/x.pt"], "'absent/x.pt' can't be a file"),
        (["train", "--row", "plain-short"], "--row: invalid choice"),
        (["train", "--row", "fxfreeze+cache"], "--row: invalid choice: 'fxfreeze+cache'"),
        (
            ["compare", *TINY, "--rows", "plain,fxfreeze,plain-short+cache"],
            "--rows has plain-short+cache, whose length follows from plain and fxfreeze+cache: name them too",
        ),
        (["compare", *TINY, "--rows", "plain,cache"], "--rows has 'cache'; expected some of plain,freezeout,fxfreeze,"),
        (["plan", "--seeds", "3"], "unrecognized arguments: --seeds 3"),
        (
            ["profile", *PROFILED, "--depths", "1,5"],
            "this network has no depth 5: its depths are 0 to 4",
        ),
        (["profile", "--depths", "1,-2"], "--depths: '-2' is not a whole number of at least 0"),
        (["profile", "--depths", "1;2"], "--depths: '1;2' is not a whole number of at least 0"),
        (["profile", "--rounds", "0"], "--rounds: '0' is not a whole number of at least 1"),
        (["profile", "--trace", "absent/x.json"], "'absent/x.json' can't be a file"),
        (["profile", *PROFILED, "--plot", "x.doc"], "--plot x.doc is no picture that is drawn here"),
        (["profile", *PROFILED, "--plot", "x.gif"], "--plot x.gif is no picture that is drawn here"),
        (["profile", *PROFILED, "--plot", "taken"], "--plot taken is no picture that is drawn here"),
        (["profile", *PROFILED, "--model", "tiny:Flat"], "the network is one unit"),
        (["profile", *PROFILED, "--batch-size", "85"], "a batch of 85 samples was asked for"),
        (["profile", "--device", "abacus"], "--device abacus can't be used here"),
    ],
)
def test_bad_input_gets_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("taken").touch()
    try:
        status = main(arguments)
    except SystemExit as leaving:  # argparse's way
        status = leaving.code if isinstance(leaving.code, int) else -1
    assert status == 2
    assert message in one_line(capsys)
    assert files() == ["taken"]
    assert not Path("runs").exists()


@pytest.mark.parametrize("package", ["xxhash", "safetensors"])
@pytest.mark.parametrize("arguments", [[], ["--finetune"], ["--rows", "plain,fxfreeze+cache"]])
def test_the_cached_row_without_its_packages_gets_one_line(
    arguments: list[str], package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def trains(run: Run) -> Tensor:
        raise AssertionError("something trains")

    monkeypatch.setattr(Run, "_step", trains)
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["compare", *TINY, *arguments]) == 2
    assert one_line(capsys) == (
        f"fxfreeze compare: error: {package} is not installed; the cache needs it: pip install xxhash 'safetensors>=0.8', "
        "or name the other rows with --rows\n"
    )
    assert files() == []
    assert not Path("runs").exists()


@pytest.mark.parametrize("arguments", [[], ["--finetune"], ["--rows", "plain,fxfreeze+cache"]])
def test_a_network_that_can_t_be_cached_gets_one_line(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixing = ["compare", *TINY, *QUIET, "--model", "tiny:Mixing"]
    assert main([*mixing, "--rows", "plain,fxfreeze,plain-short", "--out", "here"]) == 0
    capsys.readouterr()
    before = files()

    def trains(run: Run) -> Tensor:
        raise AssertionError("something trains")

    monkeypatch.setattr(Run, "_step", trains)
    Path("temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", "temporary")
    assert main([*mixing, *arguments]) == 2
    assert not list(Path("temporary").iterdir())
    line = one_line(capsys)
    assert "error: fxfreeze+cache can't be: the frozen part can't be cached: " in line
    assert "mixes the samples of a batch" in line
    assert line.endswith("; or name the other rows with --rows\n")
    assert files() == before


def test_the_other_rows_need_no_package_of_the_cache() -> None:
    code = (
        "import sys; sys.modules['xxhash'] = sys.modules['safetensors'] = None\n"
        "from fxfreeze.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    rows = ["--rows", "plain,freezeout,fxfreeze,plain-short", "--out", "here"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, "compare", *TINY, *QUIET, *rows],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "fxfreeze took" in done.stdout
    assert "equal time" in done.stdout
    assert "cache" not in done.stdout


@pytest.mark.parametrize("verb", ["compare", "train", "plan"])
def test_help_names_the_options_and_their_defaults(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "densenet-bc-8-16" in text
    assert "mnist5k" in text
    assert "(default: 0.3)" in text


def test_a_failure_while_training_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: Run) -> Tensor:
        raise ValueError("a defect, not a refusal")

    monkeypatch.setattr(Run, "_step", broken)
    with pytest.raises(ValueError, match="a defect"):
        main(["compare", *TINY, *QUIET])
    assert not list(Path("runs").iterdir())


# ---- compare


def test_compare_ends_with_a_table_a_verdict_and_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *TINY, *QUIET, "--out", "here", "--seed", "5"]) == 0
    out, err = capsys.readouterr()
    for row in FROM_SCRATCH:
        assert f"│ {row} " in out
    assert "fxfreeze+cache took" in out
    assert "the time of fxfreeze without the cache" in out
    assert re.search(r"fxfreeze\+cache \(seed 5\): \d+% of its samples came from", out)
    assert "equal time" in out
    assert out.rstrip().endswith("Report: here/report.html")
    assert err == ""
    content = json.loads(Path("here/report.json").read_text())
    assert content["command"] == f"fxfreeze compare {' '.join([*TINY, *QUIET])} --out here --seed 5"
    assert [trial["seed"] for trial in content["trials"]] == [5]
    assert content["settings"]["steps_scale"] == 2
    rows = content["trials"][0]["rows"]
    assert {name: row["planned"] for name, row in rows.items() if name not in SHORTS} == {
        "plain": 20,
        "freezeout": 40,
        "fxfreeze": 40,
        "fxfreeze+cache": 40,
    }
    cached = rows["fxfreeze+cache"]
    assert cached["record"]["losses"] == rows["fxfreeze"]["record"]["losses"]
    assert sum(count for epoch in cached["cache"]["epochs"] for count in epoch["samples"].values()) == 40 * 8
    assert 0 < content["predicted_saving"]["uncached"] < content["predicted_saving"]["cached"] < 1


def test_compare_repeats_over_seeds_and_shows_progress(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--seeds", "2", "--rows", "fxfreeze,plain", "--out", "here", "--steps-scale", "1", "--block", "8"]
    assert main(["compare", *TINY, *arguments]) == 0
    out, err = capsys.readouterr()
    assert "±" in out
    assert "freezeout" not in out.split("\n\n")[0]
    assert all(f"{name} #{seed}" in err for name in ("plain", "fxfreeze") for seed in (0, 1))
    content = json.loads(Path("here/report.json").read_text())
    assert [list(trial["rows"]) for trial in content["trials"]] == [["plain", "fxfreeze"]] * 2
    losses = [trial["rows"]["plain"]["record"]["losses"][0] for trial in content["trials"]]
    assert losses[0] != losses[1]


def test_compare_names_its_folder_by_date() -> None:
    assert main(["compare", *TINY, *QUIET, "--rows", "plain"]) == 0
    assert [Path(name).name for name in files()] == ["report.html", "report.json"]
    assert Path(files()[0]).parts[0] == "runs"


def test_compare_finetunes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *TINY, "--block", "4", "--finetune", "--out", "here"]) == 0
    out, err = capsys.readouterr()
    assert "pretrain" in err
    assert "the same backbone frozen by hand" in out
    rows = json.loads(Path("here/report.json").read_text())["trials"][0]["rows"]
    assert list(rows) == list(FINETUNE)
    assert rows["fxfreeze+cache"]["record"]["losses"] == rows["fxfreeze"]["record"]["losses"]
    assert set(rows["fxfreeze"]["record"]["depths"]) == {4}


def test_interrupted_compare_reports_what_was_done(interrupt: Interrupt, capsys: pytest.CaptureFixture[str]) -> None:
    interrupt(30)
    before = signal.getsignal(signal.SIGINT)
    assert main(["compare", *TINY, *QUIET, "--out", "here", "--seeds", "3"]) == 130
    out, err = capsys.readouterr()
    assert "Stopping after this step" in err
    assert "nothing is concluded" in out
    assert "Stopped during seed 0" in out
    trials = json.loads(Path("here/report.json").read_text())["trials"]
    assert len(trials) == 1
    assert sum(row["steps"] for row in trials[0]["rows"].values()) == 30 - 3  # the warm-up takes three
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupted_at_once_nothing_is_left(interrupt: Interrupt, capsys: pytest.CaptureFixture[str]) -> None:
    interrupt(1)
    assert main(["compare", *TINY, *QUIET, "--out", "here"]) == 130
    assert "nothing to report" in capsys.readouterr().err
    assert not Path("here").exists()


def test_a_second_interrupt_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def press_twice(run: Run) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still here")

    monkeypatch.setattr(Run, "_step", press_twice)
    assert main(["compare", *TINY, *QUIET, "--out", "here"]) == 130
    assert not Path("here").exists()


def test_a_report_that_cannot_be_written_still_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxfreeze.page.write", full)
    assert main(["compare", *TINY, *QUIET, "--rows", "plain", "--out", "here"]) == 2
    out, err = capsys.readouterr()
    assert "│ plain" in out
    assert err == "fxfreeze compare: error: the report can't be written to here: No space left on device\n"


def test_ctrl_c_in_a_process_of_its_own(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fxfreeze", "compare", *TINY, "--epochs", "2000", "--out", "here"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert "step" in first
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "nothing is concluded" in out
    assert sorted(path.name for path in (tmp_path / "here").iterdir()) == ["report.html", "report.json"]


# ---- train


def weights(path: str) -> dict[str, Tensor]:
    return checkpoint.load(Path(path))[0]["model"]  # type: ignore[no-any-return]


def test_training_goes_on_where_it_was(interrupt: Interrupt, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, *QUIET, "--save", "whole.pt", "--lr", "0.03"]) == 0
    assert "test accuracy" in capsys.readouterr().out
    interrupt(17)
    assert main(["train", *TINY, *QUIET, "--save", "part.pt", "--lr", "0.03"]) == 130
    stopped = "Stopped after step 17 of 40; go on with: fxfreeze train --resume part.pt --save part.pt."
    assert stopped in capsys.readouterr().out
    assert checkpoint.load(Path("part.pt"))[0]["step"] == 17
    assert main(["train", *QUIET, "--resume", "part.pt", "--save", "part.pt"]) == 0
    recent, all_of_them = capsys.readouterr().out.splitlines()[-2:]
    assert re.match(r"fxfreeze, last 20 steps: loss +[\d.]+ .* ms/step", recent)
    assert re.match(r"23 steps in [\d.]+ s, [\d.]+ ms/step in the mean \(freeze events", all_of_them)
    whole, resumed = weights("whole.pt"), weights("part.pt")
    assert all(torch.equal(tensor, resumed[key]) for key, tensor in whole.items())


def diverging(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """From that step on the loss of every run is not finite."""
    original = Run._step

    def step(run: Run) -> Tensor:
        loss = original(run)
        return loss if run.step < after else loss * float("nan")

    monkeypatch.setattr(Run, "_step", step)


def test_a_training_that_diverged_says_so_and_fails(
    monkeypatch: pytest.MonkeyPatch, interrupt: Interrupt, capsys: pytest.CaptureFixture[str]
) -> None:
    diverging(monkeypatch, after=13)
    said = "plain diverged: its loss is not a finite number since step 13; try a lower --lr.\n"
    assert main(["train", *TINY, *QUIET, "--row", "plain"]) == 1
    out, err = capsys.readouterr()
    assert "test accuracy" in out
    assert err == said
    interrupt(7)
    assert main(["train", *TINY, *QUIET, "--row", "plain", "--save", "run.pt"]) == 130
    capsys.readouterr()
    assert main(["train", *QUIET, "--resume", "run.pt"]) == 1
    assert capsys.readouterr().err == said


def test_a_comparison_with_a_row_that_diverged_fails_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    diverging(monkeypatch, after=13)
    assert main(["compare", *TINY, *QUIET, "--rows", "plain", "--out", "here"]) == 1
    assert "plain diverged (seed 0): its loss is not a finite number since step 13; try" in capsys.readouterr().out
    assert Path("here/report.html").exists()


def test_each_epoch_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda path, run, about: saved.append(run["step"]))
    assert main(["train", *TINY, *QUIET, "--save", "run.pt", "--row", "plain", "--epochs", "3"]) == 0
    assert saved == [12, 20, 30]  # ten steps an epoch, seen at the ends of blocks of four


def test_a_finished_run_has_nothing_left_to_train(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, *QUIET, "--row", "plain", "--save", "run.pt"]) == 0
    capsys.readouterr()
    assert main(["train", *QUIET, "--resume", "run.pt"]) == 0
    assert capsys.readouterr().out == "This run has taken all of its 20 steps: nothing is left to train.\n"


def test_a_checkpoint_loads_into_the_bare_network() -> None:
    assert main(["train", *TINY, *QUIET, "--save", "run.pt"]) == 0
    Tiny().load_state_dict(weights("run.pt"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--lr", "0.5"], "--lr 0.5: the checkpoint's run has 0.1"),
        (["--row", "freezeout"], "--row freezeout: the checkpoint's run has fxfreeze"),
        (["--batch-size", "4"], "--batch-size 4: the checkpoint's run has 8"),
    ],
)
def test_a_run_goes_on_as_what_it_was(option: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, *QUIET, "--save", "run.pt"]) == 0
    capsys.readouterr()
    assert main(["train", *QUIET, "--resume", "run.pt", *option]) == 2
    assert message in one_line(capsys)
    assert main(["train", *QUIET, "--resume", "run.pt", "--lr", "0.1"]) == 0


# ---- what can't be traced, and an early Ctrl-C


@pytest.mark.parametrize("verb", ["compare", "train", "plan", "profile"])
def test_a_network_that_can_t_be_traced_gets_one_line(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--data", "tiny:data", "--model", "tiny:Branchy"]) == 2
    line = one_line(capsys)
    assert line.startswith(f"fxfreeze {verb}: error: the network can't be frozen: Branchy.forward can't be traced at ")
    assert "Python looks at a value that depends on the data" in line
    assert files() == []


@pytest.mark.parametrize("verb", ["compare", "train", "plan", "profile"])
def test_ctrl_c_before_anything_ran(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def press(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxfreeze.cli.prepare", press)
    assert main([verb, *TINY[:4]]) == 130
    assert one_line(capsys) == f"fxfreeze {verb}: stopped\n"


# ---- plan


def test_plan_prints_a_table_and_draws_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--out", "here"]) == 0
    out, _ = capsys.readouterr()
    assert all(unit in out for unit in ("stem.0", "block1.0", "block2.0", "block3.0", "fc"))
    assert "Picture: here/plan.svg" in out
    said = " ".join(out.split())
    assert "of the FLOPs of 40 steps of plain training" in said
    share = float(re.search(r"predicted saving: ([0-9.]+)%", said)[1]) / 100  # type: ignore[index]
    assert f"costs {2 * (1 - share):.2f}x of the 20 steps of plain training" in said
    assert Path("here/plan.svg").read_text().rstrip().endswith("</svg>")
    assert files() == ["here/plan.svg"]


@pytest.mark.filterwarnings("ignore:backend 'triton' has no kernels for cpu here")
def test_plan_shows_the_graph_before_and_after(capsys: pytest.CaptureFixture[str]) -> None:
    """At a depth within a dense block: concatenations before, slices of a buffer and kernels after, and why not more."""
    dense = ["--model", "densenet-bc-8-16", "--data", "tiny:data", "--batch-size", "8"]
    assert main(["plan", *dense, "--show-graph", "--depth", "3", "--backend", "triton"]) == 0
    out = capsys.readouterr().out
    before, after = out.split("after the passes of backend 'triton':")
    assert before.startswith("before the passes, units 1 to 3:")
    assert "= cat(" in before
    assert "= BatchNorm2d(" in before
    assert "= cat(" not in after
    for call in ("conv1x1", "conv3x3", "room", "joined"):
        assert f"= {call}(" in after
    assert "dense_buffer: 2 made a slice of a buffer" in after
    assert files() == []


def test_plan_shows_the_graph_of_another_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--show-graph"]) == 0
    out = capsys.readouterr().out
    assert "after the passes of backend 'library':" in out
    assert "units 1 to" in out


@pytest.mark.parametrize("depth", ["0", "99"])
def test_plan_has_no_such_depth(depth: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *TINY, "--show-graph", "--depth", depth]) == 2
    assert f"depth {depth} is not within 1 to" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cifar10", "CIFAR100"])
def test_a_plan_needs_no_files(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Of CIFAR it takes the shapes and the number of images alone; whatever trains needs the images."""
    choice = ["--model", "resnet-8", "--data", name, "--data-root", "absent"]
    assert main(["plan", *choice, "--out", "here"]) == 0
    assert "the 16,872 steps of plain training" in capsys.readouterr().out  # 24 epochs of 45,000 // 64
    assert main(["plan", *choice, "--show-graph", "--backend", "plain"]) == 0
    capsys.readouterr()
    assert main(["train", *choice]) == 2
    assert "no file" in one_line(capsys)


# ---- profile


def test_profile_prints_a_table_and_writes_what_was_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["--json", "p.json", "--plot", "p.svg", "--trace", "t.json"]
    assert main(["profile", *PROFILED, "--rounds", "2", "--depths", "3,1", *names]) == 0
    out, _ = capsys.readouterr()
    first, *deeper = [line.split() for line in out.splitlines() if re.match(r" +\d", line)]
    assert [first[0], *(row[:2] for row in deeper)] == ["0", ["1", "stem.0"], ["3", "block2.0"]]
    assert all(float(data) > 0 for data in (first[1], deeper[0][2], deeper[1][2]))  # batches are fetched
    assert "The largest disagreement" in out
    assert out.endswith("Figures: p.json\nPicture: p.svg\nTrace, for ui.perfetto.dev: t.json\n")
    assert files() == ["p.json", "p.svg", "t.json"]
    profiled = json.loads(Path("p.json").read_text())
    assert [each["depth"] for each in profiled["iterations"]] == [0, 1, 3]
    assert (profiled["rounds"], profiled["batch"], profiled["fetched"]) == (2, 8, True)
    assert Path("p.svg").read_text().rstrip().endswith("</svg>")
    assert {"stem.0", "prefix 0-3"} <= {
        event["name"] for event in json.loads(Path("t.json").read_text())["traceEvents"]
    }


def test_profile_alone_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", *PROFILED, "--rounds", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "block3.0" in out
    assert files() == []


def test_profile_takes_networks_with_auxiliary_outputs_in_training(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = Tiny.forward
    monkeypatch.setattr(Tiny, "forward", lambda net, x: (forward(net, x), x) if net.training else forward(net, x))
    assert main(["profile", *PROFILED, "--rounds", "1", "--depths", "2"]) == 0
    assert "block1.0" in capsys.readouterr().out


def test_a_failure_while_profiling_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ValueError("a defect, not a refusal")

    monkeypatch.setattr("fxfreeze.profiling._turns", broken)
    with pytest.raises(ValueError, match="a defect"):
        main(["profile", *PROFILED])
