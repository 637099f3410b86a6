"""Loading, saving and modifying models: we read what transformers writes and vice versa; damaged files raise clear
errors, and an interrupted save leaves the old model; resized, pruned and tied models compute what they should."""

import copy
import errno
import itertools
import json
import os
import pickle
import stat
import struct
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from checkpoint_files import FIELDS, random_params, write_folder, write_gguf
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import miss, transformers_model
from safetensors.torch import load_file, save_file
from strategies import SEEDS, configs
from torch import nn

import llama
from llama import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel, reference
from llama.checkpoints import open_checkpoint, torch_files

CLASSES = ("LlamaModel", "LlamaForCausalLM", "LlamaForSequenceClassification", "LlamaForTokenClassification",
           "LlamaForQuestionAnswering")  # fmt: skip
HEADS = {
    "LlamaModel": [],
    "LlamaForCausalLM": ["lm_head.weight"],
    "LlamaForSequenceClassification": ["score.weight"],
    "LlamaForTokenClassification": ["score.bias", "score.weight"],
    "LlamaForQuestionAnswering": ["qa_outputs.bias", "qa_outputs.weight"],
}
PREFIXES = {"LlamaModel": "", "LlamaForQuestionAnswering": "transformer."}  # "model." for the rest
NORM = "model.norm.weight"
IDS = torch.tensor([[1, 5, 7, 2, 9]])


