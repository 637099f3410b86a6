"""`llama.accelerate`: transformers' Llama runs on our kernels with the same results, and can be restored.

The kernels run in Triton's interpreter, or on a GPU. Their calls are counted to prove that they ran.
"""

import copy
import gc
import io
import pickle
import subprocess
import sys
import warnings
import weakref
from contextlib import nullcontext

import accelerate
import peft
import pytest
import torch
import transformers
from conftest import GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import transformers_model
from strategies import SEEDS, batches, configs
from torch import nn
from transformers import LlamaForCausalLM, StaticCache
from transformers.models.llama import modeling_llama

import llama
from llama import acceleration

# Warnings that peft also raises for transformers' model.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

DEVICE = "cuda" if GPU else "cpu"
KERNELS = ("rms_norm", "swiglu", "apply_rope", "flash_attention", "decode_attention")
FIELDS = {"vocab_size": 51, "hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "pad_token_id": 0,
          "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
IDS = torch.randint(3, 51, (2, 7), generator=torch.Generator().manual_seed(1)).to(DEVICE)
ONES = torch.ones_like(IDS)
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]).to(DEVICE)
RIGHT = LEFT.flip(1)
WRITE = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def make(start: str = "sdpa", cls: type = LlamaForCausalLM, seed: int = 0, **more):
    model, _ = transformers_model(FIELDS | more, seed, cls)
    model.set_attn_implementation(start)
    return model.to(DEVICE)


def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Assert equality up to float32 summation order: 2e-5 of the largest number; a layer loses about 1e-6."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


@torch.no_grad()
def logits(model, mask=None, ids=IDS, **more) -> torch.Tensor:
    """Return the logits of the tokens that are not padding."""
    out = model(input_ids=ids, attention_mask=mask, **more).logits
    return out.flatten(0, 1) if mask is None else out[mask[:, -ids.shape[1] :].bool()]


class Calls(list):
    """The names of the kernels in the order of their calls."""

    def __enter__(self):
        self.clear()
        return self

    def __exit__(self, *_):
        pass


@pytest.fixture(scope="module")
def counted():
    from llama.kernels import decode_attention, flash_attention, rms_norm, rope, swiglu

    calls = Calls()
    with pytest.MonkeyPatch.context() as patch:
        for module, name in zip((rms_norm, swiglu, rope, flash_attention, decode_attention), KERNELS, strict=True):
            right = getattr(module, name)
            patch.setattr(module, name, lambda *a, right=right, name=name, **k: (calls.append(name), right(*a, **k))[1])
        yield calls


@pytest.fixture
def calls(counted):
    counted.clear()
    return counted


# --- equal results on the kernels ---


@pytest.mark.parametrize("start", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, ONES, LEFT, RIGHT], ids=["none", "ones", "left", "right"])
def test_logits_are_equal_and_every_layer_ran_on_the_kernels(calls, start, mask):
    model = make(start)
    before = logits(model, mask)
    assert not calls
    with llama.accelerate(model, "triton"):
        near(logits(model, mask), before)
    assert {name: calls.count(name) for name in KERNELS} == {
        "rms_norm": 5, "swiglu": 2, "apply_rope": 2, "flash_attention": 2, "decode_attention": 0,
    }  # fmt: skip


