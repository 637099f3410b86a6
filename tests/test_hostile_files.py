"""Malicious files, and files with corrupt headers, raise ValueError or OSError and do nothing else.

Nothing in them is executed, and no memory is allocated on the strength of a length they claim.
"""

import contextlib
import copy
import json
import os
import pickle
import resource
import signal
import struct
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import sentencepiece_models
import torch
from checkpoint_files import FIELDS, random_params, write_chat_model, write_folder, write_gguf
from meta_files import write_meta

from llama import LlamaForCausalLM, load_tokenizer, reference
from llama.checkpoints import open_checkpoint
from llama.checkpoints.pickles import TorchZip
from llama.info import info

SMALL = FIELDS | {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                  "num_key_value_heads": 1, "vocab_size": 6}  # fmt: skip
NAMED = SMALL | {"architectures": ["LlamaForCausalLM"]}
PARAMS = random_params(SMALL)
ROOM = 400 << 20  # bytes that reading a file of a few kB may allocate; a corrupt length asks for far more
PATIENCE = 20  # CPU seconds


class Hang(BaseException):
    """Reading took too long."""


@contextlib.contextmanager
def little_room():
    """Limit this process to ROOM more bytes of memory, and raise Hang on SIGPROF (`survives` sets the timer)."""

    def interrupt(*arguments):
        raise Hang

    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    handler = signal.signal(signal.SIGPROF, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)


def survives(read, *arguments) -> bool:
    """Return whether `read` succeeds. It may raise ValueError or OSError, but not because of a MemoryError."""
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(*arguments)
    except (ValueError, OSError) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError):
                raise cause from None
            cause = cause.__cause__ or cause.__context__
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return True


# --- pickles ---------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Stateful:
    """Pickles as an instance of an imported class whose attributes are then set."""

    def __init__(self):
        self.x = 1


def state(**more):
    return {"model.norm.weight": torch.ones(4)} | more


