"""Every public kernel at Llama's shapes, against its peers and the device's limits: `llama bench kernels`.

    llama bench kernels                                    # on a GPU the whole grid, in minutes; --quick in one
    llama bench kernels --op rms_norm,swiglu --model 8b --tokens 1,4096 --dtype bfloat16 --peers eager,liger
    llama bench kernels --json --out benchmarks/results    # JSON lines, also into a file of the device's folder

Which figure to compare: norms, RoPE, SwiGLU, gemv, cross-entropy and decode attention are memory-bound: GB/s. Prefill
attention, and linear cross-entropy of many tokens, are compute-bound: TFLOP/s. A row has the one that applies. The
limit is the longer of two times: the bytes that must move over the rate of a copy, or the products over the rate of a
matrix product in the same dtype, both measured at the start of the run; `of_limit` is that time over the median. For
one token, compare microseconds. A copy writes as much as it reads, so operations that mostly read may slightly pass 1.

Method: every provider is first checked against the reference in float64, and against ours on every element; one that
disagrees is reported and not timed. Providers are interleaved. On a GPU, a call is timed between two events, after
overwriting a buffer of twice the last-level cache: `cache` is cold. Shapes so small that launching would dominate run
twenty times in a CUDA graph instead: `graph` is true, `cache` is warm, and `of_limit` counts bytes that may never have
left the cache. A provider that synchronises with the GPU cannot be captured, and is timed like large shapes. `ratio` is
a provider's median over ours, if both are timed alike: above 1, ours is faster.

Without a GPU the kernels do not run. The first provider is then our PyTorch path, the shapes are few and small, and
torch.compile, which takes seconds to compile each shape, only runs if named.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from llama.ops import check_backend

from . import harness, shapes
from .harness import Clock
from .peers import ON_GPUS, PEERS, SDPA, Inputs, error, here, inputs, outputs, providers, truth
from .shapes import Case

NO_GPU = "no GPU: the Triton kernels did not run; this is the PyTorch path"
# The largest error accepted, relative to the largest value: for sums in that dtype, not in TensorFloat-32.
AGREES = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 3e-2}
LAUNCH_BOUND = 10e-6  # seconds at the limit, below which a GPU uses a graph
IN_A_GRAPH = 20
_short = partial(harness.digits, count=4)
TURNS, SECONDS = (harness.ENOUGH, 30), 0.5  # runs per provider (least, most), and the time for all of them


Limits = Mapping[str, harness.Limits]  # by dtype


def floor(case: Case, limits: Limits) -> tuple[float, str]:
    """The least time for a case, and what bounds it: "memory" or, for matrix products, perhaps "arithmetic"."""
    work = case.flops if shapes.COSTS[case.op].products else 0
    return limits[case.dtype].floor((case.moved, work))


@torch.no_grad()
def measure_limits(dtypes: Sequence[str], device: torch.device, clock: Clock) -> Limits:
    """The best of ten copies, and of ten square matrix products.

    A dtype in which the device multiplies slower than in float32 gets float32's limit, as one may compute in that.
    """
    product = {}
    for dtype in ("float32", *dtypes):
        product[dtype] = _best(harness.multiplying(device, getattr(torch, dtype), clock))
    copy = _best(harness.copying(device, clock))
    return {dtype: harness.Limits(copy, max(product[dtype], product["float32"])) for dtype in dtypes}


def _best(rate: Callable[[], float]) -> float:
    return max(rate() for _ in range(10))


def flusher(device: torch.device) -> Callable[[], object]:
    """A function that flushes the last-level cache by overwriting twice its size.

    On a GPU at least 512 MiB: beyond the L2 that PyTorch reports, an MI300 has 256 MB shared by all of its dies.
    """
    if device.type == "cuda":
        size = max(torch.cuda.get_device_properties(device).L2_cache_size, 2**28)
    else:
        found = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
        size = 1024 * int(found.read_text().strip().removesuffix("K")) if found.exists() else 2**25
    return torch.empty(2 * size, dtype=torch.uint8, device=device).zero_


class Left(NamedTuple):
    """A provider, or a whole case, that was not timed, and why. `wrong`: its results are."""

    case: Case
    provider: str
    reason: str
    wrong: bool = False

    def words(self) -> str:
        return f"    {self.provider:15}{'WRONG' if self.wrong else 'left out'}: {self.reason}"


@torch.no_grad()
def measure(
    case: Case, calls: Mapping[str, Callable[[], Any]], given: Inputs, limits: Limits, clock: Clock,
    flush: Callable[[], object],
) -> Iterator[dict[str, Any] | Left]:  # fmt: skip
    """Yield the rows of one case, ours first. `calls` are the providers on the inputs `given`."""
    agreed, errors, right = {}, {}, truth(case, given)
    first: list[torch.Tensor] | None = None
    for name, call in calls.items():
        try:
            results = outputs(case, given, partial(_run, call))
            errors[name], apart = error(right, results), _apart(results, first)
        except Exception as refused:  # whatever a provider, its compiler or the allocator raises
            yield Left(case, name, reason(refused))
            continue
        off, allowed = errors[name], AGREES[case.dtype]
        if not (off <= allowed and apart <= 2 * allowed):
            miss = f"{off:.2g} from float64" if not off <= allowed else f"{apart:.2g} from the first provider's"
            yield Left(case, name, f"it differs by {miss}, and {allowed:g} is allowed", wrong=True)
            continue
        if first is None:
            first = [result.clone() for result in results]
        agreed[name] = call
        del results
    least, binds = floor(case, limits)
    wanted = clock.graphs and least < LAUNCH_BOUND
    turns, graphs = {}, {}
    for name, call in agreed.items():
        try:
            replay = clock.repeated(call, IN_A_GRAPH) if wanted else None
            graphs[name] = replay is not None
            before, times = ((lambda: None), IN_A_GRAPH) if replay else (flush, 1)
            turns[name] = partial(_turn, clock, replay or call, before, times)
            turns[name]()
        except Exception as refused:
            turns.pop(name, None)
            yield Left(case, name, reason(refused))
    if not turns:
        return
    once = sum((IN_A_GRAPH if graphs[name] else 1) * turn() for name, turn in turns.items())
    runs = max(TURNS[0], min(TURNS[1], int(SECONDS / max(once, 1e-9))))
    seconds = harness.take_turns(turns, runs)
    ours: float | None = None
    for name, values in seconds.items():
        spread = harness.spread(values)
        if ours is None and name == next(iter(calls)):
            ours = spread["median"]
        rate = {"gbps": case.moved / 1e9} if binds == "memory" else {"tflops": case.flops / 1e12}
        yield {
            "op": case.op, "model": case.model, "shape": case.shape, "dtype": case.dtype, "provider": name,
            **{f"{key}_us": _short(1e6 * value) for key, value in spread.items()},
            "bytes": case.moved, "flops": case.flops,
            **{key: _short(value / spread["median"]) for key, value in rate.items()},
            "of_limit": _short(least / spread["median"]), "error": _short(errors[name]),
            "ratio": _short(spread["median"] / ours) if ours and graphs[name] == graphs[next(iter(calls))] else None,
            "cache": "warm" if graphs[name] else "cold", "graph": graphs[name], "runs": runs,
        }  # fmt: skip


def _turn(clock: Clock, call: Callable[[], object], before: Callable[[], object], times: int) -> float:
    return clock(call, before) / times


def _apart(results: list[torch.Tensor], first: list[torch.Tensor] | None) -> float:
    """The largest difference from the first provider's results, on every element, relative to their largest value."""
    if first is None:
        return 0.0
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max())
               for a, b in zip(results, first, strict=True))  # fmt: skip