@pytest.mark.parametrize("backend", ["triton", "torch"])
@settings(max_examples=10)
@given(data=st.data(), seed=SEEDS, start=st.sampled_from(["sdpa", "eager"]))
def test_logits_are_equal_for_any_configuration(counted, data, seed, start, backend):
    fields = data.draw(configs())
    ids, mask = data.draw(batches(fields["vocab_size"], max_length=12))
    ids, mask = torch.tensor(ids).to(DEVICE), None if mask is None else torch.tensor(mask).to(DEVICE)
    model, _ = transformers_model(fields, seed)
    model.set_attn_implementation(start)
    model.to(DEVICE)
    before = logits(model, mask, ids)
    with counted as calls, llama.accelerate(model, backend) as handle:
        near(logits(model, mask, ids), before)
    layers, on_kernels = fields["num_hidden_layers"], backend == "triton"
    is_silu = fields["hidden_act"] == "silu"
    assert handle.replaced["LlamaMLP"] == layers * is_silu
    assert calls.count("rms_norm") == (2 * layers + 1) * on_kernels
    assert calls.count("swiglu") == layers * is_silu * on_kernels
    assert calls.count("apply_rope") == layers * on_kernels
    assert calls.count("flash_attention") + calls.count("decode_attention") == layers * on_kernels
    assert torch.equal(logits(model, mask, ids), before)


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_rounded_as_before(calls, dtype, backend):
    """Within 2 ulps of the largest number after two layers; norms may stay in float32."""
    model = make().to(dtype)
    model.model.norm.float()
    model.lm_head.float()
    before = logits(model, LEFT)
    with llama.accelerate(model, backend):
        after = logits(model, LEFT)
    assert after.dtype == before.dtype
    assert (after - before).abs().max() <= 2 * torch.finfo(dtype).eps * before.abs().max()
    assert bool(calls) == (backend == "triton")


@torch.no_grad()
def test_hidden_states_are_equal(calls):
    model = make()
    before = model(IDS, attention_mask=LEFT, output_hidden_states=True).hidden_states
    with llama.accelerate(model, "triton"):
        after = model(IDS, attention_mask=LEFT, output_hidden_states=True).hidden_states
    assert len(before) == len(after) == 3
    for ours, theirs in zip(after, before, strict=True):
        near(ours[LEFT.bool()], theirs[LEFT.bool()])
    assert calls


@pytest.mark.parametrize(
    ("start", "mask", "more"),
    [
        ("sdpa", ONES, {}),
        ("sdpa", LEFT, {}),
        ("eager", LEFT, {}),
        ("sdpa", LEFT, {"num_beams": 3, "max_new_tokens": 4}),
        ("sdpa", ONES, {"cache_implementation": "static"}),
        ("sdpa", LEFT, {"cache_implementation": "static"}),
        ("eager", LEFT, {"cache_implementation": "static"}),
    ],
    ids=["ones", "left", "left-eager", "beams", "static-ones", "static-left", "static-left-eager"],
)
def test_generated_texts_are_equal(calls, start, mask, more):
    model, options = make(start), WRITE | more
    before = model.generate(IDS, attention_mask=mask, **options)
    with llama.accelerate(model, "triton"):
        assert torch.equal(model.generate(IDS, attention_mask=mask, **options), before)
    assert set(calls) == set(KERNELS)
    assert calls.count("flash_attention") == 2
    assert calls.count("decode_attention") == 2 * (options["max_new_tokens"] - 1)


@pytest.mark.parametrize("start", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, LEFT], ids=["none", "left"])
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_text_is_read_in_chunks(calls, start, mask, static):
    """With a static cache the second chunk's position is on the device, so transformers' own attention runs."""
    model = make(start)

    def read() -> torch.Tensor:
        past, rows = StaticCache(model.config, max_cache_len=20) if static else None, []
        for first, last in ((0, 3), (3, 5), (5, 6), (6, 7)):
            with torch.no_grad():
                seen = None if mask is None else mask[:, :last]
                out = model(IDS[:, first:last], attention_mask=seen, past_key_values=past, use_cache=True)
            past = out.past_key_values
            rows.append(out.logits)
        return torch.cat(rows, 1)[(ONES if mask is None else mask).bool()]

    before = read()
    with llama.accelerate(model, "triton"):
        near(read(), before)
    assert calls.count("decode_attention") == 4
    assert calls.count("flash_attention") == (2 if static else 4)


def test_a_static_cache_is_full_at_last(calls):
    model = make()
    before = model.generate(IDS[:, :1], attention_mask=ONES[:, :1], **WRITE, cache_implementation="static")
    with llama.accelerate(model, "triton"):
        after = model.generate(IDS[:, :1], attention_mask=ONES[:, :1], **WRITE, cache_implementation="static")
        assert torch.equal(after, before)
        past = StaticCache(model.config, max_cache_len=7)
        near(logits(model, LEFT, past_key_values=past), logits(model, LEFT))
    assert calls.count("decode_attention") == 2 * 6


