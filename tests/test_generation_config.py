"""GenerationConfig: transformers' defaults, files that both libraries read, and errors that name the option."""

import copy
import json
import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from llama.generation import config as module
from llama.generation.config import FIELDS, GenerationConfig

THEIR_DEFAULTS = transformers.GenerationConfig()._get_default_generation_params()

# Legal values other than the default, for every option.
OPTIONS = {
    "max_length": st.integers(1, 50),
    "max_new_tokens": st.integers(1, 50),
    "min_length": st.integers(0, 50),
    "min_new_tokens": st.integers(0, 50),
    "early_stopping": st.sampled_from([True, False, "never"]),
    "max_time": st.floats(0, 100),
    "stop_strings": st.sampled_from(["\n", ["a", "é🦙"]]),
    "do_sample": st.booleans(),
    "num_beams": st.integers(2, 4),
    "num_return_sequences": st.integers(1, 2),
    "use_cache": st.booleans(),
    "cache_implementation": st.sampled_from(["static"]),
    "prefill_chunk_size": st.integers(1, 9),
    "temperature": st.sampled_from([0.1, 1, 1.0, 2]),
    "top_k": st.integers(0, 60),
    "top_p": st.sampled_from([0, 0.5, 1.0]),
    "min_p": st.sampled_from([0.0, 0.1, 1]),
    "typical_p": st.sampled_from([0.2, 1.0]),
    "epsilon_cutoff": st.sampled_from([0.0, 0.1]),
    "eta_cutoff": st.sampled_from([0.0, 0.1]),
    "repetition_penalty": st.sampled_from([0.5, 1.0, 2]),
    "length_penalty": st.sampled_from([-1.0, 0.0, 2]),
    "no_repeat_ngram_size": st.integers(0, 3),
    "bad_words_ids": st.just([[1, 2], [3]]),
    "sequence_bias": st.just([[[1, 2], -1.5], [[3], float("-inf")]]),
    "renormalize_logits": st.booleans(),
    "forced_bos_token_id": st.integers(0, 3),
    "forced_eos_token_id": st.sampled_from([0, [1, 2]]),
    "remove_invalid_values": st.booleans(),
    "exponential_decay_length_penalty": st.just([3, 1.5]),
    "suppress_tokens": st.sampled_from([[], [7, 8]]),
    "begin_suppress_tokens": st.just([9]),
    "guidance_scale": st.sampled_from([1.0, 1.5]),
    "output_attentions": st.booleans(),
    "output_hidden_states": st.booleans(),
    "output_scores": st.booleans(),
    "output_logits": st.booleans(),
    "return_dict_in_generate": st.booleans(),
    "return_legacy_cache": st.booleans(),
    "pad_token_id": st.integers(-1, 3),
    "bos_token_id": st.integers(0, 3),
    "eos_token_id": st.sampled_from([-1, 2, [2, 3]]),
    "prompt_lookup_num_tokens": st.integers(1, 5),
    "max_matching_ngram_size": st.integers(1, 5),
    "num_assistant_tokens": st.integers(1, 5),
    "num_assistant_tokens_schedule": st.sampled_from(["constant", "heuristic", "heuristic_transient"]),
    "assistant_confidence_threshold": st.sampled_from([0.0, 0.9, 1]),
}
SETTINGS = st.fixed_dictionaries({}, optional=OPTIONS).map(
    lambda drawn: {"num_beams": 2} | drawn if drawn.get("num_return_sequences", 1) > 1 else drawn
)


def written(folder) -> dict:
    return json.loads((folder / "generation_config.json").read_text())


def test_every_option_is_drawn():
    assert set(OPTIONS) == set(FIELDS)


def test_defaults_are_transformers():
    config = GenerationConfig()
    for name, value in THEIR_DEFAULTS.items():
        if name in FIELDS:
            assert getattr(config, name) == value, name
    theirs = transformers.GenerationConfig()
    for name in set(FIELDS) - set(THEIR_DEFAULTS) - {"return_legacy_cache", "max_matching_ngram_size"}:
        assert getattr(config, name) == (getattr(theirs, name) or getattr(GenerationConfig, name)), name
    assert not [name for name in FIELDS if config.given(name)]


@given(SETTINGS)
def test_what_was_set_stands_and_the_rest_is_default(fields):
    config = GenerationConfig(**fields)
    for name in FIELDS:
        assert config.given(name) == (name in fields)
        assert getattr(config, name) == fields.get(name, getattr(GenerationConfig, name))
    assert config.to_diff_dict() == fields
    assert config.to_dict() == dict.fromkeys(FIELDS) | fields
    assert json.loads(config.to_json_string(use_diff=False)) == config.to_dict()
    shown = json.loads(repr(config).removeprefix("GenerationConfig "))
    for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config)),
                 GenerationConfig.from_dict(config.to_dict()), GenerationConfig.from_dict(shown)):  # fmt: skip
        assert twin == config
        assert twin.to_diff_dict() == fields
    twin.max_length = 77
    assert twin != config
    assert config != fields


