"""A whole model reading and writing, beside transformers and llama.cpp, turn by turn: what `llama bench model` runs.

    llama bench model smollm2                            # on a GPU if there is one
    llama bench model model.gguf --peers transformers,llama.cpp --prompt 512 --new 128 --batch 1,8

The tests have llama-bench's names. pp512 reads 512 tokens of every row at once, up to the choice of the first new one:
read tokens/s, and the time to the first token. tg128 passes 128 tokens of every row through the model one by one, from
an empty cache, each the likeliest after the one before: read tokens/s. The tokens of all rows count.

`of_floor` is how near a provider comes to what this machine allows. The floor is the longer of two times: the bytes
that must be read (every matrix once a pass, and the cache) over the bandwidth of reading, and the operations (2 for
each weight and token, 4 for each pair of tokens, head and width) over the rate of a square matrix product; `bound` says
which it was. Both rates are X
"""

import contextlib
import csv
import importlib.util
import io
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from llama import LlamaForCausalLM, reference
from llama.checkpoints import Checkpoint, open_checkpoint
from llama.ops import uses_triton
from llama.verify import BUDGET

from . import harness

PROMPTS, NEW, BATCHES = (512, 4096), 128, (1, 8, 32)
PEERS = {"transformers": ("transformers", "transformers"), "llama.cpp": ("llama_cpp", "llama-cpp-python")}
LONG = 10.0  # seconds: a turn on a CPU that would take longer runs only when it is asked for
CHECKED = 8  # steps with the cache, after a prompt of as many tokens, before anything is timed
LLAMA_CPP_BUDGET = 0.25  # it rounds activations to 8 bits where weights are quantised: SmolLM2 in Q4_1 shows 0.11


class Model(Protocol):
    """A model that reads, and remembers what it has read."""

    name: str
    backend: str
    dtype: str
    element: float  # bytes of a weight
    budget: float  # how far its scores may lie from the first provider's, relative to the largest

    def start(self, ids: np.ndarray) -> Any:
        """Forget everything and read (B, T) ids; the scores (B, V) of the next token."""

    def step(self, tokens: Any) -> Any:
        """Read one more token of each row, (B, 1); the scores (B, V) of the next."""


class TorchModel:
    """Ours or transformers': both are called alike."""

    def __init__(self, name: str, model: Any):
        self.name, self.model = name, model
        self.backend = "torch"
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.element = model.dtype.itemsize
        self.budget = BUDGET[model.dtype]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.model.parameters())

    @torch.inference_mode()
    def start(self, ids: np.ndarray) -> torch.Tensor:
        self._cache = None
        return self.step(torch.as_tensor(ids, device=self.model.device))

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        out = self.model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return out.logits[:, -1]


class ReferenceModel:
    """The NumPy reference."""

    name, backend, dtype, element, budget = "llama", "reference", "float32", 4.0, BUDGET[torch.float32]

    def __init__(self, place: Path):
        self.params, self.config = reference.load(place)

    def start(self, ids: np.ndarray) -> np.ndarray:
        self._cache = reference.KVCache(self.config.num_hidden_layers)
        return self.step(ids)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        return reference.forward(self.params, self.config, tokens, cache=self._cache, logits_to_keep=1).logits[:, -1]


class LlamaCpp:
    """llama.cpp through llama-cpp-python, which reads one text at a time, from a .gguf file."""

    name, backend, dtype, budget = "llama.cpp", "ggml", "as stored", LLAMA_CPP_BUDGET

    def __init__(self, path: Path, parameters: int, room: int, threads: int, gpu: bool):
        import llama_cpp  # type: ignore[import-not-found,unused-ignore]

        self.element = path.stat().st_size / parameters
        self.model = llama_cpp.Llama(str(path), n_ctx=room, n_batch=512, n_threads=threads, verbose=False,
                                     n_threads_batch=threads, n_gpu_layers=-1 if gpu else 0)  # fmt: skip

    def start(self, ids: np.ndarray) -> np.ndarray:
        self.model.reset()
        return self.step(ids)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        self.model.eval([int(token) for token in tokens[0]])
        scores = self.model._ctx.get_logits()
        return np.ctypeslib.as_array(scores, shape=(self.model.n_vocab(),))[None]