def test_heads_of_every_kind(calls):
    for cls in (
        transformers.LlamaModel,
        transformers.LlamaForSequenceClassification,
        transformers.LlamaForTokenClassification,
        transformers.LlamaForQuestionAnswering,
    ):
        model = make(cls=cls)
        with torch.no_grad():
            before = model(IDS, attention_mask=RIGHT)[0]
            calls.clear()
            with llama.accelerate(model, "triton"):
                after = model(IDS, attention_mask=RIGHT)[0]
        real = RIGHT.bool() if before.shape[:2] == IDS.shape else slice(None)
        near(after[real], before[real])
        assert calls.count("flash_attention") == 2, cls


# --- fallbacks to transformers' own code ---


def test_auto_changes_no_bit_without_a_gpu(calls):
    if GPU:
        pytest.skip("a GPU is present")
    for start in ("sdpa", "eager"):
        model = make(start)
        before = [logits(model, mask) for mask in (None, ONES, LEFT)]
        text = model.generate(IDS, attention_mask=LEFT, **WRITE)
        with llama.accelerate(model):
            assert all(map(torch.equal, before, [logits(model, mask) for mask in (None, ONES, LEFT)]))
            assert torch.equal(model.generate(IDS, attention_mask=LEFT, **WRITE), text)
    assert not calls


@pytest.mark.needs_gpu
def test_auto_takes_the_kernels_on_a_gpu(calls):
    with llama.accelerate(model := make()):
        logits(model, LEFT)
    assert "flash_attention" in calls


@pytest.mark.parametrize("start", ["sdpa", "eager"])
@pytest.mark.parametrize("mask", [None, LEFT], ids=["none", "left"])
def test_attention_weights_are_transformers_own(calls, start, mask):
    model = make(start)
    with torch.no_grad():
        before = model(IDS, attention_mask=mask, output_attentions=True).attentions
        with llama.accelerate(model, "triton"):
            after = model(IDS, attention_mask=mask, output_attentions=True).attentions
    assert len(after) == len(before) == (2 if start == "eager" else 0)
    for ours, theirs in zip(after, before, strict=True):
        rows = (ONES if mask is None else mask).bool()
        near(ours.movedim(1, 2)[rows], theirs.movedim(1, 2)[rows])
    assert "flash_attention" not in calls
    assert "rms_norm" in calls


@pytest.mark.parametrize("start", ["sdpa", "eager"])
def test_masks_of_four_axes_and_packed_texts_are_transformers_own(calls, start):
    model = make(start)
    whole = torch.ones(2, 1, 7, 7, dtype=torch.bool, device=DEVICE).tril()
    whole[:, :, 5, 1] = False
    if start == "eager":
        whole = torch.zeros(whole.shape, device=DEVICE).masked_fill(~whole, torch.finfo(torch.float32).min)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2]] * 2, device=DEVICE)
    for options in ({"attention_mask": whole}, {"position_ids": packed, "use_cache": False}):
        with torch.no_grad():
            before = model(IDS, **options).logits
            calls.clear()
            with llama.accelerate(model, "triton"):
                near(model(IDS, **options).logits, before)
                assert "flash_attention" not in calls
                assert "swiglu" in calls
        assert (before - model(IDS).logits).abs().max() > 1e-2


