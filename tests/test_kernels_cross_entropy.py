"""cross_entropy and linear_cross_entropy against the reference."""

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
    integers,
    laid_out,
    layouts,
    normal,
    same_bits,
)
from strategies import SEEDS

from llama import reference
from llama.kernels import tiles
from llama.kernels.cross_entropy import cross_entropy, linear_cross_entropy

memory = guard_memory()
leading_axes = st.lists(st.integers(0, 4), min_size=1, max_size=3).map(tuple) | st.tuples(st.integers(1, 9))
reductions = st.sampled_from(["mean", "sum"])


def plain_cross_entropy(logits, labels, ignore_index=-100, reduction="mean"):
    flat = logits.float().reshape(-1, logits.shape[-1])
    return torch.nn.functional.cross_entropy(flat, labels.reshape(-1), ignore_index=ignore_index, reduction=reduction)


def assert_same_loss(ours, plain, truth, logits, labels, reduction="mean"):
    """In float32, a token's loss is a difference of numbers as large as its logits and ln V."""
    assert ours.shape == ()
    assert ours.dtype == torch.float32
    if np.isnan(truth):
        assert ours.isnan()
        return
    real = np.where(np.isfinite(exact(logits)), exact(logits), 0)
    terms = 2 * np.abs(real).max(initial=0) + np.log(logits.shape[-1]) + 1
    assert_no_worse(ours, plain, truth, terms=terms * (labels.numel() if reduction == "sum" else 1))


@st.composite
def judged(draw, dtype):
    """(logits, labels, ignore_index), with no, some or all labels ignored."""
    shape, V = draw(leading_axes), draw(around_powers_of_two(300))
    rng = np.random.default_rng(draw(SEEDS))
    logits = normal(rng, (*shape, V), dtype, draw(st.sampled_from([1e-3, 1.0, 1e2, 1e4])))
    ignore_index = draw(st.sampled_from([-100, -1, 0, V - 1, V + 7]))
    labels = np.where(rng.random(shape) < draw(st.sampled_from([0, 0.3, 1])), ignore_index, rng.integers(0, V, shape))
    return logits, integers(labels), ignore_index


@pytest.mark.parametrize("dtype", DTYPES)
@given(st.data(), layouts, layouts, reductions)
@examples(80)
def test_cross_entropy_is_as_close_to_the_reference_as_float32_pytorch(dtype, data, layout, label_layout, reduction):
    logits, labels, ignore_index = data.draw(judged(dtype))
    if data.draw(st.booleans()):
        labels = labels.int()
    ours = cross_entropy(laid_out(logits, layout), laid_out(labels, label_layout), ignore_index, reduction)
    truth = reference.cross_entropy(exact(logits), exact(labels), ignore_index, reduction)
    plain = plain_cross_entropy(logits, labels.long(), ignore_index, reduction)
    assert_same_loss(ours, plain, truth, logits, labels, reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@given(
    st.integers(0, 40), st.integers(1, 40), around_powers_of_two(90), st.sampled_from([1, 100, 1000, 2**27]),
    st.lists(layouts, min_size=3, max_size=3), reductions, SEEDS,
)  # fmt: skip
@examples(80)
def test_linear_cross_entropy_is_as_close_to_the_reference_as_pytorch(
    dtype, count, width, V, at_once, layout, reduction, seed
):
    rng = np.random.default_rng(seed)
    hidden, weight = normal(rng, (1, count, width), dtype), normal(rng, (V, width), dtype)
    labels = integers(rng.integers(-1, V, (1, count)))
    args = map(laid_out, (hidden, weight, labels), layout)
    with mock.patch.object(tiles, "LOGITS_AT_ONCE", at_once):
        ours = linear_cross_entropy(*args, -1, reduction)
    truth = reference.linear_cross_entropy(exact(hidden), exact(weight), exact(labels), -1, reduction)
    logits = hidden @ weight.T
    plain = plain_cross_entropy(logits, labels, -1, reduction)
    assert ours.dtype == torch.float32
    if np.isnan(truth):
        assert ours.isnan()
        return
    # The logits, computed in pieces of another size, may each round the other way: a difference of two ulps.
    terms = float((hidden.abs().double() @ weight.abs().double().T).max()) + np.log(V) + 1 if count else 1.0
    tokens = count if reduction == "sum" else 1
    eps = torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
    assert_no_worse(ours, plain, truth, terms=tokens * (2 * terms + eps * float(logits.abs().max() if count else 0)))


@given(st.integers(1, 30), around_powers_of_two(64), st.integers(1, 2000), SEEDS)
@examples(40)
def test_pieces_equal_the_whole(count, V, at_once, seed):
    """Sums of small integers are exact in any order, so the pieces must give the same bits."""
    rng = np.random.default_rng(seed)
    hidden, weight = (integers(rng.integers(-4, 5, shape)).float() for shape in ((count, 7), (V, 7)))
    labels = integers(rng.integers(0, V, count))
    whole = cross_entropy(hidden @ weight.T, labels)
    with mock.patch.object(tiles, "LOGITS_AT_ONCE", at_once):
        assert same_bits(linear_cross_entropy(hidden, weight, labels), whole)
    assert same_bits(linear_cross_entropy(hidden, weight, labels), whole)


def test_only_a_piece_of_the_logits_exists_at_a_time():
    hidden, weight = torch.ones(64, 4, device=DEVICE), torch.ones(100, 4, device=DEVICE)
    labels, largest = integers(np.zeros(64)), []
    from llama.kernels import cross_entropy as module

    run = module._run
    with (
        mock.patch.object(tiles, "LOGITS_AT_ONCE", 1000),
        mock.patch.object(module, "_run", lambda logits, *rest: (largest.append(logits.numel()), run(logits, *rest))),
    ):
        loss = linear_cross_entropy(hidden, weight, labels)
    assert max(largest) <= 1000
    assert sum(largest) == 6400
    torch.testing.assert_close(loss.item(), np.log(100), atol=1e-5, rtol=0)


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), around_powers_of_two(70), SEEDS,
       st.sampled_from(LAYOUTS[1:]), st.sampled_from(LAYOUTS[1:]))  # fmt: skip
