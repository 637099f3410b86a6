"""LlamaConfig: every argument, both spellings, to and from files, and what is rejected."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import transformers_config, transformers_model
from strategies import configs
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from llama import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, reference

ROOT = Path(__file__).parent.parent

# transformers 4.x's order.
ARGUMENTS = {
    "vocab_size": (32000, 100),
    "hidden_size": (4096, 64),
    "intermediate_size": (11008, 48),
    "num_hidden_layers": (32, 3),
    "num_attention_heads": (32, 4),
    "num_key_value_heads": (32, 2),
    "hidden_act": ("silu", "gelu"),
    "max_position_embeddings": (2048, 128),
    "initializer_range": (0.02, 0.1),
    "rms_norm_eps": (1e-6, 1e-5),
    "use_cache": (True, False),
    "pad_token_id": (None, 7),
    "bos_token_id": (1, 8),
    "eos_token_id": (2, [9, 10]),
    "pretraining_tp": (1, 2),
    "tie_word_embeddings": (False, True),
    "rope_theta": (10000.0, 5e5),
    "rope_scaling": (None, {"rope_type": "linear", "factor": 2.0}),
    "attention_bias": (False, True),
    "attention_dropout": (0.0, 0.5),
    "mlp_bias": (False, True),
    "head_dim": (128, 6),
}


def other_values():
    return {name: copy.deepcopy(value) for name, (_, value) in ARGUMENTS.items()}


def test_defaults_are_those_of_the_7b_model():
    config = LlamaConfig()
    assert {name: getattr(config, name) for name in ARGUMENTS} == {
        name: value for name, (value, _) in ARGUMENTS.items()
    }
    theirs = transformers_config({})
    for name in ("problem_type", "architectures", "return_dict", "output_attentions", "output_hidden_states",
                 "num_labels", "id2label", "label2id", "dtype", "is_encoder_decoder", "rope_parameters", "model_type",
                 "attribute_map", "_name_or_path", "name_or_path"):  # fmt: skip
        assert getattr(config, name) == getattr(theirs, name), name
    assert list(LlamaConfig.keys_to_ignore_at_inference) == theirs.keys_to_ignore_at_inference
    assert config.use_return_dict is True
    assert config._attn_implementation == "sdpa"
    assert config.get_text_config() is config


def test_every_argument_has_transformers_4_place():
    by_place, by_name = LlamaConfig(*other_values().values()), LlamaConfig(**other_values())
    assert by_place == by_name
    for name, value in other_values().items():
        assert getattr(by_place, name) == value, name
        assert getattr(LlamaConfig(**(other_values() | {name: value})), name) == value
    assert LlamaConfig(100, 64, num_attention_heads=4).head_dim == 16


def test_what_is_left_out_follows_from_the_rest():
    config = LlamaConfig(hidden_size=64, num_attention_heads=8)
    assert (config.num_key_value_heads, config.head_dim) == (8, 8)
    config = LlamaConfig(pretraining_tp=None, attention_dropout=None)  # published files say null
    assert (config.pretraining_tp, config.attention_dropout) == (1, 0.0)


@given(configs())
def test_both_spellings_mean_the_same(fields):
    new = LlamaConfig(**copy.deepcopy(fields))
    rope = dict(fields["rope_parameters"])
    old = {name: value for name, value in fields.items() if name != "rope_parameters"}
    old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    for key in ("rope_type", "type"):
        scaling = {key: rope["rope_type"]} | {name: value for name, value in rope.items() if name != "rope_type"}
        kept = copy.deepcopy(scaling)
        same = LlamaConfig(**old | {"rope_scaling": scaling})
        assert scaling == kept  # transformers 4.46 modifies it
        assert same == new
        assert same.rope_parameters == new.rope_parameters
    assert LlamaConfig(**new.to_dict()) == new


@given(configs(), st.sampled_from(["to_dict", "to_diff_dict", "json", "pickle", "deepcopy", "file", "repr"]), st.data())
@settings(max_examples=150)
def test_round_trips(tmp_path_factory, fields, way, data):
    more = data.draw(st.fixed_dictionaries({}, optional={
        "torch_dtype": st.sampled_from(["bfloat16", torch.float16]),
        "num_labels": st.integers(1, 4),
        "pad_token_id": st.sampled_from([-1, 0, 3]),
        "eos_token_id": st.sampled_from([None, 4, [1, 2]]),
        "problem_type": st.sampled_from(["regression", None]),
        "architectures": st.just(["LlamaForCausalLM"]),
        "attn_implementation": st.sampled_from(["eager", "sdpa"]),
        "output_attentions": st.booleans(),
        "return_dict": st.booleans(),
        "answer": st.just({"life": 42}),
    }))  # fmt: skip
    config = LlamaConfig(**copy.deepcopy(fields), **more)
    if way in ("to_dict", "to_diff_dict"):
        again = LlamaConfig.from_dict(getattr(config, way)())
    elif way == "json":
        again = LlamaConfig.from_dict(json.loads(config.to_json_string(use_diff=data.draw(st.booleans()))))
    elif way == "pickle":
        again = pickle.loads(pickle.dumps(config))
    elif way == "deepcopy":
        again = copy.deepcopy(config)
    elif way == "file":
        folder = tmp_path_factory.mktemp("config")
        config.save_pretrained(folder / "new")
        again = LlamaConfig.from_json_file(folder / "new" / "config.json")
        assert again == LlamaConfig.from_pretrained(folder / "new" / "config.json")
    else:
        name, _, text = repr(config).partition(" ")
        assert name == "LlamaConfig"
        again = LlamaConfig.from_dict(json.loads(text))
    assert again == config
    assert again.rope_parameters == config.rope_parameters
    for name in (*ARGUMENTS, *more):
        assert getattr(again, name) == getattr(config, name), name
    assert again.to_dict() == config.to_dict()


def angles(config) -> tuple[np.ndarray, float]:
    """Return transformers' inv_freq and attention scaling."""
    rotary = LlamaRotaryEmbedding(config)
    return rotary.inv_freq.numpy(), rotary.attention_scaling