def small(name="LlamaForCausalLM", seed=0, **fields):
    """A model of ours with random weights; norms and biases differ from their initial values, so that mistakes show."""
    torch.manual_seed(seed)
    model = getattr(llama, name)(LlamaConfig(**FIELDS | fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.5 if parameter.dim() == 1 else 0, 0.3)
    return model


@torch.no_grad()
def outputs(model, ids=IDS) -> np.ndarray:
    """All outputs of a model for `ids`, whatever its class, as one flat array."""
    out = model(ids)
    names = ("last_hidden_state", "logits", "start_logits", "end_logits")
    return np.concatenate([out[name].float().numpy().ravel() for name in names if name in out])


def assert_same_outputs(ours, theirs, tolerance=1e-5):
    assert miss(outputs(ours), outputs(theirs)) < tolerance  # float32 sums in a different order


def assert_same_weights(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def files(folder) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def config_of(folder) -> dict:
    return json.loads((Path(folder) / "config.json").read_text())


def configure(folder, **fields):
    (Path(folder) / "config.json").write_text(json.dumps(config_of(folder) | fields))


def restore(model, folder, form):
    """Save `model` in one of transformers 4's layouts: safetensors or .bin, one file or two shards with an index."""
    model.save_pretrained(folder)
    if form == "model.safetensors":
        return folder
    (folder / "model.safetensors").unlink()
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    write = torch.save if ".bin" in form else lambda part, path: save_file(part, path, metadata={"format": "pt"})
    if not form.startswith("two"):
        write(state, folder / form)
        return folder
    form, names, weight_map = form.removeprefix("two "), sorted(state), {}
    stem, suffix = form.split(".")
    for number in (1, 2):
        file = f"{stem}-0000{number}-of-00002.{suffix}"
        part = {name: state[name] for name in names[number - 1 :: 2]}
        write(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / f"{form}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


FORMS = ("model.safetensors", "two model.safetensors", "pytorch_model.bin", "two pytorch_model.bin")


# --- loading ---


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", CLASSES)
def test_what_transformers_saves_is_loaded(tmp_path, name, form):
    theirs, _ = transformers_model(FIELDS, 1, getattr(transformers, name), attention_bias=True, num_labels=3)
    model = getattr(llama, name).from_pretrained(restore(theirs, tmp_path, form))
    assert type(model) is getattr(llama, name)
    assert not any(module.training for module in model.modules())
    assert_same_weights(model, theirs.state_dict())
    assert_same_outputs(model, theirs)
    assert model.name_or_path == model.config.name_or_path == str(tmp_path)


@pytest.mark.parametrize(("source", "target"), [*itertools.product(CLASSES, CLASSES)])
def test_every_class_reads_every_class(tmp_path, source, target):
    theirs, params = transformers_model(FIELDS, 1, getattr(transformers, source))
    theirs.save_pretrained(tmp_path)
    model, info = getattr(llama, target).from_pretrained(tmp_path, output_loading_info=True)
    # Sequence and token classification both name their head `score`, so each reads the other's weight.
    missing = sorted(set(HEADS[target]) - set(HEADS[source]))
    assert sorted(info["missing_keys"]) == missing
    assert info["unexpected_keys"] == sorted(set(HEADS[source]) - set(HEADS[target]))
    assert info["mismatched_keys"] == info["error_msgs"] == []
    state = model.state_dict()
    for name, array in params.items():
        core = name.removeprefix(PREFIXES.get(source, "model."))
        if core not in HEADS[source]:
            np.testing.assert_array_equal(state[PREFIXES.get(target, "model.") + core], array)
        elif core in HEADS[target]:
            np.testing.assert_array_equal(state[core], array)
    if missing:  # initialised as in a new model, not left as uninitialised memory
        for name in missing:
            assert state[name].eq(0).all() if name.endswith("bias") else 0.01 < state[name].std() < 0.03
        with pytest.warns(UserWarning, match=rf"has no {missing[-1]}|{target} initialises them"):
            getattr(llama, target).from_pretrained(tmp_path)


def test_gguf_is_loaded(tmp_path):
    params = random_params()
    write_gguf(tmp_path / "m.gguf", params)
    model = LlamaForCausalLM.from_pretrained(tmp_path / "m.gguf")
    assert_same_weights(model, {name: torch.tensor(array) for name, array in params.items()})
    expected = reference.forward(*reference.load(tmp_path / "m.gguf"), IDS.numpy()).logits
    assert miss(outputs(model).reshape(expected.shape), expected) < 1e-5
    base = LlamaModel.from_pretrained(str(tmp_path / "m.gguf"), dtype="bfloat16")
    assert torch.equal(base.norm.weight, torch.tensor(params[NORM]).bfloat16())
    write_gguf(tmp_path / "q.gguf", params, quantisation=gguf.GGMLQuantizationType.Q8_0)
    quantised = LlamaForCausalLM.from_pretrained(tmp_path / "q.gguf")
    read = reference.load(tmp_path / "q.gguf")[0]
    assert_same_weights(quantised, {name: torch.tensor(array) for name, array in read.items()})
    quantised.save_pretrained(tmp_path / "folder")  # converted to a folder
    assert_same_weights(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "folder"), quantised.state_dict())


def test_an_open_checkpoint_and_a_home_are_paths_too(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "model", random_params())
    expected = LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert_same_weights(LlamaForCausalLM.from_pretrained(open_checkpoint(folder)), expected)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert_same_weights(LlamaForCausalLM.from_pretrained("~/model"), expected)


@pytest.mark.parametrize("prefix", ["model.", "", "transformer."])
def test_a_state_dict_takes_the_place_of_the_files(tmp_path, prefix):
    folder, other = write_folder(tmp_path, random_params()), random_params(seed=1)
    state = {name.replace("model.", prefix): torch.tensor(array) for name, array in other.items()}
    model = LlamaForCausalLM.from_pretrained(folder, state_dict=state)
    assert_same_weights(model, {name: torch.tensor(array) for name, array in other.items()})
    with pytest.raises(ValueError, match=r"the tensor model\.embed_tokens\.weight is missing and 19 others"):
        LlamaForCausalLM.from_pretrained(folder, state_dict={"lm_head.weight": state["lm_head.weight"]})


@pytest.mark.parametrize(
    ("file", "config", "asked", "expected"),
    [
        ("bfloat16", None, {}, "bfloat16"),
        ("bfloat16", None, {"dtype": "auto"}, "bfloat16"),
        ("float32", "float16", {}, "float16"),  # the configuration takes precedence over the file
        ("float16", "float32", {"torch_dtype": "auto"}, "float32"),
        ("bfloat16", "bfloat16", {"dtype": torch.float32}, "float32"),
        ("float32", "float32", {"dtype": "bfloat16"}, "bfloat16"),
        ("float32", None, {"torch_dtype": torch.float64}, "float64"),
        ("float32", None, {"torch_dtype": "float16", "dtype": "bfloat16"}, "bfloat16"),
    ],
)
def test_the_dtype_is_the_one_asked_for_or_the_files(tmp_path, file, config, asked, expected):
    stored = {name: torch.tensor(a).to(getattr(torch, file)) for name, a in random_params().items()}
    write_folder(tmp_path, random_params())
    configure(tmp_path, torch_dtype=config)
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    wanted = getattr(torch, expected)
    model = LlamaForCausalLM.from_pretrained(tmp_path, **asked)
    assert model.dtype == model.config.dtype == model.config.torch_dtype == wanted
    assert_same_weights(model, {name: tensor.to(wanted) for name, tensor in stored.items()})
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    if "torch_dtype" not in asked:
        assert transformers.LlamaForCausalLM.from_pretrained(tmp_path, **asked).dtype == wanted


@pytest.mark.parametrize(
    "asked",
    [{"device": "cpu"}, {"device": torch.device("cpu")}, {"device_map": "cpu"}, {"device_map": "auto"},
     {"device_map": {"": "cpu"}}, {"device_map": {"model": "cpu", "lm_head": torch.device("cpu")}}, {"device": "meta"}],
)  # fmt: skip
def test_one_device_is_chosen(tmp_path, asked, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = LlamaForCausalLM.from_pretrained(write_folder(tmp_path, random_params()), **asked)
    expected = "meta" if asked == {"device": "meta"} else "cpu"
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {expected}
    assert model.device == torch.device(expected)


def test_auto_is_the_gpu_where_there_is_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    seen = []
    monkeypatch.setattr(LlamaForCausalLM, "_load", lambda self, tensors, dtype, device, ignore: seen.append(device))
    with pytest.raises(TypeError):  # the stub loads nothing
        LlamaForCausalLM.from_pretrained(write_folder(tmp_path, random_params()), device_map="auto")
    assert seen == [torch.device("cuda")]


def test_fields_of_the_configuration_are_overridden(tmp_path):
    folder = write_folder(tmp_path, random_params())
    model, info = LlamaForCausalLM.from_pretrained(
        folder, num_hidden_layers=1, use_cache=False, attn_implementation="eager", output_loading_info=True
    )
    assert (len(model.model.layers), model.config.use_cache, model.config.attn_implementation) == (1, False, "eager")
    assert len(info["unexpected_keys"]) == 9
    assert all(name.startswith("model.layers.1.") for name in info["unexpected_keys"])
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, num_hidden_layers=1, attn_implementation="eager")
    assert_same_outputs(model, theirs)
    with pytest.warns(UserWarning, match=r"has no score\.weight"):
        assert LlamaForSequenceClassification.from_pretrained(folder, num_labels=5).score.weight.shape == (5, 64)


def test_a_configuration_of_ones_own_is_used_and_left_alone(tmp_path):
    folder = write_folder(tmp_path, random_params())
    config = LlamaConfig(**FIELDS | {"rope_theta": 77.0, "rms_norm_eps": 0.1})
    before = copy.deepcopy(vars(config))
    model = LlamaForCausalLM.from_pretrained(folder, config=config, dtype="bfloat16")
    assert (model.config.rope_theta, model.model.norm.variance_epsilon, model.dtype) == (77.0, 0.1, torch.bfloat16)
    assert vars(config) == before


def test_transformers_configuration_takes_the_place_of_the_files(tmp_path):
    folder = write_folder(tmp_path, random_params())
    config = transformers.LlamaConfig(**FIELDS | {"rope_theta": 77.0}, attn_implementation="eager")
    model = LlamaForCausalLM.from_pretrained(folder, config=config)
    assert type(model.config) is LlamaConfig
    assert_same_outputs(model, transformers.LlamaForCausalLM.from_pretrained(folder, config=config))
    with pytest.raises(
        ValueError,
        match=r"got transformers\..*LlamaConfig; convert it by llama\.LlamaConfig\.from_dict\(config\.to_dict",
    ):
        LlamaForCausalLM(config)
    assert LlamaForCausalLM(LlamaConfig.from_dict(config.to_dict())).config.rope_theta == 77.0


def test_options_of_generation_take_the_place_of_the_files(tmp_path):
    folder = write_folder(tmp_path, random_params())
    for kind in (llama.GenerationConfig, transformers.GenerationConfig):
        options = kind(max_new_tokens=3, eos_token_id=[5, 6])
        model = LlamaForCausalLM.from_pretrained(folder, generation_config=options)
        assert type(model.generation_config) is llama.GenerationConfig
        assert (model.generation_config.max_new_tokens, model.generation_config.eos_token_id) == (3, [5, 6])
        assert model.generation_config is not options


def test_a_keyword_beside_a_configuration_is_not_lost(tmp_path):
    folder, config = write_folder(tmp_path, random_params()), LlamaConfig(**FIELDS)
    with pytest.raises((TypeError, ValueError), match="num_hidden_layer"):
        LlamaForCausalLM.from_pretrained(folder, config=config, num_hidden_layer=1)


def test_keywords_that_change_nothing_here_are_taken(tmp_path):
    folder = write_folder(tmp_path, random_params())
    LlamaForCausalLM.from_pretrained(
        folder, low_cpu_mem_usage=True, use_safetensors=True, trust_remote_code=False, local_files_only=True,
        max_memory={"cpu": "4GB"}, offload_state_dict=True, offload_buffers=True, device_mesh=None, tp_plan=None,
    )  # fmt: skip


WRONG = [
    ({"num_hidden_layer": 1}, r"from_pretrained has no argument num_hidden_layer; did you mean num_hidden_layers\?"),
    ({"devise": "cpu"}, r"from_pretrained has no argument devise; did you mean device\?"),
    ({"zzz": 1}, "from_pretrained has no argument zzz$"),
    ({"backend": "triton3"}, "backend must be one of auto, .*got 'triton3'"),
    ({"dtype": "int8"}, "dtype must be float64, float32, float16 or bfloat16, got 'int8'"),
    ({"device": "gpu"}, "device must be one that PyTorch knows, got 'gpu'"),
    ({"device": 3.5}, "device must be one that PyTorch knows, got 3.5"),
    ({"device": "cpu", "device_map": "cpu"}, "device and device_map mean the same"),
    ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "device_map must name one device"),
    ({"device_map": {}}, "device_map must name one device"),
    ({"device_mesh": "mesh"}, "from_pretrained has no argument device_mesh"),
    ({"config": {"vocab_size": 12}}, "config must be a LlamaConfig, got dict"),
    ({"num_attention_heads": 5}, "num_attention_heads"),
    ({"pad_token_id": 12}, r"pad_token_id \(12\) must be below vocab_size \(12\)"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        LlamaForCausalLM.from_pretrained(write_folder(tmp_path, random_params()), **arguments)


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; give a folder with config\.json"):
        LlamaForCausalLM.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt is not a model; give a folder"):
        LlamaForCausalLM.from_pretrained(tmp_path / "notes.txt")


def test_a_gpu_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=r"device is 'cuda:0', but PyTorch finds no GPU; use 'cpu'"):
        LlamaForCausalLM.from_pretrained(write_folder(tmp_path, random_params()), device_map={"": "cuda:0"})


def test_shapes_that_differ_are_named_or_drawn_anew(tmp_path):
    folder = write_folder(tmp_path, random_params())
    with pytest.raises(ValueError, match=r"size mismatch for model\.embed_tokens\.weight: the file holds \(12, 64\).*"
                                         r"asks for \(20, 64\)"):  # fmt: skip
        LlamaForCausalLM.from_pretrained(folder, vocab_size=20)
    model, info = LlamaForCausalLM.from_pretrained(
        folder, vocab_size=20, ignore_mismatched_sizes=True, output_loading_info=True
    )
    pairs = [("model.embed_tokens.weight", (12, 64), (20, 64)), ("lm_head.weight", (12, 64), (20, 64))]
    assert [(name, tuple(was), tuple(now)) for name, was, now in info["mismatched_keys"]] == pairs
    assert info["missing_keys"] == info["unexpected_keys"] == []
    assert model(torch.tensor([[19]])).logits.shape == (1, 1, 20)
    assert 0.015 < model.lm_head.weight.std() < 0.025
    assert torch.equal(model.model.norm.weight, torch.tensor(random_params()[NORM]))


def test_tensors_that_are_missing_or_too_many(tmp_path):
    params = random_params()
    del params["model.layers.1.mlp.up_proj.weight"], params[NORM]
    params |= {"model.extra.weight": np.ones(3, np.float32), "model.rotary_emb.inv_freq": np.ones(8, np.float32),
               "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}  # fmt: skip
    folder = write_folder(tmp_path, params)
    with pytest.raises(ValueError, match=r"the tensor model\.layers\.1\.mlp\.up_proj\.weight is missing and 1 others"):
        LlamaForCausalLM.from_pretrained(folder)
    model, info = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert info["missing_keys"] == ["model.layers.1.mlp.up_proj.weight", NORM]
    assert info["unexpected_keys"] == ["model.extra.weight"]
    assert model.model.norm.weight.eq(1).all()
    assert 0.015 < model.model.layers[1].mlp.up_proj.weight.std() < 0.025
    assert LlamaConfig().rope_theta != FIELDS["rope_theta"]
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**FIELDS))
    theirs.load_state_dict(model.state_dict())
    assert_same_outputs(model, theirs)  # the file's inv_freq is ignored; the configuration counts


def test_a_tensor_that_nobody_uses_is_mentioned(tmp_path):
    folder = write_folder(tmp_path, random_params() | {"model.extra.weight": np.ones(3, np.float32)})
    with pytest.warns(UserWarning, match=r"model\.extra\.weight"):  # as `reference.load` warns
        LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8, torch.float8_e4m3fn])
