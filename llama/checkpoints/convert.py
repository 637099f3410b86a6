"""Convert any checkpoint to a folder in Hugging Face's or Meta's layout, tensor by tensor: `convert(where, out)`.

Finished work is kept: an interrupted conversion resumes at its first unfinished file, and a finished one is left alone,
later edits included. `conversion.json` in the folder records the source, the settings and the SHA-256 of each weight
file. config.json or params.json, which makes the folder a model, is written last.
"""

import copy
import hashlib
import json
import os
import re
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
from ..tokenization.fast import read_tokenizer_json
from . import FLOATS, Checkpoint, open_checkpoint
from .fetch import expanded
from .gguf import GGUFFile
from .huggingface import MANIFEST, WEIGHT_FILES, WEIGHTS, HuggingFaceFolder, read_json
from .meta import CONTEXT, SHARD, MetaFolder, called_instruct
from .meta_shards import MetaShard, params_json
from .names import EMBEDDING, FREQUENCIES, HEAD
from .pickles import TorchZip, is_zip
from .torch_zip import torch_zip
from .views import Changed
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

LOCK = ".conversion.lock"
LAST = {"huggingface": "config.json", "meta": "params.json"}  # makes the folder a model, and is written last
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
    """Write the model at `where` into the folder `out`, and return its path.

    Never holds more in memory than one tensor and its source. Called again with the same arguments after an
    interruption, it resumes: existing weight files are only checked against their SHA-256, and those of the small files
    (configuration, index, tokenizer) that are missing are written.

    Args:
        where: see `open_checkpoint`.
        to: "huggingface" (safetensors, config.json, tokenizer.json) or "meta" (consolidated.NN.pth, params.json).
        dtype: "float32", "float16" or "bfloat16"; None keeps each tensor's own (float32 for quantised ones).
        num_key_value_heads: mean-pool the key and value heads to this number, which must divide theirs.
        max_shard_size: maximum size of a safetensors file, in bytes or as "5GB".
        num_shards: number of consolidated.NN.pth files.
        verify: first check the source's own checksums; afterwards read everything back and compare it bit for bit.
        force: overwrite `out` if it holds another model, a conversion with other settings, or one changed since.

    Raises:
        ValueError, OSError: something cannot be read, written or represented; the message names it.
    """
    if to not in LAST:
        raise ValueError(f"to must be one of {', '.join(LAST)}, got {to!r}")
    if num_shards < 1:
        raise ValueError(f"num_shards must be at least 1, got {num_shards}")
    source = _afresh(open_checkpoint(where))
    changed = Changed(source, dtype, num_key_value_heads, tie=to == "meta")
    out = expanded(out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder to write into")
    if source.path.resolve().is_relative_to(out.resolve()):
        raise ValueError(f"{out} contains the source; choose another folder")
    config = _checked(changed)
    if to == "meta":
        params = params_json(config, source.path)
        shards = [MetaShard(changed, number, num_shards) for number in range(num_shards)]
        planned = [OutFile(f"consolidated.{s.number:02}.pth", s.tensors, s.read, torch_zip) for s in shards]
        _check_read_back(params, changed, out, shards)
        last, side = params, _meta_tokenizer(source)
    else:
        planned, side = _plan(changed, size_in_bytes(max_shard_size)), _tokenizer(source)
        if len(planned) > 1:
            side[f"{WEIGHTS}.index.json"] = _json(_index(planned))
        if changed.generation_config:
            side["generation_config.json"] = _json(changed.generation_config)
        last = config
    made: dict[str, Any] = {
        "settings": {"to": to, "dtype": dtype, "num_key_value_heads": num_key_value_heads}
        | ({"num_shards": num_shards} if to == "meta" else {"max_shard_size": size_in_bytes(max_shard_size)}),
        "source": _identity(source),
    }
    if to == "meta":
        made[CONTEXT] = Config.from_dict(dict(config)).max_position_embeddings
    elif isinstance(source, MetaFolder):
        made["settings"]["llama_version"] = source.version
        if source.version not in ("1", "2"):
            made["settings"]["instruct"] = source.instruct
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
                    _put(out / MANIFEST, _json({**made, "sha256": {}}))  # so that the next run rewrites every file
                raise
    return out


def _afresh(source: Checkpoint) -> Checkpoint:
    """The same checkpoint with freshly mapped files.

    A model loaded from it may share its copy-on-write mappings, in which trained weights differ from the files: these
    must neither be converted nor be discarded by `release`.
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
    """Lock the folder for this process, creating it if needed. A new folder that stays empty is removed again.

    Raises:
        OSError: another process holds the lock, or the folder cannot be created.
    """
    new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{out} cannot be created ({error.strerror}); choose another folder") from error
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OSError(f"another process is converting into {out}; wait for it, or choose another folder") from error
    try:
        yield
    finally:
        try:
            (out / LOCK).unlink(missing_ok=True)  # while holding it, so that nobody can lock a deleted file
        except PermissionError:  # Windows cannot delete a file that is open, here or in another process
            lock.release()
            with suppress(OSError):
                (out / LOCK).unlink(missing_ok=True)
        lock.release()
        if new:
            with suppress(OSError):
                out.rmdir()


def _checked(checkpoint: Checkpoint) -> dict[str, Any]:
    """The configuration, checked to be LLaMA's and to match the names and shapes of the tensors."""
    config, shapes = checkpoint.config, {}
    for name, stored in checkpoint.tensors.items():
        if stored.dtype.name not in FLOATS:
            raise ValueError(f"{checkpoint.path}: {name} is stored as {stored.dtype}; supported: {', '.join(FLOATS)}")
        try:
            shapes[name] = np.broadcast_to(np.float32(0), stored.shape)
        except ValueError as error:
            raise ValueError(
                f"{checkpoint.path}: {name} cannot have the shape {stored.shape}; download it again"
            ) from error
    if EMBEDDING.removeprefix("model.") in shapes and EMBEDDING not in shapes:
        raise ValueError(
            f"{checkpoint.path} holds a base model, without a language-model head and the `model.` prefix; "
            "save it as a LlamaForCausalLM first"
        )
    try:
        parsed = Config.from_dict(config)
        check_params(shapes, parsed)
        for name in shapes:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if layer and int(layer[1]) >= parsed.num_hidden_layers and not name.endswith(FREQUENCIES):
                raise ValueError(f"it holds {name}, but num_hidden_layers is {parsed.num_hidden_layers}")
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}. Correct its configuration, or download it again.") from error
    return config