def longer_angles(config, length: int) -> tuple[np.ndarray, np.ndarray]:
    rotary = LlamaRotaryEmbedding(config)
    cos, sin = rotary(torch.zeros(1), torch.arange(length)[None])
    return cos.numpy(), sin.numpy()


@given(configs())
@settings(max_examples=150)
def test_transformers_reads_what_we_write(tmp_path_factory, fields):
    folder = tmp_path_factory.mktemp("config")
    ours = LlamaConfig(**copy.deepcopy(fields), pad_token_id=3, torch_dtype="bfloat16", num_labels=3)
    ours.save_pretrained(folder)
    theirs = transformers.LlamaConfig.from_pretrained(folder)
    expected = transformers_config(fields)
    for name in fields:
        if name != "rope_parameters":
            assert getattr(theirs, name) == getattr(expected, name), name
    assert (theirs.pad_token_id, theirs.dtype, theirs.num_labels) == (3, torch.bfloat16, 3)
    for mine, their in zip(angles(theirs), angles(expected), strict=True):
        np.testing.assert_array_equal(mine, their)
    for mine, their in zip(longer_angles(theirs, 100), longer_angles(expected, 100), strict=True):
        np.testing.assert_array_equal(mine, their)
    frequencies, scale = reference.rope_frequencies(ours.checked())
    np.testing.assert_allclose(frequencies, angles(theirs)[0], rtol=3e-6)
    assert scale == pytest.approx(angles(theirs)[1], rel=1e-6)


