"""Meta's layout, read as transformers' script and Meta's own code read it; every inconsistency in it is named."""

import base64
import json
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import sentencepiece_models
import torch
from checkpoint_files import FIELDS, random_params, write_folder
from meta_files import write_hollow_meta, write_meta

from llama import GenerationConfig, LlamaForCausalLM, load_tokenizer, reference
from llama.checkpoints import names, open_checkpoint
from llama.checkpoints.convert import convert
from llama.checkpoints.meta import SIZES, MetaFolder
from llama.checkpoints.pickles import TorchZip

PARAMS = random_params()
MHA = FIELDS | {"num_key_value_heads": 4}
DTYPES = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16}


def cast(params, dtype):
    return {name: array.astype(DTYPES[dtype]) for name, array in params.items()}


def assert_reads(checkpoint, expected):
    assert list(checkpoint.tensors) == list(expected)
    for name, array in expected.items():
        read = checkpoint.read(name)
        assert checkpoint.tensors[name] == (read.dtype, read.shape)
        assert read.dtype == array.dtype
        np.testing.assert_array_equal(read, array, err_msg=name)


@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_shards_are_put_together_bit_by_bit(tmp_path, dtype, shards, embedding_axis):
    write_meta(tmp_path, PARAMS, shards=shards, dtype=dtype, embedding_axis=embedding_axis)  # 4 shards, 2 KV heads
    checkpoint = open_checkpoint(tmp_path)
    assert isinstance(checkpoint, MetaFolder)
    assert_reads(checkpoint, cast(PARAMS, dtype))
    assert checkpoint.config["torch_dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_one_key_head_lies_in_every_shard(tmp_path, shards):
    fields = FIELDS | {"num_key_value_heads": 1}
    params = random_params(fields)
    assert_reads(open_checkpoint(write_meta(tmp_path, params, fields, shards=shards)), cast(params, torch.float16))


def test_heads_of_another_size_than_the_width_makes(tmp_path):
    fields = MHA | {"head_dim": 24}
    params = random_params(fields)
    checkpoint = open_checkpoint(write_meta(tmp_path, params, fields, shards=2))
    assert checkpoint.config["head_dim"] == 24
    assert_reads(checkpoint, cast(params, torch.float16))


def test_grouped_heads_are_seen_where_params_do_not_say(tmp_path):
    folder = write_meta(tmp_path, PARAMS, said={"n_kv_heads": None})
    assert open_checkpoint(folder).config["num_key_value_heads"] == 2


def test_one_shard_is_mapped_and_what_is_written_to_it_stays_here(tmp_path):
    folder = write_meta(tmp_path, PARAMS, dtype=torch.float32)
    before = (folder / "consolidated.00.pth").read_bytes()
    array = open_checkpoint(folder).read("model.layers.0.mlp.up_proj.weight")
    assert not array.flags.owndata
    array[:] = 0
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert (folder / "consolidated.00.pth").read_bytes() == before


def test_every_way_in_takes_it(tmp_path):
    fields = MHA | {"rms_norm_eps": 1e-6, "rope_theta": 10000.0}
    params = random_params(fields)
    folder = write_meta(
        tmp_path / "meta", params, fields, shards=2, dtype=torch.float32, tokenizer=model_file(tmp_path)
    )
    loaded, config = reference.load(folder)
    assert config == reference.Config.from_dict(fields | {"max_position_embeddings": 4096})
    ids = np.array([[1, 5, 7, 2]])
    expected = reference.forward(params, reference.Config.from_dict(fields), ids).logits
    np.testing.assert_array_equal(reference.forward(loaded, config, ids).logits, expected)
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert {n: t.shape for n, t in model.state_dict().items()} == {n: a.shape for n, a in params.items()}
    with torch.no_grad():
        np.testing.assert_allclose(model(torch.tensor(ids)).logits.numpy(), expected, rtol=1e-4, atol=1e-3)
    assert load_tokenizer(folder).encode("a word") == load_tokenizer(folder / "tokenizer.model").encode("a word")


def model_file(folder):
    path = folder / "sentencepiece.model"
    path.write_bytes(sentencepiece_models.llama_like())
    return path


@pytest.fixture
def small_sizes(monkeypatch):
    """Make 13B a model of 38,720 parameters, like PARAMS."""
    monkeypatch.setitem(SIZES, "13B", (38_720e-9, 2))


def test_the_tokenizer_lies_beside_or_above_and_is_missed_only_when_asked_for(tmp_path, small_sizes):
    write_meta(tmp_path / "7B", PARAMS)
    checkpoint = open_checkpoint(tmp_path)  # LLaMA 1's layout: a folder for each size, the tokenizer above them
    assert checkpoint.path == tmp_path / "7B"
    assert_reads(checkpoint, cast(PARAMS, torch.float16))
    with pytest.raises(FileNotFoundError, match=r"7B/tokenizer\.model does not exist, nor "):
        checkpoint.tokenizer()
    shutil.move(model_file(tmp_path), tmp_path / "tokenizer.model")
    tokenizer, config = checkpoint.tokenizer()
    assert tokenizer.encode("a").tokens == ["<s>", "▁a"]
    assert config["bos_token"] == "<s>"
    assert MetaFolder(tmp_path / "7B").tokenizer()[0].encode("word").ids == tokenizer.encode("word").ids
    assert load_tokenizer(tmp_path / "7B").encode("a") == load_tokenizer(tmp_path).encode("a")
    write_meta(tmp_path / "13B", PARAMS, shards=2)
    tokenizer.save(str(tmp_path / "13B" / "tokenizer.json"))
    (tmp_path / "tokenizer.model").unlink()
    assert MetaFolder(tmp_path / "13B").tokenizer()[0].encode("word").ids == tokenizer.encode("word").ids
    out = convert(tmp_path / "13B", tmp_path / "out")
    assert (out / "tokenizer.json").read_bytes() == (tmp_path / "13B" / "tokenizer.json").read_bytes()
    with pytest.raises(ValueError, match="holds several models; give the folder of one of them: 13B, 7B"):
        open_checkpoint(tmp_path)
    assert MetaFolder(tmp_path, model_size="13B").path == tmp_path / "13B"


THIRD = {"rope_theta": 500000.0, "n_kv_heads": 2}
SCALED = THIRD | {"use_scaled_rope": True}
TIED = {n: a for n, a in PARAMS.items() if n != "lm_head.weight"}
SAME_HEAD = TIED | {"lm_head.weight": PARAMS["model.embed_tokens.weight"]}
VERSIONS = {  # params.json's entries, the weights and their dtype -> version, maximum length, EOS token, RoPE factor
    "1": ({"rope_theta": None, "n_kv_heads": None}, PARAMS, torch.float16, "1", 2048, 2, None),
    "2": ({"rope_theta": None}, PARAMS, torch.bfloat16, "2", 4096, 2, None),
    "Code Llama": ({"rope_theta": 1e6}, PARAMS, torch.bfloat16, "2", 16384, 2, None),
    "3": (THIRD, PARAMS, torch.bfloat16, "3", 8192, None, None),
    "3.1": (SCALED, PARAMS, torch.bfloat16, "3.1", 131072, None, 8.0),
    "3.2 without a head": (SCALED, TIED, torch.bfloat16, "3.2", 131072, None, 32.0),
    "3.2 with the head again": (SCALED, SAME_HEAD, torch.bfloat16, "3.2", 131072, None, 32.0),
    "a factor that is said": (SCALED | {"rope_scaling_factor": 9.0}, PARAMS, torch.float16, "3.1", 131072, None, 9.0),
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_the_version_is_found(tmp_path, version):
    said, params, dtype, name, length, end, factor = VERSIONS[version]
    checkpoint = open_checkpoint(write_meta(tmp_path, params, dtype=dtype, said=said, embedding_axis=0))
    config = checkpoint.config
    assert checkpoint.version == name
    assert (config["max_position_embeddings"], config["eos_token_id"]) == (length, end)
    assert checkpoint.generation_config["eos_token_id"] == end
    assert (config["rope_scaling"] or {}).get("factor") == factor
    assert config["rope_parameters"]["rope_theta"] == (said["rope_theta"] or 10000.0)
    assert config["tie_word_embeddings"] == (params is not PARAMS)
    loaded, read = reference.load(checkpoint)
    assert read.tie_word_embeddings == (params is not PARAMS)
    assert loaded.keys() == (TIED if params is not PARAMS else PARAMS).keys()


def test_a_vocabulary_of_llama_3s_size_is_llama_3(tmp_path):
    fields = FIELDS | {"vocab_size": 128256, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1}
    checkpoint = open_checkpoint(write_hollow_meta(tmp_path, fields, 2, torch.bfloat16, 0, {"rope_theta": 1e6}))
    assert (checkpoint.version, checkpoint.config["vocab_size"]) == ("3", 128256)
    ends = {"bos_token_id": 128000, "eos_token_id": 128001}
    assert ends.items() <= checkpoint.config.items()
    assert ends.items() <= checkpoint.generation_config.items()
    assert not checkpoint.config["tie_word_embeddings"]  # all zeros are equal, but mean nothing


def test_a_model_to_talk_with_ends_with_its_turn(tmp_path):
    fields = FIELDS | {"vocab_size": 128256, "hidden_size": 8, "num_attention_heads": 2}
    folder = write_hollow_meta(tmp_path / "Llama3.1-8B-Instruct", fields, 1, torch.bfloat16, 0, SCALED)
    assert open_checkpoint(folder).config["eos_token_id"] == [128001, 128008, 128009]
    assert MetaFolder(folder, instruct=False).config["eos_token_id"] == 128001
    folder.rename(tmp_path / "original")  # as in Meta's own repositories on the Hub
    assert open_checkpoint(tmp_path / "original").config["eos_token_id"] == 128001
    below = tmp_path / "original"
    for place in ("Llama-3.1-8B-Instruct", "models--org--Llama-3.1-8B-Instruct/snapshots/0123abcd"):
        (tmp_path / place).mkdir(parents=True)
        below = below.rename(tmp_path / place / "original")
        assert open_checkpoint(below).config["eos_token_id"] == [128001, 128008, 128009]
        assert GenerationConfig.from_pretrained(below).eos_token_id == [128001, 128008, 128009]


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"num_shards": 1}, r"holds 2 shards; num_shards 1 means 1"),
        ({"model_size": "7B"}, r"holds 2 shards; model_size 7B means 1"),
        ({"model_size": "12B"}, r"model_size must be one of 1B, .*405B, 405B-MP16, got '12B'"),
        ({"llama_version": "4"}, r"llama_version must be one of 1, 2, 3"),
        ({"model_size": "13B", "num_shards": 2, "llama_version": "1"}, None),
        ({"model_size": "13Bf", "llama_version": "2"}, None),
        ({"llama_version": "3.1"}, r"holds LLaMA 1 or 2 according to its vocabulary and params\.json, not 3\.1"),
        ({"model_size": "405B-MP16"}, r"holds 2 shards; model_size 405B-MP16 means 16"),
    ],
)
def test_what_is_said_of_the_files_is_held_against_them(tmp_path, small_sizes, facts, message):
    folder = write_meta(tmp_path, PARAMS, shards=2)
    if message is None:
        config = MetaFolder(folder, **facts).config
        assert config["max_position_embeddings"] == {"1": 2048, "2": 4096}[facts["llama_version"]]
    else:
        with pytest.raises(ValueError, match=message):
            assert MetaFolder(folder, **facts).config


