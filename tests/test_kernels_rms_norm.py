"""rms_norm and add_rms_norm against the reference, and against transformers' rounding."""

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
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llama import reference
from llama.kernels import tiles
from llama.kernels.rms_norm import add_rms_norm, rms_norm

memory = guard_memory()
leading_axes = st.lists(st.integers(0, 4), max_size=3).map(tuple) | st.tuples(st.integers(1, 9))
scales = st.sampled_from([1e-3, 1.0, 1e2])
epsilons = st.sampled_from([1e-6, 1e-5, 0.5])  # 0.5 shows whether it is added inside the square root


def transformers_norm(x, weight, eps):
    norm = LlamaRMSNorm(len(weight), eps)
    norm.weight = torch.nn.Parameter(weight, requires_grad=False)
    return norm(x)


@st.composite
def rows(draw):
    """(x, residual, weight) in float64, the rows of x and residual of three magnitudes."""
    shape = (*draw(leading_axes), draw(around_powers_of_two(140)))
    rng, scale = np.random.default_rng(draw(SEEDS)), draw(scales)
    x, residual = scale * rng.normal(size=(2, *shape)) * rng.choice([0.1, 1, 10], size=(2, *shape[:-1], 1))
    return torch.tensor(x), torch.tensor(residual), torch.tensor(1 + rng.normal(size=shape[-1]))


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows(), epsilons, st.sampled_from([None, *DTYPES]), layouts, layouts)
@examples(80)
def test_rms_norm_is_as_close_to_the_reference_as_transformers(dtype, drawn, eps, weight_dtype, layout, weight_layout):
    x, weight = laid_out(drawn[0].to(dtype).to(DEVICE), layout), drawn[2].to(weight_dtype or dtype).to(DEVICE)
    y = rms_norm(x, laid_out(weight, weight_layout), eps)
    plain = transformers_norm(x, weight, eps)
    assert y.dtype == plain.dtype
    # transformers rounds twice: to x's dtype before the gain, then to the output's dtype
    terms = np.abs(exact(plain)).max(axis=-1) * torch.finfo(dtype).eps / torch.finfo(y.dtype).eps if y.numel() else 0
    assert_no_worse(y, plain, reference.rms_norm(exact(x), exact(weight), eps), terms=terms)


