"""Folders in Hugging Face's layout: config.json, safetensors (one file or shards with an index), tokenizer files."""

import json
import mmap
import os
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tokenizers import Tokenizer

from ..progress import progress
from ..tokenization.fast import read_tokenizer_json

if TYPE_CHECKING:
    import torch

    from . import Checkpoint

WEIGHTS = "model.safetensors"
BIN = "pytorch_model.bin"
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}


class HuggingFaceFolder:
    """A `Checkpoint` in a folder. Nothing is read before it is asked for; tensors are mapped, not copied."""

    def __init__(self, path: Path):
        self.path = path

    @cached_property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json", hint="a model folder holds its configuration there")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        path = self.path / "generation_config.json"
        return read_json(path) if path.exists() else {}

    @property
    def names(self) -> list[str]:
        return list(self._files)

    @cached_property
    def _files(self) -> dict[str, Any]:
        """Which file holds which tensor. transformers' order: safetensors before .bin, one file before shards."""
        for name, opened in ((WEIGHTS, SafetensorsFile), (BIN, _torch_file)):
            if (self.path / name).exists():
                file = opened(self.path / name)
                return dict.fromkeys(file.header, file)
            index = self.path / f"{name}.index.json"
            if index.exists():
                return self._shards(index, opened)
        raise FileNotFoundError(
            f"{self.path} holds neither {WEIGHTS} nor {BIN}, nor an index of shards: there are no weights to read"
        )

    def _shards(self, index: Path, opened: Callable[[Path], Any]) -> dict[str, Any]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no weight_map from tensor names to file names")
        shards = {}
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard or shard in ("", ".", ".."):
                raise ValueError(f"{index} points to {shard!r}, outside its own folder; only file names can be read")
            shards[shard] = opened(self.path / shard)
        for name, shard in weight_map.items():
            if name not in shards[shard].header:
                raise ValueError(f"{index} looks for {name} in {shard}, which does not hold it; fetch both anew")
        return {name: shards[shard] for name, shard in weight_map.items()}

    def read(self, name: str) -> np.ndarray:
        return self._files[name].read(name)

    def read_torch(self, name: str) -> "torch.Tensor":
        return self._files[name].read_torch(name)

    def tokenizer(self) -> tuple[Tokenizer, dict[str, Any]]:
        path = self.path / "tokenizer.json"
        if not path.exists() and (self.path / "tokenizer.model").exists():
            from ..tokenization import LlamaTokenizerFast

            return LlamaTokenizerFast.from_pretrained(self.path).contents()
        settings = self.path / "tokenizer_config.json"
        tokenizer = read_tokenizer_json(path)
        config = read_json(settings) if settings.exists() else {}
        template = self.path / "chat_template.jinja"  # where transformers 5 puts it
        if template.exists():
            config = config | {"chat_template": template.read_text(encoding="utf-8")}
        return tokenizer, config


def _torch_file(path: Path) -> Any:
    try:
        from .torch_files import TorchFile
    except ImportError as error:
        raise ValueError(f"{path} can only be read with PyTorch, which is not installed") from error
    return TorchFile(path)


class SafetensorsFile:
    """One safetensors file, memory-mapped.

    The library checks it, so that every offset is known to be good. The reading is ours: the library's NumPy reader
    copies, and knows no bfloat16.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with safe_open(path, framework="numpy"):
                pass
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} does not exist, though the model's index names it") from error
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error}); fetch it anew") from error
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            self.header: dict[str, Any] = json.loads(file.read(length))
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.header.pop("__metadata__", None)
        self._start = 8 + length

    def read_torch(self, name: str) -> "torch.Tensor":
        """A tensor as PyTorch's, in its stored dtype: mapped, and private to the process if written to."""
        return self._library.get_tensor(name)

    @cached_property
    def _library(self) -> Any:
        return safe_open(self.path, framework="pt")

    def read(self, name: str) -> np.ndarray:
        entry = self.header[name]
        if entry["dtype"] not in DTYPES:
            known = "F64, F32, F16 and BF16"
            raise ValueError(f"{self.path}: {name} is stored as {entry['dtype']}; readable are {known}")
        begin, end = entry["data_offsets"]
        dtype = np.dtype(DTYPES[entry["dtype"]])
        raw = np.frombuffer(self._data, dtype, (end - begin) // dtype.itemsize, self._start + begin)
        raw = raw.reshape(entry["shape"])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            wide = raw.astype(np.uint32)
            wide <<= 16
            return wide.view(np.float32)
        return raw if raw.flags.aligned else raw.copy()  # NumPy would copy it again at every product


def save_folder(checkpoint: "Checkpoint", out: Path) -> None:
    """Write any checkpoint as a folder that transformers 4 and 5 read, tensors in float32.

    The folder appears whole or not at all: it is written beside as `<out>.partial` and renamed.
    """
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        tokenizer, tokenizer_config = checkpoint.tokenizer()
        tokenizer.save(str(partial / "tokenizer.json"))
        write_json(partial / "tokenizer_config.json", tokenizer_config)
        write_json(partial / "config.json", checkpoint.config | {"torch_dtype": "float32"})
        write_json(partial / "generation_config.json", checkpoint.generation_config)
        tensors = {n: checkpoint.read(n).astype(np.float32, copy=False)
                   for n in progress(checkpoint.names, "converting", "tensors")}  # fmt: skip
        try:
            save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{partial} could not be written: {error}") from error
        shutil.copymode(partial / "config.json", partial / WEIGHTS)  # the library lets only the owner read it
        os.replace(partial, out)  # takes the place of an empty folder too
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_json(path: Path, hint: str = "") -> dict[str, Any]:
    """The object in a JSON file; errors name the file."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist" + (f"; {hint}" if hint else ""))
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a {type(data).__name__}; it should hold an object")
    return data


def write_json(path: Path, data: dict[str, Any]) -> None:
    """`data` as transformers writes it: sorted, indented, a newline at the end."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
