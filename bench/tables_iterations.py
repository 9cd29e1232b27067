"""Training iterations: what each technique adds at half depth, and all ways at every depth."""

from bench.markdown import Bench, Results, machine, mebibytes, median, milliseconds, rows_of, spread, table

TECHNIQUES = {
    "plain": "plain training, nothing frozen",
    "eager": "eager: frozen units in eval, at a learning rate of zero",
    "no tape": "no tape: without gradients, as the published FreezeOut",
    "fold": "fold: cut out, batch norms folded, weights laid out once (`plain`)",
    "library": "library: activations and sums within the convolutions (`library`)",
    "auto": "auto: the backend that was fastest (`auto`)",
    "cache": "cache: the frozen outputs as rows in memory (`CachedLoader`)",
}
TECHNIQUES_LEGEND = """{machine}; {spread}; `eager` against the same code again: {noise}. Milliseconds are medians, the ratio
is to `eager`, round by round. Memory is what an iteration takes at its height above what stands between iterations, and of
that what the forward keeps for the backward. The error is that of the logits against the same mathematics in float64,
relative, by norm."""
PICTURE = "![Time of an iteration by the share of units frozen, for each way of running it](docs/iterations.png)"
WAYS = (
    "plain",
    "plain, compiled",
    "freezeout",
    "requires_grad only, compiled",
    "fxfreeze",
    "fxfreeze + cache",
    "by hand",
)
WAYS_LEGEND = """{machine}; {spread}. Milliseconds of an iteration, medians; in brackets the MiB that it takes at its height.
Empty: not measured. `by hand` against the same code again: {noise}."""


def techniques(results: Results) -> str | None:
    """A row for each technique, columns for each network; None where none was measured."""
    by_network = _by(rows_of(results, "bench_technique"), "technique")
    if not by_network:
        return None
    heads = ["frozen: half of the units"]
    for name, by in by_network.items():
        heads += [f"{_subject(name, by['eager'])}: ms", "ratio", "peak / kept, MiB", "error"]
    rows = [
        [what, *(cell for by in by_network.values() for cell in _technique(by.get(name)))]
        for name, what in TECHNIQUES.items()
    ]
    benches = [bench for by in by_network.values() for bench in by.values()]
    noise = _span([by["eager, again"]["extra_info"]["ratio"] for by in by_network.values()])
    legend = TECHNIQUES_LEGEND.format(machine=machine(results), spread=spread(benches), noise=noise)
    return "\n".join([table(heads, rows), "", legend])


def _technique(bench: Bench | None) -> list[str]:
    if bench is None:
        return [""] * 4
    info = bench["extra_info"]
    memory = f"{mebibytes(info['peak_bytes'])} / {mebibytes(info['saved_bytes'])}"
    return [milliseconds(bench), f"{info['ratio']:.2f}", memory, f"{info['relative_error']:.0e}"]


def iterations(results: Results) -> str | None:
    """A row for each network and depth, a column for each way; None where memory was not measured with them."""
    benches = [b for b in rows_of(results, "bench_iteration") if "peak_bytes" in b["extra_info"]]
    by_group = {
        (name, share): by
        for share in sorted({b["params"]["share"] for b in benches})
        for name, by in _by([b for b in benches if b["params"]["share"] == share], "contender").items()
    }
    if not by_group:
        return None
    rows = [
        [_subject(name, by["plain"]), f"{share:.0%}", *(_way(by.get(way)) for way in WAYS)]
        for (name, share), by in sorted(by_group.items(), key=lambda item: item[0])
    ]
    again = [by["by hand, again"]["extra_info"]["ratio"] for by in by_group.values() if "by hand, again" in by]
    legend = WAYS_LEGEND.format(machine=machine(results), spread=spread(benches), noise=_span(again))
    picture = [PICTURE, ""] if curves(results) else []
    return "\n".join([*picture, table(["network", "frozen", *WAYS], rows), "", legend])


def _way(bench: Bench | None) -> str:
    return "" if bench is None else f"{milliseconds(bench)} ({mebibytes(bench['extra_info']['peak_bytes'])})"


def _by(benches: list[Bench], parameter: str) -> dict[str, dict[str, Bench]]:
    """Rows by network, and by one more parameter."""
    found: dict[str, dict[str, Bench]] = {}
    for bench in benches:
        found.setdefault(bench["params"]["name"], {})[bench["params"][parameter]] = bench
    return found


def _subject(name: str, bench: Bench) -> str:
    batch, _, size, _ = bench["extra_info"]["shape"]
    return f"{name}, {size} px, batch {batch}"


def _span(ratios: list[float]) -> str:
    return f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "not measured"


def curves(results: Results) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By network of several depths, and way: (share frozen, time over plain training's), for the picture."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    benches = [b for b in rows_of(results, "bench_iteration") if "peak_bytes" in b["extra_info"]]
    plain = {
        (b["params"]["name"], b["params"]["share"]): median(b) for b in benches if b["params"]["contender"] == "plain"
    }
    for bench in benches:
        name, share, way = (bench["params"][key] for key in ("name", "share", "contender"))
        found.setdefault(name, {}).setdefault(way, []).append((share, median(bench) / plain[name, share]))
    return {name: ways for name, ways in found.items() if any(len(points) > 1 for points in ways.values())}
