"""Conversions: nothing is lost on the way, in any direction, and what was changed on demand is what was asked for."""

import json
import struct
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import sentencepiece_models
import torch
import transformers
from checkpoint_files import FIELDS, random_params, write_folder, write_gguf
from meta_files import shard_tensors, write_meta
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from llama import LlamaTokenizer, reference
from llama.checkpoints import open_checkpoint
from llama.checkpoints.convert import convert
from llama.checkpoints.meta_shards import intermediate_size, params_json

PARAMS = random_params()
MHA = FIELDS | {"num_key_value_heads": 4}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer is written")


def tensors_of(folder) -> dict[str, torch.Tensor]:
    """All tensors of a written folder, by the library's own reader."""
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
@pytest.mark.parametrize("shards", [1, 2, 4])  # 4 are more than the key and value heads
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
        whole = path.read_bytes()  # every tensor's bytes stand at a multiple of 64
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


def test_gguf_to_hugging_face_to_meta_and_back(tmp_path):
    half = {name: array.astype(np.float16) if array.ndim == 2 else array for name, array in PARAMS.items()}
    source = write_gguf(tmp_path / "m.gguf", PARAMS, quantisation=gguf.GGMLQuantizationType.F16, extra=tokens)
    out = convert(source, tmp_path / "folder", verify=True)
    assert_equal(tensors_of(out), {name: torch.tensor(array) for name, array in half.items()})
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"  # the norms are float32
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
        assert torch.equal(held["output.weight"], held["tok_embeddings.weight"])  # as Meta's own files have it
        again = convert(meta, tmp_path / f"again{shards}", verify=True)
        assert json.loads((again / "config.json").read_text())["tie_word_embeddings"]
        assert_equal(tensors_of(again), {name: torch.tensor(array) for name, array in params.items()})


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
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', and in Meta's layout it can only be 'silu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"head_dim": 8}, r"head_dim · num_attention_heads is 32"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_type is 'linear'"),
        ({"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}}, "low_freq_factor is 2.0"),
    ],
)
def test_what_metas_code_cannot_compute_is_refused(tmp_path, fields, message):
    fields = FIELDS | fields
    source = write_folder(tmp_path / "model", random_params(fields), fields)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "out", to="meta")
    assert not (tmp_path / "out").exists()
    assert convert(source, tmp_path / "out")  # which Hugging Face's layout holds


def test_shards_must_divide_the_heads(tmp_path):
    source = write_folder(tmp_path / "model", PARAMS)
    with pytest.raises(ValueError, match=r"num_shards \(3\) must divide .* tok_embeddings"):
        convert(source, tmp_path / "out", to="meta", num_shards=3)
    with pytest.raises(ValueError, match=r"num_shards \(8\) must divide"):
        convert(source, tmp_path / "out", to="meta", num_shards=8)


# --- what is changed on demand ---


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
    write_folder(tmp_path / "model", PARAMS, FIELDS | {"dtype": "float32"})  # as transformers 5 spells it
    out = convert(tmp_path / "model", tmp_path / "out", dtype="bfloat16")
    assert transformers.LlamaForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_a_cast_that_loses_numbers_is_refused(tmp_path):
    large = PARAMS | {"model.norm.weight": np.full(64, 1e5, np.float32)}
    source = write_folder(tmp_path / "model", large)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds numbers that float16 cannot; choose --dtype bf"):
        convert(source, tmp_path / "out", dtype="float16")
    assert not (tmp_path / "out" / "config.json").exists()


# --- the files ---


# The tensors of each layer make 8 of at most 16 KiB; the embedding comes first.
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
            assert file.metadata() == {"format": "pt"}  # without which transformers 4 refuses it
    if files > 1:
        ours, index = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (out, tmp_path / "theirs"))
        assert ours["metadata"] == index["metadata"]
        assert ours["weight_map"].keys() == index["weight_map"].keys()


def test_types_of_different_sizes_lie_aligned(tmp_path):
    source = write_folder(tmp_path / "model", PARAMS)
    odd = cast(PARAMS, torch.float32) | {"model.norm.weight": torch.ones(64, dtype=torch.bfloat16)}
    save_file(odd, source / "model.safetensors")
    out = convert(source, tmp_path / "out", verify=True)
    assert_equal(tensors_of(out), odd)
    assert all(open_checkpoint(out).read(name).base is not None for name in odd)  # mapped: it could not be otherwise


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
    (tmp_path / "tokenizer.model").unlink()  # back again it comes from the folder
    assert (convert(out, tmp_path / "back", to="meta") / "tokenizer.model").exists()