@pytest.mark.parametrize(
    ("vocab_size", "said", "version", "legal"),
    [
        (12, {}, "3", "1 or 2"),
        (32000, {}, "3", "1 or 2"),
        (128256, {}, "2", r"3 or 3\.1 or 3\.2 or Guard-3"),
        (128256, {"use_scaled_rope": True}, "3", r"3\.1 or 3\.2 or Guard-3"),
        (128256, {"use_scaled_rope": False}, "3.1", "3"),
    ],
)
def test_a_version_is_held_against_the_vocabulary_and_rope(tmp_path, vocab_size, said, version, legal):
    fields = FIELDS | {"vocab_size": vocab_size}
    folder = write_hollow_meta(tmp_path, fields, 1, torch.bfloat16, said=said)
    with pytest.raises(ValueError, match=f"holds LLaMA {legal} according to its vocabulary .*, not {version};"):
        assert MetaFolder(folder, llama_version=version).config


LLAMA_7B = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
            "num_hidden_layers": 32, "num_attention_heads": 32, "rms_norm_eps": 1e-6}  # fmt: skip


def test_a_size_is_held_against_the_parameters(tmp_path):
    said = {"multiple_of": 256, "ffn_dim_multiplier": None}  # as in its own params.json
    folder = write_hollow_meta(tmp_path, LLAMA_7B, 1, torch.float16, said=said)
    assert MetaFolder(folder, model_size="7B", llama_version="1").config["intermediate_size"] == 11008
    with pytest.raises(ValueError, match=r"holds 6\.74 billion parameters, but model_size 8B means 8\.03 bi"):
        MetaFolder(folder, model_size="8B")
    with pytest.raises(ValueError, match=r"holds 38,720 parameters, but model_size 7B means 6\.74 billion"):
        MetaFolder(write_meta(tmp_path / "small", PARAMS), model_size="7B")


