"""From any checkpoint to a folder in Hugging Face's or Meta's layout, tensor by tensor: `convert(where, out)`.

What is finished stays: an interrupted conversion goes on at its first unfinished file, and a finished one is left as it
is, with what was edited in it since. `conversion.json` in the folder remembers from what and how it is made, and the
SHA-256 of each file of weights. The file that makes a folder a model, config.json or params.json, comes last.
"""

import copy
import hashlib
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from ..progress import byte_bar
from ..reference.config import Config
from ..reference.model import check_params
from . import FLOATS, Checkpoint, open_checkpoint
from .fetch import expanded
from .gguf import GGUFFile
from .huggingface import WEIGHT_FILES, WEIGHTS, HuggingFaceFolder, read_json
from .meta import SHARD, MetaFolder, called_instruct
from .meta_shards import MetaShard, params_json
from .pickles import TorchZip, is_zip
from .torch_zip import torch_zip
from .views import EMBEDDING, HEAD, Changed
from .where import FILES
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
TOKENIZER = FILES["tokenizer"]
SOURCES = (".safetensors", ".bin", ".pth", ".gguf", ".json", ".model", ".jinja")


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
    arguments, it goes on where it stopped: weights that are there are only checked against their SHA-256, and of the
    small files (configuration, index, tokenizer) those that are missing are written.

    Args:
        where: as everywhere (`open_checkpoint`).
        to: "huggingface" (safetensors, config.json, tokenizer.json) or "meta" (consolidated.NN.pth, params.json).
        dtype: "float32", "float16" or "bfloat16"; None keeps each tensor's own (float32 for quantised ones).
        num_key_value_heads: mean-pool the key and value heads to so many, which must divide their number.
        max_shard_size: of a safetensors file, as "5GB".
        num_shards: how many consolidated.NN.pth.
        verify: read everything again and compare it bit by bit with the source, whose own checksums are checked first.
        force: replace what `out` holds, if that is another model, a conversion of another kind, or was changed since.

    Raises:
        ValueError, OSError: something cannot be read, written or represented; the message names it.
    """
    if to not in LAST:
        raise ValueError(f"to must be one of {', '.join(LAST)}, got {to!r}")
    source = _afresh(open_checkpoint(where))
    changed = Changed(source, dtype, num_key_value_heads, tie=to == "meta")
    out = expanded(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder to write into")
    if source.path.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out} is where the source lies; name another folder")
    config = _checked(changed)
    if to == "meta":
        params = params_json(config, source.path)
        shards = [MetaShard(changed, number, num_shards) for number in range(num_shards)]
        planned = [OutFile(f"consolidated.{s.number:02}.pth", s.tensors, s.read, torch_zip) for s in shards]
        last = _told_all(params, changed, out, shards)
        side = _meta_tokenizer(source)
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
        "source": _identity(source),
    }
    with _locked(out):
        finished, stale = _look(out, made, force, planned, side)
        if isinstance(source, MetaFolder) and len(finished) < len(planned):
            _check_sums(source)
        if verify:
            _check_zips(source)
        for path in stale:
            path.unlink()
        was_whole = (out / LAST[to]).exists()
        _write_weights(out, made, finished, planned)
        for name, contents in (side | {LAST[to]: _json(last)}).items():
            if force or not (out / name).exists():
                (out / name).parent.mkdir(exist_ok=True)
                _put(out / name, contents)
        if verify:
            try:
                _verify(source, changed, out, to)
            except BaseException as error:
                if not was_whole:
                    (out / LAST[to]).unlink(missing_ok=True)
                if isinstance(error, ValueError):
                    _put(out / MANIFEST, _json({**made, "sha256": {}}))  # so that nothing of it is kept
                raise
    return out


def _afresh(source: Checkpoint) -> Checkpoint:
    """The same checkpoint, its files mapped anew.

    A model that was loaded from it lives in its mapping: what was trained is no part of the files, and must stay.
    """
    if isinstance(source, GGUFFile):
        return type(source)(source.path)
    fresh = copy.copy(source)
    for name in vars(source):
        if isinstance(getattr(type(source), name, None), cached_property):
            delattr(fresh, name)
    return fresh


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The folder, made if need be, for this process alone. It goes again if nothing came of it.

    Raises:
        OSError: another process has it.
    """
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{out} cannot be made ({error.strerror}); name another folder") from error
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OSError(f"another process is converting into {out}; wait for it, or name another folder") from error
    try:
        yield
    finally:
        try:
            (out / LOCK).unlink(missing_ok=True)  # while it is held, so that nobody holds one that is gone
        except PermissionError:  # Windows: what is open stays, ours as well as another's
            lock.release()
            with suppress(OSError):
                (out / LOCK).unlink(missing_ok=True)
        lock.release()
        if new:
            with suppress(OSError):
                out.rmdir()