@torch.no_grad()
def test_a_layer_called_without_a_mask_means_what_it_meant():
    """transformers' eager attention then applies no mask at all, its SDPA the causal one."""
    x = torch.randn(2, 7, 48, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    outs = []
    for start in ("sdpa", "eager"):
        model = make(start)
        layer, rotation = model.model.layers[0], model.model.rotary_emb(x, torch.arange(7, device=DEVICE)[None])
        outs.append(layer(x, position_embeddings=rotation))
        with llama.accelerate(model, "triton"):
            near(layer(x, position_embeddings=rotation), outs[-1])
    assert (outs[0] - outs[1]).abs().max() > 1e-2


@pytest.mark.parametrize("start", ["sdpa", "eager"])
def test_dropout_and_other_scales_are_transformers_own(calls, start):
    model = make(start, attention_dropout=0.5).train()

    def drawn() -> torch.Tensor:
        torch.manual_seed(5)
        return logits(model, LEFT)

    before = drawn()
    with llama.accelerate(model, "triton"):
        near(drawn(), before)
        assert "flash_attention" not in calls
        model.eval()
        for layer in model.model.layers:
            layer.self_attn.scaling *= 2
        scaled = logits(model, LEFT)
        assert "flash_attention" not in calls
    near(scaled, logits(model, LEFT))
    for layer in model.model.layers:
        layer.self_attn.scaling /= 2
    assert (scaled - logits(model, LEFT)).abs().max() > 1e-2


def test_a_window_of_the_cache_is_kept():
    """`DynamicCache` drops what is beyond `sliding_window`, if the configuration sets one."""
    model = make(sliding_window=4)
    before = model.generate(IDS, attention_mask=LEFT, **WRITE)
    with llama.accelerate(model, "triton"):
        assert torch.equal(model.generate(IDS, attention_mask=LEFT, **WRITE), before)
    assert not torch.equal(make().generate(IDS, attention_mask=LEFT, **WRITE), before)


@pytest.mark.parametrize("start", ["sdpa", "eager"])
@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_training_is_transformers_own_and_said_once(calls, start, backend):
    if backend == "auto" and GPU:
        pytest.skip("the same as triton")
    model = make(start).train()

    def gradients() -> list:
        model.zero_grad()
        model(IDS, attention_mask=LEFT, labels=IDS).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    before = gradients()
    with llama.accelerate(model, backend):
        said = pytest.warns(UserWarning, match="no backward pass yet") if backend == "triton" else nullcontext()
        with said:
            after = gradients()
        gradients()  # a second warning would be an error
        if backend == "torch":
            for ours, theirs in zip(after, before, strict=True):
                near(ours, theirs)
        else:
            assert all(map(torch.equal, after, before))
        assert not calls
        assert logits(model.eval()).isfinite().all()
        assert bool(calls) == (backend == "triton")


@pytest.mark.filterwarnings("ignore:an accelerated model is training:UserWarning")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
def test_checkpointing_recomputes_the_same():
    model, gradients = make().train(), []
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for accelerated in (False, True):
        with llama.accelerate(model, "triton") if accelerated else nullcontext():
            model.zero_grad()
            model(IDS, attention_mask=LEFT, labels=IDS).loss.backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *gradients))


def test_another_attention_may_be_set_in_between(calls):
    model = make()
    before = logits(model, LEFT)
    handle = llama.accelerate(model, "triton")
    for start in ("eager", "sdpa"):
        model.set_attn_implementation(start)
        near(logits(model, LEFT), before)
    assert "flash_attention" not in calls
    handle.restore()
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, LEFT), before)


# --- adapters, hooks, subclasses ---


@pytest.mark.parametrize("first", ["adapter", "kernels"])
def test_adapters_stay_in_effect(calls, first):
    model = make()
    plain = logits(model, LEFT)
    if first == "kernels":
        llama.accelerate(model, "triton")
    torch.manual_seed(2)
    options = {"target_modules": "all-linear", "init_lora_weights": False, "r": 4}
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    if first == "adapter":
        before = logits(adapted, LEFT)
        handle = llama.accelerate(adapted, "triton")
        assert handle.replaced == {"LlamaAttention": 2, "LlamaMLP": 2, "LlamaRMSNorm": 5}
        calls.clear()
    after = logits(adapted, LEFT)
    assert set(calls) == {"rms_norm", "swiglu", "apply_rope", "flash_attention"}
    with adapted.disable_adapter():
        near(logits(adapted, LEFT), plain)
    acceleration.restore(adapted)
    if first == "kernels":
        before = logits(adapted, LEFT)
    near(after, before)
    assert (before - plain).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:an accelerated model is training:UserWarning")
def test_adapters_learn():
    gradients = []
    for backend in (None, "triton"):
        torch.manual_seed(2)
        adapted = peft.get_peft_model(make(), peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)).train()
        for module in adapted.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if backend:
            llama.accelerate(adapted, backend)
        adapted(IDS, attention_mask=LEFT, labels=IDS).loss.backward()
        gradients.append([p.grad for p in adapted.parameters() if p.requires_grad])
    assert len(gradients[0]) == 8
    for ours, theirs in zip(*gradients, strict=True):
        near(ours, theirs)  # the first layers' frozen modules may run on the kernels


