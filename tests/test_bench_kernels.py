"""`llama bench kernels`: what it counts, trusts and prints. The timings themselves are not tested.

The clock is a fake, or the CPU's. Kernels run in Triton's interpreter, so the GPU's code paths are exercised.
"""

import importlib
import inspect
import json
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from numerics import DEVICE
from torch.nn import functional as F

from llama import reference, static
from llama.benchmarks import harness, kernels, peers, shapes
from llama.cli import cli
from llama.machine_code import occupancy, roofline

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
KEYS = {"op", "model", "shape", "dtype", "provider", "median_us", "p10_us", "p90_us", "best_us", "bytes", "flops",
        "of_limit", "error", "ratio", "cache", "graph"}  # fmt: skip
TINY = {"E": 64, "F": 96, "H": 4, "K": 2, "D": 16, "V": 101}
EVEN = dict.fromkeys(shapes.DTYPES, harness.Limits(1e9, 1e12))  # bytes/s, FLOP/s


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(shapes.MODELS, "tiny", TINY)


def tiny_cases(ops=shapes.COSTS, dtypes=("float32",), T=5, B=2):
    return shapes.cases(ops, ["tiny"], dtypes, {None: [(B, T)], "decode_attention": [(B, 128)]})


def one_case(op, **more):
    return tiny_cases([op], **more)[0]


class FakeTime:
    """A clock that only advances when told to."""

    def __init__(self):
        self.now = 0.0

    def taking(self, seconds, call=lambda: None):
        def slow():
            self.now += seconds
            return call()

        return slow

    def clock(self, kind=harness.Clock):
        return kind(lambda: self.now)


class WithGraphs(harness.Clock):
    graphs = True


def measured(case, calls, given, clock, limits=EVEN, flush=lambda: None):
    """Return the rows by provider, and the providers left out."""
    made = list(kernels.measure(case, calls, given, limits, clock, flush))
    left = [one for one in made if isinstance(one, kernels.Left)]
    return {row["provider"]: row for row in made if isinstance(row, dict)}, left


# -- what is counted -----------------------------------------------------------------------------------------------


