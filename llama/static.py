"""Compile every kernel in every shipped configuration, for GPUs that need not be present, and check the machine code.

The launch functions of `llama.kernels` run as in real use, but on tensors without data (PyTorch's meta device) and with
a driver that knows only the GPU's name, so that a launch compiles and stops. Alignment, strides and tiles are therefore
those of real use. What `llama.machine_code` reads from the result is checked against the design: no spills,
no double precision, matrix units for products, 128-bit loads, no device scratch memory.

This does not show that a kernel is correct or fast.
"""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from . import machine_code
from .benchmarks.shapes import COSTS
from .kernels import cross_entropy, decode_attention, flash_attention, gemv, launch, rms_norm, rope, swiglu, tiles

BF16, FP32 = torch.bfloat16, torch.float32
TARGETS = {
    name: GPUTarget("hip", name, 64) if name.startswith("gfx") else GPUTarget("cuda", int(name.removeprefix("sm_")), 32)
    for name in tiles.FAMILIES
}
LARGE_PRODUCTS = {"sm_80": "HMMA", "sm_89": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "MFMA"}
SMALL_PRODUCTS = {name: "MFMA" if name.startswith("gfx") else "HMMA" for name in TARGETS}  # of 16 rows


class Case(NamedTuple):
    """One call of a launch function, and the requirements on its machine code."""

    kernel: str
    shape: str
    launch: Callable[[], object]
    mma: dict[str, str] | None = None  # the required family of matrix instructions, by target
    wide: bool = True  # whether the strides allow 128-bit loads
    sizes: dict[str, int] | None = None  # by the letters of benchmarks/shapes.py, for the roofline
    targets: tuple[str, ...] = tiles.FAMILIES  # those that have this kernel
    overlaps: bool = False  # whether softmax should overlap with a product


class UnknownKernel(ValueError):
    """There is no kernel of this name."""


def work(targets: Iterable[str], kernel: str | None = None) -> list[tuple[str, Case]]:
    """The cases to compile for these targets, of one kernel or of all.

    Raises:
        UnknownKernel: there is no such kernel. ValueError: TRITON_INTERPRET is set.
    """
    refuse_interpreter()
    everything = cases()
    names = dict.fromkeys(case.kernel for case in everything)
    if kernel is not None and kernel not in names:
        raise UnknownKernel(f"unknown kernel {kernel!r}; choose from {', '.join(names)}")
    return [(target, case) for target in targets for case in everything
            if kernel in (None, case.kernel) and target in case.targets]  # fmt: skip


def records(work: Iterable[tuple[str, Case]]) -> Iterator[dict[str, Any]]:
    """Yield one record per compiled configuration; cases may share one."""
    seen: set[tuple[str, str]] = set()
    for target, case in work:
        for record in build(case, target):
            if (target, record["hash"]) not in seen:
                seen.add((target, record["hash"]))
                yield record


def refuse_interpreter() -> None:
    if launch.INTERPRETED:
        raise ValueError("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")


def build(case: Case, target: str) -> list[dict[str, Any]]:
    """A record for each kernel that the case launches."""
    built: list[tuple[Any, dict[str, Any], float]] = []
    error = None
    try:
        with pretending(TARGETS[target], built):
            case.launch()
    except Exception as failed:  # whatever Triton, LLVM or ptxas raises is a finding
        error = f"{type(failed).__name__}: {str(failed).strip() or 'no message'}"[-300:]
    head = {"kernel": case.kernel, "target": target}
    made = []
    for compiled, options, seconds in built:
        joins = "BLOCK_P" in options  # merges the pieces of a decode attention, without products
        wanted = case.mma[target] if case.mma and not joins else None
        seen = machine_code.inspect(compiled, target)
        made.append(head | {
            "config": {"shape": case.shape} | options,
            **seen,
            "occupancy": machine_code.occupancy(
                target, seen["registers"], compiled.metadata.num_warps, seen["shared_bytes"]
            ),
            "roofline": None if joins else roofline(case, target),
            "mma_wanted": wanted, "wide_wanted": case.wide, "overlap_wanted": case.overlaps,
            "function": compiled.name, "hash": compiled.hash,
            "seconds": round(seconds, 2), "triton": triton.__version__, "error": None,
        })  # fmt: skip
    if error is not None:
        nothing = dict.fromkeys(("registers", "spills", "shared_bytes", "mma", "occupancy", "roofline"))
        config = {"shape": case.shape}
        made.append(head | {"config": config, **nothing, "hash": f"{case.kernel} {case.shape}",
                            "triton": triton.__version__, "error": error})  # fmt: skip
    return [record | {"problems": problems(record)} for record in made]