@examples(40)
def test_layout_changes_no_bit(shape, V, seed, layout, label_layout):
    rng = np.random.default_rng(seed)
    logits, labels = normal(rng, (*shape, V), torch.float32), integers(rng.integers(0, V, shape))
    whole = cross_entropy(logits, labels)
    assert same_bits(cross_entropy(laid_out(logits, layout), laid_out(labels, label_layout)), whole)
    axes = tuple(reversed(range(len(shape))))
    odd = logits.permute(*axes, len(shape)).contiguous().permute(*axes, len(shape))
    assert same_bits(cross_entropy(odd, labels), whole)
    assert same_bits(cross_entropy(logits[:1].expand_as(logits), labels), cross_entropy(logits[:1].repeat(
        shape[0], *[1] * len(shape)), labels))  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("V", [4095, 4096, 4097, 9000])
def test_large_vocabularies(dtype, V):
    """More columns than one block, with the largest logit in the first block, in the last, and in both."""
    rng = np.random.default_rng(V)
    logits = normal(rng, (4, V), dtype)
    logits[0, 5], logits[1, -1], logits[2, 5], logits[2, -1] = 50, 50, 50, 50
    labels = integers([5, 7, V - 1, V - 1])
    truth = reference.cross_entropy(exact(logits), exact(labels))
    assert_same_loss(cross_entropy(logits, labels), plain_cross_entropy(logits, labels), truth, logits, labels)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_masked_vocabulary(dtype):
    """Logits of -∞, among them a whole first block, contribute nothing; at the label they give a loss of +∞."""
    logits = torch.full((3, 5000), float("-inf"), device=DEVICE).to(dtype)
    logits[:, 4500:] = normal(np.random.default_rng(0), (3, 500), dtype)
    labels = integers([4600, 4999, 4500])
    alone = cross_entropy(logits[:, 4500:].contiguous(), labels - 4500)
    assert_no_worse(cross_entropy(logits, labels), alone, exact(alone), terms=12)  # 2 ln 500: summed in another order
    assert cross_entropy(logits, integers([0, 4999, 4500])) == float("inf")
    assert cross_entropy(logits, integers([-100, 4999, -100])).isfinite()


def test_labels_that_count_for_nothing_and_labels_that_are_none():
    logits = normal(np.random.default_rng(0), (3, 10), torch.float32)
    nan = float("nan")
    assert cross_entropy(logits, integers([-100, -100, -100])).isnan()
    assert cross_entropy(logits, integers([-100, -100, -100]), reduction="sum") == 0
    assert cross_entropy(logits[:0], integers([])).isnan()
    assert linear_cross_entropy(logits[:0], logits, integers([])).isnan()
    for wrong in (10, 11, -1, -101, 2**40):
        assert cross_entropy(logits, integers([1, wrong, 2])).isnan()
        assert linear_cross_entropy(logits, logits.new_ones(10, 10), integers([1, wrong, 2])).isnan()
    assert same_bits(cross_entropy(logits[0], integers(3)), cross_entropy(logits[:1], integers([3])))  # one token
    logits[1] = nan  # ignored rows are not read
    assert cross_entropy(logits, integers([1, -100, 2])).isfinite()
    assert same_bits(cross_entropy(logits, integers([1, -100, 2])), cross_entropy(logits[[0, 2]], integers([1, 2])))


def test_arguments_that_do_not_fit_are_named():
    logits, labels = torch.ones(3, 10, device=DEVICE), integers([1, 2, 3])
    with pytest.raises(ValueError, match=r"cross_entropy: labels must be integers of the shape of logits without its"):
        cross_entropy(logits, labels[:2])
    with pytest.raises(ValueError, match=r"got \(3,\) of torch.float32 for \(3, 10\)"):
        cross_entropy(logits, labels.float())
    with pytest.raises(ValueError, match="cross_entropy: labels"):
        cross_entropy(logits[:, :0], labels)
    with pytest.raises(ValueError, match=r"weight must be \(V, 10\) of torch.float32, got \(4, 9\) of torch.float32"):
        linear_cross_entropy(logits, torch.ones(4, 9, device=DEVICE), labels)
    with pytest.raises(ValueError, match="weight must be"):
        linear_cross_entropy(logits, torch.ones(4, 10, device=DEVICE).half(), labels)
    with pytest.raises(ValueError, match=r"linear_cross_entropy: labels must be .* shape of hidden"):
        linear_cross_entropy(logits, logits, labels[:2])
    with pytest.raises(ValueError, match='reduction must be "mean" or "sum", got \'none\''):
        cross_entropy(logits, labels, reduction="none")
