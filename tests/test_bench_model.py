"""`llama bench model`: what it counts, what it refuses, and that no provider with different results is timed."""

import csv
import ctypes
import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoint_files import FIELDS, random_params, write_folder, write_gguf

from llama import LlamaForCausalLM, cli, reference
from llama.benchmarks import generation, harness
from llama.benchmarks.generation import Limits, Machine

CPU = Machine(torch.device("cpu"), 1)
SMALL = {"prompts": [8], "new": 4, "batches": [1, 2], "threads": 1, "runs": 2, "memory": False}
KEYS = {"model", "test", "batch", "provider", "backend", "dtype", "threads", "runs", "tokens_per_s", "ratio",
        "of_floor", "bound", "peak_memory_mb", "time_to_first_token_ms", "read_bandwidth_gbps", "product_tflops",
        "error"}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    params = {name: array / 8 for name, array in random_params().items()}
    return write_folder(tmp_path_factory.mktemp("bench") / "tiny", params)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run a command in this process; the result is (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["llama", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


def bench(folder, **options):
    return list(generation.benchmark(str(folder), **SMALL | options))


# L=2 E=64 F=32 V=12 H=4 K=2 D=16: a layer's matrices have 64·(64+32+32+64) + 3·64·32 = 18,432 weights, the head 768.
CONFIG = reference.Config.from_dict(FIELDS)


def test_reading_a_prompt_counts_every_matrix_once_and_half_of_all_pairs():
    size, work = generation.Test(3, 1, 8).demands(CONFIG, 2)
    assert size == 2 * (2 * 18_432 + 768 + 3 * 8 * 2 * 2 * 2 * 16)
    assert work == 2 * 3 * (8 * 2 * 18_432 + 768) + 3 * (8 * 9 // 2) * 4 * 2 * 4 * 16


def test_writing_counts_the_matrices_once_a_token_and_the_growing_cache():
    size, work = generation.Test(3, 4, 1).demands(CONFIG, 4)
    assert size == 4 * (4 * (2 * 18_432 + 768) + 3 * (1 + 2 + 3 + 4) * 2 * 2 * 2 * 16)
    assert work == 2 * 3 * 4 * (2 * 18_432 + 768) + 3 * (1 + 2 + 3 + 4) * 4 * 2 * 4 * 16


def test_the_weights_counted_are_those_that_the_model_has():
    model = LlamaForCausalLM(generation.LlamaForCausalLM.config_class(**FIELDS))
    matrices = sum(w.numel() for name, w in model.named_parameters() if w.dim() == 2 and "embed" not in name)
    size, _ = generation.Test(1, 1, 1).demands(CONFIG, 1)
    assert size == matrices + 2 * 2 * 2 * 16


@pytest.mark.parametrize(("rate", "floor"), [(1e3, (2.0, "arithmetic")), (1e6, (0.5, "memory"))])
def test_the_floor_is_the_longer_of_two_times(rate, floor):
    assert Limits(100.0, rate).floor((50, 2000)) == floor


def test_by_default_a_cpu_is_spared_what_takes_long_and_told_so(folder):
    config = reference.Config.from_dict(FIELDS | {"max_position_embeddings": 5000})
    slow = Limits(1e9, 5e8)  # pp512 takes 0.2 s per text, pp4096 9 s
    tests, left_out = generation.chosen(None, 128, None, config, 4, CPU, slow)
    assert [(test.name, test.batch) for test in left_out] == [("pp4096", 8), ("pp4096", 32)]
    assert {("pp512", 1), ("pp512", 32), ("pp4096", 1), ("tg128", 32)} <= {(test.name, test.batch) for test in tests}
    tests, left_out = generation.chosen([4096], 0, [32], config, 4, CPU, slow)  # requested explicitly
    assert [(test.name, test.batch) for test in tests] == [("pp4096", 32)]
    assert not left_out
    gpu = Machine(torch.device("cuda"), 1)
    assert len(generation.chosen(None, 128, None, config, 4, gpu, slow)[0]) == 9


def test_a_text_longer_than_the_model_allows_is_refused_when_asked_for():
    limit = Limits(1e12, 1e15)
    with pytest.raises(ValueError, match="pp33 is longer than this model's maximum of 32 tokens"):
        generation.chosen([33], 0, [1], CONFIG, 4, CPU, limit)
    with pytest.raises(ValueError, match="tg128 is longer than this model's maximum of 32 tokens"):
        generation.chosen(None, 128, [1], CONFIG, 4, CPU, limit)
    tests, _ = generation.chosen(None, 32, [1], CONFIG, 4, CPU, limit)  # the default prompts do not fit
    assert [test.name for test in tests] == ["tg32"]


class Ticking:
    """A clock that advances by one second per forward pass of ours and by two per pass of transformers."""

    def __init__(self, monkeypatch):
        self.time = 0.0
        step = generation.TorchModel.step

        def slow(model, tokens):
            self.time += 1 if model.name == "llama" else 2
            return step(model, tokens)

        monkeypatch.setattr(generation.TorchModel, "step", slow)

    def __call__(self):
        self.time += 1e-9
        return self.time


def test_rows_say_what_the_clock_said(folder, monkeypatch):
    rows = bench(folder, clock=Ticking(monkeypatch))
    assert [(row["test"], row["batch"], row["provider"]) for row in rows] == [
        (test, batch, provider) for test in ("pp8", "tg4") for batch in (1, 2) for provider in ("llama", "transformers")
    ]
    for row in rows:
        assert set(row) == KEYS
        assert (row["dtype"], row["threads"], row["runs"], row["backend"]) == ("float32", 1, 2, "torch")
        ours = row["provider"] == "llama"
        seconds = 1 if ours else 2  # per pass
        speed = row["batch"] * (8 if row["test"] == "pp8" else 1) / seconds
        assert row["tokens_per_s"] == {"median": speed, "p10": speed, "p90": speed}
        assert row["ratio"] == seconds
        assert row["time_to_first_token_ms"] == (1000 * seconds if row["test"] == "pp8" else None)
        assert (row["error"] is None) == ours
        assert ours or row["error"] < 1e-5


def test_of_floor_is_the_floor_over_the_median_time():
    found = generation.figures(generation.Test(2, 1, 8), [4.0, 5.0, 9.0], ours=10.0, floor=2.5)
    assert found == {
        "tokens_per_s": {"median": 3.2, "p10": digits(16 / 9), "p90": 4.0},
        "ratio": 0.5,
        "of_floor": 0.5,
        "time_to_first_token_ms": 5000.0,
    }


def test_a_floor_far_below_is_no_zero():
    found = generation.figures(generation.Test(2, 1, 8), [4.0], ours=None, floor=1e-6)
    assert (found["of_floor"], found["ratio"]) == (2.5e-7, None)


def digits(value):
    return float(f"{value:.5g}")


def test_whole_generates_stand_beside_the_loops_and_only_write(folder):
    rows = bench(folder, decodings=["plain", "static"], peers=["transformers", "transformers-generate"], batches=[2])
    assert [(row["test"], row["provider"]) for row in rows] == [
        ("pp8", "llama"), ("pp8", "transformers"),
        *(("tg4", name) for name in ("llama", "llama plain", "llama static", "transformers", "transformers-generate")),
    ]  # fmt: skip
    assert all(row["error"] < 1e-5 for row in rows if row["provider"] != "llama")


def test_a_whole_generate_writes_on_past_end_tokens_and_leaves_the_model_as_it_was(folder):
    model = LlamaForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = list(range(FIELDS["vocab_size"]))
    before = model.generation_config
    assert generation.generator("llama static", model, "torch").write(np.ones((2, 1), int), 5).shape == (2, 5)
    assert model.generation_config is before


def test_the_compiled_peer_has_a_static_cache_and_code_for_each_batch(folder):
    options = generation.generator("transformers-compiled", LlamaForCausalLM.from_pretrained(folder), "torch").options
    assert options["cache_implementation"] == "static"
    assert options["compile_config"].dynamic is False


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        (lambda ids, new: torch.zeros(1, new, dtype=torch.long), "llama static do not agree"),
        (None, "llama static does not run here; leave it out: no compiler"),
    ],
)
def test_who_writes_something_else_or_nothing_is_not_timed(folder, monkeypatch, broken, words):
    def fail(ids, new):
        raise RuntimeError("no compiler\nand much more")

    made = generation.generator

    def generator(*arguments):
        one = made(*arguments)
        one.write = broken or fail
        return one

    monkeypatch.setattr(generation, "generator", generator)
    with pytest.raises(ValueError, match=words):
        bench(folder, decodings=["static"], peers=[])


@pytest.mark.parametrize("who", ["llama", "transformers"])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("can't allocate memory: you")]
)
def test_who_has_no_room_is_left_out_of_that_test_and_gives_up_its_cache(folder, monkeypatch, who, error):
    step, said, models = generation.TorchModel.step, [], set()

    def narrow(model, tokens):
        models.add(model)
        if model.name == who and len(tokens) == 2:
            raise error
        return step(model, tokens)

    monkeypatch.setattr(generation.TorchModel, "step", narrow)
    rows = bench(folder, new=0, say=said.append)
    left = {"llama", "transformers"} - {who}
    assert [(row["batch"], row["provider"]) for row in rows] == [(1, "llama"), (1, "transformers"), (2, *left)]
    assert (rows[-1]["ratio"] is None) == (who == "llama")
    assert any(f"pp8 of 2: {who} is left out because it ran out of memory" in words for words in said)
    assert [model._cache for model in models] == [None, None]


