"""SmolLM2-135M in float32 on a CPU: the NumPy reference against transformers, interleaved in one process.

    python -m benchmarks.cpu                 # a table, and benchmarks/results/cpu.json

Decode is memory-bound: every token reads all 538 MB of weights once, so compare tokens/s. Prefill is compute-bound:
compare times. Quote the figures for one thread; with two, they vary with other load on a shared machine. The ratio is
what counts, since both run under the same conditions. Reports best and median of several runs.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from threadpoolctl import threadpool_limits

from llama import reference
from llama.checkpoints import fetch

from . import harness
from .model import decode

PROMPT, NEW = 512, 64


def providers(folder: Path) -> dict[str, tuple[Callable[[], np.ndarray], Callable[[], float]]]:
    """For each provider: a prefill of PROMPT tokens that returns their logits, and a decode that returns tokens/s."""
    params, config = reference.load(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, PROMPT))

    def reference_decode() -> float:
        tokens = reference.stream(params, config, ids[:, :32], NEW + 1)
        next(tokens)
        start = time.perf_counter()
        assert sum(1 for _ in tokens) == NEW
        return NEW / (time.perf_counter() - start)

    @torch.inference_mode()
    def transformers_prefill() -> np.ndarray:
        return model(torch.tensor(ids)).logits.numpy()

    return {
        "reference": (lambda: reference.forward(params, config, ids).logits, reference_decode),
        "transformers": (transformers_prefill, decode(model, torch.tensor(ids), NEW)),
    }


def speed(folder: Path, threads: int, runs: int) -> list[dict]:
    """Prefill and decode of every provider, interleaved `runs` times."""
    torch.set_num_threads(threads)
    with threadpool_limits(threads, user_api="blas"):
        rivals = providers(folder)
        ours, theirs = (prefill() for prefill, _ in rivals.values())  # also the warm-up
        difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        assert difference < 1e-4, f"the providers disagree by {difference}"
        seconds = harness.take_turns({name: timed(prefill) for name, (prefill, _) in rivals.items()}, runs)
        rates = harness.take_turns({name: decode for name, (_, decode) in rivals.items()}, runs)
    return [
        harness.row(f"prefill {PROMPT}", "s", seconds, threads=threads),
        harness.row("decode", "tokens/s", rates, max, threads=threads),
    ]


def timed(function: Callable[[], object]) -> Callable[[], float]:
    """A function that runs `function` and returns the seconds it took."""

    def measure() -> float:
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    return measure


def start_up(runs: int) -> list[dict]:
    """Seconds that `import llama` and `llama --help` take."""
    timed_import = "import time; s = time.perf_counter(); import llama; print(time.perf_counter() - s)"
    imports, helps = [], []
    for _ in range(runs):
        out = subprocess.run([sys.executable, "-c", timed_import], capture_output=True, text=True, check=True)
        imports.append(float(out.stdout))
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "llama", "--help"], capture_output=True, check=True)
        helps.append(time.perf_counter() - start)
    return [
        {"what": what, "unit": "s", "runs": runs, "best": round(min(v), 3), "median": round(statistics.median(v), 3)}
        for what, v in (("import llama", imports), ("llama --help", helps))
    ]


def peak_memory(folder: Path) -> dict:
    """Peak resident memory of a whole `llama generate`, and the size of the float32 weights."""
    command = [sys.executable, "-m", "llama", "generate", "--backend", "reference", "--model", str(folder), "Hello"]
    peak = harness.peak_memory(command)
    weights = sum(4 * int(np.prod(shape)) for _, shape in reference.parameter_shapes(reference.load(folder)[1]))
    megabytes = {"peak": round(peak / 1e6), "weights": round(weights / 1e6)}
    return {"what": "peak memory of llama generate", "unit": "MB", **megabytes, "ratio": round(peak / weights, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "cpu.json")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    folder = fetch("smollm2")
    rows = [row for threads in (1, 2) for row in speed(folder, threads, options.runs)]
    rows += [*start_up(options.runs), peak_memory(folder)]
    harness.write(options.out, "cpu", "SmolLM2-135M-Instruct (GGUF Q4_1, dequantised), float32", rows)


if __name__ == "__main__":
    main()