@pytest.mark.parametrize("first", ["hooks", "kernels"])
def test_accelerates_hooks_run_around_the_kernels(calls, tmp_path, first):
    model = make()
    before = logits(model, LEFT)
    if first == "kernels":
        llama.accelerate(model, "triton")
    accelerate.disk_offload(model, tmp_path, execution_device=DEVICE, offload_buffers=False)
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    if first == "hooks":
        llama.accelerate(model, "triton")
    calls.clear()
    near(logits(model, LEFT), before)
    assert set(calls) == {"rms_norm", "swiglu", "apply_rope", "flash_attention"}
    acceleration.restore(model)
    calls.clear()
    assert torch.equal(logits(model, LEFT), before)
    assert not calls
    for module in model.modules():
        for name in ("forward", "_old_forward"):
            assert "Accelerated" not in repr(module.__dict__.get(name))


def test_hooks_may_go_while_the_kernels_stay(calls):
    model = make()
    before = logits(model)
    for module in model.modules():
        if len(list(module.parameters())):
            accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
    handle = llama.accelerate(model, "triton")
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    near(logits(model), before)
    assert set(calls) == {"rms_norm", "swiglu", "apply_rope", "flash_attention"}
    handle.restore()
    calls.clear()
    assert torch.equal(logits(model), before)
    assert not calls


def test_pytorchs_hooks_are_called():
    model, seen = make(), []
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    logits(model)
    before = seen.copy()
    seen.clear()
    with llama.accelerate(model, "triton"):
        logits(model)
    assert sorted(seen) == sorted(before)  # the activations have hooks too, so they must be called


class MyMLP(modeling_llama.LlamaMLP):
    def forward(self, x):
        return -super().forward(x)


class MyAttention(modeling_llama.LlamaAttention):
    def forward(self, hidden_states, attention_mask=None, **more):
        assert attention_mask is None or attention_mask.dim() == 4
        out, weights = super().forward(hidden_states, attention_mask=attention_mask, **more)
        return 2 * out, weights


def test_what_others_derived_is_left_alone(calls):
    model = make()
    model.model.layers[0].mlp.__class__ = MyMLP
    model.model.layers[1].self_attn.__class__ = MyAttention
    model.model.norm.forward = lambda x: x
    before = logits(model, LEFT)
    with llama.accelerate(model, "triton") as handle:
        near(logits(model, LEFT), before)
        assert type(model.model.layers[0].mlp) is MyMLP
        assert type(model.model.layers[1].self_attn) is MyAttention
        assert model.config._attn_implementation == "sdpa"  # all layers receive the same kind of mask
    assert handle.replaced == {"LlamaMLP": 1, "LlamaRMSNorm": 4}
    assert {name for name, _ in handle.left} == {"MyMLP", "MyAttention", "LlamaAttention", "LlamaRMSNorm"}
    assert {name: calls.count(name) for name in set(calls)} == {"rms_norm": 4, "swiglu": 1}
    assert "MyMLP 1 left alone: not transformers' own class" in " ".join(str(handle).split())