def torch_zip(path, data: bytes, **members: bytes):
    """Write a zip in torch.save's layout around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for name, contents in members.items():
            archive.writestr(f"archive/data/{name.removeprefix('_')}", contents)
    return path


def saved(path, contents):
    torch.save(contents, path)
    return path


def pickled(contents):
    return lambda path: torch_zip(path, pickle.dumps(contents, 2))


def tensor(
    storage=b"ctorch\nFloatStorage\n",
    key=b"0",
    length=4,
    offset=0,
    shape=(4,),
    strides=(1,),
    make=b"_rebuild_tensor_v2",
):
    """Return a handwritten pickle of {"a": tensor}, in which any number can be false."""

    def number(n):
        data = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(data)]) + data

    def numbers(values):
        return b"(" + b"".join(map(number, values)) + b"t"

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value

    persistent = b"(" + text(b"storage") + storage + text(key) + text(b"cpu") + number(length) + b"tQ"
    arguments = (
        b"("
        + persistent
        + number(offset)
        + numbers(shape)
        + numbers(strides)
        + b"\x89"
        + b"ccollections\nOrderedDict\n)Rt"
    )
    return b"\x80\x02}" + text(b"a") + b"ctorch._utils\n" + make + b"\n" + arguments + b"Rs."


def lie(**lies):
    return lambda path: torch_zip(path, tensor(**lies), _0=np.ones(4, np.float32).tobytes())


def compressed(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", tensor(length=1 << 28, shape=(1 << 28,)))
        archive.writestr("archive/data/0", bytes(1 << 24))
    return path


def behind_the_end(path):
    """A storage whose local header claims 64 KiB of extra fields, which end past the end of the file."""
    data = bytearray(lie()(path).read_bytes())
    with zipfile.ZipFile(path) as archive:
        header = archive.getinfo("archive/data/0").header_offset
    data[header + 28 : header + 30] = b"\xff\xff"
    path.write_bytes(data)
    return path


def twice(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with zipfile.ZipFile(path, "w") as archive:
            for _ in range(2):
                archive.writestr("archive/data.pkl", tensor())
    return path


def deep(opcode, count=500_000):
    """Deeply nested tuples as a dictionary key: hashing them overflows the stack."""
    return lambda path: torch_zip(path, b"\x80\x02}" + b")" + opcode * count + b"K\x01s.")


PICKLES = {
    "a call of the system": (pickled(Call(os.system, "touch ran")), "asks for posix.system"),
    "in a state dict": (lambda p: saved(p, state(x=Call(os.mkdir, "ran"))), "asks for posix.mkdir"),
    "evil in a name": (pickled(Call(eval, "open('ran', 'w')")), "asks for __builtin__.eval"),
    "an import alone": (pickled(os.system), "asks for posix.system"),
    "a class": (lambda p: saved(p, state(x=Stateful())), "asks for .*Stateful"),
    "torch's own loader": (pickled(Call(torch.load, "other")), "asks for torch.serialization.load"),
    "a nested name": (lambda p: torch_zip(p, pickle.dumps(Call(Path.touch, "ran"), 4)), "asks for pathlib"),
    "a tensor's class": (lambda p: torch_zip(p, b"\x80\x02ctorch\nTensor\n)R."), "asks for torch.Tensor"),
    "a call of a storage": (lambda p: torch_zip(p, b"\x80\x02ctorch\nFloatStorage\n)R."), "a call that is not allowed"),
    "attributes": (lambda p: torch_zip(p, b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}b."), "sets attributes"),
    "an instance": (lambda p: torch_zip(p, b"(ios\nsystem\n."), "uses INST"),
    "a memory of billions": (lambda p: torch_zip(p, b"\x80\x02}r\xff\xff\xff\xff."), None),
    "a text of an exabyte": (lambda p: torch_zip(p, b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"a."), "damaged"),
    "bytes of an exabyte": (lambda p: torch_zip(p, b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"a."), "damaged"),
    "half a million lists": (lambda p: torch_zip(p, b"\x80\x02" + b"]" * (1 << 20) + b"."), "pickle in it is too long"),
    "megabytes of lists": (lambda p: torch_zip(p, b"\x80\x02" + b"]" * (1 << 23) + b"."), "data.pkl is too large"),
    "tuples in tuples": (deep(b"\x85"), "a key in it is a tuple"),
    "a list of itself": (lambda p: torch_zip(p, b"\x80\x02]q\x00h\x00a."), "should hold tensors by name"),
    "a stack that is empty": (lambda p: torch_zip(p, b"\x80\x02ss."), "damaged"),
    "no end": (lambda p: torch_zip(p, b"\x80\x02}"), "damaged"),
    "no pickle": (lambda p: torch_zip(p, b""), "damaged"),
    "a compressed bomb": (compressed, "is compressed"),
    "a member twice": (twice, "appears twice"),
    "another zip": (lambda p: zipfile.ZipFile(p, "w").close() or p, "has no data.pkl"),
    "no storage": (lie(key=b"1"), "data/1 is missing"),
    "a storage outside": (lie(key=b"../../x"), "is missing"),
    "an unknown storage": (lie(storage=b"ctorch\nQInt8Storage\n"), "asks for torch.QInt8Storage"),
    "a storage of text": (lie(storage=b"X\x01\x00\x00\x00a"), "damaged"),
    "a storage too long": (lie(length=5), "data/0 is cut short"),
    "an endless storage": (lie(length=1 << 62), "data/0 is cut short"),
    "a storage behind the end": (behind_the_end, "data/0 is cut short"),
    "a negative length": (lie(length=-1), "points to an invalid storage"),
    "a tensor too long": (lie(shape=(5,)), r"shape \(5,\) does not fit"),
    "an endless tensor": (lie(shape=(1 << 40,), strides=(0,)), "a of shape .* repeats its 4 elements"),
    "an expanded tensor": (lambda p: saved(p, {"a": torch.ones(3).expand(2, 3)}), "a of shape .*call contiguous"),
    "endless and empty": (lie(shape=(0, 1 << 62), strides=(1, 1)), None),
    "a tensor behind its end": (lie(offset=1), "does not fit"),
    "a negative offset": (lie(offset=-1), "a tensor in it is damaged"),
    "a negative stride": (lie(strides=(-1,)), "a tensor in it is damaged"),
    "a wide stride": (lie(shape=(2,), strides=(4,)), "does not fit"),
    "a number beyond words": (lie(offset=1 << 80), "a tensor in it is damaged"),
    "fewer strides": (lie(shape=(2, 2)), "a tensor in it is damaged"),
    "many axes": (lie(shape=(1,) * 99, strides=(1,) * 99), "a tensor in it is damaged"),
    "another maker": (lie(make=b"_rebuild_qtensor"), "asks for torch._utils._rebuild_qtensor"),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKLES)
def test_a_hostile_pickle_does_nothing(tmp_path, monkeypatch, name):
    write, message = PICKLES[name]
    monkeypatch.chdir(tmp_path)
    path = write(tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    with little_room(), pytest.raises(ValueError, match=message) as caught:
        reference.load(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 500
    if message is not None:
        with pytest.raises(ValueError, match=message):
            TorchZip(path)
    path.rename(tmp_path / "consolidated.00.pth")
    (tmp_path / "params.json").write_text("{}")
    with little_room(), pytest.raises(ValueError, match=r"consolidated\.00\.pth|params\.json"):
        reference.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_by_hand_is_read_as_torch_reads_it(tmp_path):
    """The handwritten form above with true values; views, parameters, metadata, every dtype, as torch writes them."""
    path = torch_zip(tmp_path / "a.bin", tensor(offset=1, shape=(3,)), _0=np.arange(4, dtype=np.float32).tobytes())
    np.testing.assert_array_equal(TorchZip(path).read("a"), [1, 2, 3])
    base = torch.arange(24.0).view(4, 6)
    tensors = {"whole": base, "part": base[1:3, 2:5], "turned": base.T, "scalar": torch.tensor(3.0),
               "none": torch.empty(0, 3), "parameter": torch.nn.Parameter(base + 1)}  # fmt: skip
    tensors |= {str(dtype): base.to(dtype) for dtype in (torch.float64, torch.float16, torch.int64, torch.int32,
                torch.int16, torch.int8, torch.uint8, torch.bool)}  # fmt: skip
    module = torch.nn.Linear(2, 3)
    for protocol in (2, 3, 4, 5):
        torch.save(tensors, path, pickle_protocol=protocol)
        file = TorchZip(path)
        assert list(file.tensors) == list(tensors)
        for name, expected in tensors.items():
            np.testing.assert_array_equal(file.read(name), expected.detach().numpy(), strict=True)
        torch.save(module.state_dict(), path, pickle_protocol=protocol)  # an OrderedDict with _metadata
        np.testing.assert_array_equal(TorchZip(path).read("weight"), module.weight.detach().numpy())
    torch.save({"a": base.bfloat16()}, path)
    read = TorchZip(path).read("a")
    np.testing.assert_array_equal(read.view(np.uint16), base.bfloat16().view(torch.uint16).numpy())
    with zipfile.ZipFile(path, "a") as archive:
        name = archive.namelist()[0].partition("/")[0]
        assert f"{name}/byteorder" in archive.namelist()
    other = tmp_path / "big.bin"
    with zipfile.ZipFile(path) as archive, zipfile.ZipFile(other, "w") as copied:
        for info_ in archive.infolist():
            data = archive.read(info_)
            copied.writestr(info_.filename, b"big" if info_.filename.endswith("byteorder") else data)
    with pytest.raises(ValueError, match="big-endian"):
        TorchZip(other)


# --- safetensors -----------------------------------------------------------------------------------------------------


def one_file(folder, header, size=4096):
    """A model.safetensors with this header (an object, or its text) before `size` bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(size))