def _run(call: Callable[[], Any]) -> Any:
    """`call()`; if PyTorch's attention refuses, raise with its last warning as the reason."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return call()
        except RuntimeError as refused:
            said = [str(w.message) for w in caught if "attention" in str(w.message).lower()]
            if not said:
                raise
            raise RuntimeError(said[-1].partition(" (Triggered")[0]) from refused


def reason(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
        return "out of memory"
    lines = str(error).strip().splitlines()
    return f"{lines[0] if lines else type(error).__name__}"[:160]


# -- the whole run -----------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a run measures, and where."""

    device: torch.device
    backend: str  # of ours
    peers: list[str]
    cases: list[Case]


def plan(
    ops: Sequence[str] = (), dtypes: Sequence[str] = (), models: Sequence[str] = (), tokens: Sequence[int] = (),
    batches: Sequence[int] = (), peers: Sequence[str] = (), quick: bool = False, device: str = "auto",
) -> Plan:  # fmt: skip
    """The run for these options; what is not given defaults by device.

    Raises:
        NotHere: a name is unknown or unavailable; the message lists those available.
        ValueError: nothing is left to measure.
    """
    where = harness.device_for(device)
    if gpu := where.type == "cuda":
        check_backend("triton")
    harness.known("operation", ops, shapes.COSTS)
    harness.known("dtype", dtypes, shapes.DTYPES)
    harness.known("model", models, shapes.MODELS)
    there = here(where)
    names = [one for name in peers for one in ([n for n in there if n in SDPA] if name == "sdpa" else [name])]
    harness.known("peer", names, PEERS)
    for name in names:
        if name not in there:
            missing = "is not installed" if gpu or name not in ON_GPUS else "needs a GPU"
            raise harness.NotHere(f"the peer {name} {missing}; choose from {', '.join(there)}")
    chosen = names or [name for name in there if gpu or name != "compile"]
    small, grid = (shapes.GPU_QUICK, shapes.GPU) if gpu else (shapes.CPU_QUICK, shapes.CPU)
    usual = (["8b"] if quick else ["7b", "8b", "70b"]) if gpu else ["135m"]
    work = shapes.cases(
        ops or list(shapes.COSTS), models or usual, dtypes or (["bfloat16"] if gpu else ["float32"]),
        small if quick else grid, tokens, batches,
    )  # fmt: skip
    if not work:
        raise ValueError(f"gemv takes up to {shapes.FEW} rows: --batch 1 to {shapes.FEW}")
    return Plan(where, "triton" if gpu else "torch", list(dict.fromkeys(chosen)), work)


