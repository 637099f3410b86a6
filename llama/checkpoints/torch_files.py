"""Checkpoint code that needs PyTorch: reading old .bin files, and writing a model's weights."""

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

import ml_dtypes
import numpy as np
import torch
from safetensors.torch import save_file

from .huggingface import BIN, WEIGHT_FILES, WEIGHTS, write_json
from .stored import Stored
from .write import index, shard_names, size_in_bytes, split


class TorchFile:
    """A file written by torch.save before PyTorch 1.6. It may only hold tensors; nothing in it is executed."""

    def __init__(self, path: Path):
        self.path = path
        try:
            data = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(data, dict) or not all(
                isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in data.items()
            ):
                raise ValueError("it should hold tensors by name, as a state dict does")
            self._data: dict[str, torch.Tensor] = data
            self.tensors = {name: Stored(_numpy_dtype(t.dtype), tuple(t.shape)) for name, t in data.items()}
        except Exception as error:  # unpickling raises all kinds of exceptions
            # PyTorch's own message recommends to execute what is in the file
            said = str(error).splitlines()[:1] or [type(error).__name__]
            reason = "" if isinstance(error, UnpicklingError) else f" ({said[0]})"
            raise ValueError(f"{path} is damaged or holds more than tensors{reason}; download it again") from error

    def read(self, name: str) -> np.ndarray:
        tensor = self._data[name].detach()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def as_torch(array: np.ndarray) -> torch.Tensor:
    """A tensor of the same dtype that shares the array's memory; a copy if the array is read-only."""
    if not array.flags.writeable:
        array = array.copy()
    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(f"u{array.itemsize}")).view(torch_dtype(array.dtype))


def torch_dtype(dtype: np.dtype) -> torch.dtype:
    """PyTorch's dtype of the same name."""
    return getattr(torch, dtype.name)


def _numpy_dtype(dtype: torch.dtype) -> np.dtype:
    name = str(dtype).removeprefix("torch.")
    return np.dtype(getattr(ml_dtypes, name, name))


def save_weights(
    tensors: Mapping[str, torch.Tensor], folder: Path, max_shard_size: int | str = "5GB", safe: bool = True
) -> None:
    """Write `tensors` into `folder`: one file, or shards of at most `max_shard_size` bytes with an index."""
    name = WEIGHTS if safe else BIN
    shards = split(tensors, size_in_bytes(max_shard_size))
    files = shard_names(name, len(shards))
    own = _storages(tensors)
    for file, shard in zip(files, shards, strict=True):
        contents = {name: own[name].detach().contiguous() for name in shard}
        (folder / file).touch()
        mode = stat.S_IMODE((folder / file).stat().st_mode)  # a new file's; safetensors lets only the owner read
        try:
            if safe:
                save_file(contents, folder / file, metadata={"format": "pt"})
            else:
                torch.save(
                    {key: tensor.to("cpu", copy=True) for key, tensor in contents.items()}, folder / file
                )  # copies, because torch.save writes a view's whole storage
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{folder.parent} could not be written: {error}") from error
        os.chmod(folder / file, mode)
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        parameters = sum(tensor.numel() for tensor in tensors.values())
        held = dict(zip(files, shards, strict=True))
        write_json(folder / f"{name}.index.json", index(held, total, parameters))


def _storages(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, with copies of those that share memory with an earlier one, which safetensors rejects."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return own


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files replace those in `folder` at the end: all of them, or none.

    Weight files in `folder` under other names are deleted. On failure the previous files are restored.
    """
    made = not folder.exists()
    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        new = sorted(path.name for path in partial.iterdir())
        stale = [p.name for p in folder.iterdir() if WEIGHT_FILES.fullmatch(p.name) and p.name not in new]
        before = partial / "before"
        before.mkdir()
        for name in [*new, *stale]:
            if (folder / name).exists():
                try:
                    os.link(folder / name, before / name)
                except OSError:  # not every file system has hard links
                    shutil.copy2(folder / name, before / name)
        try:
            for name in new:
                os.replace(partial / name, folder / name)
            for name in stale:
                (folder / name).unlink()
        except BaseException:
            for name in new:
                (folder / name).unlink(missing_ok=True)
            for path in before.iterdir():
                os.replace(path, folder / path.name)
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()