def entry(begin, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


HEADERS = {
    "overlapping": {"a": entry(0, 4096), "b": entry(2048, 4096)},
    "a hole": {"a": entry(0, 1024), "b": entry(2048, 4096)},
    "out of range": {"a": entry(0, 8192)},
    "turned around": {"a": entry(4096, 0, [1024])},
    "negative": {"a": entry(-4096, 0)},
    "beyond words": {"a": entry(0, 2**70)},
    "a product beyond words": {"a": entry(0, 4096, [2**32, 2**32, 2**32])},
    "a shape too large": {"a": entry(0, 4096, [4096])},
    "a shape of text": {"a": entry(0, 4096, "1024")},
    "a number in the place of an entry": {"a": 3},
    "an unknown type": {"a": entry(0, 4096, dtype="Q9")},
    "a name twice": b'{"a":{"dtype":"F32","shape":[512],"data_offsets":[0,2048]},'
                    b'"a":{"dtype":"F32","shape":[512],"data_offsets":[2048,4096]}}',
    "too deep": b"[" * 100_000,
    "a list": b"[]",
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_hostile_safetensors_header_is_refused(tmp_path, name):
    write_folder(tmp_path, PARAMS, SMALL)
    one_file(tmp_path, HEADERS[name])
    with little_room(), pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        reference.load(tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**40, 10**8, 0, 3])
def test_the_length_of_a_header_is_not_believed(tmp_path, length):
    folder = write_folder(tmp_path, PARAMS, SMALL)
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + data[8:])
    with little_room(), pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        reference.load(folder)