def roofline(case: Case, target: str) -> dict[str, Any] | None:
    """The call's place on the target's roofline, or None if the case gives no sizes."""
    if case.sizes is None:
        return None
    cost = COSTS[case.kernel]
    return machine_code.roofline(target, cost.moved(**case.sizes), cost.flops(**case.sizes), case.sizes["e"] == 2)


class _Driver:
    """A driver that knows only the GPU's name, which is all that compiling needs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> tuple[str, object]:
        return self.target.backend, self.target.arch  # keys Triton's cache, so that targets do not mix

    def get_current_stream(self, device: object = None) -> int:
        return 0


@contextlib.contextmanager
def pretending(target: GPUTarget, built: list[tuple[Any, dict[str, Any], float]]) -> Iterator[None]:
    """Pretend that the GPU is `target`: a launch compiles, appends the result to `built`, and runs nothing."""
    before, inherited = driver._active, "__getitem__" not in vars(JITFunction)
    launched = JITFunction.__getitem__

    def compile_only(self: Any, grid: Any) -> Callable[..., Any]:
        def warmup(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            compiled = self.warmup(*args, grid=grid, **options)
            built.append((compiled, options, time.perf_counter() - start))
            return compiled

        return warmup

    driver.set_active(_Driver(target))
    JITFunction.__getitem__ = compile_only
    try:
        yield
    finally:
        driver._active = before
        if inherited:
            del JITFunction.__getitem__
        else:
            JITFunction.__getitem__ = launched


def problems(record: dict[str, Any]) -> list[str]:
    """What is wrong with a record, one message per problem."""
    if record["error"]:
        return [f"does not compile: {record['error']}"]
    found = []
    limit = machine_code.SHARED_MEMORY[record["target"]]
    if record["spills"]:
        found.append("spills registers to memory")
    if record["shared_bytes"] > limit:
        found.append(f"uses {record['shared_bytes']} bytes of shared memory, of {limit}")
    if record["tensor_memory"] > machine_code.TENSOR_MEMORY:
        found.append(f"uses {record['tensor_memory']} columns of tensor memory")
    if record["mma_wanted"] not in (None, record["mma"]):
        found.append(f"should use {record['mma_wanted']}, has {record['mma'] or 'no matrix instruction'}")
    if record["fp64"]:
        found.append("computes in double precision")
    if record["wide_wanted"] and not record["wide_loads"]:
        found.append("has no 128-bit load")
    if record["scratch_bytes"]:
        found.append("needs scratch memory on the device")
    if record["overlap_wanted"] and not record["overlapped"]:
        found.append("does not overlap softmax with a product")
    if record["overlap_wanted"] and not record["register_moves"]:
        found.append("gives the producer as many registers as the consumers")
    if record["unguarded_arrivals"]:
        found.append("arrives at a barrier before all of its warps are done")
    if record["serialized"]:
        found.append("has matrix instructions that wait for one another (ptxas: serialized)")
    return found


def line(record: dict[str, Any]) -> str:
    """A record as a line of text."""
    config = record["config"]
    tile = " ".join(f"{name.lower()}={config[name]}" for name in config if name.startswith(("BLOCK", "ROWS", "num_")))
    head = f"{record['target']:7}{record['kernel']:21}{config['shape']:33}"
    if record["error"]:
        return head + record["problems"][0]
    numbers = f"{record['registers']:4} registers {record['spills']:4} spills {record['shared_bytes']:7} bytes"
    bound = record["roofline"]["bound"] if record["roofline"] else "-"
    words = f"{record['occupancy']:5.0%} occupied  {bound:11}{record['mma'] or '-':8}{tile}"
    return "  ".join([head + numbers, words, *record["problems"]])


def cases(device: str = "meta") -> list[Case]:
    """Calls that together use every entry of `tiles`; on a real device, their inputs have sensible values."""
    with torch.device(device):
        return [*_norms(), *_ropes(), *_gates(), *_losses(), *_prefills(), *_hoppers(), *_decodes(), *_gemvs()]


def _heads(heads: int, size: int, dtype: torch.dtype, tokens: int = 1024) -> torch.Tensor:
    """(2, heads, tokens, size), laid out like a projection's output: tokens outermost."""
    return torch.randn(2, tokens, heads, size, dtype=dtype).transpose(1, 2)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _norms() -> Iterator[Case]:
    plain, added = rms_norm._rms_norm.launch, rms_norm._add_rms_norm.launch
    for dtype in (BF16, FP32):
        for width in (256, 576, 2048, 4096, 5120, 8192, tiles.WIDEST_ROW):
            x, weight = torch.randn(2, 512, width, dtype=dtype), torch.randn(width, dtype=dtype)
            shape, sizes = f"{width} {_word(dtype)}", {"B": 2, "T": 512, "E": width, "e": dtype.itemsize}
            yield Case("rms_norm", shape, partial(plain, x, weight, 1e-5), sizes=sizes)
            yield Case("add_rms_norm", shape, partial(added, x, x, weight, 1e-5), sizes=sizes)


