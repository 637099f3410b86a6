"""Read the headers of a model on the Hub: a few requests instead of downloading the weights."""

from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .fetch import ALIASES, expanded
from .huggingface import DTYPES, WEIGHTS, HuggingFaceFolder
from .stored import Stored
from .where import HUB_ID, Repository

INDEX = f"{WEIGHTS}.index.json"


class Header(NamedTuple):
    """A safetensors file's header."""

    path: Path
    tensors: dict[str, Stored]


class HeadersOnHub(HuggingFaceFolder):
    """A `Checkpoint` whose configuration is cached, while its weights stay on the Hub and cannot be read."""

    def __init__(self, repository: Repository, path: Path, single: bool):
        super().__init__(path)
        self._repository, self._single = repository, single

    @cached_property
    def _files(self) -> dict[str, Any]:
        if not self._single:
            return self._shards(self.path / INDEX, self._header)
        file = self._header(self.path / WEIGHTS)
        return dict.fromkeys(file.tensors, file)

    def _header(self, path: Path) -> Header:
        from huggingface_hub import HfApi

        name = self._repository.name
        with self._repository.asking():
            found = HfApi().parse_safetensors_file_metadata(name, path.name, revision=self.path.name)
        for tensor, entry in found.tensors.items():
            if entry.dtype not in DTYPES:
                raise ValueError(
                    f"{name}/{path.name}: {tensor} is stored as {entry.dtype}; supported: {', '.join(DTYPES)}"
                )
        if not found.tensors:
            raise ValueError(f"{name}/{path.name} on the Hub holds no tensors")
        return Header(path, {n: Stored(np.dtype(DTYPES[e.dtype]), tuple(e.shape)) for n, e in found.tensors.items()})


def headers_on_hub(where: str) -> HeadersOnHub | None:
    """Open the headers of the model `where` ("org/name") on the Hub, if it is in safetensors.

    Returns None where `open_checkpoint` has to be used instead: `where` is a path, an alias or a GGUF file, everything
    is cached, the network must not be used, or the weights are in another format and have to be downloaded.
    """
    named = HUB_ID.fullmatch(where)
    if named is None or named[2] or where in ALIASES or expanded(where).exists():
        return None
    from huggingface_hub import HfApi

    repository = Repository(named[1], None, None, None)
    if repository.offline or repository.cached(["", "original/"], "parameters", sure=False):
        return None
    with repository.asking():
        info = HfApi().model_info(repository.name)
        names = {file.rfilename for file in info.siblings or ()}
        if "config.json" not in names or not names & {WEIGHTS, INDEX}:
            return None
        path = repository.snapshot(["config.json", INDEX], revision=info.sha)
    return HeadersOnHub(repository, path, WEIGHTS in names)
