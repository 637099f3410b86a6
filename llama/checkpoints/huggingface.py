"""Folders in Hugging Face's layout: config.json, safetensors (one file or shards with an index), tokenizer files."""

import json
import re
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer

from ..tokenization.fast import read_tokenizer_json, with_known_names
from ..tokenization.loading import folder_settings
from .pickles import TorchZip, is_zip
from .stored import MappedFile, Stored, unreadable

WEIGHTS = "model.safetensors"
BIN = "pytorch_model.bin"
MANIFEST = "conversion.json"  # what `llama convert` leaves in the folders it writes
PART = r"(-\d{5}-of-\d{5})?"
WEIGHT_FILES = re.compile(rf"(model{PART}\.safetensors|pytorch_model{PART}\.bin)(\.index\.json)?")
# The dtypes of safetensors that NumPy can represent.
DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
          "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2, "I64": np.int64, "I32": np.int32,
          "I16": np.int16, "I8": np.int8, "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
          "BOOL": np.bool_}  # fmt: skip


class HuggingFaceFolder:
    """A `Checkpoint` in a folder. Files are read lazily; tensors are memory-mapped, not copied.

    Args:
        weights: the name of the safetensors file, if not model.safetensors.
    """

    def __init__(self, path: Path, weights: str | None = None):
        self.path = path
        self._weights = weights

    @cached_property
    def config(self) -> dict[str, Any]:
        if not (self.path / "config.json").exists():
            check_whole(self.path)
        return read_json(self.path / "config.json", hint="a model folder holds its configuration there")

    @cached_property
    def generation_config(self) -> dict[str, Any]:
        path = self.path / "generation_config.json"
        return read_json(path) if path.exists() else {}

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        return {name: file.tensors[name] for name, file in self._files.items()}

    @property
    def files(self) -> list[Path]:
        """The files that hold the weights."""
        return sorted({file.path for file in self._files.values()})

    @cached_property
    def _files(self) -> dict[str, Any]:
        """The file of each tensor. As in transformers, safetensors come before .bin, a single file before shards."""
        for name, opened in ((self._weights or WEIGHTS, SafetensorsFile), (BIN, _torch_file)):
            if (self.path / name).exists():
                file = opened(self.path / name)
                if not file.tensors:
                    raise ValueError(f"{file.path} holds no tensors; download it again")
                return dict.fromkeys(file.tensors, file)
            index = self.path / f"{name}.index.json"
            if index.exists():
                return self._shards(index, opened)
        check_whole(self.path)
        raise FileNotFoundError(
            f"{self.path} holds neither {WEIGHTS} nor {BIN}, nor an index of shards: there are no weights to read"
        )

    def _shards(self, index: Path, opened: Callable[[Path], Any]) -> dict[str, Any]:
        found = read_json(index).get("weight_map")
        weight_map: dict[str, Any] = found if isinstance(found, dict) else {}
        if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError(f"{index} has no weight_map from tensor names to file names")
        shards = {}
        for shard in sorted(set(weight_map.values())):
            if Path(shard).name != shard or shard in ("", ".", ".."):
                raise ValueError(f"{index} points to {shard!r}, outside its own folder; it may only name files there")
            shards[shard] = opened(self.path / shard)
        for name, shard in weight_map.items():
            if name not in shards[shard].tensors:
                raise ValueError(f"{index} lists {name} in {shard}, which does not contain it; download both again")
        return {name: shards[shard] for name, shard in weight_map.items()}

    def read(self, name: str) -> np.ndarray:
        return self._files[name].read(name)

    def tokenizer(self) -> tuple[Tokenizer, dict[str, Any]]:
        path = self.path / "tokenizer.json"
        if not path.exists() and (self.path / "tokenizer.model").exists():
            from ..tokenization import LlamaTokenizerFast

            return LlamaTokenizerFast.from_pretrained(self.path).contents()
        library = read_tokenizer_json(path)
        return library, with_known_names(library, folder_settings(self.path))


def check_whole(folder: Path) -> None:
    """Explain why a file of the model is missing from a folder, if there is more to say than the file's name.

    Raises:
        FileNotFoundError: the folder is an unfinished conversion, or holds GGUF files or no model at all.
    """
    if (folder / MANIFEST).exists():
        raise FileNotFoundError(f"{folder} is an unfinished conversion; run the same `llama convert` again")
    if is_hugging_face(folder) or (folder / "config.json").exists() or any(folder.glob("consolidated.*.pth")):
        return
    if ggufs := sorted(folder.glob("*.gguf")):
        raise FileNotFoundError(
            f"{folder} is not a model itself, but holds {'one' if len(ggufs) == 1 else 'some'}; give {ggufs[0]}"
        )
    raise FileNotFoundError(
        f"{folder} holds no model: no config.json with {WEIGHTS} or {BIN}, no params.json with consolidated.*.pth, "
        "no .gguf file"
    )


def is_hugging_face(path: Path) -> bool:
    """Whether a folder holds weights under Hugging Face's names."""
    return any((path / f"{name}{index}").exists() for name in (WEIGHTS, BIN) for index in ("", ".index.json"))


def _torch_file(path: Path) -> Any:
    if not path.is_file() or is_zip(path):
        return TorchZip(path)
    try:
        from .torch_files import TorchFile
    except ImportError as error:
        raise ValueError(
            f"{path} predates PyTorch 1.6 and can only be read with PyTorch, which is not installed"
        ) from error
    return TorchFile(path)


class SafetensorsFile:
    """One safetensors file, memory-mapped.

    The library validates the file, including every offset, but does not read the tensors: its NumPy reader copies.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            if path.exists():  # the library says that a file it is not permitted to open does not exist
                open(path, "rb").close()
            with safe_open(path, framework="numpy"):
                self._data = MappedFile(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} does not exist, though the model's index names it") from error
        except (SafetensorError, OSError, MemoryError) as error:
            raise unreadable(path, "not a safetensors file", error) from error
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self.tensors: dict[str, Stored] = {}
        self._offsets: dict[str, int] = {}
        for name, entry in header.items():
            if entry["dtype"] not in DTYPES:
                raise ValueError(f"{path}: {name} is stored as {entry['dtype']}; supported: {', '.join(DTYPES)}")
            self.tensors[name] = Stored(np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"]))
            self._offsets[name] = 8 + length + entry["data_offsets"][0]

    def read(self, name: str) -> np.ndarray:
        return self._data.array(self.tensors[name], self._offsets[name])


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
    """Write `data` as transformers does: sorted, indented, with a trailing newline."""
    path.write_text(json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
