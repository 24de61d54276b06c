"""How long a training step takes, and where."""

from __future__ import annotations

import functools
import gc
import statistics
from collections.abc import Callable

import torch

WARMUP, STEPS = 5, 20


def milliseconds(step: Callable[[], object], warmup: int = WARMUP, steps: int = STEPS) -> float:
    """The median of single steps, from one event to the next."""
    for _ in range(warmup):
        step()
    times = []
    for _ in range(steps):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measured(make: Callable[[], Callable[[], object]], warmup: int = WARMUP, steps: int = STEPS) -> tuple[float, float]:
    """Milliseconds of the step that is made, and the peak of the allocator in GiB, its making included."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ms = milliseconds(make(), warmup, steps)
    return ms, torch.cuda.max_memory_allocated() / 2**30


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a millisecond of a large copy, which reads and writes each."""
    from triton.testing import do_bench

    source = torch.empty(2**29, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    # Not in a graph, where the copy would be the copy engine's, which is slower.
    return 2 * source.numel() / do_bench(lambda: target.copy_(source), return_mode="median")


def kernels_of(step: Callable[[], object], steps: int = 1) -> list:
    """The profiler's sums for each kernel that ran in so many steps, the largest first; the driver's calls left out."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as trace:  # or else it warns of its cycles
        for _ in range(steps):
            step()
        torch.cuda.synchronize()
    of_device = (event for event in trace.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA)
    return sorted(of_device, key=lambda event: -event.self_device_time_total)


def print_kernels(step: Callable[[], object], count: int) -> None:
    """The launches of a step that has run before, and its ``count`` largest kernels."""
    kernels = kernels_of(step)
    total = sum(event.self_device_time_total for event in kernels) / 1000
    launches = sum(event.count for event in kernels)
    print(f"{launches} launches, {total:.1f} ms on the device:")
    for event in kernels[:count]:
        print(f"  {event.self_device_time_total / 1000:7.2f} ms {event.count:5d} x {event.key[:110]}")