class Machine(NamedTuple):
    """Where it runs: the device, the threads, and the clock."""

    device: torch.device
    threads: int
    clock: Callable[[], float] = time.perf_counter

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def now(self) -> float:
        """The time when all work so far is done."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)
        return self.clock()

    def seconds(self, work: Callable[[], object]) -> Callable[[], float]:
        """A function that gives the seconds `work` takes."""

        def measure() -> float:
            start = self.now()
            work()
            return self.now() - start

        return measure


class Test(NamedTuple):
    """A test of llama-bench: `passes` through the model, each with `tokens` of every row."""

    batch: int
    passes: int
    tokens: int

    @property
    def name(self) -> str:
        return f"tg{self.passes}" if self.writes else f"pp{self.tokens}"

    @property
    def writes(self) -> bool:
        return self.tokens == 1

    @property
    def length(self) -> int:
        return self.passes * self.tokens

    def run(self, model: Model, ids: np.ndarray) -> None:
        """Read the first tokens of `ids` (B, T), and go on with the likeliest."""
        tokens = model.start(ids[: self.batch, : self.tokens]).argmax(-1)
        for _ in range(self.passes - 1):
            tokens = model.step(tokens[:, None]).argmax(-1)

    def demands(self, config: reference.Config, element: float) -> tuple[float, int]:
        """The bytes that must be read and the operations that must be done, with numbers of `element` bytes."""
        L, E, F, V = config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        layers = L * (2 * E * H * D + 2 * E * K * D + 3 * E * F)
        head = V * E  # of the last token of a pass alone
        seen = self.tokens * self.passes * (self.passes + 1) // 2  # tokens of one row in the cache, over the passes
        pairs = self.length * (self.length + 1) // 2
        size = element * (self.passes * (layers + head) + self.batch * seen * 2 * L * K * D)
        work = 2 * self.batch * (self.length * layers + self.passes * head) + self.batch * pairs * 4 * L * H * D
        return size, work


class Limits(NamedTuple):
    """What the machine can do at best: bytes read and operations of a matrix product, each in a second."""

    bandwidth: float
    rate: float

    def floor(self, demands: tuple[float, int]) -> tuple[float, str]:
        """The seconds without which it cannot be done, and what binds."""
        return max((demands[0] / self.bandwidth, "memory"), (demands[1] / self.rate, "arithmetic"))


def limits(machine: Machine, dtype: torch.dtype) -> dict[str, Callable[[], float]]:
    """Functions that give the bandwidth of reading (bytes/s) and the rate of a product (operations/s)."""
    n = 8192 if machine.is_gpu else 1024
    words = torch.zeros(2**28 if machine.is_gpu else 2**26, device=machine.device)  # passes every cache
    left, right = torch.randn(2, n, n, device=machine.device).to(dtype)
    read, multiply = machine.seconds(words.sum), machine.seconds(lambda: left @ right)
    return {"bandwidth": lambda: words.nbytes / read(), "rate": lambda: 2 * n**3 / multiply()}


def chosen(asked_prompts: Sequence[int] | None, new: int, asked_batches: Sequence[int] | None, config: reference.Config,
           element: int, machine: Machine, limit: Limits) -> tuple[list[Test], list[Test]]:  # fmt: skip
    """The tests to run, and those left out: by default, on a CPU, what takes longer than LONG a turn."""
    asked = asked_prompts is not None and asked_batches is not None
    tests = [Test(batch, 1, tokens) for tokens, batch in product(asked_prompts or PROMPTS, asked_batches or BATCHES)]
    tests += [Test(batch, new, 1) for batch in asked_batches or BATCHES] if new else []
    most = config.max_position_embeddings
    over = [test for test in tests if test.length > most]
    if refused := [test.name for test in over if test.writes or asked_prompts is not None]:
        raise ValueError(f"{refused[0]} is longer than the {most} tokens this model was made for; ask for fewer")
    tests = [test for test in tests if test not in over]
    if asked or machine.is_gpu:
        return tests, []
    least = Test(min(asked_batches or BATCHES), new, 1)  # one test runs in any case
    short = [t for t in tests if t == least or limit.floor(t.demands(config, element))[0] <= LONG]
    return short, [test for test in tests if test not in short]


def load(name: str, place: Path, backend: str, dtype: str | torch.dtype | None, machine: Machine, room: int) -> Model:
    """A provider by name: "llama", or a peer, with the model at `place`. `room` is the longest text it will read."""
    if name == "llama.cpp":
        shapes = reference.parameter_shapes(reference.Config.from_dict(open_checkpoint(place).config))
        parameters = sum(int(np.prod(shape)) for _, shape in shapes)
        return LlamaCpp(place, parameters, room, machine.threads, machine.is_gpu)
    if name == "llama" and backend == "reference":
        return ReferenceModel(place)
    if name == "llama":
        ours = TorchModel(
            name, LlamaForCausalLM.from_pretrained(place, dtype=dtype, device=machine.device, backend=backend)
        )
        with torch.inference_mode():
            ours.backend = "triton" if uses_triton(backend, next(ours.model.parameters())) else "torch"
        return ours
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    return TorchModel(name, model.to(machine.device))  # type: ignore[arg-type]


def place_for(name: str, checkpoint: Checkpoint, dtype: torch.dtype, stack: contextlib.ExitStack) -> Path:
    """Where a provider finds the model: transformers gets what it reads otherwise, or not at all, in its own layout."""
    if name != "transformers" or (checkpoint.path / "config.json").exists():
        return checkpoint.path
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype).save_pretrained(folder)
    return Path(folder)


def check(models: Sequence[Model], ids: np.ndarray) -> dict[str, float]:
    """The largest difference of each model's scores from the first one's, relative to the largest score.

    All read the same prompt, and with their caches the same tokens after it: those that the first finds likeliest.

    Raises:
        ValueError: one lies beyond its budget.
    """
    errors = dict.fromkeys((model.name for model in models[1:]), 0.0)
    first, *others = models
    prompt = ids[:1, :CHECKED]
    tokens: Any = None
    expected = _array(first.start(prompt))
    found = [_array(model.start(prompt)) for model in others]
    for step in range(CHECKED):
        for model, scores in zip(others, found, strict=True):
            error = float(np.abs(scores - expected).max() / np.abs(expected).max())
            errors[model.name] = max(error if error == error else np.inf, errors[model.name])
            budget = max(model.budget, first.budget)
            if errors[model.name] > budget:
                raise ValueError(
                    f"{first.name} ({first.backend}) and {model.name} do not compute the same: after {CHECKED + step} "
                    f"tokens their scores differ by {error:.2g} of the largest, and {budget:g} is allowed. "
                    "Nothing was timed"
                )
        tokens = expected.argmax(-1)[:, None]
        expected = _array(first.step(_like(first, tokens)))
        found = [_array(model.step(_like(model, tokens))) for model in others]
    return errors


def _array(scores: Any) -> np.ndarray:
    return scores.double().cpu().numpy() if isinstance(scores, torch.Tensor) else np.array(scores, np.float64)


def _like(model: Model, tokens: np.ndarray) -> Any:
    return torch.as_tensor(tokens, device=model.model.device) if isinstance(model, TorchModel) else tokens


def peers_for(asked: Sequence[str] | None, checkpoint: Checkpoint) -> list[str]:
    """The peers that were asked for, or those that are installed and can read the model.

    Raises:
        ValueError: one that is unknown, not installed, or cannot read it.
    """
    installed = [name for name, (module, _) in PEERS.items() if importlib.util.find_spec(module)]
    is_gguf = checkpoint.path.suffix.lower() == ".gguf"
    if asked is None:
        return [name for name in installed if name != "llama.cpp" or is_gguf]
    for name in asked:
        if name not in PEERS:
            raise ValueError(f"no peer is called {name!r}; there are {', '.join(PEERS)}")
        if name not in installed:
            there = f"; installed: {', '.join(installed)}" if installed else ""
            raise ValueError(f"{name} is not installed: pip install {PEERS[name][1]}{there}")
        if name == "llama.cpp" and not is_gguf:
            raise ValueError(f"llama.cpp reads .gguf files, and {checkpoint.path} is none; leave it out of --peers")
    return list(dict.fromkeys(asked))


def benchmark(
    where: str,
    backend: str = "auto",
    peers: Sequence[str] | None = None,
    prompts: Sequence[int] | None = None,
    new: int = NEW,
    batches: Sequence[int] | None = None,
    dtype: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    runs: int = 5,
    memory: bool = True,
    say: Callable[[str], object] = lambda words: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[dict[str, Any]]:
    """The rows of every test and provider, each as soon as it is measured. `say` gets what a reader should know."""
    checkpoint = open_checkpoint(where)
    names = ["llama", *peers_for(peers, checkpoint)]
    machine = Machine(device_for(device), threads or torch.get_num_threads(), clock)
    if not machine.is_gpu:
        say("No GPU is used: these are a CPU's figures, and no Triton kernel ran.")
    if backend == "reference" and (machine.is_gpu or dtype not in ("auto", "float32")):
        raise ValueError("the reference computes on a CPU in float32: leave --dtype out, and say --device cpu")
    if backend == "reference":
        dtype = "float32"
    config = reference.Config.from_dict(checkpoint.config)
    room = max(*(prompts or PROMPTS), new, 2 * CHECKED)
    with using(machine.threads), contextlib.ExitStack() as stack:
        models = [load("llama", checkpoint.path, backend, dtype, machine, room)]
        number = getattr(torch, models[0].dtype)
        places = {name: place_for(name, checkpoint, number, stack) for name in names}
        models += [load(name, places[name], backend, number, machine, room) for name in names[1:]]
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (max(batches or BATCHES), room))
        errors = check(models, ids)  # warms up, too
        best = limits(machine, number)
        known = Limits(*(max(values) for values in harness.take_turns(best, 3).values()))
        tests, left_out = chosen(prompts, new, batches, config, number.itemsize, machine, known)
        if left_out:
            long = ", ".join(f"{test.name} of {test.batch}" for test in left_out)
            say(f"Left out, for a turn takes over {LONG:.0f} s here: {long}. --prompt and --batch together ask for it.")
        for test in tests:
            able = [model for model in models if test.batch == 1 or not isinstance(model, LlamaCpp)]
            if len(able) < len(models):
                say(f"{test.name} of {test.batch}: llama.cpp is left out, for its binding reads one text at a time.")
            peaks = {model.name: peak(model, test, ids, places[model.name], backend, machine)
                     for model in able if memory}  # fmt: skip
            turns = {model.name: machine.seconds(partial(test.run, model, ids)) for model in able}
            measured = harness.take_turns(best | turns, runs)
            limit = Limits(max(measured["bandwidth"]), max(measured["rate"]))
            ours = statistics.median(measured["llama"])
            for model in able:
                floor, bound = limit.floor(test.demands(config, model.element))
                yield {
                    "model": checkpoint.path.name,
                    "test": test.name,
                    "batch": test.batch,
                    "provider": model.name,
                    "backend": model.backend,
                    "dtype": model.dtype,
                    "threads": None if machine.is_gpu else machine.threads,
                    "runs": runs,
                    **figures(test, measured[model.name], ours, floor),
                    "bound": bound,
                    "read_bandwidth_gbps": digits(limit.bandwidth / 1e9),
                    "product_tflops": digits(limit.rate / 1e12),
                    "peak_memory_mb": peaks.get(model.name),
                    "error": errors.get(model.name),
                }


@contextlib.contextmanager
def using(threads: int) -> Iterator[None]:
    """Within, PyTorch and NumPy's BLAS have so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def figures(test: Test, seconds: list[float], ours: float, floor: float) -> dict[str, Any]:
    """What the turns of one provider say. `ratio` is its median time over `ours`: above 1 we are faster."""
    spread, tokens = harness.spread(seconds), test.batch * test.length
    median = spread["median"]
    slow_to_fast = (("median", median), ("p10", spread["p90"]), ("p90", spread["p10"]))
    return {
        "tokens_per_s": {name: digits(tokens / second) for name, second in slow_to_fast},
        "ratio": round(median / ours, 3),
        "of_floor": round(floor / median, 3),
        "time_to_first_token_ms": None if test.writes else digits(1e3 * median),
    }