def test_links_to_files_elsewhere_are_followed_and_paths_are_not(tmp_path):
    """huggingface_hub's cache is made of symlinks; an index that points outside its folder is an attack."""
    real = write_folder(tmp_path / "blobs", PARAMS, SMALL, shards=2)
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for file in real.iterdir():
        (folder / file.name).symlink_to(Path("..", "blobs", file.name))
    assert reference.load(folder)[0].keys() == PARAMS.keys()
    index = json.loads((real / INDEX).read_text())
    (folder / INDEX).unlink()
    for shard in ("../blobs/model-00001-of-00002.safetensors", "/etc/passwd", "..", "a\x00b", ".", ""):
        index["weight_map"]["model.norm.weight"] = shard
        (folder / INDEX).write_text(json.dumps(index))
        with pytest.raises((ValueError, OSError), match="index"):
            reference.load(folder)
    (folder / "model.safetensors").symlink_to(folder / "model.safetensors")  # a symlink to itself
    with pytest.raises((ValueError, OSError)):
        reference.load(folder)


# --- values of the wrong type, and too little memory -----------------------------------------------------------------

OF_ANY_TYPE = ["x", 2**64 - 1, -1, 0, 0.5, float("nan"), True, [1, 2], ["x"], [0.5]]


def test_a_field_of_gguf_can_be_of_any_type(tmp_path):
    import gguf

    small_chat(tmp_path)
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    names = [name for name in reader.fields if name.startswith(("llama.", "tokenizer.", "general."))]
    more = ["llama.rope.scaling.type", "llama.rope.dimension_count", "tokenizer.ggml.bos_token_id", "split.count"]
    fields = SMALL | {"vocab_size": 258}
    params, well = random_params(fields), 0
    for name in [*names, *more]:
        for number, value in enumerate(OF_ANY_TYPE):

            def put(writer, name=name, value=value):
                kind = gguf.GGUFValueType.UINT64 if value == 2**64 - 1 else gguf.GGUFValueType.get_type(value)
                writer.kv_data[0].pop(name, None)
                writer.add_key_value(name, value, kind)

            path = write_gguf(tmp_path / f"{name}{number}.gguf", params, fields, extra=put)
            with little_room():
                well += survives(tell, path)
                survives(tokenizer, path)
            path.unlink()
    assert well  # some are harmless


