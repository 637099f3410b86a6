"""Libraries for transformers' models work with ours: whatever they attach takes effect, above all in one-row steps on a
CPU, for which `llama.ops.linear` has a separate path."""

import copy
import io
import pickle
import random

import accelerate
import numpy as np
import peft
import pytest
import torch
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from checkpoint_files import FIELDS
from oracle import miss, transformers_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import llama
from llama import LlamaForCausalLM, ops

# Warnings that peft also raises for transformers' model.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Position ids are not supported for parameter efficient tuning:UserWarning",
)

IDS = torch.tensor([[1, 5, 7, 2, 9]])
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WRITE = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}


def pair(name="LlamaForCausalLM", **more):
    """Return our model and transformers', with the same weights."""
    theirs, _ = transformers_model(FIELDS, 4, getattr(transformers, name), **more)
    config = llama.LlamaConfig.from_dict(theirs.config.to_dict() | {"attn_implementation": None})
    model = getattr(llama, name)(config).eval()
    model.load_state_dict(theirs.state_dict())
    return model, theirs


@pytest.fixture(autouse=True)
def numpy_from_the_first_number(monkeypatch):
    """Make `ops.linear` use NumPy even for weights as small as those of the tests."""
    monkeypatch.setattr(ops, "IN_CACHE", 0)


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits.numpy()


@torch.no_grad()
def step(model):
    """Return the last token's logits from a decoding step of one row."""
    past = model(input_ids=IDS[:, :-1], use_cache=True).past_key_values
    return model(input_ids=IDS[:, -1:], past_key_values=past).logits.numpy()


@torch.no_grad()
def written(model, **options) -> list:
    return model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **WRITE | options).tolist()


def assert_same(ours, theirs):
    assert miss(logits(ours), logits(theirs)) < 1e-5  # float32 in a different summation order
    assert miss(step(ours), step(theirs)) < 1e-5


def linears(model):
    return {name: module for name, module in model.named_modules() if type(module) is nn.Linear}


# --- peft ---