@given(configs())
@settings(max_examples=60)
def test_we_read_what_transformers_writes(tmp_path_factory, fields):
    folder = tmp_path_factory.mktemp("config")
    theirs = transformers_config(fields, num_labels=3, dtype="float16", problem_type="regression")
    theirs.save_pretrained(folder)
    for ours in (
        LlamaConfig.from_pretrained(folder / "config.json"),
        LlamaConfig.from_dict(theirs.to_dict()),
        LlamaConfig(**json.loads(theirs.to_json_string())),
    ):
        plain = LlamaConfig(**copy.deepcopy(fields))
        for name in ARGUMENTS:
            assert getattr(ours, name) == getattr(plain, name), name
        assert ours.rope_parameters == plain.rope_parameters
        assert (ours.num_labels, ours.dtype, ours.problem_type) == (3, torch.float16, "regression")
        assert ours.id2label == theirs.id2label


def test_a_folder_is_read_with_its_weights_beside_it(tmp_path):
    fields = dict(vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model, _ = transformers_model(fields, 0)
    model.save_pretrained(tmp_path)
    config, unused = LlamaConfig.from_pretrained(
        tmp_path, return_unused_kwargs=True, hidden_act="relu", no_such_field=3, num_labels=5
    )
    assert (config.vocab_size, config.hidden_act, config.num_labels) == (30, "relu", 5)
    assert unused == {"no_such_field": 3}
    assert config.name_or_path == config._name_or_path == str(tmp_path)
    assert not hasattr(LlamaConfig.from_pretrained(tmp_path, no_such_field=3), "no_such_field")
    assert "name_or_path" not in config.to_diff_dict()


def test_from_dict_takes_keywords_for_attributes_and_gives_back_the_others():
    data = {"hidden_size": 64, "num_attention_heads": 4, "extra": 1}
    kept = copy.deepcopy(data)
    config, unused = LlamaConfig.from_dict(
        data, return_unused_kwargs=True, extra=2, vocab_size=9, torch_dtype="float16", rope_theta=5e5, foo=3
    )
    assert data == kept
    assert (config.extra, config.vocab_size, config.dtype, config.rope_theta) == (2, 9, torch.float16, 5e5)
    assert unused == {"foo": 3}
    assert type(LlamaConfig.from_dict(data, foo=3)) is LlamaConfig
    with pytest.raises(ValueError, match="vocab_size must be a positive integer, got '9'"):
        LlamaConfig.from_dict(data, vocab_size="9")
    with pytest.raises(ValueError, match="config_dict must be a dictionary, got list"):
        LlamaConfig.from_dict([data])


@pytest.mark.parametrize("hash_seed", ["1", "2", "3", "4"])
def test_from_dict_means_the_same_in_every_process(hash_seed):
    """Keywords that depend on each other are set in a fixed order, not in that of a set of strings."""
    code = """
from llama import LlamaConfig
lists = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 8}
config = LlamaConfig.from_dict(
    {"hidden_size": 64, "num_attention_heads": 4},
    rope_scaling={"type": "longrope"} | lists, rope_theta=7.0, head_dim=8, max_position_embeddings=16,
)
print(config.rope_parameters["factor"], config.rope_theta, config.head_dim)
"""
    env = os.environ | {"PYTHONHASHSEED": hash_seed}
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert out.stdout == "2.0 7.0 8\n", out.stderr


def test_what_follows_from_other_fields_can_be_asked_for_again():
    """None means "derived from the other fields", wherever it is set."""
    config = LlamaConfig.from_dict(
        {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "vocab_size": 9, "intermediate_size": 8},
        num_attention_heads=8, num_key_value_heads=None, head_dim=None,
    )  # fmt: skip
    assert (config.num_key_value_heads, config.head_dim) == (8, 8)
    config.head_dim = config.num_key_value_heads = None
    LlamaForCausalLM(config)(torch.tensor([[1, 2]]))


def test_json_is_sorted_indented_and_as_transformers_spells_it():
    text = LlamaConfig(pad_token_id=0, architectures=["LlamaForCausalLM"], torch_dtype="bfloat16").to_json_string()
    data = json.loads(text)
    assert text == json.dumps(data, indent=2, sort_keys=True) + "\n"
    four = {*ARGUMENTS, "model_type", "architectures", "torch_dtype"}
    assert data.keys() == four | {"rope_parameters"}
    assert data["torch_dtype"] == "bfloat16"
    assert data["model_type"] == "llama"
    assert data["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    plain = LlamaConfig().to_diff_dict()
    assert plain.keys() == {*ARGUMENTS, "model_type", "rope_parameters"} - {"pad_token_id"}
    assert LlamaConfig().to_dict().keys() > plain.keys() | {"id2label", "num_labels", "return_dict", "torch_dtype"}
    assert "return_dict" not in plain
    assert LlamaConfig(return_dict=False).to_diff_dict()["return_dict"] is False
    assert json.loads(LlamaConfig(num_labels=1).to_json_string())["id2label"] == {"0": "LABEL_0"}
    assert json.loads(LlamaConfig().to_json_string(use_diff=False))["num_labels"] == 2


def test_json_files(tmp_path):
    config = LlamaConfig(num_labels=12)
    config.to_json_file(tmp_path / "a.json")
    config.to_json_file(tmp_path / "b.json", use_diff=False)
    assert (tmp_path / "a.json").read_text() == config.to_json_string()
    assert LlamaConfig.from_json_file(tmp_path / "b.json") == config
    assert len(json.loads((tmp_path / "b.json").read_text())) > len(json.loads((tmp_path / "a.json").read_text()))


def test_transformers_4_finds_what_it_looks_for():
    """A float factor, `rope_scaling` without theta, and longrope's original length at the top level."""
    lists = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    data = LlamaConfig(rope_scaling={"type": "linear", "factor": 8}).to_dict()
    assert type(data["rope_scaling"]["factor"]) is float
    assert data["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert data["rope_theta"] == 10000.0
    assert "original_max_position_embeddings" not in data
    data = LlamaConfig(rope_scaling={"type": "longrope", "original_max_position_embeddings": 512} | lists).to_dict()
    assert data["original_max_position_embeddings"] == 512
    assert data["rope_scaling"]["factor"] == 4.0
    assert LlamaConfig(rope_theta=7.0).to_dict()["rope_scaling"] is None


# -- views of one state -----------------------------------------------------------------------------------------------


def test_rope_is_one_state_under_three_names():
    config = LlamaConfig(rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2.0})
    assert config.rope_theta == 5e5
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    config.rope_theta = 1e4
    assert config.rope_parameters["rope_theta"] == 1e4
    assert config.rope_scaling["factor"] == 2.0
    config.rope_scaling = {"rope_type": "dynamic", "factor": 4.0}
    assert config.rope_parameters == {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    config.rope_parameters = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 7.0}
    assert config.rope_theta == 7.0
    assert config.rope_scaling == {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}
    config.rope_scaling = None
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 7.0}
    assert config.rope_scaling is None
    config.rope_parameters = None
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    config.update({"rope_theta": 3.0, "vocab_size": 5})
    assert (config.rope_theta, config.vocab_size) == (3.0, 5)
    for name, value, message in (
        ("rope_theta", 0, "rope_theta"),
        ("rope_scaling", "linear", "rope_scaling must be a dictionary or None, got 'linear'"),
        ("rope_scaling", {"type": "linear"}, "'linear' lack factor"),
        ("rope_parameters", {"rope_type": "spiral"}, "'spiral' is unknown"),
        ("rope_parameters", [1], "rope_parameters must be a dictionary"),
    ):
        with pytest.raises(ValueError, match=message):
            setattr(config, name, value)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 3.0}


