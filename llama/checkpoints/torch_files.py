"""The part of checkpoints that needs PyTorch: .bin files in, and a model's weights out."""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

SAFETENSORS, BIN = "model.safetensors", "pytorch_model.bin"
PART = r"(-\d{5}-of-\d{5})?"
WEIGHT_FILES = re.compile(rf"(model{PART}\.safetensors|pytorch_model{PART}\.bin)(\.index\.json)?")
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


class TorchFile:
    """A file that torch.save wrote, mapped. It can hold tensors and nothing that would be executed."""

    def __init__(self, path: Path):
        self.path = path
        try:
            try:
                data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap" not in str(error):
                    raise
                data = torch.load(path, map_location="cpu", weights_only=True)  # before PyTorch 1.6: cannot be mapped
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{path} does not exist, though the model's index names it") from error
        except Exception as error:  # pickle and zip readers raise of all kinds
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} is damaged or holds more than tensors ({reason}); fetch it anew") from error
        if not isinstance(data, dict) or not all(
            isinstance(name, str) and isinstance(tensor, torch.Tensor) for name, tensor in data.items()
        ):
            raise ValueError(f"{path} should hold tensors by name, as a state dict does")
        self.header: dict[str, torch.Tensor] = data

    def read(self, name: str) -> np.ndarray:
        tensor = self.header[name].detach()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()

    def read_torch(self, name: str) -> torch.Tensor:
        return self.header[name].detach()


def save_weights(
    tensors: Mapping[str, torch.Tensor], folder: Path, max_shard_size: int | str = "5GB", safe: bool = True
) -> None:
    """Write `tensors` into `folder`: one file, or shards of at most `max_shard_size` bytes with an index."""
    name = SAFETENSORS if safe else BIN
    shards = _shards(tensors, _bytes(max_shard_size))
    stem, suffix = name.rsplit(".", 1)
    files = [name] if len(shards) == 1 else [
        f"{stem}-{number:05}-of-{len(shards):05}.{suffix}" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    weight_map = {tensor: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
    own = _storages(tensors)
    for file, shard in zip(files, shards, strict=True):
        contents = {name: own[name].detach().contiguous() for name in shard}
        try:
            if safe:
                save_file(contents, folder / file, metadata={"format": "pt"})
            else:
                torch.save(
                    {key: tensor.to("cpu", copy=True) for key, tensor in contents.items()}, folder / file
                )  # alone, no views
        except OSError:
            raise
        except Exception as error:
            raise OSError(f"{folder.parent} could not be written: {error}") from error
        os.chmod(folder / file, 0o666 & ~_umask())  # the library lets only the owner read
    if len(shards) > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        parameters = sum(tensor.numel() for tensor in tensors.values())
        index = {"metadata": {"total_size": total, "total_parameters": parameters}, "weight_map": weight_map}
        (folder / f"{name}.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _storages(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, those that share their memory with one before copied: safetensors refuses them."""
    seen: set[int] = set()
    own = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        own[name] = tensor.clone() if place in seen else tensor
        seen.add(place)
    return own


@contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files at the end take the place of `folder`'s: all of them, or none.

    Weights that stand there under other names go too. Should anything fail, what was there before stands again.
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
                except OSError:  # not every file system has links
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


def _shards(tensors: Mapping[str, torch.Tensor], limit: int) -> list[list[str]]:
    """The names, in order, cut where a shard would pass the limit; a tensor larger than it has one of its own."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def _bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]+)", size.strip()) if isinstance(size, str) else None
    if match and match[2].upper() in UNITS:
        size = int(match[1]) * UNITS[match[2].upper()]
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f'max_shard_size must be bytes or like "200MB" or "5GB", got {size!r}')
    return size


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
