"""A whole model reading and writing text, against transformers and llama.cpp, interleaved: `llama bench model`.

    llama bench model smollm2                            # on a GPU if there is one
    llama bench model model.gguf --peers transformers,llama.cpp --prompt 512 --new 128 --batch 1,8

The tests have llama-bench's names. pp512 is prefill: it reads 512 tokens of every row at once and chooses the first new
one; compare tokens/s, and the time to the first token. tg128 is decode: it passes 128 tokens of every row through the
model one by one, from an empty cache, each the most likely after the one before; compare tokens/s. The tokens of all
rows count. "llama" and "transformers" are bare loops over forward; transformers-generate, transformers-compiled and
those named after a decoding mode ("llama static") are a whole `generate`, for tg only. Every provider runs a test once
as a warm-up, except a bare loop on a CPU that would take over two seconds.

`of_floor` is how close a provider comes to this machine's limit. The floor is the longer of two times: the bytes that
must be read (every matrix once per forward pass, and the cache) over the read bandwidth, and the operations (2 per
weight and token, 4 per pair of tokens, head and channel) over the rate of a square matrix product; `bound` says which.
Both rates are measured in the same rounds, on a GPU between two events on its stream; the tests by the wall clock, host
time included, as a waiting user sees it.

A provider that runs out of memory is left out of the test and reported. `error` is the largest difference of scores
from ours, relative to the largest score; for a whole `generate`, how far its tokens' scores are below the best.
"""

import contextlib
import csv
import importlib.util
import io
import json
import statistics
import subprocess
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

from llama import LlamaForCausalLM, decoding, reference
from llama.checkpoints import Checkpoint, open_checkpoint
from llama.ops import uses_triton
from llama.verify import BUDGET

from . import harness
from .harness import Limits

PROMPTS, NEW, BATCHES = (512, 4096), 128, (1, 8, 32)
DECODINGS = ("plain", "static", "graph")
BY_NAME = ("transformers-generate", "transformers-compiled")  # only if asked for
PEERS = {
    "transformers": ("transformers", "transformers"),
    "llama.cpp": ("llama_cpp", "llama-cpp-python"),
    **dict.fromkeys(BY_NAME, ("transformers", "transformers")),
}
LONG = 10.0  # seconds: tests that would take longer on a CPU run only if asked for
WARM = 2.0  # seconds: tests that would take longer on a CPU run without a warm-up
CHECKED = 8  # steps with the cache, after a prompt of as many tokens, checked before anything is timed
LLAMA_CPP_BUDGET = 0.25  # it rounds activations to 8 bits if weights are quantised: SmolLM2 in Q4_1 shows 0.11


class Model(Protocol):
    """A model with a cache of what it has read."""

    name: str
    backend: str
    dtype: str
    element: float  # bytes per weight
    budget: float  # how far its scores may be from the first provider's, relative to the largest

    def start(self, ids: np.ndarray) -> Any:
        """Clear the cache and read (B, T) ids; return the scores (B, V) of the next token."""

    def step(self, tokens: Any) -> Any:
        """Read one more token of each row, (B, 1); return the scores (B, V) of the next."""

    def forget(self) -> None:
        """Free the cache."""


class TorchModel:
    """Ours or transformers', which are called alike."""

    def __init__(self, name: str, model: Any):
        self.name, self.model = name, model
        self.backend = "torch"
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.element = model.dtype.itemsize
        self.budget = BUDGET[model.dtype]

    @property
    def nbytes(self) -> int:
        return sum(weight.nbytes for weight in self.model.parameters())

    def forget(self) -> None:
        self._cache = None

    @torch.inference_mode()
    def start(self, ids: np.ndarray) -> torch.Tensor:
        self.forget()
        return self.step(torch.as_tensor(ids, device=self.model.device))

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        out = self.model(tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return out.logits[:, -1]


class Generator(TorchModel):
    """A whole `generate`, ours or transformers', greedy and without end tokens. For tg tests only."""

    def __init__(self, name: str, model: Any, backend: str, **options: Any):
        super().__init__(name, model)
        self.backend, self.options = backend, options

    def write(self, ids: np.ndarray, new: int) -> torch.Tensor:
        """Generate (B, new) tokens after (B, T) ids."""
        kind = type(self.model.generation_config)
        before, self.model.generation_config = self.model.generation_config, kind(pad_token_id=0)  # without end tokens
        try:
            prompt = torch.as_tensor(ids, device=self.model.device)
            return self.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new,
                                       do_sample=False, **self.options)[:, ids.shape[1] :]  # fmt: skip
        finally:
            self.model.generation_config = before

    def forget(self) -> None:
        if self.name not in PEERS:
            decoding.release(self.model)


