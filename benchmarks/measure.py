"""What every benchmark measures with: this machine's GEMM rate, FLOPs and peak memory; and the file of the results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

RESULTS = Path(__file__).parent / "results"
ATTENTION_OPS = ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward")


def parser(doc: str, smoke: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; `smoke` says what its quick run leaves out."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--smoke", action="store_true", help=smoke)
    made.add_argument("--out", type=Path, help="folder for the JSON (default: benchmarks/results)")
    return made


def machine() -> dict[str, Any]:
    """Where and under what load a run happened. `load` is the 1-minute load average, other programs included."""
    with open("/proc/cpuinfo", encoding="utf-8") as f:
        names = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load": round(os.getloadavg()[0], 2),
        "time": time.strftime("%Y-%m-%d %H:%M"),
    }


def gemm_rate(size: int = 2048) -> float:
    """FLOP/s of one fp32 matrix product of this size: what a step could reach at best."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    torch.mm(a, b)
    started = time.perf_counter()
    for _ in range(3):
        torch.mm(a, b)
    return 3 * 2 * size**3 / (time.perf_counter() - started)


def timed(function: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def in_turn(sides: dict[str, Callable[[int], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every call, A B A B ..., so that a change of the machine's load falls on both.

    Each side is called with the number of the repeat.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name, function in sides.items():
            seconds[name].append(timed(partial(function, repeat)))
    return seconds


def profile(step: Callable[[], Any], largest: int = 8) -> dict[str, float]:
    """Share of a step's CPU time spent in each of its largest operators themselves (torch.profiler)."""
    with torch.profiler.profile() as recorded:
        step()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: round(event.self_cpu_time_total / total, 3) for event in events[:largest]}


def median(values) -> float:
    return statistics.median(values)


def _attention_flops(query, key, value, dropout=0.0, is_causal=False, *args, products=2, **kwargs) -> int:
    batch, heads, rows, width = query
    seen = rows * (rows + 1) // 2 if is_causal else rows * key[2]  # the kernel skips what lies above the diagonal
    return products * 2 * batch * heads * seen * width


def _attention_backward_flops(grad, query, key, value, out, logsumexp, dropout=0.0, is_causal=False, **kwargs) -> int:
    return _attention_flops(query, key, value, dropout, is_causal, products=5)


# torch's registry has CUDA's attention kernels only: on a CPU it would count no attention at all.
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def count_flops(step: Callable[[], Any]) -> dict[str, int]:
    """FLOPs of a step by part: attention (scores and values), lm_head, vision, rest (the linear layers), total.

    Matrix products are counted by torch.utils.flop_counter, CPU attention by `CPU_ATTENTION`: 2 products of
    queries and keys forward and 5 backward, halved where the kernel is told that it is causal.
    """
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        step()
    counts, total = counter.get_flop_counts(), counter.get_total_flops()
    head = sum(_of_module(counts, "lm_head").values())
    tower = _of_module(counts, "vision_tower")
    vision = sum(tower.values())
    attention = _of_attention(counts["Global"]) - _of_attention(tower)
    rest = total - attention - head - vision
    return {"attention": attention, "lm_head": head, "vision": vision, "rest": rest, "total": total}


def _of_module(counts, name: str) -> dict:
    return next((ops for module, ops in counts.items() if module.split(".")[-1] == name), {})


def _of_attention(ops) -> int:
    return sum(flops for op, flops in ops.items() if str(op).split(".")[-1] in ATTENTION_OPS)


@contextmanager
def peak_memory() -> Iterator[dict[str, int]]:
    """Bytes of resident memory (Linux): before, at the peak inside the context, and the difference `over_load`.

    The kernel's high-water mark (VmHWM) is reset on entry, so what loading took before does not count.
    """
    Path("/proc/self/clear_refs").write_text("5")
    out = {"before": _status("VmRSS")}
    yield out
    out["peak"] = _status("VmHWM")
    out["over_load"] = out["peak"] - out["before"]


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}: peak memory is measured on Linux only")


def save(name: str, result: dict[str, Any], folder: Path | None = None) -> Path:
    """Writes <folder>/<name>.json with the command and the machine, and returns its path."""
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    command = "python " + " ".join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"command": command, "machine": machine(), **result}, indent=1) + "\n")
    return path


def table(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table with padded columns: readable in a terminal and in the docs."""
    cells = [[_cell(value) for value in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
