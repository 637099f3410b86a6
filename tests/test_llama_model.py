"""The model in PyTorch: against transformers in float32, against the reference in float64, and every argument."""

import copy
import pickle
import threading
import warnings

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import as_float64, both_models, counted_positions, miss, transformers_model
from strategies import SEEDS, batches, configs
from threadpoolctl import threadpool_limits
from torch import nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import llama
from llama import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    modeling,
    ops,
    reference,
    row,
)
from llama.activations import ACTIVATIONS
from llama.modeling import LlamaRMSNorm
from llama.outputs import CausalLMOutputWithPast

# Two float32 computations in different orders: 6e-8 per operation, times a few hundred operations and the sharp
# attention of these models. A wrong convention shows at 1e-2 and above.
FLOAT32 = 1e-4
# A gradient passes through all of that twice.
GRADIENT = 5e-4
# float64, except for what both sides keep in float32: cos and sin.
FLOAT64 = 1e-5

CLASSES = ["LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaForTokenClassification",
           "LlamaForQuestionAnswering"]  # fmt: skip
SMALL = dict(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)  # fmt: skip
STATELESS = ["default", "linear", "yarn", "llama3"]  # RoPE types whose angles do not depend on the length


@st.composite
def models(draw, kinds=None, **options):
    """(transformers' fields, ids, mask, seed of the weights), with ids and mask as arrays."""
    fields = draw(configs(kinds)) | {"pad_token_id": draw(st.sampled_from([None, 0]))}
    ids, mask = draw(batches(fields["vocab_size"], **options))
    return fields, ids, mask, draw(SEEDS)


def tensor(array):
    return None if array is None else torch.tensor(array)


def real_tokens(ids, mask):
    """Mask of the tokens whose outputs matter: all but padding."""
    return torch.ones(ids.shape, dtype=torch.bool) if mask is None else torch.tensor(mask == 1)


def assert_near(ours, theirs, bar=FLOAT32):
    assert miss(ours.detach().float(), theirs.detach().float()) < bar


# -- parity -----------------------------------------------------------------------------------------------------------


@given(models(), st.sampled_from([None, "sdpa", "eager"]))
@settings(max_examples=100)
def test_everything_there_is_to_see_equals_transformers(drawn, implementation):
    fields, ids, mask, seed = drawn
    ours, theirs = both_models(fields, seed, attn_implementation=implementation)
    see = dict(attention_mask=tensor(mask), output_hidden_states=True, output_attentions=True, use_cache=True)
    with torch.no_grad():
        expected = theirs(tensor(ids), position_ids=counted_positions(ids, mask), **see)
        out = ours(tensor(ids), **see)
        blind = ours(tensor(ids), tensor(mask))  # the path that returns no attention weights
    real = real_tokens(ids, mask)
    assert_near(out.logits[real], expected.logits[real])
    assert_near(blind.logits[real], expected.logits[real])
    assert len(out.hidden_states) == len(expected.hidden_states) == fields["num_hidden_layers"] + 1
    for mine, their in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert_near(mine[real], their[real])
    assert len(out.attentions) == fields["num_hidden_layers"]
    for mine, their in zip(out.attentions, expected.attentions, strict=True):
        assert_near(mine.transpose(1, 2)[real], their.transpose(1, 2)[real])
    for mine, their in zip(out.past_key_values, expected.past_key_values.layers, strict=True):
        assert_near(mine[0].transpose(1, 2)[real], their.keys.transpose(1, 2)[real])
        assert_near(mine[1].transpose(1, 2)[real], their.values.transpose(1, 2)[real])
    assert all(torch.isfinite(x).all() for x in (out.logits, blind.logits))  # padding too


@given(models(), st.booleans())
@settings(max_examples=60)
def test_float64_equals_the_reference_in_padding_too(drawn, eager):
    """Where a token sees no key, both give zeros; transformers averages."""
    fields, ids, mask, seed = drawn
    ours, _ = both_models(fields, seed, attn_implementation="eager" if eager else None)
    params = as_float64({name: weight.numpy() for name, weight in ours.state_dict().items()})
    see = dict(output_hidden_states=True, output_attentions=True)
    truth = reference.forward(params, reference.Config.from_dict(fields), ids, mask, **see)
    with torch.no_grad():
        out = ours.double()(tensor(ids), tensor(mask), **see)
        logits = ours(tensor(ids), tensor(mask)).logits
    assert logits.dtype == torch.float64
    assert miss(logits, truth.logits) < FLOAT64
    assert miss(out.logits, truth.logits) < FLOAT64
    for mine, their in zip(out.hidden_states, truth.hidden_states, strict=True):
        assert miss(mine, their) < FLOAT64
    for mine, their in zip(out.attentions, truth.attentions, strict=True):
        assert miss(mine, their) < FLOAT64


def gradients(model, logits, real, weights, inputs=None):
    """Return the gradients of Σ weights · real tokens' logits for every parameter, and `inputs` if given."""
    model.zero_grad()
    (logits[real] * weights).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    return found if inputs is None else found | {"inputs_embeds": inputs.grad}


def assert_gradients_near(ours, theirs, bar=GRADIENT):
    assert ours.keys() == theirs.keys()
    # Terms that cancel (a key's bias, say) leave noise on the scale of what cancelled.
    largest = max(float(g.abs().max()) for g in theirs.values() if g is not None)
    for name, their in theirs.items():
        if their is None:
            assert ours[name] is None, name
        else:
            assert ours[name].dtype == their.dtype
            assert (ours[name] - their).abs().max() <= bar * (float(their.abs().max()) + 0.01 * largest), name


@given(models(), st.booleans(), st.sampled_from([None, "eager"]))
@settings(max_examples=60)
def test_gradients_of_every_parameter_equal_transformers(drawn, embedded, implementation):
    fields, ids, mask, seed = drawn
    ours, theirs = both_models(fields, seed, attn_implementation=implementation)
    real = real_tokens(ids, mask)
    rng = torch.Generator().manual_seed(seed)
    weights = torch.randn(int(real.sum()), fields["vocab_size"], generator=rng)
    found = []
    for model, more in ((ours, {}), (theirs, {"position_ids": counted_positions(ids, mask)})):
        inputs = None
        given_as = {"input_ids": tensor(ids)}
        if embedded:
            inputs = model.get_input_embeddings().weight.detach()[ids].clone().requires_grad_()
            given_as = {"inputs_embeds": inputs}
        logits = model.train()(**given_as, attention_mask=tensor(mask), **more).logits
        found.append(gradients(model, logits, real, weights, inputs))
    assert_gradients_near(*found)


@given(models(), st.sampled_from([None, 1, 7.5]), st.sampled_from([-100, 0]))
@settings(max_examples=60)
def test_loss_and_its_gradient_equal_transformers(drawn, num_items, ignored):
    fields, ids, _, seed = drawn
    labels = torch.tensor(np.where(np.random.default_rng(seed).random(ids.shape) < 0.3, ignored, ids))
    ours, theirs = both_models(fields, seed)
    more = dict(labels=labels, num_items_in_batch=num_items, ignore_index=ignored)
    loss, expected = ours(tensor(ids), **more).loss, theirs(tensor(ids), **more).loss
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    counted = bool((labels[:, 1:] != ignored).any())
    assert loss.item() == pytest.approx(expected.item(), rel=FLOAT32, abs=FLOAT32, nan_ok=True)
    truth = reference.causal_lm_loss(ours(tensor(ids)).logits.detach().double().numpy(),
                                     np.where(labels == ignored, -100, labels))  # fmt: skip
    if counted:
        items = 1 if num_items is None else int((labels[:, 1:] != ignored).sum()) / num_items
        assert loss.item() == pytest.approx(truth * items, rel=FLOAT32, abs=FLOAT32)
        loss.backward()
        expected.backward()
        assert_gradients_near(*({n: p.grad for n, p in model.named_parameters()} for model in (ours, theirs)))
    else:
        assert num_items is not None or loss.isnan()


@given(models(kinds=STATELESS))
@settings(max_examples=40)
def test_a_padded_row_equals_the_row_alone(drawn):
    fields, ids, mask, seed = drawn
    ours, _ = both_models(fields, seed)
    ours.double()
    with torch.no_grad():
        together = ours(tensor(ids), tensor(mask)).logits
        for row, real in enumerate(real_tokens(ids, mask)):
            alone = ours(tensor(ids)[row : row + 1, real]).logits[0]
            assert miss(together[row, real], alone) < 1e-10  # rounding only


def test_a_mask_with_holes_counts_what_is_left():
    ours, _ = both_models(SMALL, 0)
    ids, mask = torch.arange(12).view(2, 6), torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 0, 1, 1, 1]])
    with torch.no_grad():
        logits = ours(ids, mask).logits
        for row in range(2):
            real = mask[row] == 1
            assert_near(logits[row, real], ours(ids[row : row + 1, real]).logits[0], 1e-5)