class ReferenceModel:
    """The NumPy reference."""

    name, backend, dtype, element, budget = "llama", "reference", "float32", 4.0, BUDGET[torch.float32]

    def __init__(self, place: Path):
        self.params, self.config = reference.load(place)

    def forget(self) -> None:
        self._cache = reference.KVCache(self.config.num_hidden_layers)

    def start(self, ids: np.ndarray) -> np.ndarray:
        self.forget()
        return self.step(ids)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        return reference.forward(self.params, self.config, tokens, cache=self._cache, logits_to_keep=1).logits[:, -1]


class LlamaCpp:
    """llama.cpp through llama-cpp-python, from a .gguf file; one text at a time."""

    name, backend, dtype, budget = "llama.cpp", "ggml", "as stored", LLAMA_CPP_BUDGET

    def __init__(self, path: Path, parameters: int, room: int, threads: int, gpu: bool):
        import llama_cpp  # type: ignore[import-not-found,unused-ignore]

        self.element = path.stat().st_size / parameters
        self.model = llama_cpp.Llama(str(path), n_ctx=room, n_batch=512, n_threads=threads, verbose=False,
                                     n_threads_batch=threads, n_gpu_layers=-1 if gpu else 0)  # fmt: skip

    def forget(self) -> None:
        self.model.reset()

    def start(self, ids: np.ndarray) -> np.ndarray:
        self.forget()
        return self.step(ids)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        self.model.eval([int(token) for token in tokens[0]])
        scores = self.model._ctx.get_logits()
        return np.ctypeslib.as_array(scores, shape=(self.model.n_vocab(),))[None]


