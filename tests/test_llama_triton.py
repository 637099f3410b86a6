"""The model with backend="triton" equals the model in PyTorch, under Triton's interpreter or on a GPU."""

import subprocess
import sys

import pytest
import torch
from conftest import GPU
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from llama import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache, ops

DEVICE = "cuda" if GPU else "cpu"
VOCAB = 50


def model(seed: int = 0, backend: str = "triton", **fields) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    fields = {"hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 6,
              "num_key_value_heads": 2, "head_dim": 16} | fields  # fmt: skip
    made = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **fields)).eval()
    with torch.no_grad():
        for name, weight in made.named_parameters():
            weight.uniform_(0.5, 1.5) if "norm" in name else weight.normal_(0, 1.5 * weight.shape[-1] ** -0.5)
    made.set_backend(backend)
    return made.to(DEVICE)


def both(made: LlamaForCausalLM, *args, **kwargs):
    """Return the model's outputs on the kernels and in PyTorch."""
    outs = []
    with torch.inference_mode():
        for backend in ("triton", "torch"):
            made.set_backend(backend)
            outs.append(made(*args, **kwargs))
    return outs


def near(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Assert equality up to the order of float32 sums: 2e-5 of the largest value; a layer costs about 1e-6."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def tokens(B: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.fixture
def called(monkeypatch):
    """The names of the kernels called, in order."""
    from llama.kernels import cross_entropy, decode_attention, flash_attention, rms_norm, rope, swiglu

    names: list[str] = []

    def count(module, name):
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, **more: (names.append(name), right(*args, **more))[1])

    for module, name in ((rms_norm, "rms_norm"), (rms_norm, "add_rms_norm"), (rope, "apply_rope"), (swiglu, "swiglu"),
                         (flash_attention, "flash_attention"), (decode_attention, "decode_attention"),
                         (cross_entropy, "cross_entropy")):  # fmt: skip
        count(module, name)
    return names


@st.composite
def paddings(draw, B, S):
    """Padding masks (B, S): none, on the left (generate needs a real last token), on the right, or with holes."""
    kind = draw(st.sampled_from(["none", "left", "right", "holes"]))
    if kind == "none":
        return None
    mask = torch.ones(B, S, dtype=torch.int64)
    for row in mask:
        n = draw(st.integers(0, S - 1))
        if kind == "left":
            row[:n] = 0
        elif kind == "right":
            row[S - n :] = 0
        else:
            row[draw(st.lists(st.integers(0, S - 1), max_size=S))] = 0
    return mask.to(DEVICE)


@given(data=st.data())
@settings(max_examples=25)
def test_it_equals_pytorch(data):
    kv_heads = data.draw(st.integers(1, 3))
    made = model(
        seed=data.draw(st.integers(0, 9)),
        num_attention_heads=kv_heads * data.draw(st.integers(1, 3)),
        num_key_value_heads=kv_heads,
        head_dim=data.draw(st.sampled_from([8, 16, 20])),
        attention_bias=data.draw(st.booleans()),
        hidden_act=data.draw(st.sampled_from(["silu", "gelu"])),
    )
    B, T, chunk = data.draw(st.integers(1, 2)), data.draw(st.integers(2, 37)), data.draw(st.integers(0, 36))
    ids, mask = tokens(B, T, data.draw(st.integers(0, 9))), data.draw(paddings(B, T))
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    ours, theirs = both(made, ids, mask, labels=ids)
    if not seen.any():
        return
    near(ours.logits[seen], theirs.logits[seen])
    near(ours.loss, theirs.loss)
    if 0 < chunk < T:  # the same in two chunks, with a cache
        cache = DynamicCache()
        made.set_backend("triton")
        with torch.inference_mode():
            first = made(ids[:, :chunk], None if mask is None else mask[:, :chunk], past_key_values=cache).logits
            second = made(ids[:, chunk:], mask, past_key_values=cache).logits
        near(torch.cat([first, second], 1)[seen], theirs.logits[seen])


def test_every_kernel_is_called(called):
    made, ids = model(), tokens(2, 5)
    with torch.inference_mode():
        made.set_backend("torch")
        made(ids, labels=ids)
        assert called == []
        made.set_backend("triton")
        cache = made(ids, labels=ids).past_key_values
        layer = ["rms_norm", "apply_rope", "flash_attention", "add_rms_norm", "swiglu"]
        assert called == [*layer * 2, "rms_norm", "cross_entropy"]
        called.clear()
        made(ids[:, :1], past_key_values=cache)
        assert called == [
            *("decode_attention" if name == "flash_attention" else name for name in layer * 2),
            "rms_norm",
        ]


def test_packed_texts_stay_apart(called):
    made, ids = model(), tokens(2, 30)
    places = torch.tensor([[*range(13), *range(17)], [*range(1), *range(20), *range(9)]]).to(DEVICE)
    ours, theirs = both(made, ids, position_ids=places, packed=True)
    near(ours.logits, theirs.logits)
    assert called.count("flash_attention") == 2
    alone = made(ids[:1, 13:]).logits
    near(ours.logits[:1, 13:], alone.detach())