# -- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [None, "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_misses_the_truth_by_no_more_than_transformers(dtype, implementation):
    squares = np.zeros(2)
    rng = np.random.default_rng(0)
    for seed in range(12):
        fields = SMALL | {"attention_bias": seed % 2 == 0, "mlp_bias": seed % 3 == 0, "hidden_size": 64}
        ids = rng.integers(0, 30, (2, 20))
        mask = (np.arange(20) >= [[0], [7]]).astype(int)
        ours, theirs = (model.to(dtype) for model in both_models(fields, seed, attn_implementation=implementation))
        theirs.model.rotary_emb.inv_freq = ours.model.rotary_emb.inv_freq  # `.to` rounds theirs
        params = {name: weight.double().numpy() for name, weight in ours.state_dict().items()}
        truth = torch.tensor(reference.forward(params, reference.Config.from_dict(fields), ids, mask).logits)
        with torch.no_grad():
            found = (
                ours(tensor(ids), tensor(mask)).logits,
                theirs(tensor(ids), tensor(mask), position_ids=counted_positions(ids, mask)).logits,
            )
        real = mask == 1
        for place, logits in enumerate(found):
            assert logits.dtype == dtype
            squares[place] += float((logits.double() - truth)[real].square().mean())
    # Over 12 models and 12,000 logits; two orders of the same roundings differ by less.
    assert squares[0] <= 1.2 * squares[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_rounds_where_transformers_does(dtype, weight_dtype):
    """Before the gain: halves are equal to the last bit, but for ties."""
    theirs = transformers.models.llama.modeling_llama.LlamaRMSNorm(96, 1e-5)
    ours = LlamaRMSNorm(96, 1e-5)
    torch.manual_seed(0)
    with torch.no_grad():
        theirs.weight.uniform_(0.5, 1.5)
        ours.weight.copy_(theirs.weight)
        x = (3 * torch.randn(64, 96)).to(dtype)
        mine, their = ours.to(weight_dtype)(x), theirs.to(weight_dtype)(x)
    assert mine.dtype == their.dtype
    if dtype == torch.float32:
        assert_near(mine, their, 1e-6)
    else:
        assert (mine != their).float().mean() < 0.002  # the mean's last bit may turn a tie


MOVES = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "double": lambda m: m.double(),
    "there and back": lambda m: m.bfloat16().float(),
    "meta": lambda m: m.to("meta").to_empty(device="cpu"),
    "deepcopy": lambda m: copy.deepcopy(m).half(),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("kind", ["default", "llama3"])
def test_no_move_rounds_the_frequencies(move, kind):
    rope = {"rope_type": kind, "rope_theta": 5e5}
    if kind == "llama3":
        rope |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    ours, theirs = both_models(SMALL | {"rope_parameters": rope}, 0)
    before = theirs.model.rotary_emb.inv_freq
    after = MOVES[move](ours).model.rotary_emb.inv_freq
    assert after.dtype == torch.float32
    assert after.device.type == "cpu"
    np.testing.assert_allclose(after, before, rtol=3e-7)  # two float32 powers: an ulp or two
    assert "inv_freq" not in str(ours.state_dict().keys())


def test_angles_far_out_are_right_in_bfloat16():
    ours, _ = both_models(SMALL | {"head_dim": 16}, 0)
    rotary = ours.bfloat16().model.rotary_emb
    cos, sin = rotary(torch.zeros(1, dtype=torch.bfloat16), torch.tensor([[2001]]))
    angles = 2001 * 10000.0 ** (-np.arange(0, 16, 2) / 16)
    assert cos.dtype == sin.dtype == torch.bfloat16
    assert miss(cos[0, 0, :8].float(), np.cos(angles)) < 2**-8
    assert miss(sin[0, 0, 8:].float(), np.sin(angles)) < 2**-8


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    return both_models(SMALL, 0)[0].requires_grad_(False)


@pytest.fixture
def ids():
    return torch.tensor(np.random.default_rng(0).integers(1, 30, (2, 6)))


@pytest.fixture
def trained():
    """A fresh model to train."""
    return both_models(SMALL, 0)[0].train()


def test_embeddings_in_place_of_ids(small, ids):
    embeds = small.get_input_embeddings()(ids)
    assert torch.equal(small(inputs_embeds=embeds).logits, small(ids).logits)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    assert torch.equal(small(inputs_embeds=embeds, attention_mask=mask).logits, small(ids, mask).logits)


def test_int32_ids_and_labels_do_as_well(small, ids):
    assert torch.equal(small(ids.int()).logits, small(ids).logits)
    assert torch.equal(small(ids, labels=ids.int()).loss, small(ids, labels=ids).loss)


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.uint8, torch.float32, torch.bfloat16])
def test_a_mask_may_be_of_any_kind(small, ids, kind):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    assert torch.equal(small(ids, mask.to(kind)).logits, small(ids, mask).logits)
    assert not torch.equal(small(ids, mask).logits, small(ids).logits)


def additive(visible, dtype=torch.float32, low=None):
    low = torch.finfo(dtype).min if low is None else low
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, low)


SEE = pytest.mark.parametrize("see", [False, True])  # output_attentions: a different code path


@SEE
@pytest.mark.parametrize("kind", ["bool", "float", "infinite", "bfloat16", "per head"])
def test_a_tree_in_a_mask_of_four_axes_equals_separate_rows(small, see, kind):
    """Three shared tokens, then two continuations of two tokens each, in one row."""
    row, rows = torch.tensor([[3, 1, 4, 1, 5, 9, 2]]), torch.tensor([[3, 1, 4, 1, 5], [3, 1, 4, 9, 2]])
    positions = torch.tensor([0, 1, 2, 3, 4, 3, 4])
    visible = torch.ones(7, 7, dtype=torch.bool).tril()
    visible[5:, 3:5] = False
    mask = visible[None, None]
    if kind == "per head":
        mask = mask.expand(1, 4, 7, 7)
    elif kind != "bool":
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        mask = additive(mask, dtype, -torch.inf if kind == "infinite" else None)
    apart = small(rows).logits
    for position_ids in (positions, positions[None]):
        tree = small(row, mask, position_ids, output_attentions=see).logits[0]
        assert_near(tree[:5], apart[0], 1e-5)
        assert_near(tree[5:], apart[1, 3:], 1e-5)


@SEE
def test_a_mask_of_four_axes_says_it_all(small, ids, see):
    """No causal mask is added to it: tokens may see the future."""
    ones = torch.ones(1, 1, 6, 6, dtype=torch.bool)
    out = small(ids, ones, output_attentions=True)
    assert (out.attentions[0] > 0).all()
    assert_near(small(ids, additive(ones), output_attentions=see).logits, out.logits, 1e-5)
    bias = torch.randn(2, 4, 6, 6)  # any float bias counts, as for ALiBi
    found = small(ids, bias, output_attentions=see)
    q, k, v = torch.randn(3, 2, 4, 6, 8).unbind()
    expected = F.scaled_dot_product_attention(q, k, v, bias)
    assert_near(ops.weigh(ops.attention_weights(q, k, bias), v), expected, 1e-5)
    assert miss(found.logits, small(ids).logits) > 1e-2


@SEE
def test_a_mask_of_four_axes_after_a_cache(small, ids, see):
    whole = small(ids).logits
    cache = small(ids[:, :4], use_cache=True).past_key_values
    mask = torch.ones(2, 6, dtype=torch.bool).tril(4)[None, None].expand(2, 1, 2, 6)
    assert_near(small(ids[:, 4:], mask, past_key_values=cache, output_attentions=see).logits, whole[:, 4:], 1e-5)


@SEE
@pytest.mark.parametrize("low", ["infinite", "lowest"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whoever_may_see_no_key_stays_finite_under_a_float_mask(small, ids, see, low, dtype):
    """Nothing attends to it, but a NaN would spread: a weight of 0 times NaN is NaN."""
    visible = torch.ones(6, 6, dtype=torch.bool).tril() & (torch.arange(6) >= 2)
    mask = additive(visible[None, None], torch.float32, -torch.inf if low == "infinite" else None)
    model = copy.deepcopy(small).to(dtype)
    out = model(ids, mask, torch.tensor([0, 0, 0, 1, 2, 3]), output_attentions=see)
    assert torch.isfinite(out.logits).all()
    assert_near(out.logits[:, 2:], model(ids[:, 2:], output_attentions=see).logits, 1e-5 if low == dtype else 0.05)


@SEE
def test_integers_in_a_mask_of_four_axes_mean_what_booleans_do(small, ids, see):
    """Added to the scores as 0 and 1, they would let tokens see the future."""
    causal = torch.ones(1, 1, 6, 6, dtype=torch.long).tril()
    assert_near(small(ids, causal, output_attentions=see).logits, small(ids).logits, 1e-5)


@SEE
def test_whoever_may_see_no_key_attends_to_nothing(small, ids, see):
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6])
    out = small(ids, mask, output_attentions=True)
    assert torch.equal(out.attentions[0][0, :, :3], torch.zeros(4, 3, 6))
    assert torch.equal(out.attentions[1][1], torch.zeros(4, 6, 6))
    first = small.model.layers[0]
    normed = first.input_layernorm(small.get_input_embeddings()(ids))
    rotation = small.model.rotary_emb(normed, torch.zeros(2, 6, dtype=torch.long))
    visible = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    attended, weights = first.self_attn(normed, rotation, visible, None, see)
    assert torch.equal(attended, torch.zeros_like(attended))
    assert (weights is None) == (not see)


@SEE
def test_gradients_pass_rows_that_see_nothing(trained, ids, see):
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [0] * 6])
    out = trained(ids, mask, output_attentions=see)
    out.logits[0, 3:].sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in trained.parameters())


