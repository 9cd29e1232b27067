"""From how many reads on storing pays, and what a cached epoch costs."""

from bench.markdown import Bench, Results, machine, median, rows_of, table

LIVE = "live half alone, tensors in memory"
LEGEND = """{machine}, fp32, ResNet-18 at 64 px, batch 32. With half of it frozen, a cached epoch takes {ram:.2f} times
(from RAM) and {disk:.2f} times (from disk) one that trains the live half alone on tensors in memory, where computing the
frozen half takes {computed:.2f} times; that live half again: {noise:.2f}."""
UNITS, BATCH = 10, 32  # of bench_cached_epoch


def cache(results: Results) -> str | None:
    """A row for each depth; None where it was not measured."""
    by_depth: dict[int, dict[str, Bench]] = {}
    for bench in rows_of(results, "bench_break_even"):
        by_depth.setdefault(bench["params"]["depth"], {})[bench["params"]["what"]] = bench
    epochs = {bench["params"]["contender"]: bench["extra_info"]["ratio"] for bench in rows_of(results, "bench_epoch")}
    if not by_depth or not epochs:
        return None
    heads = ["units frozen", "a row", "to compute", "to read", "to write", "won back after"]
    legend = LEGEND.format(
        machine=machine(results),
        ram=epochs["cached, from RAM"],
        disk=epochs["cached, from disk"],
        computed=epochs["frozen half computed"],
        noise=epochs[f"{LIVE}, again"],
    )
    return "\n".join([table(heads, [_row(depth, by) for depth, by in sorted(by_depth.items())]), "", legend])


def _row(depth: int, by: dict[str, Bench]) -> list[str]:
    info = by["compute"]["extra_info"]
    compute, read = (median(by[what]) / BATCH for what in ("compute", "read"))
    write = info["write_seconds"]
    return [
        f"{depth} of {UNITS}",
        f"{info['row_bytes'] / 1024:.0f} KiB",
        *(_microseconds(seconds) for seconds in (compute, read, write)),
        _reads(info["epochs_to_win_back"]),
    ]


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.4g} us" if seconds >= 1e-6 else "under 1 us"


def _reads(count: float) -> str:
    return f"{count:.2g} reads" if count >= 0.01 else "at once"