def test_another_error_is_no_lack_of_room(folder):
    def fail():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        generation.attempt([], SimpleNamespace(name="x"), fail)


def test_memory_on_a_gpu_is_read_when_the_cache_of_the_run_before_is_gone(folder, monkeypatch):
    model = generation.load("llama", folder, "torch", torch.float32, CPU, 16)
    model._cache, seen = "of the run before", []

    def allocated(device):
        seen.append(model._cache)
        return 10**6

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 10**6)
    machine = Machine(torch.device("cuda"), 1)
    test = generation.Test(1, 1, 8)
    found = generation.peak(model, test, np.ones((1, 8), int), folder, "torch", machine)
    assert (seen, found) == ([None], round(2 + model.nbytes / 1e6))


@pytest.mark.parametrize(("patience", "extra"), [(1e9, 1), (0.0, 0)])
def test_everybody_runs_a_test_once_before_the_clock_does(folder, monkeypatch, patience, extra):
    run, ran, said = generation.Test.run, [], []
    monkeypatch.setattr(generation, "WARM", patience)
    monkeypatch.setattr(
        generation.Test, "run", lambda test, model, ids: (ran.append(model.name), run(test, model, ids))
    )
    bench(folder, new=0, batches=[1], say=said.append)
    assert ran.count("llama") == ran.count("transformers") == SMALL["runs"] + extra
    assert any("no warm-up for forward" in words for words in said) == (not extra)