def test_positions_may_be_anywhere(small, ids):
    far = small(ids, position_ids=torch.arange(1000, 1006)).logits
    assert_near(far, small(ids, position_ids=torch.arange(1000, 1006)[None].expand(2, 6)).logits, 1e-6)
    assert_near(far, small(ids).logits, 1e-2)  # only relative positions matter, but angles are float32
    assert not torch.equal(far, small(ids).logits)
    assert miss(small(ids, position_ids=torch.arange(0, 12, 2)).logits, small(ids).logits) > 1e-2


def test_cache_positions_are_checked_and_can_go_back(small, ids):
    whole = small(ids).logits
    assert torch.equal(small(ids, cache_position=torch.arange(6)).logits, whole)
    assert torch.equal(small(ids, cache_position=torch.arange(6), use_cache=False).logits, whole)
    cache = small(ids[:, :5], use_cache=True).past_key_values
    again = small(ids[:, 2:], past_key_values=cache, cache_position=torch.arange(2, 6))
    assert_near(again.logits, whole[:, 2:], 1e-5)
    assert cache.get_seq_length() == 6


def test_whether_a_cache_is_returned(small, ids):
    assert small(ids).past_key_values.get_seq_length() == 6  # config.use_cache
    assert small(ids, use_cache=False).past_key_values is None
    quiet = copy.deepcopy(small)
    quiet.config.use_cache = False
    assert quiet(ids).past_key_values is None
    assert quiet(ids, use_cache=True).past_key_values.get_seq_length() == 6
    cache = llama.DynamicCache()
    assert small(ids, past_key_values=cache).past_key_values is cache
    assert small(ids, past_key_values=cache, use_cache=False).past_key_values is None
    assert cache.get_seq_length() == 12  # still updated in place


@pytest.mark.parametrize("implementation", [None, "sdpa", "eager"])
def test_attentions_are_delivered_whatever_computes(small, ids, implementation):
    model = copy.deepcopy(small)
    model.config.attn_implementation = implementation
    out = model(ids, output_attentions=True)
    assert [a.shape for a in out.attentions] == [(2, 4, 6, 6)] * 2
    assert_near(out.attentions[0].sum(-1), torch.ones(2, 4, 6), 1e-6)
    assert torch.equal(out.attentions[0], out.attentions[0].tril())
    assert_near(out.logits, model(ids).logits, 1e-5)
    assert model(ids).attentions is None
    assert model(ids).hidden_states is None
    model.config.output_attentions = model.config.output_hidden_states = True
    assert len(model(ids).attentions) == 2
    assert len(model(ids).hidden_states) == 3
    assert list(model(ids, output_attentions=False, output_hidden_states=False)) == ["logits", "past_key_values"]


def test_the_last_hidden_state_is_normed(small, ids):
    out = small(ids, output_hidden_states=True)
    assert torch.equal(out.hidden_states[0], small.get_input_embeddings()(ids))
    assert torch.equal(small.lm_head(out.hidden_states[-1]), out.logits)
    assert torch.equal(small.model(ids).last_hidden_state, out.hidden_states[-1])


def test_a_tuple_leaves_out_what_is_not_there(small, ids):
    out = small(ids, return_dict=False)
    assert type(out) is tuple
    assert len(out) == 2
    assert torch.equal(out[0], small(ids).logits)
    loss, logits, _cache, hidden, attentions = small(
        ids, labels=ids, output_hidden_states=True, output_attentions=True, return_dict=False
    )
    assert loss.shape == ()
    assert logits.shape == (2, 6, 30)
    assert (len(hidden), len(attentions)) == (3, 2)
    assert len(small(ids, use_cache=False, return_dict=False)) == 1
    assert type(small.model(ids, return_dict=False)) is tuple
    model = copy.deepcopy(small)
    model.config.return_dict = False
    assert type(model(ids)) is tuple
    assert type(model(ids, return_dict=True)) is CausalLMOutputWithPast


def test_an_output_is_a_record_a_dictionary_and_a_tuple(small, ids):
    out = small(ids, output_hidden_states=True)
    assert list(out) == list(out.keys()) == ["logits", "past_key_values", "hidden_states"]
    assert out["logits"] is out.logits is out[0] is out.to_tuple()[0]
    assert out[-1] is out.hidden_states
    assert len(out[:2]) == 2
    assert out.loss is None
    assert "loss" not in out
    out.loss = torch.tensor(1.0)
    assert out["loss"] is out.loss
    assert out[0] is out.loss
    copied = pickle.loads(pickle.dumps(CausalLMOutputWithPast(logits=out.logits)))
    assert type(copied) is CausalLMOutputWithPast
    assert torch.equal(copied.logits, out.logits)
    with pytest.raises(AttributeError, match="has no attribute 'logit'"):
        _ = out.logit
    with pytest.raises(AttributeError, match="has no field 'logit'"):
        out.logit = 1
    with pytest.raises(TypeError, match="has no field 'logit'"):
        CausalLMOutputWithPast(logit=1)
    assert CausalLMOutputWithPast({"logits": 2}).logits == 2


@pytest.mark.parametrize("name", ["logits_to_keep", "num_logits_to_keep"])
def test_logits_of_some_tokens_only(small, ids, name):
    whole = small(ids).logits
    numbers = ((0, slice(None)), (1, slice(-1, None)), (4, slice(-4, None)), (9, slice(None)), (np.int64(1), [5]))
    for keep, places in (*numbers, (torch.tensor([5, 0, 2]), [5, 0, 2]), (torch.tensor([-1]), [5])):
        kept = small(ids, **{name: keep}).logits
        assert kept.shape == whole[:, places].shape
        assert_near(kept, whole[:, places], 1e-6)


@pytest.mark.parametrize("keep", [0, 1, 3, 9, torch.tensor([0, 4, 5])])
def test_the_loss_counts_the_logits_that_are_kept(small, ids, keep):
    labels = ids.clone()
    labels[0, 3] = -100
    out = small(ids, labels=labels, logits_to_keep=keep)
    shifted = torch.cat([labels[:, 1:], torch.full((2, 1), -100)], dim=1)
    wanted = shifted[:, keep] if isinstance(keep, torch.Tensor) else shifted[:, -keep:]
    expected = F.cross_entropy(out.logits.reshape(-1, 30), wanted.reshape(-1))
    torch.testing.assert_close(out.loss, expected, equal_nan=True)


def test_labels_that_are_shifted_already(small, ids):
    shifted = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    plain = small(ids, labels=ids).loss
    assert torch.equal(small(ids, shift_labels=shifted).loss, plain)
    assert torch.equal(small(ids, labels=ids, shift_labels=shifted).loss, plain)
    theirs = both_models(SMALL, 0)[1]
    assert_near(small(ids, shift_labels=ids).loss, theirs(ids, labels=ids, shift_labels=ids).loss)
    assert_near(small(ids, labels=ids, num_items_in_batch=torch.tensor(4)).loss, plain * 10 / 4, 1e-6)
    assert_near(small(ids, labels=ids, ignore_index=int(ids[0, 2])).loss,
                theirs(ids, labels=ids, ignore_index=int(ids[0, 2])).loss)  # fmt: skip


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 2), SEEDS, st.booleans(), st.booleans())
@settings(max_examples=30)
def test_packed_texts_equal_separate_rows(lengths, rows, seed, see, masked):
    ours, _ = both_models(SMALL, seed % 7)
    rng = np.random.default_rng(seed)
    texts = [torch.tensor(rng.integers(0, 30, (rows, length))) for length in lengths]
    packed, positions = torch.cat(texts, 1), torch.cat([torch.arange(n) for n in lengths])
    mask = torch.ones_like(packed) if masked else None
    if masked:
        mask[:, 0] = 0  # padding in the first text
    with torch.no_grad():
        for use_cache in (False, True):  # which decides packing in transformers
            out = ours(packed, mask, positions, use_cache=use_cache, packed=True, output_attentions=see)
            start = 0
            for text in texts:
                alone = None if not (masked and start == 0) else mask[:, : text.shape[1]]
                expected = ours(text, alone, torch.arange(text.shape[1])).logits
                assert_near(out.logits[:, start : start + text.shape[1]], expected, 2e-5)
                start += text.shape[1]
        if len(lengths) > 1 and max(lengths) > 1 and not masked:
            assert miss(ours(packed, None, positions).logits, out.logits) > 1e-4  # with a cache, `packed` is needed


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "positions", [[[0, 1, 2, 0, 1, 0]], [[0, 1, 2, 3, 4, 5], [0, 1, 0, 1, 2, 3]], [[4, 5, 6, 7, 8, 9]], [[0] * 6]]
)
def test_positions_tell_texts_apart_where_they_do_in_transformers(trained, ids, positions, checkpointing, masked):
    """As padding-free collators pack them: with no cache and no mask."""
    positions, theirs = torch.tensor(positions), both_models(SMALL, 0)[1].train()
    said = {"labels": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids) if masked else None}
    if checkpointing:
        trained.gradient_checkpointing_enable()
    else:
        said["use_cache"] = False
    loss = trained(ids, **said).loss
    assert_near(loss, theirs(ids, **said | {"use_cache": False}).loss, 1e-5)
    together = trained(ids, packed=True, **said).loss
    assert torch.equal(loss, together) == (not masked or positions[0, 0] == 4)


def test_packed_positions_compile_and_export(small, compiled, ids):
    for positions in (torch.tensor([[0, 1, 2, 0, 1, 2]]), torch.arange(6)[None]):
        said = {"position_ids": positions, "use_cache": False}
        expected = small(ids, position_ids=positions, packed=True).logits
        assert_near(compiled(ids, **said).logits, expected, 1e-5)
        exported = torch.export.export(small, (ids,), said, strict=False).module()
        assert_near(exported(ids, **said).logits, expected, 1e-5)


