"""From any checkpoint to a folder in Hugging Face's or Meta's layout, tensor by tensor: `convert(where, out)`.

What is finished stays: an interrupted conversion goes on at its first unfinished file. `conversion.json` in the folder
remembers from what and how it is made, and the SHA-256 of each file of weights. The file that makes a folder a model,
config.json or params.json, comes last.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..progress import byte_bar
from ..reference.config import Config
from ..reference.model import check_params
from . import FLOATS, Checkpoint, open_checkpoint
from .huggingface import WEIGHTS, HuggingFaceFolder, read_json
from .meta import MetaFolder
from .meta_shards import MetaShard, params_json
from .pickles import TorchZip
from .torch_zip import torch_zip
from .views import HEAD, Changed
from .write import (
    PARTIAL,
    PIECE,
    OutFile,
    index,
    replacing,
    safetensors,
    same,
    shard_names,
    size_in_bytes,
    split,
    write_file,
)

MANIFEST, LOCK = "conversion.json", ".conversion.lock"
LAST = {"huggingface": "config.json", "meta": "params.json"}  # what makes a folder a model, and is written last
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
             "tokenizer.model", "chat_template.jinja")  # fmt: skip
# What --force may take away: files of a model and nothing else.
OF_A_MODEL = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?|consolidated\.\d+\.pth"
    rf"|generation_config\.json|checklist\.chk|{'|'.join(map(re.escape, (MANIFEST, *LAST.values(), *TOKENIZER)))}"
)
SOURCES = (".safetensors", ".bin", ".pth", ".gguf", ".json", ".model")


def convert(
    where: str | os.PathLike[str] | Checkpoint,
    out: str | os.PathLike[str],
    *,
    to: str = "huggingface",
    dtype: str | None = None,
    num_key_value_heads: int | None = None,
    max_shard_size: int | str = "5GB",
    num_shards: int = 1,
    verify: bool = False,
    force: bool = False,
) -> Path:
    """Write the model at `where` into the folder `out`, and give its path.

    In memory is never more than a tensor and what it is made of. Run again after an interruption with the same
    arguments, it goes on where it stopped; what is finished is only checked against its SHA-256.

    Args:
        where: as everywhere (`open_checkpoint`).
        to: "huggingface" (safetensors, config.json, tokenizer.json) or "meta" (consolidated.NN.pth, params.json).
        dtype: "float32", "float16" or "bfloat16"; None keeps each tensor's own (float32 for quantised ones).
        num_key_value_heads: mean-pool the key and value heads to so many, which must divide their number.
        max_shard_size: of a safetensors file, as "5GB".
        num_shards: how many consolidated.NN.pth.
        verify: read everything again and compare it bit by bit with the source.
        force: replace what `out` holds, if that is another model or a conversion of another kind.

    Raises:
        ValueError, OSError: something cannot be read, written or represented; the message names it.
    """
    if to not in LAST:
        raise ValueError(f"to must be one of {', '.join(LAST)}, got {to!r}")
    source = open_checkpoint(where)
    changed = Changed(source, dtype, num_key_value_heads)
    out = Path(out).expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder to write into")
    if source.path.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out} is where the source lies; name another folder")
    config = _checked(changed)
    if to == "meta":
        last = params_json(config, source.path)
        planned, side = _plan_meta(changed, num_shards), _meta_tokenizer(source)
    else:
        planned, side = _plan(changed, size_in_bytes(max_shard_size)), _tokenizer(source)
        if len(planned) > 1:
            side[f"{WEIGHTS}.index.json"] = _json(_index(planned))
        if changed.generation_config:
            side["generation_config.json"] = _json(changed.generation_config)
        last = config
    made = {
        "settings": {"to": to, "dtype": dtype, "num_key_value_heads": num_key_value_heads}
        | ({"num_shards": num_shards} if to == "meta" else {"max_shard_size": size_in_bytes(max_shard_size)}),
        "source": _identity(source.path),
    }
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OSError(f"another process is converting into {out}; wait for it, or name another folder") from error
    try:
        finished = _prepare(out, made, force, planned)
        if isinstance(source, MetaFolder) and len(finished) < len(planned):
            _check_sums(source)
        _write_weights(out, made, finished, planned)
        for name, contents in side.items():
            _put(out / name, contents)
        if to == "meta":
            last = _told_all(last, config, out)
        _put(out / LAST[to], _json(last))
        if verify:
            try:
                _verify(source, changed, out, to)
            except BaseException as error:
                (out / LAST[to]).unlink(missing_ok=True)
                if isinstance(error, ValueError):
                    _put(out / MANIFEST, _json({**made, "sha256": {}}))  # so that nothing of it is kept
                raise
    finally:
        (out / LOCK).unlink(missing_ok=True)  # while it is held, so that nobody holds one that is gone
        lock.release()
        if new:
            with suppress(OSError):
                out.rmdir()  # if nothing came of it
    return out


def _checked(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration, if it is a LLaMA's and every tensor that it asks for is there in the shape it asks for."""
    for name, stored in checkpoint.tensors.items():
        if stored.dtype.name not in FLOATS:
            raise ValueError(
                f"{checkpoint.path}: {name} is stored as {stored.dtype}; convertible are {', '.join(FLOATS)}"
            )
    shapes = {name: np.broadcast_to(np.float32(0), stored.shape) for name, stored in checkpoint.tensors.items()}
    try:
        check_params(shapes, Config.from_dict(checkpoint.config))
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}. Correct its configuration, or fetch the model anew.") from error
    return checkpoint.config