def test_the_limits_of_a_gpu_are_timed_on_the_gpu(monkeypatch):
    class Events(harness.Clock):
        def __call__(self, call, before=None):
            return 0.5

    monkeypatch.setattr(harness, "CudaClock", Events)
    machine = SimpleNamespace(is_gpu=True, device=CPU.device, clock=pytest.fail)
    found = {name: measure() for name, measure in generation.limits(machine, torch.float32).items()}
    assert found == {"bandwidth": 2 * 2**28, "rate": 4 * 1024**3}


def test_usual_prompts_that_are_too_long_are_named(folder):
    said = []
    rows = bench(folder, prompts=None, batches=[1], peers=[], say=said.append)
    assert [row["test"] for row in rows] == ["tg4"]
    assert "Left out because the model's maximum is 32 tokens: pp512 of 1, pp4096 of 1." in said


def test_nothing_to_measure_is_a_sentence_and_clocks_are_read_afterwards(folder, tmp_path, run, monkeypatch):
    order = []

    def rows(where, **_):
        order.append("measured")
        yield from kept

    monkeypatch.setattr(generation, "benchmark", rows)
    monkeypatch.setattr(harness, "header", lambda *_, **more: order.append(more) or {"command": "c", "device": "d"})
    kept = []
    code, out, err = run("bench", "model", folder, "--out", tmp_path / "rows.jsonl")
    assert (code, out, order) == (1, "", ["measured"])
    assert "nothing was measured" in err
    assert not list(tmp_path.iterdir())
    kept = [{"threads": None, "test": "pp8"}]
    assert run("bench", "model", folder, "--format", "json")[0] == 0
    assert order[1:] == ["measured", {"gpu": True}]