def test_the_spelling_of_transformers_4_wins_over_the_other_as_there():
    both = dict(rope_scaling={"type": "linear", "factor": 2.0}, rope_parameters={"rope_type": "default"})
    assert LlamaConfig(**both).rope_parameters["rope_type"] == "linear"
    assert LlamaConfig(rope_theta=3.0, rope_parameters={"rope_theta": 4.0}).rope_theta == 4.0
    assert LlamaConfig(rope_theta=3.0, rope_parameters={"rope_type": "default"}).rope_theta == 3.0


def test_an_original_length_outside_the_rope_dictionary_counts_once():
    lists = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
    config = LlamaConfig(rope_scaling={"type": "longrope"} | lists, original_max_position_embeddings=512)
    assert config.rope_parameters["original_max_position_embeddings"] == 512
    again = LlamaConfig.from_dict(config.to_dict())
    again.rope_parameters = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024}
    assert LlamaConfig.from_dict(again.to_dict()).rope_parameters == again.rope_parameters


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_dtype_has_two_names_and_two_forms(name):
    for value in ("bfloat16", torch.bfloat16, "torch.bfloat16"):
        config = LlamaConfig(**{name: value})
        assert config.dtype is config.torch_dtype is torch.bfloat16
        assert config.to_dict()["torch_dtype"] == "bfloat16"
    setattr(config, name, "float16")
    assert config.dtype is config.torch_dtype is torch.float16
    setattr(config, name, None)
    assert config.dtype is config.torch_dtype is None
    with pytest.raises(ValueError, match="dtype must be float64, float32, float16 or bfloat16, got 'int8'"):
        LlamaConfig(**{name: "int8"})
    with pytest.raises(ValueError, match=r"dtype must be .*, got torch.int8"):
        setattr(config, name, torch.int8)
    assert LlamaConfig(dtype="float16", torch_dtype="bfloat16").dtype is torch.float16