def _ropes() -> Iterator[Case]:
    fresh, stored = rope._apply_rope.launch, rope._apply_rope_to_cache.launch
    places = torch.arange(1024).expand(2, 1024)
    for H, K, D, dtype in (
        (32, 8, 128, BF16), (64, 8, 128, BF16), (32, 8, 64, BF16), (9, 3, 64, BF16), (32, 32, 80, BF16),
        (8, 8, 256, BF16), (32, 8, 128, FP32), (9, 3, 64, FP32),
    ):  # fmt: skip
        q, k, cos = _heads(H, D, dtype), _heads(K, D, dtype), torch.randn(1, 1024, D, dtype=dtype)
        shape = f"{H}/{K} heads of {D} {_word(dtype)}"
        sizes = {"B": 2, "T": 1024, "H": H, "K": K, "D": D, "e": dtype.itemsize}
        yield Case("apply_rope", shape, partial(fresh, q, k, cos, cos), sizes=sizes)
        cache = torch.zeros(2, K, 4096, D, dtype=dtype)
        call = partial(stored, q, k, k, cos, cos, cache, cache, places)
        yield Case("apply_rope_to_cache", shape, call, sizes=sizes)


def _gates() -> Iterator[Case]:
    for dtype in (BF16, FP32):
        for width in (1536, 11008, 14336):
            gate, up = torch.randn(2, 512, 2 * width, dtype=dtype).chunk(2, -1)
            sizes = {"B": 2, "T": 512, "F": width, "e": dtype.itemsize}
            yield Case("swiglu", f"{width} {_word(dtype)}", partial(swiglu._swiglu.launch, gate, up), sizes=sizes)


def _losses() -> Iterator[Case]:
    plain, linear = cross_entropy._token_losses.launch, cross_entropy._linear_token_losses.launch
    labels = torch.zeros(2, 512, dtype=torch.int64)
    for dtype in (BF16, FP32):
        for vocabulary in (32000, 128256):
            logits, shape = torch.randn(2, 512, vocabulary, dtype=dtype), f"{vocabulary} {_word(dtype)}"
            sizes = {"B": 2, "T": 512, "V": vocabulary, "e": dtype.itemsize}
            yield Case("cross_entropy", shape, partial(plain, logits, labels, -100), sizes=sizes)
        hidden, weight = torch.randn(2, 512, 64, dtype=dtype), torch.randn(vocabulary, 64, dtype=dtype)
        yield Case("linear_cross_entropy", shape, partial(linear, hidden, weight, labels, -100))


