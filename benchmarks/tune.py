"""Tune the tiles of kernels/tiles.py: compile every candidate, drop those that spill, time the rest, print the winners.

    python -m benchmarks.tune --kernel flash_attention                    # on a GPU: times, and lines for tiles.py
    python -m benchmarks.tune --kernel flash_attention --target sm_90     # anywhere: what compiles without spills

The timing has never run on a GPU. The current tables are the largest tiles that compile without spills on both the
oldest and the newest Triton that we support; no measurement backs them.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
import triton

from llama import static
from llama.kernels import launch, tiles
from llama.kernels.tiles import Attention, Block, Heads, Products, Rows

KERNELS = ("rms_norm", "rope", "swiglu", "gemv", "cross_entropy", "flash_attention", "decode_attention")


class Entry(NamedTuple):
    """One entry of the tables: where it is, its candidates, and which cases of `llama.static` read it."""

    name: str
    holder: Any  # a dictionary, or the module itself
    key: Any
    candidates: list[tuple[Any, ...]]
    reads: Callable[[static.Case], bool]

    @contextlib.contextmanager
    def set_to(self, candidate: tuple[Any, ...]) -> Iterator[None]:
        if isinstance(self.holder, dict):
            space, value = self.holder, candidate
        else:  # a constant of the module, or a function of shapes
            space, value = vars(self.holder), candidate
            if callable(space[self.key]):
                value = lambda *shape: candidate  # noqa: E731
        before, space[self.key] = space[self.key], value
        try:
            yield
        finally:
            space[self.key] = before


def entries(kernel: str, family: str) -> Iterator[Entry]:
    """The tables' entries for a kernel on a family of GPUs."""
    if kernel == "flash_attention":
        large = [Attention(*tile) for tile in product((128, 64, 256), (128, 64, 32), (8, 4), (4, 3, 2, 1))]
        small = [Attention(*tile) for tile in product((64, 32, 16), (64, 32, 16), (4, 8), (1,))]
        for D in tiles.HEAD_DIMS:
            tma, plain = tiles.PREFILL[family][D].tma, family in tiles.PREFILL_PLAIN
            yield _attention("PREFILL", tiles.PREFILL[family], D, [tile._replace(tma=tma) for tile in large], kernel,
                             lambda words, plain=plain: "bfloat16" in words and "short" not in words and not (
                                 plain and _has_no_descriptors(words)))  # fmt: skip
            if plain:
                yield _attention("PREFILL_PLAIN", tiles.PREFILL_PLAIN[family], D, large, kernel, _has_no_descriptors)
            yield _attention("PREFILL_FLOAT32", tiles.PREFILL_FLOAT32, D, small, kernel, _is_float32)
    elif kernel == "decode_attention":
        candidates = [Attention(*tile) for tile in product((16,), (128, 64, 32, 16), (4, 8, 2), (4, 3, 2, 1))]
        for D in tiles.HEAD_DIMS:
            for name, table, word in (("DECODE", tiles.DECODE[family], "bfloat16"),
                                      ("DECODE_FLOAT32", tiles.DECODE_FLOAT32, "float32")):  # fmt: skip
                yield _attention(name, table, D, candidates, kernel, lambda words, word=word: word in words)
    elif kernel == "cross_entropy":
        blocks = [Block(*tile) for tile in product((1024, 2048, 4096, 8192, 16384), (4, 8, 16))]
        yield Entry("CROSS_ENTROPY", tiles, "CROSS_ENTROPY", blocks, lambda case: case.kernel == kernel)
    else:
        rows = [Rows(*tile) for tile in product((1, 2, 4), (1, 2, 4, 8, 16))]
        heads = [Heads(*tile) for tile in product((4, 8, 16, 32, 64), (1, 2, 4, 8))]
        blocks = [Block(*tile) for tile in product((512, 1024, 2048, 4096), (2, 4, 8))]
        products = [Products(*tile) for tile in product((2, 4, 8, 16), (256, 512, 1024), (2, 4, 8), (1, 2, 3, 4))]
        candidates = {"rms_norm": rows, "rope": heads, "swiglu": blocks, "gemv": products}[kernel]
        mine = [case.shape for case in static.cases() if kernel in case.kernel and family in case.targets]
        for shape in dict.fromkeys(mine):
            yield Entry(f"{kernel} at {shape}", tiles, kernel, candidates,
                        lambda case, shape=shape: kernel in case.kernel and case.shape == shape)  # fmt: skip


def _has_no_descriptors(words: str) -> bool:
    return "short" not in words and ("expanded" in words or "D=100" in words)


def _is_float32(words: str) -> bool:
    return "float32" in words and not words.startswith(("short", "both"))  # which have tiles of their own


def _attention(name: str, table: dict, D: int, candidates: list, kernel: str, chosen: Callable[[str], bool]) -> Entry:
    def reads(case: static.Case) -> bool:
        if case.kernel != kernel or not chosen(case.shape):
            return False
        return tiles.head_class(int(case.shape.partition("D=")[2].split()[0])) == D

    return Entry(f"{name} {D}", table, D, candidates, reads)


def compiled(entry: Entry, candidate: tuple[Any, ...], target: str) -> list[dict[str, Any]] | None:
    """The records of the candidate in every case that reads it, or None if one of them has a problem."""
    records: list[dict[str, Any]] = []
    with entry.set_to(candidate):
        for case in (case for case in static.cases() if target in case.targets and entry.reads(case)):
            records += static.build(case, target)
            if any(map(static.problems, records)):
                return None
    return records


def milliseconds(entry: Entry, candidate: tuple[Any, ...], target: str) -> float:
    with entry.set_to(candidate):
        return sum(
            triton.testing.do_bench(case.launch)
            for case in static.cases("cuda") if target in case.targets and entry.reads(case)
        )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="default: all")
    parser.add_argument("--target", choices=tiles.FAMILIES, help="default: the GPU's own family, with timing")
    parser.add_argument("--entry", default="", help="only entries whose name contains this, e.g. PREFILL_PLAIN")
    arguments = parser.parse_args()
    static.refuse_interpreter()
    if arguments.target is None and not torch.cuda.is_available():
        parser.error("there is no GPU to time on; use --target to list what compiles without spills")
    timed = arguments.target is None
    target = arguments.target or launch.family(torch.device("cuda", torch.cuda.current_device()))
    print(f"# {torch.cuda.get_device_name() if timed else target}, triton {triton.__version__}")
    for entry in (entry for kernel in arguments.kernel or KERNELS for entry in entries(kernel, target)):
        if arguments.entry not in entry.name:
            continue
        times = {}
        for candidate in entry.candidates:
            if (records := compiled(entry, candidate, target)) is None:
                continue
            registers, shared = (max(record[key] for record in records) for key in ("registers", "shared_bytes"))
            times[candidate] = milliseconds(entry, candidate, target) if timed else 0.0
            took = f"{times[candidate]:9.4f} ms  " if timed else ""
            print(f"#   {took}{registers:3} registers {shared:6} bytes  {candidate}", flush=True)
        print(f"{entry.name}: {min(times, key=times.__getitem__) if timed and times else f'{len(times)} candidates'}")


if __name__ == "__main__":
    main()
