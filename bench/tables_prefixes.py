"""Whole frozen prefixes: by hand, by backend, and how ``auto`` compares."""

import statistics

from bench.markdown import Bench, Results, machine, median, milliseconds, rows_of, table

BY_HAND = ("eager", "fx fuse", "Inductor", "OpenVINO")
OURS = ("plain", "library", "inductor", "openvino", "auto")
LEGEND = """{machine}. Milliseconds, medians; in brackets the seconds of building, with the first call; `auto` names what it
chose, and built all of the others. The ratio is of `auto` to the fastest of the four that a user could write by hand, round by
round; of eager to the same code again: {noise}. Geometric mean of the ratios: {mean}."""


def prefixes(results: Results) -> str | None:
    """A row for each network and dtype at full depth of which ``auto`` was measured; None without one."""
    rows: dict[str, dict[str, Bench]] = {}
    for bench in rows_of(results, "bench_prefix"):
        if bench["params"]["share"] == 1.0:
            _, _, size, _ = bench["extra_info"]["shape"]
            network = f"{bench['params']['name']}, {size} px, {bench['extra_info']['dtype']}"
            rows.setdefault(network, {})[bench["params"]["contender"]] = bench
    rows = {network: by for network, by in rows.items() if "auto" in by}
    if not rows:
        return None
    heads = ["network", *BY_HAND, *(f"`{name}`" for name in OURS), "ratio"]
    cells = [
        [network, *(_time(by.get(name)) for name in (*BY_HAND, *OURS)), f"{by['auto']['extra_info']['ratio']:.2f}"]
        for network, by in rows.items()
    ]
    ratios = [by["auto"]["extra_info"]["ratio"] for by in rows.values()]
    noise = [median(by["eager, again"]) / median(by["eager"]) for by in rows.values()]
    span, mean = f"{min(noise):.2f} to {max(noise):.2f}", f"{statistics.geometric_mean(ratios):.2f}"
    return "\n".join([table(heads, cells), "", LEGEND.format(machine=machine(results), noise=span, mean=mean)])


def _time(bench: Bench | None) -> str:
    if bench is None:
        return ""
    chosen = bench["extra_info"]["chosen"]
    by = f" {chosen}" if bench["params"]["contender"] == "auto" else ""
    return f"{milliseconds(bench)}{by} ({bench['extra_info']['build_seconds']:.1f})"