def test_packed_texts_and_a_mask_of_four_axes(small, ids):
    positions = torch.tensor([0, 1, 2, 0, 1, 2])
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    expected = small(ids, position_ids=positions, packed=True).logits
    assert_near(small(ids, causal, positions, packed=True).logits, expected, 1e-6)
    everyone = small(ids, torch.ones_like(causal), positions, packed=True, output_attentions=True)
    assert torch.equal(everyone.attentions[0], everyone.attentions[0].tril())


@SEE
def test_attention_dropout_is_for_training_only(ids, see):
    ours, _ = both_models(SMALL, 0, attention_dropout=0.5)
    plain, _ = both_models(SMALL, 0)
    with torch.no_grad():
        expected = plain(ids).logits
        assert_near(ours(ids, output_attentions=see).logits, expected, 1e-6)
        ours.train()
        torch.manual_seed(0)
        first, second = (ours(ids, output_attentions=see) for _ in range(2))
        assert miss(first.logits, second.logits) > 1e-2
        if see:  # half of the weights dropped, the others doubled
            kept = first.attentions[0] != 0
            exact = plain(ids, output_attentions=True).attentions[0]
            assert_near(first.attentions[0][kept], 2 * exact[kept], 1e-5)
            assert not torch.equal(kept, exact != 0)
        x = plain.model.layers[0].input_layernorm(plain.get_input_embeddings()(ids))
        rotation = plain.model.rotary_emb(x, torch.arange(6)[None])
        exact = plain.model.layers[0].self_attn(x, rotation)[0]
        attend = ours.model.layers[0].self_attn
        mean = torch.stack([attend(x, rotation, None, None, see)[0] for _ in range(400)]).mean(0)
        assert miss(mean, exact) < 0.3  # 400 draws of spread 1: standard error 0.05; the largest of 192 elements


@given(models(kinds=["default", "yarn"]), st.booleans())
@settings(max_examples=15)
def test_gradient_checkpointing_changes_no_gradient(drawn, see):
    fields, ids, mask, seed = drawn
    ours, _ = both_models(fields, seed)
    ours.train()
    real, found = real_tokens(ids, mask), []
    weights = torch.randn(int(real.sum()), fields["vocab_size"])
    for enable in (False, True):
        if enable:
            ours.gradient_checkpointing_enable()
        out = ours(tensor(ids), tensor(mask), output_attentions=see, output_hidden_states=True)
        assert (out.past_key_values is None) == enable
        assert len(out.hidden_states) == fields["num_hidden_layers"] + 1
        found.append({name: g.clone() for name, g in gradients(ours, out.logits, real, weights).items()})
        assert not see or len(out.attentions) == fields["num_hidden_layers"]
    assert_gradients_near(found[1], found[0], 1e-5)
    assert ours.is_gradient_checkpointing
    assert ours.eval()(tensor(ids), tensor(mask)).past_key_values is not None
    ours.train().gradient_checkpointing_disable()
    assert ours(tensor(ids), tensor(mask)).past_key_values is not None


def test_gradient_checkpointing_recomputes(trained, ids, monkeypatch):
    calls = []
    monkeypatch.setattr(ops, "swiglu", lambda gate, up, *_: (calls.append(0), F.silu(gate) * up)[1])
    trained.gradient_checkpointing_enable()
    trained(ids).logits.sum().backward()
    assert len(calls) == 4
    trained(ids, use_cache=True)
    with torch.no_grad():
        assert trained(ids).past_key_values is not None


def test_gradient_checkpointing_after_a_cache_fills_it_once(trained, ids):
    """As with the prefix of prompt tuning: recomputation must not append to the cache again."""
    with torch.no_grad():
        prefix = trained(ids[:, :2], use_cache=True).past_key_values.to_legacy_cache()
    found = []
    for enable in (False, True):
        if enable:
            trained.gradient_checkpointing_enable()
        trained.zero_grad()
        trained(ids[:, 2:], past_key_values=prefix).logits.sum().backward()
        found.append({name: p.grad.clone() for name, p in trained.named_parameters()})
    assert_gradients_near(found[1], found[0], 1e-5)


def test_gradients_reach_attentions_through_checkpoints(trained, ids):
    found = []
    for enable in (False, True):
        if enable:
            trained.gradient_checkpointing_enable()
        trained.zero_grad()
        out = trained(ids, output_attentions=True)
        torch.stack(out.attentions).square().sum().backward()
        found.append(trained.model.layers[1].self_attn.q_proj.weight.grad.clone())
    assert_near(found[1], found[0], 1e-5)


@pytest.mark.parametrize("name", sorted(reference.ACTIVATIONS))
def test_every_activation_is_the_references(name):
    assert ACTIVATIONS.keys() == reference.ACTIVATIONS.keys()
    x = torch.linspace(-12, 12, 481, dtype=torch.float64)
    np.testing.assert_allclose(ACTIVATIONS[name]()(x), reference.ACTIVATIONS[name](x.numpy()), atol=1e-12)
    theirs = transformers.activations.ACT2FN[name](x.float())
    np.testing.assert_allclose(ACTIVATIONS[name]()(x.float()), theirs, atol=2e-6)


@pytest.mark.parametrize("act", [torch.tanh, torch.nn.Tanh(), lambda x: x.tanh()])
def test_an_activation_may_be_a_function(ids, act):
    named, _ = both_models(SMALL | {"hidden_act": "tanh"}, 0)
    model = LlamaForCausalLM(LlamaConfig(**SMALL, hidden_act=act)).eval()
    model.load_state_dict(named.state_dict())
    assert torch.equal(model(ids).logits, named(ids).logits)


# -- invalid arguments ------------------------------------------------------------------------------------------------


def some_cache(model, rows=2, tokens=3):
    return model(torch.ones(rows, tokens, dtype=torch.long), use_cache=True).past_key_values


