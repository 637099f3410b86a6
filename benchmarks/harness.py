"""What the benchmarks share: clocks, interleaving, statistics, facts about the machine, and results files."""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import date
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parent / "results"
LIBRARIES = ("numpy", "torch", "triton", "transformers", "liger-kernel", "flash-attn", "llama-cpp-python")
ENOUGH = 7  # values, at least, for a tenth percentile that is not the minimum


class NotHere(ValueError):
    """A requested name is unknown, or unavailable on this machine."""


def known(kind: str, names: Iterable[str], there: Iterable[str]) -> None:
    """Check that `there` contains every name.

    Raises:
        NotHere: it does not; the message lists it.
    """
    there = list(there)
    for name in names:
        if name not in there:
            near = get_close_matches(name, there, 1)
            perhaps = f"; did you mean {near[0]}? Choose" if near else "; choose"
            raise NotHere(f"unknown {kind} {name!r}{perhaps} from {', '.join(there)}")


def device_for(asked: str) -> "torch.device":
    """The device of that name, made current if it is a GPU; "auto" is a GPU if there is one.

    Raises:
        NotHere: there is no such device.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = ("cuda" if count else "cpu") if asked == "auto" else asked
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", name)
    if not found:
        raise NotHere(f"unknown device {asked!r}; choose from auto, cpu, cuda, cuda:1, cuda:2 ...")
    if name == "cpu":
        return torch.device("cpu")
    if not count:
        raise NotHere(f"--device {asked} needs a GPU, and PyTorch finds none")
    if int(found[1] or 0) >= count:
        raise NotHere(f"there is no device {asked!r}; choose from {', '.join(f'cuda:{i}' for i in range(count))}")
    device = torch.device(name)
    torch.cuda.set_device(device)
    return device


class Clock:
    """Times a call on a CPU, in seconds."""

    graphs = False  # whether `repeated` removes the launch overhead

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now

    def __call__(self, call: Callable[[], object], before: Callable[[], object] = lambda: None) -> float:
        """Seconds that `call` takes; `before` runs first and is not counted."""
        before()
        start = self._now()
        call()
        return self._now() - start

    def repeated(self, call: Callable[[], object], times: int) -> Callable[[], object] | None:
        """`call`, repeated in one launch; None if it cannot be recorded."""
        return lambda: [call() for _ in range(times)]


class CudaClock(Clock):
    """Times a call on a GPU, between two events on its stream.

    A pause precedes the first event. While the GPU sleeps, the host gets ahead, so that all kernels of a call are
    queued when it starts, and host time is not counted. It is if the host takes longer than the pause, or if the call
    synchronises with the GPU.
    """

    graphs = True
    PAUSE = 400_000  # cycles, about 0.2 ms: longer than the host takes to launch anything measured here

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

    def repeated(self, call: Callable[[], object], times: int) -> Callable[[], object] | None:
        """A CUDA graph of `call`, repeated, which costs one launch to replay. None if `call` synchronises with the GPU:
        that aborts a capture, and what runs after an aborted capture cannot be trusted."""
        import torch

        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # what the first calls set up must not be set up in a capture
            for _ in range(3):
                call()
            before = torch.cuda.get_sync_debug_mode()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it is a prototype
                torch.cuda.set_sync_debug_mode("error")
            try:
                call()
            except RuntimeError:
                return None
            finally:
                torch.cuda.set_sync_debug_mode(before)
                torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            for _ in range(times):
                call()
        return graph.replay


def clock(device: "torch.device") -> Clock:
    return CudaClock() if device.type == "cuda" else Clock()


class Limits(NamedTuple):
    """The machine's peak rates, per second: bytes moved, and operations of a matrix product."""

    bandwidth: float
    rate: float

    def floor(self, demands: tuple[float, float]) -> tuple[float, str]:
        """The least seconds that this takes, and what bounds it."""
        return max((demands[0] / self.bandwidth, "memory"), (demands[1] / self.rate, "arithmetic"))


def reading(device: "torch.device", clock: Clock) -> Callable[[], float]:
    """A function that measures reading, in bytes/s: a sum over 1 GiB (CPU: 256 MiB), more than any cache."""
    import torch

    words = torch.zeros(2**28 if device.type == "cuda" else 2**26, device=device)
    return _rate(clock, words.sum, words.nbytes)