@pytest.mark.parametrize("dtype", DTYPES)
@given(rows(), epsilons, st.sampled_from([None, *DTYPES]), st.sampled_from([None, *DTYPES]), layouts, layouts)
@examples(80)
def test_add_rms_norm_adds_as_pytorch_and_then_is_rms_norm(
    dtype, drawn, eps, residual_dtype, weight_dtype, layout, residual_layout
):
    x = laid_out(drawn[0].to(dtype).to(DEVICE), layout)
    residual = laid_out(drawn[1].to(residual_dtype or dtype).to(DEVICE), residual_layout)
    weight = drawn[2].to(weight_dtype or dtype).to(DEVICE)
    before = x.clone(), residual.clone()
    normed, added = add_rms_norm(x, residual, weight, eps)
    assert same_bits(added, before[1] + before[0])
    assert same_bits(normed, rms_norm(added, weight, eps))
    assert same_bits(x, before[0])
    assert same_bits(residual, before[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [None, torch.float32])
def test_rounding_follows_transformers(dtype, weight_dtype):
    """The normalised row is rounded before it meets the gain, and a sum before it is normalised.

    In any other order, one element in four is off by an ulp. In this order, an element may differ only if its
    float32 value is within the sum's own rounding error (some 2⁻²³) of a tie between two 11-bit numbers: about 0.1%.
    """
    rng = np.random.default_rng(0)
    x, residual = normal(rng, (40, 300), dtype), normal(rng, (40, 300), dtype)
    weight = normal(rng, (300,), weight_dtype or dtype)
    for ours, theirs in (
        (rms_norm(x, weight, 1e-5), transformers_norm(x, weight, 1e-5)),
        (add_rms_norm(x, residual, weight, 1e-5)[0], transformers_norm(residual + x, weight, 1e-5)),
    ):
        off = (ours.double() - theirs.double()).abs() > theirs.double().abs() * torch.finfo(torch.float32).eps * 8
        assert off.double().mean() < 0.005
        assert_no_worse(ours, theirs, exact(theirs), terms=theirs.abs().amax(-1).cpu().double())


@given(rows(), st.sampled_from(DTYPES), st.sampled_from(LAYOUTS[1:]), st.sampled_from(LAYOUTS[1:]))
@examples(60)
def test_layout_changes_no_bit(drawn, dtype, layout, other):
    x, residual, weight = (t.to(dtype).to(DEVICE) for t in drawn)
    normed, added = add_rms_norm(x, residual, weight, 1e-5)
    again = add_rms_norm(laid_out(x, layout), laid_out(residual, other), laid_out(weight, other), 1e-5)
    assert same_bits(again[0], normed)
    assert same_bits(again[1], added)


@pytest.mark.parametrize("width", [5, 300])
def test_permuted_and_expanded_rows(width):
    """Leading axes that no single stride covers, and expanded rows that share memory."""
    x = normal(np.random.default_rng(1), (4, 3, 2, 5, width), torch.float32)
    weight = torch.ones(width, device=DEVICE)
    odd = x.permute(2, 0, 3, 1, 4)
    assert same_bits(rms_norm(odd, weight, 1e-5), rms_norm(odd.contiguous(), weight, 1e-5))
    one = x[0, :, :1].expand(3, 4, 5, width)
    assert same_bits(rms_norm(one, weight, 1e-5), rms_norm(one.contiguous(), weight, 1e-5))
    gain = weight[:1].expand(width)
    assert same_bits(add_rms_norm(odd, odd, gain, 1e-5)[0], rms_norm(odd + odd, weight, 1e-5))


@given(st.integers(2, 12), around_powers_of_two(70), st.data())
@examples(30)
def test_a_rows_bits_do_not_depend_on_its_batch(count, width, data):
    x = normal(np.random.default_rng(width), (count, width), torch.bfloat16)
    weight = torch.ones(width, device=DEVICE, dtype=torch.bfloat16)
    first, last = sorted((data.draw(st.integers(0, count)), data.draw(st.integers(0, count))))
    assert same_bits(rms_norm(x[first:last], weight, 1e-5), rms_norm(x, weight, 1e-5)[first:last])


@pytest.mark.parametrize("width", [511, 2048, 4097, 8192, tiles.WIDEST_ROW])
def test_wide_rows(width):
    rng = np.random.default_rng(width)
    x, weight = normal(rng, (5, width), torch.bfloat16), normal(rng, (width,), torch.bfloat16)
    truth = reference.rms_norm(exact(x), exact(weight), 1e-5)
    assert_no_worse(rms_norm(x, weight, 1e-5), transformers_norm(x, weight, 1e-5), truth)


def test_a_row_too_wide_and_shapes_that_do_not_fit_are_named():
    one = torch.ones(tiles.WIDEST_ROW + 1, device=DEVICE)
    with pytest.raises(ValueError, match=r"rms_norm: rows can be up to 16384 wide, got 16385; llama\.ops takes any"):
        rms_norm(one[None], one, 1e-5)
    with pytest.raises(ValueError, match=r"weight must have the length of x's last axis, got .*\[3\].* for .*\[2, 4\]"):
        rms_norm(one[:8].view(2, 4), one[:3], 1e-5)
    with pytest.raises(ValueError, match="weight must have the length"):
        rms_norm(one[0], one[:1], 1e-5)
    with pytest.raises(ValueError, match=r"add_rms_norm: residual must have x's shape"):
        add_rms_norm(one[:8].view(2, 4), one[:4].view(1, 4), one[:4], 1e-5)
