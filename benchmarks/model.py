"""SmolLM2-135M on a CPU: the PyTorch model against transformers, interleaved in one process.

    python -m benchmarks.model               # a table, and benchmarks/results/model.json

Decode is memory-bound: every token reads all weights once, so the floor is their bytes over the bandwidth at which the
same threads read the same weights (a sum over each), measured in the same rounds; `of_floor` says how close decode
comes. Prefill is compute-bound. The toy model (one layer of width 64) has next to nothing to compute: its time per
token is the overhead of generating. Quote the figures for one thread; with two, they vary with other load on a shared
machine. The ratio is what counts, since both run under the same conditions.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from threadpoolctl import threadpool_limits

import llama
from llama.checkpoints import fetch

from . import harness

PROMPT, NEW, TOY_NEW = 512, 48, 256
LIBRARIES: dict[str, Any] = {"llama": llama, "transformers": transformers}
# A whole process with either library: load, read a prompt of 512 tokens, write 16.
WHOLE = """
import sys, torch, {library} as library
model = library.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
ids = torch.arange(1000, 1512)[None]
print(model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)[0, -1])
"""


def prefill(model: Any, ids: torch.Tensor) -> Callable[[], float]:
    @torch.inference_mode()
    def measure() -> float:
        start = time.perf_counter()
        model(ids)
        return time.perf_counter() - start

    return measure


def decode(model: Any, ids: torch.Tensor, new: int = NEW) -> Callable[[], float]:
    @torch.inference_mode()
    def measure() -> float:
        """tokens/s of a bare loop over forward, which compares the models themselves."""
        out = model(ids[:, :32], use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(new):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
        return new / (time.perf_counter() - start)

    return measure


def generate(model: Any, ids: torch.Tensor, new: int = NEW, **options: Any) -> Callable[[], float]:
    def measure() -> float:
        """tokens/s of a whole `generate`, whose prompt of 8 tokens hardly counts."""
        prompt = ids[:, :8]
        start = time.perf_counter()
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new,
                             pad_token_id=0, **{"do_sample": False} | options)  # fmt: skip
        seconds = time.perf_counter() - start
        assert out.shape[1] == 8 + new
        return new / seconds

    return measure


def read_bandwidth(model: torch.nn.Module) -> Callable[[], float]:
    words = [weight.detach().view(torch.float32) for weight in model.parameters()]  # as words, whatever the dtype
    size = sum(word.nbytes for word in words)

    def measure() -> float:
        """GB/s of reading all weights once."""
        start = time.perf_counter()
        for word in words:
            word.sum()
        return size / (time.perf_counter() - start) / 1e9

    return measure


def speed(folder: Path, dtype: torch.dtype, threads: int, runs: int) -> list[dict]:
    """Prefill, decode and generate of both, and the read bandwidth."""
    torch.set_num_threads(threads)
    name = str(dtype).removeprefix("torch.")
    models = {key: library.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
              for key, library in LIBRARIES.items()}  # fmt: skip
    ids = torch.randint(0, 49152, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    size = sum(weight.nbytes for weight in models["llama"].parameters())
    settings = {"dtype": name, "threads": threads}
    with threadpool_limits(threads, user_api="blas"), torch.inference_mode():
        ours, theirs = (model(ids).logits.float() for model in models.values())  # also the warm-up
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        assert error < {"float32": 1e-4, "bfloat16": 0.1}[name], f"the two disagree by {error}"
        turns = {key: decode(model, ids) for key, model in models.items()}
        measured = harness.take_turns({"bandwidth": read_bandwidth(models["llama"]), **turns}, runs)
        bandwidth = measured.pop("bandwidth")
        rows = [harness.row("decode", "tokens/s", measured, max, **settings)]
        of_floor = {key: round(best * size / 1e9 / max(bandwidth), 3) for key, best in rows[0]["best"].items()}
        rows[0] |= {"read_bandwidth_GBps": round(max(bandwidth), 2), "weights_MB": round(size / 1e6),
                    "of_floor": of_floor}  # fmt: skip
    with threadpool_limits(threads, user_api="blas"):
        for what, options in (("generate", {}), ("generate, sampling", {"do_sample": True, "top_k": 50, "top_p": 0.9})):
            turns = {key: generate(model, ids, **options) for key, model in models.items()}
            rows.append(harness.row(what, "tokens/s", harness.take_turns(turns, runs), max, **settings))
        turns = {key: prefill(model, ids) for key, model in models.items()}
        rows.append(harness.row(f"prefill {PROMPT}", "s", harness.take_turns(turns, runs), **settings))
    return rows


def loading(folder: Path, runs: int) -> dict:
    """Seconds of from_pretrained, with the files in the page cache and the library imported."""

    def load(library: Any) -> Callable[[], float]:
        def measure() -> float:
            gc.collect()
            start = time.perf_counter()
            library.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            return time.perf_counter() - start

        return measure

    return harness.row("load", "s", harness.take_turns({k: load(v) for k, v in LIBRARIES.items()}, runs))


def toy(runs: int) -> list[dict]:
    """Microseconds per token of a model with one small layer, on one thread: of generate, of `decode`'s bare loop over
    forward, and the difference."""
    torch.set_num_threads(1)
    fields = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1,
              "num_attention_heads": 4, "eos_token_id": None}  # fmt: skip
    models = {key: library.LlamaForCausalLM(library.LlamaConfig(**fields)).eval() for key, library in LIBRARIES.items()}
    ids = torch.arange(TOY_NEW)[None]
    turns = {f"{key}, generate": generate(model, ids, TOY_NEW) for key, model in models.items()}
    turns |= {f"{key}, forward": decode(model, ids, TOY_NEW) for key, model in models.items()}
    with threadpool_limits(1, user_api="blas"):
        rates = harness.take_turns(turns, runs)
    times = {name: [1e6 / rate for rate in values] for name, values in rates.items()}
    whole, bare = ({key: times[f"{key}, {what}"] for key in LIBRARIES} for what in ("generate", "forward"))
    around = {key: [min(whole[key]) - min(bare[key])] for key in LIBRARIES}
    return [
        harness.row("toy model, a token of generate", "us", whole, threads=1),
        harness.row("toy model, a token of forward", "us", bare, threads=1),
        harness.row("toy model, what generate adds to forward (bests)", "us", around, threads=1),
    ]


def memory(folder: Path) -> dict:
    """Peak resident memory of a whole process with each library."""
    peaks = {key: [round(harness.peak_memory([sys.executable, "-c", WHOLE.format(library=key), str(folder)]) / 1e6)]
             for key in LIBRARIES}  # fmt: skip
    return harness.row("peak memory", "MB", peaks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "model.json")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folder = fetch("smollm2")
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for threads in (1, 2):
            rows += speed(folder, dtype, threads, options.runs)
    rows += [loading(folder, options.runs), *toy(options.runs), memory(folder)]
    harness.write(options.out, "model", "SmolLM2-135M-Instruct (GGUF Q4_1, dequantised)", rows)


if __name__ == "__main__":
    main()