def digits(value: float) -> float:
    """Five digits of it."""
    return float(f"{value:.5g}")


def device_for(asked: str) -> torch.device:
    if asked == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if asked != "cpu" and not re.fullmatch(r"cuda(:\d+)?", asked):
        raise ValueError(f"no device is called {asked!r}; there are auto, cpu, cuda and cuda:1, cuda:2 ...")
    if asked != "cpu" and not torch.cuda.is_available():
        raise ValueError(f"PyTorch sees no GPU, and --device {asked} asks for one; figures of a GPU need a GPU")
    return torch.device(asked)


def peak(model: Model, test: Test, ids: np.ndarray, place: Path, backend: str, machine: Machine) -> int | None:
    """Megabytes: on a GPU the model's weights and the most that a test allocates beyond what was there; on a CPU the
    most that a process needs which loads this one provider and runs the test once."""
    if not machine.is_gpu:
        code = f"import sys, json; from {__name__} import alone; alone(**json.loads(sys.argv[1]))"
        what = {"name": model.name, "place": str(place), "backend": backend, "dtype": model.dtype,
                "threads": machine.threads, "test": list(test)}  # fmt: skip
        return round(harness.peak_memory([sys.executable, "-c", code, json.dumps(what)]) / 1e6)
    if not isinstance(model, TorchModel):
        return None
    torch.cuda.reset_peak_memory_stats(machine.device)
    before = torch.cuda.memory_allocated(machine.device)
    test.run(model, ids)
    return round((torch.cuda.max_memory_allocated(machine.device) - before + model.nbytes) / 1e6)