def _prefills() -> Iterator[Case]:
    starts, lengths = torch.zeros(2, dtype=torch.int64), torch.full((2,), 4096)
    padding: dict[str, Any] = {"starts": starts, "lengths": lengths, "mask": torch.ones(2, 4096, dtype=torch.bool)}
    packing: dict[str, Any] = {"first_keys": torch.zeros(2, 1024, dtype=torch.int64)}
    few: dict[str, Any] = {"first_keys": packing["first_keys"][:, : tiles.SHORT]}
    for words, options in (("causal", {}), ("padded", padding), ("packed", packing), ("both", padding | packing)):
        for D in tiles.HEAD_DIMS:
            yield _prefill(words, D, **options)
            yield _prefill(f"expanded {words}", D, expanded=True, **options)
            yield _prefill(words, D, FP32, **options)
        yield _prefill(words, 80, **options)
        yield _prefill(words, 100, wide=False, **options)  # rows of 200 bytes: no descriptors, no 128-bit loads
    for words, options in (("padded", padding), ("packed", few), ("both", padding | few)):
        for D in (*tiles.HEAD_DIMS, 100):
            yield _prefill(f"short {words}", D, T=tiles.SHORT, wide=D != 100, **options)
    for D in tiles.HEAD_DIMS:
        yield _prefill("short both", D, FP32, T=tiles.SHORT, **padding, **few)


def _prefill(words: str, D: int, dtype: torch.dtype = BF16, T: int = 1024, expanded: bool = False, wide: bool = True,
             starts: Any = None, lengths: Any = None, first_keys: Any = None, mask: Any = None) -> Case:  # fmt: skip
    q, k = _heads(32, D, dtype, T), torch.randn(2, 1 if expanded else 8, 4096, D, dtype=dtype)
    k = k.expand(2, 8, 4096, D)  # expanded: one head for all, with stride 0, which descriptors do not support
    products = None if dtype == FP32 else SMALL_PRODUCTS if T <= tiles.SHORT else LARGE_PRODUCTS
    call = partial(flash_attention._flash_attention.launch,
                   q, k, k, True, starts, lengths, first_keys, mask, 4096 - T, False)  # fmt: skip
    sizes = {"B": 2, "T": T, "S": 4096, "H": 32, "K": 1 if expanded else 8, "D": D, "e": dtype.itemsize}
    return Case("flash_attention", f"{words} D={D} {_word(dtype)}", call, products, wide, sizes)


def _hoppers() -> Iterator[Case]:
    """Every tile of flash_attention_hopper: plain, padded as the model pads, and with all options."""
    starts, lengths = torch.zeros(2, dtype=torch.int32), torch.full((2,), 4096, dtype=torch.int32)
    padding: dict[str, Any] = {"starts": starts, "lengths": lengths, "mask": torch.ones(2, 4096, dtype=torch.bool)}
    for D in tiles.PREFILL_HOPPER:
        yield _hopper("causal", D, BF16)
        yield _hopper("padded", D, BF16, **padding)
        yield _hopper("packed, padded, lse", D, torch.float16, lse=True, **padding,
                      first_keys=torch.zeros(2, 1024, dtype=torch.int64))  # fmt: skip