@pytest.mark.parametrize("change", [lambda w: w.mul_(1.5), lambda w: w.fill_(float("nan"))])
def test_who_computes_something_else_is_not_timed(folder, monkeypatch, change):
    load = generation.load

    def broken(name, *arguments):
        model = load(name, *arguments)
        if name == "transformers":
            with torch.no_grad():
                change(model.model.model.layers[1].mlp.down_proj.weight)
        return model

    monkeypatch.setattr(generation, "load", broken)
    with pytest.raises(ValueError, match=r"llama \(torch\) and transformers do not agree: after \d+ tokens"):
        bench(folder)


def test_a_wrong_cache_is_noticed_too(folder, monkeypatch):
    @torch.inference_mode()
    def forgetful(self, tokens):
        out = self.model(tokens, use_cache=True, logits_to_keep=1)
        return out.logits[:, -1]

    models = [generation.load("llama", folder, "torch", torch.float32, CPU, 16) for _ in range(2)]
    models[1].step = forgetful.__get__(models[1])
    ids = np.arange(32).reshape(1, -1) % FIELDS["vocab_size"]
    with pytest.raises(ValueError, match="after 9 tokens"):
        generation.check(models, ids)


def test_the_reference_can_stand_on_our_side(folder):
    rows = bench(folder, backend="reference", peers=["transformers"], batches=[2])
    assert [row["backend"] for row in rows] == ["reference", "torch", "reference", "torch"]
    assert all(row["error"] < 1e-5 for row in rows[1::2])


def test_bfloat16_is_compared_within_its_own_budget(folder):
    assert {row["dtype"] for row in bench(folder, dtype="bfloat16", batches=[1])} == {"bfloat16"}


def test_memory_is_that_of_a_process_of_its_own(folder):
    row, *_ = bench(folder, peers=[], new=0, batches=[1], memory=True)
    assert row["peak_memory_mb"] > 50  # a Python process with PyTorch needs at least this


class Llama:
    """The part of llama_cpp.Llama that is used, backed by our own model."""

    def __init__(self, path, **options):
        assert options["n_threads"] == 1
        self.inner = LlamaForCausalLM.from_pretrained(path)
        self._ctx = SimpleNamespace(get_logits=self.get_logits)

    def n_vocab(self):
        return FIELDS["vocab_size"]

    def reset(self):
        self.cache = None

    def eval(self, tokens):
        out = self.inner(torch.tensor([tokens]), past_key_values=self.cache)
        self.cache, self.scores = out.past_key_values, out.logits[0, -1].detach().numpy()

    def get_logits(self):
        return self.scores.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


