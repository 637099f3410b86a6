"""`llama info`: what the headers say, even of models too large to load here."""

import json
import struct

import gguf
import pytest
import torch
from checkpoint_files import FIELDS, random_params, write_folder, write_gguf
from meta_files import write_hollow_meta, write_meta
from safetensors.torch import save_file as save_torch

from llama import LlamaForCausalLM, reference
from llama.checkpoints import open_checkpoint, stored
from llama.checkpoints.convert import convert
from llama.cli import cli
from llama.info import in_bytes, info

PARAMS = random_params()
LLAMA_70B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672,
             "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
             "max_position_embeddings": 4096}  # fmt: skip
PARAMETERS_70B, EMBEDDING_70B = 68_976_648_192, 32000 * 8192


def said(*arguments, ok=True):
    from click.testing import CliRunner

    done = CliRunner().invoke(cli, ["info", *map(str, arguments)])
    assert (done.exit_code == 0) == ok, done.output
    return done.output


def stated(*arguments):
    """Return the message of the ValueError that the command raises."""
    from click.testing import CliRunner

    error = CliRunner().invoke(cli, ["info", *map(str, arguments)]).exception
    assert isinstance(error, ValueError), error
    return str(error)


def test_an_incomplete_model_is_named(tmp_path):
    source = write_folder(tmp_path / "model", PARAMS, FIELDS | {"num_hidden_layers": 10**9})
    assert "incomplete    the tensor model.layers.2.input_layernorm.weight is missing" in said(source)
    assert json.loads(said(source, "--json"))["missing"] == "model.layers.2.input_layernorm.weight"
    assert "\nincomplete" not in said(write_folder(tmp_path / "whole", PARAMS))


def in_safetensors(folder):
    """The 70B model in one sparse file: a header and no data."""
    header, end = {}, 0
    for name, shape in reference.parameter_shapes(reference.Config.from_dict(LLAMA_70B)):
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return folder