def test_labels_follow_each_other():
    assert LlamaConfig(num_labels=3).id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    config = LlamaConfig(id2label={"0": "no", "1": "yes", "2": "both"})  # string keys, as in JSON
    assert config.num_labels == 3
    assert config.id2label == {0: "no", 1: "yes", 2: "both"}
    assert config.label2id == {"no": 0, "yes": 1, "both": 2}
    config.num_labels = 3
    assert config.id2label[2] == "both"
    config.num_labels = 1
    assert config.id2label == {0: "LABEL_0"}
    assert config.label2id == {"LABEL_0": 0}
    named = LlamaConfig(id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, num_labels=2)
    assert LlamaConfig.from_dict(named.to_diff_dict()).id2label == {0: "a", 1: "b"}
    fields = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    assert LlamaForSequenceClassification(LlamaConfig(**fields, num_labels=4)).score.out_features == 4
    with pytest.raises(ValueError, match="num_labels is 3, but id2label has 1"):
        LlamaConfig(num_labels=3, id2label={0: "a"})
    for wrong in (0, -1, True, "2"):
        with pytest.raises(ValueError, match="num_labels must be a positive integer"):
            LlamaConfig(num_labels=wrong)
        if wrong is not True:
            with pytest.raises(ValueError, match="num_labels must be a positive integer"):
                config.num_labels = wrong


def test_names_that_differ_between_the_versions_are_one():
    config = LlamaConfig(_attn_implementation="eager", _name_or_path="here")
    assert (config.attn_implementation, config.name_or_path) == ("eager", "here")
    config._attn_implementation, config._name_or_path = "sdpa", "there"
    assert (config.attn_implementation, config.name_or_path) == ("sdpa", "there")
    assert LlamaConfig(return_dict=False).use_return_dict is False


def test_other_keywords_are_kept_and_written():
    config = LlamaConfig(foo=3, bar={"a": [1]})
    assert config.foo == 3
    assert json.loads(config.to_json_string())["bar"] == {"a": [1]}
    data = config.to_dict()
    data["bar"]["a"].append(2)
    data["rope_parameters"]["rope_theta"] = 1
    assert config.bar == {"a": [1]}
    assert config.rope_theta == 10000.0
    assert LlamaConfig() != config
    assert config != config.to_dict()
    assert LlamaConfig(foo=3, bar={"a": [1]}) == config