def _plan(checkpoint: Checkpoint, max_shard_size: int) -> list[OutFile]:
    """The safetensors files, sharded and named as transformers does."""
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
    """The SHA-256 of the finished files in the folder, and what to delete, in that order, before the rest is written.
    Nothing is changed.

    Raises:
        ValueError: it holds something else. OSError: there is not enough disk space for the rest.
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
    if manifest.get("source") == made["source"] and not _other_settings(manifest, made):
        finished = _unchanged(out, manifest["sha256"], planned)
        other = [file.name for file in planned if file.name not in finished]
        other += [name for name in weights if name not in expected]
        if other and complete and not force:
            raise ValueError(
                f"{out / min(other)} is missing or was changed after the conversion; choose another folder, or convert "
                "again with --force"
            )
        if other:
            stale = [*complete, *(name for name in weights if name not in finished)]
    elif force or (manifest and not complete):  # or an unfinished conversion of another kind
        if lost := [name for name in manifest.get("sha256", ()) if name in held and not force]:
            warnings.warn(
                f"{out} holds {_difference(manifest, made)}, not finished; the conversion starts over and "
                f"{len(lost)} finished file{'s' * (len(lost) != 1)} {'are' if len(lost) != 1 else 'is'} replaced",
                stacklevel=3,
            )
        stale = [*complete, *(name for name in held if name not in complete and _is_of_a_model(name))]
    elif any(path.name != LOCK and not path.name.endswith(PARTIAL) for path in out.iterdir()):
        what = _difference(manifest, made) if manifest else "something other than a conversion of this source"
        raise ValueError(f"{out} holds {what}; choose another folder or replace it with --force")
    ours = lambda name: name in expected or (bool(force or manifest) and _is_of_a_model(name))  # noqa: E731
    partial = [name for name in files if name.endswith(PARTIAL) and ours(name.removesuffix(PARTIAL))]  # of killed runs
    stale = [*partial, *stale]
    needed = sum(file.nbytes for file in planned if file.name not in finished)
    free = shutil.disk_usage(out).free + sum(files[name].lstat().st_size for name in stale)
    if needed > free:
        raise OSError(
            f"{out} has {_in_words(free)} free, but {_in_words(needed)} are needed; make room or choose another folder"
        )
    return finished, [files[name] for name in stale]


def _is_of_weights(name: str) -> bool:
    return bool(WEIGHT_FILES.fullmatch(name) or SHARD.fullmatch(name))


def _is_of_a_model(name: str) -> bool:
    """Whether a file belongs to the model in its folder, by its name; no other files are deleted."""
    others = (MANIFEST, *LAST.values(), *TOKENIZER, "generation_config.json", "checklist.chk")
    return _is_of_weights(name) or any(fnmatch(name, pattern) for pattern in others)


def _manifest(out: Path) -> dict[str, Any]:
    """The contents of conversion.json; {} if there is none, or if `convert` did not write it."""
    try:
        manifest = read_json(out / MANIFEST)
    except (ValueError, OSError):
        return {}
    sums = manifest.get("sha256")
    whole = isinstance(sums, dict) and isinstance(manifest.get("settings"), dict)
    return manifest if whole else {}


def _unchanged(out: Path, sums: Mapping[str, Any], planned: list[OutFile]) -> dict[str, str]:
    """The planned files that are still exactly as they were written, with their SHA-256."""
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
    """Describe how the conversion in a folder differs from the requested one."""
    if manifest.get("source") != made["source"]:
        return "a conversion of another source, or of this one before it changed"
    differ = {f"--{name.replace('_', '-')}": value for name, value in _other_settings(manifest, made).items()}
    options = [f"without {name}" if value is None else f"with {name} {value}" for name, value in differ.items()]
    return f"a conversion {', '.join(options)}"


def _other_settings(manifest: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in a manifest that differ from those requested; one that is not recorded is taken to be equal."""
    before = manifest["settings"]
    return {name: before[name] for name, value in made["settings"].items() if before.get(name, value) != value}


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
    """The tokenizer's files. Those already in Hugging Face's format are copied unchanged."""
    files = {}
    if isinstance(source, HuggingFaceFolder) or (isinstance(source, MetaFolder) and source.only_tokenizer_json):
        found = (path for pattern in TOKENIZER for path in sorted(source.path.glob(pattern)))
        files = {path.relative_to(source.path).as_posix(): path.read_bytes() for path in found}
    if "tokenizer.json" in files:
        try:
            read_tokenizer_json(source.path / "tokenizer.json")
        except ValueError as error:
            read_json(source.path / "tokenizer.json")  # raises if it is cut short or damaged
            warnings.warn(f"{error}; it is copied unchanged", stacklevel=3)  # it may need a newer version
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
    """The file tokenizer.model: Meta's code reads no other, and no other can be converted to it."""
    path = source.path / "tokenizer.model"
    try:
        path = source.tokenizer_model if isinstance(source, MetaFolder) else path
        return {path.name: path.read_bytes()}
    except (FileNotFoundError, NotADirectoryError):
        warnings.warn(f"no tokenizer is written: {path} does not exist, and Meta's code reads no other", stacklevel=3)
        return {}


