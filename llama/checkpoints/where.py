"""What `where` means: a path, an alias, or a model on the Hugging Face Hub, which is downloaded once."""

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

# The small files of a repository, by what they are for. Of each kind one of the first two must be there.
FILES = {
    "config": ["config.json", "params.json", "generation_config.json", "checklist.chk"],
    "tokenizer": ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                  "added_tokens.json", "chat_template.jinja", "additional_chat_templates/*.jinja"],
}  # fmt: skip
KINDS = {"model": ("config", "tokenizer", "weights"), "parameters": ("config", "weights")}
STORED_IN = (WEIGHTS, f"{WEIGHTS}.index.json", BIN, f"{BIN}.index.json")  # the first that is there is taken

NAME = r"\w(?:(?!--|\.\.)[\w.-])*(?<![.-])"
HUB_ID = re.compile(rf"({NAME}/{NAME})(?:/(.+\.gguf))?", re.ASCII)
PLACES = (
    "a folder with config.json and its weights or with Meta's params.json and consolidated.*.pth, a .gguf file, "
    "a .safetensors file beside its config.json, the id of a model on the Hugging Face Hub (org/name), "
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
    """The folder or file at `where`: a path that exists, an alias, or a model on the Hub, as "org/name" or
    "org/name/file.gguf".

    A path goes before an alias and an alias before the Hub. What is wholly in huggingface_hub's cache is used without
    asking the network whether there is something newer; the rest is downloaded, and a download that broke off goes on
    with the files that it lacks. Where single files were put into the cache, the Hub is asked once what else belongs to
    them; if it cannot be reached, they are used as they are. HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE hold as
    everywhere.

    Args:
        wanted: what is downloaded of a model on the Hub: "model" is all that one needs to run; "parameters" is that
            without the tokenizer; "config" and "tokenizer" are their files; anything else is the name of one file.
        revision: a branch, tag or commit instead of the branch main.
        token: for private and gated models; None takes HF_TOKEN or the login's, False sends none.
        cache_dir: instead of huggingface_hub's own cache.
        local_files_only: do not ask the network, as under HF_HUB_OFFLINE.
        force_download: download again what is there.
        subfolder, gguf_file: where in the folder or repository.
        update: ask the Hub for a newer commit, and download what it changed.

    Raises:
        FileNotFoundError: there is nothing of the kind. PermissionError: the model is gated. OSError: the download
        failed.
    """
    if not isinstance(where, str | os.PathLike):
        raise ValueError(f"where must be a path or a name, got {where!r}; give {PLACES}")
    path = expanded(Path(where, subfolder or "", gguf_file or ""))
    if path.exists() or str(where) in ALIASES:
        if revision not in (None, "main"):
            raise ValueError(f"{where} is not on the Hub and has no revision {revision!r}; leave revision out")
        if update and not path.exists():
            warnings.warn(f"{where} is one version for good; there is nothing newer to download", stacklevel=2)
        return path if path.exists() else fetch(str(where))
    named = HUB_ID.fullmatch(str(where))
    if not named or expanded(where).exists():  # the subfolder is what is missing
        shown = os.path.join(where, *filter(None, (subfolder, gguf_file)))
        if near := difflib.get_close_matches(str(where), ALIASES):
            raise FileNotFoundError(f"{shown} does not exist; did you mean {near[0]}?")
        if in_url := re.fullmatch(rf"https?://[^/]+/({NAME}/{NAME})/?(tree/.*|blob/.*)?", str(where), re.ASCII):
            raise FileNotFoundError(f"{shown} is an address; give {in_url[1]}")
        raise FileNotFoundError(f"{shown} does not exist; give {PLACES}")
    inside = PurePosixPath(subfolder or "", named[2] or gguf_file or "")
    if inside.suffix.lower() == ".gguf":
        subfolder, wanted = str(inside.parent), inside.name
    repository = Repository(named[1], revision, token, cache_dir)
    folders = ["" if subfolder in (None, "", ".") else f"{subfolder}/"]
    folders += ["original/"] if folders == [""] else []  # where Meta's own files lie beside converted ones
    offline = "local_files_only" if local_files_only else "HF_HUB_OFFLINE" if repository.offline else None
    anew = force_download or update
    if anew and offline:
        raise ValueError(f"{where} cannot be downloaded anew while {offline} is set; leave one of the two out")
    found = None if anew else repository.cached(folders, wanted, sure=not offline)
    if found is None and offline:
        raise FileNotFoundError(
            f"{where} is no path here, nor is all of it in the cache {repository.cache}, and {offline} is set: "
            "allow the network, or give the path of a model"
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
    """Take those keywords of a from_pretrained out of `kwargs` that are `find`'s."""
    return {name: kwargs.pop(name) for name in OPTIONS if name in kwargs}


class Repository:
    """A model on the Hub, and what of it is in the cache."""

    def __init__(
        self, name: str, revision: str | None, token: str | bool | None, cache_dir: str | os.PathLike[str] | None
    ):
        from huggingface_hub import constants  # late: it is needed by few, and reads its environment as it is imported

        self.name, self.revision, self.token = name, revision, token
        self.cache = expanded(cache_dir or constants.HF_HUB_CACHE)
        self.endpoint, self.offline = constants.ENDPOINT, constants.HF_HUB_OFFLINE

    def cached(self, folders: list[str], wanted: str, sure: bool) -> Path | None:
        """The folder in the cache if all that is wanted is there. The network is not asked.

        Args:
            sure: not without knowing that the small files it lacks are not in the repository either.
        """
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            snapshot = self.snapshot([], local_files_only=True)
            for folder in folders:
                names = _names(snapshot / folder)
                needed = _really(wanted, names)
                if _lacks(needed, names, snapshot / folder) is None:
                    # Where the library has kept the repository's listing, it knows what else belongs there.
                    small = [folder + name for name in _small_files(needed)]
                    shards = [] if names.intersection(STORED_IN) else ["consolidated.*.pth"] * (needed in KINDS)
                    self.snapshot(small + [folder + name for name in shards], local_files_only=True)
                    return snapshot / folder if not sure or self._knows(small, snapshot.name) else None
        except LocalEntryNotFoundError:
            pass
        return None

    def _knows(self, files: list[str], commit: str) -> bool:
        """Whether the cache can tell of each file that it lacks that the repository has none: by a listing of the
        repository, which newer versions of the library keep, or by its notes of what it did not find there."""
        import huggingface_hub

        if listed := getattr(huggingface_hub, "get_cached_repo_tree", None):
            with suppress(huggingface_hub.errors.CachedRepoTreeNotFoundError):
                listed(self.name, revision=commit, cache_dir=self.cache)
                return True
        held = partial(huggingface_hub.try_to_load_from_cache, self.name, cache_dir=self.cache, revision=commit)
        return all(held(file) for file in files if "*" not in file)

    def download(self, folders: list[str], wanted: str, force: bool) -> Path:
        """The folder in the cache, after downloading what it lacks: first the small files, then the weights."""
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
            more = f"; it has GGUF files, of which one can be named: {self.name}/{ggufs[0]}" if ggufs else ""
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
            note = snapshot.parents[1] / ".no_exist" / snapshot.name / absent  # as the library itself notes it
            with suppress(OSError):
                note.parent.mkdir(parents=True, exist_ok=True)
                note.touch()
        if wanted in KINDS:
            files = [folder + name for name in _weight_files(names, snapshot / folder)]
            self._check_space(sum(sizes.get(f, 0) for f in files if force or not (snapshot / f).exists()))
            with self.asking():  # for the commit of the small files, should the branch move meanwhile
                self.snapshot([glob.escape(file) for file in files], revision=snapshot.name, **options)
        if lacking := _lacks(wanted, _names(snapshot / folder), snapshot / folder):
            raise FileNotFoundError(f"{self.name} on the Hub has no {folder}{lacking}, which its other files ask for")
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
                f"{self.name} takes {needed / 1e9:.2f} GB and {place} has {free / 1e9:.2f} GB free; "
                "HF_HOME or cache_dir names another place",
            )
        if needed and on_terminal():
            print(f"Downloading {self.name}, {needed / 1e9:.2f} GB, to {self.cache}.", file=sys.stderr)

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Say in a sentence or two what the library raises, which is of another family in each major version."""
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
                f"{self.name} is no path here, and {self.endpoint} has no model of that name, or a private one. "
                "Check the spelling; for a private model log in with `hf auth login` or set HF_TOKEN"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise FileNotFoundError(
                f"{self.name} has no revision {self.revision!r}; its branches, tags and commits are listed at "
                f"{self.endpoint}/{self.name}/commits"
            ) from error
        except Exception as error:
            reasons = [error, error.__cause__]  # the library often puts an error of its own before the first
            for reason in reasons:
                if isinstance(reason, OSError) and (reason.filename or reason.errno in NO_ROOM):
                    raise OSError(
                        f"{self.cache} cannot be written to ({reason.strerror}); make room, or let HF_HOME or "
                        "cache_dir name another place"
                    ) from error
            if any(getattr(getattr(reason, "response", None), "status_code", None) in (401, 403) for reason in reasons):
                raise PermissionError(
                    f"{self.endpoint} does not let this token read {self.name}; log in anew with `hf auth login`, "
                    "or set HF_TOKEN"
                ) from error
            said = str(error.__cause__ or error).strip() or type(error).__name__
            raise OSError(
                f"{self.name} is no path here, and could not be downloaded from {self.endpoint} "
                f"({said.splitlines()[0]}); check the network and try again: files that are whole are not downloaded "
                "twice"
            ) from error


def _really(wanted: str, names: Collection[str]) -> str:
    """What must be there for what is wanted: Meta's configuration is read from the weights and the tokenizer too."""
    meta = "params.json" in names and "config.json" not in names
    return "model" if meta and wanted in ("config", "parameters") else wanted


def _small_files(wanted: str) -> list[str]:
    return [file for kind in KINDS.get(wanted, (wanted,)) if kind != "weights" for file in FILES.get(kind, [kind])]


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.exists()} if folder.is_dir() else set()


def _weight_files(names: Collection[str], folder: Path) -> list[str]:
    """The files of those in `names` that hold the weights, or should: all that an index names."""
    first = next((name for name in STORED_IN if name in names), None)
    if first is None:
        return sorted(name for name in names if SHARD.fullmatch(name))
    if not first.endswith(".json"):
        return [first]
    weight_map = read_json(folder / first).get("weight_map")
    return sorted({str(file) for file in weight_map.values()}) if isinstance(weight_map, dict) else []


def _lacks(wanted: str, names: Collection[str], folder: Path | None = None) -> str | None:
    """What a folder with the files `names` lacks of what is wanted; shards too, where their index can be read."""
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
