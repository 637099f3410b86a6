"""Reading and writing checkpoints: every format yields the same arrays, and errors name what is damaged."""

import json
import os
import re
import stat
import struct
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest
import torch
from checkpoint_files import FIELDS, random_params, write_folder, write_gguf
from meta_files import write_meta
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from transformers import LlamaForCausalLM

import llama
from llama import reference
from llama.checkpoints import open_checkpoint
from llama.checkpoints.stored import release
from llama.checkpoints.torch_files import as_torch

PARAMS = random_params()
IDS = np.array([[1, 5, 7, 2]])


def assert_same(params, expected=PARAMS):
    assert params.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(params[name], array, err_msg=name)


@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_gives_its_tensors(tmp_path, shards):
    params, config = reference.load(write_folder(tmp_path, PARAMS, shards=shards))
    assert_same(params)
    assert config == reference.Config.from_dict(FIELDS)
    assert reference.load(tmp_path, dtype=np.float64)[0]["model.norm.weight"].dtype == np.float64


def test_stored_tensors_are_mapped_not_copied(tmp_path):
    params, _ = reference.load(write_folder(tmp_path, PARAMS))
    assert not any(array.flags.owndata or array.flags.writeable for array in params.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_float_types_are_read(tmp_path, dtype):
    write_folder(tmp_path, PARAMS)
    stored = {name: torch.tensor(array).to(dtype) for name, array in PARAMS.items()}
    save_torch(stored, tmp_path / "model.safetensors")
    assert_same(reference.load(tmp_path)[0], {name: tensor.float().numpy() for name, tensor in stored.items()})


def test_what_transformers_saves_is_loaded(tmp_path):
    from oracle import miss, transformers_model

    model, params = transformers_model(FIELDS, 3)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded, config = reference.load(tmp_path)
    assert_same(loaded, params)
    with torch.no_grad():
        assert miss(reference.forward(loaded, config, IDS).logits, model(torch.tensor(IDS)).logits.numpy()) < 1e-4


@pytest.mark.parametrize("quantisation", ["F32", "F16", "Q8_0", "Q4_1", "BF16"])
def test_gguf_weights_are_dequantised_and_unpermuted(tmp_path, quantisation):
    kind = gguf.GGMLQuantizationType[quantisation]
    params, config = reference.load(write_gguf(tmp_path / "m.gguf", PARAMS, quantisation=kind))
    assert config == reference.Config.from_dict(FIELDS | {"bos_token_id": None, "eos_token_id": None, "head_dim": 16})
    # Half a quantisation step: 8 or 4 bits over ±4, or the 11 and 8 bits of precision of float16 and bfloat16.
    step = {"F32": 0, "F16": 2e-3, "Q8_0": 2e-2, "Q4_1": 0.3, "BF16": 2e-2}[quantisation]
    for name, array in PARAMS.items():
        np.testing.assert_allclose(params[name], array, atol=step, rtol=0, err_msg=name)


@pytest.mark.parametrize("quantisation", ["F32", "F16", "BF16", "Q8_0"])
def test_what_is_not_quantised_keeps_its_precision(tmp_path, quantisation):
    path = write_gguf(tmp_path / "m.gguf", PARAMS, quantisation=gguf.GGMLQuantizationType[quantisation])
    kept = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "Q8_0": np.float32}[quantisation]
    checkpoint = open_checkpoint(path)
    for name, expected in PARAMS.items():
        dtype = kept if expected.ndim == 2 else np.float32
        array = checkpoint.read(name)
        assert checkpoint.tensors[name] == (np.dtype(dtype), expected.shape) == (array.dtype, array.shape)
        if quantisation != "Q8_0":
            np.testing.assert_array_equal(array, expected.astype(dtype))
    assert checkpoint.config["torch_dtype"] == np.dtype(kept).name
    assert llama.LlamaForCausalLM.from_pretrained(path).dtype == getattr(torch, np.dtype(kept).name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "bool"])