class Machine(NamedTuple):
    """Where to run: the device, the number of threads, and the clock."""

    device: torch.device
    threads: int
    clock: Callable[[], float] = time.perf_counter

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def now(self) -> float:
        """The time once all queued work is done."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)
        return self.clock()

    def seconds(self, work: Callable[[], object]) -> Callable[[], float]:
        """A function that runs `work` and returns the seconds it took."""

        def measure() -> float:
            start = self.now()
            work()
            return self.now() - start

        return measure


class Test(NamedTuple):
    """A test of llama-bench: `passes` forward passes, each with `tokens` tokens of every row."""

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
        """Read the first tokens of `ids` (B, T), continue with the most likely ones, then free the cache."""
        if isinstance(model, Generator):
            model.write(ids[: self.batch, : self.tokens], self.passes)
            return
        tokens = model.start(ids[: self.batch, : self.tokens]).argmax(-1)
        for _ in range(self.passes - 1):
            tokens = model.step(tokens[:, None]).argmax(-1)
        model.forget()

    def demands(self, config: reference.Config, element: float) -> tuple[float, int]:
        """The bytes that must be read and the operations that must be done, with `element` bytes per weight."""
        L, E, F, V = config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size
        H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        layers = L * (2 * E * H * D + 2 * E * K * D + 3 * E * F)
        head = V * E  # only for the last token of a pass
        seen = self.tokens * self.passes * (self.passes + 1) // 2  # cached tokens of one row, summed over the passes
        pairs = self.length * (self.length + 1) // 2
        size = element * (self.passes * (layers + head) + self.batch * seen * 2 * L * K * D)
        work = 2 * self.batch * (self.length * layers + self.passes * head) + self.batch * pairs * 4 * L * H * D
        return size, work


def limits(machine: Machine, dtype: torch.dtype) -> dict[str, Callable[[], float]]:
    """Functions that measure the read bandwidth (bytes/s) and the rate of a matrix product (operations/s)."""
    clock = harness.CudaClock() if machine.is_gpu else harness.Clock(machine.clock)
    reading, multiplying = harness.reading(machine.device, clock), harness.multiplying(machine.device, dtype, clock)
    return {"bandwidth": reading, "rate": multiplying}


def chosen(asked_prompts: Sequence[int] | None, new: int, asked_batches: Sequence[int] | None, config: reference.Config,
           element: int, machine: Machine, limit: Limits) -> tuple[list[Test], list[Test]]:  # fmt: skip
    """The tests to run, and the default ones left out: those too long for the model and, on a CPU, those that would
    take longer than LONG."""
    asked = asked_prompts is not None and asked_batches is not None
    tests = [Test(batch, 1, tokens) for tokens, batch in product(asked_prompts or PROMPTS, asked_batches or BATCHES)]
    tests += [Test(batch, new, 1) for batch in asked_batches or BATCHES] if new else []
    most = config.max_position_embeddings
    over = [test for test in tests if test.length > most]
    if refused := [test.name for test in over if test.writes or asked_prompts is not None]:
        raise ValueError(f"{refused[0]} is longer than this model's maximum of {most} tokens; ask for fewer")
    tests = [test for test in tests if test not in over]
    if asked or machine.is_gpu:
        return tests, over
    least = Test(min(asked_batches or BATCHES), new, 1)  # one test always runs
    short = [t for t in tests if t == least or limit.floor(t.demands(config, element))[0] <= LONG]
    return short, over + [test for test in tests if test not in short]


def load(name: str, place: Path, backend: str, dtype: str | torch.dtype | None, machine: Machine, room: int) -> Model:
    """Load a provider, "llama" or a peer, with the model at `place`. `room` is the longest text it will read."""
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
    if name.startswith("llama "):  # one of the decoding modes
        model = LlamaForCausalLM.from_pretrained(place, dtype=dtype, device=machine.device, backend=backend)
        return generator(name, model, backend)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=dtype)
    model = model.to(machine.device)  # type: ignore[arg-type]
    return generator(name, model, "torch") if name in BY_NAME else TorchModel(name, model)


def generator(name: str, model: Any, backend: str) -> Generator:
    """A provider that uses a loaded model's `generate`: "llama static", "transformers-generate" ..."""
    if name == "transformers-compiled":
        import transformers

        how = transformers.CompileConfig(dynamic=False)  # compile each batch size separately
        how._compile_all_devices = True  # type: ignore[assignment]  # else only on a GPU
        return Generator(name, model, backend, cache_implementation="static", compile_config=how)
    return Generator(name, model, backend, **({} if name in PEERS else {"decoding": name.removeprefix("llama ")}))


def place_for(name: str, checkpoint: Checkpoint, dtype: torch.dtype, stack: contextlib.ExitStack) -> Path:
    """The provider's path to the model, converted for transformers if that would read it differently or not at all."""
    if not name.startswith("transformers") or (checkpoint.path / "config.json").exists():
        return checkpoint.path
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    LlamaForCausalLM.from_pretrained(checkpoint, dtype=dtype).save_pretrained(folder)
    return Path(folder)