def run(
    plan: Plan, command: str, clock: Clock | None = None, say: Callable[[str], object] = lambda text: None
) -> Iterator[dict[str, Any] | Case | Left]:
    """Yield the header; then for each case, the case itself and its rows, with what was left out and why.

    `say` receives the estimated duration.
    """
    device, gpu = plan.device, plan.device.type == "cuda"
    clock = clock or harness.clock(device)
    limits = measure_limits(list(dict.fromkeys(case.dtype for case in plan.cases)), device, clock)
    copy = max(limit.bandwidth for limit in limits.values())
    products = {dtype: _short(limit.rate / 1e12) for dtype, limit in limits.items()}
    yield harness.header(
        command, gpu, limits={"copy_gbps": _short(copy / 1e9), "product_tflops": products},
        ours=plan.backend, threads=None if gpu else torch.get_num_threads(), note=None if gpu else NO_GPU,
    )  # fmt: skip
    took = estimate(plan, limits)
    long = f"{took / 60:.0f} minutes" if took > 90 else harness.plural(max(1, round(took)), "second")
    say(f"{harness.plural(len(plan.cases), 'shape')}, about {long}")
    flush = flusher(device)
    for case in plan.cases:
        yield case
        torch.compiler.reset()  # compile each shape by itself, without a limit on recompiles
        try:
            given = inputs(case, device)
            calls = providers(case, given, plan.backend, plan.peers)
            yield from measure(case, calls, given, limits, clock, flush)
            del given, calls
        except (RuntimeError, MemoryError) as refused:
            yield Left(case, "all", reason(refused))
        if gpu:
            torch.cuda.empty_cache()


def estimate(plan: Plan, limits: Limits) -> float:
    """Seconds, by rule of thumb: a provider takes five times the least time, and is built, checked and measured."""
    gpu = plan.device.type == "cuda"
    building = 0.0 if "compile" not in plan.peers else 2.0 if gpu else 5.0
    checking = 0.2 if gpu else 0.05
    return sum(
        building + (1 + len(plan.peers) / 2) * (checking + min(SECONDS, 5 * TURNS[1] * floor(case, limits)[0]))
        for case in plan.cases
    )


# -- printing ----------------------------------------------------------------------------------------------------------

COLUMNS = f"    {'provider':15}{'median us':>11}{'p10 - p90':>21}{'rate':>16}{'of limit':>10}{'ratio':>8}{'error':>10}"


def heading(header: Mapping[str, Any]) -> list[str]:
    limits = header["limits"]
    products = ", ".join(f"{_flops(rate)} in {dtype}" for dtype, rate in limits["product_tflops"].items())
    lines = [header["note"]] if header["note"] else []
    device = header["device"] + (f", driver {header['driver']}" if header["driver"] else "")
    device += f", {harness.plural(header['threads'], 'thread')}" if header["threads"] else ""
    return [*lines, device, f"limits: a copy moves {limits['copy_gbps']:g} GB/s, a matrix product {products}", COLUMNS]


def title(case: Case) -> str:
    return (f"{case.op}  {case.model}  {case.words()}  {case.dtype}  "
            f"{case.moved / 1e6:.3g} MB  {case.flops / 1e9:.3g} GFLOP")  # fmt: skip


def line(row: Mapping[str, Any]) -> str:
    rate = f"{row['gbps']:.4g} GB/s" if "gbps" in row else _flops(row["tflops"])
    between = f"{_us(row['p10_us'])} - {_us(row['p90_us'])}"
    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
    return (f"    {row['provider']:15}{_us(row['median_us']):>11}{between:>21}{rate:>16}{row['of_limit']:>10.0%}"
            f"{ratio:>8}{row['error']:>10.1e}  {row['cache']}{' graph' if row['graph'] else ''}")  # fmt: skip


def _flops(tera: float) -> str:
    return f"{tera:.4g} TFLOP/s" if tera >= 1 else f"{1000 * tera:.4g} GFLOP/s"


def _us(value: float) -> str:
    return f"{value:.1f}" if value < 1000 else f"{value:.0f}"
