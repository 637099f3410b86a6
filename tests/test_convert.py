"""Conversions are lossless in every direction, and change only what was requested."""

import json
import os
import re
import struct
import subprocess
import sys
import warnings
import zipfile
from types import SimpleNamespace

import gguf
import ml_dtypes
import numpy as np
import pytest
import sentencepiece_models
import torch
import transformers
from checkpoint_files import FIELDS, random_params, write_folder, write_gguf
from meta_files import shard_tensors, write_meta
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llama import LlamaForCausalLM, LlamaTokenizer, reference
from llama.checkpoints import Stored, open_checkpoint
from llama.checkpoints import convert as convert_module
from llama.checkpoints.convert import convert
from llama.checkpoints.huggingface import WEIGHTS, HuggingFaceFolder
from llama.checkpoints.meta import MetaFolder
from llama.checkpoints.meta_shards import intermediate_size, params_json
from llama.checkpoints.write import OutFile, safetensors, write_file

PARAMS = random_params()
MHA = FIELDS | {"num_key_value_heads": 4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer is written", "ignore:Meta's layout cannot store")


def tensors_of(folder) -> dict[str, torch.Tensor]:
    """Return all tensors of a folder, read by safetensors itself."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def cast(params, dtype):
    return {name: torch.tensor(array).to(dtype) for name, array in params.items()}


# --- from Meta's layout, and back ---


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shards", [1, 2, 4])  # 4 is more than the number of key and value heads
def test_metas_files_become_hugging_faces(tmp_path, shards, dtype):
    source = write_meta(tmp_path / "meta", PARAMS, shards=shards, dtype=dtype)
    out = convert(source, tmp_path / "out", verify=True)
    assert_equal(tensors_of(out), cast(PARAMS, dtype))
    model = transformers.LlamaForCausalLM.from_pretrained(out, dtype="auto")
    assert model.dtype == dtype
    assert model.generation_config.do_sample
    assert model.generation_config.temperature == 0.6
    assert_equal(model.state_dict(), cast(PARAMS, dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_hugging_faces_files_become_metas(tmp_path, shards, dtype):
    write_folder(tmp_path / "model", PARAMS)
    save_file(cast(PARAMS, dtype), tmp_path / "model" / "model.safetensors")
    out = convert(tmp_path / "model", tmp_path / "meta", to="meta", num_shards=shards, verify=True)
    for number, expected in enumerate(shard_tensors(cast(PARAMS, dtype), FIELDS, shards, 1)):
        path = out / f"consolidated.{number:02}.pth"
        held = torch.load(path, mmap=True, weights_only=True)
        assert_equal(held, {name: tensor for name, tensor in expected.items() if name != "rope.freqs"})
        assert zipfile.ZipFile(path).testzip() is None
        whole = path.read_bytes()  # every tensor starts at a multiple of 64 bytes
        for tensor in held.values():
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert any(whole[at : at + len(data)] == data for at in range(0, len(whole), 64))


@pytest.mark.parametrize("shards", [1, 2])
def test_there_and_back_is_the_same(tmp_path, shards):
    fields = FIELDS | {"rope_theta": 500000.0, "max_position_embeddings": 131072, "rope_scaling": LLAMA3}
    first = write_folder(tmp_path / "first", PARAMS, fields)
    save_file(cast(PARAMS, torch.bfloat16), first / "model.safetensors")
    meta = convert(first, tmp_path / "meta", to="meta", num_shards=shards, verify=True)
    again = convert(meta, tmp_path / "again", verify=True)
    assert_equal(tensors_of(again), tensors_of(first))
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    configs = [reference.Config.from_dict(open_checkpoint(folder).config | ids) for folder in (first, meta, again)]
    assert configs[0] == configs[1] == configs[2]


# The fields of ModelArgs in Meta's code, which accepts no others; max_seq_len is passed separately from params.json.
LLAMA1_ARGS = {"dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps"}
LLAMA2_ARGS = LLAMA1_ARGS | {"n_kv_heads", "ffn_dim_multiplier"}
LLAMA31_ARGS = LLAMA2_ARGS | {"rope_theta", "use_scaled_rope"}
OLD = {"rope_theta": 10000.0, "intermediate_size": 256}


@pytest.mark.parametrize(
    ("fields", "known"),
    [
        (MHA | OLD | {"max_position_embeddings": 2048}, LLAMA1_ARGS),
        (FIELDS | OLD | {"max_position_embeddings": 777}, LLAMA2_ARGS),
        (
            FIELDS | {"rope_theta": 500000.0, "max_position_embeddings": 131072, "rope_scaling": LLAMA3},
            LLAMA31_ARGS,
        ),
    ],
)
def test_metas_own_code_can_read_params_json(tmp_path, fields, known):
    source = write_folder(tmp_path / "model", random_params(fields), fields)
    meta = convert(source, tmp_path / "meta", to="meta")
    assert json.loads((meta / "params.json").read_text()).keys() <= known
    assert open_checkpoint(meta).config["max_position_embeddings"] == fields["max_position_embeddings"]
    assert convert(source, tmp_path / "meta", to="meta", verify=True) == meta
    again = open_checkpoint(convert(meta, tmp_path / "again"))
    assert again.config["max_position_embeddings"] == fields["max_position_embeddings"]
    for damaged in ('{"max', "[1]", '{"max_position_embeddings": true}'):
        (meta / "conversion.json").write_text(damaged)
        assert open_checkpoint(meta).config["max_position_embeddings"] in (2048, 4096, 131072)


def test_llama_2_in_float16_stays_llama_2_without_the_manifest(tmp_path):
    fields = MHA | {"rope_theta": 10000.0, "max_position_embeddings": 4096, "torch_dtype": "float16"}
    source = write_folder(tmp_path / "model", random_params(fields), fields)
    save_file(cast(random_params(fields), torch.float16), source / "model.safetensors", {"format": "pt"})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*cannot store max_position_embeddings")
        meta = convert(source, tmp_path / "meta", to="meta")
    (meta / "conversion.json").unlink()
    assert open_checkpoint(meta).config["max_position_embeddings"] == 4096


@pytest.mark.parametrize("to", ["meta", "huggingface"])
def test_buffers_of_old_transformers_are_no_obstacle(tmp_path, to):
    source = write_folder(tmp_path / "model", PARAMS)
    buffers = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(8) for n in (0, 1, 5)}
    save_file(cast(PARAMS, torch.float32) | buffers, source / "model.safetensors", {"format": "pt"})
    assert open_checkpoint(convert(source, tmp_path / "out", to=to, verify=True)).tensors


def test_frequencies_of_metas_first_files_are_no_obstacle(tmp_path):
    source = write_meta(tmp_path / "meta", PARAMS)
    tensors = torch.load(source / "consolidated.00.pth", weights_only=True)
    tensors |= {f"layers.{n}.attention.inner_attention.rope.freqs": tensors["rope.freqs"] for n in range(2)}
    torch.save(tensors, source / "consolidated.00.pth")
    assert_equal(tensors_of(convert(source, tmp_path / "out", verify=True)), cast(PARAMS, torch.float16))


def test_a_manifest_without_the_version_is_still_this_conversion(tmp_path):
    source = write_meta(tmp_path / "meta", PARAMS)
    out = convert(source, tmp_path / "out")
    manifest = json.loads((out / "conversion.json").read_text())
    del manifest["settings"]["llama_version"]
    (out / "conversion.json").write_text(json.dumps(manifest))
    assert convert(source, out) == out


def test_another_version_is_another_conversion(tmp_path):
    source = write_meta(tmp_path / "meta", PARAMS, said={"rope_theta": 500000.0})
    out = convert(MetaFolder(source, llama_version="3.1"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"holds a conversion with --llama-version 3\.1; choose another folder"):
        convert(MetaFolder(source, llama_version="3.2"), out)
    with pytest.raises(ValueError, match="holds a conversion with --instruct False"):
        convert(MetaFolder(source, llama_version="3.1", instruct=True), out)
    convert(MetaFolder(source, llama_version="3.2"), out, force=True)
    assert open_checkpoint(out).config["rope_scaling"]["factor"] == 32


@pytest.mark.parametrize("write", [write_folder, lambda path, *more: write_gguf(path.with_suffix(".gguf"), *more)])
def test_layers_beyond_the_configurations_are_an_error(tmp_path, write):
    source = write(tmp_path / "model", PARAMS, FIELDS | {"num_hidden_layers": 1})
    with pytest.raises(ValueError, match=r"model\S*: it holds model\.layers\.1\.\S+, but num_hidden_layers is 1\."):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_damaged_tokenizer_is_not_copied(tmp_path):
    source = write_folder(tmp_path / "model", PARAMS)
    (source / "tokenizer.json").write_text('{"model": {"type": "BPE"')
    with pytest.raises(ValueError, match=r"model\S*tokenizer\.json is not valid JSON"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (source / "tokenizer.json").write_text('{"model": {"type": "of a later version"}}')
    with pytest.warns(UserWarning, match=r"is not a readable tokenizer\.json.*; it is copied unchanged"):
        out = convert(source, tmp_path / "out")
    assert (out / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()


def test_numbers_that_make_no_sense_are_refused(tmp_path):
    source = write_folder(tmp_path / "model", PARAMS)
    for wrong, message in (
        ({"num_key_value_heads": 1.0}, r"num_key_value_heads \(1\.0\) must divide"),
        ({"to": "meta", "num_shards": 0}, "num_shards must be at least 1, got 0"),
        ({"max_shard_size": "0"}, "max_shard_size must be a number of bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(source, tmp_path / "out", **wrong)
    assert len(list(convert(source, tmp_path / "out", max_shard_size="40000").glob("*.safetensors"))) > 1
    with pytest.raises(ValueError, match="where must be a path or a name, got ''"):
        open_checkpoint("")


def test_gguf_to_hugging_face_to_meta_and_back(tmp_path):
    half = {name: array.astype(np.float16) if array.ndim == 2 else array for name, array in PARAMS.items()}
    source = write_gguf(tmp_path / "m.gguf", PARAMS, quantisation=gguf.GGMLQuantizationType.F16, extra=tokens)
    out = convert(source, tmp_path / "folder", verify=True)
    assert_equal(tensors_of(out), {name: torch.tensor(array) for name, array in half.items()})
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"  # though the norms are float32
    meta = convert(out, tmp_path / "meta", to="meta", verify=True)
    assert_equal(tensors_of(convert(meta, tmp_path / "again", verify=True)), tensors_of(out))


def tokens(writer):
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(ord("a") + i) for i in range(12)])
    writer.add_token_types([1] * 12)
    writer.add_token_merges([])


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "BF16"])
def test_quantised_weights_are_written_as_they_are_read(tmp_path, kind):
    source = write_gguf(tmp_path / "m.gguf", PARAMS, quantisation=gguf.GGMLQuantizationType[kind], extra=tokens)
    once, out = open_checkpoint(source), convert(source, tmp_path / "folder", verify=True)
    reread = open_checkpoint(out)
    assert reread.config == once.config
    assert reread.generation_config == once.generation_config
    assert reread.tokenizer()[1] == once.tokenizer()[1]
    for name in once.tensors:
        assert reread.read(name).dtype == once.read(name).dtype
        np.testing.assert_array_equal(reread.read(name), once.read(name))


def test_a_tied_head_stays_tied(tmp_path):
    fields = FIELDS | {"tie_word_embeddings": True}
    params = {name: array for name, array in PARAMS.items() if name != "lm_head.weight"}
    source = write_folder(tmp_path / "model", params, fields)
    for shards in (1, 2):
        meta = convert(source, tmp_path / f"meta{shards}", to="meta", num_shards=shards, verify=True)
        held = torch.load(meta / "consolidated.00.pth", weights_only=True)
        assert torch.equal(held["output.weight"], held["tok_embeddings.weight"])  # as in Meta's own files
        again = convert(meta, tmp_path / f"again{shards}", verify=True)
        assert json.loads((again / "config.json").read_text())["tie_word_embeddings"]
        assert_equal(tensors_of(again), {name: torch.tensor(array) for name, array in params.items()})


@pytest.mark.parametrize(
    ("said", "num_shards", "warning", "ends"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2}, 1, None, (1, 2)),
        (
            {"bos_token_id": 3, "eos_token_id": [2]},
            1,
            r"cannot store bos_token_id 3: .* bos_token_id 1 and eos",
            (1, 2),
        ),
        # with several shards, a tied model's embedding is split as in Llama 3
        ({}, 2, r"cannot store bos_token_id 1 and eos_token_id 2: .* eos_token_id None", (None, None)),
    ],
)
def test_ends_that_metas_layout_cannot_tell_are_named(tmp_path, said, num_shards, warning, ends):
    fields = FIELDS | {"tie_word_embeddings": True} | said
    source = write_folder(tmp_path / "model", random_params(fields), fields)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        meta = convert(source, tmp_path / "meta", to="meta", num_shards=num_shards)
    texts = [str(w.message) for w in given if "cannot store" in str(w.message)]
    length = [text for text in texts if "max_position_embeddings 32: without conversion.json" in text]
    assert len(length) == 1
    texts.remove(length[0])
    assert len(texts) == (warning is not None)
    assert warning is None or re.search(warning, texts[0])
    convert(meta, tmp_path / "back")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "back")
    assert (model.config.bos_token_id, model.config.eos_token_id) == ends
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == ends
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "back")
    assert (theirs.bos_token_id, theirs.eos_token_id) == ends


def test_a_head_that_is_the_embedding_is_written_as_tied_in_metas_layout(tmp_path):
    equal = PARAMS | {"lm_head.weight": PARAMS["model.embed_tokens.weight"]}
    source = write_folder(tmp_path / "model", equal)  # the configuration does not tie them
    (tmp_path / "meta" / "original").mkdir(parents=True)
    (tmp_path / "meta" / "original" / "params.json").write_text("{}")
    meta = convert(source, tmp_path / "meta", to="meta", verify=True, force=True)
    assert tensors_of(convert(meta, tmp_path / "again")).keys() == equal.keys() - {"lm_head.weight"}


def test_a_head_that_begins_as_the_embedding_is_its_own(tmp_path):
    fields = FIELDS | {"vocab_size": 32}
    params = random_params(fields)
    params["lm_head.weight"][:8] = params["model.embed_tokens.weight"][:8]  # as many rows as our reader compares
    out = convert(write_meta(tmp_path / "meta", params, fields, dtype=torch.float32), tmp_path / "out", verify=True)
    assert not json.loads((out / "config.json").read_text())["tie_word_embeddings"]
    model = transformers.LlamaForCausalLM.from_pretrained(out)
    assert_equal(dict(model.state_dict()), cast(params, torch.float32))
    with pytest.raises(ValueError, match="would be read as a model whose tie_word_embeddings is True"):
        convert(out, tmp_path / "back", to="meta")
    assert not (tmp_path / "back").exists()  # refused before anything was written


@pytest.mark.parametrize("verify", [False, True])
def test_metas_files_may_hold_biases(tmp_path, verify):
    source = write_meta(tmp_path / "meta", PARAMS)
    held = torch.load(source / "consolidated.00.pth", weights_only=True)
    for name in [name for name in held if ".attention.w" in name]:
        held[name.replace("weight", "bias")] = torch.randn(len(held[name])).half()
    torch.save(held, source / "consolidated.00.pth")
    out = convert(source, tmp_path / "out", verify=verify)
    assert torch.equal(tensors_of(out)["model.layers.1.self_attn.v_proj.bias"], held["layers.1.attention.wv.bias"])


PUBLISHED = {  # hidden_size, intermediate_size of Llama 1, 2, 3, 3.1 and 3.2, from the smallest to the largest
    "1B": (2048, 8192), "3B": (3072, 8192), "7B": (4096, 11008), "8B": (4096, 14336), "13B": (5120, 13824),
    "30B": (6656, 17920), "65B": (8192, 22016), "70B": (8192, 28672), "405B": (16384, 53248),
}  # fmt: skip


@pytest.mark.parametrize("size", [*PUBLISHED.values(), (64, 32), (576, 1536), (4096, 11007), (8, 1)])
def test_params_json_gives_the_width_by_metas_formula(tmp_path, size):
    width, wanted = size
    said = params_json(FIELDS | {"hidden_size": width, "intermediate_size": wanted}, tmp_path)
    found = intermediate_size(width, said["multiple_of"], said.get("ffn_dim_multiplier"))
    assert found == wanted


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', but in Meta's layout it can only be 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"head_dim": 8}, r"head_dim · num_attention_heads is 32"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_type is 'linear'.* can only be 'default' or 'llama3'",
        ),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}}, "low_freq_factor is 2.0"),
    ],
)
def test_what_metas_code_cannot_compute_is_refused(tmp_path, fields, message):
    fields = FIELDS | fields
    source = write_folder(tmp_path / "model", random_params(fields), fields)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", to="meta")
    assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out")  # Hugging Face's layout can store it


def test_shards_must_divide_the_heads(tmp_path):
    source = write_folder(tmp_path / "model", PARAMS)
    with pytest.raises(ValueError, match=r"num_shards \(3\) must divide .* tok_embeddings"):
        convert(source, tmp_path / "out", to="meta", num_shards=3)
    with pytest.raises(ValueError, match=r"num_shards \(8\) must divide"):
        convert(source, tmp_path / "out", to="meta", num_shards=8)


# --- requested changes ---


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_heads_are_pooled(tmp_path, heads):
    fields = MHA | {"attention_bias": True}
    params = random_params(fields)
    source = write_folder(tmp_path / "model", params, fields)
    save_file(cast(params, torch.bfloat16), source / "model.safetensors")
    out = convert(source, tmp_path / "out", num_key_value_heads=heads, verify=True)
    expected = cast(params, torch.bfloat16)
    for name, tensor in expected.items():
        if "k_proj" in name or "v_proj" in name:
            each = tensor.float().view(heads, 4 // heads, 16, *tensor.shape[1:])
            expected[name] = each.mean(1).flatten(0, 1).to(torch.bfloat16)
    assert_equal(tensors_of(out), expected)
    assert json.loads((out / "config.json").read_text())["num_key_value_heads"] == heads


def test_pooling_equal_heads_changes_no_answer(tmp_path):
    twice = lambda array: np.repeat(array.reshape(2, 16, -1), 2, 0).reshape(64, -1)  # noqa: E731
    repeated = {n: twice(a) if "k_proj" in n or "v_proj" in n else a for n, a in PARAMS.items()}
    pooled = convert(write_folder(tmp_path / "mha", repeated, MHA), tmp_path / "gqa", num_key_value_heads=2)
    ids = np.array([[1, 5, 7, 2]])
    logits = [reference.forward(*reference.load(folder), ids).logits for folder in (tmp_path / "mha", pooled)]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-5, atol=1e-5)
    assert_equal(tensors_of(pooled), {name: torch.tensor(array) for name, array in PARAMS.items()})


@pytest.mark.parametrize("heads", [3, 0, 8])
def test_heads_that_do_not_divide_are_refused(tmp_path, heads):
    source = write_folder(tmp_path / "model", random_params(MHA), MHA)
    with pytest.raises(ValueError, match=rf"num_key_value_heads \({heads}\) must divide the 4 key and value heads"):
        convert(source, tmp_path / "out", num_key_value_heads=heads)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_weights_are_cast(tmp_path, dtype):
    source = write_meta(tmp_path / "meta", PARAMS, dtype=torch.float32)
    out = convert(source, tmp_path / "out", dtype=dtype, verify=True)
    assert_equal(tensors_of(out), cast(PARAMS, getattr(torch, dtype)))
    assert transformers.AutoConfig.from_pretrained(out).dtype == getattr(torch, dtype)


def test_the_dtype_of_the_source_is_forgotten(tmp_path):
    write_folder(tmp_path / "model", PARAMS, FIELDS | {"dtype": "float32"})  # the name that transformers 5 uses
    out = convert(tmp_path / "model", tmp_path / "out", dtype="bfloat16")
    assert transformers.LlamaForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("number", "stored", "dtype", "way_out"),
    [
        (1e5, np.float32, "float16", "choose --dtype bfloat16 or float32"),
        (3.4e38, np.float32, "bfloat16", "choose --dtype float32"),
        (1e300, np.float64, "float32", "leave --dtype out"),
    ],
)
def test_a_cast_that_loses_numbers_is_refused(tmp_path, number, stored, dtype, way_out):
    large = np.array([number, np.nan, np.inf] + [1.0] * 61, stored)  # a cast preserves NaN and infinity
    source = write_folder(tmp_path / "model", PARAMS | {"model.norm.weight": large})
    with pytest.raises(ValueError, match=rf"model\.norm\.weight holds numbers too large for {dtype}; {way_out}"):
        convert(source, tmp_path / "out", dtype=dtype)
    assert not (tmp_path / "out" / "config.json").exists()
    large[0] = 1
    write_folder(source, PARAMS | {"model.norm.weight": large})
    assert convert(source, tmp_path / "out", dtype=dtype)


# --- the files ---


# The model has 21 tensors of at most 16 KiB, 155 KB in all.
@pytest.mark.parametrize(("limit", "files"), [("5GB", 1), ("40KB", 5), (1, 21)])
def test_files_are_cut_and_called_as_transformers_does(tmp_path, limit, files):
    source = write_folder(tmp_path / "model", PARAMS)
    out = convert(source, tmp_path / "out", max_shard_size=limit)
    names = sorted(path.name for path in out.glob("*.safetensors"))
    theirs = transformers.LlamaForCausalLM.from_pretrained(source)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=limit)
    assert names == sorted(path.name for path in (tmp_path / "theirs").glob("*.safetensors"))
    assert len(names) == files
    assert_equal(tensors_of(out), tensors_of(tmp_path / "theirs"))
    for name in names:
        with open(out / name, "rb") as file:
            assert struct.unpack("<Q", file.read(8))[0] % 8 == 0
        with safe_open(out / name, "numpy") as file:
            assert file.metadata() == {"format": "pt"}  # transformers 4 requires it
    if files > 1:
        ours, index = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (out, tmp_path / "theirs"))
        assert ours["metadata"] == index["metadata"]
        assert ours["weight_map"].keys() == index["weight_map"].keys()


def test_types_of_different_sizes_lie_aligned(tmp_path):
    tensors = {"odd": np.ones(3, ml_dtypes.bfloat16), "wide": np.ones(2, np.float64), "usual": np.ones(5, np.float32)}
    planned = {name: Stored(array.dtype, array.shape) for name, array in tensors.items()}
    write_file(tmp_path, OutFile("model.safetensors", planned, tensors.__getitem__, safetensors), lambda n: None)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    for name, told in json.loads(data[8 : 8 + length]).items():
        assert name == "__metadata__" or (8 + length + told["data_offsets"][0]) % tensors[name].itemsize == 0

    source = write_folder(tmp_path / "model", PARAMS)
    odd = cast(PARAMS, torch.float32) | {"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}
    save_file(odd, source / "model.safetensors")
    out = convert(source, tmp_path / "out", verify=True)
    assert_equal(tensors_of(out), odd)
    assert all(open_checkpoint(out).read(name).base is not None for name in odd)  # mapped, which requires alignment


def test_the_tokenizer_keeps_its_prefix_space(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_models.llama_like())
    fields = FIELDS | {"vocab_size": 2000}
    source = write_meta(tmp_path / "7B", random_params(fields), fields)
    out = convert(source, tmp_path / "out")
    assert (out / "tokenizer.model").read_bytes() == sentencepiece_models.llama_like()
    before, after = LlamaTokenizer.from_pretrained(tmp_path), transformers.AutoTokenizer.from_pretrained(out)
    for text in ("Hello this is a test", "  two spaces", "a\n\nb c", "naïve 日本"):
        assert after.encode(text) == before.encode(text)
        assert after.decode(after.encode(text), skip_special_tokens=True) == text
    (tmp_path / "tokenizer.model").unlink()  # on the way back it comes from the folder
    assert (convert(out, tmp_path / "back", to="meta") / "tokenizer.model").exists()


def test_a_folders_own_tokenizer_files_are_kept(tmp_path, smollm2):
    source = write_folder(tmp_path / "model", PARAMS)
    written = {"tokenizer.json": (smollm2 / "tokenizer.json").read_bytes(), "special_tokens_map.json": b"{}\n",
               "tokenizer_config.json": b'{"model_max_length":   7}', "chat_template.jinja": b"{{ 1 }}",
               "additional_chat_templates/tools.jinja": b"{{ 2 }}"}  # fmt: skip
    (source / "additional_chat_templates").mkdir()
    for name, contents in written.items():
        (source / name).write_bytes(contents)
    out = convert(source, tmp_path / "out")
    assert {name: (out / name).read_bytes() for name in written} == written
    convert(write_folder(tmp_path / "other", PARAMS), out, force=True)
    assert not any((out / name).exists() for name in written)  # they belonged to the other model


def test_without_a_tokenizer_that_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"no tokenizer is written: .*tokenizer\.model does not exist"):
        convert(write_meta(tmp_path / "meta", PARAMS), tmp_path / "out")
    with pytest.warns(UserWarning, match=r"no tokenizer is written: .*tokenizer\.model does not exist"):
        convert(tmp_path / "out", tmp_path / "back", to="meta")
    with pytest.warns(UserWarning, match=r"no tokenizer is written: .*model\.gguf holds no tokenizer"):
        convert(write_gguf(tmp_path / "model.gguf", PARAMS), tmp_path / "from_gguf")


def test_what_is_no_float_is_refused(tmp_path):
    source = write_folder(tmp_path / "model", PARAMS | {"model.norm.weight": np.ones(64, np.int32)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as int32; supported: float64, float32"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("shape", [(0, 2**62, 2**62), (1,) * 65])
def test_shapes_that_cannot_be_are_named(tmp_path, shape):
    class Absurd(HuggingFaceFolder):
        @property
        def tensors(self):
            return super().tensors | {"model.norm.weight": Stored(np.dtype(np.float32), shape)}

    with pytest.raises(ValueError, match=r"model: model\.norm\.weight cannot have the shape"):
        convert(Absurd(write_folder(tmp_path / "model", PARAMS)), tmp_path / "out")


def test_a_base_model_is_called_one(tmp_path):
    source = write_folder(tmp_path / "model", {n.removeprefix("model."): a for n, a in PARAMS.items() if "lm" not in n})
    with pytest.raises(ValueError, match=r"model holds a base model, without .*; save it as a LlamaForCausalLM first"):
        convert(source, tmp_path / "out")


@pytest.mark.parametrize("kind", ["folder", "meta", "gguf"])
def test_a_model_in_memory_is_no_part_of_its_files(tmp_path, kind):
    with_tokens = lambda path, params: write_gguf(path, params, extra=tokens)  # noqa: E731
    places = {"folder": write_folder, "meta": write_meta, "gguf": with_tokens}
    source = open_checkpoint(places[kind](tmp_path / f"source.{kind}", PARAMS))
    norm = source.read("model.norm.weight")
    norm.fill(7)  # as training would in a model that shares its memory
    out = open_checkpoint(convert(source, tmp_path / "out", verify=True))
    np.testing.assert_array_equal(out.read("model.norm.weight"), PARAMS["model.norm.weight"].astype(norm.dtype))
    assert (norm == 7).all()


# --- in bounded memory ---


def test_no_more_than_a_few_tensors_are_in_memory(tmp_path):
    fields = FIELDS | {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4, "vocab_size": 4096,
                       "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip
    template = random_params(fields | {"num_hidden_layers": 1})
    params = {name.replace(".0.", f".{i}."): array for name, array in template.items() for i in range(4)}
    source = write_meta(tmp_path / "meta", params, fields, shards=2, dtype=torch.float32)
    total, largest = sum(a.nbytes for a in params.values()), max(a.nbytes for a in params.values())
    assert total > 16 * largest
    write_meta(tmp_path / "small", PARAMS, shards=2, dtype=torch.float32)

    def peak(where, out, *more):
        """Return the peak resident memory in bytes of a child of a small process, so as not to inherit ours."""
        measure = (
            "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, capture_output=True);"
            "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
        )
        command = [
            sys.executable,
            "-c",
            measure,
            sys.executable,
            "-m",
            "llama",
            "convert",
            where,
            tmp_path / out,
            *more,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout) * (1 if sys.platform == "darwin" else 1024)

    small = peak(tmp_path / "small", "a")
    for number, more in enumerate([(), ("--verify",), ("--to", "meta", "--num-shards", "2"), ("--dtype", "bfloat16")]):
        assert peak(source, f"b{number}", *more) - small < 4 * largest + 40e6 < total / 2, more


# --- refusals ---


def test_another_model_in_the_folder_is_kept_unless_force(tmp_path):
    source, out = (
        write_folder(tmp_path / "model", PARAMS),
        write_folder(tmp_path / "out", random_params(seed=1), shards=3),
    )
    (out / "README.md").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match=r"out holds something other than a conversion of this source; .* --force"):
        convert(source, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    convert(source, out, force=True)
    assert_equal(tensors_of(out), {name: torch.tensor(array) for name, array in PARAMS.items()})
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "conversion.json",
                                                          "model.safetensors"]  # fmt: skip


def test_other_settings_and_other_sources_are_refused_unless_force(tmp_path):
    source, out = write_folder(tmp_path / "model", PARAMS), tmp_path / "out"
    convert(source, out)
    with pytest.raises(ValueError, match=r"out holds a conversion without --dtype; choose another folder"):
        convert(source, out, dtype="bfloat16")
    convert(source, out, dtype="bfloat16", force=True)
    assert_equal(tensors_of(out), cast(PARAMS, torch.bfloat16))
    write_folder(source, random_params(seed=1))
    with pytest.raises(ValueError, match="of another source, or of this one before it changed"):
        convert(source, out, dtype="bfloat16")


def test_two_models_in_a_folder_are_two_sources(tmp_path):
    source, out = write_folder(tmp_path / "model", PARAMS), tmp_path / "out"
    save_file(cast(random_params(seed=1), torch.float32), source / "b.safetensors")
    (source / "model.safetensors").rename(source / "a.safetensors")
    convert(source / "a.safetensors", out)
    with pytest.raises(ValueError, match="a conversion of another source"):
        convert(source / "b.safetensors", out)
    convert(source / "b.safetensors", out, force=True)
    assert_equal(tensors_of(out), cast(random_params(seed=1), torch.float32))


@pytest.mark.parametrize("limits", [("5GB", "5GB"), ("5GB", "40KB"), ("40KB", "5GB"), ("40KB", "40KB")])
def test_what_was_trained_since_is_kept_unless_force(tmp_path, limits):
    source, out = write_folder(tmp_path / "model", PARAMS), tmp_path / "out"
    convert(source, out, max_shard_size=limits[0])
    model = LlamaForCausalLM.from_pretrained(out)
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.save_pretrained(out, max_shard_size=limits[1])
    with pytest.raises(ValueError, match=r"out\S+ is missing or was changed .* --force"):
        convert(source, out, max_shard_size=limits[0])
    assert torch.equal(tensors_of(out)["model.norm.weight"], model.model.norm.weight)
    convert(source, out, max_shard_size=limits[0], force=True)
    assert_equal(tensors_of(out), cast(PARAMS, torch.float32))


class Interrupted(HuggingFaceFolder):
    def read(self, name):
        raise KeyboardInterrupt


@pytest.mark.parametrize("to", ["huggingface", "meta"])
def test_a_finished_conversion_is_left_as_it_is_unless_force(tmp_path, to):
    source = write_folder(tmp_path / "model", PARAMS)
    (source / "tokenizer.model").write_bytes(sentencepiece_models.llama_like())
    options = {"to": to} if to == "meta" else {"max_shard_size": "80KB"}
    out = convert(source, tmp_path / "out", **options)
    made = {path.name: path.read_bytes() for path in out.iterdir()}
    config, index = ("params.json", "tokenizer.model") if to == "meta" else ("config.json", f"{WEIGHTS}.index.json")
    edited = json.dumps(json.loads(made[config]) | {"edited": True}).encode()
    (out / config).write_bytes(edited)
    before = {path.name: path.stat() for path in out.iterdir()}
    convert(source, out, verify=True, **options)
    assert {path.name: path.stat() for path in out.iterdir()} == before
    with pytest.raises(KeyboardInterrupt):
        convert(Interrupted(source), out, verify=True, **options)
    assert {path.name: path.stat() for path in out.iterdir()} == before
    (out / index).unlink()
    convert(source, out, **options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == made | {config: edited}
    convert(source, out, force=True, **options)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == made


def test_a_chat_template_that_changed_makes_another_source(tmp_path):
    source, out = write_folder(tmp_path / "model", PARAMS), tmp_path / "out"
    (source / "chat_template.jinja").write_text("{{ 1 }}")
    convert(source, out)
    (source / "chat_template.jinja").write_text("{{ 22 }}")
    with pytest.raises(ValueError, match="a conversion of another source, or of this one before it changed"):
        convert(source, out)


@pytest.mark.parametrize("contents", ["{", "[]", '{"sha256": null}', '{"sha256": {"model.safetensors": 1}}'])
def test_a_broken_manifest_is_no_conversion(tmp_path, contents):
    source, out = write_folder(tmp_path / "model", PARAMS), tmp_path / "out"
    convert(source, out)
    manifest = json.loads((out / "conversion.json").read_text())
    if "null" in contents:
        contents = json.dumps(manifest | {"sha256": None})
    (out / "conversion.json").write_text(contents)
    with pytest.raises(ValueError, match=r"out holds something other than a conversion of this source; .* --force"):
        convert(source, out)
    convert(source, out, force=True)
    assert json.loads((out / "conversion.json").read_text()) == manifest


def test_only_files_of_the_conversion_are_taken_away(tmp_path):
    source = write_folder(tmp_path / "model", PARAMS)
    out = write_folder(tmp_path / "out", random_params(seed=1))
    (out / "holiday.mkv.partial").write_text("mine")
    (out / ".partial").mkdir()  # left by a save_pretrained that was killed
    (out / "model.safetensors.partial").write_text("ours")
    (out / "tokenizer.json").symlink_to(tmp_path / "gone")
    convert(source, out, force=True)
    assert sorted(path.name for path in out.iterdir()) == [
        ".partial", "config.json", "conversion.json", "holiday.mkv.partial", "model.safetensors"
    ]  # fmt: skip


def test_a_finished_model_stays_whole_while_it_is_looked_at_again(tmp_path, monkeypatch):
    source, out = write_folder(tmp_path / "model", PARAMS), tmp_path / "out"
    convert(source, out)
    (out / "chat_template.jinja").write_text("mine")
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "_digest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out)
    for _ in range(2):
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        convert(source, out)


def test_what_is_open_cannot_be_removed_on_windows(tmp_path, monkeypatch):
    source, real, tried = write_folder(tmp_path / "model", PARAMS), os.unlink, []

    def unlink(path, **options):
        if str(path).endswith(".lock") and not tried:
            tried.append(path)
            raise PermissionError(13, "it is in use", str(path))
        real(path, **options)

    monkeypatch.setattr(os, "unlink", unlink)
    out = convert(source, tmp_path / "out")
    assert tried
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "conversion.json", "model.safetensors"]


def test_places_that_cannot_be_are_refused(tmp_path):
    source = write_folder(tmp_path / "model", PARAMS)
    with pytest.raises(ValueError, match="contains the source"):
        convert(source, source, force=True)
    with pytest.raises(ValueError, match="contains the source"):
        convert(source, tmp_path, force=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; name a folder"):
        convert(source, tmp_path / "file")
    with pytest.raises(ValueError, match="to must be one of huggingface, meta, got 'gguf'"):
        convert(source, tmp_path / "out", to="gguf")
    with pytest.raises(ValueError, match=r'max_shard_size must be a number of bytes, or a string like "200MB"'):
        convert(source, tmp_path / "out", max_shard_size="5 bananas")


def test_no_room_is_known_before_anything_is_written(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "model", PARAMS)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=50_000))
    with pytest.raises(OSError, match=r"out has 50\.0 KB free, but 154\.9 KB are needed; make room"):
        convert(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- the command line ---


def llama(*arguments, **options):
    command = [sys.executable, "-m", "llama", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_the_documents_own_line_works(tmp_path):
    write_meta(tmp_path / "in" / "7B", PARAMS, dtype=torch.bfloat16)
    (tmp_path / "in" / "tokenizer.model").write_bytes(sentencepiece_models.llama_like())
    said = ("--input_dir", tmp_path / "in", "--model_size", "7B", "--output_dir", tmp_path / "out")
    small = "import llama.checkpoints.meta as meta; meta.SIZES['7B'] = 38_720e-9, 1; from llama.cli import main; main()"
    command = [sys.executable, "-c", small, "convert", *map(str, said)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'out'}\n", "")
    assert_equal(tensors_of(tmp_path / "out"), cast(PARAMS, torch.bfloat16))
    hyphens = ("--input-dir", tmp_path / "in", "--num-shards", "1", "--output-dir", tmp_path / "out2", "--verify",
               "--llama-version", "2", "--safe_serialization")  # fmt: skip
    assert llama("convert", *hyphens).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{meta}"], 2, "give WHERE and OUT, or --input-dir and --output-dir"),
        (["{meta}", "{out}", "--output_dir", "{out}"], 2, "give WHERE and OUT"),
        (["{meta}", "{out}", "--model_size", "13B"], 1, "holds 1 shard; model_size 13B means 2"),
        (["{meta}", "{out}", "--num_shards", "4"], 1, "holds 1 shard; num_shards 4 means 4"),
        (["{meta}", "{out}", "--llama_version", "3.1"], 1, "not 3.1; correct llama_version"),
        (["{meta}", "{out}", "--safe_serialization", "False"], 2, "leave --safe-serialization out"),
        (["{meta}", "{meta}"], 1, "contains the source"),
        (["{meta}/nowhere", "{out}"], 1, "nowhere does not exist"),
        (
            ["{meta}", "/proc/out"],
            1,
            "llama: /proc/out cannot be created (No such file or directory); choose another folder",
        ),
        (["{meta}/params.json", "{out}"], 1, "params.json"),
    ],
)
def test_mistakes_on_the_command_line_are_named(tmp_path, arguments, code, message):
    meta = write_meta(tmp_path / "meta", PARAMS, said={"use_scaled_rope": False})
    done = llama("convert", *(argument.format(meta=meta, out=tmp_path / "out") for argument in arguments))
    assert done.returncode == code
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_person_sees_how_far_it_is(tmp_path):
    from test_cli import LLAMA, Terminal

    source = write_meta(tmp_path / "meta", PARAMS)
    terminal = Terminal(*LLAMA, "convert", str(source), str(tmp_path / "out"), "--verify")
    terminal.until(r"converting: .*B/s")
    terminal.until(r"verifying: .*B/s")
    assert terminal.ends() == 0