def test_a_folders_own_tokenizer_files_are_kept(tmp_path, smollm2):
    source = write_folder(tmp_path / "model", PARAMS)
    written = {"tokenizer.json": (smollm2 / "tokenizer.json").read_bytes(), "special_tokens_map.json": b"{}\n",
               "tokenizer_config.json": b'{"model_max_length":   7}', "chat_template.jinja": b"{{ 1 }}"}  # fmt: skip
    for name, contents in written.items():
        (source / name).write_bytes(contents)
    out = convert(source, tmp_path / "out")
    assert {name: (out / name).read_bytes() for name in written} == written


def test_without_a_tokenizer_that_is_said(tmp_path):
    with pytest.warns(UserWarning, match=r"no tokenizer is written: .*tokenizer\.model does not exist"):
        convert(write_meta(tmp_path / "meta", PARAMS), tmp_path / "out")
    with pytest.warns(UserWarning, match=r"no tokenizer is written: .*tokenizer\.model does not exist"):
        convert(tmp_path / "out", tmp_path / "back", to="meta")


def test_what_is_no_float_is_refused(tmp_path):
    source = write_folder(tmp_path / "model", PARAMS | {"model.norm.weight": np.ones(64, np.int32)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is stored as int32; convertible are float64, float32"):
        convert(source, tmp_path / "out")


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
        """The largest resident memory, in bytes, of a child of a small process, which does not inherit ours."""
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
    with pytest.raises(ValueError, match=r"out holds something that is no conversion of this source; .* --force"):
        convert(source, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    convert(source, out, force=True)
    assert_equal(tensors_of(out), {name: torch.tensor(array) for name, array in PARAMS.items()})
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "conversion.json",
                                                          "model.safetensors"]  # fmt: skip


def test_other_settings_and_other_sources_are_refused_unless_force(tmp_path):
    source, out = write_folder(tmp_path / "model", PARAMS), tmp_path / "out"
    convert(source, out)
    with pytest.raises(ValueError, match=r"out holds a conversion with --dtype None; name another folder"):
        convert(source, out, dtype="bfloat16")
    convert(source, out, dtype="bfloat16", force=True)
    assert_equal(tensors_of(out), cast(PARAMS, torch.bfloat16))
    write_folder(source, random_params(seed=1))
    with pytest.raises(ValueError, match="of another source, or of this one before it changed"):
        convert(source, out, dtype="bfloat16")


def test_places_that_cannot_be_are_refused(tmp_path):
    source = write_folder(tmp_path / "model", PARAMS)
    with pytest.raises(ValueError, match="is where the source lies"):
        convert(source, source, force=True)
    with pytest.raises(ValueError, match="is where the source lies"):
        convert(source, tmp_path, force=True)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; name a folder"):
        convert(source, tmp_path / "file")
    with pytest.raises(ValueError, match="to must be one of huggingface, meta, got 'gguf'"):
        convert(source, tmp_path / "out", to="gguf")
    with pytest.raises(ValueError, match=r'max_shard_size must be bytes or like "200MB"'):
        convert(source, tmp_path / "out", max_shard_size="5 bananas")


def test_no_room_is_known_before_anything_is_written(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "model", PARAMS)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=50_000))
    with pytest.raises(OSError, match=r"out has 50\.0 KB free, and 154\.9 KB are needed; make room"):
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
    done = llama("convert", *said)
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
        (["{meta}", "{out}", "--model_size", "13B"], 1, "holds 1 shards; model_size 13B means 2"),
        (["{meta}", "{out}", "--num_shards", "4"], 1, "holds 1 shards; num_shards 4 means 4"),
        (["{meta}", "{out}", "--llama_version", "3.1"], 1, "not 3.1; correct llama_version"),
        (["{meta}", "{out}", "--safe_serialization", "False"], 2, "leave --safe-serialization out"),
        (["{meta}", "{meta}"], 1, "is where the source lies"),
        (["{meta}/nowhere", "{out}"], 1, "nowhere does not exist"),
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