def embeds(*shape):
    return torch.ones(shape)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: m(), "exactly one of input_ids and inputs_embeds"),
        (lambda m, x: m(x, inputs_embeds=embeds(2, 6, 16)), "exactly one of input_ids and inputs_embeds"),
        (lambda m, x: m(x[0]), r"input_ids must be \(batch, length\) of integers, got \(6,\) of int64"),
        (lambda m, x: m(x.float()), r"input_ids must be .* got \(2, 6\) of float32"),
        (lambda m, x: m(x > 3), r"input_ids must be .* of integers"),
        (lambda m, x: m(x[:, :0]), "input_ids must be .*0"),
        (lambda m, x: m(x[:0]), "input_ids must be .*0"),
        (lambda m, x: m(inputs_embeds=embeds(2, 0, 16)), "inputs_embeds must be .*0"),
        (lambda m, x: m(inputs_embeds=embeds(2, 6, 15)),
         r"inputs_embeds must be \(batch, length, 16\), got \(2, 6, 15\)"),
        (lambda m, x: m(inputs_embeds=embeds(6, 16)), r"inputs_embeds must be \(batch, length, 16\), got \(6, 16\)"),
        (lambda m, x: m(x, torch.ones(2, 5)),
         r"attention_mask must be \(2, 6\) or .*, 6, 6\).*0 tokens.*6 new.*\(2, 5\)"),
        (lambda m, x: m(x, torch.ones(2, 7)), "attention_mask must be"),
        (lambda m, x: m(x, torch.ones(1, 6)), "attention_mask must be"),
        (lambda m, x: m(x.tolist()), "input_ids must be a tensor .* got list"),
        (lambda m, x: m.model.layers[0](torch.zeros(2, 6, 16)), "position_embeddings must be"),
        (lambda m, x: m(x, torch.ones(6)), "attention_mask must be"),
        (lambda m, x: m(x, torch.ones(2, 6, 6)), "attention_mask must be"),
        (lambda m, x: m(x, torch.ones(3, 1, 6, 6)), "attention_mask must be"),
        (lambda m, x: m(x, torch.ones(2, 3, 6, 6)), "attention_mask must be"),
        (lambda m, x: m(x, torch.ones(2, 1, 1, 6)), "attention_mask must be"),
        (lambda m, x: m(x, torch.ones(2, 1, 6, 5)), "attention_mask must be"),
        (lambda m, x: m(x, torch.ones(2, 6), past_key_values=some_cache(m)),
         r"\(2, 9\).*3 tokens in the cache and 6 new"),
        (lambda m, x: m(x, torch.ones(2, 10), past_key_values=some_cache(m)), r"attention_mask must be \(2, 9\)"),
        (lambda m, x: m(x, torch.ones(2, 1, 6, 6), past_key_values=some_cache(m)), r"attention_mask must be \(2, 9\)"),
        (lambda m, x: m(x, position_ids=torch.ones(2, 5).long()),
         r"position_ids must be \(2, 6\) or \(1, 6\), got \(2, 5\)"),
        (lambda m, x: m(x, position_ids=torch.ones(3, 6).long()), "position_ids must be"),
        (lambda m, x: m(x, position_ids=torch.ones(1, 2, 6).long()), "position_ids must be"),
        (lambda m, x: m(x, position_ids=torch.ones(5).long()), "position_ids must be"),
        (lambda m, x: m(x, packed=True), "packed needs position_ids"),
        (lambda m, x: m(x, position_ids=torch.arange(6), packed=True, past_key_values=some_cache(m)),
         "continue a cache"),
        (lambda m, x: m(x, torch.zeros(2, 1, 6, 6), torch.arange(6), packed=True),
         "packed cannot be combined with a float"),
        (lambda m, x: m(x, cache_position=torch.arange(5), use_cache=True),
         "cache_position must be 6 positions from 0"),
        (lambda m, x: m(x, cache_position=torch.arange(1, 7), use_cache=True),
         "cache_position must be 6 positions from 0"),
        (lambda m, x: m(x, cache_position=torch.arange(4, 10), past_key_values=some_cache(m)), "6 positions from 3"),
        (lambda m, x: m(x, cache_position=torch.arange(-1, 5), past_key_values=some_cache(m)),
         "cache_position must be"),
        (lambda m, x: m(x, cache_position=torch.tensor([0, 1, 2, 3, 4, 9]), use_cache=True), "cache_position must be"),
        (lambda m, x: m(x, cache_position=torch.arange(1, 7), use_cache=False), "cache_position must be"),
        (lambda m, x: m(x, past_key_values=3), "past_key_values must be a Cache or a tuple of pairs, got int"),
        (lambda m, x: m(x, past_key_values=some_cache(m, rows=1)), "cache holds 1 rows, got 2"),
        (lambda m, x: m(x, past_key_values=some_cache(m).to_legacy_cache()[:1]), "layers"),
        (lambda m, x: m(x, past_key_values=some_cache(m).to_legacy_cache() * 2), "layers"),
        (lambda m, x: m(x, logits_to_keep=-1), r"logits_to_keep must be 0 \(all\) or more, got -1"),
        (lambda m, x: m(x, num_logits_to_keep=-2), "logits_to_keep must be .* got -2"),
        (lambda m, x: m(x, logits_to_keep=torch.tensor(1)), "logits_to_keep"),
        (lambda m, x: m(x, labels=x[:, 1:]), r"labels must have the tokens' shape \(2, 6\), got \(2, 5\)"),
        (lambda m, x: m(x, shift_labels=x[:1]), r"shift_labels must have the tokens' shape \(2, 6\), got \(1, 6\)"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(small, ids, call, message):
    with pytest.raises(ValueError, match=message):
        call(small, ids)


@pytest.mark.parametrize(("wrong", "message"), [(30, "from 0 to 29, got 30"), (-1, "from 0 to 29, got -1")])
def test_ids_outside_the_vocabulary_are_named(small, ids, wrong, message):
    ids[1, 2] = wrong
    with pytest.raises(IndexError, match=message):
        small(ids)


@pytest.mark.parametrize("kind", CLASSES)
def test_unknown_keywords_are_errors(kind, ids):
    model, _ = both_models(SMALL | {"pad_token_id": 0}, 0, kind)
    with pytest.raises(TypeError, match="attn_mask"):
        model(ids, attn_mask=torch.ones(2, 6))


def test_what_a_model_is_made_of_is_checked():
    with pytest.raises(ValueError, match="config must be a LlamaConfig, got dict"):
        LlamaModel(SMALL)
    with pytest.raises(ValueError, match=r"pad_token_id \(30\) must be below vocab_size \(30\)"):
        LlamaModel(LlamaConfig(**SMALL, pad_token_id=30))
    config = LlamaConfig(**SMALL)
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="num_key_value_heads"):
        LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, got 'cuda'"):
        ops.check_backend("cuda")
    assert [ops.check_backend(name) for name in ops.BACKENDS] == ["auto", "torch", "triton"]


def test_a_cache_that_breaks_off_is_named_before_it_is_filled(small, ids):
    cache = some_cache(small)
    with pytest.raises(ValueError, match="attention_mask"):
        small(ids, torch.ones(2, 6), past_key_values=cache)
    assert cache.get_seq_length() == 3


# -- heads ------------------------------------------------------------------------------------------------------------


@given(models(), st.integers(1, 4), st.data())
@settings(max_examples=60)
def test_sequence_classification_equals_transformers(drawn, num_labels, data):
    fields, ids, mask, seed = drawn
    pad = data.draw(st.integers(0, fields["vocab_size"] - 1))  # it occurs inside texts, too
    ids = ids if mask is None else np.where(mask == 1, ids, pad)
    fields, B = fields | {"pad_token_id": pad}, len(ids)
    ours, theirs = both_models(fields, seed, "LlamaForSequenceClassification", num_labels=num_labels)
    kinds = ["regression", "multi_label_classification"] + ["single_label_classification"] * (num_labels > 1)
    kind = data.draw(st.sampled_from([None, *kinds]))
    rng = torch.Generator().manual_seed(seed)
    whole = data.draw(st.booleans()) if kind is None else kind == "single_label_classification"
    if num_labels > 1 and whole:
        labels = torch.randint(0, num_labels, (B,), generator=rng)
    elif num_labels == 1 and kind in (None, "regression"):
        labels = torch.randn(B, generator=rng)
    else:
        labels = torch.rand(B, num_labels, generator=rng).round()
    ours.config.problem_type = theirs.config.problem_type = kind
    out = ours(tensor(ids), tensor(mask), labels=labels)
    expected = theirs(tensor(ids), tensor(mask), counted_positions(ids, mask), labels=labels)
    last = np.max(np.arange(ids.shape[1]) * (ids != pad), axis=1)
    read = np.ones(B, bool) if mask is None else mask[np.arange(B), last] == 1
    assert out.logits.shape == (B, num_labels)
    assert_near(out.logits[read], expected.logits[read])
    assert ours.config.problem_type == kind  # transformers would store what it inferred
    if not read.all():
        return
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=FLOAT32, abs=FLOAT32)
    out.loss.backward()
    expected.loss.backward()
    assert_gradients_near(*({n: p.grad for n, p in model.named_parameters()} for model in (ours, theirs)))


def classifier(num_labels=3, **more):
    return both_models(SMALL | {"pad_token_id": 0}, 0, "LlamaForSequenceClassification", num_labels=num_labels, **more)


def test_a_text_is_read_at_its_last_token(ids):
    model, _ = classifier()
    padded = torch.cat([ids, ids, ids])
    padded[0, 4:] = 0  # on the right
    padded[1, :2] = 0  # on the left
    padded[2, 3] = 0  # inside
    padded[3] = 0  # everywhere
    padded[4, [0, 5]] = 0
    mask = (padded != 0).long()
    mask[3, 0] = 1
    hidden = model.model(padded, mask).last_hidden_state
    expected = model.score(hidden[torch.arange(6), [3, 5, 5, 0, 4, 5]])
    assert torch.equal(model(padded, mask).logits, expected)
    vectors = model.get_input_embeddings()(padded)
    assert_near(model(inputs_embeds=vectors, attention_mask=mask).logits, expected, 1e-6)
    last = model.score(model.model(inputs_embeds=vectors).last_hidden_state[:, -1])
    assert_near(model(inputs_embeds=vectors).logits, last, 1e-6)


def test_embeddings_of_a_batch_are_read_where_the_mask_says():
    """Where transformers warns and reads padding instead."""
    model, theirs = classifier()
    vectors = torch.randn(1, 5, 16)
    assert_near(model(inputs_embeds=vectors).logits, theirs(inputs_embeds=vectors).logits)
    padded = torch.cat([vectors, torch.randn(1, 3, 16)], 1)
    mask = torch.tensor([[1] * 5 + [0] * 3])
    assert_near(model(inputs_embeds=padded, attention_mask=mask).logits, model(inputs_embeds=vectors).logits, 1e-5)


def test_a_batch_of_texts_needs_a_padding_token(ids):
    model, _ = both_models(SMALL, 0, "LlamaForSequenceClassification")
    assert model(ids[:1]).logits.shape == (1, 2)
    assert_near(model(ids[:1]).logits, model.score(model.model(ids[:1]).last_hidden_state[:, -1]), 1e-6)
    with pytest.raises(ValueError, match=r"no padding token is defined: set config\.pad_token_id"):
        model(ids)
    with pytest.raises(ValueError, match="no padding token is defined"):
        model(inputs_embeds=embeds(2, 3, 16))
    first = LlamaForSequenceClassification(LlamaConfig(**SMALL, pad_token_id=-1)).eval()  # as in the first LLaMA files
    assert torch.equal(first(ids).logits, first.score(first.model(ids).last_hidden_state[:, -1]))


def test_the_kind_of_problem_is_not_remembered(ids):
    model, _ = classifier()
    several = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    multi = model(ids, labels=several).loss
    logits = model(ids).logits
    torch.testing.assert_close(multi, F.binary_cross_entropy_with_logits(logits, several))
    for kind in (torch.long, torch.int32):
        torch.testing.assert_close(model(ids, labels=torch.tensor([2, 0], dtype=kind)).loss,
                                   F.cross_entropy(logits, torch.tensor([2, 0])))  # fmt: skip
    torch.testing.assert_close(model(ids, labels=several).loss, multi)
    model.config.problem_type = "multi_label_classification"
    torch.testing.assert_close(model(ids, labels=several.long()).loss, multi)
    model.config.problem_type = "regression"
    torch.testing.assert_close(model(ids, labels=several).loss, F.mse_loss(logits, several))
    one, _ = classifier(num_labels=1)
    whole = torch.tensor([2, 3])  # say, stars
    torch.testing.assert_close(one(ids, labels=whole).loss, F.mse_loss(one(ids).logits[:, 0], whole.float()))