def test_pytorch_gets_the_same_numbers_and_the_same_memory(dtype):
    array = np.arange(6).reshape(2, 3).astype(getattr(ml_dtypes, dtype, dtype))
    tensor = as_torch(array)
    assert tensor.dtype == getattr(torch, dtype)
    np.testing.assert_array_equal(tensor.float().numpy(), array.astype(np.float32))
    tensor[0, 1] = 0
    assert array[0, 1] == 0
    array.flags.writeable = False
    as_torch(array)[0, 2] = 0
    assert array[0, 2] != 0


def test_a_file_larger_than_the_memory_is_mapped(tmp_path):
    size = 2**41  # a sparse file of two terabytes
    text = json.dumps({"a": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "config.json").write_text("{}")
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
    array = open_checkpoint(tmp_path).read("a")
    assert array.flags.writeable
    assert array[-1] == 0
    as_torch(array)[5] = 1
    assert array[5] == 1


def resident(array) -> int:
    """Return the resident bytes of the mapping that holds `array`."""
    start, here = np.lib.array_utils.byte_bounds(array)[0], False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            low, high = (int(end, 16) for end in line.split()[0].split("-"))
            here = low <= start < high
        elif here and line.startswith("Rss:"):
            return int(line.split()[1]) << 10
    raise AssertionError("the array is not memory-mapped")


def test_memory_is_let_go_of_when_a_tensor_has_been_used(tmp_path):
    big = np.arange(1 << 21, dtype=np.float32)
    save_file({"a": big, "b": big}, tmp_path / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "model.safetensors")
    a, b = checkpoint.read("a"), checkpoint.read("b")
    assert a.sum() == b.sum()
    assert resident(a) >= 2 * big.nbytes
    b[0] = -1  # on the page where a ends
    release(a)
    assert b[0] == -1
    assert big.nbytes * 0.9 < resident(a) < big.nbytes * 1.1  # b's
    np.testing.assert_array_equal(a, big)
    release(big)  # not memory-mapped: a no-op
    assert big[-1] == len(big) - 1


def in_memory(folder):
    """Return the resident bytes of the memory-mapped files in a folder."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            ours = str(folder) in line
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize("layout", ["Q8_0", "F16", "meta", "meta, one head"])
def test_reading_tensor_by_tensor_does_not_fill_the_memory(tmp_path, layout):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1 if "one head" in layout else 2}
    fields = FIELDS | {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 1} | heads
    params = {n: np.ones(s, np.float32) for n, s in reference.parameter_shapes(reference.Config.from_dict(fields))}
    if layout.startswith("meta"):
        where = write_meta(tmp_path, params, fields, shards=4)
    else:
        where = write_gguf(tmp_path / "m.gguf", params, fields, gguf.GGMLQuantizationType[layout])
    size = sum(path.stat().st_size for path in tmp_path.iterdir())
    checkpoint = open_checkpoint(where)
    for name in checkpoint.tensors:
        array = checkpoint.read(name)
        release(array)
        del array
    assert in_memory(tmp_path) < size / 4


def test_llama31s_divisors_come_through_gguf(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
    config = reference.Config.from_dict(FIELDS | {"rope_scaling": scaling})
    plain, _ = reference.rope_frequencies(reference.Config.from_dict(FIELDS))
    expected, _ = reference.rope_frequencies(config)
    divisors = (plain / expected).astype(np.float32)
    extra = lambda writer: writer.add_tensor("rope_freqs.weight", divisors)  # noqa: E731
    _, loaded = reference.load(write_gguf(tmp_path / "m.gguf", PARAMS, extra=extra))
    for length in (1, 1000):
        frequencies, factor = reference.rope_frequencies(loaded, length)
        np.testing.assert_allclose(frequencies, expected, rtol=1e-6)
        assert factor == 1.0
    assert not loaded.angles_follow_length  # both factor lists are equal, so chunked prefill and cached chats work


@pytest.mark.parametrize(("factor", "theta"), [(8.0, 500000.0), (32.0, 500000.0), (8.0, 10000.0)])
def test_llama31s_own_divisors_are_its_rope_again(tmp_path, factor, theta):
    scaling = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    fields = FIELDS | {"rope_theta": theta, "max_position_embeddings": 131072}
    config = reference.Config.from_dict(fields | {"rope_scaling": scaling})
    plain, _ = reference.rope_frequencies(reference.Config.from_dict(fields))
    divisors = (plain / reference.rope_frequencies(config)[0]).astype(np.float32)
    extra = lambda writer: writer.add_tensor("rope_freqs.weight", divisors)  # noqa: E731
    _, loaded = reference.load(write_gguf(tmp_path / "m.gguf", PARAMS, fields, extra=extra))
    assert loaded.rope_parameters == config.rope_parameters
    ones = lambda writer: writer.add_tensor("rope_freqs.weight", np.ones_like(divisors))  # noqa: E731
    _, loaded = reference.load(write_gguf(tmp_path / "ones.gguf", PARAMS, fields, extra=ones))
    assert loaded.rope_parameters["rope_type"] == "default"


def test_tensors_that_overlap_are_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", PARAMS)
    reader = gguf.GGUFReader(path, "r+")
    moved = next(tensor for tensor in reader.tensors if tensor.name == "output_norm.weight")
    moved.field.parts[-1][0] = 0
    reader.data.flush()
    with pytest.raises(ValueError, match=r"m\.gguf is damaged: \S+ overlaps another tensor"):
        open_checkpoint(path)


LINEAR, YARN = gguf.RopeScalingType.LINEAR, gguf.RopeScalingType.YARN


@pytest.mark.parametrize(
    ("says", "means"),
    [
        ({"type": LINEAR, "factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),  # llama.cpp treats a missing type as linear
        ({"type": gguf.RopeScalingType.NONE, "factor": 4.0}, {"rope_type": "default"}),
        ({"type": YARN, "factor": 4.0, "original": 8, "beta": 16.0},
         {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "beta_fast": 16.0}),
        ({"type": gguf.RopeScalingType.LONGROPE, "factor": 4.0}, "'longrope' is unknown"),
        ({"type": YARN, "factor": 4.0}, "lacks the field llama.rope.scaling.original_context_length"),
        ({"type": LINEAR, "factor": 4.0, "attn": 0.5}, "attn_factor other than 1"),
        ({"dimensions": 8}, "dimension_count must be the head's 16"),
    ],
)  # fmt: skip
def test_rope_comes_through_gguf(tmp_path, says, means):
    def extra(writer):
        for key, write in (
            ("type", writer.add_rope_scaling_type),
            ("factor", writer.add_rope_scaling_factor),
            ("original", writer.add_rope_scaling_orig_ctx_len),
            ("beta", lambda value: writer.add_float32("llama.rope.scaling.yarn_beta_fast", value)),
            ("attn", lambda value: writer.add_float32("llama.rope.scaling.attn_factor", value)),
            ("dimensions", writer.add_rope_dimension_count),
        ):
            if key in says:
                write(says[key])

    path = write_gguf(tmp_path / "m.gguf", PARAMS, extra=extra)
    if not isinstance(means, str):
        spelt = open_checkpoint(path).config  # transformers 4 reads rope_scaling, transformers 5 rope_parameters
        assert spelt["rope_parameters"] == {"rope_theta": 500.0} | (spelt["rope_scaling"] or {"rope_type": "default"})
    if isinstance(means, str):
        with pytest.raises(ValueError, match=means):
            reference.load(path)
    else:
        assert reference.load(path)[1].rope_parameters == means | {"rope_theta": 500.0}


def test_a_head_in_the_file_outweighs_the_tie(tmp_path):
    fields = FIELDS | {"tie_word_embeddings": True}
    own_head, equal_head = PARAMS, PARAMS | {"lm_head.weight": PARAMS["model.embed_tokens.weight"].copy()}
    params, config = reference.load(write_folder(tmp_path / "equal", equal_head, fields))
    assert config.tie_word_embeddings
    assert "lm_head.weight" not in params
    with pytest.warns(UserWarning, match=r"lm_head\.weight differs from the embedding"):
        params, config = reference.load(write_folder(tmp_path / "own", own_head, fields))
    from oracle import miss

    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "own")
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS)).logits.numpy()
    assert miss(reference.forward(params, config, IDS).logits, expected) < 1e-4


def test_unaligned_tensors_are_aligned(tmp_path):
    write_folder(tmp_path, PARAMS)
    data = (tmp_path / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", length + 1) + data[8 : 8 + length] + b" " + data[8 + length :]
    )
    params, _ = reference.load(tmp_path)
    assert all(array.flags.aligned for array in params.values())
    assert_same(params)


def test_the_reference_computes_in_float32_and_float64_only(tmp_path):
    with pytest.raises(ValueError, match="dtype must be float32 or float64"):
        reference.load(write_folder(tmp_path, PARAMS), dtype=np.float16)


def test_a_tensor_nobody_uses_is_mentioned(tmp_path):
    write_folder(tmp_path, PARAMS | {"model.extra.weight": np.ones(3, np.float32)})
    with pytest.warns(UserWarning, match=r"1 tensors are not used, among them model\.extra\.weight"):
        reference.load(tmp_path)
    write_folder(tmp_path, PARAMS | {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)})
    assert_same(reference.load(tmp_path)[0])  # found in old checkpoints: no warning


def test_a_classifier_is_loaded_with_its_score_and_without_a_head(tmp_path):
    params = {name: array for name, array in PARAMS.items() if name != "lm_head.weight"}
    params["score.weight"] = np.ones((3, 64), np.float32)
    loaded, config = reference.load(
        write_folder(tmp_path, params, FIELDS | {"id2label": {"0": "a", "1": "b", "2": "c"}})
    )
    assert_same(loaded, params)
    assert reference.classify(loaded, config, IDS).shape == (1, 3)


def test_one_file_goes_before_an_index(tmp_path):
    write_folder(tmp_path, PARAMS)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone.safetensors"}}')
    assert_same(reference.load(tmp_path)[0])


def test_a_folder_called_like_the_alias_goes_before_it(tmp_path, monkeypatch):
    write_folder(tmp_path / "smollm2", PARAMS)
    monkeypatch.chdir(tmp_path)
    assert_same(reference.load("smollm2")[0])


def test_everything_a_gguf_says_of_the_model_is_heard(tmp_path):
    fields = FIELDS | {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 8}
    params = random_params(fields)

    def extra(writer):
        writer.add_key_length(8)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_pad_token_id(3)

    loaded, config = reference.load(write_gguf(tmp_path / "m.gguf", params, fields, extra=extra))
    assert_same(loaded, params)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3}
    assert config == reference.Config.from_dict(fields | ids)
    assert open_checkpoint(tmp_path / "m.gguf").generation_config == ids


def without(*methods):
    """Return a function that writes a GGUF file with the given methods of its writer disabled."""

    def write(path):
        class Partial(gguf.GGUFWriter):
            pass

        for method in methods:
            setattr(Partial, method, lambda *arguments, **options: None)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gguf, "GGUFWriter", Partial)
            return write_gguf(path, PARAMS)

    return write


def saying(method, *values):
    return lambda path: write_gguf(path, PARAMS, extra=lambda writer: getattr(writer, method)(*values))


def missing(name):
    return lambda path: write_gguf(path, {n: a for n, a in PARAMS.items() if n != name})


def odd_rows(path):
    name = "model.layers.0.self_attn.q_proj.weight"
    rows = np.ones((57, 64), np.float32)
    others = {n: a for n, a in PARAMS.items() if n != name}
    return write_gguf(path, others, extra=lambda writer: writer.add_tensor("blk.0.attn_q.weight", rows))


GGUF_DAMAGE = {
    "rows that make no heads": (odd_rows, r"blk\.0\.attn_q\.weight has 57 rows"),
    "no width": (without("add_embedding_length"), "lacks the field llama.embedding_length"),
    "no layers": (without("add_block_count"), "lacks the field llama.block_count"),
    "no embedding": (missing("model.embed_tokens.weight"), "lacks the tensor token_embd.weight"),
    "no block tensor": (missing("model.layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up_proj\.weight is missing"),
    "linear without factor": (saying("add_rope_scaling_type", gguf.RopeScalingType.LINEAR), r"\['factor'\] must be"),
    "an odd width": (saying("add_key_length", 15), "head_dim must be even"),
}


@pytest.mark.parametrize("damage", GGUF_DAMAGE)
def test_a_gguf_that_lacks_something_is_named(tmp_path, damage):
    write, message = GGUF_DAMAGE[damage]
    with pytest.raises(ValueError, match=message) as caught:
        reference.load(write(tmp_path / "m.gguf"))
    assert "m.gguf" in str(caught.value)


def test_heads_that_differ_by_layer_are_refused(tmp_path):
    path = without("add_head_count_kv")(tmp_path / "mha.gguf")
    with pytest.raises(ValueError, match=r"k_proj\.weight has shape \(32, 64\).*asks for \(64, 64\)"):
        reference.load(path)  # without the field, every head has its own keys
    with pytest.MonkeyPatch.context() as patch:
        told = gguf.GGUFWriter.add_head_count_kv
        patch.setattr(gguf.GGUFWriter, "add_head_count_kv", lambda writer, count: told(writer, [2, 1]))
        path = write_gguf(tmp_path / "layers.gguf", PARAMS)
    with pytest.raises(ValueError, match=r"attention\.head_count_kv differs by layer"):
        reference.load(path)


# --- damage ---


def edit_index(folder, change):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def header(path, change):
    """Rewrite a safetensors header."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    head = json.loads(data[8 : 8 + length])
    change(head)
    text = json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def put(name, data):
    """Return a damage that replaces a file's content by `data`."""
    return lambda folder: (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)


def keep(part):
    """Return a damage that keeps only a slice of the weight file's bytes."""
    return lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[part])