LLAMA_1B = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192,
            "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0}  # fmt: skip


def test_a_head_that_repeats_the_embedding_does_not_count(tmp_path):
    said = {"multiple_of": 256, "ffn_dim_multiplier": 1.5, "use_scaled_rope": True}  # as in its own params.json
    folder = write_hollow_meta(tmp_path, LLAMA_1B, 1, torch.bfloat16, 0, said)
    shard = TorchZip(folder / "consolidated.00.pth")
    with open(shard.path, "r+b") as file:
        for name in ("tok_embeddings.weight", "output.weight"):
            file.seek(shard._offsets[shard._views[name].storage.key])
            file.write(b"\x01")
    assert MetaFolder(folder, model_size="1B").config["tie_word_embeddings"]


@pytest.mark.parametrize(
    ("said", "facts", "names"),
    [
        ({}, {}, ["<|reserved_special_token_4|>", "<|eot_id|>", "<|reserved_special_token_5|>"]),
        ({"use_scaled_rope": True}, {}, ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]),
        ({}, {"llama_version": "3.1"}, ["<|eom_id|>", "<|eot_id|>", "<|python_tag|>"]),
    ],
)
def test_special_tokens_are_called_as_in_their_version(tmp_path, said, facts, names):
    words = tmp_path / "words"
    words.write_bytes(b"".join(base64.b64encode(bytes([n])) + b" %d\n" % n for n in range(256)))
    folder = write_meta(tmp_path / "model", PARAMS, said=THIRD | said, embedding_axis=0, shards=2, tokenizer=words)
    tokenizer, _ = MetaFolder(folder, **facts).tokenizer()
    assert [tokenizer.id_to_token(256 + number) for number in (8, 9, 10)] == names
    assert tokenizer.get_vocab_size() == 512
    assert tokenizer.id_to_token(511) == f"<|reserved_special_token_{247 if 'python' in names[2] else 250}|>"
    assert tokenizer.token_to_id("<|eot_id|>") == 265
    if not facts:
        assert load_tokenizer(folder).convert_ids_to_tokens([264, 265, 266]) == names


