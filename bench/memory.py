"""What a call takes from torch's allocator: on CUDA by the allocator's own count, on a CPU by the profiler's events.

Left out is what libraries take for themselves: oneDNN's and cuDNN's scratch space, OpenVINO's tensors.
"""

from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile


class Growth(NamedTuple):
    """Bytes above what was held before a call. peak: at its height; kept: when it returned, its result alive."""

    peak: int
    kept: int


def growth(run: Callable[[], object], device: torch.device) -> Growth:
    """Of one call. Run it once before: what is made once is not what a call takes."""
    if device.type == "cuda":
        return _on_cuda(run, device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    found = height(_allocations(profiler.profiler.kineto_results.experimental_event_tree()))
    del kept
    return found


def height(allocations: Iterable[tuple[int, int]]) -> Growth:
    """Of (time, bytes taken, or given back as a negative number), in any order."""
    held = peak = 0
    for _, taken in sorted(allocations, key=itemgetter(0)):
        held += taken
        peak = max(peak, held)
    return Growth(peak, held)


def _on_cuda(run: Callable[[], object], device: torch.device) -> Growth:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = run()
    after = torch.cuda.memory_allocated(device)
    del kept
    return Growth(torch.cuda.max_memory_allocated(device) - before, after - before)


def _allocations(events: Iterable[Any]) -> Iterator[tuple[int, int]]:
    for event in events:
        if event.tag.name == "Allocation":
            yield event.start_time_ns, event.extra_fields.alloc_size
        yield from _allocations(event.children)