@given(SETTINGS)
def test_transformers_reads_our_file_and_we_read_theirs(tmp_path_factory, fields):
    folder = tmp_path_factory.mktemp("config")
    ours = GenerationConfig(**fields)
    ours.save_pretrained(folder)
    assert os.listdir(folder) == ["generation_config.json"]
    theirs = transformers.GenerationConfig.from_pretrained(folder)
    for name, value in fields.items():
        assert getattr(theirs, name) == value, name
    assert GenerationConfig.from_pretrained(folder) == ours

    nulls = folder / "nulls"  # transformers 5 writes null for a default
    nulls.mkdir()
    theirs.to_json_file(nulls / "generation_config.json", use_diff=False)
    assert None in written(nulls).values()
    back = GenerationConfig.from_pretrained(nulls)
    assert {name for name in FIELDS if back.given(name)} == set(fields)
    assert {name: getattr(back, name) for name in fields} == fields

    full = folder / "full"  # transformers 4 writes every option
    full.mkdir()
    everything = THEIR_DEFAULTS | fields | {"transformers_version": "4.46.3"}
    (full / "generation_config.json").write_text(json.dumps(everything))
    back = GenerationConfig.from_pretrained(full)
    assert back.given("max_length")
    assert {name: getattr(back, name) for name in FIELDS} == {name: getattr(ours, name) for name in FIELDS}


def test_a_sequence_bias_of_tuples_survives_a_file(tmp_path):
    config = GenerationConfig(sequence_bias={(1, 2): -1.5, (3,): 2})
    config.save_pretrained(tmp_path)
    assert written(tmp_path)["sequence_bias"] == [[[1, 2], -1.5], [[3], 2]]
    assert GenerationConfig.from_pretrained(tmp_path) == config
    assert transformers.GenerationConfig.from_pretrained(tmp_path).sequence_bias == [[[1, 2], -1.5], [[3], 2]]


def test_dynamic_is_written_as_nothing_for_transformers_4(tmp_path):
    GenerationConfig(cache_implementation="dynamic", top_k=3).save_pretrained(tmp_path)
    assert written(tmp_path) == {"top_k": 3}


def test_what_else_a_file_holds_is_kept(tmp_path):
    extra = {"_from_model_config": True, "transformers_version": "4.31.0", "our_own": {"a": [1]}, "low_memory": True}
    (tmp_path / "generation_config.json").write_text(json.dumps(extra | {"top_p": 0.9, "max_length": None}))
    config = GenerationConfig.from_pretrained(tmp_path, top_k=7)
    assert config.our_own == {"a": [1]}
    assert (config.top_p, config.top_k, config.max_length) == (0.9, 7, 20)
    config.save_pretrained(tmp_path / "new")
    assert written(tmp_path / "new") == extra | {"top_p": 0.9, "top_k": 7}
    assert config.update(our_own=3) == {}
    assert config.our_own == 3
    plain = GenerationConfig(top_p=0.9, top_k=7, low_memory=True)
    plain.our_own = 3
    assert plain == config  # metadata does not affect equality
    assert "4.31.0" in config.to_json_string()
    assert "4.31.0" not in config.to_json_string(ignore_metadata=True)


def test_a_file_is_never_half_written(tmp_path, monkeypatch):
    GenerationConfig(top_k=3).save_pretrained(tmp_path)
    with open(tmp_path / "generation_config.json") as being_read:
        GenerationConfig(top_k=4).save_pretrained(tmp_path)
        assert json.load(being_read) == {"top_k": 3}

    def full_disk(path, data):
        path.write_text("{")
        raise OSError("no space left")

    monkeypatch.setattr(module, "write_json", full_disk)
    with pytest.raises(OSError, match="no space"):
        GenerationConfig(top_k=5).save_pretrained(tmp_path)
    assert written(tmp_path) == {"top_k": 4}
    assert os.listdir(tmp_path) == ["generation_config.json"]