def test_attentions_are_delivered_under_padding():
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    ours, theirs = both(model(), tokens(2, 9), mask.to(DEVICE), output_attentions=True, output_hidden_states=True)
    for a, b in zip((*ours.attentions, *ours.hidden_states), (*theirs.attentions, *theirs.hidden_states), strict=True):
        near(a, b)


def test_a_mask_of_four_axes_is_pytorchs(called):
    mask = torch.ones(1, 1, 6, 6, dtype=torch.bool, device=DEVICE).tril()
    mask[..., 2, 1] = False
    ours, theirs = both(model(), tokens(2, 6), mask)
    near(ours.logits, theirs.logits)
    assert "rms_norm" in called
    assert "flash_attention" not in called


@pytest.mark.parametrize(
    "more", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 2}], ids=["greedy", "beams", "lookup"]
)
def test_it_generates_the_same(more):
    made, ids = model(), tokens(1 if "prompt_lookup_num_tokens" in more else 2, 11)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    texts = []
    for backend in ("triton", "torch"):
        made.set_backend(backend)
        texts.append(made.generate(ids, attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0, **more))
    assert torch.equal(*texts)


def test_a_padded_row_is_read_as_it_is_alone():
    made, ids = model(), tokens(1, 20)
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long, device=DEVICE), ids], 1)
    mask = (torch.arange(27, device=DEVICE) >= 7).long()[None]
    with torch.inference_mode():
        near(made(padded, mask).logits[:, 7:], made(ids).logits)


def test_a_static_cache_serves():
    made, ids = model(), tokens(2, 9)
    with torch.inference_mode():
        cache = StaticCache(made.config, 16)
        steps = [made(ids[:, t : t + 1], past_key_values=cache).logits for t in range(9)]
        near(torch.cat(steps, 1), made(ids).logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_miss_the_truth_by_no_more_than_pytorch_does(dtype):
    made, ids = model().to(dtype), tokens(2, 24)
    ours, theirs = both(made, ids)
    truth = both(model(), ids)[1].logits.double()
    # the weights' rounding is in both; a fifth more than eager is allowed for the order of sums
    assert (ours.logits.double() - truth).norm() <= 1.2 * (theirs.logits.double() - truth).norm()


def test_training_is_pytorchs_and_right(called):
    made, ids = model(), tokens(2, 8)
    found = []
    for backend in ("triton", "torch"):
        made.set_backend(backend)
        made.zero_grad()
        made(ids, labels=ids).loss.backward()
        found.append([weight.grad.clone() for weight in made.parameters()])
    assert called == []
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_frozen_model_under_adapters_still_gets_its_gradients(called):
    """The first norms get no input that requires gradients; everything after the trained weight does."""
    made, ids = model(), tokens(2, 8)
    found = []
    for backend in ("triton", "torch"):
        made.set_backend(backend)
        made.requires_grad_(False)
        weight = made.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
        weight.grad = None
        made(ids, labels=ids).loss.backward()
        found.append(weight.grad)
    assert "flash_attention" in called
    near(*found)


def test_a_hook_on_a_norm_is_heard():
    made, heard = model(), []
    norm = made.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda module, args, out: heard.append(out.shape) or out * 2)
    ours, theirs = both(made, tokens(1, 4))
    assert len(heard) == 2
    near(ours.logits, theirs.logits)


def test_torch_compile_keeps_the_operators():
    made, ids = model(), tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    seen: set[str] = set()

    def backend(graph, inputs):
        seen.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    with torch.no_grad():
        compiled = torch.compile(made, fullgraph=True, backend=backend)
        near(compiled(ids, mask).logits, made(ids, mask).logits)
    names = {name.split(".")[1] for name in seen if name.startswith("llama_triton.")}
    assert names >= {"rms_norm", "add_rms_norm", "apply_rope", "flash_attention", "swiglu"}


def test_a_replaced_activation_is_called():
    made = model()
    made.model.layers[0].mlp.act_fn = nn.Tanh()
    near(*(out.logits for out in both(made, tokens(1, 5))))


def test_the_backend_of_a_model_is_that_of_its_parts():
    made = model(backend="torch")
    assert {module.backend for module in made.modules() if isinstance(module, ops.Computes)} == {"torch"}
    with pytest.raises(ValueError, match="backend must be one of auto, torch, triton, got 'cuda'"):
        made.set_backend("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests what happens without a GPU")
def test_without_a_gpu_triton_is_refused_and_auto_is_pytorch(tmp_path):
    """In a subprocess without the interpreter."""
    model().save_pretrained(tmp_path)
    code = f"""
import os, sys
os.environ.pop("TRITON_INTERPRET", None)
import llama, torch
made = llama.LlamaForCausalLM.from_pretrained({str(tmp_path)!r})
made(torch.arange(3)[None])
assert "llama.kernels.launch" not in sys.modules
llama.LlamaForCausalLM.from_pretrained({str(tmp_path)!r}, backend="triton")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'ValueError: the triton backend needs a GPU and there is none; use backend="torch"' in done.stderr