def test_attention_is_left_alone_where_ours_is_not_the_same(calls):
    for change, reason in (
        (lambda model: setattr(model.config, "_attn_implementation", "flex_attention"), "flex_attention"),
        (lambda model: setattr(model.model.layers[0], "__class__", type("MyLayer", (type(model.model.layers[0]),), {})),
         "MyLayer"),
        (lambda model: setattr(model.model, "__class__", type("MyModel", (type(model.model),), {})), "MyModel"),
        (lambda model: setattr(model.model, "forward", model.model.forward.__get__), "LlamaModel"),
        (lambda model: setattr(model.model.layers[1].self_attn, "config", copy.copy(model.config)), "configuration"),
        (lambda model: setattr(model.model.layers[1].self_attn, "head_dim", 512), "256"),
    ):  # fmt: skip
        model = make()
        change(model)
        start = model.config._attn_implementation
        handle = llama.accelerate(model, "triton")
        assert handle.replaced == {"LlamaMLP": 2, "LlamaRMSNorm": 5}
        assert [reason in why for _, why in handle.left] == [True]
        assert model.config._attn_implementation == start
    assert not calls


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_only_plain_silu_is_fused(calls, activation):
    model = make(hidden_act=activation)
    handle = llama.accelerate(model, "triton")
    if activation == "gelu":
        assert ("LlamaMLP", "its activation is GELUActivation") in handle.left
    logits(model)
    assert calls.count("swiglu") == (2 if activation == "silu" else 0)
    model.model.layers[0].mlp.act_fn = nn.Tanh()
    model.model.layers[1].mlp.act_fn.register_forward_hook(lambda module, args, out: 2 * out)
    calls.clear()
    changed = logits(model)
    assert "swiglu" not in calls
    handle.restore()
    near(changed, logits(model))


def test_a_model_that_shares_the_configuration_is_not_accelerated(calls):
    one = make()
    other = LlamaForCausalLM(one.config).eval().to(DEVICE)
    assert other.config is one.config
    before = [logits(other, mask) for mask in (None, LEFT)]
    text = other.generate(IDS, attention_mask=LEFT, **WRITE)
    handle = llama.accelerate(one, "triton")
    assert all(map(torch.equal, before, [logits(other, mask) for mask in (None, LEFT)]))
    assert torch.equal(other.generate(IDS, attention_mask=LEFT, **WRITE), text)
    assert not calls
    later = llama.accelerate(other, "triton")
    near(logits(other, LEFT), before[1])
    assert "flash_attention" in calls
    handle.restore()
    near(logits(other, LEFT), before[1])
    later.restore()
    assert one.config._attn_implementation == "sdpa"
    assert torch.equal(logits(other, LEFT), before[1])


# --- restoring, copying and saving ---


@pytest.mark.parametrize("start", ["sdpa", "eager"])
@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_restore_gives_the_model_back(calls, start, backend):
    model = make(start)

    def state() -> tuple:
        attributes = [{k: v for k, v in vars(m).items() if k[:1] != "_"} for m in model.modules()]
        return [type(m) for m in model.modules()], [sorted(vars(m)) for m in model.modules()], str(attributes)

    before, out, parameters = state(), [logits(model, mask) for mask in (None, LEFT)], list(model.parameters())
    config = copy.deepcopy(model.config)
    handle = llama.accelerate(model, backend)
    assert state() != before
    assert list(model.state_dict()) == list(make(start).state_dict())
    assert all(ours is theirs for ours, theirs in zip(model.parameters(), parameters, strict=True))
    for _ in range(2):
        handle.restore()
        assert state() == before
    assert model.config == config
    assert model.config._attn_implementation == start
    calls.clear()
    assert all(map(torch.equal, [logits(model, mask) for mask in (None, LEFT)], out))
    assert not calls
    with pytest.raises(KeyError, match="inside"), llama.accelerate(model, backend):
        raise KeyError("inside")
    assert state() == before


def test_the_report_is_a_small_table():
    handle = llama.accelerate(make(), "triton")
    assert str(handle).splitlines() == [
        "LlamaForCausalLM, backend='triton' (kernels)",
        "  LlamaAttention     2  apply_rope, flash_attention, decode_attention",
        "  LlamaMLP           2  swiglu",
        "  LlamaRMSNorm       5  rms_norm",
        "  when gradients are needed, transformers' own code runs: no kernel has a backward pass",
    ]
    handle.restore()
    assert str(handle).splitlines()[0].endswith(", restored")
    assert "left alone: transformers uses PyTorch's attention" in str(llama.accelerate(make(), "torch"))