def test_classifiers_take_and_give_what_the_model_does(ids):
    model, _ = classifier()
    cache = model(ids[:, :3], use_cache=True).past_key_values
    rest = model(ids[:, 3:], torch.ones(2, 6), past_key_values=cache, output_attentions=True, output_hidden_states=True)
    assert_near(rest.logits, model(ids).logits, 1e-5)
    assert rest.past_key_values is cache
    assert rest.attentions[0].shape == (2, 4, 3, 6)
    assert len(rest.hidden_states) == 3
    assert [t.shape for t in model(ids, return_dict=False, use_cache=False)] == [(2, 3)]
    again = model(ids[:, 3:], past_key_values=cache, cache_position=torch.arange(3, 6))
    assert_near(again.logits, model(ids).logits, 1e-5)


@given(models(), st.integers(1, 4))
@settings(max_examples=30)
def test_token_classification_equals_transformers(drawn, num_labels):
    fields, ids, mask, seed = drawn
    ours, theirs = both_models(fields, seed, "LlamaForTokenClassification", num_labels=num_labels)
    rng = np.random.default_rng(seed)
    counted = real_tokens(ids, mask) & torch.tensor(rng.random(ids.shape) < 0.8)
    labels = torch.tensor(rng.integers(0, num_labels, ids.shape)).where(counted, -100)
    out = ours(tensor(ids), tensor(mask), labels=labels)
    expected = theirs(tensor(ids), tensor(mask), counted_positions(ids, mask), labels=labels)
    real = real_tokens(ids, mask)
    assert_near(out.logits[real], expected.logits[real])
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=FLOAT32, abs=FLOAT32, nan_ok=True)
    if not out.loss.isnan():
        out.loss.backward()
        expected.loss.backward()
        assert_gradients_near(*({n: p.grad for n, p in model.named_parameters()} for model in (ours, theirs)))


def test_int32_labels_do_for_tokens_too(ids):
    model, _ = both_models(SMALL, 0, "LlamaForTokenClassification")
    assert torch.equal(model(ids, labels=(ids % 2).int()).loss, model(ids, labels=ids % 2).loss)
    model, _ = both_models(SMALL, 0, "LlamaForQuestionAnswering")
    starts, ends = torch.tensor([1, 2]), torch.tensor([3, 2])
    expected = model(ids, start_positions=starts, end_positions=ends).loss
    assert torch.equal(model(ids, start_positions=starts.int(), end_positions=ends.int()).loss, expected)


def test_token_classification_drops_out(ids):
    for more, rate in (({}, 0.1), ({"classifier_dropout": 0.0}, 0.0), ({"hidden_dropout": 0.4}, 0.4),
                       ({"classifier_dropout": 0.2, "hidden_dropout": 0.4}, 0.2)):  # fmt: skip
        model, theirs = both_models(SMALL, 0, "LlamaForTokenClassification", **more)
        assert model.dropout.p == theirs.dropout.p == rate
    assert not torch.equal(
        both_models(SMALL, 0, "LlamaForTokenClassification")[0].train()(ids).logits, model(ids).logits
    )
    out = model.eval()(ids, output_attentions=True, output_hidden_states=True)
    assert list(out) == ["logits", "hidden_states", "attentions"]
    assert len(model(ids, return_dict=False)) == 1


@given(models(), st.booleans())
@settings(max_examples=30)
def test_question_answering_equals_transformers(drawn, column):
    fields, ids, mask, seed = drawn
    ours, theirs = both_models(fields, seed, "LlamaForQuestionAnswering")
    B, T = ids.shape
    rng = np.random.default_rng(seed)
    starts, ends = (torch.tensor(rng.integers(0, T + 3, B)) for _ in range(2))  # those beyond the text are ignored
    starts[0] = ends[0] = 0
    if column:
        starts, ends = starts[:, None], ends[:, None]
    where = dict(start_positions=starts, end_positions=ends)
    real = real_tokens(ids, None)  # the softmax includes padding; masked logits are compared below
    out, expected = ours(tensor(ids), **where), theirs(tensor(ids), **where)
    assert_near(out.start_logits[real], expected.start_logits[real])
    assert_near(out.end_logits[real], expected.end_logits[real])
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=FLOAT32, abs=FLOAT32)
    out.loss.backward()
    expected.loss.backward()
    assert_gradients_near(*({n: p.grad for n, p in model.named_parameters()} for model in (ours, theirs)))
    padded = ours(tensor(ids), tensor(mask))
    expected = theirs(tensor(ids), tensor(mask), counted_positions(ids, mask))
    real = real_tokens(ids, mask)
    assert_near(padded.start_logits[real], expected.start_logits[real])
    assert padded.loss is None
    assert ours(tensor(ids), start_positions=starts).loss is None
    assert list(ours(tensor(ids), output_attentions=True)) == ["start_logits", "end_logits", "attentions"]
    assert len(ours(tensor(ids), return_dict=False)) == 2


@given(configs(), st.sampled_from(CLASSES))
@settings(max_examples=25)
def test_state_dicts_have_transformers_names_and_shapes(fields, kind):
    ours, theirs = both_models(fields, 0, kind)
    expected = theirs.state_dict()
    state = pickle.loads(pickle.dumps(ours.state_dict()))
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]  # tied weights, too
    assert ours.base_model_prefix == (theirs.base_model_prefix if kind != "LlamaModel" else "")
    assert not any(n.startswith(f"{name}.") for n, _ in ours.named_buffers() for name in state)


@pytest.mark.parametrize("tied", [False, True])
def test_a_deep_copy_is_another_model(ids, tied):
    model, _ = both_models(SMALL, 0, tie_word_embeddings=tied)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(ids).logits, model(ids).logits)
    assert (copied.lm_head.weight is copied.model.embed_tokens.weight) == tied
    with torch.no_grad():
        copied.lm_head.weight.zero_()
    assert model.lm_head.weight.abs().min() > 0
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", CLASSES)
def test_weights_are_drawn_as_transformers_draws_them(kind):
    big = SMALL | dict(vocab_size=300, hidden_size=64, intermediate_size=80, attention_bias=True, mlp_bias=True)
    config = LlamaConfig(**big, initializer_range=0.05, pad_token_id=2)
    torch.manual_seed(0)
    for name, weight in getattr(llama, kind)(config).named_parameters():
        if name.endswith("bias"):
            assert not weight.any(), name
        elif "norm" in name:
            assert (weight == 1).all(), name
        elif weight.shape[0] > 4:
            assert weight.std().item() == pytest.approx(0.05, rel=0.05), name
            assert abs(weight.mean().item()) < 0.005, name
            assert weight.abs().max() > 0.05 * 2.5, name  # not a truncated normal
        else:
            assert weight.any(), name
        if "embed" in name:
            assert not weight[2].any()


@SEE
def test_pruned_heads_are_those_whose_output_is_zero(ids, see):
    """A KV head goes only with its whole group; groups may become uneven. Heads keep their original indices."""
    whole, _ = both_models(SMALL, 0, attention_bias=True)
    pruned = copy.deepcopy(whole)
    for heads in ({0: [0, 1], 1: [3]}, {0: [3], 1: [3]}):
        pruned.prune_heads(heads)
        with torch.no_grad():
            for layer, gone in heads.items():
                for head in gone:
                    whole.model.layers[layer].self_attn.o_proj.weight[:, 4 * head : 4 * head + 4] = 0
        assert_near(pruned(ids, output_attentions=see).logits, whole(ids).logits, 1e-5)
        cache = pruned(ids[:, :4], use_cache=True).past_key_values
        assert_near(pruned(ids[:, 4:], past_key_values=cache).logits, whole(ids).logits[:, 4:], 1e-5)
    assert pruned.model.layers[0].self_attn.k_proj.weight.shape == (4, 16)
    assert pruned.model.layers[1].self_attn.k_proj.weight.shape == (8, 16)
    assert pruned.model.layers[0].self_attn.q_proj.bias.shape == (4,)
    pruned(ids).logits.sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())
    with pytest.raises(ValueError, match="layer 0 would be left without any attention head"):
        pruned.prune_heads({0: [2]})


# -- a single row, computed by NumPy ----------------------------------------------------------------------------------


@pytest.fixture(params=["small", "large"])
def quick(request, monkeypatch):
    """Make all weights count as small, or all as large."""
    monkeypatch.setattr(ops, "IN_CACHE", {"small": 2**15, "large": 0}[request.param])


def decode_one(model):
    """Return the logits of one token, the shape for which `ops.linear` has a fast path."""
    return model(torch.tensor([[3]]), use_cache=False).logits


@pytest.mark.parametrize("bias", [False, True])
def test_one_row_equals_the_same_row_among_others(quick, bias):
    model, theirs = both_models(SMALL, 0, attention_bias=bias, mlp_bias=bias)
    assert_near(decode_one(model), model(torch.tensor([[3], [3]])).logits[:1], 1e-5)
    with torch.no_grad():
        out = decode_one(model)
        assert_near(out, theirs(torch.tensor([[3]])).logits)
        assert_near(out, model(torch.tensor([[3], [3]])).logits[:1], 1e-5)
        assert out.shape == (1, 1, 30)
        before = {n: p.clone() for n, p in model.named_parameters()}
        decode_one(model)
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
        assert decode_one(model.bfloat16()).dtype == torch.bfloat16