def test_errors_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"generation_config\.json does not exist"):
        GenerationConfig.from_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    for text, message in (
        ("{", "is not valid JSON"),
        ('{"top_p": 7}', "`top_p` has to be a float from 0 to 1, but is 7"),
        ('{"penalty_alpha": 0.6}', "`penalty_alpha` is not supported"),
        ('{"validate": 1}', "`validate` is not a generation option"),
        ('{"__class__": "x"}', "`__class__` is not a generation option"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"generation_config.json.*{message}"):
            GenerationConfig.from_pretrained(tmp_path)


def test_update_returns_what_is_no_option():
    config = GenerationConfig(top_k=3)
    assert config.update(top_k=5, temperature=0.5, attention_mask=1, foo=None) == {"attention_mask": 1, "foo": None}
    assert config.to_diff_dict() == {"top_k": 5, "temperature": 0.5}
    assert config.update(top_k=None, disable_compile=True, penalty_alpha=None, num_beam_groups=1) == {}
    assert not config.given("top_k")
    assert config.top_k == 50
    assert config.update(defaults_only=True, temperature=0.9, top_p=0.5, own=1) == {"own": 1}
    assert (config.temperature, config.top_p) == (0.5, 0.5)
    assert config.update(allow_custom_entries=True, own=1) == {}
    assert config.own == 1


def test_an_illegal_update_changes_nothing():
    config = GenerationConfig(top_k=3)
    for wrong in (dict(top_k=4, top_p=7.0), dict(top_k=4, dola_layers="low"), dict(num_return_sequences=2)):
        with pytest.raises(ValueError, match=f"`{list(wrong)[-1]}`"):
            config.update(**wrong)
    assert config == GenerationConfig(top_k=3)


def test_tensors_and_numpy_become_python():
    config = GenerationConfig(eos_token_id=torch.tensor([1, 2]), pad_token_id=np.int64(3), temperature=np.float32(0.5))
    config.bos_token_id = torch.tensor(4)
    expected = {"eos_token_id": [1, 2], "pad_token_id": 3, "bos_token_id": 4, "temperature": 0.5}
    assert json.loads(config.to_json_string()) == expected


@given(st.integers(0, 40), st.one_of(st.none(), st.integers(1, 40)), st.one_of(st.none(), st.integers(1, 40)),
       st.one_of(st.none(), st.integers(41, 50)))  # fmt: skip
def test_the_total_length_is_that_of_transformers(prompt, max_length, max_new_tokens, positions):
    fields = {"max_length": max_length, "max_new_tokens": max_new_tokens}
    mine = GenerationConfig(**fields).total_length(prompt, positions)
    theirs = transformers.GenerationConfig(**fields)
    theirs.update(**THEIR_DEFAULTS, defaults_only=True)
    model = SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False, max_position_embeddings=positions))
    transformers.GenerationMixin._prepare_generated_length(
        model, theirs, max_length is None, True, "input_ids", prompt, torch.zeros(1, prompt)
    )
    assert mine == theirs.max_length


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"eos_token_id": [3, 4], "pad_token_id": 5, "bos_token_id": 6},
        {"temperature": 0.6, "top_p": 0.9, "max_length": 100, "min_length": 0, "top_k": 50},  # as in old files
        {"output_hidden_states": True},
        {"use_cache": False},
    ],
)
def test_a_models_configuration_says_what_it_says_to_transformers(fields):
    for said in (transformers.LlamaConfig(**fields), transformers.LlamaConfig(**fields).to_dict(), dict(fields)):
        theirs = transformers.GenerationConfig.from_model_config(copy.deepcopy(said))
        mine = GenerationConfig.from_model_config(said)
        for name in set(FIELDS) - {"return_legacy_cache"}:
            expected = getattr(theirs, name)
            assert getattr(mine, name) == (getattr(GenerationConfig, name) if expected is None else expected), name
        assert mine.given("max_length") == (theirs.max_length is not None)
        assert mine._from_model_config