def _checked(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration, if it is a LLaMA's and every tensor that it asks for is there in the shape it asks for."""
    config, shapes = checkpoint.config, {}
    for name, stored in checkpoint.tensors.items():
        if stored.dtype.name not in FLOATS:
            raise ValueError(
                f"{checkpoint.path}: {name} is stored as {stored.dtype}; convertible are {', '.join(FLOATS)}"
            )
        try:
            shapes[name] = np.broadcast_to(np.float32(0), stored.shape)
        except ValueError as error:
            raise ValueError(
                f"{checkpoint.path}: {name} cannot have the shape {stored.shape}; fetch it anew"
            ) from error
    if EMBEDDING.removeprefix("model.") in shapes and EMBEDDING not in shapes:
        raise ValueError(
            f"{checkpoint.path} holds a base model, without a language model's head and its names; "
            "save it as a LlamaForCausalLM first"
        )
    try:
        check_params(shapes, Config.from_dict(config))
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}. Correct its configuration, or fetch the model anew.") from error
    return config


def _plan(checkpoint: Checkpoint, max_shard_size: int) -> list[OutFile]:
    """The safetensors files, cut and called as transformers does."""
    shards = split(checkpoint.tensors, max_shard_size)
    return [
        OutFile(name, {tensor: checkpoint.tensors[tensor] for tensor in shard}, checkpoint.read, safetensors)
        for name, shard in zip(shard_names(WEIGHTS, len(shards)), shards, strict=True)
    ]