def test_quantised_tensors_are_not_taken_for_weights(tmp_path, dtype):
    state = {name: torch.tensor(array) for name, array in random_params().items()}
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].to(dtype)
    write_folder(tmp_path, random_params())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"up_proj\.weight is stored as"):
        LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_head_in_the_file_outweighs_the_tie(tmp_path):
    fields, params = FIELDS | {"tie_word_embeddings": True}, random_params()
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs from the embedding"):
        model = LlamaForCausalLM.from_pretrained(write_folder(tmp_path / "own", params, fields))
    assert not model.config.tie_word_embeddings
    assert_same_weights(model, {name: torch.tensor(array) for name, array in params.items()})
    assert_same_outputs(model, transformers.LlamaForCausalLM.from_pretrained(tmp_path / "own"))
    equal = params | {"lm_head.weight": params["model.embed_tokens.weight"].copy()}
    model, info = LlamaForCausalLM.from_pretrained(
        write_folder(tmp_path / "equal", equal, fields), output_loading_info=True
    )
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert info["missing_keys"] == info["unexpected_keys"] == []


def test_a_tied_file_without_its_embedding_is_named(tmp_path):
    params = {name: array for name, array in random_params().items() if "embed" not in name}
    folder = write_folder(tmp_path, params, FIELDS | {"tie_word_embeddings": True})
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is missing"):
        LlamaForCausalLM.from_pretrained(folder)


def test_options_of_generation_are_read(tmp_path):
    folder = write_folder(tmp_path, random_params(), FIELDS | {"eos_token_id": 3})
    assert LlamaForCausalLM.from_pretrained(folder).generation_config.eos_token_id == 3
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 4], "temperature": 0.6, "do_sample": true}')
    config = LlamaForCausalLM.from_pretrained(folder).generation_config
    assert (config.eos_token_id, config.temperature, config.do_sample) == ([2, 4], 0.6, True)
    assert not hasattr(LlamaModel.from_pretrained(folder), "generation_config")
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json is not valid JSON"):
        LlamaForCausalLM.from_pretrained(folder)


# --- subclasses ---


class RewardConfig(LlamaConfig):
    model_type = "llama-with-reward"

    def __init__(self, bias: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        self.bias = bias


class Reward(llama.LlamaPreTrainedModel):
    """A reward model such as people build around transformers' `LlamaModel`."""

    def __init__(self, config, temperature=1.0):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.temperature = temperature
        self.norm = nn.LayerNorm(config.hidden_size)  # has the name of the base model's final norm
        self.reward = nn.Linear(config.hidden_size, 1)
        self.scale = nn.Parameter(torch.full((1,), 3.0))
        self.register_buffer("mean", torch.full((2,), 5.0))
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("table", torch.arange(4.0), persistent=False)
        self.post_init()

    def forward(self, ids):
        x = self.norm(self.model(ids).last_hidden_state)
        return self.reward(x) * self.scale / self.temperature + self.mean.sum() + self.table.sum()


class OfReward(Reward):
    config_class = RewardConfig


@torch.no_grad()
def trained_reward(cls, folder):
    """Load `cls` from a base model's folder and randomise every tensor that it adds."""
    with pytest.warns(UserWarning, match=r"has no scale, norm\.weight, norm\.bias, reward\.weight and 3 others: "):
        model = cls.from_pretrained(folder)
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if not name.startswith("model."):
            tensor.copy_(torch.randn(tensor.shape) * 9)
    return model


def test_what_a_subclass_adds_begins_as_it_says(tmp_path):
    folder = write_folder(tmp_path, random_params())
    model, info = Reward.from_pretrained(folder, output_loading_info=True)
    assert sorted(info["missing_keys"]) == sorted(name for name in model.state_dict() if not name.startswith("model."))
    assert info["unexpected_keys"] == ["lm_head.weight"]
    assert_same_weights(model.model, LlamaModel.from_pretrained(folder).state_dict())
    assert (model.norm.weight == 1).all()
    assert (model.norm.bias == 0).all()
    assert 0.005 < model.reward.weight.std() < 0.05
    assert (model.scale.item(), model.mean.tolist(), model.seen.item()) == (3.0, [5.0, 5.0], 7)
    assert model.table.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("cls", [Reward, OfReward])
def test_a_subclass_comes_back_as_it_was_saved(tmp_path, cls):
    model = trained_reward(cls, write_folder(tmp_path / "base", random_params()))
    if cls is OfReward:
        model.config.bias = 0.5
    model.config.architectures = [cls.__name__]  # as save_pretrained writes it
    model.save_pretrained(tmp_path / "own")
    again, info = cls.from_pretrained(tmp_path / "own", output_loading_info=True)
    assert info["missing_keys"] == info["unexpected_keys"] == []
    assert_same_weights(again, model.state_dict())
    assert type(again.config) is type(model.config)
    assert again.config == model.config
    assert miss(again(IDS).detach(), model(IDS).detach()) < 1e-5  # float32 sums in a different order
    assert cls.from_pretrained(tmp_path / "own", temperature=2.0).temperature == 2.0
    half = cls.from_pretrained(tmp_path / "own", dtype="bfloat16")
    assert half(IDS).dtype == half.mean.dtype == torch.bfloat16
    assert half.seen.dtype == torch.int64
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    if cls is Reward:  # model_type is still 'llama', so the base model can be read alone
        with pytest.warns(UserWarning, match="7 tensors are not used"):
            assert_same_weights(LlamaModel.from_pretrained(tmp_path / "own"), model.model.state_dict())
    else:
        assert again.config.bias == 0.5
        with pytest.raises(ValueError, match="model_type is 'llama-with-reward'; only 'llama' models can be read"):
            LlamaModel.from_pretrained(tmp_path / "own")


def test_the_body_of_a_subclass_must_be_there_all_the_same(tmp_path):
    class Adapted(LlamaModel):
        def __init__(self, config):
            super().__init__(config)
            for layer in self.layers:
                layer.adapter = nn.Linear(2, 2)
            self.post_init()

    params = random_params()
    with pytest.warns(UserWarning, match=r"has no layers\.0\.adapter\.weight, .*: Adapted initialises them"):
        Adapted.from_pretrained(write_folder(tmp_path / "whole", params))
    del params["model.layers.1.mlp.up_proj.weight"]
    folder = write_folder(tmp_path / "broken", params)
    for cls, prefix in ((Adapted, ""), (Reward, r"model\.")):
        with pytest.raises(ValueError, match=rf"the tensor {prefix}layers\.1\.mlp\.up_proj\.weight is missing\."):
            cls.from_pretrained(folder)


def test_what_a_subclass_ties_stays_tied(tmp_path):
    class Tied(Reward):
        def __init__(self, config):
            super().__init__(config)
            self.words = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.words.weight = self.model.embed_tokens.weight

    model = trained_reward(Tied, write_folder(tmp_path / "base", random_params()))
    for form in (True, False):
        model.save_pretrained(tmp_path / "own", safe_serialization=form)
        again, info = Tied.from_pretrained(tmp_path / "own", output_loading_info=True)
        assert info["missing_keys"] == info["unexpected_keys"] == []
        assert again.words.weight is again.model.embed_tokens.weight
        assert_same_weights(again, model.state_dict())


def test_a_base_model_may_have_another_name(tmp_path):
    class Wrapped(llama.LlamaPreTrainedModel):
        base_model_prefix = "backbone"

        def __init__(self, config):
            super().__init__(config)
            self.backbone = LlamaModel(config)
            self.post_init()

    model = Wrapped.from_pretrained(write_folder(tmp_path / "base", random_params()))
    assert_same_weights(model.backbone, LlamaModel.from_pretrained(tmp_path / "base").state_dict())
    model.save_pretrained(tmp_path / "own")
    assert_same_weights(Wrapped.from_pretrained(tmp_path / "own"), model.state_dict())


# --- damage ---


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def save_old(data, path):
    """Save in the format of PyTorch before 1.6, which is not a zip file."""
    torch.save(data, path, _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("writer", [torch.save, save_old, lambda data, path: path.write_bytes(pickle.dumps(data))])
@pytest.mark.parametrize("form", ["pytorch_model.bin", "pytorch_model-00001-of-00001.bin"])
def test_a_bin_that_would_run_something_does_not(tmp_path, monkeypatch, form, writer):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    folder, trap = write_folder(tmp_path / "model", random_params()), tmp_path / "ran"
    (folder / "model.safetensors").unlink()
    state = {name: torch.tensor(array) for name, array in random_params().items()}
    writer(state | {"model.norm.weight": Malicious(trap)}, folder / form)
    if form != "pytorch_model.bin":
        index = {"weight_map": dict.fromkeys(state, form)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"{form} is damaged or holds more than tensors"):
        LlamaForCausalLM.from_pretrained(folder)
    assert not trap.exists()
    pickle.loads(pickle.dumps(Malicious(trap)))
    assert trap.exists()  # plain unpickling does run it


def test_a_bin_older_than_zip_is_read(tmp_path):
    write_folder(tmp_path, random_params())
    (tmp_path / "model.safetensors").unlink()
    state = {name: torch.tensor(array) for name, array in random_params().items()}
    save_old(state, tmp_path / "pytorch_model.bin")
    assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path), state)
    assert np.array_equal(reference.load(tmp_path)[0][NORM], state[NORM])