def edit(change):
    """Return a damage to the weight file's header."""
    return lambda folder: header(folder / "model.safetensors", change)


def configure(**fields):
    return put("config.json", json.dumps(FIELDS | fields))


NORM = "model.norm.weight"
DAMAGED = r"model\.safetensors is damaged"
DAMAGE = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json does not exist"),
    "config not JSON": (put("config.json", "{"), r"config\.json is not valid JSON"),
    "config not UTF-8": (put("config.json", b'{"a": "\xff"}'), r"config\.json is not valid JSON"),
    "config a list": (put("config.json", "[]"), r"config\.json holds a list"),
    "config too deep": (put("config.json", "[" * 100_000), r"config\.json is not valid JSON"),
    "another architecture": (configure(model_type="gpt2"), "model_type is 'gpt2'"),
    "another size": (configure(intermediate_size=33), r"gate_proj\.weight has shape \(32, 64\).* asks for \(33, 64\)"),
    "endless layers": (configure(num_hidden_layers=10**6), r"model\.layers\.2\.\S+ is missing"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
    "truncated": (keep(slice(-5)), DAMAGED),
    "cut in the header": (keep(slice(99)), DAMAGED),
    "empty file": (put("model.safetensors", b""), DAMAGED),
    "a folder": (lambda d: ((d / "model.safetensors").unlink(), (d / "model.safetensors").mkdir()), DAMAGED),
    "a file that cannot be opened": (
        lambda d: ((d / "model.safetensors").unlink(), os.mknod(d / "model.safetensors", stat.S_IFSOCK | 0o600)),
        r"model\.safetensors could not be read \(No such device or address\), though it may be intact",
    ),
    "an endless number": (put("config.json", '{"vocab_size": ' + "9" * 5000 + "}"), r"config\.json is not valid JSON"),
    "garbage": (put("model.safetensors", b"\xff" * 999), DAMAGED),
    "missing tensor": (edit(lambda h: h.update(x=h.pop(NORM))), r"the tensor model\.norm\.weight is missing"),
    "overlapping offsets": (edit(lambda h: h[NORM].update(data_offsets=[0, 256])), DAMAGED),
    "unreadable type": (edit(lambda h: h[NORM].update(dtype="I32")), r"model\.norm\.weight is stored as int32"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_named(tmp_path, damage):
    change, message = DAMAGE[damage]
    change(write_folder(tmp_path / "model", PARAMS))
    with pytest.raises((ValueError, OSError), match=message) as caught:
        reference.load(tmp_path / "model")
    assert str(tmp_path) in str(caught.value)


def point_to(file):
    """Return a damage to the index that places the norm in `file`."""
    return lambda index: index["weight_map"].update({NORM: file})


INDEX_DAMAGE = {
    "outside": (point_to("../other.safetensors"), "outside its own folder"),
    "absolute": (point_to("/etc/passwd"), "outside its own folder"),
    "shard missing": (point_to("gone.safetensors"), "gone.safetensors does not exist"),
    "wrong shard": (point_to("model-00001-of-00003.safetensors"), "which does not contain it"),
    "no map": (lambda index: index.pop("weight_map"), "has no weight_map"),
    "map of numbers": (lambda index: index.update(weight_map={NORM: 3}), "has no weight_map"),
}


@pytest.mark.parametrize("damage", INDEX_DAMAGE)
def test_a_damaged_index_is_named(tmp_path, damage):
    change, message = INDEX_DAMAGE[damage]
    params = dict(sorted(PARAMS.items(), key=lambda item: item[0] == "model.norm.weight"))  # norm in the last shard
    folder = write_folder(tmp_path / "model", params, shards=3)
    edit_index(folder, change)
    with pytest.raises((ValueError, OSError), match=message):
        reference.load(folder)


def test_what_is_no_model_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere does not exist; give a folder with config\.json"):
        reference.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no model: no config"):
        reference.load(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt is not a model"):
        reference.load(tmp_path / "notes.txt")


def test_a_damaged_gguf_is_named(tmp_path):
    whole = write_gguf(tmp_path / "m.gguf", PARAMS).read_bytes()
    rng = np.random.default_rng(0)
    damaged = [b"", b"GGUF", rng.bytes(5000), b"GGUF" + rng.bytes(5000), whole[:-50]]
    damaged += [whole[: int(cut)] for cut in rng.integers(0, len(whole), 40)]
    for number, data in enumerate(damaged):
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(data)
        with pytest.raises((ValueError, OSError), match=rf"{number}\.gguf"):
            reference.load(path)


@pytest.mark.parametrize("element", [0, 1, 4, 7, 8, 9, 13])
@pytest.mark.parametrize("count", [10**7, 2**40, 2**63])
def test_a_damaged_length_in_gguf_does_not_run_for_hours(tmp_path, element, count):
    path = tmp_path / "m.gguf"
    key = b"tokenizer.ggml.tokens"
    entry = struct.pack("<Q", len(key)) + key + struct.pack("<IIQ", 9, element, count)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + entry + bytes(4000))
    with pytest.raises(ValueError, match=r"m\.gguf is damaged or cut short"):
        reference.load(path)


def test_a_gguf_of_another_architecture_is_named(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"other\.gguf holds a model of architecture 'gpt2'"):
        reference.load(tmp_path / "other.gguf")


def test_a_part_of_a_split_gguf_is_named(tmp_path):
    def split(writer):
        writer.add_uint16("split.no", 0)
        writer.add_uint16("split.count", 3)

    path = write_gguf(tmp_path / "m-00001-of-00003.gguf", PARAMS, extra=split)
    with pytest.raises(
        ValueError, match=r"is one of the 3 parts of a model; join them with .*llama-gguf-split"
    ) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


def test_arrays_in_arrays_without_end_are_refused(tmp_path):
    nested = struct.pack("<IQ", 9, 1) * 100_000
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a" + nested)
    with pytest.raises(ValueError, match=r"m\.gguf is damaged or cut short"):
        reference.load(tmp_path / "m.gguf")