def _index(planned: list[OutFile]) -> dict[str, Any]:
    stored = [stored for file in planned for stored in file.tensors.values()]
    parameters = sum(s.nbytes // s.dtype.itemsize for s in stored)
    return index({f.name: list(f.tensors) for f in planned}, sum(s.nbytes for s in stored), parameters)


def _look(
    out: Path, made: Mapping[str, Any], force: bool, planned: list[OutFile], side: Collection[str]
) -> tuple[dict[str, str], list[Path]]:
    """What is in the folder: the SHA-256 of the files that are finished, and what has to go before the rest is written,
    in that order. Nothing is changed.

    Raises:
        ValueError: it holds something else. OSError: there is no room for the rest.
    """
    expected = {*(file.name for file in planned), *side, *LAST.values(), MANIFEST}
    files = {path.relative_to(out).as_posix(): path for pattern in ("*", "*/*") for path in out.glob(pattern)}
    files = {name: path for name, path in files.items() if path.is_symlink() or not path.is_dir()}
    held = {name: path for name, path in files.items() if name != LOCK and not name.endswith(PARTIAL)}
    weights = [name for name in held if _is_of_weights(name)]
    complete = [name for name in held if name in LAST.values()]
    manifest = _manifest(out)
    finished: dict[str, str] = {}
    stale: list[str] = []
    if {key: manifest.get(key) for key in made} == made:
        finished = _unchanged(out, manifest["sha256"], planned)
        other = [file.name for file in planned if file.name not in finished]
        other += [name for name in weights if name not in expected]
        if other and complete and not force:
            raise ValueError(
                f"{out / min(other)} is not as the conversion left it; name another folder, or let --force replace it"
            )
        if other:
            stale = [*complete, *(name for name in weights if name not in finished)]
    elif force or (manifest and not complete):  # begun, and left
        if lost := [name for name in manifest.get("sha256", ()) if name in held and not force]:
            warnings.warn(
                f"{out} holds {_difference(manifest, made)}, not finished; it begins anew and "
                f"{len(lost)} finished file{'s' * (len(lost) != 1)} {'are' if len(lost) != 1 else 'is'} replaced",
                stacklevel=3,
            )
        stale = [*complete, *(name for name in held if name not in complete and _is_of_a_model(name))]
    elif any(path.name != LOCK and not path.name.endswith(PARTIAL) for path in out.iterdir()):
        what = _difference(manifest, made) if manifest else "something that is no conversion of this source"
        raise ValueError(f"{out} holds {what}; name another folder, or let --force replace it")
    ours = lambda name: name in expected or (bool(force or manifest) and _is_of_a_model(name))  # noqa: E731
    partial = [name for name in files if name.endswith(PARTIAL) and ours(name.removesuffix(PARTIAL))]  # of a killed run
    stale = [*partial, *stale]
    needed = sum(file.nbytes for file in planned if file.name not in finished)
    free = shutil.disk_usage(out).free + sum(files[name].lstat().st_size for name in stale)
    if needed > free:
        raise OSError(
            f"{out} has {_in_words(free)} free, and {_in_words(needed)} are needed; make room, or name another place"
        )
    return finished, [files[name] for name in stale]


def _is_of_weights(name: str) -> bool:
    return bool(WEIGHT_FILES.fullmatch(name) or SHARD.fullmatch(name))


def _is_of_a_model(name: str) -> bool:
    """Whether a file in a model's folder is the model's, by its name: --force takes away those and nothing else."""
    others = (MANIFEST, *LAST.values(), *TOKENIZER, "generation_config.json", "checklist.chk")
    return _is_of_weights(name) or any(fnmatch(name, pattern) for pattern in others)


def _manifest(out: Path) -> dict[str, Any]:
    """What conversion.json says; {} if there is none, or none that was written here."""
    try:
        manifest = read_json(out / MANIFEST)
    except (ValueError, OSError):
        return {}
    sums = manifest.get("sha256")
    whole = isinstance(sums, dict) and isinstance(manifest.get("settings"), dict)
    return manifest if whole else {}


def _unchanged(out: Path, sums: Mapping[str, Any], planned: list[OutFile]) -> dict[str, str]:
    """The SHA-256 of the planned files that are there as they were written."""
    there = {f.name: sums[f.name] for f in planned if f.name in sums and (out / f.name).is_file()}
    with byte_bar(sum((out / name).stat().st_size for name in there), "checking") as bar:
        return {n: sha for n, sha in there.items() if _digest(out / n, hashlib.sha256(), bar.update) == sha}


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
    differ = {f"--{k.replace('_', '-')}": before.get(k) for k, v in made["settings"].items() if before.get(k) != v}
    options = [f"without {name}" if value is None else f"with {name} {value}" for name, value in differ.items()]
    return f"a conversion {', '.join(options)}"


def _write_weights(out: Path, made: Mapping[str, Any], finished: Mapping[str, str], planned: list[OutFile]) -> None:
    sums = dict(finished)
    missing = [file for file in planned if file.name not in finished]
    if not missing:
        return
    with byte_bar(sum(file.nbytes for file in missing), "converting") as bar:
        _put(out / MANIFEST, _json({**made, "sha256": sums}))
        for file in missing:
            sums[file.name] = write_file(out, file, bar.update)
            _put(out / MANIFEST, _json({**made, "sha256": sums}))


def _digest(path: Path, digest: Any, advance: Callable[[int], Any]) -> str:
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            advance(len(piece))
    return digest.hexdigest()


def _tokenizer(source: Checkpoint) -> dict[str, bytes]:
    """The tokenizer's files. A folder's own are kept as they are."""
    files = {}
    if isinstance(source, HuggingFaceFolder) or (isinstance(source, MetaFolder) and source.only_tokenizer_json):
        found = (path for pattern in TOKENIZER for path in sorted(source.path.glob(pattern)))
        files = {path.relative_to(source.path).as_posix(): path.read_bytes() for path in found}
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
        ValueError: a file is another, or the list is of others.
    """
    path = source.path / "checklist.chk"
    if not path.exists():
        return
    lines = (line.split() for line in path.read_text(errors="replace").splitlines())
    listed = {words[1].removeprefix("*"): words[0].lower() for words in lines if len(words) == 2}  # "*" of md5sum -b
    files = sorted(file for file in source.path.iterdir() if file.name in listed)
    if not listed.keys() & {file.name for file in source.files}:
        raise ValueError(f"{path} has the MD5 of none of the files of weights beside it; fetch it anew, or remove it")
    with byte_bar(sum(file.stat().st_size for file in files), "checking") as bar:
        for file in files:
            if _digest(file, hashlib.md5(usedforsecurity=False), bar.update) != listed[file.name]:
                raise ValueError(f"{file} is damaged: its MD5 is not the one in {path.name}; fetch it anew")


def _check_zips(source: Checkpoint) -> None:
    """Hold what is in the files that torch.save wrote against the checksums in them.

    Raises:
        ValueError: something in a file is damaged.
    """
    files = [file for file in _weight_files(source) if file.suffix in (".pth", ".bin") and is_zip(file)]
    with byte_bar(sum(file.stat().st_size for file in files), "checking") as bar:
        for file in files:
            with zipfile.ZipFile(file) as archive:
                for info in archive.infolist():
                    try:
                        with archive.open(info) as member:
                            while piece := member.read(PIECE):
                                bar.update(len(piece))
                    except zipfile.BadZipFile as error:
                        raise ValueError(
                            f"{file} is damaged: {info.filename} in it does not fit its checksum; fetch it anew"
                        ) from error


class _Planned(MetaFolder):
    """Meta's layout before it is written: as it will be read."""

    def __init__(self, path: Path, params: dict[str, Any], shards: list[MetaShard]):
        self.path, self.params = path, params
        self.files = [path / f"consolidated.{shard.number:02}.pth" for shard in shards]
        self.__dict__["_shards"] = shards
        self._said_version, self._instruct = None, called_instruct(path)


def _told_all(params: dict[str, Any], changed: Changed, out: Path, shards: list[MetaShard]) -> dict[str, Any]:
    """params.json with the context length, where it is not the one that Meta's models of this kind have.

    Warns of tokens at the beginning and the end that are not those of Meta's models of this kind.

    Raises:
        ValueError: the shards and params.json would be read as another model.
    """
    written = _Planned(out, params, shards)
    meant, found = Config.from_dict(dict(changed.config)), Config.from_dict(written.config)
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"):  # fmt: skip
        if getattr(found, field) != getattr(meant, field):
            raise ValueError(
                f"{out} cannot be told from a model whose {field} is {getattr(found, field)!r}; this one's is "
                f"{getattr(meant, field)!r}, so that it cannot be written in Meta's layout"
            )
    said = {f: changed.generation_config.get(f, getattr(meant, f)) for f in ("bos_token_id", "eos_token_id")}
    if lost := [
        f"{f} {ids}" for f, ids in said.items() if ids is not None and _listed(ids) != _listed(getattr(found, f))
    ]:
        warnings.warn(
            f"Meta's layout has no place for {' and '.join(lost)}: {out} will be read with bos_token_id "
            f"{found.bos_token_id} and eos_token_id {found.eos_token_id}; keep the source's config.json",
            stacklevel=3,
        )
    same = found.max_position_embeddings == meant.max_position_embeddings
    return params if same else params | {"max_seq_len": meant.max_position_embeddings}


def _listed(ids: Any) -> list[Any]:
    return sorted(ids) if isinstance(ids, list) else [ids]


def _weight_files(source: Checkpoint) -> list[Path]:
    return getattr(source, "files", [source.path])


def _identity(source: Checkpoint) -> dict[str, Any]:
    """What tells a source from another: its files' sizes and times, and which of them hold the weights."""
    path = source.path
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in SOURCES)
    return {
        "files": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
        "weights": [file.name for file in _weight_files(source)],
    }


def _verify(source: Checkpoint, changed: Changed, out: Path, to: str) -> None:
    """Read what was written, and compare it bit by bit with what should have been."""
    written: Checkpoint = MetaFolder(out) if to == "meta" else HuggingFaceFolder(out)
    wrong = [name for name, stored in changed.tensors.items() if written.tensors.get(name) != stored]
    if wrong := [*wrong, *(written.tensors.keys() - changed.tensors.keys() - {HEAD})]:  # Meta has a tied head, too
        raise ValueError(f"{out}: {wrong[0]} is not what {source.path} makes it; convert it again")
    biases = any(name.endswith(".bias") for name in changed.tensors)  # for which Meta's layout has no place
    if isinstance(source, MetaFolder) and to == "huggingface" and not changed.changes and not biases:
        pairs, total = _back(source, written), sum(file.stat().st_size for file in source.files)
    else:
        pairs, total = _forth(changed, written), sum(stored.nbytes for stored in written.tensors.values())
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
    if HEAD in written.tensors and HEAD not in changed.tensors:
        yield HEAD, changed.read(EMBEDDING), written.read(HEAD)


def _put(path: Path, contents: bytes) -> None:
    with replacing(path) as file:
        file.write(contents)


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
