"""What the benchmarks share: times side by side, peak memory of one call, and a labelled result file."""
import ctypes
import gc
import json
import resource
import shlex
import statistics
import sys
import threading
import time
from pathlib import Path

import torch

from laid_nb.store import hardware, versions

RESULTS = Path(__file__).parent.parent/"data"/"results"


def seconds(
    calls: dict,  # name -> function without arguments
    repeat: int = 5,  # rounds; in each round every call runs once, so that all meet the same machine
) -> dict:  # name -> median seconds
    "Median time of each call, interleaved, after one round that is not counted."
    synchronise = torch.cuda.synchronize if torch.cuda.is_available() else (lambda: None)
    times = {name: [] for name in calls}
    for round in range(repeat + 1):
        for name, call in calls.items():
            synchronise()
            start = time.perf_counter()
            call()
            synchronise()
            if round > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def _resident():
    "Resident memory now, in bytes."
    return int(Path("/proc/self/statm").read_text().split()[1])*resource.getpagesize()


def peak_bytes(
    call,  # function without arguments
) -> int:  # bytes over what was there before
    "Peak memory of one call, after a first one that is not counted."
    call()
    return peak_now(call)


def peak_now(
    call,  # function without arguments
) -> int:  # bytes over what was there before
    "Peak memory of one call."
    gc.collect()
    return _peak_on_gpu(call) if torch.cuda.is_available() else _peak_resident(call)


def _peak_on_gpu(call):
    "CUDA's own count."
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def _peak_resident(call):
    "Resident memory (Linux), sampled every millisecond."
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that using it again counts
    before, seen, done = _resident(), [], threading.Event()

    def sample():
        while not done.is_set():
            seen.append(_resident())
            time.sleep(.001)
    watcher = threading.Thread(target=sample)
    watcher.start()
    call()
    done.set()
    watcher.join()
    return max(seen) - before


def write(
    name: str,  # of the file, data/results/NAME.json
    rows: list[dict],  # what was measured
    **more,  # other facts, such as the seed
) -> Path:
    "Results with the command, versions and hardware that made them."
    path = RESULTS/f"{name}.json"
    made = dict(command=shlex.join(["python", *sys.argv]),
                finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                versions=versions(), hardware=hardware())
    path.write_text(json.dumps(dict(made, **more, rows=rows), indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return path


def table(
    rows: list[dict],  # the same keys in each
) -> str:
    "Rows under their keys, for a terminal."
    text = lambda x: f"{x:.3g}" if isinstance(x, float) else str(x)
    lines = [list(rows[0])] + [[text(x) for x in row.values()] for row in rows]
    width = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(x.rjust(w) for x, w in zip(line, width)) for line in lines)
