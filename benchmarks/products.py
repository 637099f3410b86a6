"""Decoding's products of one row with each of SmolLM2-135M's matrices: PyTorch against NumPy, and both combined.

    python -m benchmarks.products            # a table, and benchmarks/results/products.json

Memory-bound: compare GB/s. Each run uses enough matrices of a shape to exceed every cache. `threads` applies to both
libraries. The last rows are whole decoding steps: in PyTorch, in NumPy with the threads and the product that
`llama.ops.rows_for_numpy` chooses, or in NumPy with BLAS's product and unchanged threads.
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from torch.nn import functional as F

import llama
from llama import ops
from llama.checkpoints import fetch

from . import harness
from .cpu import timed
from .model import decode

SHAPES = ((192, 576), (576, 576), (1536, 576), (576, 1536), (49152, 576))
BYTES = 300_000_000


def products(threads: int, runs: int) -> list[dict]:
    torch.set_num_threads(threads)
    rows = []
    with threadpool_limits(threads, user_api="blas"), torch.inference_mode():
        for shape in SHAPES:
            weights = [torch.randn(shape) for _ in range(max(2, BYTES // (4 * shape[0] * shape[1])))]
            arrays, x = [weight.numpy() for weight in weights], torch.randn(1, 1, shape[1])
            row, size = x.numpy().reshape(-1), sum(weight.nbytes for weight in weights)
            turns = {
                "numpy": timed(lambda arrays=arrays, row=row: [array @ row for array in arrays]),
                "numpy, row by row": timed(lambda arrays=arrays, row=row: [np.vecdot(array, row) for array in arrays]),
                "torch": timed(lambda weights=weights, x=x: [F.linear(x, weight) for weight in weights]),
            }
            seconds = harness.take_turns(turns, runs)
            rates = {name: [size / second / 1e9 for second in values] for name, values in seconds.items()}
            rows.append(harness.row(f"product with {shape}", "GB/s", rates, max, threads=threads))
    return rows


def steps(folder: Path, threads: int, runs: int) -> dict:
    """tokens/s of decoding in three ways."""
    torch.set_num_threads(threads)
    model = llama.LlamaForCausalLM.from_pretrained(folder, dtype="float32")
    ids = torch.randint(0, 49152, (1, 32), generator=torch.Generator().manual_seed(0))

    def with_threads_left(x: torch.Tensor, size: int) -> nullcontext:
        ops._rows.active, ops._rows.product = ops._suits_numpy(x), np.dot
        return nullcontext()

    def way(replacement: Callable | None) -> Callable[[], float]:
        measure = decode(model, ids)

        def run() -> float:
            if replacement is None:
                return measure()
            try:
                with patch.object(ops, "rows_for_numpy", replacement):
                    return measure()
            finally:
                ops._rows.active = False

        return run

    turns = {
        "numpy": way(None),
        "numpy, threads left": way(with_threads_left),
        "torch": way(lambda x, size: nullcontext()),
    }
    with threadpool_limits(threads, user_api="blas"):
        return harness.row("decode", "tokens/s", harness.take_turns(turns, runs), max, threads=threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "products.json")
    options = parser.parse_args()
    folder = fetch("smollm2")
    rows = [row for threads in (1, 2) for row in products(threads, options.runs)]
    rows += [steps(folder, threads, options.runs) for threads in (1, 2)]
    harness.write(options.out, "products", "SmolLM2-135M's shapes, float32", rows)


if __name__ == "__main__":
    main()
