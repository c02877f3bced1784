"""Time and memory, measured the same way by all benchmarks.

Peak memory: torch's own counter on a GPU; on a CPU the growth of the resident set, which needs Linux's /proc. What was
in use before does not count. A child process gives the cleaner figure: nothing freed earlier can hide what is taken.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import re
import time
from pathlib import Path


def _cuda(device):
    """torch.cuda where ``device`` is one, else None: measuring a CPU alone does not load torch."""
    if not str(device).startswith("cuda"):
        return None
    import torch

    return torch.cuda


def synchronize(device):
    if cuda := _cuda(device):
        cuda.synchronize()


def seconds(run, device="cpu"):
    """Wall time of one call, the device's work included."""
    synchronize(device)
    begin = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - begin


def _kernel_megabytes(file, field):
    return int(re.search(rf"{field}:\s+(\d+)", Path("/proc", file).read_text(encoding="ascii"))[1]) / 1024


def available_megabytes(device="cpu"):
    if cuda := _cuda(device):
        return cuda.mem_get_info()[0] / 2**20
    return _kernel_megabytes("meminfo", "MemAvailable")


def resident_megabytes():
    """What this process holds now: its own memory, and pages of mapped files that the kernel may drop."""
    return {
        kind: _kernel_megabytes("self/status", field) for kind, field in (("own", "RssAnon"), ("mapped", "RssFile"))
    }


class Usage:
    """Most memory beyond what was in use at ``start``, in megabytes, and on a CPU the processor time since then."""

    def __init__(self, device="cpu"):
        self.cuda = _cuda(device)

    def start(self):
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
            self.before = self.cuda.memory_allocated() / 2**20
            return
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the high-water mark so far
        self.before = _kernel_megabytes("self/status", "VmRSS")
        self.cpu = time.process_time()

    def stop(self):
        if self.cuda:
            return {"peak MB": self.cuda.max_memory_allocated() / 2**20 - self.before}
        megabytes = _kernel_megabytes("self/status", "VmHWM") - self.before
        return {"peak MB": megabytes, "cpu s": time.process_time() - self.cpu}


def _in_child(step, arguments, make, warm, shape, results):
    step(*arguments, make(*warm))  # libraries that load on first use do not count
    inputs, usage = make(*shape), Usage()
    usage.start()
    step(*arguments, inputs)
    results.put(usage.stop()["peak MB"])


def peak_megabytes(step, arguments, make, warm, shape, inputs=None):
    """Of ``step(*arguments, inputs)``. On a CPU a fresh process makes the inputs itself, ``make(*shape)``.

    ``warm``: a small shape of the same kind, which that process runs first.
    """
    if shape[0] == "cuda":
        usage = Usage("cuda")
        usage.start()
        step(*arguments, inputs)
        return usage.stop()["peak MB"]
    context = multiprocessing.get_context("spawn")  # a forked child would inherit this process's high-water mark
    results = context.Queue()
    child = context.Process(target=_in_child, args=(step, arguments, make, warm, shape, results))
    child.start()
    megabytes = results.get(timeout=600)
    child.join()
    return megabytes