def _plan(checkpoint: Checkpoint, max_shard_size: int) -> list[OutFile]:
    """The safetensors files, cut and called as transformers does."""
    shards = split(checkpoint.tensors, max_shard_size)
    return [
        OutFile(name, {tensor: checkpoint.tensors[tensor] for tensor in shard}, checkpoint.read, safetensors)
        for name, shard in zip(shard_names(WEIGHTS, len(shards)), shards, strict=True)
    ]


def _plan_meta(checkpoint: Checkpoint, num_shards: int) -> list[OutFile]:
    shards = (MetaShard(checkpoint, number, num_shards) for number in range(num_shards))
    return [OutFile(f"consolidated.{s.number:02}.pth", s.tensors, s.read, torch_zip) for s in shards]


def _index(planned: list[OutFile]) -> dict[str, Any]:
    stored = [stored for file in planned for stored in file.tensors.values()]
    parameters = sum(s.nbytes // s.dtype.itemsize for s in stored)
    return index({f.name: list(f.tensors) for f in planned}, sum(s.nbytes for s in stored), parameters)


def _prepare(out: Path, made: dict[str, Any], force: bool, planned: list[OutFile]) -> dict[str, str]:
    """Look at what is in the folder, and whether the rest has room. Gives the SHA-256 of the files that are finished.

    Raises:
        ValueError: it holds something else. OSError: there is no room.
    """
    held = [path for path in out.iterdir() if path.name != LOCK and not path.name.endswith(PARTIAL)]
    manifest = read_json(out / MANIFEST) if (out / MANIFEST).exists() else {}
    finished: dict[str, str] = {}
    if not held:
        stale = []
    elif {key: manifest.get(key) for key in made} == made:
        finished = {f.name: sha for f in planned if (sha := manifest["sha256"].get(f.name)) and (out / f.name).exists()}
        stale = [path for path in held if OF_A_MODEL.fullmatch(path.name) and path.name not in (*finished, MANIFEST)]
    elif force or (manifest and not any((out / name).exists() for name in LAST.values())):  # begun, and left
        stale = [path for path in held if OF_A_MODEL.fullmatch(path.name)]
    else:
        what = _difference(manifest, made) if manifest else "something that is no conversion of this source"
        raise ValueError(f"{out} holds {what}; name another folder, or let --force replace it")
    needed = sum(file.nbytes for file in planned if file.name not in finished)
    free = shutil.disk_usage(out).free + sum(path.stat().st_size for path in stale)
    if needed > free:
        raise OSError(
            f"{out} has {_in_words(free)} free, and {_in_words(needed)} are needed; make room, or name another place"
        )
    for path in [*sorted(stale, key=lambda path: path.name not in LAST.values()), *out.glob(f"*{PARTIAL}")]:
        path.unlink()  # what makes it a model goes first
    return finished


def _in_words(size: float) -> str:
    """ "139.5 GB" """
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _difference(manifest: Mapping[str, Any], made: Mapping[str, Any]) -> str:
    """What sets the conversion in a folder apart from the one that is asked for, in words."""
    if manifest.get("source") != made["source"]:
        return "a conversion of another source, or of this one before it changed"
    before = manifest.get("settings") or {}
    options = [f"--{k.replace('_', '-')} {before.get(k)}" for k, v in made["settings"].items() if before.get(k) != v]
    return f"a conversion with {', '.join(options)}"


def _write_weights(out: Path, made: Mapping[str, Any], finished: Mapping[str, str], planned: list[OutFile]) -> None:
    sums: dict[str, str] = {}
    keep = lambda: _put(out / MANIFEST, _json({**made, "sha256": {**finished, **sums}}))  # noqa: E731
    with byte_bar(sum(file.nbytes for file in planned), "converting") as bar:
        keep()
        for file in planned:
            known = finished.get(file.name)
            if known is None or _digest(out / file.name, hashlib.sha256(), bar.update) != known:
                known = write_file(out, file, bar.update)
            sums[file.name] = known
            keep()


def _digest(path: Path, digest: Any, advance: Callable[[int], Any]) -> str:
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def _tokenizer(source: Checkpoint) -> dict[str, bytes]:
    """The tokenizer's files. A folder's own are kept as they are."""
    files = {}
    if isinstance(source, HuggingFaceFolder):
        files = {name: (source.path / name).read_bytes() for name in TOKENIZER if (source.path / name).exists()}
    if "tokenizer.json" in files:
        return files
    try:
        tokenizer, settings = source.tokenizer()
        if isinstance(source, MetaFolder):
            files["tokenizer.model"] = source.tokenizer_model.read_bytes()
    except FileNotFoundError as error:
        warnings.warn(f"no tokenizer is written: {error}", stacklevel=3)
        return files
    return files | {"tokenizer.json": tokenizer.to_str(pretty=True).encode(), "tokenizer_config.json": _json(settings)}


def _meta_tokenizer(source: Checkpoint) -> dict[str, bytes]:
    """Meta's code knows tokenizer.model alone, and nothing else can be made into one."""
    path = source.path / "tokenizer.model"
    try:
        path = source.tokenizer_model if isinstance(source, MetaFolder) else path
        return {path.name: path.read_bytes()}
    except (FileNotFoundError, NotADirectoryError):
        warnings.warn(f"no tokenizer is written: {path} does not exist, which is what Meta's code reads", stacklevel=3)
        return {}


def _check_sums(source: MetaFolder) -> None:
    """Hold the files against Meta's checklist.chk, where there is one.

    Raises:
        ValueError: a file is another.
    """
    path = source.path / "checklist.chk"
    if not path.exists():
        return
    lines = (line.split() for line in path.read_text(errors="replace").splitlines())
    listed = {words[1]: words[0].lower() for words in lines if len(words) == 2}
    files = sorted(file for file in source.path.iterdir() if file.name in listed)
    with byte_bar(sum(file.stat().st_size for file in files), "checking") as bar:
        for file in files:
            if _digest(file, hashlib.md5(usedforsecurity=False), bar.update) != listed[file.name]:
                raise ValueError(f"{file} is damaged: its MD5 is not the one in {path.name}; fetch it anew")


def _told_all(params: dict[str, Any], config: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """params.json with the context length, where it is not the one that Meta's models of this kind have.

    Raises:
        ValueError: the shards and params.json would be read as another model.
    """
    written = MetaFolder(out)
    written.params = params
    meant, found = Config.from_dict(dict(config)), Config.from_dict(written.config)
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"):  # fmt: skip
        if getattr(found, field) != getattr(meant, field):
            raise ValueError(
                f"{out} cannot be told from a model whose {field} is {getattr(found, field)!r}; this one's is "
                f"{getattr(meant, field)!r}, so that it cannot be written in Meta's layout"
            )
    same = found.max_position_embeddings == meant.max_position_embeddings
    return params if same else params | {"max_seq_len": meant.max_position_embeddings}


def _identity(path: Path) -> dict[str, list[int]]:
    """What tells a source from another: its files' sizes and times."""
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in SOURCES)
    return {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files}


def _verify(source: Checkpoint, changed: Changed, out: Path, to: str) -> None:
    """Read what was written, and compare it bit by bit with what should have been."""
    written: Checkpoint = MetaFolder(out) if to == "meta" else HuggingFaceFolder(out)
    wrong = [name for name, stored in changed.tensors.items() if written.tensors.get(name) != stored]
    if wrong := [*wrong, *(written.tensors.keys() - changed.tensors.keys() - {HEAD})]:  # Meta has a tied head, too
        raise ValueError(f"{out}: {wrong[0]} is not what {source.path} makes it; convert it again")
    if isinstance(source, MetaFolder) and to == "huggingface" and not changed.changes:
        pairs, total = _back(source, written), sum(file.stat().st_size for file in source.files)
    else:
        pairs, total = _forth(changed, written), sum(stored.nbytes for stored in changed.tensors.values())
    with byte_bar(total, "verifying") as bar:
        for name, expected, found in pairs:
            if not same(expected, found, bar.update):
                raise ValueError(f"{out}: {name} is not what {source.path} makes it; convert it again")


def _back(source: MetaFolder, written: Checkpoint) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Every tensor of Meta's shards, and that slice of what was written, permuted back."""
    for number, file in enumerate(source.files):
        held = TorchZip(file)
        tokens, _ = held.tensors["tok_embeddings.weight"].shape
        axis = 1 if tokens == source.config["vocab_size"] else 0
        shard = MetaShard(written, number, len(source.files), axis)
        for name in held.tensors.keys() - {"rope.freqs"}:
            yield f"{name} of {file.name}", held.read(name), shard.read(name)


def _forth(changed: Checkpoint, written: Checkpoint) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Every tensor as it should be, and as it was written."""
    for name in changed.tensors:
        yield name, changed.read(name), written.read(name)


def _put(path: Path, contents: bytes) -> None:
    with replacing(path) as file:
        file.write(contents)


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