def in_gguf(path):
    """The same, with Q8_0 matrices."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(80)
    writer.add_embedding_length(8192)
    writer.add_feed_forward_length(28672)
    writer.add_head_count(64)
    writer.add_head_count_kv(8)
    writer.add_context_length(4096)
    writer.add_layer_norm_rms_eps(1e-5)
    end = 0
    from llama.checkpoints.names import rename

    for name, shape in reference.parameter_shapes(reference.Config.from_dict(LLAMA_70B)):
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        size = torch.Size(shape).numel() * (34 / 32 if len(shape) == 2 else 4)
        writer.add_tensor_info(rename(name, "hugging_face", "gguf"), shape, "float32", int(size), raw_dtype=kind)
        end += int(size)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as file:
        file.truncate(file.seek(0, 2) + 100 + end)
    return path


def in_meta(folder):
    more = {"multiple_of": 4096, "ffn_dim_multiplier": 1.3}  # as in its own params.json
    return write_hollow_meta(folder, LLAMA_70B, 8, torch.bfloat16, said=more)


@pytest.mark.parametrize("write", [in_safetensors, in_meta, in_gguf])
def test_70b_is_told_from_its_headers(tmp_path, monkeypatch, write):
    where = write(tmp_path / f"model{'.gguf' * (write is in_gguf)}")

    def refuse(*arguments):
        raise AssertionError("weights must not be read")

    monkeypatch.setattr(stored.MappedFile, "array", refuse)
    found = info(open_checkpoint(where), tokens=1000, batch=3)
    assert (found.parameters, found.embedding) == (PARAMETERS_70B, EMBEDDING_70B)
    assert found.memory["float32"]["weights"] == 4 * PARAMETERS_70B
    cache = 2 * 80 * 3 * 8 * 1000 * 128 * 2  # K and V, layers, batch, KV heads, tokens, head_dim, bytes
    assert found.memory["bfloat16"] == {"weights": 2 * PARAMETERS_70B, "cache": cache}
    if write is in_gguf:
        norms = 161 * 8192
        assert found.stored == {"Q8_0": (PARAMETERS_70B - norms) * 34 // 32, "F32": 4 * norms}
    else:
        assert found.stored == {"bfloat16": 2 * PARAMETERS_70B}
    assert found.files == (8 if write is in_meta else 1)


def test_what_is_told_is_what_pytorch_takes(tmp_path):
    for number, fields in enumerate((FIELDS, FIELDS | {"tie_word_embeddings": True})):
        folder = write_folder(tmp_path / str(number), random_params(fields), fields)
        found, model = info(open_checkpoint(folder), tokens=5, batch=2), LlamaForCausalLM.from_pretrained(folder)
        assert found.parameters == model.num_parameters()
        assert found.parameters - found.embedding == model.num_parameters(exclude_embeddings=True)
        assert found.memory["float32"]["weights"] == model.get_memory_footprint(return_buffers=False)
        cache = model(torch.ones(2, 5, dtype=torch.int64), use_cache=True).past_key_values
        held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
        assert found.memory["float32"]["cache"] == held


def test_a_head_that_only_repeats_the_embedding_counts_once(tmp_path):
    fields = FIELDS | {"tie_word_embeddings": True}
    params = PARAMS | {"lm_head.weight": PARAMS["model.embed_tokens.weight"].copy()}
    folder = write_folder(tmp_path, params, fields)
    assert info(open_checkpoint(folder)).parameters == LlamaForCausalLM.from_pretrained(folder).num_parameters()


def test_the_command_says_it_to_people(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 16}  # fmt: skip
    write_folder(tmp_path, PARAMS, FIELDS | {"rope_scaling": scaling}, shards=2)
    text = said(tmp_path)
    for line in (
        "Hugging Face's safetensors, 2 files: 155 kB float32",
        "architecture  LlamaForCausalLM",
        "2 of width 64, MLP of width 32",
        "4 of size 16, 2 for keys and values",
        "38,720, of which 768 are the embedding's\n",
        "12 tokens",
        "32 tokens",
        "llama3, theta 500, factor 8, low_freq_factor 1, high_freq_factor 4, original_max_position_embeddings 16",
        "with a cache of 32 tokens\n",
    ):
        assert line in text
    rows = {row[0]: row[1:] for row in map(str.split, text.splitlines()[-3:])}
    assert rows["float32"] == ["155", "kB", "16.4", "kB", "171", "kB"]
    assert rows["bfloat16"] == ["77.4", "kB", "8.19", "kB", "85.6", "kB"]
    assert "a cache of 7 tokens in each of 3 texts" in said(tmp_path, "--tokens", 7, "--batch", 3)


def test_the_command_says_it_to_machines(tmp_path):
    found = json.loads(said(write_gguf(tmp_path / "m.gguf", PARAMS), "--json", "--tokens", 9))
    assert found["format"] == "GGUF"
    assert found["config"]["hidden_size"] == 64
    assert found["stored"] == {"F32": 154880}
    assert found["memory"]["float16"] == {"weights": 77440, "cache": 2 * 2 * 2 * 9 * 16 * 2}
    assert (
        json.loads(said(write_meta(tmp_path / "meta", PARAMS, shards=2), "--json"))["format"] == "Meta's .pth, LLaMA 2"
    )


def test_other_types_are_told_too(tmp_path):
    folder = write_folder(tmp_path, PARAMS)
    save_torch({n: torch.tensor(a).to(torch.float8_e4m3fn) for n, a in PARAMS.items()}, folder / "model.safetensors")
    assert info(open_checkpoint(folder)).stored == {"float8_e4m3fn": 38720}


@pytest.mark.parametrize("value", [{}, {"a": 1}, [], "x", 1, None, [1]])
def test_an_architecture_of_any_kind_is_told(tmp_path, value):
    folder = write_folder(tmp_path, PARAMS, FIELDS | {"architectures": value})
    assert info(open_checkpoint(folder)).architecture == ("1" if value == [1] else "LlamaForCausalLM")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], r"model holds no model: no config\.json .* no params\.json with consolidated\.\*\.pth, no \.gguf file"),
        (["notes.txt", "a.gguf"], r"model is not a model itself, but holds one; give \S+/model/a\.gguf"),
        (["conversion.json", "model.safetensors"], "is an unfinished conversion; run the same `llama convert` again"),
        (["conversion.json", "consolidated.00.pth"], "is an unfinished conversion; run the same `llama convert` again"),
        (["conversion.json"], "is an unfinished conversion; run the same `llama convert` again"),
    ],
)
def test_a_folder_that_is_no_model_is_told_in_one_way(tmp_path, names, message):
    (tmp_path / "model").mkdir()
    for name in names:
        (tmp_path / "model" / name).touch()
    for use in (info, lambda checkpoint: convert(checkpoint, tmp_path / "out")):
        with pytest.raises(FileNotFoundError, match=message):
            use(open_checkpoint(tmp_path / "model"))


def test_a_configuration_that_does_not_fit_is_named(tmp_path):
    folder = write_folder(tmp_path, random_params(), FIELDS | {"intermediate_size": 64})
    with pytest.raises(ValueError, match=r"gate_proj\.weight has shape \(32, 64\); .* asks for \(64, 64\)\. Correct"):
        info(open_checkpoint(folder))


def test_what_cannot_be_told_is_named(tmp_path):
    folder = write_folder(tmp_path, PARAMS, FIELDS | {"num_attention_heads": 5})
    with pytest.raises(ValueError, match=r"num_attention_heads \(5\)") as caught:
        info(open_checkpoint(folder))
    assert str(tmp_path) in str(caught.value)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON") as caught:
        info(open_checkpoint(folder))
    assert str(caught.value).count(str(tmp_path)) == 1
    said(tmp_path, "--tokens", 0, ok=False)
    write_folder(tmp_path / "empty", {})
    with pytest.raises(ValueError, match=r"empty/model\.safetensors holds no tensors; download it again"):
        info(open_checkpoint(tmp_path / "empty"))
    with pytest.raises(ValueError, match="batch must be at least 1 and at most 1,000,000,000,000, got 0"):
        info(open_checkpoint(write_folder(tmp_path, PARAMS)), batch=0)
    assert "tokens must be at least 1 and at most 1,000,000,000,000, got 1" in stated(tmp_path, "--tokens", 10**400)
    assert "batch must be at least 1 and at most 1,000,000,000,000, got 1" in stated(tmp_path, "--batch", 10**30)
    said(tmp_path, "--tokens", 10**12, "--batch", 10**12)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.00 kB"), (12345, "12.3 kB"), (999_499, "999 kB"),
     (999_500, "1.00 MB"), (9_996, "10.0 kB"), (99_960, "100 kB"), (138e9, "138 GB"), (9.87e12, "9.87 TB"),
     (1e21, "1.00 ZB"), (1e34, "1.00e+04 QB")],
)  # fmt: skip
def test_bytes_are_said_in_three_digits(count, text):
    assert in_bytes(int(count)) == text
