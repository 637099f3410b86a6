"""flash_attention_hopper without a GPU: its source under `gluon_emulator`, and mutants that the tests must catch.

What only a GPU can show runs with --gpu, each test in a process of its own: a deadlock blocks the whole GPU.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import threading
from pathlib import Path
from unittest import mock

import gluon_emulator
import numpy as np
import pytest
import torch
from gluon_emulator import Emulated, Int
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import DEVICE, exact, guard_memory, laid_out, normal, same_bits
from strategies import SEEDS
from test_kernels_flash_attention import assert_right, for_kernel, for_reference, sights, spoiled, visible

from llama import reference
from llama.kernels import flash_attention as portable
from llama.kernels import flash_attention_hopper as hopper
from llama.kernels import launch, tiles
from llama.kernels.flash_attention import flash_attention

memory = guard_memory()
HALVES = [torch.float16, torch.bfloat16]


@contextlib.contextmanager
def emulated(seed=0, tile=(32, 16, 2), processors=2, module=hopper, watched=None):
    """Make flash_attention run this kernel, emulated, as if on a Hopper with `processors` multiprocessors."""
    kernel = Emulated(module._flash_attention_hopper_kernel, seed, watched)
    with (
        mock.patch.dict(os.environ, {"LLAMA_TRITON_HOPPER": "1"}),
        mock.patch.dict(sys.modules, {"llama.kernels.flash_attention_hopper": module}),
        mock.patch.object(launch, "family", return_value="sm_90"),
        mock.patch.object(tiles, "hopper", return_value=tiles.Hopper(*tile)),
        mock.patch.object(module, "_processors", return_value=processors),
        mock.patch.object(module, "_flash_attention_hopper_kernel", kernel),
        mock.patch.object(portable, "_flash_attention_kernel", None),
    ):
        yield


cpu_only = pytest.mark.skipif(not launch.INTERPRETED, reason="emulates a GPU; runs without --gpu")
tile_shapes = st.tuples(st.sampled_from([16, 32, 64]), st.sampled_from([8, 16, 32]), st.integers(1, 4))


@st.composite
def attentions(draw):
    """(q, k, v) that the kernel accepts: half precision, heads of 64 or 128, more than a few queries."""
    dtype, D = draw(st.sampled_from(HALVES)), draw(st.sampled_from([64, 64, 128]))
    B, K, G = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    T, S = draw(st.integers(17, 70)), draw(st.integers(1, 90))
    rng = np.random.default_rng(draw(SEEDS))
    q = normal(rng, (B, K * G, T, D), dtype, draw(st.sampled_from([1e-3, 1.0, 1e2])))
    return q, normal(rng, (B, K, S, D), dtype), normal(rng, (B, K, S, D), dtype)


def of_projection(x):
    """Lay x out with tokens before heads, as projections do."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@cpu_only
