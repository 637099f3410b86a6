"""Resolve `where`: a path, an alias, or a model on the Hugging Face Hub, which is downloaded once."""

import difflib
import glob
import os
import re
import shutil
import sys
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from ..progress import on_terminal
from .fetch import ALIASES, expanded, fetch
from .huggingface import BIN, WEIGHTS, read_json
from .meta import SHARD
from .write import NO_ROOM

# The small files of a repository, by purpose. Each kind requires at least one of its first two.
FILES = {
    "config": ["config.json", "params.json", "generation_config.json", "checklist.chk"],
    "tokenizer": ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                  "added_tokens.json", "chat_template.jinja", "additional_chat_templates/*.jinja"],
}  # fmt: skip
KINDS = {"model": ("config", "tokenizer", "weights"), "parameters": ("config", "weights")}
STORED_IN = (WEIGHTS, f"{WEIGHTS}.index.json", BIN, f"{BIN}.index.json")  # in order of preference

NAME = r"\w(?:(?!--|\.\.)[\w.-])*(?<![.-])"
HUB_ID = re.compile(rf"({NAME}/{NAME})(?:/(.+\.gguf))?", re.ASCII)
PLACES = (
    "a folder with config.json and its weights or with Meta's params.json and consolidated.*.pth, a .gguf file, "
    "a .safetensors file next to its config.json, the id of a model on the Hugging Face Hub (org/name), "
    f"or {' or '.join(map(repr, ALIASES))}"
)
OPTIONS = ("revision", "token", "cache_dir", "local_files_only", "force_download", "subfolder", "gguf_file")


def find(
    where: str | os.PathLike[str],
    *,
    wanted: str = "model",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
    subfolder: str | None = None,
    gguf_file: str | None = None,
    update: bool = False,
) -> Path:
    """Resolve `where` to a folder or file: an existing path, an alias, or a model on the Hub ("org/name" or
    "org/name/file.gguf").

    A path takes precedence over an alias, and an alias over the Hub. A model that is complete in huggingface_hub's
    cache is used without asking for a newer version. Otherwise the missing files are downloaded, so an interrupted
    download resumes. If the cache may hold only some of the model's files, the Hub is asked once for its other files;
    if it cannot be reached, the cached ones are used as they are. HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE
    are respected.

    Args:
        wanted: what to download from the Hub: "model" is everything needed to run the model; "parameters" omits the
            tokenizer; "config" and "tokenizer" are only their files; anything else is the name of one file.
        revision: a branch, tag or commit; by default the branch main.
        token: for private and gated models; None uses HF_TOKEN or the saved login, False sends none.
        cache_dir: a folder to use instead of huggingface_hub's own cache.
        local_files_only: do not use the network, as with HF_HUB_OFFLINE.
        force_download: download again even if cached.
        subfolder, gguf_file: the location inside the folder or repository.
        update: ask the Hub for a newer commit, and download what changed.

    Raises:
        FileNotFoundError: nothing was found. PermissionError: access to the model is denied. OSError: the download
            failed.
    """
    if not isinstance(where, str | os.PathLike) or where == "":
        raise ValueError(f"where must be a path or a name, got {where!r}; give {PLACES}")
    path = expanded(Path(where, subfolder or "", gguf_file or ""))
    if path.exists() or str(where) in ALIASES:
        if revision not in (None, "main"):
            raise ValueError(f"{where} is not on the Hub and has no revision {revision!r}; leave revision out")
        if update and not path.exists():
            warnings.warn(f"{where} has only one version; there is nothing newer to download", stacklevel=2)
        return path if path.exists() else fetch(str(where))
    named = HUB_ID.fullmatch(str(where))
    if not named or expanded(where).exists():  # the subfolder is what is missing
        shown = os.path.join(where, *filter(None, (subfolder, gguf_file)))
        if near := difflib.get_close_matches(str(where), ALIASES):
            raise FileNotFoundError(f"{shown} does not exist; did you mean {near[0]}?")
        if in_url := re.fullmatch(rf"https?://[^/]+/({NAME}/{NAME})/?(tree/.*|blob/.*)?", str(where), re.ASCII):
            raise FileNotFoundError(f"{shown} is a URL; give {in_url[1]}")
        raise FileNotFoundError(f"{shown} does not exist; give {PLACES}")
    inside = PurePosixPath(subfolder or "", named[2] or gguf_file or "")
    if inside.suffix.lower() == ".gguf":
        subfolder, wanted = str(inside.parent), inside.name
    repository = Repository(named[1], revision, token, cache_dir)
    folders = ["" if subfolder in (None, "", ".") else f"{subfolder}/"]
    folders += ["original/"] if folders == [""] else []  # where Meta's own files are, next to the converted ones
    offline = "local_files_only" if local_files_only else "HF_HUB_OFFLINE" if repository.offline else None
    anew = force_download or update
    if anew and offline:
        raise ValueError(f"{where} cannot be downloaded again or updated while {offline} is set; unset one of them")
    found = None if anew else repository.cached(folders, wanted, sure=not offline)
    if found is None and offline:
        raise FileNotFoundError(
            f"{where} is not a local path, nor is all of it in the cache {repository.cache}, and {offline} is set: "
            "allow network access, or give the path of a model"
        )
    if found is None:
        try:
            found = repository.download(folders, wanted, force_download)
        except OSError:
            found = None if anew else repository.cached(folders, wanted, sure=False)
            if found is None:
                raise
    return found / inside.name if inside.suffix.lower() == ".gguf" else found