def test_one_row_may_be_traced(quick, small):
    """torch.jit.trace would record NumPy's result for the traced row as a constant."""
    with torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(lambda x: ops.linear(small.lm_head, x), torch.ones(1, 1, 16), check_trace=False)
        x = torch.randn(1, 1, 16)
        assert_near(traced(x), small.lm_head(x), 1e-5)


def test_one_row_keeps_its_gradients(quick, trained):
    decode_one(trained).sum().backward()
    assert all(p.grad is not None for p in trained.parameters())
    linear = torch.nn.Linear(4, 3).requires_grad_(False)
    x = torch.randn(1, 1, 4, requires_grad=True)
    assert ops.linear(linear, x).requires_grad
    assert not ops.linear(linear, x.detach()).requires_grad
    linear.bias.requires_grad_(True)
    assert ops.linear(linear, x.detach()).requires_grad


def test_one_row_takes_no_short_cut_past_what_is_attached(quick):
    linear, x, seen = torch.nn.Linear(4, 3).requires_grad_(False), torch.randn(1, 1, 4), []
    plain = ops.linear(linear, x)
    assert_near(plain, linear(x), 1e-6)
    handle = linear.register_forward_hook(lambda *_: seen.append("after"))
    ops.linear(linear, x)
    handle.remove()
    handle = linear.register_forward_pre_hook(lambda *_: seen.append("before"))
    ops.linear(linear, x)
    handle.remove()
    linear.forward = lambda x: seen.append("instead")
    ops.linear(linear, x)
    assert seen == ["after", "before", "instead"]
    del linear.forward

    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    adapter = Adapter(4, 3).requires_grad_(False)
    adapter.load_state_dict(linear.state_dict())
    assert_near(ops.linear(adapter, x), plain + 1, 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(linear, x).dtype == torch.bfloat16
    assert ops.linear(linear.to("meta"), x.to("meta")).is_meta


@pytest.mark.parametrize("eps", [1e-5, 1e-2])
def test_one_row_is_normed_as_others_are(eps):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(16, eps).requires_grad_(False)
    norm.weight.uniform_(0.5, 1.5)
    for scale in (1e-3, 1.0, 1e4):
        x = scale * torch.randn(1, 1, 16)
        kept = x.clone()
        expected = transformers.models.llama.modeling_llama.LlamaRMSNorm(16, eps).requires_grad_(False)
        expected.load_state_dict(norm.state_dict())
        assert_near(norm(x), expected(x), 1e-6)
        assert_near(norm(x), norm(torch.cat([x, x]))[:1], 1e-6)
        assert torch.equal(x, kept)
    assert norm(x.requires_grad_()).requires_grad


def test_one_row_of_nothing_or_too_much_is_normed_as_others_are():
    """Without ε a row of zeros gives NaN, and overflow gives 0; neither raises nor warns."""
    for eps, value in ((0.0, 0.0), (1e-5, 0.0), (1e-5, 1e20), (1e-5, torch.inf), (1e-5, torch.nan)):
        norm, x = LlamaRMSNorm(16, eps).requires_grad_(False), torch.full((1, 1, 16), value)
        torch.testing.assert_close(norm(x), norm(torch.cat([x, x]))[:1], equal_nan=True)


def test_minus_one_is_no_padding(ids):
    """As in the first LLaMA files; to PyTorch it would mean the last row."""
    model = LlamaModel(LlamaConfig(**SMALL, pad_token_id=-1))
    assert model.embed_tokens.weight[-1].any()
    ids[:] = 29
    model(ids).last_hidden_state.square().sum().backward()
    assert model.embed_tokens.weight.grad[-1].any()
    assert LlamaModel(LlamaConfig(**SMALL, pad_token_id=29)).embed_tokens.padding_idx == 29


# -- the modules as other libraries use them --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls",
    [modeling.LlamaModel, modeling.LlamaDecoderLayer, modeling.LlamaAttention, modeling.LlamaMLP, LlamaRMSNorm,
     nn.Linear, nn.SiLU, nn.Embedding],
)  # fmt: skip
@pytest.mark.parametrize("mode", ["decode", "train", "compile"])
def test_a_forward_replaced_on_a_class_runs_wherever_the_class_does(trained, ids, monkeypatch, cls, mode):
    own, calls = cls.forward, []

    def counted(self, *args, **kwargs):
        calls.append(self)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(cls, "forward", counted)
    steps = 1
    if mode == "decode":
        steps = 4
        trained.eval().generate(ids[:1], max_new_tokens=steps, eos_token_id=-1)
    elif mode == "train":
        trained(ids, labels=ids).loss.backward()
    else:
        torch._dynamo.reset()
        torch.compile(trained.eval().requires_grad_(False), backend="eager", fullgraph=True)(ids)
        torch._dynamo.reset()
    assert len(calls) == steps * sum(type(module) is cls for module in trained.modules())


@pytest.mark.parametrize("use_cache", [False, True])
def test_modules_are_called_as_transformers_calls_them(ids, use_cache):
    pair, heard = both_models(SMALL, 0, attn_implementation="eager"), ([], [])
    pair[1].set_attn_implementation("eager")
    for model, calls in zip(pair, heard, strict=True):
        for module in (*model.model.layers, *(layer.self_attn for layer in model.model.layers)):
            module.register_forward_pre_hook(
                lambda module, args, kwargs, calls=calls: calls.append(
                    (type(module).__name__, len(args), {name for name in kwargs if kwargs[name] is not None})
                ),
                with_kwargs=True,
            )
            module.register_forward_hook(lambda module, args, out, calls=calls: calls.append(out))
        model(ids, use_cache=use_cache)
    for mine, their in zip(*heard, strict=True):
        if isinstance(mine[0], str):
            assert mine[:2] == their[:2]
            assert mine[2] == their[2] - {"attention_mask"}  # causal: ours builds no mask
        elif isinstance(mine, tuple):  # attention: the output and the weights
            assert_near(mine[0], their[0])
            assert_near(mine[1], their[1])
        else:
            assert_near(mine, their)


def test_a_layer_is_caught_and_run_alone_as_quantisers_do(small, ids):
    class Caught(Exception):
        pass

    class Catcher(nn.Module):
        def forward(self, x, **kwargs):
            caught.append((x, kwargs))
            raise Caught

    model, caught = copy.deepcopy(small), []
    first = model.model.layers[0]
    model.model.layers[0] = Catcher()
    with pytest.raises(Caught):
        model(ids)
    (x, kwargs), expected = caught[0], small(ids, output_hidden_states=True).hidden_states
    assert_near(first(x, **kwargs | {"past_key_values": None}), expected[1], 1e-6)
    rotation = model.model.rotary_emb(x, torch.arange(6)[None])
    more = {"position_ids": torch.arange(6)[None], "use_cache": False, "cache_position": None}
    out = first(x, attention_mask=None, position_embeddings=rotation, output_attentions=True, **more)
    assert_near(out, expected[1], 1e-6)


def test_modules_have_the_attributes_of_transformers():
    ours, theirs = both_models(SMALL, 0)
    for path, names in {
        "model.layers.1": ["hidden_size"],
        "model.layers.1.self_attn": ["scaling", "num_key_value_groups", "is_causal", "head_dim", "layer_idx"],
        "model.layers.1.mlp": ["hidden_size", "intermediate_size"],
        "model.rotary_emb": ["rope_type", "max_seq_len_cached", "original_max_seq_len", "attention_scaling"],
    }.items():
        for name in names:
            mine, their = (getattr(model.get_submodule(path), name) for model in (ours, theirs))
            assert mine == their, name
    assert_near(ours.model.rotary_emb.original_inv_freq, theirs.model.rotary_emb.original_inv_freq, 1e-6)
    assert ours.model.layers[0].mlp.config is ours.config
    attention = ours.model.layers[0].self_attn
    for name, value in (("scaling", 2.0), ("is_causal", False)):  # transformers would use these, ours would not
        with pytest.raises(AttributeError, match=name):
            setattr(attention, name, value)
    attention.prune_heads({0, 2})
    assert attention.num_key_value_groups == 1


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_a_trace_is_the_model(ids):
    model = both_models(SMALL | {"use_cache": False, "return_dict": False}, 0)[0]
    with torch.no_grad():
        traced = torch.jit.trace(model, (ids,), check_trace=False)
        assert_near(traced(ids)[0], model(ids)[0], 1e-6)


# -- compiled ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(small):
    torch._dynamo.reset()
    yield torch.compile(small, backend="eager", fullgraph=True)
    torch._dynamo.reset()


def test_a_forward_compiles_whole(small, compiled, ids):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    with torch.no_grad():
        for length in (6, 4, 3):
            out = compiled(ids[:, :length], use_cache=False)
            assert_near(out.logits, small(ids[:, :length]).logits, 1e-5)
        assert_near(compiled(ids, mask, use_cache=False).logits, small(ids, mask).logits, 1e-5)
        seen = compiled(ids, mask, use_cache=False, output_attentions=True, output_hidden_states=True)
        assert (len(seen.attentions), len(seen.hidden_states)) == (2, 3)
        loss = compiled(ids, labels=ids, use_cache=False).loss
        assert_near(loss, small(ids, labels=ids).loss, 1e-5)