TARGETS = {
    "default": {},  # q_proj and v_proj, which peft selects by `config.model_type`
    "every": {"target_modules": "all-linear"},
    "mlp": {"target_modules": ["gate_proj", "up_proj", "down_proj"]},
    "k and o": {"target_modules": ["k_proj", "o_proj"], "use_dora": True},
    "head": {"target_modules": ["lm_head"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "head in full": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


def lora(base, seed=0, task="CAUSAL_LM", **options):
    """Return an adapter that has an effect; peft initialises its own to zero."""
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(task_type=task, r=4, lora_alpha=16, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    return model.eval()


@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapter_speaks_as_on_transformers_model(tmp_path, targets):
    base, their_base = pair()
    before, before_text = step(base), written(base)
    theirs = lora(their_base, **TARGETS[targets])
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(base, tmp_path).eval()
    assert_same(ours, theirs)
    assert miss(step(ours), before) > 1e-2
    text = written(ours)
    assert text == written(theirs) != before_text
    assert text == written(ours, use_cache=False) == written(ours, num_beams=1, cache_implementation="static")
    with ours.disable_adapter():
        assert miss(step(ours), before) < 1e-5
        assert written(ours) == before_text
    merged = ours.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    assert miss(logits(merged), logits(theirs)) < 1e-5
    assert written(merged) == text


def test_our_adapter_is_loaded_onto_transformers_model(tmp_path):
    base, their_base = pair()
    ours = lora(base, target_modules=PROJECTIONS)
    ours.save_pretrained(tmp_path)
    assert_same(ours, PeftModel.from_pretrained(their_base, tmp_path).eval())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_only_the_adapter_learns(checkpointing):
    base, _ = pair()
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=4)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items() if "lora" not in name}
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora" in name) == (parameter.grad is not None), name
    assert len([name for name, _ in model.named_parameters() if "lora" in name]) == 8
    assert all(torch.equal(tensor, base.state_dict()[name]) for name, tensor in before.items())
    trained = step(model.eval())
    with model.disable_adapter():
        assert miss(trained, step(model)) > 1e-2


def test_two_adapters_are_switched_between():
    model = lora(pair()[0], seed=1)
    model.add_adapter("second", LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    first = step(model)
    model.set_adapter("second")
    assert miss(step(model), first) > 1e-2
    model.set_adapter("default")
    assert miss(step(model), first) == 0


@pytest.mark.parametrize(("name", "task"), [("LlamaForSequenceClassification", "SEQ_CLS"),
                                            ("LlamaForTokenClassification", "TOKEN_CLS")])  # fmt: skip
def test_a_classifier_is_adapted(name, task):
    base, their_base = pair(name)
    ours, theirs = lora(base, task=task), lora(their_base, task=task)
    theirs.load_state_dict(ours.state_dict())
    assert miss(logits(ours), logits(theirs)) < 1e-5
    assert any("modules_to_save" in n and p.requires_grad for n, p in ours.named_parameters())


PROMPTS = {  # longer than the text
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
    "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=7, encoder_hidden_size=8),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=7),
}


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_learnt_prompt_is_read_before_the_text(kind):
    base, their_base = pair()
    before = logits(base), written(base)
    torch.manual_seed(0)
    theirs = get_peft_model(their_base, copy.deepcopy(PROMPTS[kind])).eval()
    ours = get_peft_model(base, copy.deepcopy(PROMPTS[kind])).eval()
    with torch.no_grad():
        for parameter in theirs.prompt_encoder.parameters():
            parameter.normal_(0, 1)
    ours.prompt_encoder.load_state_dict(theirs.prompt_encoder.state_dict())
    assert miss(logits(ours)[:, -5:], before[0]) > 1e-2
    assert miss(logits(ours), logits(theirs)) < 1e-5
    text = written(theirs)
    assert text != before[1]
    assert written(ours) == text
    assert written(base) == before[1]  # the base model is unaffected


# --- accelerate ---

PLACES = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu",
          "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "dispatch"])
def test_weights_that_are_brought_for_each_call(tmp_path, how):
    model, theirs = pair()
    if how == "cpu_offload":
        model = accelerate.cpu_offload(model, execution_device="cpu")
    elif how == "disk_offload":
        model = accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    else:
        model = accelerate.dispatch_model(model, PLACES, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert model.lm_head.weight.is_meta
    assert_same(model, theirs)
    assert written(model) == written(theirs)


def test_a_checkpoint_is_loaded_and_dispatched(tmp_path):
    model, theirs = pair()
    model.save_pretrained(tmp_path / "model", max_shard_size="40KB")
    with accelerate.init_empty_weights():
        empty = LlamaForCausalLM(model.config)
    assert all(parameter.is_meta for parameter in empty.parameters())
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, tmp_path / "model", PLACES, offload_folder=tmp_path / "offload",
        no_split_module_classes=empty._no_split_modules,
    )  # fmt: skip
    assert_same(loaded.eval(), theirs)
    assert written(loaded) == written(theirs)


def test_layers_are_not_split_over_devices():
    model, _ = pair()
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    room = {"cpu": layer + layer // 2 + model.model.embed_tokens.weight.nbytes, "disk": 10**9}
    places = accelerate.infer_auto_device_map(model, room, no_split_module_classes=model._no_split_modules)
    assert not [name for name in places if name.startswith("model.layers.") and name.count(".") > 2]
    assert set(places.values()) == {"cpu", "disk"}


def test_tied_weights_stay_tied_through_accelerate():
    model, theirs = pair(tie_word_embeddings=True)
    model = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(model, theirs)


class Louder(ModelHook):
    def __init__(self):
        self.calls = []

    def post_forward(self, module, output):
        self.calls.append(module)
        return output * 2


def test_accelerates_hooks_are_called():
    model, _ = pair()
    before = step(model)
    for name, module in linears(model).items():
        hook = Louder()
        add_hook_to_module(module, hook)
        assert miss(step(model), before) > 1e-4, name
        assert hook.calls == [module, module]  # the prompt and the token
        assert miss(step(model), logits(model)[:, -1:]) < 1e-5, name
        remove_hook_from_module(module)
        assert miss(step(model), before) < 1e-5


# --- what is attached to a Linear ---


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Doubling(nn.Module):
    def forward(self, weight):
        return 2 * weight


def subclass(module):
    module.__class__ = Doubled


def forward_hook(module):
    module.register_forward_hook(lambda _, inputs, output: 2 * output)


def pre_hook(module):
    module.register_forward_pre_hook(lambda _, inputs: (2 * inputs[0],))


def own_forward(module):
    module.forward = lambda x: 2 * nn.Linear.forward(module, x)


def parametrised(module):
    nn.utils.parametrize.register_parametrization(module, "weight", Doubling())


def normed(module):
    parametrizations.weight_norm(module).parametrizations.weight.original0.data.mul_(2)


def pruned(module):
    prune.l1_unstructured(module, "weight", 0.5)


def subclassed_weight(module):
    class Louder(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            out = super().__torch_function__(function, types, args, kwargs or {})
            return (2 * out).as_subclass(torch.Tensor) if function is nn.functional.linear else out

    weight = module.weight.data.as_subclass(Louder)
    weight.requires_grad_(False)
    del module.weight
    module.weight = weight


ATTACHED = (subclass, forward_hook, pre_hook, own_forward, parametrised, normed, pruned, subclassed_weight)


@pytest.mark.parametrize("in_cache", [0, 2**40])
@pytest.mark.parametrize("attach", ATTACHED)
def test_what_is_attached_to_a_linear_is_heard_at_one_row(attach, in_cache, monkeypatch):
    """PyTorch computes five rows; a single one must equal them, whatever is attached to a layer."""
    monkeypatch.setattr(ops, "IN_CACHE", in_cache)
    for name in linears(pair()[0]):
        model, _ = pair()
        before = step(model)
        attach(model.get_submodule(name))
        assert miss(step(model), logits(model)[:, -1:]) < 1e-5, name
        assert miss(step(model), before) > 1e-4, name


def test_what_watches_every_module_sees_every_linear():
    model, _ = pair()
    for register in (
        nn.modules.module.register_module_forward_hook,
        nn.modules.module.register_module_forward_pre_hook,
    ):
        seen = []
        handle = register(lambda module, *_: seen.append(module))  # noqa: B023
        try:
            step(model)
        finally:
            handle.remove()
        assert [seen.count(module) for module in linears(model).values()] == [2] * 15


class Operations(TorchDispatchMode):
    wanted = torch.ops.aten.mm.default

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += function is self.wanted
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    wanted = nn.functional.linear

    def __init__(self):
        super().__init__()
        self.calls = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.calls += function is self.wanted
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Operations, Functions])
def test_a_mode_sees_every_product(mode):
    model, _ = pair()
    with mode() as watch:
        step(model)
    assert watch.calls == 2 * 15  # the prompt and the token


def test_operations_are_counted_at_one_row():
    from torch.utils.flop_counter import FlopCounterMode

    counts = []
    for model in pair():
        for read in (step, logits):
            with FlopCounterMode(display=False) as counter:
                read(model)
            counts.append(counter.get_flop_counts()["Global"][torch.ops.aten.mm])
    assert counts[0] == counts[1] == counts[2] == counts[3] > 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_trace_is_no_constant():
    mlp = pair()[0].model.layers[0].mlp
    first, second = torch.randn(2, 1, 1, 64)
    traced = torch.jit.trace(mlp, first, check_trace=False)
    assert miss(traced(second), mlp(second)) < 1e-5


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@torch.no_grad()
def test_functional_transformations_pass_through_one_row():
    mlp = pair()[0].model.layers[0].mlp.requires_grad_(False)
    x = torch.randn(3, 1, 64)
    assert miss(torch.func.vmap(mlp)(x), mlp(x)) < 1e-5
    one, along = x[:1], torch.ones(1, 1, 64)
    expected = (mlp(one + 1e-3 * along) - mlp(one - 1e-3 * along)) / 2e-3
    assert miss(torch.func.jvp(mlp, (one,), (along,))[1], expected) < 1e-2
    with torch.enable_grad(), forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(mlp(forward_ad.make_dual(one, along))).tangent
    assert tangent is not None
    assert miss(tangent, expected) < 1e-2


@torch.no_grad()
def test_weights_that_are_lent_for_a_call_are_used():
    model, other = pair()[0], pair()[0]
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    past, own = (each(IDS[:, :-1], use_cache=True).past_key_values for each in (other, other))
    lent = torch.func.functional_call(model, dict(other.named_parameters()), (IDS[:, -1:], None, None, past)).logits
    assert miss(lent, step(other)) < 1e-5
    assert miss(lent, model(IDS[:, -1:], past_key_values=own).logits) > 1e-2


@torch.no_grad()
def test_autocast_reaches_one_row():
    model, theirs = pair()
    with torch.autocast("cpu", torch.bfloat16):
        ours, expected = (each(IDS[:, :1]).logits for each in (model, theirs))
    assert ours.dtype == expected.dtype == torch.bfloat16
    assert miss(ours.float(), expected.float()) < 2e-2  # a few times the precision of bfloat16, 8 bits


@torch.no_grad()
def test_weights_that_changed_are_read_anew():
    """Changed in place, replaced, or replaced by a non-contiguous tensor: weights are not cached between calls."""
    model, _ = pair()
    for name, module in linears(model).items():
        for change in (lambda m: m.weight.mul_(2), lambda m: setattr(m, "weight", nn.Parameter(m.weight / 3)),
                       lambda m: setattr(m, "weight", nn.Parameter(m.weight.T.contiguous().T * 2))):  # fmt: skip
            before = step(model)
            change(module)
            assert miss(step(model), logits(model)[:, -1:]) < 1e-5, name
            assert miss(step(model), before) > 1e-4, name


@pytest.mark.parametrize("in_cache", [0, 2**40])
def test_one_row_has_its_biases(in_cache, monkeypatch):
    monkeypatch.setattr(ops, "IN_CACHE", in_cache)
    assert_same(*pair(attention_bias=True, mlp_bias=True))


@pytest.mark.parametrize("in_cache", [0, 2**40])
def test_one_layer_learns_at_one_row(in_cache, monkeypatch):
    """The input then needs no gradient, but the weight does."""
    monkeypatch.setattr(ops, "IN_CACHE", in_cache)
    for name in linears(pair()[0]):
        grads = []
        for model in pair():
            model.requires_grad_(False)
            with torch.no_grad():
                past = model(IDS[:, :-1], use_cache=True).past_key_values
            module = model.get_submodule(name).requires_grad_()
            model(IDS[:, -1:], past_key_values=past).logits.square().sum().backward()
            grads.append(module.weight.grad)
        assert miss(*grads) < 1e-4, name


def test_gradients_flow_at_one_row():
    for frozen in (False, True):
        model, theirs = pair()
        for each in (model, theirs):
            each.requires_grad_(not frozen)
            with torch.no_grad():
                past = each(IDS[:, :-1], use_cache=True).past_key_values
            embeds = each.get_input_embeddings()(IDS[:, -1:]).detach().requires_grad_()
            each(inputs_embeds=embeds, past_key_values=past).logits.square().sum().backward()
            each.seen = embeds.grad
        assert miss(model.seen, theirs.seen) < 1e-4
        for ours, expected in zip(model.parameters(), theirs.parameters(), strict=True):
            assert (ours.grad is None) == (expected.grad is None)
            assert ours.grad is None or miss(ours.grad, expected.grad) < 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.ao moves to torchao, which is not needed here
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_dynamically_quantised_layers_are_called():
    ours, theirs = (torch.ao.quantization.quantize_dynamic(model, {nn.Linear}) for model in pair())
    assert not linears(ours)
    assert_same(ours, theirs)
    assert miss(step(ours), step(pair()[0])) > 1e-4
    assert written(ours) == written(theirs)


# --- transformers' own ---


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({chr(97 + i): i for i in range(12)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="l")


def test_the_pipeline_writes():
    texts = [
        transformers.pipeline("text-generation", model=model, tokenizer=tokenizer())("b f h c", **WRITE)
        for model in pair()
    ]
    assert texts[0] == texts[1]
    assert len(texts[0][0]["generated_text"].split()) > 8


LABELS = {
    "LlamaForCausalLM": IDS[0],
    "LlamaForSequenceClassification": torch.tensor(1),
    "LlamaForTokenClassification": torch.tensor([0, 1, -100, 1, 0]),
}


@pytest.mark.parametrize(("name", "checkpointing"), [*((name, False) for name in LABELS), ("LlamaForCausalLM", True)])
def test_the_trainer_trains(tmp_path, name, checkpointing):
    """Accumulating over batches, the Trainer counts the labels itself and must know which count.

    (transformers' classifiers then report the sum over the batches, so they get one batch per step.)
    """
    losses = []
    for model in pair(name, pad_token_id=0):
        if "Token" in name:
            model.dropout.p = 0.0
        steps = 2 if name == "LlamaForCausalLM" else 1
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
            save_strategy="no", use_cpu=True, disable_tqdm=True, logging_steps=1, gradient_accumulation_steps=steps,
            **({"gradient_checkpointing": True} if checkpointing else {}),
        )  # fmt: skip
        rows = [{"input_ids": IDS[0].roll(i), "labels": LABELS[name]} for i in range(4)]
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:3])
        trainer.train()
        history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        losses.append([float(loss) for loss in [*history, trainer.evaluate()["eval_loss"]]])
        trainer.save_model(str(tmp_path / "saved"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-2, abs=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_the_loss_function_is_asked_and_may_be_replaced():
    model, theirs = pair()
    labels = torch.where(IDS == 7, -100, IDS)
    given = {"logits": theirs(IDS).logits.detach(), "vocab_size": 12}
    for more in ({"labels": labels}, {"labels": IDS, "num_items_in_batch": 3}, {"labels": IDS, "ignore_index": 2},
                 {"labels": None, "shift_labels": labels}):  # fmt: skip
        assert miss(model.loss_function(**given, **more), theirs.loss_function(**given, **more)) < 1e-6
    with pytest.raises(ValueError, match="labels or shift_labels must be given"):
        model.loss_function(**given, labels=None)

    def twice(logits, labels, vocab_size, **kwargs):
        seen.append(sorted(kwargs))
        return 2 * transformers.loss.loss_utils.ForCausalLMLoss(logits, labels, vocab_size, **kwargs)

    losses, seen = [model(IDS, labels=IDS).loss.item()], []
    for each in (model, theirs):
        each.loss_function = twice
        losses.append(each(IDS, labels=IDS).loss.item())
        each(IDS, labels=IDS, num_items_in_batch=2)
    assert losses[1] == pytest.approx(losses[2], rel=1e-5) == pytest.approx(2 * losses[0], rel=1e-5)
    assert seen == 2 * [[], ["num_items_in_batch"]]
    cut = model(IDS, labels=IDS, logits_to_keep=2).loss.item()
    del model.loss_function
    assert cut == pytest.approx(2 * model(IDS, labels=IDS, logits_to_keep=2).loss.item(), rel=1e-5)


def test_a_seed_is_set_everywhere():
    drawn = []
    for each in (llama, transformers):
        each.set_seed(7)
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    with pytest.raises(ValueError, match="Seed must be between 0 and"):
        llama.set_seed(-1)


# --- Python's and PyTorch's own ---


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_is_copied_and_pickled_whole(tmp_path, tied):
    pair(tie_word_embeddings=tied)[0].save_pretrained(tmp_path)
    model = LlamaForCausalLM.from_pretrained(tmp_path)  # memory-mapped
    model.prune_heads({0: [1]})
    expected, text = logits(model), written(model)
    torch.save(model, tmp_path / "whole.pt")
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(tmp_path / "whole.pt", weights_only=False),
    ]
    for twin in twins:
        assert type(twin) is LlamaForCausalLM
        assert miss(logits(twin), expected) < 1e-6
        assert written(twin) == text
        assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == tied
        assert twin.config == model.config
        assert twin.config is not model.config
        assert twin.config is twin.model.config  # as before
        with torch.no_grad():
            twin.model.norm.weight.zero_()
    assert miss(logits(model), expected) == 0


def test_a_state_dict_goes_out_and_in():
    model, theirs = pair()
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert list(state) == list(theirs.state_dict())
    assert pickle.loads(pickle.dumps(state)).keys() == state.keys()
    with torch.device("meta"):
        empty = LlamaForCausalLM(model.config).eval()
    empty.load_state_dict(state, assign=True)
    empty.model.rotary_emb.to("cpu")  # not stored in any file
    assert_same(empty, theirs)
    assert theirs.load_state_dict(state).missing_keys == []


def test_outputs_are_pickled():
    out = pair()[0](IDS, use_cache=True, output_hidden_states=True)
    twin = pickle.loads(
        pickle.dumps(llama.outputs.CausalLMOutputWithPast({k: v for k, v in out.items() if k == "logits"}))
    )
    assert torch.equal(twin.logits, out.logits)
    assert list(twin) == ["logits"]