def hub_options(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Pop `find`'s keyword arguments from the `kwargs` of a from_pretrained."""
    return {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}


class Repository:
    """A model on the Hub and in the cache."""

    def __init__(
        self, name: str, revision: str | None, token: str | bool | None, cache_dir: str | os.PathLike[str] | None
    ):
        from huggingface_hub import constants  # late: rarely needed, and it reads the environment on import

        self.name, self.revision, self.token = name, revision, token
        self.cache = expanded(cache_dir or constants.HF_HUB_CACHE)
        self.endpoint, self.offline = constants.ENDPOINT, constants.HF_HUB_OFFLINE

    def cached(self, folders: list[str], wanted: str, sure: bool) -> Path | None:
        """The folder in the cache if it holds everything wanted, else None. Does not use the network.

        Args:
            sure: require proof that the small files missing from it are not in the repository either.
        """
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            snapshot = self.snapshot([], local_files_only=True)
            for folder in folders:
                names = _names(snapshot / folder)
                needed = _really(wanted, names)
                if _lacks(needed, names, snapshot / folder) is None:
                    # If the library has cached the repository's file listing, this raises where files are missing.
                    small = [folder + name for name in _small_files(needed)]
                    shards = [] if names.intersection(STORED_IN) else ["consolidated.*.pth"] * (needed in KINDS)
                    self.snapshot(small + [folder + name for name in shards], local_files_only=True)
                    return snapshot / folder if not sure or self._knows(small, snapshot.name) else None
        except LocalEntryNotFoundError:
            pass
        return None

    def _knows(self, files: list[str], commit: str) -> bool:
        """Whether the cache proves that those of `files` it lacks are not in the repository either: by a listing of the
        repository, which newer versions of the library keep, or by the library's markers for files not found there."""
        import huggingface_hub

        if listed := getattr(huggingface_hub, "get_cached_repo_tree", None):
            with suppress(huggingface_hub.errors.CachedRepoTreeNotFoundError):
                listed(self.name, revision=commit, cache_dir=self.cache)
                return True
        held = partial(huggingface_hub.try_to_load_from_cache, self.name, cache_dir=self.cache, revision=commit)
        return all(held(file) for file in files if "*" not in file)

    def download(self, folders: list[str], wanted: str, force: bool) -> Path:
        """Download what the cache lacks, small files first, then weights; return the folder in the cache."""
        from huggingface_hub import HfApi

        with self.asking():
            info = HfApi(token=self.token).model_info(self.name, revision=self.revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        held = {folder: {n.removeprefix(folder) for n in sizes if n.startswith(folder)} for folder in folders}
        folder = next((f for f in folders if _lacks(wanted, held[f]) is None), folders[0])
        names = held[folder]
        wanted = _really(wanted, names)
        if lacking := _lacks(wanted, names):
            ggufs = [name for name in sizes if name.endswith(".gguf")]
            more = f"; it has GGUF files, so give one of them: {self.name}/{ggufs[0]}" if ggufs else ""
            raise FileNotFoundError(f"{self.name} on the Hub has no {folder}{lacking}{more}")
        small = [folder + name for name in _small_files(wanted)]
        weights = next((name for name in STORED_IN if name in names), None) if wanted in KINDS else None
        if weights and weights.endswith(".json"):
            small.append(folder + weights)
        options = {"token": self.token, "force_download": force}
        self._check_space(sizes.get(folder + wanted, 0))  # a single file may be large
        with self.asking():
            snapshot = self.snapshot(small, **options)
        for absent in (name for name in small if name not in sizes and "*" not in name):
            note = snapshot.parents[1] / ".no_exist" / snapshot.name / absent  # the library's own marker
            with suppress(OSError):
                note.parent.mkdir(parents=True, exist_ok=True)
                note.touch()
        if wanted in KINDS:
            files = [folder + name for name in _weight_files(names, snapshot / folder)]
            self._check_space(sum(sizes.get(f, 0) for f in files if force or not (snapshot / f).exists()))
            with self.asking():  # at the commit of the small files, in case the branch has moved since
                self.snapshot([glob.escape(file) for file in files], revision=snapshot.name, **options)
        if lacking := _lacks(wanted, _names(snapshot / folder), snapshot / folder):
            raise FileNotFoundError(f"{self.name} on the Hub has no {folder}{lacking}, which its other files refer to")
        return snapshot / folder

    def snapshot(self, patterns: list[str], **options: Any) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import tqdm

        class Bar(tqdm):
            def __init__(self, *arguments: Any, **settings: Any):
                super().__init__(*arguments, **settings | {"disable": not on_terminal()})

        options = {
            "revision": self.revision,
            "cache_dir": self.cache,
            "allow_patterns": patterns,
            "tqdm_class": Bar,
        } | options
        return Path(snapshot_download(self.name, **options))

    def _check_space(self, needed: int) -> None:
        place = next(folder for folder in (self.cache, *self.cache.parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if needed > free:
            raise OSError(
                f"{self.name} needs {needed / 1e9:.2f} GB, but {place} has {free / 1e9:.2f} GB free; "
                "set HF_HOME or cache_dir to another folder",
            )
        if needed and on_terminal():
            print(f"Downloading {self.name}, {needed / 1e9:.2f} GB, to {self.cache}.", file=sys.stderr)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Replace the library's exceptions, whose types differ between major versions, by short messages."""
        from huggingface_hub import errors

        try:
            yield
        except errors.GatedRepoError as error:
            raise PermissionError(
                f"{self.name} is gated: accept its licence at {self.endpoint}/{self.name}, then log in with "
                "`hf auth login` or set HF_TOKEN"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise FileNotFoundError(
                f"{self.name} is not a local path, and {self.endpoint} has no model of that name, or only a private "
                "one. Check the spelling; for a private model log in with `hf auth login` or set HF_TOKEN"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise FileNotFoundError(
                f"{self.name} has no revision {self.revision!r}; its branches, tags and commits are listed at "
                f"{self.endpoint}/{self.name}/commits"
            ) from error
        except Exception as error:
            reasons = [error, error.__cause__]  # the library often wraps the first error in its own
            for reason in reasons:
                if isinstance(reason, OSError) and (reason.filename or reason.errno in NO_ROOM):
                    raise OSError(
                        f"{self.cache} cannot be written to ({reason.strerror}); make room, or set HF_HOME or "
                        "cache_dir to another folder"
                    ) from error
            if any(getattr(getattr(reason, "response", None), "status_code", None) in (401, 403) for reason in reasons):
                raise PermissionError(
                    f"{self.endpoint} does not let this token read {self.name}; log in again with `hf auth login`, "
                    "or set HF_TOKEN"
                ) from error
            said = str(error.__cause__ or error).strip() or type(error).__name__
            raise OSError(
                f"{self.name} is not a local path, and could not be downloaded from {self.endpoint} "
                f"({said.splitlines()[0]}); check the network and try again: complete files are not downloaded again"
            ) from error


def _really(wanted: str, names: Collection[str]) -> str:
    """What is needed for `wanted`: Meta's configuration is inferred from the weights and the tokenizer too."""
    meta = "params.json" in names and "config.json" not in names
    return "model" if meta and wanted in ("config", "parameters") else wanted


def _small_files(wanted: str) -> list[str]:
    return [file for kind in KINDS.get(wanted, (wanted,)) if kind != "weights" for file in FILES.get(kind, [kind])]


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.exists()} if folder.is_dir() else set()


def _weight_files(names: Collection[str], folder: Path) -> list[str]:
    """The weight files among `names`, or all those that an index lists, present or not."""
    first = next((name for name in STORED_IN if name in names), None)
    if first is None:
        return sorted(name for name in names if SHARD.fullmatch(name))
    if not first.endswith(".json"):
        return [first]
    weight_map = read_json(folder / first).get("weight_map")
    return sorted({str(file) for file in weight_map.values()}) if isinstance(weight_map, dict) else []


def _lacks(wanted: str, names: Collection[str], folder: Path | None = None) -> str | None:
    """What is wanted but missing from `names`, None if nothing is; `folder` gives access to the index of shards."""
    for kind in KINDS.get(wanted, (wanted,)):
        if kind != "weights":
            keys = FILES.get(kind, [kind])[:2]
            if not any(name in names for name in keys):
                return " or ".join(keys)
        elif not any(name in STORED_IN or SHARD.fullmatch(name) for name in names):
            return f"{WEIGHTS}, {BIN} or consolidated.00.pth"
        elif folder is not None:
            missing = [file for file in _weight_files(names, folder) if not (folder / file).exists()]
            if missing:
                return missing[0]
    return None