def test_errors_name_what_was_given(monkeypatch):
    mistral = transformers.MistralForCausalLM(
        transformers.MistralConfig(**FIELDS | {"num_hidden_layers": 1, "head_dim": 8})
    )
    for what, match in (
        (mistral, r"no LlamaModel in this MistralForCausalLM \(model_type 'mistral'\)"),
        (nn.Linear(2, 2), "no LlamaModel in this Linear"),
        ("meta-llama/Llama-3.2-1B", "takes a transformers Llama model, got str"),
        (llama.LlamaForCausalLM(llama.LlamaConfig(**FIELDS)), "has the kernels already; see model.set_backend"),
    ):
        with pytest.raises(ValueError, match=match):
            llama.accelerate(what, "torch")
    model = make()
    with pytest.raises(ValueError, match="backend must be one of"):
        llama.accelerate(model, "cuda")
    llama.accelerate(model)
    for again in (model, nn.Sequential(model), copy.deepcopy(model)):
        with pytest.raises(ValueError, match="is accelerated already: first call restore"):
            llama.accelerate(again)
    model = make()
    if not GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(ValueError, match="the triton backend needs a GPU"):
            llama.accelerate(model, "triton")
        assert type(model.model.norm) is modeling_llama.LlamaRMSNorm


def test_transformers_is_asked_for_when_it_is_needed():
    code = (
        "import sys; sys.modules['transformers'] = None; import llama, torch; llama.accelerate\n"
        "try: llama.accelerate(torch.nn.Linear(2, 2))\n"
        "except ImportError as error: print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout == "llama.accelerate needs transformers: pip install transformers\n"


def test_a_copy_is_accelerated_and_restored_by_itself(calls):
    model = make()
    before = logits(model, LEFT)
    handle = llama.accelerate(model, "triton")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        calls.clear()
        near(logits(twin, LEFT), before)
        assert "flash_attention" in calls
        acceleration.restore(twin)
        assert torch.equal(logits(twin, LEFT), before)
        assert type(twin.model.norm) is modeling_llama.LlamaRMSNorm
        assert handle.active
        assert type(model.model.norm) is not modeling_llama.LlamaRMSNorm
    twin = copy.deepcopy(model)
    twin.load_state_dict(pickle.loads(pickle.dumps(make(seed=1).state_dict())))
    near(logits(twin, LEFT), logits(make(seed=1), LEFT))


def test_what_is_saved_knows_nothing_of_it(tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "before")
    before = logits(model, LEFT)
    llama.accelerate(model, "triton")
    model.save_pretrained(tmp_path / "after")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
    read = LlamaForCausalLM.from_pretrained(tmp_path / "after", attn_implementation="sdpa").to(DEVICE)
    assert torch.equal(logits(read, LEFT), before)


# --- torch.compile ---


@pytest.fixture
def no_warnings():
    """Silence PyTorch's compiler, which warns about transformers' own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("backend", ["auto", "triton", "torch"])
def test_the_model_compiles_whole(calls, backend):
    model = make()
    before = [logits(model, mask) for mask in (None, LEFT)]
    with llama.accelerate(model, backend):
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for mask, expected in zip((None, LEFT), before, strict=True):
            calls.clear()
            near(logits(compiled, mask), expected)
        assert ("swiglu" in calls) == ("flash_attention" in calls) == (backend == "triton" or GPU)


@pytest.mark.usefixtures("no_warnings")
def test_a_step_with_a_static_cache_compiles_whole(calls):
    def read(step) -> torch.Tensor:
        past = StaticCache(model.config, max_cache_len=12)
        out = [logits(model, LEFT[:, :5], IDS[:, :5], past_key_values=past)]
        for last in (6, 7):
            out += [logits(step, LEFT[:, :last], IDS[:, last - 1 : last], past_key_values=past)]
        return torch.cat(out)

    model = make()
    before = read(model)
    with llama.accelerate(model, "triton"):
        calls.clear()
        near(read(torch.compile(model, fullgraph=True, backend="eager")), before)
    assert "decode_attention" in calls


def test_a_mask_does_not_keep_itself_alive():
    collects = gc.isenabled()
    gc.disable()
    try:
        mask = torch.tensor([[False, True, True]])
        kept = weakref.ref(mask)
        for _ in range(2):
            padding = acceleration._padding(mask, 3)
            assert padding.keys is mask
            assert padding.starts.tolist() == [1]
        del mask, padding
        assert kept() is None
    finally:
        if collects:
            gc.enable()