def cut(file, share):
    def damage(folder):
        data = (folder / file).read_bytes()
        (folder / file).write_bytes(data[: int(len(data) * share)])

    return damage


def remove(file):
    return lambda folder: (folder / file).unlink()


def put(file, data):
    return lambda folder: (folder / file).write_bytes(data)


def save(data):
    return lambda folder: torch.save(data, folder / "pytorch_model.bin")


def point(name, file):
    def damage(folder):
        path = next(folder.glob("*.index.json"))
        index = json.loads(path.read_text())
        index["weight_map"][name] = file
        path.write_text(json.dumps(index))

    return damage


SAFE, BIN = "model.safetensors", "pytorch_model.bin"
DAMAGE = {
    "no config": (SAFE, remove("config.json"), r"config\.json does not exist"),
    "no weights": (SAFE, remove(SAFE), r"neither model\.safetensors nor pytorch_model\.bin"),
    "safetensors cut": (SAFE, cut(SAFE, 0.7), r"model\.safetensors is damaged"),
    "safetensors cut in its header": (SAFE, cut(SAFE, 0.01), r"model\.safetensors is damaged"),
    "safetensors empty": (SAFE, put(SAFE, b""), r"model\.safetensors is damaged"),
    "safetensors a pointer of git": (SAFE, put(SAFE, b"version https://git-lfs.github.com/spec/v1"), "is damaged"),
    "bin cut": (BIN, cut(BIN, 0.7), r"pytorch_model\.bin is damaged"),
    "bin cut early": (BIN, cut(BIN, 0.01), r"pytorch_model\.bin is damaged"),
    "bin empty": (BIN, put(BIN, b""), r"pytorch_model\.bin is damaged"),
    "bin garbage": (BIN, put(BIN, b"\xff" * 999), r"pytorch_model\.bin is damaged"),
    "bin a tensor": (BIN, save(torch.ones(2)), "should hold tensors by name"),
    "bin nested": (BIN, save({"state_dict": {"a": torch.ones(2)}}), "should hold tensors by name"),
    "bin by number": (BIN, save({0: torch.ones(2)}), "should hold tensors by name"),
    "bin of another model": (BIN, save({"a": torch.ones(2)}), r"the tensor model\.embed_tokens\.weight is missing"),
    "shard gone": (f"two {SAFE}", remove("model-00002-of-00002.safetensors"), r"00002\.safetensors does not exist"),
    "bin shard gone": (f"two {BIN}", remove("pytorch_model-00002-of-00002.bin"), r"00002\.bin does not exist"),
    "shard cut": (f"two {SAFE}", cut("model-00002-of-00002.safetensors", 0.9), r"00002\.safetensors is damaged"),
    "bin shard cut": (f"two {BIN}", cut("pytorch_model-00001-of-00002.bin", 0.9), r"00001-of-00002\.bin is damaged"),
    "bin index wrong": (f"two {BIN}", point("x", "pytorch_model-00001-of-00002.bin"), "which does not contain it"),
    "bin index outside": (f"two {BIN}", point("x", "../x.bin"), "outside its own folder"),
    "index cut": (f"two {BIN}", cut("pytorch_model.bin.index.json", 0.5), r"index\.json is not valid JSON"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path, damage):
    form, change, message = DAMAGE[damage]
    (tmp_path / "model").mkdir()
    folder = restore(small(), tmp_path / "model", form)
    LlamaForCausalLM.from_pretrained(folder)
    change(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        LlamaForCausalLM.from_pretrained(folder)
    assert str(folder) in str(caught.value)


def test_a_gguf_that_is_cut_is_named(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", random_params())
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"m\.gguf"):
        LlamaForCausalLM.from_pretrained(path)


def test_safetensors_go_before_bin_and_one_file_before_shards(tmp_path):
    folder = tmp_path / "all"
    folder.mkdir()
    for seed, form in enumerate(reversed(FORMS)):
        model = small(seed=seed)
        for path in restore(model, tmp_path / str(seed), form).iterdir():
            path.replace(folder / path.name)
        assert_same_weights(LlamaForCausalLM.from_pretrained(folder), model.state_dict())
        assert_same_weights(transformers.LlamaForCausalLM.from_pretrained(folder), model.state_dict())


# --- memory mapping ---

PROBE = """
import sys, torch
from llama import LlamaForCausalLM
torch.set_num_threads(1)
def anonymous():
    lines = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
    return int(lines["RssAnon"].split()[0]) // 1024
with torch.no_grad():
    torch.ones(1, 9, 64) @ torch.ones(64, 64)
before = anonymous()
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
loaded = anonymous()
with torch.no_grad():
    model(torch.tensor([[1, 2, 3]]))
print(loaded - before, anonymous() - before, sum(p.nbytes for p in model.parameters()) // 2**20)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads anonymous memory from /proc")
@pytest.mark.parametrize("form", [SAFE, BIN])
def test_loading_makes_no_second_copy(tmp_path, form):
    fields = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4, "vocab_size": 8000}
    with torch.no_grad():
        model = LlamaForCausalLM(LlamaConfig(**FIELDS | fields))
    model.save_pretrained(tmp_path, safe_serialization=form == SAFE)
    run = subprocess.run([sys.executable, "-c", PROBE, str(tmp_path)], capture_output=True, text=True, check=True)
    loaded, used, weights = map(int, run.stdout.split())
    assert weights > 90
    assert loaded < 0.15 * weights
    assert used < 0.3 * weights


@pytest.mark.parametrize("form", FORMS)
def test_a_mapped_model_is_trained_and_saved_into_its_own_folder(tmp_path, form):
    folder = restore(small(), tmp_path, form)
    stored = {path.name: path.read_bytes() for path in folder.iterdir()}
    model, other = (LlamaForCausalLM.from_pretrained(folder) for _ in range(2))
    before = outputs(other)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    trained = outputs(model)
    assert miss(trained, before) > 1e-3
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == stored  # private mapping: files unchanged
    np.testing.assert_array_equal(outputs(other), before)
    model.save_pretrained(folder, max_shard_size="40KB" if "two" in form else "5GB", safe_serialization=BIN not in form)
    np.testing.assert_array_equal(outputs(other), before)  # still maps the old file
    np.testing.assert_array_equal(outputs(model), trained)
    assert_same_outputs(LlamaForCausalLM.from_pretrained(folder), model)


# --- saving ---


@pytest.mark.parametrize("size", ["5GB", "20KB"])
@pytest.mark.parametrize("name", CLASSES)
def test_transformers_loads_what_we_save(tmp_path, name, size):
    model = small(name, attention_bias=True, num_labels=3)
    model.save_pretrained(tmp_path, max_shard_size=size)
    theirs, info = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_weights(theirs, model.state_dict())
    assert_same_outputs(model, theirs)
    assert config_of(tmp_path)["architectures"] == [name]
    again = getattr(llama, name).from_pretrained(tmp_path)
    assert_same_weights(again, model.state_dict())
    assert again.config.num_labels == model.config.num_labels
    assert ("generation_config.json" in files(tmp_path)) == (name == "LlamaForCausalLM")


@given(configs(), SEEDS)
@settings(max_examples=25)
def test_every_configuration_comes_back_and_goes_to_transformers(tmp_path_factory, fields, seed):
    folder = tmp_path_factory.mktemp("model")
    model = small(seed=seed % 1000, **{"rope_theta": None} | fields)
    model.save_pretrained(folder)
    again = LlamaForCausalLM.from_pretrained(folder)
    again.config.name_or_path = model.config.name_or_path
    assert again.config.to_dict() | {"architectures": None} == model.config.to_dict() | {"torch_dtype": "float32"}
    ids = torch.arange(20)[None] % fields["vocab_size"]
    assert miss(outputs(again, ids), outputs(model, ids)) < 1e-5
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert miss(outputs(model, ids), outputs(theirs, ids)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_every_dtype_comes_back(tmp_path, dtype):
    model = small().to(dtype)
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path), model.state_dict())
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert theirs.dtype == dtype
    assert_same_weights(theirs, model.state_dict())
    if dtype == torch.float64:  # the angles are float32 in both
        assert_same_outputs(model, theirs)


# The first four tensors total 35 KiB.
@pytest.mark.parametrize(
    ("given", "limit"), [(20_000, 20_000), ("35KB", 35_000), ("35 kb", 35_000), ("35KiB", 35 * 1024), (1, 1)]
)
def test_shards_keep_to_their_limit(tmp_path, given, limit):
    model = small()
    model.save_pretrained(tmp_path, max_shard_size=given)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert index["metadata"] == {"total_size": total, "total_parameters": model.num_parameters()}
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    assert list(dict.fromkeys(index["weight_map"][name] for name in model.state_dict())) == shards  # in order
    held = {}
    for shard in shards:
        part = load_file(tmp_path / shard)
        assert sum(tensor.nbytes for tensor in part.values()) <= limit or len(part) == 1
        assert {name for name, file in index["weight_map"].items() if file == shard} == part.keys()
        held |= part
    assert_same_weights(model, held)
    for first, second in itertools.pairwise(shards):  # each shard is filled before the next begins
        begins = next(name for name in model.state_dict() if index["weight_map"][name] == second)
        assert sum(tensor.nbytes for tensor in load_file(tmp_path / first).values()) + held[begins].nbytes > limit
    with open(tmp_path / shards[0], "rb") as file:
        header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    assert header["__metadata__"] == {"format": "pt"}  # transformers 4 refuses a file without it


@pytest.mark.parametrize("limit", [0, -5, "big", "1.5.GB", "5 parsecs", True, None])
def test_a_limit_that_is_none_is_named_and_nothing_written(tmp_path, limit):
    with pytest.raises(ValueError, match="max_shard_size must be a number of bytes, or a string like"):
        small().save_pretrained(tmp_path / "model", max_shard_size=limit)
    assert not (tmp_path / "model").exists() or not files(tmp_path / "model")


def test_bin_is_written_when_asked_for(tmp_path):
    model = small()
    model.save_pretrained(tmp_path / "one", safe_serialization=False)
    model.save_pretrained(tmp_path / "more", safe_serialization=False, max_shard_size="40KB")
    assert files(tmp_path / "one") == {"config.json", "generation_config.json", BIN}
    assert "pytorch_model.bin.index.json" in files(tmp_path / "more")
    assert not list((tmp_path / "more").glob("*safetensors*"))
    for folder in (tmp_path / "one", tmp_path / "more"):
        assert_same_weights(LlamaForCausalLM.from_pretrained(folder), model.state_dict())
        assert_same_weights(transformers.LlamaForCausalLM.from_pretrained(folder), model.state_dict())
    part = torch.load(next((tmp_path / "more").glob("pytorch_model-00001-of-*.bin")), weights_only=True)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in part.values())


def test_weights_that_were_there_before_go(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_text("another's")
    (tmp_path / "model_card.bin").write_text("another's")
    own = {"tokenizer.json", "adapter_model.safetensors", "model_card.bin", "config.json", "generation_config.json"}
    model = small()
    for arguments, written in (
        ({"max_shard_size": "20KB"}, None),
        ({}, {SAFE}),
        ({"safe_serialization": False, "max_shard_size": "40KB"}, None),
        ({"max_shard_size": "40KB"}, None),
        ({"safe_serialization": False}, {BIN}),
        ({}, {SAFE}),
    ):
        with torch.no_grad():
            model.model.norm.weight.add_(1)
        model.save_pretrained(tmp_path, **arguments)
        assert written is None or files(tmp_path) == own | written
        assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path), model.state_dict())
        assert_same_weights(transformers.LlamaForCausalLM.from_pretrained(tmp_path), model.state_dict())


def test_a_tied_head_is_left_out(tmp_path):
    model = small(tie_word_embeddings=True)
    for safe in (True, False):
        model.save_pretrained(tmp_path, safe_serialization=safe)
        stored = load_file(tmp_path / SAFE) if safe else torch.load(tmp_path / BIN, weights_only=True)
        assert set(stored) == set(model.state_dict()) - {"lm_head.weight"}
        again = LlamaForCausalLM.from_pretrained(tmp_path)
        assert again.lm_head.weight is again.model.embed_tokens.weight
        assert_same_outputs(again, transformers.LlamaForCausalLM.from_pretrained(tmp_path))


def test_a_head_of_its_own_is_saved_though_the_configuration_ties(tmp_path):
    model = small(tie_word_embeddings=True)
    model.set_output_embeddings(nn.Linear(64, 12, bias=False))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs"):
        again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_head_tied_by_hand_is_saved(tmp_path):
    model = small()
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(tmp_path)
    assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path), model.state_dict())


def test_another_state_dict_is_saved(tmp_path):
    model, other = small(), small(seed=1)
    model.save_pretrained(tmp_path, state_dict=other.state_dict())
    assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path), other.state_dict())
    tied = small(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path, state_dict=tied.state_dict())
    assert "lm_head.weight" not in load_file(tmp_path / SAFE)


def test_views_and_columns_first_are_saved_whole(tmp_path):
    model = small()
    whole = torch.randn(3, 64)
    model.model.norm.weight = nn.Parameter(whole[1])  # a view of something larger
    model.lm_head.weight = nn.Parameter(torch.randn(64, 12).T)  # not contiguous
    for safe in (True, False):
        model.save_pretrained(tmp_path, safe_serialization=safe)
        assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path), model.state_dict())
    stored = torch.load(tmp_path / BIN, weights_only=True)
    assert stored[NORM].untyped_storage().nbytes() == stored[NORM].nbytes  # the view alone, not its base


def test_files_are_as_open_as_the_umask_says(tmp_path):
    for mask in (0o022, 0o077, 0o027):
        old = os.umask(mask)
        try:
            small().save_pretrained(tmp_path / f"{mask}", max_shard_size="40KB")
            assert os.umask(mask) == mask  # restored
        finally:
            os.umask(old)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / f"{mask}").iterdir()}
        assert modes == {0o666 & ~mask}


def test_saving_is_for_the_main_process_and_into_folders(tmp_path):
    small().save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()
    small().save_pretrained(str(tmp_path / "deep" / "er"))
    assert SAFE in files(tmp_path / "deep" / "er")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file is a file; save_directory must be a folder"):
        small().save_pretrained(tmp_path / "file")
    with pytest.raises(ValueError, match="push_to_hub is not supported"):
        small().save_pretrained(tmp_path, push_to_hub=True)


def test_the_models_own_configuration_is_not_changed_by_saving(tmp_path):
    model = small()
    before = model.config.to_dict()
    model.save_pretrained(tmp_path)
    assert model.config.to_dict() == before


def fails(function, after, error):
    """Wrap `function` to raise `error` once, after `after` successful calls."""
    calls = itertools.count()

    def call(*arguments, **options):
        if next(calls) == after:
            raise error
        return function(*arguments, **options)

    return call


FULL = OSError(errno.ENOSPC, "No space left on device")
INTERRUPTIONS = {
    "first file": (torch_files, "save_file", 0, FULL),
    "second file": (torch_files, "save_file", 1, FULL),
    "library's own error": (torch_files, "save_file", 1, RuntimeError("serialization failed")),
    "Ctrl-C": (torch_files, "save_file", 1, KeyboardInterrupt()),
    "bin": (torch, "save", 1, FULL),
    "first rename": (os, "replace", 0, FULL),
    "second rename": (os, "replace", 1, FULL),
    "third rename": (os, "replace", 2, FULL),
}


@pytest.mark.parametrize("old", ["5GB", "60KB"])
@pytest.mark.parametrize("interruption", INTERRUPTIONS)
def test_a_save_that_breaks_off_leaves_the_old_model(tmp_path, monkeypatch, interruption, old):
    """Even if the new model differs: here it has a larger vocabulary and more shards."""
    where, name, after, error = INTERRUPTIONS[interruption]
    model = small()
    model.save_pretrained(tmp_path, max_shard_size=old)
    before, there = outputs(model), files(tmp_path)
    model.resize_token_embeddings(20)
    with monkeypatch.context() as patch:
        patch.setattr(where, name, fails(getattr(where, name), after, error))
        with pytest.raises((OSError, KeyboardInterrupt)):
            model.save_pretrained(tmp_path, max_shard_size="20KB", safe_serialization=interruption != "bin")
    assert miss(outputs(LlamaForCausalLM.from_pretrained(tmp_path)), before) < 1e-5
    if "rename" not in interruption:
        assert files(tmp_path) == there
    assert not [path for path in tmp_path.rglob("*") if "partial" in path.name or path.name.startswith(".")]
    model.save_pretrained(tmp_path, max_shard_size="20KB")  # the next save succeeds
    assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path), model.state_dict())


def test_what_a_killed_save_left_is_no_hindrance(tmp_path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / SAFE).write_text("half")
    small().save_pretrained(tmp_path)
    assert files(tmp_path) == {"config.json", "generation_config.json", SAFE}


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch_files, "save_file", fails(None, 0, RuntimeError("serialization failed")))
    with pytest.raises(OSError, match=rf"{tmp_path}.* could not be written: serialization failed"):
        small().save_pretrained(tmp_path)


# --- embeddings ---


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mean", [True, False])
@pytest.mark.parametrize(
    ("new", "multiple"), [(20, None), (7, None), (13, 8), (16, 8), (None, 16), (12, None), (None, None)]
)
def test_the_vocabulary_is_resized_as_in_transformers(tied, mean, new, multiple):
    theirs, _ = transformers_model(FIELDS, 2, tie_word_embeddings=tied)
    model = LlamaForCausalLM(LlamaConfig(**FIELDS, tie_word_embeddings=tied)).eval()
    model.load_state_dict(theirs.state_dict())
    model.model.embed_tokens.weight.requires_grad_(True)
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = theirs.resize_token_embeddings(new, multiple, mean_resizing=mean)
    embedding = model.resize_token_embeddings(new, multiple, mean_resizing=mean)
    count = expected.num_embeddings
    assert embedding is model.get_input_embeddings() is model.model.embed_tokens
    assert embedding.num_embeddings == model.lm_head.out_features == count
    assert embedding.weight.shape == model.lm_head.weight.shape == expected.weight.shape
    assert (embedding.weight.dtype, embedding.weight.requires_grad) == (torch.float32, True)
    assert (model.lm_head.weight is embedding.weight) == tied == model.config.tie_word_embeddings
    assert model.config.vocab_size == model.vocab_size == model.model.vocab_size == count
    kept = min(count, 12)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        ours, added = model.state_dict()[name], model.state_dict()[name][kept:]
        assert torch.equal(ours[:kept], old[name][:kept])
        if mean and len(added):
            average = old[name].double().mean(0).float().expand_as(added)
            torch.testing.assert_close(added, average, rtol=0, atol=1e-6)  # float32 rounding of a mean of about 1
            # transformers adds noise with 1e-9 times a variance of about 1, so a standard deviation of 3e-5
            torch.testing.assert_close(added, theirs.state_dict()[name][kept:], rtol=0, atol=3e-4)
        elif len(added):
            assert 0.01 < added.std() < 0.03
    for name, tensor in model.state_dict().items():
        if "embed" not in name and "lm_head" not in name:
            assert torch.equal(tensor, old[name]), name
    ids = torch.arange(min(count, 12))[None]
    logits = outputs(model, ids).reshape(-1, count)[:, :kept]
    np.testing.assert_allclose(logits, outputs(theirs, ids).reshape(-1, count)[:, :kept], atol=2e-4)


def test_a_resized_model_generates_trains_and_comes_back(tmp_path):
    model = small(eos_token_id=None)
    model.resize_token_embeddings(19)
    with torch.no_grad():
        model.lm_head.weight[18] *= 100  # makes a new token likely
    ids = model.generate(IDS, max_new_tokens=6)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**FIELDS | {"vocab_size": 19}))
    theirs.load_state_dict(model.state_dict())
    assert ids.tolist() == theirs.eval().generate(IDS, max_new_tokens=6, eos_token_id=None).tolist()
    model(torch.tensor([[18, 3]]), labels=torch.tensor([[3, 18]])).loss.backward()
    assert model.model.embed_tokens.weight.grad.shape == (19, 64)
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["vocab_size"] == 19
    assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path), model.state_dict())


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_resized(name):
    model = small(name)
    before = outputs(model) if name != "LlamaForCausalLM" else outputs(model.model)
    model.resize_token_embeddings(15)
    np.testing.assert_array_equal(outputs(model) if name != "LlamaForCausalLM" else outputs(model.model), before)
    outputs(model, torch.tensor([[14]]))
    assert model.config.vocab_size == model.base_model.vocab_size == 15


def test_bfloat16_is_averaged_in_float32():
    model = small(vocab_size=2000).bfloat16()
    average = model.model.embed_tokens.weight.double().mean(0).bfloat16()
    model.resize_token_embeddings(2001)
    assert torch.equal(model.model.embed_tokens.weight[-1], average)


def test_resizing_needs_no_eigendecomposition(monkeypatch):
    for name in ("eigh", "eig", "eigvals", "eigvalsh", "svd", "cholesky"):
        monkeypatch.setattr(torch.linalg, name, None)
    monkeypatch.setattr(torch.distributions, "MultivariateNormal", None)
    model = small(hidden_size=2048, num_hidden_layers=1, vocab_size=500)
    assert model.resize_token_embeddings(501).weight.shape == (501, 2048)


def test_resizing_follows_frozen_weights_and_the_paddings_place():
    model = small(pad_token_id=3)
    model.requires_grad_(False)
    assert model.resize_token_embeddings(20).padding_idx == 3
    assert not model.model.embed_tokens.weight.requires_grad
    assert not model.lm_head.weight.requires_grad
    model.requires_grad_(True)
    model(torch.tensor([[3, 4, 5]]), labels=torch.tensor([[3, 4, 5]])).loss.backward()
    assert model.model.embed_tokens.weight.grad[3].eq(0).all()
    assert model.model.embed_tokens.weight.grad[4].ne(0).any()


def test_a_vocabulary_without_its_padding_comes_back(tmp_path):
    model = small(pad_token_id=11)
    model.resize_token_embeddings(9)
    assert model.model.embed_tokens.padding_idx is None
    outputs(model, torch.tensor([[1, 8]]))
    model.save_pretrained(tmp_path)
    assert_same_weights(LlamaForCausalLM.from_pretrained(tmp_path), model.state_dict())


@pytest.mark.parametrize("arguments", [(0,), (-3,), (2.5,), (None, 0), (None, 2.5), (8, "8")])
def test_sizes_that_cannot_be_are_named(arguments):
    model = small()
    with pytest.raises(ValueError, match="must be a positive integer"):
        model.resize_token_embeddings(*arguments)
    assert model.config.vocab_size == len(model.model.embed_tokens.weight) == 12


def test_embeddings_and_heads_are_handed_out_and_taken():
    model, tied = small(), small(tie_word_embeddings=True)
    assert model.get_input_embeddings() is model.model.embed_tokens
    assert model.get_output_embeddings() is model.lm_head
    assert tied.lm_head.weight is tied.model.embed_tokens.weight is not model.lm_head.weight
    embedding, head = nn.Embedding(12, 64), nn.Linear(64, 12, bias=False)
    for each in (model, tied):
        each.set_input_embeddings(embedding)
        each.set_output_embeddings(head)
        assert each.model.embed_tokens is each.get_input_embeddings() is embedding
        assert each.lm_head is each.get_output_embeddings() is head
    tied.tie_weights()
    assert head.weight is embedding.weight
    tied.config.tie_word_embeddings = False
    tied.tie_weights()  # untied again: equal values, separate tensors
    assert head.weight is not embedding.weight
    assert torch.equal(head.weight, embedding.weight)
    with torch.no_grad():
        head.weight.zero_()
    assert embedding.weight.any()
    decoder = LlamaModel(model.config)
    model.set_decoder(decoder)
    assert model.get_decoder() is model.model is model.base_model is decoder
    answering = small("LlamaForQuestionAnswering")
    assert answering.get_decoder() is answering.transformer is answering.base_model
    assert answering.get_input_embeddings() is answering.transformer.embed_tokens
    base = small("LlamaModel")
    assert base.base_model is base.get_decoder() is base
    for name in set(CLASSES) - {"LlamaForCausalLM"}:
        assert small(name).get_output_embeddings() is None
        with pytest.raises(ValueError, match=f"{name} has no output embeddings to set"):
            small(name).set_output_embeddings(head)


def test_training_a_tied_model_moves_both_ends():
    model = small(tie_word_embeddings=True)
    assert len(list(model.parameters())) == len(model.state_dict()) - 1
    torch.optim.SGD(model.parameters(), 0.1).zero_grad()
    model(IDS, labels=IDS).loss.backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    moved = copy.deepcopy(model)
    assert moved.lm_head.weight is moved.model.embed_tokens.weight is not model.lm_head.weight


# --- pruning ---


@st.composite
def prunings(draw):
    """(configuration fields, one or two rounds of heads to prune, the heads left in each layer: at least one)"""
    fields = draw(configs(["default"]))
    heads = list(range(fields["num_attention_heads"]))
    left, rounds = {layer: set(heads) for layer in range(fields["num_hidden_layers"])}, []
    for _ in range(draw(st.integers(1, 2))):
        layers = draw(st.lists(st.sampled_from(sorted(left)), unique=True, min_size=1))
        chosen = {layer: draw(st.lists(st.sampled_from(heads), unique=True)) for layer in layers}
        chosen = {layer: some for layer, some in chosen.items() if left[layer] - set(some)}
        for layer, some in chosen.items():
            left[layer] -= set(some)
        rounds.append(chosen)
    return fields, rounds, left


def silence(model, left):
    """Zero the columns of o_proj that read heads not in `left`, which is equivalent to pruning them."""
    D = model.config.head_dim
    with torch.no_grad():
        for layer, heads in left.items():
            for head in set(range(model.config.num_attention_heads)) - heads:
                model.base_model.layers[layer].self_attn.o_proj.weight[:, head * D : (head + 1) * D] = 0
    return model


@given(prunings(), SEEDS)
@settings(max_examples=30)
def test_pruning_is_silencing(tmp_path_factory, pruning, seed):
    fields, rounds, left = pruning
    model = small(seed=seed % 1000, **{"rope_theta": None} | fields)
    expected = silence(copy.deepcopy(model), left)
    for chosen in rounds:
        model.prune_heads(chosen)
    group, D = fields["num_attention_heads"] // fields["num_key_value_heads"], fields["head_dim"]
    for layer, heads in left.items():
        attention = model.model.layers[layer].self_attn
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
            assert projection.weight.shape == (projection.out_features, projection.in_features)
        assert attention.q_proj.out_features == attention.o_proj.in_features == len(heads) * D
        assert attention.k_proj.out_features == attention.v_proj.out_features == len({h // group for h in heads}) * D
    ids = torch.arange(9)[None] % fields["vocab_size"]
    assert miss(outputs(model, ids), outputs(expected, ids)) < 1e-5
    folder = tmp_path_factory.mktemp("pruned")
    model.save_pretrained(folder)
    again = LlamaForCausalLM.from_pretrained(folder)
    assert_same_weights(again, model.state_dict())
    assert miss(outputs(again, ids), outputs(model, ids)) < 1e-5


WHOLE, UNEVEN, ALL_BUT_ONE = {0: [2, 3]}, {0: [1], 1: [0, 3]}, {0: [0, 1, 3], 1: [1]}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("heads", [WHOLE, UNEVEN, ALL_BUT_ONE])
def test_pruned_models_write_as_silenced_ones(heads, attention):
    model = small(eos_token_id=None, attn_implementation=attention)
    expected = silence(copy.deepcopy(model), {layer: set(range(4)) - set(some) for layer, some in heads.items()})
    model.prune_heads(heads)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    ids = IDS.expand(2, -1)
    assert miss(model(ids, mask).logits.detach()[mask != 0], expected(ids, mask).logits.detach()[mask != 0]) < 1e-5
    for options in ({}, {"num_beams": 2}, {"cache_implementation": "static"}, {"use_cache": False}):
        written = model.generate(ids, attention_mask=mask, max_new_tokens=6, **options)
        assert written.tolist() == expected.generate(ids, attention_mask=mask, max_new_tokens=6, **options).tolist()
    first = model(IDS[:, :3], use_cache=True)
    second = model(IDS[:, 3:], past_key_values=first.past_key_values)
    assert miss(second.logits.detach(), model(IDS).logits[:, 3:].detach()) < 1e-5
    attentions = model(IDS, output_attentions=True).attentions
    truth = expected(IDS, output_attentions=True).attentions
    for layer, weights in enumerate(attentions):
        kept = [head for head in range(4) if head not in heads.get(layer, [])]
        torch.testing.assert_close(weights, truth[layer][:, kept], rtol=1e-4, atol=1e-6)


def test_pruned_heads_are_counted_from_the_first(tmp_path):
    model = small()
    model.prune_heads({1: [0]})
    assert model.config.pruned_heads == {1: [0]}
    model.prune_heads({1: {0, 2}, 0: (3,)})
    assert model.config.pruned_heads == {0: [3], 1: [0, 2]}
    assert model.model.layers[1].self_attn.heads == [1, 3]
    model.save_pretrained(tmp_path)
    assert config_of(tmp_path)["pruned_heads"] == {"0": [3], "1": [0, 2]}
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    again.prune_heads({1: [3]})  # the remaining heads keep their original numbers after loading too
    assert again.model.layers[1].self_attn.heads == [1]
    assert again.config.pruned_heads == {0: [3], 1: [0, 2, 3]}
    expected = silence(small(), {0: {0, 1, 2}, 1: {1}})
    assert_same_outputs(again, expected)
    fresh = LlamaForCausalLM(again.config)
    assert {name: t.shape for name, t in fresh.state_dict().items()} == {
        n: t.shape for n, t in again.state_dict().items()
    }


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_pruned_and_trains_on(name):
    model = small(name, attention_bias=True)
    expected = silence(copy.deepcopy(model), {0: {0, 2, 3}})
    model.base_model.layers[0].self_attn.q_proj.requires_grad_(False)
    model.prune_heads({0: [1]})
    attention = model.base_model.layers[0].self_attn
    assert not attention.q_proj.weight.requires_grad
    assert attention.o_proj.weight.requires_grad
    assert_same_outputs(model, expected)
    model.train()
    sum(t.square().sum() for t in model(IDS).to_tuple() if isinstance(t, torch.Tensor)).backward()
    assert attention.o_proj.weight.grad.shape == attention.o_proj.weight.shape == (64, 48)


@pytest.mark.parametrize("heads", [{0: [0, 1, 2, 3]}, {0: [0], 1: [0, 1, 2, 3]}, {2: [0]}, {0: [4]}, {0: [1], 1: [-1]}])
def test_pruning_that_cannot_be_changes_nothing(heads):
    model = small()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"heads_to_prune names layer|without any attention head"):
        model.prune_heads(heads)
    assert_same_weights(model, before)
    assert not getattr(model.config, "pruned_heads", None)


def test_heads_may_come_one_by_one():
    model = small()
    model.prune_heads({0: iter([1, 2])})
    assert model.model.layers[0].self_attn.heads == [0, 3]
    assert model.config.pruned_heads == {0: [1, 2]}


# --- properties of every model ---


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_counted_as_transformers_does(name, tied):
    model = small(name, tie_word_embeddings=tied)
    theirs, _ = transformers_model(FIELDS, 0, getattr(transformers, name), tie_word_embeddings=tied)
    model.base_model.norm.requires_grad_(False)
    theirs.base_model.norm.requires_grad_(False)
    for options in itertools.product((True, False), (True, False)):
        assert model.num_parameters(*options) == theirs.num_parameters(*options)
    assert model.get_memory_footprint(return_buffers=False) == 4 * model.num_parameters()
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert model.get_memory_footprint() == 4 * model.num_parameters() + buffers
    assert buffers == 4 * model.config.head_dim // 2
    assert model.bfloat16().get_memory_footprint(return_buffers=False) == 2 * model.num_parameters()
    assert (model.dtype, model.device) == (torch.bfloat16, torch.device("cpu"))
    assert model.can_generate() == theirs.can_generate() == (name == "LlamaForCausalLM")
    assert model.main_input_name == theirs.main_input_name
    assert model.base_model_prefix == ("" if name == "LlamaModel" else theirs.base_model_prefix)
    assert list(model._no_split_modules) == list(theirs._no_split_modules)
    assert (model.framework, model.backend) == ("pt", "auto")
    assert torch.isfinite(torch.tensor(outputs(model, model.dummy_inputs["input_ids"]))).all()
    assert {type(module).__name__ for module in model.modules()} >= {"LlamaDecoderLayer", name}


def test_angles_stay_in_float32_wherever_a_model_goes():
    model = small()
    expected = model.model.rotary_emb.inv_freq.clone()
    for moved in (model.bfloat16(), model.half(), model.to(torch.float64), model.to("meta").to_empty(device="cpu")):
        assert moved.model.rotary_emb.inv_freq.dtype == torch.float32
        assert torch.equal(moved.model.rotary_emb.inv_freq, expected)


def test_gradient_checkpointing_is_switched():
    model = small()
    for base in (model, small("LlamaModel")):
        assert base.supports_gradient_checkpointing
        assert not base.is_gradient_checkpointing
        base.gradient_checkpointing_enable()
        assert base.is_gradient_checkpointing
        base.gradient_checkpointing_disable()
        assert not base.is_gradient_checkpointing
    runs = []
    model.model.layers[0].input_layernorm.register_forward_hook(lambda *_: runs.append(1))
    grads = []
    for kwargs in (None, {"use_reentrant": False}, "off"):
        model.train().zero_grad()
        model.gradient_checkpointing_disable() if kwargs == "off" else model.gradient_checkpointing_enable(kwargs)
        out = model(IDS, labels=IDS)
        assert (out.past_key_values is None) == (kwargs != "off")
        out.loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert len(runs) == 2 + 2 + 1  # checkpointing runs it again in the backward pass
    for name, grad in grads[-1].items():
        assert torch.equal(grad, grads[0][name])
        assert torch.equal(grad, grads[1][name])
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert model.model.gradient_checkpointing_kwargs == {"use_reentrant": True}
    model.activation_checkpointing_disable()  # transformers 5's names
    assert not model.is_activation_checkpointing
    model.activation_checkpointing_enable({"use_reentrant": True}, every_n_layers=1)
    assert model.is_activation_checkpointing
    assert model.is_gradient_checkpointing
    for options in ({"every_n_layers": 2}, {"offload": True}):
        with pytest.raises(ValueError, match="leave out every_n_layers and offload"):
            model.activation_checkpointing_enable(**options)


def test_frozen_embeddings_let_gradients_through_when_asked():
    model = small()
    model.get_input_embeddings().requires_grad_(False)
    seen = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].requires_grad))
    model.enable_input_require_grads()
    model(IDS)
    model.disable_input_require_grads()
    model(IDS)
    hook.remove()
    assert seen == [True, False]
    model.requires_grad_(False)  # an adapter in a checkpointed first layer still gets gradients
    adapter = nn.Parameter(torch.zeros(64))
    model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: output + adapter)
    model.enable_input_require_grads()
    model.train().gradient_checkpointing_enable({"use_reentrant": True})
    model(IDS, labels=IDS).loss.backward()
    assert adapter.grad.abs().sum() > 0


@pytest.mark.parametrize("name", CLASSES)
def test_weights_begin_as_documented(name):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=300, hidden_size=256, intermediate_size=300, num_hidden_layers=2,
                         num_attention_heads=4, initializer_range=0.05, pad_token_id=7, attention_bias=True,
                         mlp_bias=True, num_labels=40)  # fmt: skip
    model = getattr(llama, name)(config)
    for parameter_name, weight in model.named_parameters():
        if "norm" in parameter_name:
            assert weight.eq(1).all()
        elif parameter_name.endswith("bias"):
            assert weight.eq(0).all()
        else:
            if "embed" in parameter_name:
                assert weight[7].eq(0).all()
                weight = torch.cat([weight[:7], weight[8:]])
            n = weight.numel()  # allow 5 standard errors: σ/√n for the mean, σ/√2n for the deviation
            assert abs(weight.mean()) < 5 * 0.05 * n**-0.5, parameter_name
            assert abs(weight.std() - 0.05) < 5 * 0.05 * (2 * n) ** -0.5, parameter_name
            assert n < 30_000 or weight.abs().max() > 3.5 * 0.05, parameter_name  # not truncated
    torch.manual_seed(0)
    assert_same_weights(getattr(llama, name)(config), model.state_dict())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training


def test_a_model_is_built_of_a_sound_configuration_only():
    with pytest.raises(ValueError, match="config must be a LlamaConfig, got dict"):
        LlamaForCausalLM(FIELDS)
    config = LlamaConfig(**FIELDS)
    config.num_key_value_heads = 3
    with pytest.raises(ValueError, match="num_key_value_heads"):
        LlamaForCausalLM(config)
    with pytest.raises(ValueError, match=r"pad_token_id \(12\) must be below vocab_size \(12\)"):
        LlamaForCausalLM(LlamaConfig(**FIELDS, pad_token_id=12))
    assert small(pad_token_id=-1).model.embed_tokens.padding_idx is None  # as in the first LLaMA's files


def test_built_on_meta_nothing_is_drawn():
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**FIELDS | {"hidden_size": 8192, "vocab_size": 128_000}))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert model.get_memory_footprint() > 8e9


def test_an_untrained_model_comes_from_a_configuration():
    config = llama.AutoConfig(
        vocab_size=20, hidden_size=16, intermediate_size=8, num_attention_heads=2, dtype="bfloat16"
    )
    model = llama.AutoModelForCausalLM.from_config(config, num_hidden_layers=1, trust_remote_code=True)
    assert (model.dtype, len(model.model.layers), config.num_hidden_layers) == (torch.bfloat16, 1, 32)
    with pytest.raises(ValueError, match="from_config has no argument flash"):
        llama.AutoModelForCausalLM.from_config(config, flash=True)


def test_what_a_save_cannot_follow_is_an_error(tmp_path):
    model = llama.LlamaModel(llama.LlamaConfig(20, 16, 8, num_hidden_layers=1, num_attention_heads=2))
    for options, message in (
        ({"max_shard_sise": "1MB"}, "save_pretrained has no argument max_shard_sise"),
        ({"variant": "fp16"}, "save_pretrained does not support variant"),
        ({"push_to_hub": True}, "push_to_hub is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            model.save_pretrained(tmp_path / "model", **options)
    assert not (tmp_path / "model").exists()
    with pytest.raises(ValueError, match="push_to_hub is not supported"):
        model.config.save_pretrained(tmp_path, push_to_hub=True)
    model.save_pretrained(tmp_path / "model", save_function=torch.save, token=None)


def test_a_file_system_without_links_can_be_saved_to(tmp_path, monkeypatch):
    model = llama.LlamaModel(llama.LlamaConfig(20, 16, 8, num_hidden_layers=1, num_attention_heads=2))
    model.save_pretrained(tmp_path)

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr("os.link", refuse)
    with torch.no_grad():
        model.norm.weight.fill_(3.0)
    model.save_pretrained(tmp_path)
    assert (llama.LlamaModel.from_pretrained(tmp_path).norm.weight == 3).all()


def test_keywords_that_mean_nothing_here_are_taken(tmp_path):
    llama.LlamaModel(llama.LlamaConfig(20, 16, 8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    llama.LlamaModel.from_pretrained(tmp_path, cache_dir="x", token=None, revision=None, quantization_config=None)
    with pytest.raises(ValueError, match="is not on the Hub and has no revision 'v1'; leave revision out"):
        llama.LlamaModel.from_pretrained(tmp_path, revision="v1")