def _check_sums(source: MetaFolder) -> None:
    """Check the files against Meta's checklist.chk, if there is one.

    Raises:
        ValueError: a checksum differs, or a weight file is not listed.
    """
    path = source.path / "checklist.chk"
    if not path.exists():
        return
    lines = (line.split() for line in path.read_text(errors="replace").splitlines())
    # "*" as md5sum -b writes it, "./" as after find
    listed = {words[1].removeprefix("*").removeprefix("./"): words[0].lower() for words in lines if len(words) == 2}
    files = sorted(file for file in source.path.iterdir() if file.name in listed)
    if unlisted := sorted({file.name for file in source.files} - listed.keys()):
        raise ValueError(f"{path} does not list {unlisted[0]}; download it again, or remove it")
    with byte_bar(sum(file.stat().st_size for file in files), "checking") as bar:
        for file in files:
            if _digest(file, hashlib.md5(usedforsecurity=False), bar.update) != listed[file.name]:
                raise ValueError(f"{file} is damaged: its MD5 is not the one in {path.name}; download it again")


def _check_zips(source: Checkpoint) -> None:
    """Check the files written by torch.save against the checksums in them.

    Raises:
        ValueError: a file is damaged.
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
                            f"{file} is damaged: {info.filename} in it fails its checksum; download it again"
                        ) from error


class _Planned(MetaFolder):
    """A folder in Meta's layout that is not written yet, as it will be read back."""

    def __init__(self, path: Path, params: dict[str, Any], shards: list[MetaShard]):
        self.path, self.params = path, params
        self.files = [path / f"consolidated.{shard.number:02}.pth" for shard in shards]
        self.__dict__["_shards"] = shards
        self._said_version, self.instruct = None, called_instruct(path)
        self.__dict__["_context"] = None  # not that of an earlier conversion into the folder


