"""Our models as transformers' `PreTrainedModel`: its machinery around our forward pass."""

import inspect
import subprocess
import sys

import pytest
import torch
import transformers
from checkpoint_files import FIELDS
from oracle import miss, transformers_model
from tokenizers import Tokenizer, models, pre_tokenizers

import llama
from llama import hf, modeling

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
CLASSES = (
    "LlamaModel",
    "LlamaForCausalLM",
    "LlamaForSequenceClassification",
    "LlamaForTokenClassification",
    "LlamaForQuestionAnswering",
)
FIELDS = {name: value for name, value in FIELDS.items() if name != "model_type"} | {"pad_token_id": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf")
    transformers_model(FIELDS, 0)[0].save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_every_class_is_transformers_own_with_our_forward_pass(tmp_path, name):
    theirs, _ = transformers_model(FIELDS, 1, getattr(transformers, name))
    theirs.save_pretrained(tmp_path)
    ours = getattr(hf, name).from_pretrained(tmp_path)
    assert isinstance(ours, transformers.PreTrainedModel)
    assert isinstance(ours.base_model, modeling.LlamaModel) == (name != "LlamaModel")
    assert miss(ours(IDS)[0], theirs(IDS)[0]) < 1e-5
    assert miss(ours(IDS, return_dict=False)[0], theirs(IDS)[0]) < 1e-5
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.save_pretrained(tmp_path / "again")
    assert miss(type(theirs).from_pretrained(tmp_path / "again")(IDS)[0], theirs(IDS)[0]) < 1e-5


def test_transformers_generates_with_it(folder):
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder)
    ours = hf.LlamaForCausalLM.from_pretrained(folder)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    for options in (
        {"num_beams": 3}, {"num_beams": 1}, {"cache_implementation": "dynamic"}, {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 3}, {"cache_implementation": "static", "attention_mask": mask},
    ):  # fmt: skip
        options |= {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
        assert torch.equal(ours.generate(IDS, **options), theirs.generate(IDS, **options))


@pytest.mark.parametrize("cache", [lambda config: llama.DynamicCache(), lambda config: llama.StaticCache(config, 20)])
def test_our_caches_go_through_transformers_generate(folder, cache):
    ours = hf.LlamaForCausalLM.from_pretrained(folder)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "pad_token_id": 0}
    text = ours.generate(IDS, past_key_values=cache(ours.config), **options)
    assert torch.equal(text, ours.generate(IDS, **options))


def test_results_are_transformers_records(folder):
    """Its pipelines check an output's class, and pass anything else on as a plain dictionary."""
    words = Tokenizer(models.WordLevel({chr(97 + i): i for i in range(12)}, unk_token="a"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    features = [
        transformers.pipeline("feature-extraction", model=each.from_pretrained(folder), tokenizer=tokenizer)("b f h c")
        for each in (hf.LlamaModel, transformers.LlamaModel)
    ]
    assert miss(*features) < 1e-5
    for name in CLASSES:
        theirs, _ = transformers_model(FIELDS, 1, getattr(transformers, name))
        ours = getattr(hf, name)(theirs.config)
        assert type(ours(IDS)) is type(theirs(IDS))
        assert type(ours(IDS, return_dict=False)) is tuple
        assert inspect.signature(type(ours).forward) == inspect.signature(getattr(modeling, name).forward)


def test_frequencies_stay_what_they_are_in_a_half_and_in_a_new_model(folder):
    half = hf.LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16
    new = hf.LlamaForCausalLM(transformers.LlamaConfig(**FIELDS))
    right = modeling.LlamaModel(new.model.config).rotary_emb.inv_freq
    assert torch.equal(half.model.rotary_emb.inv_freq, right)
    assert torch.equal(new.model.rotary_emb.inv_freq, right)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_it_trains_with_checkpointing(folder):
    model = hf.LlamaForCausalLM.from_pretrained(folder).train()
    runs = []
    model.model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    for enabled in (False, True):
        if enabled:
            model.gradient_checkpointing_enable()
        runs.clear()
        model(IDS, labels=IDS).loss.backward()
        assert len(runs) == 1 + enabled  # recomputed once during backward
    assert model.lm_head.weight.grad.abs().sum() > 0


def test_registered_auto_classes_give_ours(folder):
    code = (
        "import sys, transformers; from llama import hf; hf.register();"
        "model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
        "assert type(model) is hf.LlamaForCausalLM, type(model);"
        "assert type(transformers.AutoModel.from_pretrained(sys.argv[1])) is hf.LlamaModel"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, capture_output=True)