def _hopper(words: str, D: int, dtype: torch.dtype, lse: bool = False,
            starts: Any = None, lengths: Any = None, first_keys: Any = None, mask: Any = None) -> Case:  # fmt: skip
    q, k = _heads(32, D, dtype), torch.randn(2, 8, 4096, D, dtype=dtype)

    def call() -> None:  # not every Triton has Gluon
        from .kernels import flash_attention_hopper as hopper

        out, sums = flash_attention._outputs(q, lse)
        hopper.flash_attention_hopper(q, k, k, starts, lengths, first_keys, mask, 3072, out, sums if lse else None)

    sizes = {"B": 2, "T": 1024, "S": 4096, "H": 32, "K": 8, "D": D, "e": dtype.itemsize}
    return Case("flash_attention", f"Hopper, {words} D={D} {_word(dtype)}", call, LARGE_PRODUCTS, sizes=sizes,
                targets=("sm_90",), overlaps=True)  # fmt: skip


def _decodes() -> Iterator[Case]:
    mask, pages = torch.ones(2, 4096, dtype=torch.bool), torch.arange(128, dtype=torch.int32).view(2, 64)
    for D in tiles.HEAD_DIMS:
        for dtype in (BF16, FP32):
            yield _decode("32/8 heads", D, dtype)
            yield _decode("masked", D, dtype, mask=mask)
            yield _decode("paged", D, dtype, pages=pages)
    yield _decode("32/32 heads", 128, K=32)
    yield _decode("32/8 heads", 80)
    yield _decode("32/8 heads", 100, wide=False)


def _decode(words: str, D: int, dtype: torch.dtype = BF16, K: int = 8, wide: bool = True,
            mask: Any = None, pages: Any = None) -> Case:  # fmt: skip
    q, cache = torch.randn(2, 32, 1, D, dtype=dtype), torch.randn(2, K, 4096, D, dtype=dtype)
    cache = cache if pages is None else cache.view(128, K, 64, D)
    call = partial(decode_attention._decode_attention.launch, q, cache, cache, torch.full((2,), 4096), mask, pages)
    products = None if dtype == FP32 else SMALL_PRODUCTS
    sizes = {"B": 2, "S": 4096, "H": 32, "K": K, "D": D, "e": dtype.itemsize, "page": 0 if pages is None else 64,
             "masked": int(mask is not None)}  # fmt: skip
    return Case("decode_attention", f"{words} D={D} {_word(dtype)}", call, products, wide, sizes)


def _gemvs() -> Iterator[Case]:
    """Llama-3-8B's width, for one row and for the most supported; and a width that no tile divides."""
    for rows in (1, gemv.MOST_ROWS):
        yield from _gemv(rows, 4096, BF16)
        yield from _gemv(rows, 4096, FP32)
    yield from _gemv(1, 576, BF16)
    yield from _gemv(1, 4096, BF16, pdl=True)


def _gemv(rows: int, width: int, dtype: torch.dtype, pdl: bool = False) -> Iterator[Case]:
    H, K, D, F = width // 64, width // 256, 64, 14336
    x, gate = torch.randn(rows, width, dtype=dtype), torch.randn(F, width, dtype=dtype)
    q, k = torch.randn(H * D, width, dtype=dtype), torch.randn(K * D, width, dtype=dtype)
    shape = f"{rows} x {width} {_word(dtype)}{' pdl' * pdl}"
    sizes = {"B": rows, "E": width, "H": H, "K": K, "D": D, "F": F, "e": dtype.itemsize}
    y, hidden = x.new_empty(rows, len(q) + 2 * len(k)), x.new_empty(rows, F)
    targets = ("sm_90", "sm_100") if pdl else tiles.FAMILIES
    yield Case("gemv", f"q k v {shape}", partial(gemv._run, x, [q, k, k], y, False, pdl), sizes=sizes, targets=targets)
    yield Case("gemv", f"o {shape}", partial(gemv._run, x, [q], x.new_empty(rows, len(q)), False, pdl),
               sizes=sizes | {"K": 0}, targets=targets)  # fmt: skip
    yield Case("gemv_swiglu", shape, partial(gemv._run, x, [gate, gate], hidden, True, pdl), sizes=sizes,
               targets=targets)  # fmt: skip
