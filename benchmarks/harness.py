"""What the benchmarks share: clocks, turns, median and spread, the machine, and the files that keep it all."""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("numpy", "torch", "triton", "transformers", "liger-kernel", "flash-attn", "llama-cpp-python")


class Clock:
    """Measures a call on a CPU, in seconds."""

    graphs = False  # whether `repeated` can take the launches out of the time

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def __call__(self, call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        """Seconds of `call`; what `before` does is done by then and not counted."""
        before()
        start = self._now()
        call()
        return self._now() - start

    def repeated(self, call: Callable[[], object], times: int) -> Callable[[], object]:
        """`call`, as often, in one launch."""
        return lambda: [call() for _ in range(times)]


class CudaClock(Clock):
    """Measures a call on a GPU: between two events on its stream, so that the host's part does not count.

    A pause goes before the first event. While the GPU sleeps the host gets ahead of it, and a call of several kernels
    finds all of them waiting.
    """

    graphs = True
    PAUSE = 400_000  # cycles, some 0.2 ms: longer than the host takes to launch any of what is measured

    def __call__(self, call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        import torch

        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before()
        torch.cuda._sleep(self.PAUSE)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def repeated(self, call: Callable[[], object], times: int) -> Callable[[], object]:
        """A CUDA graph of `call`, `times` over; replaying it costs one launch."""
        import torch

        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what is set up at the first calls may not be set up in a capture
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return graph.replay


def clock(device: "torch.device") -> Clock:
    return CudaClock() if device.type == "cuda" else Clock()


def take_turns(rivals: Mapping[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """What each rival measured, `runs` times. They take turns, so that all have the same weather.

    Every other turn goes backwards: who is first pays for what the last one left behind.
    """
    measured: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(runs):
        for name, measure in list(rivals.items())[:: -1 if turn % 2 else 1]:
            measured[name].append(measure())
    return measured


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, the 10th and 90th percentile (of few values the nearest one), and the smallest."""
    ordered = sorted(values)
    tenth = round(0.1 * (len(ordered) - 1))
    return {"median": statistics.median(ordered), "p10": ordered[tenth], "p90": ordered[-1 - tenth], "best": ordered[0]}


def row(what: str, unit: str, measured: dict[str, list[float]], best: Callable = min, **more: object) -> dict:
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


def slug(name: str) -> str:
    """A device's name for a folder: "NVIDIA H100 80GB HBM3" is h100, "AMD EPYC, 2 cores, AVX-512" epyc-2-cores."""
    name, _, cores = re.sub(r"\((R|TM|C)\)", "", name, flags=re.IGNORECASE).partition(",")
    words = re.findall(r"[a-z0-9.]+", name.lower())
    words = [word for word in words if word not in ("nvidia", "amd", "intel", "geforce", "cpu", "processor", "pcie")]
    model = next((place for place, word in enumerate(words) if re.search(r"\d", word)), len(words) - 1)
    count = re.match(r"\s*(\d+) cores", cores)
    return "-".join([*(words[: model + 1] or ["device"]), *([count[1], "cores"] if count else [])])


def header(command: str, gpu: bool = False, **more: Any) -> dict[str, Any]:
    """The first line of a file of results: what was run, when, and on what. `gpu`: the current one, not the CPU."""
    facts: dict[str, Any] = {"device": device(), "driver": None, "clocks": _cpu_clock()}
    if gpu:
        import torch

        index = torch.cuda.current_device()
        facts = {"device": torch.cuda.get_device_name(index), **_nvidia(index)}
        facts["cuda"] = torch.version.cuda or torch.version.hip
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return {"command": command, "date": date.today().isoformat(), **facts, "versions": found, **more}


def _cpu_clock() -> str | None:
    info = Path("/proc/cpuinfo")
    speeds = re.findall(r"^cpu MHz\s*:\s*([\d.]+)", info.read_text(), re.MULTILINE) if info.exists() else []
    return f"{max(map(float, speeds)):.0f} MHz" if speeds else None


def _nvidia(index: int) -> dict[str, str | None]:
    """The driver, and the clocks at hand, in words; None where there is no nvidia-smi to ask."""
    asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--id={index}", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        driver, now, most, memory, power = (part.strip() for part in out.strip().split(","))
    except (OSError, subprocess.CalledProcessError, ValueError):
        return {"driver": None, "clocks": None}
    return {"driver": driver, "clocks": f"SM {now} of {most}, memory {memory}, limit {power}"}


@contextmanager
def lines_to(path: Path | None, what: str, header: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Within, what is called keeps a row in the file, at once: whoever is interrupted keeps what there was.

    A path that is a folder, or has no suffix, stands for its <device>/<what>.jsonl; None keeps nothing.
    """
    if path is None:
        yield lambda row: None
        return
    if path.is_dir() or not path.suffix:
        path = path / slug(header["device"]) / f"{what}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:

        def keep(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        keep(header)
        yield keep


def read_lines(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the rows of a file of results.

    Raises:
        ValueError: it is no such file.
        OSError: it cannot be read.
    """
    try:
        first, *rows = [json.loads(line) for line in path.read_text().splitlines()]
        first["command"], first["device"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of results: JSON lines, the first of them a header") from error
    return first, rows


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