def check(models: Sequence[Model], ids: np.ndarray) -> dict[str, float]:
    """The largest difference of each model's scores from the first one's, relative to the largest score.

    All read the same prompt, and with their caches the same tokens after it: the first one's most likely ones. A
    `Generator` continues the prompt; its error is how far the first one scores those tokens below its most likely.

    Raises:
        ValueError: a difference exceeds the budget.
    """
    errors = dict.fromkeys((model.name for model in models[1:]), 0.0)
    first = models[0]
    others = [model for model in models[1:] if not isinstance(model, Generator)]
    prompt = ids[:1, :CHECKED]
    tokens: Any = None

    def note(model: Model, error: float, length: int) -> None:
        errors[model.name] = max(error if error == error else np.inf, errors[model.name])
        budget = max(model.budget, first.budget)
        if errors[model.name] > budget:
            raise ValueError(
                f"{first.name} ({first.backend}) and {model.name} do not agree: after {length} tokens their "
                f"scores differ by {error:.2g}, relative to the largest, and {budget:g} is allowed. "
                "Nothing was timed"
            )

    expected = _array(first.start(prompt))
    found = [_array(model.start(prompt)) for model in others]
    for step in range(CHECKED):
        for model, scores in zip(others, found, strict=True):
            note(model, float(np.abs(scores - expected).max() / np.abs(expected).max()), CHECKED + step)
        tokens = expected.argmax(-1)[:, None]
        expected = _array(first.step(_like(first, tokens)))
        found = [_array(model.step(_like(model, tokens))) for model in others]
    for model in models:
        if isinstance(model, Generator):
            try:
                written = model.write(prompt, CHECKED).cpu().numpy()
            except RuntimeError as refused:  # by a compiler or a capture
                words = (str(refused).strip().splitlines() or [type(refused).__name__])[0]
                raise ValueError(f"{model.name} does not run here; leave it out: {words[:300]}") from refused
            expected = _array(first.start(prompt))
            for step in range(CHECKED):
                below = expected.max() - expected[0, written[0, step]]
                note(model, float(below / np.abs(expected).max()), CHECKED + step)
                expected = _array(first.step(_like(first, written[:, step : step + 1])))
    for model in models:
        model.forget()
    return errors


def _array(scores: Any) -> np.ndarray:
    return scores.double().cpu().numpy() if isinstance(scores, torch.Tensor) else np.array(scores, np.float64)


def _like(model: Model, tokens: np.ndarray) -> Any:
    return torch.as_tensor(tokens, device=model.model.device) if isinstance(model, TorchModel) else tokens


def peers_for(asked: Sequence[str] | None, checkpoint: Checkpoint) -> list[str]:
    """The peers that were asked for, or by default those that are installed and can read the model.

    Raises:
        ValueError: one is unknown, not installed, or cannot read it.
    """
    installed = [name for name, (module, _) in PEERS.items() if importlib.util.find_spec(module)]
    is_gguf = checkpoint.path.suffix.lower() == ".gguf"
    if asked is None:
        return [name for name in installed if name not in BY_NAME and (name != "llama.cpp" or is_gguf)]
    harness.known("peer", asked, PEERS)
    for name in asked:
        if name not in installed:
            there = f"; installed: {', '.join(installed)}" if installed else ""
            raise harness.NotHere(f"{name} is not installed: pip install {PEERS[name][1]}{there}")
        if name == "llama.cpp" and not is_gguf:
            raise ValueError(f"llama.cpp reads .gguf files, not {checkpoint.path}; leave it out of --peers")
    return list(dict.fromkeys(asked))


def ways(asked: Sequence[str], backend: str, machine: Machine) -> list[str]:
    """Our own `generate` as providers, one for each decoding mode that was asked for."""
    harness.known("decoding", asked, DECODINGS)
    if asked and backend == "reference":
        raise ValueError("the reference has only one decoding mode: leave out --decoding")
    if "graph" in asked and not machine.is_gpu:
        raise harness.NotHere("--decoding graph needs a GPU; static runs the same steps on any device")
    return [f"llama {name}" for name in dict.fromkeys(asked)]