def test_a_function_for_an_activation_cannot_be_written(tmp_path):
    config = LlamaConfig(hidden_act=torch.tanh)
    assert config.hidden_act is torch.tanh
    assert "tanh" in repr(config)
    config.checked()
    with pytest.raises(ValueError, match="hidden_act is a function"):
        config.to_json_string()
    with pytest.raises(ValueError, match="hidden_act is a function"):
        config.save_pretrained(tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_a_value_that_is_set_later_is_checked_when_a_model_is_built():
    fields = dict(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    for name, value in (("hidden_size", "8"), ("attn_implementation", "flash"), ("problem_type", "riddle"),
                        ("rms_norm_eps", -1.0), ("hidden_act", "nope")):  # fmt: skip
        config = LlamaConfig(**fields)
        setattr(config, name, value)
        with pytest.raises(ValueError, match=name):
            LlamaForCausalLM(config)


def rope(kind, **rest):
    return {"rope_parameters": {"rope_type": kind} | rest}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 65, "num_attention_heads": 4}, r"hidden_size \(65\).*num_attention_heads \(4\)"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, r"num_attention_heads \(8\).*num_key_value_heads"),
        ({"vocab_size": 32000.0}, r"vocab_size must be a positive integer, got 32000\.0"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_act": "nope"}, "hidden_act 'nope' is unknown"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"initializer_range": 2}, "initializer_range"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"use_cache": 1}, "use_cache"),
        ({"pad_token_id": "0"}, "pad_token_id"),
        ({"bos_token_id": [1]}, "bos_token_id"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"pretraining_tp": 0}, "pretraining_tp"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"attention_dropout": 1.5}, "attention_dropout"),
        ({"mlp_bias": None}, "mlp_bias"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_scaling": "linear"}, "rope_scaling must be a dictionary"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' lack factor"),
        (rope("spiral"), "'spiral' is unknown"),
        (rope("linear", factr=2.0, factor=2.0), "do not accept factr"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; only 'llama'"),
        ({"num_key_value_head": 8}, r"num_key_value_head is unknown; did you mean num_key_value_heads\?"),
        ({"problem_type": "riddle"}, "problem_type must be one of .*regression.*, got 'riddle'"),
        ({"attn_implementation": "flash"}, "attn_implementation must be one of .*eager.*, got 'flash'.*backend"),
        ({"_attn_implementation": "flash"}, "attn_implementation must be one of"),
        ({"dtype": "float8"}, "dtype must be float64, float32, float16 or bfloat16, got 'float8'"),
        ({"id2label": {"a": "b"}}, "id2label"),
        ({"id2label": ["a", "b"]}, "id2label"),
    ],
)  # fmt: skip
def test_what_cannot_work_names_its_field(fields, message):
    with pytest.raises(ValueError, match=message):
        LlamaConfig(**fields)


def test_the_model_type_may_be_said():
    assert LlamaConfig(model_type="llama") == LlamaConfig(model_type=None) == LlamaConfig()
    assert "model_type" not in vars(LlamaConfig(model_type="llama"))


def test_a_class_of_ones_own_may_have_its_own_type_and_architecture():
    class Mine(LlamaConfig):
        model_type = "mine"

    for kind in ("mine", "llama", None):  # a Llama file can be read, and is saved as the subclass's
        assert Mine(model_type=kind).to_dict()["model_type"] == "mine"
    with pytest.raises(ValueError, match="model_type is 'mistral'; only 'mine' models can be read"):
        Mine(model_type="mistral")
    with pytest.raises(ValueError, match="model_type is 'mine'; only 'llama' models can be read"):
        LlamaConfig(model_type="mine")
    assert LlamaConfig(model_type="llama", architectures=["Reward"]).architectures == ["Reward"]
    with pytest.raises(ValueError, match=r"architectures are .*'Reward'.*; only Llama models can be read"):
        LlamaConfig(architectures=["Reward"])