def test_a_gguf_file_goes_to_llama_cpp_as_it_is_and_to_transformers_in_its_own_layout(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "tiny.gguf", {name: array / 8 for name, array in random_params().items()})
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama, __spec__=object()))
    said = []
    rows = bench(path, say=said.append)
    assert [row["provider"] for row in rows if row["test"] == "tg4"] == [
        "llama", "transformers", "llama.cpp", "llama", "transformers"
    ]  # fmt: skip
    assert all(row["error"] < 1e-5 for row in rows if row["provider"] != "llama")
    assert any("tg4 of 2: llama.cpp is left out" in words for words in said)


def test_the_command_prints_every_format_and_keeps_json_lines(folder, tmp_path, run):
    out = tmp_path / "kept" / "model.jsonl"
    small = ("bench", "model", folder, "--prompt", "8", "--new", "4", "--batch", 1, "--runs", 1, "--no-memory",
             "--threads", 1, "--device", "cpu")  # fmt: skip
    code, printed, said = run(*small, "--out", out)
    assert code == 0
    assert "No GPU is used: these are CPU figures" in said
    head, line, *rows = printed.splitlines()
    assert head.startswith("| test ")
    assert set(line) == {"|", "-"}
    assert [row.split("|")[3].strip() for row in rows] == ["llama (torch)", "transformers (torch)"] * 2
    header, *kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert {"command", "date", "device", "driver", "clocks", "versions"} <= set(header)
    assert header["command"].startswith(f"llama bench model {folder}")
    assert [set(row) for row in kept] == [KEYS] * 4

    code, printed, _ = run(*small, "--format", "json", "--peers", "transformers")
    assert [set(json.loads(line)) for line in printed.splitlines()] == [KEYS] * 4
    code, printed, _ = run(*small, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(printed)))
    assert [row["test"] for row in rows] == ["pp8", "pp8", "tg4", "tg4"]
    assert float(rows[0]["tokens_per_s_p10"]) == float(rows[0]["tokens_per_s_p90"]) > 0


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--peers", "vllm"], 2, "unknown peer 'vllm'; choose from transformers, llama.cpp"),
        (["--peers", "llama.cpp"], 2, "llama.cpp is not installed: pip install llama-cpp-python; installed: transf"),
        (["--device", "tpu"], 2, "unknown device 'tpu'; choose from auto, cpu, cuda"),
        (["--device", "cuda"], 2, "--device cuda needs a GPU, and PyTorch finds none"),
        (["--decoding", "statik"], 2, "unknown decoding 'statik'; did you mean static? Choose from plain, static,"),
        (["--decoding", "graph"], 2, "--decoding graph needs a GPU"),
        (["--decoding", "static", "--backend", "reference"], 1, "leave out --decoding"),
        (["--prompt", "8,x"], 2, "'8,x' is not a list of numbers like 1,8,32"),
        (["--batch", "0"], 2, "'0' is not a list of numbers"),
        (["--prompt", "33", "--batch", "1"], 1, "pp33 is longer than this model's maximum of 32 tokens"),
        (["--backend", "reference", "--dtype", "float16"], 1, "the reference computes on a CPU in float32"),
    ],
)
def test_wrong_input_is_a_sentence_and_touches_no_file(folder, tmp_path, run, monkeypatch, options, code, words):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = generation.importlib.util.find_spec
    monkeypatch.setattr(generation.importlib.util, "find_spec", lambda name: name != "llama_cpp" and found(name))
    kept = tmp_path / "results.jsonl"
    kept.write_text("what was measured before")
    ended, out, err = run("bench", "model", folder, "--new", "4", *options, "--out", kept)
    assert ended == code
    assert words in " ".join(err.split())
    assert not out
    assert kept.read_text() == "what was measured before"


def test_llama_cpp_is_not_offered_what_it_cannot_read(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", SimpleNamespace(Llama=Llama, __spec__=object()))
    assert {row["provider"] for row in bench(folder, batches=[1])} == {"llama", "transformers"}
    with pytest.raises(ValueError, match=r"llama\.cpp reads \.gguf files, not .*tiny;"):
        bench(folder, peers=["llama.cpp"])
