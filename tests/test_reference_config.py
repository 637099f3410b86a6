"""Configurations: their meaning in the spellings of transformers 4 and 5, and the ones that are refused."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from oracle import transformers_config
from strategies import configs

from llama.reference import Config

LISTS = {"short_factor": [1.0] * 64, "long_factor": [2.0] * 64}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def test_defaults_are_those_of_the_7b_model():
    ours, theirs = Config(), transformers_config({})
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                 "num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps",
                 "rope_parameters", "attention_bias", "mlp_bias", "tie_word_embeddings", "bos_token_id",
                 "eos_token_id", "pad_token_id", "num_labels", "initializer_range", "attention_dropout", "use_cache",
                 "pretraining_tp"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name


@given(configs())
def test_what_transformers_writes_is_read(fields):
    config = Config.from_dict(json.loads(transformers_config(fields).to_json_string()))
    assert config == Config.from_dict(fields)


@given(configs(), st.sampled_from(["type", "rope_type"]))
def test_the_spelling_of_transformers_4_means_the_same(fields, key):
    rope = dict(fields["rope_parameters"])
    old = {name: value for name, value in fields.items() if name != "rope_parameters"}
    old["rope_theta"] = rope.pop("rope_theta")
    old["rope_scaling"] = {key: rope.pop("rope_type")} | rope
    if old["rope_scaling"] == {key: "default"}:
        old["rope_scaling"] = None
    assert Config.from_dict(old) == Config.from_dict(fields)


def test_an_original_length_outside_the_rope_dictionary_counts():
    lists = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Config.from_dict(
        {"hidden_size": 16, "num_attention_heads": 2, "max_position_embeddings": 64,
         "original_max_position_embeddings": 16, "rope_scaling": {"type": "longrope"} | lists}
    )  # fmt: skip
    assert config.rope_parameters["original_max_position_embeddings"] == 16
    assert config.rope_parameters["factor"] == 4.0


def test_of_two_spellings_the_same_one_wins_as_in_transformers():
    both = {
        "rope_theta": 7.0,
        "rope_scaling": {
            "type": "linear",
            "rope_type": "dynamic",
            "factor": 2.0,
            "rope_theta": 9.0,
            "attention_factor": None,
        },
        "rope_parameters": {"rope_type": "default"},
    }
    assert Config.from_dict(both).rope_parameters == {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 9.0}
    theirs = transformers_config(both)
    assert theirs.rope_parameters["rope_type"] == "dynamic"
    assert theirs.rope_parameters["rope_theta"] == 9.0


def test_what_published_files_carry_is_understood():
    config = Config.from_dict(
        {"id2label": {"0": "a", "1": "b", "2": "c"}, "pretraining_tp": None, "attention_dropout": None,
         "original_max_position_embeddings": 64, "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    )  # fmt: skip
    assert (config.num_labels, config.pretraining_tp, config.attention_dropout) == (3, 1, 0.0)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    shrinking = Config(rope_parameters={"rope_type": "longrope", "factor": 0.5, **LISTS})
    assert shrinking.rope_parameters["factor"] == 0.5


def test_only_dictionaries_configure():
    with pytest.raises(ValueError, match="rope_parameters must be a dictionary"):
        Config(rope_parameters=[1])
    with pytest.raises(ValueError, match="a configuration must be a dictionary"):
        Config.from_dict([])


def test_head_dim_frees_hidden_size_from_the_heads():
    assert Config(hidden_size=10, num_attention_heads=4, head_dim=6).head_dim == 6


def test_names_of_other_types_have_no_effect_and_are_mentioned():
    """Such as Yarn-Llama's "finetuned"; misspelt names are refused, as tested below."""
    scaling = {"type": "linear", "factor": 2.0}
    with pytest.warns(UserWarning, match="type 'linear' do not accept beta_fast, finetuned"):
        config = Config.from_dict({"rope_scaling": scaling | {"finetuned": True, "beta_fast": 32}})
    assert config == Config.from_dict({"rope_scaling": scaling})


def test_numbers_are_plain_floats():
    eps = Config(rms_norm_eps=np.float64(1e-5)).rms_norm_eps
    assert type(eps) is float  # adding an np.float64 would promote float32 arrays to float64