@pytest.mark.parametrize("name", ["model.safetensors", "consolidated.00.pth", "m.gguf"])
def test_a_file_that_memory_does_not_suffice_for_is_not_called_damaged(tmp_path, name):
    if name == "m.gguf":
        where = path = small_gguf(tmp_path) / name
    else:
        where = (write_meta if name.endswith("pth") else write_folder)(tmp_path, PARAMS, SMALL)
        path = where / name
    with open(path, "r+b") as file:
        whole = file.read()
        file.truncate(2 * ROOM)
        if name.endswith("pth"):  # a zip's directory is at the end
            file.seek(-len(whole), os.SEEK_END)
            file.write(whole)
    with (
        little_room(),
        pytest.raises(OSError, match=r"could not be read .*Cannot allocate memory.* may be intact") as caught,
    ):
        dict(open_checkpoint(where).tensors)
    assert str(path) in str(caught.value)


# --- any byte of any header ------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"
EXTREMES = [0, -1, 1, 2, 3, 255, 256, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 1e308, 1e-308,
            0.5, float("nan"), float("inf"), None, True, "", "x", "\x00", [], [[]], {}, {"a": 1}, [1, 2]]  # fmt: skip


def damaged_bytes(data: bytes, rng: np.random.Generator, header: int) -> bytes:
    """Corrupt `data` in its first `header` bytes or near its end, as disks, networks and attackers do."""
    out = bytearray(data)
    places = [int(p) for p in rng.integers(0, min(header, len(data)), 1 + rng.integers(3))]
    if rng.random() < 0.1 and len(data) > 64:
        places[0] = len(data) - 1 - int(rng.integers(64))
    match int(rng.integers(7)):
        case 0 | 1:
            for place in places:
                out[place] ^= 1 << int(rng.integers(8))
        case 2:
            for place in places:
                out[place] = int(rng.choice([0, 1, 127, 128, 255, rng.integers(256)]))
        case 3:  # an integer of 4 or 8 bytes
            width = int(rng.choice([4, 8]))
            value = int(rng.choice([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1])) * int(rng.choice([1, 2**31 + 1]))
            out[places[0] : places[0] + width] = (value % 2 ** (8 * width)).to_bytes(width, "little")
        case 4:
            del out[places[0] : places[0] + int(rng.integers(1, 20))]
        case 5:
            out[places[0] : places[0]] = rng.bytes(int(rng.integers(1, 20)))
        case 6:
            del out[places[0] :]
    return bytes(out)


def damaged_json(data: bytes, rng: np.random.Generator, header: int) -> bytes:
    """Replace, delete or copy values in a JSON object; one time in three, corrupt its bytes instead."""
    if rng.random() < 1 / 3:
        return damaged_bytes(data, rng, header)
    whole = json.loads(data)
    for _ in range(1 + int(rng.integers(2))):
        at = whole
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                break
            key = keys[int(rng.integers(len(keys)))]
            if isinstance(at[key], dict | list) and at[key] and rng.random() < 0.8:
                at = at[key]
                continue
            match int(rng.integers(5)):
                case 0 | 1 | 2:
                    at[key] = copy.deepcopy(EXTREMES[int(rng.integers(len(EXTREMES)))])
                case 3:
                    del at[key]
                case 4:
                    at[key] = copy.deepcopy(at[keys[int(rng.integers(len(keys)))]])
            break
    return json.dumps(whole).encode()


def damaged_header(data: bytes, rng: np.random.Generator, header: int) -> bytes:
    """Corrupt a safetensors file's JSON, keeping its length correct, or (half of the time) any bytes."""
    if rng.random() < 0.5:
        return damaged_bytes(data, rng, header)
    length = struct.unpack("<Q", data[:8])[0]
    text = damaged_json(data[8 : 8 + length], rng, length)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def tell(where):
    info(open_checkpoint(where))


def encode(where):
    load_tokenizer(where).encode("some text")


def tokenizer(where):
    open_checkpoint(where).tokenizer()


MODEL = (reference.load, tell, LlamaForCausalLM.from_pretrained)


def ranks() -> bytes:
    import base64

    return b"".join(base64.b64encode(bytes([n])) + f" {n}\n".encode() for n in range(256))


