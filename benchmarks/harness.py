"""What the benchmarks share: turns, best and median, the machine, and the file that keeps it all."""

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def take_turns(rivals: Mapping[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """What each rival measured, `runs` times. They take turns, so that all have the same weather.

    Every other turn goes backwards: who is first pays for what the last one left behind.
    """
    measured: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(runs):
        for name, measure in list(rivals.items())[:: -1 if turn % 2 else 1]:
            measured[name].append(measure())
    return measured


def row(what: str, unit: str, measured: Mapping[str, list[float]], best: Callable = min, **more: object) -> dict:
    """Best and median of each rival, and the first one's over the last one's."""
    bests = {name: best(values) for name, values in measured.items()}
    medians = {name: statistics.median(values) for name, values in measured.items()}
    first, last = next(iter(measured)), next(reversed(measured))
    return {
        "what": what,
        "unit": unit,
        **more,
        "runs": len(measured[first]),
        "best": {name: round(value, 4) for name, value in bests.items()},
        "median": {name: round(value, 4) for name, value in medians.items()},
        "ratio_of_bests": round(bests[first] / bests[last], 3),
        "ratio_of_medians": round(medians[first] / medians[last], 3),
    }


def peak_memory(command: list[str]) -> int:
    """Bytes: the largest resident memory of a process that runs `command`."""
    # From a small process in between: a child counts the memory of the process it was forked from as its own.
    measure = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], capture_output=True, check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    out = subprocess.run([sys.executable, "-c", measure, *command], capture_output=True, text=True, check=True)
    return int(out.stdout) * (1 if sys.platform == "darwin" else 1024)


def device() -> str:
    """The processor, in words."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    avx512 = any("avx512f" in line for line in lines)
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores" + ", AVX-512" * avx512


def write(path: Path, module: str, model: str, rows: list[dict]) -> None:
    """Print the rows and keep them, with what is needed to measure them again."""
    for one in rows:
        print("  ".join(f"{key}={value}" for key, value in one.items()))
    libraries = ("numpy", "torch", "transformers")
    record = {
        "command": " ".join([f"python -m benchmarks.{module}", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "device": device(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in libraries},
        "model": model,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")