ILLEGAL = {
    "max_length": (0, 1.5, "20"),
    "max_new_tokens": (0, -1, True),
    "min_length": (-1,),
    "min_new_tokens": (-1,),
    "early_stopping": ("always", 1),
    "max_time": (-1.0, "1"),
    "stop_strings": ("", [], ["a", ""], 3, [3]),
    "do_sample": ("yes", 1),
    "num_beams": (0,),
    "num_return_sequences": (0,),
    "use_cache": (0,),
    "cache_implementation": ("hybrid", "quantized", 1),
    "prefill_chunk_size": (0, -1, 1.5, "8"),
    "temperature": (-0.1, float("nan"), float("inf"), "1", True),
    "top_k": (-1, 1.5),
    "top_p": (-0.1, 1.1, float("nan")),
    "min_p": (-0.1, 1.1),
    "typical_p": (0, 1.1),
    "epsilon_cutoff": (-0.1, 1.0),
    "eta_cutoff": (-0.1, 1.0),
    "repetition_penalty": (0.0, -1.0, float("inf")),
    "length_penalty": ("1",),
    "no_repeat_ngram_size": (-1, 2.0),
    "bad_words_ids": ([], [1], [[]], [[-1]], [["a"]]),
    "sequence_bias": ({}, [], {1: 2.0}, {(1,): "a"}, {(): 1.0}, {(-1,): 1.0}, [[1], 2.0], [[[1], 2.0, 3]], "x"),
    "renormalize_logits": (1,),
    "forced_bos_token_id": (-1, "a"),
    "forced_eos_token_id": (-1, [], [1, -1]),
    "remove_invalid_values": ("no",),
    "exponential_decay_length_penalty": ((1,), (1.5, 2), (-1, 1.0), (1, "a"), 3),
    "suppress_tokens": (3, [-1], "ab"),
    "begin_suppress_tokens": (3, [1.5]),
    "guidance_scale": ("a", float("nan")),
    "output_attentions": (1,),
    "output_hidden_states": (1,),
    "output_scores": (1,),
    "output_logits": (1,),
    "return_dict_in_generate": ("x",),
    "return_legacy_cache": (1,),
    "pad_token_id": (-2, 1.5, [1]),
    "bos_token_id": (-2, "a"),
    "eos_token_id": (-2, [], ["a"], 1.5),
    "prompt_lookup_num_tokens": (0,),
    "max_matching_ngram_size": (0,),
    "num_assistant_tokens": (0,),
    "num_assistant_tokens_schedule": ("cosine",),
    "assistant_confidence_threshold": (-0.1, 1.1),
}


@pytest.mark.parametrize("name", FIELDS)
def test_illegal_values_are_named_with_what_is_legal(name):
    for value in ILLEGAL[name]:
        with pytest.raises(ValueError, match=f"^`{name}` has to be .*, but is "):
            GenerationConfig(**{name: value})
        config = GenerationConfig()
        setattr(config, name, value)
        with pytest.raises(ValueError, match=f"^`{name}` has to be "):
            config.validate()


def test_temperature_zero_is_only_for_greedy_writing():
    GenerationConfig(temperature=0.0)
    with pytest.raises(ValueError, match=r"`temperature` has to be a strictly positive float .*do_sample=False"):
        GenerationConfig(temperature=0.0, do_sample=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_return_sequences": 2}, "Greedy methods .*`num_return_sequences` different than 1 \\(got 2\\)"),
        ({"num_return_sequences": 3, "num_beams": 2}, "`num_return_sequences` .*`num_beams` \\(2\\), but is 3"),
        ({"num_return_sequences": 3, "num_beams": 2, "do_sample": True}, "`num_return_sequences`"),
        ({"suppress_tokens": [1, 2], "forced_eos_token_id": [1, 2]}, "`forced_eos_token_id` .*`suppress_tokens`"),
        ({"suppress_tokens": [0], "forced_bos_token_id": 0}, "`forced_bos_token_id`"),
        ({"temprature": 0.5}, "`temprature` is not a generation option; did you mean `temperature`"),
        ({"logits_processor": []}, "`logits_processor` is not a generation option"),
        ({"validate": 3}, "`validate` is not a generation option"),
        ({"penalty_alpha": 0.6}, "`penalty_alpha` is not supported"),
        ({"num_beam_groups": 2}, "`num_beam_groups` is not supported, but is 2"),
        ({"diversity_penalty": 0.5}, "`diversity_penalty` is not supported"),
        ({"constraints": [object()]}, "`constraints` is not supported"),
        ({"force_words_ids": [[1]]}, "`force_words_ids` is not supported"),
        ({"dola_layers": "low"}, "`dola_layers` is not supported"),
        ({"watermarking_config": {"bias": 2.0}}, "`watermarking_config` is not supported"),
        ({"token_healing": True}, "`token_healing` is not supported"),
        ({"top_h": 0.5}, "`top_h` is not supported"),
        ({"encoder_repetition_penalty": 1.5}, "`encoder_repetition_penalty` is not supported"),
    ],
)
def test_what_does_not_go_together_or_at_all_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig(**fields)
    beside = {"num_return_sequences": 2, "num_beams": 2, "suppress_tokens": [1], "forced_eos_token_id": [1, 2]}
    GenerationConfig(**beside)
    GenerationConfig(num_return_sequences=2, do_sample=True)


def test_every_option_of_transformers_is_known_and_its_neutral_value_passes():
    theirs = set(vars(transformers.GenerationConfig())) | {
        "forced_decoder_ids",
        "generation_kwargs",
    }  # only in transformers 4
    assert theirs <= module.KNOWN
    assert set(module.REFUSED) <= theirs
    for name, neutral in module.REFUSED.items():
        for value in (None, *neutral):
            GenerationConfig(**{name: value})
        assert THEIR_DEFAULTS.get(name) in (None, *neutral)