def benchmark(
    where: str,
    backend: str = "auto",
    peers: Sequence[str] | None = None,
    decodings: Sequence[str] = (),
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
    """Yield the rows of every test and provider as soon as they are measured. `say` receives notes for the reader."""
    checkpoint = open_checkpoint(where)
    rivals = peers_for(peers, checkpoint)
    machine = Machine(harness.device_for(device), threads or torch.get_num_threads(), clock)
    names = ["llama", *ways(decodings, backend, machine), *rivals]
    if not machine.is_gpu:
        say("No GPU is used: these are CPU figures, and no Triton kernel ran.")
    if backend == "reference" and (machine.is_gpu or dtype not in ("auto", "float32")):
        raise ValueError("the reference computes on a CPU in float32: leave out --dtype, and use --device cpu")
    if backend == "reference":
        dtype = "float32"
    config = reference.Config.from_dict(checkpoint.config)
    room = max(*(prompts or PROMPTS), new, 2 * CHECKED)
    with using(machine.threads), contextlib.ExitStack() as stack:
        models = [load("llama", checkpoint.path, backend, dtype, machine, room)]
        number = getattr(torch, models[0].dtype)
        places = {name: place_for(name, checkpoint, number, stack) for name in names}
        for name in names[1:]:
            models.append(beside(name, models) or load(name, places[name], backend, number, machine, room))
        ids = np.random.default_rng(0).integers(0, config.vocab_size, (max(batches or BATCHES), room))
        errors = check(models, ids)  # also a warm-up
        best = limits(machine, number)
        known = Limits(*(max(values) for values in harness.take_turns(best, 3).values()))
        tests, left_out = chosen(prompts, new, batches, config, number.itemsize, machine, known)
        most = config.max_position_embeddings
        for why, some in (
            (f"the model's maximum is {most} tokens", [test for test in left_out if test.length > most]),
            (f"a run takes over {LONG:.0f} s here", [test for test in left_out if test.length <= most]),
        ):
            if some:
                long = ", ".join(f"{test.name} of {test.batch}" for test in some)
                asking = "" if some[0].length > most else " Pass both --prompt and --batch to run it."
                say(f"Left out because {why}: {long}.{asking}")
        for test in tests:
            able = [model for model in models if test.batch == 1 or not isinstance(model, LlamaCpp)]
            if len(able) < len(models):
                say(f"{test.name} of {test.batch}: llama.cpp is left out because its binding reads one text at a time.")
            able = [model for model in able if test.writes or not isinstance(model, Generator)]
            out: list[str] = []  # those out of memory
            run = partial(attempt, out)
            quick = machine.is_gpu or known.floor(test.demands(config, number.itemsize))[0] <= WARM
            if not quick:
                say(f"{test.name} of {test.batch}: no warm-up for forward because a run takes over {WARM:.0f} s here.")
            peaks = {model.name: run(model, partial(peak, model, test, ids, places[model.name], backend, machine))
                     for model in able if memory}  # fmt: skip
            for model in able:  # after the peaks, which free everything first, recordings too
                if quick or isinstance(model, Generator):  # which may have to compile or record
                    run(model, partial(test.run, model, ids))
            turns = {model.name: partial(run, model, machine.seconds(partial(test.run, model, ids)))
                     for model in able if model.name not in out}  # fmt: skip
            measured = harness.take_turns(best | turns, runs)
            for model in models:
                model.forget()
            for name in out:
                say(f"{test.name} of {test.batch}: {name} is left out because it ran out of memory.")
            able = [model for model in able if model.name not in out]
            limit = Limits(max(measured["bandwidth"]), max(measured["rate"]))
            ours = None if "llama" in out else statistics.median(measured["llama"])
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
                    "read_bandwidth_gbps": harness.digits(limit.bandwidth / 1e9),
                    "product_tflops": harness.digits(limit.rate / 1e12),
                    "peak_memory_mb": peaks.get(model.name),
                    "error": errors.get(model.name),
                }


def beside(name: str, models: Sequence[Model]) -> Generator | None:
    """A `Generator` on a model that is already loaded; None if there is none, or `name` is not a `Generator`."""
    if name not in BY_NAME and not name.startswith("llama "):
        return None
    base = "transformers" if name in BY_NAME else "llama"
    loaded = [model for model in models if isinstance(model, TorchModel) and model.name.startswith(base)]
    return generator(name, loaded[0].model, loaded[0].backend) if loaded else None


def attempt(out: list[str], model: Model, work: Callable[[], Any]) -> Any:
    """`work()`; if it runs out of memory, the model is added to `out` and skipped from then on."""
    if model.name in out:
        return None
    try:
        return work()
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as refused:
        if type(refused) is RuntimeError and "allocate memory" not in str(refused):
            raise
        out.append(model.name)
        model.forget()
    torch.cuda.empty_cache()  # a no-op without a GPU
    return None