def tokenizer_json(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({"<unk>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def with_settings(folder):
    settings = {"bos_token": "<s>", "unk_token": {"content": "<unk>", "lstrip": False}, "model_max_length": 99,
                "added_tokens_decoder": {"4": {"content": "<s>", "special": True}}, "chat_template": "{{ messages }}",
                "additional_special_tokens": ["<x>"], "add_bos_token": True, "padding_side": "left"}  # fmt: skip
    (tokenizer_json(folder) / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def with_generation(folder):
    said = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "eos_token_id": [1, 2], "max_length": 20}
    (write_folder(folder, PARAMS, SMALL) / "generation_config.json").write_text(json.dumps(said))
    return folder


def model_of(folder, data):
    (folder / "tokenizer.model").write_bytes(data)
    return folder


def small_meta(folder):
    return write_meta(folder, PARAMS, SMALL, shards=2)


def small_bin(folder):
    write_folder(folder, PARAMS, SMALL)
    (folder / "model.safetensors").unlink()
    torch.save({n: torch.tensor(a) for n, a in PARAMS.items()}, folder / "pytorch_model.bin")
    return folder


def small_chat(folder):
    write_chat_model(folder / "m.gguf")
    return folder


def small_gguf(folder):
    write_gguf(folder / "m.gguf", PARAMS, SMALL)
    return folder


SENTENCEPIECE = sentencepiece_models.llama_like
# The file to damage, what writes its folder, what reads it, how and how far in to damage it, and how many times.
FORMATS = {
    "safetensors": ("model.safetensors", lambda d: write_folder(d, PARAMS, SMALL), MODEL, damaged_header, 1000, 300),
    "index": (INDEX, lambda d: write_folder(d, PARAMS, SMALL, 2), MODEL, damaged_json, 9999, 150),
    "config.json": ("config.json", lambda d: write_folder(d, PARAMS, NAMED), MODEL, damaged_json, 9999, 300),
    "generation_config.json": ("generation_config.json", with_generation, MODEL[2:], damaged_json, 9999, 100),
    "params.json": ("params.json", small_meta, MODEL, damaged_json, 9999, 300),
    "pth": ("consolidated.00.pth", small_meta, MODEL, damaged_bytes, 2500, 300),
    "bin": ("pytorch_model.bin", small_bin, MODEL, damaged_bytes, 2500, 150),
    "gguf": ("m.gguf", small_gguf, MODEL, damaged_bytes, 1500, 300),
    "gguf with a tokenizer": ("m.gguf", small_chat, (*MODEL, tokenizer), damaged_bytes, 8000, 100),
    "tokenizer.json": ("tokenizer.json", tokenizer_json, (encode,), damaged_json, 9999, 200),
    "tokenizer_config.json": ("tokenizer_config.json", with_settings, (encode,), damaged_json, 9999, 100),
    "tokenizer.model": ("tokenizer.model", lambda d: model_of(d, SENTENCEPIECE()), (encode,), damaged_bytes, 600, 60),
    "ranks": ("tokenizer.model", lambda d: model_of(d, ranks()), (encode,), damaged_bytes, 600, 100),
}


def test_the_inputs_are_many():
    assert sum(count for *_, count in FORMATS.values()) >= 2000


@pytest.mark.parametrize("name", FORMATS)
def test_a_damaged_header_is_an_error_and_nothing_worse(tmp_path, name):
    file, write, readers, damage, header, count = FORMATS[name]
    folder = write(tmp_path)
    path, where = folder / file, folder / file if file.endswith(".gguf") else folder
    whole = path.read_bytes()
    for read in readers:
        read(where)  # it can be read intact
    well = 0
    with little_room():
        for seed in range(count):
            rng = np.random.default_rng([seed, *name.encode()])
            path.unlink()  # arrays of the previous version may still be memory-mapped
            path.write_bytes(damage(whole, rng, header))
            try:
                well += min(survives(read, where) for read in readers)
            except BaseException as error:
                error.add_note(f"{name}, seed {seed}")
                raise
    assert well < count  # some damage is harmless; were all, this would test nothing