@given(attentions(), st.data(), tile_shapes, st.integers(1, 5), SEEDS)
@settings(max_examples=120)
def test_the_source_computes_attention_whatever_comes_first(drawn, data, tile, processors, seed):
    """Every kind of padding, packing and offset, garbage in hidden keys, and any order of events."""
    q, k, v = drawn
    args = data.draw(sights(q, k)) | {"causal": True}
    garbage = data.draw(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
    given_k, given_v = spoiled(k, v, args, q.shape[2], garbage)
    layout = data.draw(st.sampled_from([torch.Tensor.contiguous, of_projection]))
    return_lse = data.draw(st.booleans())
    with emulated(seed, tile, processors):
        out = flash_attention(*map(layout, (q, given_k, given_v)), **for_kernel(args), return_lse=return_lse)
    ours, lse = out if return_lse else (out, None)
    assert_right(ours, lse, q, k, v, args)


KINDS = {
    "causal": (), "padded": ("starts", "lengths", "mask"), "packed": ("first_keys",), "holes": ("mask", "offset"),
    "everything": ("starts", "lengths", "mask", "first_keys", "offset"),
}  # fmt: skip
by_kind = pytest.mark.parametrize("kind", KINDS)


def examples(kind, count, largest):
    """Yield (q, k, v, arguments) of one kind: combinations that hypothesis, which favours extremes, rarely draws."""
    for seed in range(count):
        rng = np.random.default_rng([*kind.encode(), seed])
        B, K, G, D = rng.integers(1, 4), rng.integers(1, 3), rng.integers(1, 5), rng.choice([64, 128])
        T = int(rng.choice([17, 63, 64, 65, 127, 128, 129, rng.integers(17, largest)]))
        S = T + int(rng.choice([0, 0, 1, 128, rng.integers(0, largest)]))
        q, k, v = (normal(rng, (int(B), int(heads), n, int(D)), HALVES[seed % 2])
                   for heads, n in ((K * G, T), (K, S), (K, S)))  # fmt: skip
        every = {
            "starts": rng.integers(0, S // 4 + 1, B).tolist(), "lengths": rng.integers(S // 2, S + 1, B).tolist(),
            "first_keys": np.sort(rng.integers(0, S, (B, T)), axis=1) // rng.choice([1, 4, S]),
            "mask": rng.random((B, S)) < rng.choice([0.9, 0.99, 1.0]), "offset": int(rng.integers(-9, S)),
        }  # fmt: skip
        yield q, k, v, {name: every[name] for name in KINDS[kind]}


@cpu_only
@by_kind
def test_every_visible_pair_is_met_once_and_no_block_without_a_mask_has_another(kind):
    bare = sum(pairs_of(*example, tile) for tile, example in zip(TILES, examples(kind, len(TILES), 90), strict=True))
    assert bare or kind == "holes"


TILES = [(32, 16, 2), (16, 8, 1), (64, 32, 3), (32, 32, 2), (16, 16, 4), (64, 8, 2)]


def pairs_of(q, k, v, args, tile):
    """Check the blocks that the consumers visit against visibility; return the number of pairs in unmasked blocks."""
    B, H, T, S = q.shape[0], q.shape[1], q.shape[2], k.shape[2]
    met, bare = np.zeros((B, H, T, S), int), np.zeros((B, H, T, S), bool)
    where = {}  # thread -> its latest tile

    def note_tile(found, *_):
        b, h, t0, *_ = found
        where[threading.current_thread()] = b, h, t0

    def note_block(_, scores, m, total, start, end, place, low, mask, ms, scale, masked, *rest):
        b, h, _ = where[threading.current_thread()]
        t = np.asarray(place) - args.get("offset", S - T)
        keys = slice(start, min(start + scores.shape[1], S))
        if masked:
            keys = slice(start, min(start + scores.shape[1], end))
        for token in t[t < T]:
            met[b, h, token, keys] += 1
            bare[b, h, token, keys] |= not masked

    with emulated(0, tile, watched={"_tile": note_tile, "_softmax": note_block}):
        flash_attention(q, k, v, **for_kernel(args))
    seen = visible(args, B, T, S)[:, None]
    assert (met <= 1).all()
    assert (met >= seen).all()
    assert (seen >= bare).all()
    return int(bare.sum())


def plain(function, **more):
    """Return a jit function as plain Python, with the compiler's `//`, which rounds towards zero."""
    scope = dict(function.fn.__globals__) | more
    for name in ("tile_at",):
        scope[name] = gluon_emulator.python(getattr(hopper, name), scope)
    return gluon_emulator.python(function, scope)


@given(st.integers(1, 300), st.integers(1, 140))
@settings(max_examples=100)
def test_every_tile_has_one_program_and_the_longest_come_first(in_all, programs):
    programs = min(programs, in_all)
    steps, at = plain(hopper.steps_of), plain(hopper.tile_at)
    taken = [[at(Int(step), Int(program), Int(programs)) for step in range(steps(Int(in_all), program, programs))]
             for program in map(Int, range(programs))]  # fmt: skip
    assert sorted(tile for mine in taken for tile in mine) == list(range(in_all))
    assert all(mine == sorted(mine) for mine in taken)


@given(st.integers(1, 140), st.lists(st.integers(1, 1000), min_size=1, max_size=300))
@settings(max_examples=100)
def test_no_program_works_longer_than_another_by_more_than_the_longest_tile(programs, work):
    programs, work = min(programs, len(work)), sorted(work, reverse=True)
    steps, at = plain(hopper.steps_of), plain(hopper.tile_at)
    loads = [sum(work[at(step, program, programs)] for step in range(steps(len(work), program, programs)))
             for program in range(programs)]  # fmt: skip
    assert max(loads) - min(loads) <= work[0]


@given(st.integers(-(2**31), 2**31 - 1), st.integers(-(2**30), 2**30), st.integers(1, 2**30), st.data())
@settings(max_examples=200)
def test_blocks_of_any_numbers_stay_within_32_bits_and_the_keys(first, last, S, data):
    """Starts, lengths and first keys come from the caller and may have any value."""
    begin, end, blocks = plain(hopper.block_range)(Int(first), Int(last), Int(S), 128)
    assert 0 <= begin <= end <= S
    assert blocks >= 1
    assert 128 * (blocks - 1) <= max(end - begin - 1, 0)
    assert begin + 128 * blocks >= end
    latest, until = (data.draw(st.integers(-(2**31), 2**31 - 1)) for _ in range(2))
    low, high = plain(hopper.plain_blocks)(begin, end, Int(latest), Int(until), 128)
    for i in {low, high - 1, (low + high) // 2} & set(range(low, high)):
        assert max(latest, begin) <= begin + 128 * i
        assert begin + 128 * (i + 1) <= min(until, end)


def some(T, S, D=64, dtype=torch.float16, B=1, H=2, K=1):
    rng = np.random.default_rng(0)
    return normal(rng, (B, H, T, D), dtype), normal(rng, (B, K, S, D), dtype), normal(rng, (B, K, S, D), dtype)


@cpu_only
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_no_order_of_events_changes_a_bit(stages):
    """The barrier protocol: one to nine blocks, several tiles in turn, the producer ahead or behind."""
    for blocks in range(1, 10):
        q, k, v = some(40, 40 + 16 * (blocks - 1) - 7)
        outs = []
        for seed in range(6):
            with emulated(seed, (16, 16, stages), processors=1 + seed % 3):
                outs.append(flash_attention(q, k, v, offset=16 * (blocks - 1) - 7, return_lse=True))
        assert all(same_bits(out, outs[0][0]) and same_bits(lse, outs[0][1]) for out, lse in outs[1:])


@cpu_only
@pytest.mark.parametrize(
    "args",
    [{"lengths": [0, 5, 60]}, {"starts": [60, 10**9, 3]}, {"offset": -40}, {"offset": -2000}, {"offset": -(2**31) + 99},
     {"starts": [-5, 0, 30], "lengths": [10**9, -3, 20]}],
)  # fmt: skip
def test_queries_that_see_nothing_give_zeros_and_nobody_waits(args):
    q, k, v = some(40, 60, B=3)
    bound = {name: np.clip(value, 0, 60) if isinstance(value, list) else value for name, value in args.items()}
    with emulated(processors=1):
        out, lse = flash_attention(q, k, v, **for_kernel(args), return_lse=True)
    blind = ~visible(bound, 3, 40, 60).any(-1)[:, None].repeat(2, 1)
    assert blind.any()
    assert (out[torch.tensor(blind)] == 0).all()
    assert (lse[torch.tensor(blind)] == float("-inf")).all()
    assert_right(out, lse, q, k, v, bound)


WRONG = "wrong|a load fills|two loads fill|while a load fills|every part waits|one arrival too many"
EMPTY = "mbarrier.wait(empty.index(place), (block // STAGES & 1) ^ 1)"
MUTANTS = {
    "places are loaded over": (EMPTY, "pass", WRONG),
    "queries are loaded over": ("mbarrier.wait(q_empty.index(0), (step & 1) ^ 1)", "pass", WRONG),
    "a place is never empty": (EMPTY, "mbarrier.wait(empty.index(place), block // STAGES & 1)", "every part waits"),
    "blocks are counted anew in every tile": ("        done += blocks\n\n        worth", "        worth", WRONG),
    "keys are read too early": ("mbarrier.wait(k_full.index(at), (done + i) // STAGES & 1)", "pass", WRONG),
    "values are read too early": ("mbarrier.wait(v_full.index(at), last // STAGES & 1)", "pass", WRONG),
    "keys are given back twice": (
        "            start = begin + i * BLOCK_K\n",
        "            mbarrier.arrive(k_empty.index(at), count=1)\n            start = begin + i * BLOCK_K\n",
        WRONG,
    ),
    "keys are given back under a product": (
        "            scores = wait_for_products(1, deps=[next_scores])\n"
        "            mbarrier.arrive(k_empty.index(at), count=1)\n",
        "            mbarrier.arrive(k_empty.index(at), count=1)\n"
        "            scores = wait_for_products(1, deps=[next_scores])\n",
        "that a product reads",
    ),
    "scores are used too early": (
        "scores = wait_for_products(1, deps=[next_scores])", "scores = next_scores", "before it is waited for"
    ),
    "one product too many is left under way": (
        "wait_for_products(1, deps=[next", "wait_for_products(2, deps=[next", "before it is waited for"
    ),
    "nobody waits for the other half to be clean": (
        "            mbarrier.wait(v_clean.index(0), cleaned & 1)", "            pass", "without|while a product|wrong"
    ),
    "values are not cleaned": ("if (start + BLOCK_K > end) & (end < S):", "if start < 0:", "wrong"),
    "no fence": ("            fence_async_shared()\n", "", "without the fence|without a fence"),
    "queries are never given back": ("        mbarrier.arrive(q_empty.index(0), count=1)\n", "", "every part waits"),
    "one block too few is masked": ("latest, first_t + offset + 1, BLOCK_K)",
                                    "latest, first_t + offset + 1 + BLOCK_K, BLOCK_K)", "wrong"),
}  # fmt: skip


def variant(old, new, folder):
    """Load the kernel's module with one change to its source."""
    source = Path(hopper.__file__).read_text()
    assert source.count(old) == 1, old
    path = folder / "flash_attention_hopper.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("llama.kernels.flash_attention_hopper_mutant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cpu_only
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_protocol_made_wrong_on_purpose_is_found_out(mutant, tmp_path):
    old, new, complaint = MUTANTS[mutant]
    module = variant(old, new, tmp_path)
    q, k, v = some(64, 75, B=2)
    args = {"offset": 6, "lengths": [70, 69]}
    truth = reference.flash_attention(*map(exact, (q, k, v)), **for_reference(args))
    k[:, :, 70:] = v[:, :, 70:] = float("nan")

    def run():
        for seed in range(30):
            with emulated(seed, (32, 16, 2), processors=1, module=module):
                out = flash_attention(q, k, v, **for_kernel(args))
            assert (np.abs(exact(out) - truth) < 1e-2).all(), "wrong"  # NaN is wrong too

    with pytest.raises((AssertionError, TypeError, AttributeError), match=complaint):
        run()


def taken(q, k, v, family="sm_90", **environment):
    with mock.patch.dict(os.environ, environment):
        return portable._takes_hopper(family, q, k, v)


def test_the_kernel_must_be_asked_for_and_takes_what_it_was_made_for():
    q, k, v = some(40, 60)
    asked = {"LLAMA_TRITON_HOPPER": "1"}
    with mock.patch.dict(os.environ):
        os.environ.pop("LLAMA_TRITON_HOPPER", None)
        assert not taken(q, k, v)
    assert not taken(q, k, v, LLAMA_TRITON_HOPPER="0")
    assert taken(q, k, v, **asked)
    assert taken(*some(40, 60, 128, torch.bfloat16), **asked)
    for family in ("sm_80", "sm_89", "sm_100", "gfx942", "interpreter"):
        assert not taken(q, k, v, family, **asked)
    assert not taken(q.float(), k.float(), v.float(), **asked)
    assert not taken(*some(40, 60, 80), **asked)
    assert not taken(*some(tiles.SHORT, 60), **asked)
    for i in range(3):
        views = [laid_out(x, "shifted") if i == j else x for j, x in enumerate((q, k, v))]
        assert not taken(*views, **asked)


@cpu_only
def test_what_it_does_not_take_goes_to_the_portable_kernel():
    q, k, v = some(40, 60)
    expected, portable_kernel = flash_attention(q, k, v, False), portable._flash_attention_kernel
    with (
        emulated(),
        mock.patch.object(portable, "_flash_attention_kernel", portable_kernel),
        mock.patch.object(tiles, "prefill", return_value=tiles.INTERPRETED),
    ):
        assert same_bits(flash_attention(q, k, v, False), expected)


def test_nothing_else_needs_gluon():
    code = "import sys; sys.modules['triton.experimental.gluon'] = None; import llama.kernels.flash_attention"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_emulator_knows_whole_numbers_as_the_compiler_does():
    assert Int(-7) // 2 == -3
    assert Int(-7) % 2 == -1
    assert (5 - Int(7)).bits == 32
    assert Int(2**30).to(hopper.gl.int64) * 4 == 2**32
    with pytest.raises(gluon_emulator.Broken, match="32 bits"):
        Int(2**30) * 2


def check_examples(kind, count=40, largest=1500):
    for q, k, v, args in examples(kind, count, largest):
        given_k, given_v = spoiled(k, v, args, q.shape[2], float("nan"))
        assert taken(*map(of_projection, (q, given_k, given_v)), launch.family(q.device), LLAMA_TRITON_HOPPER="1")
        out, lse = flash_attention(*map(of_projection, (q, given_k, given_v)), **for_kernel(args), return_lse=True)
        again = flash_attention(*map(of_projection, (q, given_k, given_v)), **for_kernel(args))
        assert_right(out, lse, q, k, v, args)
        assert same_bits(out, again)


@cpu_only
@by_kind
@pytest.mark.parametrize(("tile", "count"), [((128, 128, 2), 2), ((128, 64, 4), 2), ((32, 16, 3), 8)])
def test_what_the_gpu_is_asked_is_right_in_the_emulator(kind, tile, count):
    with emulated(0, tile, processors=3):
        check_examples(kind, count, 150)


@pytest.mark.needs_gpu
@by_kind
def test_natively_in_a_process_of_its_own(kind):
    """A wrong parity deadlocks: the process is killed after two minutes."""
    if launch.family(DEVICE) != "sm_90":
        pytest.skip("needs a Hopper GPU")
    code = f"import test_kernels_flash_attention_hopper as here; here.check_examples({kind!r})"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    folders = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    done = subprocess.run([sys.executable, "-c", code], env=environment | {"PYTHONPATH": folders,
                          "LLAMA_TRITON_HOPPER": "1"}, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