def test_the_options_for_metas_files_are_for_a_folder_of_them(tmp_path):
    path = write_meta(tmp_path, PARAMS) / "consolidated.00.pth"
    with pytest.raises(
        ValueError, match=r"00\.pth is not a folder of Meta's files, .* leave these out, or give a folder"
    ):
        MetaFolder(path, num_shards=1)


def change(**said):
    """Return a change to params.json."""

    def damage(folder):
        path = folder / "params.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | said))

    return damage


def edit(number, alter):
    """Return a change to a shard's tensors."""

    def damage(folder):
        path = folder / f"consolidated.{number:02}.pth"
        tensors = torch.load(path)
        alter(tensors)
        torch.save(tensors, path)

    return damage


def of_another(fields, **more):
    """Return a change that makes the second shard another model's."""

    def damage(folder):
        write_meta(folder / "other", random_params(FIELDS | fields, seed=1), FIELDS | fields, shards=2, **more)
        shutil.move(folder / "other" / "consolidated.01.pth", folder / "consolidated.01.pth")
        shutil.rmtree(folder / "other")

    return damage


def drop(name):
    return lambda folder: (folder / name).unlink()


def swap(folder):
    """Mix the shards of two models: their numbers fit, their norms do not."""
    write_meta(folder / "other", random_params(seed=1), shards=2)
    shutil.move(folder / "other" / "consolidated.00.pth", folder / "consolidated.00.pth")
    shutil.rmtree(folder / "other")