def rope(kind, **rest):
    return {"rope_parameters": {"rope_type": kind} | rest}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 65, "num_attention_heads": 4}, r"hidden_size \(65\).*num_attention_heads \(4\)"),
        ({"num_attention_heads": 8, "num_key_value_heads": 3}, r"num_attention_heads \(8\).*num_key_value_heads"),
        ({"hidden_size": -1}, "hidden_size must be a positive integer, got -1"),
        ({"vocab_size": 32000.0}, r"vocab_size must be a positive integer, got 32000\.0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_attention_heads": True}, "num_attention_heads"),
        ({"num_key_value_heads": "8"}, "num_key_value_heads"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"intermediate_size": 0}, "intermediate_size"),
        ({"num_labels": 0}, "num_labels"),
        ({"pretraining_tp": 0}, "pretraining_tp"),
        ({"head_dim": -2}, "head_dim must be a positive integer"),
        ({"attention_dropout": 2}, "attention_dropout"),
        ({"mlp_bias": 1}, "mlp_bias must be true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"use_cache": 1}, "use_cache must be true or false"),
        ({"bos_token_id": [1]}, "bos_token_id must be a token id or null"),
        ({"pad_token_id": "0"}, "pad_token_id must be a token id or null"),
        ({"rms_norm_eps": True}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rope_theta": 1.0}, r"\['rope_theta'\] must be a number above 1"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor must be 1"),
        ({"hidden_act": "nope"}, "hidden_act 'nope' is unknown; choose from .*silu"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps must be a number of at least 0"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"initializer_range": 2}, "initializer_range must be a number of at least 0 and at most 1"),
        ({"attention_bias": 1}, "attention_bias must be true or false"),
        ({"eos_token_id": "</s>"}, "eos_token_id must be a token id or null"),
        ({"eos_token_id": [1, "2"]}, "eos_token_id"),
        ({"rope_parameters": [1]}, "rope_scaling must be a dictionary"),
        ({"rope_scaling": "linear"}, "rope_scaling must be a dictionary"),
        (rope("spiral"), "rope_type 'spiral' is unknown; choose from default, linear, dynamic, yarn, longrope, llama3"),
        (rope("linear"), "type 'linear' lack factor"),
        (rope("linear", factor=0.5), r"\['factor'\] must be a number of at least 1"),
        (rope("dynamic", factor="2"), r"\['factor'\]"),
        (rope("linear", factr=2.0, factor=2.0), "do not accept factr; valid keys are factor, rope_theta"),
        (rope("default", rope_theta=0), r"\['rope_theta'\]"),
        (rope("default", partial_rotary_factor=0.5), "partial_rotary_factor must be 1"),
        (rope("yarn"), "lack factor"),
        (rope("yarn", factor=2.0, truncate="yes"), r"\['truncate'\] must be true or false"),
        (rope("yarn", factor=2.0, attention_factor=-1), r"\['attention_factor'\]"),
        (rope("yarn", factor=2.0, original_max_position_embeddings=-4), r"\['original_max_position_embeddings'\]"),
        (rope("longrope", **LISTS, original_max_position_embeddings=1), "an integer of at least 2"),
        (rope("yarn", factor=2.0, mscale=-1), r"\['mscale'\]"),
        (rope("yarn", factor=2.0, original_max_position_embeddings=0), "an integer of at least 2"),
        (rope("dynamic", factor=2.0, original_max_position_embeddings=8.5), "must be a positive integer"),
        (rope("llama3", **LLAMA3 | {"low_freq_factor": 0}), r"\['low_freq_factor'\]"),
        (rope("llama3", **LLAMA3 | {"factor": None}, original_max_position_embeddings=512), "lack factor"),
        (rope("longrope", short_factor=[1.0] * 64), "lack long_factor"),
        (rope("longrope", **LISTS | {"long_factor": [1.0] * 3}), r"head_dim / 2 = 64 numbers, got a list of 3"),
        (rope("longrope", **LISTS | {"long_factor": 2.0}), r"\['long_factor'\] must contain"),
        (rope("longrope", **LISTS | {"long_factor": [0.0] * 64}), r"each number of .*long_factor"),
        (rope("llama3", factor=8.0), "lack high_freq_factor, low_freq_factor"),
        (rope("llama3", **LLAMA3 | {"high_freq_factor": 1.0}), r"low_freq_factor.* must be below"),
        ({"architectures": ["MistralForCausalLM"]}, "only Llama models"),
        ({"num_key_value_head": 8}, r"num_key_value_head is unknown; did you mean num_key_value_heads\?"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; only 'llama'"),
    ],
)  # fmt: skip
def test_what_cannot_work_names_its_field(fields, message):
    with pytest.raises(ValueError, match=message):
        Config.from_dict(fields)