def test_every_public_kernel_is_measured():
    public = set()
    for path in (ROOT / "kernels").glob("*.py"):
        module = importlib.import_module(f"llama.kernels.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and inspect.isfunction(getattr(reference, name, None)):
                public.add(name)
    assert set(shapes.COSTS) == public


@pytest.mark.parametrize(
    ("op", "model", "place", "moved", "flops"),
    [
        ("rms_norm", "8b", (1, 4096), 2 * 4096 * 4096 * 2 + 8192, 67_108_864),
        ("add_rms_norm", "70b", (1, 1), 65_536 + 16_384, 40_960),
        ("apply_rope", "8b", (1, 1024), 20_971_520 + 524_288, 15_728_640),
        ("apply_rope_to_cache", "7b", (2, 1), 98_304 + 512 + 16, 49_152),
        ("swiglu", "8b", (1, 16384), 1_409_286_144, 1_409_286_144),
        ("gemv", "8b", (1, 1), 8_192 + 50_331_648 + 12_288, 50_331_648),
        ("gemv_swiglu", "8b", (4, 1), 32_768 + 234_881_024 + 114_688, 939_524_096 + 344_064),
        ("flash_attention", "7b", (1, 4096), 134_217_728, 4 * 32 * 128 * 8_390_656),
        ("decode_attention", "8b", (1, 8192), 33_554_432 + 16_384 + 8, 134_217_728),
        ("cross_entropy", "7b", (1, 512), 32_768_000 + 4_096 + 4, 65_536_000),
        ("linear_cross_entropy", "8b", (1, 1), 8_192 + 1_050_673_152 + 12, 1_050_673_152 + 513_024),
    ],
)
def test_costs_are_those_counted_by_hand(op, model, place, moved, flops):
    case = shapes.cases([op], [model], ["bfloat16"], {None: [place]})[0]
    assert (case.moved, case.flops) == (moved, flops)


def test_queries_that_come_late_see_all_before_them():
    flops = shapes.COSTS["flash_attention"].flops
    assert flops(B=1, T=2, S=5, H=1, D=1) == 4 * (4 + 5)
    assert flops(B=3, T=1, S=7, H=2, D=8) == shapes.COSTS["decode_attention"].flops(B=3, S=7, H=2, D=8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bytes_are_those_of_the_tensors_themselves(tiny, dtype):
    for case in tiny_cases(dtypes=[dtype]):
        given = peers.inputs(case, CPU)
        made = peers.outputs(case, given, peers.ours(case, given, "torch"))
        caches = ("k_cache", "v_cache") if case.op == "apply_rope_to_cache" else ()
        read = [x for name, x in given.items() if isinstance(x, torch.Tensor) and name not in caches]
        assert case.moved == sum(x.nbytes for x in [*read, *made]), case


def test_the_grids_reach_from_one_token_to_thousands():
    for models in (["7b"], ["8b"], ["70b"]):
        made = shapes.cases(shapes.COSTS, models, ["bfloat16"], shapes.GPU)
        assert {case.op for case in made} == set(shapes.COSTS)
        sizes = {max(case.shape["T"], case.shape.get("S", 1)) for case in made}
        assert {min(sizes), max(sizes)} == {1, 16384}
        assert {1, 8, 64} <= {case.shape["B"] for case in made}
        assert any("page" in case.shape for case in made)
        assert any("masked" in case.shape for case in made)


def test_gemv_is_for_few_rows():
    made = shapes.cases(["gemv"], ["8b"], ["float16"], {None: [(1, 1)]}, tokens=[1, 512], batches=[4, 64])
    assert [(case.shape["B"], case.shape["T"]) for case in made] == [(4, 1)]
    with pytest.raises(ValueError, match="up to 4 rows"):
        kernels.plan(["gemv"], batches=[64], device="cpu")


def test_models_of_one_shape_share_it():
    names = [case.model for case in shapes.cases(["rms_norm"], ["7b", "8b", "70b"], ["float16"], {None: [(1, 1)]})]
    assert names == ["7b/8b", "70b"]


def test_what_is_given_replaces_the_grid():
    made = shapes.cases(["swiglu"], ["8b"], ["float16"], shapes.GPU, tokens=[3, 5], batches=[2])
    assert [(case.shape["B"], case.shape["T"]) for case in made] == [(2, 3), (2, 5)]


# -- how it is measured --------------------------------------------------------------------------------------------


def test_spread_of_ten():
    assert harness.spread([5, 1, 2, 3, 4, 6, 7, 8, 9, 10]) == {"median": 5.5, "p10": 2, "p90": 9, "best": 1}
    assert harness.spread([3.0]) == dict.fromkeys(("median", "p10", "p90", "best"), 3.0)


def test_what_comes_before_is_not_timed():
    time = FakeTime()
    assert time.clock()(time.taking(2.0), before=time.taking(100.0)) == 2.0


def test_a_row_says_how_long_how_much_and_how_near(tiny):
    time, case = FakeTime(), one_case("rms_norm")
    given = peers.inputs(case, CPU)
    calls = {name: time.taking(seconds, peers.ours(case, given, "torch"))
             for name, seconds in (("torch", 1e-5), ("eager", 3e-5))}  # fmt: skip
    rows, left = measured(case, calls, given, time.clock(), flush=time.taking(1.0))
    assert not left
    ours, theirs = rows["torch"], rows["eager"]
    assert ours.keys() == KEYS | {"gbps", "runs"}
    assert case.moved == 2 * 2 * 5 * 64 * 4 + 64 * 4 == 5376
    assert (ours["median_us"], ours["ratio"], ours["gbps"], ours["of_limit"]) == (10, 1, 0.5376, 0.5376)
    assert (theirs["best_us"], theirs["p90_us"], theirs["ratio"]) == (30, 30, 3)
    assert ours["runs"] == 30
    assert time.now > 2 * 30  # the flush before every run is not counted
    assert (ours["cache"], ours["graph"]) == ("cold", False)
    assert 0 < ours["error"] < 1e-6


def test_what_multiplies_is_held_against_a_product(tiny):
    time, case = FakeTime(), one_case("linear_cross_entropy")
    given = peers.inputs(case, CPU)
    limits = {"float32": harness.Limits(1e12, 1e9)}
    calls = {"torch": time.taking(1e-3, peers.ours(case, given, "torch"))}
    rows, _ = measured(case, calls, given, time.clock(), limits)
    assert case.flops == 2 * 10 * 64 * 101 + 4 * 10 * 101 == 133_320
    assert (rows["torch"]["tflops"], rows["torch"]["of_limit"]) == (0.0001333, 0.1333)
    assert kernels.floor(one_case("swiglu"), limits)[1] == "memory"


def test_small_shapes_run_in_a_graph_and_say_so(tiny):
    time, case = FakeTime(), one_case("swiglu")
    given = peers.inputs(case, CPU)
    calls = {"triton": time.taking(2e-6, peers.ours(case, given, "torch"))}
    fast = {"float32": harness.Limits(1e12, 1e12)}
    rows, _ = measured(case, calls, given, time.clock(WithGraphs), fast, flush=pytest.fail)
    assert (rows["triton"]["graph"], rows["triton"]["cache"]) == (True, "warm")
    assert rows["triton"]["median_us"] == 2  # a replay runs it 20 times
    rows, _ = measured(case, calls, given, time.clock(WithGraphs), EVEN)
    assert (rows["triton"]["graph"], rows["triton"]["cache"]) == (False, "cold")


def test_who_cannot_be_in_a_graph_is_timed_without_one(tiny):
    class Picky(WithGraphs):
        def repeated(self, call, times):
            return None if call is waiting else super().repeated(call, times)

    time, case = FakeTime(), one_case("swiglu")
    given = peers.inputs(case, CPU)
    waiting = time.taking(8e-6, peers.ours(case, given, "torch"))
    calls = {"triton": time.taking(2e-6, peers.ours(case, given, "torch")), "peer": waiting}
    fast = {"float32": harness.Limits(1e12, 1e12)}
    rows, left = measured(case, calls, given, time.clock(Picky), fast, flush=time.taking(1.0))
    assert not left
    assert [(row["median_us"], row["graph"], row["cache"], row["ratio"]) for row in rows.values()] == [
        (2, True, "warm", 1), (8, False, "cold", None)
    ]  # fmt: skip
    assert kernels.line(rows["peer"])


@pytest.mark.parametrize("waits", [False, True])
def test_what_waits_for_the_gpu_is_never_captured(monkeypatch, waits):
    """With a stub of torch.cuda. A call that synchronises would break a capture; sync debug mode finds it."""
    said, mode = [], ["default"]

    class Within:
        def __init__(self, *_):
            pass

        def __enter__(self):
            said.append("within")

        def __exit__(self, *_):
            pass

    def call():
        said.append("call")
        if waits and mode[-1] == "error":
            raise RuntimeError("called a synchronizing CUDA operation")

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "Stream": lambda: stream, "current_stream": lambda: stream, "stream": Within, "graph": Within,
        "CUDAGraph": lambda: types.SimpleNamespace(replay="replay"),
        "get_sync_debug_mode": lambda: "default", "set_sync_debug_mode": mode.append,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    assert harness.CudaClock().repeated(call, 2) == (None if waits else "replay")
    assert said == ["within", *["call"] * 4, *([] if waits else ["within", "call", "call"])]
    assert mode == ["default", "error", "default"]


@pytest.mark.parametrize(("known", "flushed"), [(4 * 2**20, 2**29), (50 * 2**20, 2**29), (2**30, 2**31)])
def test_what_is_written_over_is_more_than_any_last_cache(monkeypatch, known, flushed):
    """On an MI300, PyTorch reports the 4 MB of one die, with 256 MB behind them."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: types.SimpleNamespace(L2_cache_size=known))
    monkeypatch.setattr(torch, "empty", lambda size, **_: types.SimpleNamespace(zero_=lambda: size))
    assert kernels.flusher(torch.device("cuda"))() == flushed


def test_no_gradients_are_off_for_whoever_reads_the_rows(tiny):
    case = one_case("rms_norm")
    given = peers.inputs(case, CPU)
    for _ in kernels.measure(case, {"torch": peers.ours(case, given, "torch")}, given, EVEN, harness.Clock(), int):
        assert torch.is_grad_enabled()


def test_a_gpu_is_asked_by_its_uuid(monkeypatch):
    asked = []

    def run(command, **_):
        asked.extend(command)
        return types.SimpleNamespace(stdout="570.1, 1980 MHz, 1980 MHz, 2619 MHz, 700.00 W\n")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid=f"abc-{index}"))
    monkeypatch.setattr(harness.subprocess, "run", run)
    assert harness._nvidia(1)["driver"] == "570.1"
    assert "--id=GPU-abc-1" in asked


def test_the_gpu_that_was_asked_for_becomes_the_current_one(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert harness.device_for("cuda:1") == torch.device("cuda:1")
    assert current == [torch.device("cuda:1")]
    with pytest.raises(ValueError, match="there is no device 'cuda:2'; choose from cuda:0, cuda:1"):
        harness.device_for("cuda:2")


def test_on_a_gpu_events_stand_around_the_call(monkeypatch):
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            said.append("event")

        def synchronize(self):
            said.append("wait")

        def elapsed_time(self, end):
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: said.append("sleep"))
    seconds = harness.CudaClock()(lambda: said.append("call"), before=lambda: said.append("flush"))
    assert seconds == 0.25
    assert said == ["flush", "sleep", "event", "call", "event", "wait"]


# -- which providers are trusted -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_kernels_agree(tiny, dtype):
    for case in tiny_cases(dtypes=[dtype]):
        given = peers.inputs(case, DEVICE)
        right = peers.truth(case, given)
        assert (
            peers.error(right, peers.outputs(case, given, peers.ours(case, given, "triton"))) <= kernels.AGREES[dtype]
        )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_peer_here_agrees(tiny, dtype):
    names = [name for name in peers.here(CPU) if name != "compile"]
    for case in tiny_cases(dtypes=[dtype]):
        given = peers.inputs(case, CPU)
        calls = peers.providers(case, given, "torch", names)
        right = peers.truth(case, given)
        for name, call in calls.items():
            assert peers.error(right, peers.outputs(case, given, call)) <= kernels.AGREES[dtype], (case, name)
        attends = case.op.endswith("attention")
        assert calls.keys() >= {"torch", "eager", *(["sdpa-flash", "sdpa-math"] if attends else [])}


def test_a_compiled_peer_is_built_for_the_shape(tiny, monkeypatch):
    built = []

    def compile(function, fullgraph, dynamic):
        built.append((fullgraph, dynamic))
        return function

    monkeypatch.setattr(torch, "compile", compile)
    case = one_case("add_rms_norm")
    given = peers.inputs(case, CPU)
    call = peers.providers(case, given, "torch", ["compile"])["compile"]
    assert built == [(True, False)]
    assert peers.error(peers.truth(case, given), peers.outputs(case, given, call)) < 1e-6


def wrong_by(case, given, change):
    def call():
        results = peers.ours(case, given, "torch")()
        change(results[0] if isinstance(results, tuple) else results)
        return results

    return call


@pytest.mark.parametrize(
    "change",
    [
        lambda y: y.view(-1)[3].add_(1e-3),
        lambda y: y.mul_(1.0005),  # what TensorFloat-32 would do
        lambda y: y[0, 40].zero_(),  # a row that the reference does not check
        lambda y: y[1, 40].fill_(float("nan")),
    ],
)
def test_who_computes_something_else_is_named_and_not_timed(tiny, change):
    case = one_case("rms_norm", T=100)
    given = peers.inputs(case, CPU)
    calls = {"torch": peers.ours(case, given, "torch"), "wrong": wrong_by(case, given, change)}
    rows, left = measured(case, calls, given, harness.Clock())
    assert rows.keys() == {"torch"}
    assert [(one.provider, one.wrong) for one in left] == [("wrong", True)]
    assert "is allowed" in left[0].words()


@pytest.mark.parametrize("place", [(0, 0), (1, 55), (0, 99), (1, 99)])
def test_the_reference_looks_at_both_ends_and_the_middle(tiny, place):
    case = one_case("add_rms_norm", T=100)
    given = peers.inputs(case, CPU)
    right, results = peers.truth(case, given), peers.outputs(case, given, peers.ours(case, given, "torch"))
    assert peers.error(right, results) < 1e-6
    results[1][place] += 1
    assert peers.error(right, results) > 0.1
    results[1][0, 30] = float("nan")  # a NaN counts anywhere
    assert not peers.error(right, results) <= 1


def test_angles_are_angles(tiny):
    given = peers.inputs(one_case("apply_rope"), CPU)
    torch.testing.assert_close(given["cos"] ** 2 + given["sin"] ** 2, torch.ones(1, 5, 16))
    assert torch.equal(given["cos"][..., :8], given["cos"][..., 8:])


def test_a_peer_that_leaves_the_cache_as_it_was_is_found_out(tiny):
    case = one_case("apply_rope_to_cache")
    given = peers.inputs(case, CPU)
    ours = peers.ours(case, given, "torch")
    others = given | {name: given[name].clone() for name in ("k_cache", "v_cache")}
    lazy = peers.ours(case, others, "torch")
    rows, left = measured(case, {"torch": ours, "lazy": lazy}, given, harness.Clock())
    assert rows.keys() == {"torch"}
    assert left[0].wrong


def test_when_ours_is_wrong_there_is_nothing_to_be_a_ratio_of(tiny):
    case = one_case("rms_norm")
    given = peers.inputs(case, CPU)
    calls = {"torch": wrong_by(case, given, lambda y: y.mul_(2)), "eager": peers.ours(case, given, "torch")}
    rows, left = measured(case, calls, given, harness.Clock())
    assert [one.provider for one in left] == ["torch"]
    assert rows["eager"]["ratio"] is None
    assert kernels.line(rows["eager"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 4 GiB"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (RuntimeError("first line\nsecond line"), "first line"),
        (NotImplementedError(), "NotImplementedError"),
    ],
)
def test_who_refuses_is_left_out_with_the_reason(tiny, error, words):
    case = one_case("swiglu")
    given = peers.inputs(case, CPU)

    def refuse():
        raise error

    rows, left = measured(case, {"torch": peers.ours(case, given, "torch"), "peer": refuse}, given, harness.Clock())
    assert rows.keys() == {"torch"}
    assert left == [kernels.Left(case, "peer", words)]


def test_attention_that_pytorch_refuses_says_why(tiny):
    case = one_case("flash_attention")
    given = peers.inputs(case, CPU)
    calls = peers.providers(case, given, "torch", ["sdpa-cudnn"])
    _, left = measured(case, calls, given, harness.Clock())
    assert left[0].provider == "sdpa-cudnn"
    assert not left[0].wrong
    assert "scaled_dot_product_attention" in left[0].reason


def test_a_shape_without_room_is_skipped_with_a_word(tiny, monkeypatch):
    real, asked = kernels.inputs, []

    def inputs(case, device):
        asked.append(case)
        if len(asked) == 1:
            raise torch.OutOfMemoryError("no")
        return real(case, device)

    monkeypatch.setattr(kernels, "inputs", inputs)
    monkeypatch.setattr(kernels, "measure_limits", lambda *_: EVEN)
    plan = kernels.Plan(CPU, "torch", [], tiny_cases(["rms_norm", "swiglu"]))
    made = list(kernels.run(plan, "llama bench kernels"))
    assert [one.reason for one in made if isinstance(one, kernels.Left)] == ["out of memory"]
    assert [one["op"] for one in made if isinstance(one, dict) and "op" in one] == ["swiglu"]


@pytest.fixture
def stand_ins(monkeypatch):
    """Stand-ins for Liger and flash-attn: their signatures and layouts, implemented with PyTorch."""

    def rope(q, k, cos, sin, position_ids=None, unsqueeze_dim=1, rotary_dim=None):
        for x, turned in zip((q, k), peers._eager_rope(q, k, cos, sin), strict=True):
            x.copy_(turned)
        return q, k

    def loss(input, target, *_):
        assert (input.dim(), target.dim()) == (2, 1)
        return F.cross_entropy(input.float(), target)

    def add_norm(X, R, W, eps, offset=0.0, casting_mode="llama", in_place=True):
        return F.rms_norm(X + R, W.shape, W, eps), X + R

    def attend(q, k, v, causal=False):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # flash-attn uses (batch, tokens, heads, size)
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

    def attend_to_cache(q, k_cache, v_cache, k=None, v=None, cache_seqlens=None):
        attend.lengths = [*getattr(attend, "lengths", []), cache_seqlens]
        assert attend.lengths[0] is cache_seqlens  # nothing is cast while the clock runs
        assert cache_seqlens.dtype == torch.int32
        return attend(q, k_cache, v_cache)

    functions = types.SimpleNamespace(
        liger_rms_norm=lambda X, W, eps, *_: F.rms_norm(X, W.shape, W, eps),
        liger_fused_add_rms_norm=add_norm, liger_rope=rope, liger_swiglu=lambda a, b: F.silu(a) * b,
        liger_cross_entropy=loss,
        liger_fused_linear_cross_entropy=lambda input, weight, target, *_: loss(input @ weight.T, target),
    )  # fmt: skip
    attention = types.SimpleNamespace(flash_attn_func=attend, flash_attn_with_kvcache=attend_to_cache)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functions)
    monkeypatch.setitem(sys.modules, "flash_attn", attention)


def test_liger_and_flash_attn_are_called_as_they_want_to_be(tiny, stand_ins):
    asked = set()
    for case in tiny_cases():
        given = peers.inputs(case, CPU)
        calls = peers.providers(case, given, "torch", ["liger", "flash-attn"])
        before = {name: x.clone() for name, x in given.items() if isinstance(x, torch.Tensor)}
        right = peers.truth(case, given)
        for name in calls.keys() - {"torch"}:
            assert peers.error(right, peers.outputs(case, given, calls[name])) < 1e-5, (case, name)
            calls[name]()
            asked.add((case.op, name))
        assert all(torch.equal(given[name], x) for name, x in before.items() if "cache" not in name)
    assert len(asked) == 8


# -- the command ---------------------------------------------------------------------------------------------------


def bench(*arguments):
    return CliRunner().invoke(cli, ["bench", "kernels", "--device", "cpu", *arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--op", "rmsnorm"], ["'rmsnorm'; did you mean rms_norm? Choose from", "linear_cross_entropy"]),
        (["--dtype", "int8"], ["'int8'", "bfloat16"]),
        (["--peers", "eager,cublas"], ["'cublas'", "sdpa-flash", "liger"]),
        (["--peers", "liger"], ["liger", "choose from eager", "sdpa-math"]),
        (["--model", "13b"], ["'13b'", "70b"]),
        (["--device", "tpu"], ["'tpu'", "cpu"]),
        (["--tokens", "many"], ["'many'", "1,8,32"]),
        (["--batch", "0"], ["'0'", "1,8,32"]),
    ],
)
def test_the_command_says_what_there_is(arguments, words):
    done = bench(*arguments)
    assert done.exit_code == 2
    assert all(word in done.output for word in words), done.output


def test_a_peer_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(harness, "device_for", lambda name: torch.device("cuda"))
    monkeypatch.setattr(kernels, "check_backend", lambda name: None)
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"the peer flash-attn is not installed; choose from eager, .*sdpa-cudnn"):
        kernels.plan(peers=["flash-attn"])
    assert kernels.plan(peers=["sdpa"]).peers == list(peers.SDPA)
    assert "compile" in kernels.plan().peers
    assert {case.dtype for case in kernels.plan().cases} == {"bfloat16"}


def test_the_command_from_end_to_end(tmp_path):
    command = [sys.executable, "-m", "llama", "bench", "kernels", "--device", "cpu", "--json", "--out", tmp_path,
               "--op", "rms_norm,flash_attention", "--model", "135m", "--tokens", "3", "--batch", "2"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    header, *rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert header.keys() >= {"command", "date", "device", "driver", "clocks", "versions", "limits"}
    assert "kernels did not run" in header["note"]
    assert header["limits"]["copy_gbps"] > 0
    assert all(row.keys() >= KEYS and ("gbps" in row) != ("tflops" in row) for row in rows)
    assert [row["provider"] for row in rows if row["op"] == "rms_norm"] == ["torch", "eager", "fused"]
    assert {row["provider"] for row in rows if row["op"] != "rms_norm"} == {"torch", "eager", "sdpa-flash", "sdpa-math"}
    assert "2 shapes, about" in done.stderr
    assert header["ours"] == "torch"
    kept = tmp_path / harness.slug(header["device"]) / "kernels.jsonl"
    assert harness.read_lines(kept) == (header, rows)


@pytest.mark.needs_gpu
def test_on_a_gpu_the_kernels_themselves_run():
    done = bench("--device", "cuda", "--quick", "--op", "swiglu,decode_attention", "--peers", "eager,compile", "--json")
    assert done.exit_code == 0
    rows = [json.loads(line) for line in done.stdout.splitlines()[1:]]
    assert {row["provider"] for row in rows} == {"triton", "eager", "compile"}
    assert {(row["graph"], row["cache"]) for row in rows} == {(True, "warm"), (False, "cold")}


def test_people_get_a_table_and_a_wrong_provider_an_exit_code(monkeypatch, tmp_path):
    monkeypatch.setitem(peers._FUSED, "rms_norm", lambda x, weight, eps: x)
    monkeypatch.setattr(kernels, "measure_limits", lambda *_: EVEN)
    done = bench("--op", "rms_norm", "--tokens", "3", "--peers", "eager,fused", "--out", str(tmp_path / "rows.jsonl"))
    assert done.exit_code == 1
    lines = done.stdout.splitlines()
    assert lines[0] == kernels.NO_GPU
    assert any(line.split()[:2] == ["fused", "WRONG:"] for line in lines)
    table = [line for line in lines if line.split()[0] in ("torch", "eager")]
    assert len(table) == 2
    assert all(len(line) <= 120 for line in lines)
    at = kernels.COLUMNS.index("error") + len("error")  # columns are right-aligned with their headings
    assert all(line[at - 5 : at].strip() and line[at] == " " for line in table)
    assert [row["provider"] for row in harness.read_lines(tmp_path / "rows.jsonl")[1]] == ["torch", "eager"]


# -- files and devices ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("11th Gen Intel(R) Core(TM) i7-1165G7 @ 2.80GHz, 8 cores", "core-i7-1165g7-8-cores"),
        ("11th Gen Intel(R) Core(TM) i5-11400 @ 2.60GHz, 8 cores", "core-i5-11400-8-cores"),
        ("AMD Ryzen 7 7700X 8-Core Processor, 16 cores", "ryzen-7-7700x-16-cores"),
        ("AMD EPYC, 2 cores, AVX-512", "epyc-2-cores"),
        ("Intel(R) Xeon(R) Platinum 8488C, 4 cores", "xeon-platinum-8488c-4-cores"),
        ("", "device"),
    ],
)
def test_a_device_has_a_short_name(name, slug):
    assert harness.slug(name) == slug


@pytest.mark.parametrize("text", ["", "{}\n", "[1]\n", '"header"\n', "no JSON", '{"command": "a"}\n'])
def test_a_file_that_is_no_result_is_named(tmp_path, text):
    path = tmp_path / "other.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"other\.jsonl is not a results file"):
        harness.read_lines(path)


def test_rows_are_in_the_file_when_the_run_is_interrupted(tmp_path):
    path = tmp_path / "rows.jsonl"

    def interrupted():
        with harness.lines_to(path, "kernels", {"command": "c", "device": "d"}) as keep:
            keep({"a": 1})
            assert harness.read_lines(path) == ({"command": "c", "device": "d"}, [{"a": 1}])  # not closed yet
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert harness.read_lines(path)[1] == [{"a": 1}]


# -- occupancy and roofline ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "share"),
    [
        ("sm_90", 32, 8, 0, 1.0),
        ("sm_90", 33, 2, 0, 0.75),  # 1280 registers per warp: 51 warps, 48 in groups of four
        ("sm_90", 214, 8, 98304, 0.125),  # registers limit it to 8 warps
        ("sm_80", 64, 4, 65536, 0.125),  # 2 programs fit in 164 kB
        ("sm_89", 40, 8, 0, 1.0),  # at most 48 warps
        ("sm_90", 16, 1, 0, 0.5),  # at most 32 programs
        ("gfx942", 128, 4, 0, 0.5),
        ("gfx942", 64, 4, 32768, 0.25),
    ],
)
def test_occupancy_is_what_the_calculator_says(target, registers, warps, shared, share):
    assert occupancy(target, registers, warps, shared) == share


def test_roofline_is_the_data_sheets():
    case = roofline("sm_90", moved=3_350_000, flops=989_000_000, halves=True)
    assert case == {"chip": "H100 SXM", "intensity": 295.224, "ridge": 295.2, "bound": "arithmetic", "floor_us": 1.0}
    assert roofline("sm_90", moved=10**6, flops=10**6, halves=False)["bound"] == "memory"


def test_every_static_case_has_a_place_under_the_roof():
    for case in static.cases():
        place = static.roofline(case, "sm_90")
        if case.kernel == "linear_cross_entropy":  # its matrix products are cuBLAS's
            assert place is None, case.shape
        elif case.kernel == "flash_attention" and ("short" not in case.shape or "float32" in case.shape):
            assert place["bound"] == "arithmetic", case.shape
        else:
            assert place["bound"] == "memory", case.shape