def test_a_compiled_forward_trains(trained, ids):
    torch._dynamo.reset()
    plain = copy.deepcopy(trained)
    torch.compile(trained, backend="eager", fullgraph=True)(ids, labels=ids, use_cache=False).loss.backward()
    plain(ids, labels=ids).loss.backward()
    assert_gradients_near(*({n: p.grad for n, p in model.named_parameters()} for model in (trained, plain)))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_decoding_compiles_whole_and_is_not_compiled_again_at_every_step(small, kind):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(0)
        return graph.forward

    ids = torch.tensor(np.random.default_rng(0).integers(1, 30, (1, 24)))
    step = torch.compile(small, backend=count, fullgraph=True)
    cache = llama.DynamicCache() if kind == "dynamic" else llama.StaticCache(small.config, 32)
    with torch.no_grad():
        expected = small(ids).logits
        out = [small(ids[:, :4], past_key_values=cache).logits]
        made = []
        for place in range(4, 24):
            out.append(step(ids[:, place : place + 1], past_key_values=cache).logits)
            made.append(len(graphs))
    assert_near(torch.cat(out, 1), expected, 1e-5)
    assert cache.get_seq_length() == 24
    assert made[-1] <= 6  # the first, one with dynamic lengths, and a few as the buffer grows
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "dynamic", "longrope"])
def test_every_kind_of_rope_compiles_whole(kind, ids):
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    elif kind == "longrope":
        rope |= {"short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0], "original_max_position_embeddings": 4}
    model, _ = both_models(SMALL | {"max_position_embeddings": 4, "rope_parameters": rope}, 0)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for length in (6, 4):
            assert_near(compiled(ids[:, :length], use_cache=False).logits, model(ids[:, :length]).logits, 1e-5)
    torch._dynamo.reset()


# -- RoPE -------------------------------------------------------------------------------------------------------------


@given(configs(), st.integers(1, 80))
@settings(max_examples=40)
def test_angles_are_transformers_whatever_came_before(fields, length):
    """Against a fresh transformers model: its dynamic RoPE remembers the longest text so far, ours does not."""
    ours, _ = both_models(fields, 0, "LlamaModel")
    x, positions = torch.zeros(1), torch.arange(length)[None]
    longer = torch.arange(100)[None]
    for places in (longer, positions, longer):
        theirs, _ = transformers_model(fields, 0, transformers.LlamaModel)
        for mine, their in zip(ours.rotary_emb(x, places), theirs.rotary_emb(x, places), strict=True):
            np.testing.assert_allclose(mine, their, atol=5e-5)  # two float32 angles of up to 100 radians


@pytest.mark.parametrize("has_openmp", [True, False])
def test_threads_are_as_they_were_after_a_step_of_decoding(monkeypatch, has_openmp):
    """A row runs in NumPy's BLAS, which is limited to one thread meanwhile, as is PyTorch; both are restored after."""
    libraries = ops._libraries
    if not has_openmp:  # none is found
        monkeypatch.setattr(ops, "_libraries", lambda api: libraries(api) if api == "blas" else [])
    model = LlamaForCausalLM(LlamaConfig(50, 192, 200, num_hidden_layers=1, num_attention_heads=4)).eval()
    during = []
    model.model.norm.register_forward_pre_hook(lambda *_: during.append(counts()))

    def counts():
        return torch.get_num_threads(), [library.num_threads for library in ops._libraries("blas")]

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threadpool_limits(2, user_api="blas"), torch.no_grad():
            before = counts()
            model(torch.tensor([[1]]))
            assert counts() == before
            monkeypatch.setattr(row, "read", None)
            with pytest.raises(TypeError):
                model(torch.tensor([[1]]))
            assert counts() == before
    finally:
        torch.set_num_threads(threads)
    assert during == [(1, [1] * len(before[1]))]


def test_threads_of_two_who_decode_at_once_are_given_back():
    model = LlamaForCausalLM(LlamaConfig(50, 192, 200, num_hidden_layers=1, num_attention_heads=4)).eval()
    within, may_go = threading.Event(), threading.Event()

    def counts():
        return torch.get_num_threads(), [library.num_threads for library in ops._libraries("blas")]

    def wait(*_):
        if threading.current_thread() is not threading.main_thread():
            within.set()
            assert may_go.wait(30)

    model.model.norm.register_forward_pre_hook(wait)

    def step():
        with torch.no_grad():
            model(torch.tensor([[1]]))

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with threadpool_limits(2, user_api="blas"):
            before = counts()
            other = threading.Thread(target=step)
            other.start()
            assert within.wait(30)
            step()  # enters after the other and leaves before it
            assert counts() == before
            may_go.set()
            other.join()
            assert counts() == before
    finally:
        torch.set_num_threads(threads)


def test_threads_that_are_born_during_a_step_have_all_of_pytorchs():
    """Threads started during a step, or after two steps overlapped, get all of PyTorch's threads."""
    inside, may_leave, left = threading.Event(), threading.Event(), threading.Event()
    x, counts = torch.zeros(1, 1, 8), []

    def first():
        with torch.no_grad(), ops.rows_for_numpy(x, 100):
            inside.set()
            assert may_leave.wait(30)
        left.set()

    def second():
        assert inside.wait(30)
        counts.append(torch.get_num_threads())
        may_leave.set()
        assert left.wait(30)
        with torch.no_grad(), ops.rows_for_numpy(x, 100):
            counts.append(torch.get_num_threads())

    def run(*targets):
        threads = [threading.Thread(target=target) for target in targets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(first, second)
        run(lambda: counts.append(torch.get_num_threads()))
    finally:
        torch.set_num_threads(threads)
    assert counts == [2, 1, 2]


def test_outputs_are_seen_into():
    """FSDP, torch.export and torch.func find the tensors in outputs; DataParallel rebuilds an output from pairs."""
    model = LlamaForCausalLM(LlamaConfig(50, 32, 40, num_hidden_layers=1, num_attention_heads=4)).eval()
    ids = torch.tensor([[1, 2, 3]])
    out = model(ids, labels=ids, use_cache=False)
    leaves, spec = pytree.tree_flatten(out)
    assert [leaf is value for leaf, value in zip(leaves, (out.loss, out.logits), strict=True)] == [True, True]
    again = pytree.tree_unflatten(leaves, spec)
    assert type(again) is CausalLMOutputWithPast
    assert again.logits is out.logits
    assert type(out)((name, value) for name, value in out.items()).loss is out.loss
    exported = torch.export.export(model, (ids,), {"use_cache": False}).module()
    assert torch.equal(exported(ids, use_cache=False).logits, model(ids).logits)


def test_the_implementation_of_attention_can_be_changed():
    model = LlamaModel(LlamaConfig(50, 32, 40, num_hidden_layers=1, num_attention_heads=4))
    model.set_attn_implementation("eager")
    assert model.config.attn_implementation == "eager"
    with pytest.raises(ValueError, match="attn_implementation must be one of"):
        model.set_attn_implementation("flashy")
    assert model.config.attn_implementation == "eager"


def row_model(**fields):
    torch.manual_seed(0)
    config = LlamaConfig(50, 192, 200, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, **fields)
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def decoded(model, ids):
    """Return the logits of every token, read one by one: each is a row that NumPy may compute."""
    cache = DynamicCache()
    return torch.cat([model(token[None, None], past_key_values=cache).logits for token in ids[0]], dim=1)


@pytest.mark.parametrize("fields", [{}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 16}])
def test_a_row_in_numpy_is_what_the_modules_say(monkeypatch, fields):
    model, ids = row_model(**fields), torch.arange(12)[None]
    with torch.no_grad():
        for parameter in model.parameters():  # biases differ from 0, gains from 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    rows, read = [], row.read
    monkeypatch.setattr(row, "read", lambda *arguments: rows.append(1) or read(*arguments))
    ours = decoded(model, ids)
    assert len(rows) == 12
    monkeypatch.setattr(row, "plan", lambda *_: None)
    assert miss(ours, decoded(model, ids)) < 1e-5
    assert len(rows) == 12


ROW_MODULES = ["", *(name for name, _ in row_model().model.layers[1].named_modules() if name)]


@pytest.mark.parametrize("name", ROW_MODULES)
@pytest.mark.parametrize("way", ["hook", "before", "forward"])
def test_a_row_passes_no_hook_by(name, way):
    model, heard = row_model(), []
    module = model.model.layers[1].get_submodule(name)
    if way == "hook":
        module.register_forward_hook(lambda *_: heard.append(1))
    elif way == "before":
        module.register_forward_pre_hook(lambda *_: heard.append(1))
    else:
        forward = module.forward
        module.forward = lambda *a, **k: heard.append(1) or forward(*a, **k)
    decoded(model, torch.arange(3)[None])
    assert len(heard) == 3


def test_a_row_passes_no_other_module_by():
    """With a subclass, another activation or pruned heads anywhere, the modules compute the layers."""

    class Linear(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    right = decoded(row_model(), torch.arange(3)[None])
    model = row_model()
    model.model.layers[1].mlp.down_proj.__class__ = Linear
    assert miss(decoded(model, torch.arange(3)[None]), right) > 1e-3
    model = row_model(hidden_act="gelu")
    with torch.no_grad():
        assert miss(decoded(model, torch.arange(3)[None]), model(torch.arange(3)[None]).logits) < 1e-5
    model = row_model()
    model.prune_heads({0: [0], 1: [3, 4, 5]})
    with torch.no_grad():
        assert miss(decoded(model, torch.arange(3)[None]), model(torch.arange(3)[None]).logits) < 1e-5
