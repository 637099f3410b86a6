"""gemv and gemv_swiglu against the reference."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numerics import (
    DEVICE,
    DTYPES,
    LAYOUTS,
    around_powers_of_two,
    assert_no_worse,
    exact,
    examples,
    guard_memory,
    laid_out,
    layouts,
    normal,
    same_bits,
)
from strategies import SEEDS

from llama import ops, reference
from llama.benchmarks import shapes
from llama.kernels import gemv as module
from llama.kernels.gemv import gemv, gemv_swiglu
from llama.kernels.swiglu import swiglu

memory = guard_memory()
ROWS = st.integers(1, 4)
WIDTHS = around_powers_of_two(80)


def float32_terms(x, *weights):
    """The largest sum of absolute products, which bounds what the order of float32 sums can change."""
    return max(float((np.abs(exact(x)) @ np.abs(exact(weight)).T).max(initial=0)) for weight in weights)


@pytest.mark.parametrize("dtype", DTYPES)
@given(ROWS, WIDTHS, st.lists(st.integers(1, 20), min_size=1, max_size=3), layouts, layouts, SEEDS)
@examples(30)
def test_gemv_is_as_close_to_the_reference_as_eager_pytorch(dtype, rows, width, outs, layout, weight_layout, seed):
    rng = np.random.default_rng(seed)
    x = laid_out(normal(rng, (rows, width), dtype), layout)
    weights = [laid_out(normal(rng, (out, width), dtype), weight_layout) for out in outs]
    y = gemv(x, *weights)
    plain = torch.cat([torch.nn.functional.linear(x, weight) for weight in weights], dim=1)
    assert y.dtype == dtype
    truth = reference.gemv(exact(x), *map(exact, weights))
    assert_no_worse(y, plain, truth, float32_terms=float32_terms(x, *weights))


@pytest.mark.parametrize("dtype", DTYPES)
@given(ROWS, WIDTHS, st.integers(1, 20), st.sampled_from([0.1, 1.0, 10.0]), layouts, layouts, SEEDS)
@examples(30)
def test_a_gate_is_what_its_parts_are(dtype, rows, width, out, scale, layout, up_layout, seed):
    """Both products are rounded before they are combined, as between separate kernels."""
    rng = np.random.default_rng(seed)
    x = normal(rng, (rows, width), dtype, scale)
    gate = laid_out(normal(rng, (out, width), dtype, width**-0.5), layout)
    up = laid_out(normal(rng, (out, width), dtype, width**-0.5), up_layout)
    y = gemv_swiglu(x, gate, up)
    parts = swiglu(gemv(x, gate), gemv(x, up))
    if DEVICE.type == "cpu":
        assert same_bits(y, parts)
    if dtype == torch.float32:
        eager = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        terms = float32_terms(x, gate) * (1 + float32_terms(x, up))
        assert_no_worse(y, eager, reference.gemv_swiglu(exact(x), exact(gate), exact(up)), float32_terms=terms)


@given(ROWS, WIDTHS, st.sampled_from(LAYOUTS[1:]), SEEDS)
@examples(20)
def test_layout_changes_no_bit(rows, width, layout, seed):
    rng = np.random.default_rng(seed)
    x, a, b = (normal(rng, (n, width), torch.float32) for n in (rows, 9, 9))
    x2, a2, b2 = (laid_out(t, layout) for t in (x, a, b))
    assert same_bits(gemv(x2, a2, b2), gemv(x, a, b))
    assert same_bits(gemv_swiglu(x2, a2, b2), gemv_swiglu(x, a, b))


@given(ROWS, WIDTHS, st.lists(st.tuples(st.integers(0, 20), layouts), min_size=2, max_size=3), SEEDS)
@examples(20)
def test_weights_side_by_side_are_read_as_each_alone(rows, width, outs, seed):
    """Whatever the layout of each weight."""
    rng = np.random.default_rng(seed)
    x = normal(rng, (rows, width), torch.float16)
    weights = [laid_out(normal(rng, (out, width), torch.float16), layout) for out, layout in outs]
    assert same_bits(gemv(x, *weights), torch.cat([gemv(x, weight) for weight in weights], dim=1))


def test_all_who_count_rows_count_as_many():
    assert ops.MOST_ROWS == module.MOST_ROWS == shapes.FEW


def test_nothing_gives_nothing_and_no_width_gives_zeros():
    x, weight = torch.ones(2, 5, device=DEVICE), torch.ones(3, 5, device=DEVICE)
    assert gemv(x[:0], weight).shape == (0, 3)
    assert gemv(x, weight[:0], weight).shape == (2, 3)
    assert (gemv(x[:, :0], weight[:, :0]) == torch.zeros(2, 3, device=DEVICE)).all()


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((5, 4), (3, 4)), r"gemv: x must be \(rows, width\) with up to 4 rows, got \(5, 4\)"),
        (((1, 1, 4), (3, 4)), r"gemv: x must be \(rows, width\) with up to 4 rows, got \(1, 1, 4\)"),
        (((1, 4), (3, 5)), r"gemv: weights must be \(out, 4\) of x's dtype, torch.float32; got \(3, 5\)"),
        (((1, 4),), "gemv: expected 1 to 3 weights, got 0"),
        (((1, 4), *[(3, 4)] * 4), "gemv: expected 1 to 3 weights, got 4"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shapes, words):
    with pytest.raises(ValueError, match=words):
        gemv(*(torch.ones(shape, device=DEVICE) for shape in shapes))


def test_a_dtype_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"got \(3, 4\) of torch.float16"):
        gemv(torch.ones(1, 4, device=DEVICE), torch.ones(3, 4, device=DEVICE, dtype=torch.float16))
    with pytest.raises(ValueError, match="gemv_swiglu: gate and up must have the same shape"):
        gemv_swiglu(*(torch.ones(n, 4, device=DEVICE) for n in (1, 2, 3)))


@given(ROWS, st.integers(1, 1100), SEEDS)
@examples(5)
def test_what_is_loaded_before_the_wait_is_counted_once(rows, width, seed):
    """The path of programmatic dependent launch; in the interpreter there is nothing to wait for."""
    rng = np.random.default_rng(seed)
    x, a, b = (normal(rng, (n, width), torch.float32) for n in (rows, 5, 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLAMA_TRITON_PDL", "1")
        waits = mock.Mock()
        if DEVICE.type == "cpu":
            patch.setattr(module.launch, "family", lambda device: "sm_90")
            patch.setattr(module.tl.extra.cuda, "gdc_wait", waits)
            patch.setattr(module.tl.extra.cuda, "gdc_launch_dependents", lambda: None)
        weights = [x[:, None], [a, b], [None, None], "triton"], [x[:, None], a, None, b, None, "triton"]
        asked = torch.cat(ops.gemv(*weights[0]), -1)[:, 0], ops.gemv_swiglu(*weights[1])[:, 0]
        assert waits.called == (DEVICE.type == "cpu")
    for ours, plain in zip(asked, (gemv(x, a, b), gemv_swiglu(x, a, b)), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


PTX = """
import os, torch
from llama import static
from llama.kernels import gemv
x, w = (torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta") for rows in (1, 64))
for target in ("sm_90", "sm_80"):
    built = []
    with static.pretending(static.TARGETS[target], built):
        for asked in "01":
            os.environ["LLAMA_TRITON_PDL"] = asked
            gemv._gemv.launch(x, w)
    for compiled, *_ in built:
        words = ("griddepcontrol.launch_dependents", "griddepcontrol.wait", "ld.global", "cp.async")
        at = [compiled.asm["ptx"].find(word) for word in words]
        print(*at)
"""


MIXED = """
import torch
from llama import static
from llama.kernels import gemv
x, w = (torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta") for rows in (1, 64))
turned, far = w.new_empty(4096, 1).T, w.new_empty_strided((64, 4096), (2**31, 1))
for weights in ((w, turned, far), (turned, far, w), (far, w, turned)):
    built = []
    with static.pretending(static.TARGETS["sm_90"], built):
        gemv._gemv.launch(x, *weights)
    print(len(built))
"""


def printed(script):
    """Return the numbers `script` prints without the interpreter, which knows neither types nor machine code."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parent.parent, env=kept,
                          capture_output=True, text=True, check=True)  # fmt: skip
    return [[int(number) for number in line.split()] for line in done.stdout.splitlines()]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has no wheels here")
def test_weights_side_by_side_may_have_strides_of_several_types():
    """Strides of 1, of 32 bits and of 64 bits are three types to the compiler."""
    assert printed(MIXED) == [[1]] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has no wheels here")
def test_weights_are_on_their_way_before_the_kernel_before_is_waited_for():
    """Programmatic dependent launch, in Hopper's PTX: launch the dependents, load weights, wait, load x.

    Only on request, and never before Hopper.
    """
    plain, pdl, old, old_pdl = printed(PTX)
    for without in (plain, old, old_pdl):
        assert without[:2] == [-1, -1]
    start, wait, load, rest = pdl
    assert 0 < start < load < wait < rest