def alone(name: str, place: str, backend: str, dtype: str, threads: int, test: list[int]) -> None:
    """What the process does whose memory `peak` measures."""
    machine, wanted = Machine(torch.device("cpu"), threads), Test(*test)
    number = getattr(torch, dtype, None)  # llama.cpp has its own
    with using(threads):
        model = load(name, Path(place), backend, number, machine, wanted.length)
        wanted.run(model, np.arange(wanted.batch * wanted.tokens).reshape(wanted.batch, -1) % 256)


# -- for people -------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "test": lambda row: row["test"],
    "batch": lambda row: str(row["batch"]),
    "provider": lambda row: f"{row['provider']} ({row['backend']})",
    "dtype": lambda row: row["dtype"],
    "tokens/s": lambda row: f"{row['tokens_per_s']['median']:.5g}",
    "p10 - p90": lambda row: f"{row['tokens_per_s']['p10']:.4g} - {row['tokens_per_s']['p90']:.4g}",
    "theirs / ours": lambda row: f"{row['ratio']:.2f}",
    "of floor": lambda row: f"{row['of_floor']:.0%} ({row['bound']})",
    "peak MB": lambda row: "" if row["peak_memory_mb"] is None else str(row["peak_memory_mb"]),
    "first token, ms": lambda row: "" if (t := row["time_to_first_token_ms"]) is None else f"{t:.5g}",
}
WIDTHS = (6, 5, 20, 9, 8, 15, 13, 16, 7, 15)


def markdown(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A table of Markdown, line by line as the rows come."""
    for place, one in enumerate(rows):
        if place == 0:
            yield "| " + " | ".join(name.ljust(width) for name, width in zip(COLUMNS, WIDTHS, strict=True)) + " |"
            yield "|" + "|".join("-" * (width + 2) for width in WIDTHS) + "|"
        cells = (cell(one).ljust(width) for cell, width in zip(COLUMNS.values(), WIDTHS, strict=True))
        yield "| " + " | ".join(cells) + " |"


def comma_separated(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The same rows as CSV, every number in full; "tokens_per_s" becomes three columns."""
    for place, one in enumerate(rows):
        flat: dict[str, Any] = {}
        for key, value in one.items():
            flat |= {f"{key}_{name}": v for name, v in value.items()} if isinstance(value, dict) else {key: value}
        line = io.StringIO()
        writer = csv.DictWriter(line, list(flat), lineterminator="")
        if place == 0:
            csv.writer(line, lineterminator="\n").writerow(flat)
        writer.writerow(flat)
        yield line.getvalue()


FORMATS = {"md": markdown, "csv": comma_separated, "json": lambda rows: map(json.dumps, rows)}
