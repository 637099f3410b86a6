"""swiglu against the reference."""

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

from llama import reference
from llama.kernels.swiglu import swiglu

memory = guard_memory()
leading_axes = st.lists(st.integers(0, 4), max_size=3).map(tuple) | st.tuples(st.integers(1, 9))


def plain_swiglu(gate, up):
    return torch.nn.functional.silu(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    leading_axes, around_powers_of_two(300), st.sampled_from([1e-3, 1.0, 1e2]), st.sampled_from([None, *DTYPES]),
    layouts, layouts, SEEDS,
)  # fmt: skip
@examples(90)
def test_swiglu_is_as_close_to_the_reference_as_eager_pytorch(
    dtype, leading, width, scale, up_dtype, layout, up_layout, seed
):
    rng = np.random.default_rng(seed)
    gate = laid_out(normal(rng, (*leading, width), dtype, scale), layout)
    up = laid_out(normal(rng, (*leading, width), up_dtype or dtype), up_layout)
    y, plain = swiglu(gate, up), plain_swiglu(gate, up)
    assert y.dtype == plain.dtype
    assert_no_worse(y, plain, reference.swiglu(exact(gate), exact(up)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gates_far_from_zero_overflow_nothing(dtype):
    gate = torch.tensor([-6e4, -1e3, -100.0, -88.0, 88.0, 100.0, 1e3, 6e4], device=DEVICE).to(dtype)
    one = torch.ones_like(gate)
    assert_no_worse(swiglu(gate, one), plain_swiglu(gate, one), reference.swiglu(exact(gate), exact(one)))


@given(leading_axes, around_powers_of_two(80), st.sampled_from(LAYOUTS[1:]), st.sampled_from(LAYOUTS[1:]), SEEDS)
@examples(50)
def test_layout_changes_no_bit(leading, width, layout, up_layout, seed):
    rng = np.random.default_rng(seed)
    gate, up = normal(rng, (*leading, width), torch.float32), normal(rng, (*leading, width), torch.float32)
    y = swiglu(gate, up)
    assert y.is_contiguous()
    assert same_bits(swiglu(laid_out(gate, layout), laid_out(up, up_layout)), y)


def test_halves_of_one_projection_permuted_and_expanded_rows():
    x = normal(np.random.default_rng(0), (2, 3, 4, 5, 14), torch.float32)
    gate, up = x.chunk(2, dim=-1)
    expected = swiglu(gate.contiguous(), up.contiguous())
    assert same_bits(swiglu(gate, up), expected)
    odd = (2, 0, 3, 1, 4)
    assert same_bits(swiglu(gate.permute(odd), up.permute(odd)), expected.permute(odd))
    assert same_bits(swiglu(gate[:1].expand_as(gate), up), swiglu(gate[:1].repeat(2, 1, 1, 1, 1), up))
    assert same_bits(swiglu(gate, up[..., :1].expand_as(up)), swiglu(gate, up[..., :1].repeat(1, 1, 1, 1, 7)))


@pytest.mark.parametrize("width", [1024, 2047, 2048, 2049, 5000])
def test_wide_rows(width):
    rng = np.random.default_rng(width)
    gate, up = normal(rng, (3, width), torch.bfloat16), normal(rng, (3, width), torch.bfloat16)
    assert_no_worse(swiglu(gate, up), plain_swiglu(gate, up), reference.swiglu(exact(gate), exact(up)))
    assert same_bits(swiglu(gate[1:2], up[1:2]), swiglu(gate, up)[1:2])


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"swiglu: gate and up must have the same shape, got .*\[2\].* and .*\[3\]"):
        swiglu(torch.ones(2, device=DEVICE), torch.ones(3, device=DEVICE))
    with pytest.raises(ValueError, match="swiglu: gate and up must have the same shape"):
        swiglu(torch.ones((), device=DEVICE), torch.ones((), device=DEVICE))