def copying(device: "torch.device", clock: Clock) -> Callable[[], float]:
    """A function that measures copying 512 MiB (CPU: 128 MiB), in bytes/s read and written."""
    import torch

    source = torch.ones(2**29 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _rate(clock, lambda: target.copy_(source), 2 * source.nbytes)


def multiplying(device: "torch.device", dtype: "torch.dtype", clock: Clock) -> Callable[[], float]:
    """A function that measures the FLOP/s of a square matrix product."""
    import torch

    size = 8192 if device.type == "cuda" else 1024
    left, right = torch.randn(2, size, size, device=device).to(dtype)
    return _rate(clock, lambda: left @ right, 2 * size**3)


def _rate(clock: Clock, call: Callable[[], object], amount: float) -> Callable[[], float]:
    call()
    return lambda: amount / clock(call)


def take_turns(rivals: Mapping[str, Callable[[], float]], runs: int) -> dict[str, list[float]]:
    """Measure each rival `runs` times, interleaved, so that all run under the same conditions.

    Every other round runs in reverse, because the first one pays for what the last one left behind.
    """
    measured: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(runs):
        for name, measure in list(rivals.items())[:: -1 if turn % 2 else 1]:
            measured[name].append(measure())
    return measured


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median, the 10th and 90th percentiles (below ENOUGH values, the extremes), and the minimum."""
    ordered = sorted(values)
    tenth = round(0.1 * (len(ordered) - 1))
    return {"median": statistics.median(ordered), "p10": ordered[tenth], "p90": ordered[-1 - tenth], "best": ordered[0]}


def between(runs: int) -> tuple[str, str]:
    """What `spread` returns as "p10" and "p90" for this many values."""
    return ("p10", "p90") if runs >= ENOUGH else ("min", "max")


def digits(value: float, count: int = 5) -> float:
    """Round to `count` significant digits."""
    return float(f"{value:.{count}g}")


def plural(count: int, noun: str) -> str:
    """ "1 shape", "2 shapes"."""
    return f"{count} {noun}" + "s" * (count != 1)


def row(what: str, unit: str, measured: dict[str, list[float]], best: Callable = min, **more: object) -> dict:
    """Best and median of each rival, and the ratio of the first one's to the last one's."""
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
    """Peak resident memory, in bytes, of a process that runs `command`."""
    # Through a small intermediate process: a child's peak includes the memory of the process that it was forked from.
    measure = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], capture_output=True, check=True);"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    out = subprocess.run([sys.executable, "-c", measure, *command], capture_output=True, text=True, check=True)
    return int(out.stdout) * (1 if sys.platform == "darwin" else 1024)


def device() -> str:
    """The CPU's name, cores and AVX-512."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    avx512 = any("avx512f" in line for line in lines)
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores" + ", AVX-512" * avx512


def slug(name: str) -> str:
    """A device's name as a folder name: "NVIDIA H100 80GB HBM3" is h100, "AMD EPYC, 2 cores, AVX-512" epyc-2-cores."""
    name, _, cores = re.sub(r"\((R|TM|C)\)|\b\d+th gen\b", "", name, flags=re.IGNORECASE).partition(",")
    words = re.findall(r"[a-z0-9.]+", re.sub(r"\b(i\d)-", r"\1 ", name.lower()))
    words = [word for word in words if word not in ("nvidia", "amd", "intel", "geforce", "cpu", "processor")]
    places = [place for place, word in enumerate(words) if re.search(r"\d{3}|[a-z]\d", word)]
    places = [place for place in places if not re.fullmatch(r"i\d|\d+gb|.*ghz", words[place])]
    model = places[0] if places else len(words) - 1
    form = [word for word in words[model + 1 :] if re.match(r"pcie|sxm|nvl", word)]
    count = re.match(r"\s*(\d+) cores", cores)
    return "-".join([*(words[: model + 1] or ["device"]), *form, *([count[1], "cores"] if count else [])])


def header(command: str, gpu: bool = False, **more: Any) -> dict[str, Any]:
    """The first line of a results file: what was run, when, and on what. `gpu`: the current GPU, not the CPU.

    Clock rates are read now, so call this while or right after something runs.
    """
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
    """The driver version and the current clocks as text; None without nvidia-smi."""
    import torch

    # nvidia-smi numbers all GPUs, PyTorch those in CUDA_VISIBLE_DEVICES; both know the UUID
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", None)
    which = f"GPU-{uuid}" if uuid else str(index)
    asked = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    command = ["nvidia-smi", f"--id={which}", f"--query-gpu={asked}", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        driver, now, most, memory, power = (part.strip() for part in out.strip().split(","))
    except (OSError, subprocess.CalledProcessError, ValueError):
        return {"driver": None, "clocks": None}
    return {"driver": driver, "clocks": f"SM {now} of {most}, memory {memory}, limit {power}"}


@contextmanager
def lines_to(path: Path | None, what: str, header: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a function that writes a row to the file at once, so that an interrupted run keeps its rows.

    A path that is a folder, or has no suffix, means <device>/<what>.jsonl in it; None writes nothing.
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
    """The header and the rows of a results file.

    Raises:
        ValueError: it is not a results file.
        OSError: it cannot be read.
    """
    try:
        first, *rows = [json.loads(line) for line in path.read_text().splitlines()]
        first["command"], first["device"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a results file: JSON lines, the first of them a header") from error
    return first, rows


def write(path: Path, module: str, model: str, rows: list[dict]) -> None:
    """Print the rows and save them, with what is needed to reproduce them."""
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