def exchange(folder):
    """Swap the names of the two shards of one model."""
    first, second = (folder / f"consolidated.{number:02}.pth" for number in (0, 1))
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def test_files_of_old_pytorch_say_what_to_do(tmp_path):
    folder = write_meta(tmp_path, PARAMS)
    tensors = torch.load(folder / "consolidated.00.pth", weights_only=True)
    torch.save(tensors, folder / "consolidated.00.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"00\.pth has the format from before PyTorch 1\.6; torch\.load it"):
        _ = open_checkpoint(folder).tensors


SHARDS = r"consolidated\.{}\.pth"
DAMAGE = {
    "no params": (drop("params.json"), r"params\.json does not exist"),
    "params no JSON": (lambda d: (d / "params.json").write_text("{"), r"params\.json is not valid JSON"),
    "no width": (change(dim=None), r"params\.json: dim must be a positive integer, got None"),
    "another width": (change(dim=96), r"tok_embeddings\.weight has shape \(12, 32\), .* It would fit 3 shards"),
    "a width of text": (change(dim="64"), r"dim must be a positive integer, got '64'"),
    "another number of heads": (change(n_heads=8, n_kv_heads=4, head_dim=16), r"wq\.weight is float16 of shape"),
    "heads of another size": (change(n_heads=8, n_kv_heads=4), r"rope\.freqs is for heads of size 16, but .* gives 8"),
    "no whole head": (change(n_heads=3, head_dim=None), r"head_dim|num_attention_heads|cannot be split"),
    "another number of kv heads": (change(n_kv_heads=4), r"wk\.weight is .* of shape \(16, 64\); .*\(32, 64\)"),
    "another MLP": (change(multiple_of=31), r"hold an MLP of width 32, but params\.json implies 31"),
    "another vocabulary": (change(vocab_size=13), r"embedding of 12 tokens, but params\.json says 13"),
    "more layers": (change(n_layers=3), SHARDS.format("00") + r": the tensor layers\.2\.\S+ is missing"),
    "endless layers": (change(n_layers=2**30), r"layers\.2\.\S+ is missing"),
    "fewer layers": (change(n_layers=1), r"holds layers\.1\.\S+, which a LLaMA with num_hidden_layers 1 does not"),
    "theta of text": (change(rope_theta="x"), r"rope_theta must be a number"),
    "eps of text": (change(norm_eps="x"), r"params\.json: rms_norm_eps must be a number"),
    "a first shard dropped": (drop("consolidated.00.pth"), SHARDS.format("00") + " does not exist"),
    "a last shard dropped": (drop("consolidated.01.pth"), r"not fit 1 shard.* fit 2 shards: \S+01\.pth is m"),
    "a shard of a wider model": (of_another({"intermediate_size": 48}), SHARDS.format("01") + r": layers\.0\.feed_"),
    "a shard of another dtype": (of_another({}, dtype=torch.bfloat16), SHARDS.format("01") + r": .* is bfloat16 of"),
    "a shard of another model": (swap, SHARDS.format("01") + r" holds another \S+norm\.weight than the shards before"),
    "shards exchanged": (exchange, SHARDS.format("00") + r" was written as consolidated\.01\.pth: the shards have"),
    "a tensor lost": (edit(1, lambda t: t.pop("norm.weight")), SHARDS.format("01") + ": the tensor norm.weight is"),
    "a tensor too many": (edit(1, lambda t: t.update(x=torch.ones(2))), SHARDS.format("01") + " holds x, which"),
    "no embedding": (edit(0, lambda t: t.pop("tok_embeddings.weight")), "lacks the tensor tok_embeddings"),
    "a matrix of rank 3": (edit(0, lambda t: t["layers.0.attention.wq.weight"].resize_(2, 2, 2)), "a matrix"),
}  # fmt: skip


def test_the_shard_that_is_missing_is_named_by_the_width_too(tmp_path):
    folder = write_meta(tmp_path, PARAMS, shards=2, embedding_axis=0)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(ValueError, match=r"of width 16, but .* implies 32; consolidated\.01\.pth is missing, or"):
        assert MetaFolder(folder).config


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_folder_is_named(tmp_path, damage):
    alter, message = DAMAGE[damage]
    alter(write_meta(tmp_path / "model", PARAMS, shards=2))
    with pytest.raises((ValueError, OSError), match=message) as caught:
        reference.load(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)


def test_copies_of_a_key_head_must_be_the_same(tmp_path):
    write_meta(tmp_path, PARAMS, shards=4)
    edit(3, lambda t: t["layers.1.attention.wk.weight"].add_(1))(tmp_path)
    with pytest.raises(ValueError, match=r"consolidated\.03\.pth holds another layers\.1\.attention\.wk\.weight"):
        reference.load(tmp_path)


def test_a_shard_that_is_cut_or_no_zip_is_named(tmp_path):
    whole = (write_meta(tmp_path, PARAMS) / "consolidated.00.pth").read_bytes()
    for data in (b"", b"PK", whole[:-100], whole[: len(whole) // 2], b"no zip"):
        (tmp_path / "consolidated.00.pth").write_bytes(data)
        with pytest.raises(ValueError, match=r"consolidated\.00\.pth is damaged"):
            reference.load(tmp_path)


def test_which_layout_a_folder_is_in(tmp_path):
    write_meta(tmp_path / "both", PARAMS)
    write_folder(tmp_path / "both", {n: a + 1 for n, a in PARAMS.items()})
    assert reference.load(tmp_path / "both")[0]["model.norm.weight"][0] == PARAMS["model.norm.weight"][0] + 1
    write_meta(tmp_path / "config too", PARAMS)
    (tmp_path / "config too" / "config.json").write_text("{}")
    assert isinstance(open_checkpoint(tmp_path / "config too"), MetaFolder)
    for name in ("consolidated.00.pth", "params.json"):
        with pytest.raises(ValueError, match=rf"{name} is part of a model; give its folder, {tmp_path}/both"):
            open_checkpoint(tmp_path / "both" / name)
    assert reference.load(tmp_path / "both" / "model.safetensors")[0].keys() == PARAMS.keys()
    (tmp_path / "both" / "model.safetensors").rename(tmp_path / "both" / "mine.safetensors")
    assert reference.load(tmp_path / "both" / "mine.safetensors")[0].keys() == PARAMS.keys()


def test_no_torch_is_needed(tmp_path):
    """Nor for .bin files: here `import torch` fails."""
    write_meta(tmp_path / "meta", PARAMS, shards=2)
    folder = write_folder(tmp_path / "bin", PARAMS)
    torch.save({n: torch.tensor(a) for n, a in PARAMS.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    code = f"""if True:
        import sys
        sys.modules["torch"] = None
        from llama import reference
        for name in ("meta", "bin"):
            params, _ = reference.load({str(tmp_path)!r} + "/" + name)
            print(len(params))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(len(PARAMS))] * 2, done.stderr


@pytest.mark.parametrize("layout", ["meta", "gguf"])
def test_names_go_there_and_back(layout):
    config = reference.Config.from_dict(FIELDS | {"attention_bias": True, "mlp_bias": True})
    ours = [name for name, _ in reference.parameter_shapes(config)]
    theirs = [names.rename(name, "hugging_face", layout) for name in ours]
    assert len(set(theirs)) == len(ours)
    assert None not in theirs
    assert [names.rename(name, layout, "hugging_face") for name in theirs] == ours
    for name in (
        "rope.freqs",
        "layers.x.attention.wq.weight",
        "layers.0.wq.weight",
        "norm",
        "blk.1.attn_norm.scale",
        "",
    ):
        assert names.rename(name, layout, "hugging_face") is None