@contextlib.contextmanager
def using(threads: int) -> Iterator[None]:
    """Give PyTorch and NumPy's BLAS this many threads, within the context."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


def figures(test: Test, seconds: list[float], ours: float | None, floor: float) -> dict[str, Any]:
    """The figures from one provider's runs. `ratio` is its median time over `ours`: above 1, ours is faster; None
    without a time of ours."""
    spread, tokens = harness.spread(seconds), test.batch * test.length
    median = spread["median"]
    slow_to_fast = (("median", median), ("p10", spread["p90"]), ("p90", spread["p10"]))
    return {
        "tokens_per_s": {name: harness.digits(tokens / second) for name, second in slow_to_fast},
        "ratio": None if ours is None else harness.digits(median / ours),
        "of_floor": harness.digits(floor / median),
        "time_to_first_token_ms": None if test.writes else harness.digits(1e3 * median),
    }


def peak(model: Model, test: Test, ids: np.ndarray, place: Path, backend: str, machine: Machine) -> int | None:
    """Peak memory in megabytes: on a GPU, of the model's weights and what the test allocates on top; on a CPU, of a
    process that loads this provider alone and runs the test once. None if it fails or cannot be measured."""
    if not machine.is_gpu:
        code = f"import sys, json; from {__name__} import alone; alone(**json.loads(sys.argv[1]))"
        what = {"name": model.name, "place": str(place), "backend": backend, "dtype": model.dtype,
                "threads": machine.threads, "test": list(test)}  # fmt: skip
        try:
            return round(harness.peak_memory([sys.executable, "-c", code, json.dumps(what)]) / 1e6)
        except subprocess.CalledProcessError:
            return None
    if not isinstance(model, TorchModel):
        return None
    model.forget()
    torch.cuda.reset_peak_memory_stats(machine.device)
    before = torch.cuda.memory_allocated(machine.device)
    test.run(model, ids)
    return round((torch.cuda.max_memory_allocated(machine.device) - before + model.nbytes) / 1e6)


def alone(name: str, place: str, backend: str, dtype: str, threads: int, test: list[int]) -> None:
    """The process whose memory `peak` measures."""
    machine, wanted = Machine(torch.device("cpu"), threads), Test(*test)
    number = getattr(torch, dtype, None)  # llama.cpp has its own
    with using(threads):
        model = load(name, Path(place), backend, number, machine, wanted.length)
        wanted.run(model, np.arange(wanted.batch * wanted.tokens).reshape(wanted.batch, -1) % 256)


# -- printing ---------------------------------------------------------------------------------------------------------

COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "test": lambda row: row["test"],
    "batch": lambda row: str(row["batch"]),
    "provider": lambda row: f"{row['provider']} ({row['backend']})",
    "dtype": lambda row: row["dtype"],
    "tokens/s": lambda row: f"{row['tokens_per_s']['median']:.5g}",
    "p10 - p90": lambda row: f"{row['tokens_per_s']['p10']:.4g} - {row['tokens_per_s']['p90']:.4g}",
    "theirs / ours": lambda row: "" if row["ratio"] is None else f"{row['ratio']:.2f}",
    "of floor": lambda row: f"{row['of_floor']:.0%} ({row['bound']})",
    "peak MB": lambda row: "" if row["peak_memory_mb"] is None else str(row["peak_memory_mb"]),
    "first token, ms": lambda row: "" if (t := row["time_to_first_token_ms"]) is None else f"{t:.5g}",
}
WIDTHS = (6, 5, 20, 9, 8, 15, 13, 16, 7, 15)


def markdown(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """A Markdown table, line by line as the rows come."""
    for place, one in enumerate(rows):
        if place == 0:
            names = [" - ".join(harness.between(one["runs"])) if name == "p10 - p90" else name for name in COLUMNS]
            yield "| " + " | ".join(name.ljust(width) for name, width in zip(names, WIDTHS, strict=True)) + " |"
            yield "|" + "|".join("-" * (width + 2) for width in WIDTHS) + "|"
        cells = (cell(one).ljust(width) for cell, width in zip(COLUMNS.values(), WIDTHS, strict=True))
        yield "| " + " | ".join(cells) + " |"


def comma_separated(rows: Iterable[dict[str, Any]]) -> Iterator[str]:
    """The same rows as CSV, in full precision; "tokens_per_s" becomes three columns."""
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