def _check_read_back(params: dict[str, Any], changed: Changed, out: Path, shards: list[MetaShard]) -> None:
    """Warn if the bos and eos tokens or the context length differ from those that Meta's files alone would give.

    Raises:
        ValueError: the shards and params.json would be read back as another model.
    """
    written = _Planned(out, params, shards)
    meant, found = Config.from_dict(dict(changed.config)), Config.from_dict(written.config)
    for field in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                  "num_key_value_heads", "rms_norm_eps", "rope_parameters", "tie_word_embeddings"):  # fmt: skip
        if getattr(found, field) != getattr(meant, field):
            raise ValueError(
                f"{out} would be read as a model whose {field} is {getattr(found, field)!r}; this one's is "
                f"{getattr(meant, field)!r}, so it cannot be written in Meta's layout"
            )
    said = {f: changed.generation_config.get(f, getattr(meant, f)) for f in ("bos_token_id", "eos_token_id")}
    if lost := [
        f"{f} {ids}" for f, ids in said.items() if ids is not None and _listed(ids) != _listed(getattr(found, f))
    ]:
        warnings.warn(
            f"Meta's layout cannot store {' and '.join(lost)}: {out} will be read with bos_token_id "
            f"{found.bos_token_id} and eos_token_id {found.eos_token_id}; keep the source's config.json",
            stacklevel=3,
        )
    if found.max_position_embeddings != meant.max_position_embeddings:
        warnings.warn(
            f"Meta's layout cannot store {CONTEXT} {meant.max_position_embeddings}: without {MANIFEST}, {out} will be "
            f"read with {found.max_position_embeddings}; keep it with the other files",
            stacklevel=3,
        )


def _listed(ids: Any) -> list[Any]:
    return sorted(ids) if isinstance(ids, list) else [ids]


def _weight_files(source: Checkpoint) -> list[Path]:
    return getattr(source, "files", [source.path])


def _identity(source: Checkpoint) -> dict[str, Any]:
    """What identifies a source: the sizes and modification times of its files, and which of them hold the weights."""
    path = source.path
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in SOURCES)
    return {
        "files": {file.name: [file.stat().st_size, file.stat().st_mtime_ns] for file in files},
        "weights": [file.name for file in _weight_files(source)],
    }


def _verify(source: Checkpoint, changed: Changed, out: Path, to: str) -> None:
    """Read back what was written, and compare it bit for bit with what it should be."""
    written: Checkpoint = MetaFolder(out) if to == "meta" else HuggingFaceFolder(out)
    tensors = {n: s for n, s in changed.tensors.items() if to != "meta" or not n.endswith(FREQUENCIES)}
    wrong = [name for name, stored in tensors.items() if written.tensors.get(name) != stored]
    if wrong := [*wrong, *(written.tensors.keys() - tensors.keys() - {HEAD})]:  # Meta stores a tied head too
        raise ValueError(f"{out}: {wrong[0]} does not match {source.path}; convert it again with --force")
    biases = any(name.endswith(".bias") for name in changed.tensors)  # which Meta's layout cannot store
    if isinstance(source, MetaFolder) and to == "huggingface" and not changed.changes and not biases:
        pairs, total = _back(source, written), sum(file.stat().st_size for file in source.files)
    else:
        pairs, total = _forth(changed, tensors, written), sum(stored.nbytes for stored in written.tensors.values())
    with byte_bar(total, "verifying") as bar:
        for name, expected, found in pairs:
            if not same(expected, found, bar.update):
                raise ValueError(f"{out}: {name} does not match {source.path}; convert it again with --force")


def _back(source: MetaFolder, written: Checkpoint) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield each tensor of Meta's shards with the same slice of what was written, permuted back."""
    for number, file in enumerate(source.files):
        held = TorchZip(file)
        tokens, _ = held.tensors["tok_embeddings.weight"].shape
        axis = 1 if tokens == source.config["vocab_size"] else 0
        shard = MetaShard(written, number, len(source.files), axis)
        for name in held.tensors:
            if not name.endswith("rope.freqs"):
                yield f"{name} of {file.name}", held.read(name), shard.read(name)


def _forth(
    changed: Checkpoint, names: Collection[str], written: Checkpoint
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Yield each tensor as it should be and as it was written."""
    for name in names:
        yield name, changed.read(name), written.read(name)
    if HEAD in written.tensors and HEAD not in names:
        yield HEAD, changed.read(EMBEDDING), written.read(HEAD)


def _put(path: Path, contents: bytes) -> None:
    with replacing(path) as file:
        file.write(contents)


def _json(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
