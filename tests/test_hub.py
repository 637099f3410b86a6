"""Models on the Hugging Face Hub: what is downloaded, what is reused, and the errors when neither is possible."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import FIELDS, random_params, write_chat_model, write_folder
from hub_server import Repository, files_of, running
from meta_files import write_meta
from sentencepiece_models import llama_like

from llama import load_tokenizer, reference
from llama.checkpoints import open_checkpoint

PARAMS = random_params()
SMALL = ["chat_template.jinja", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
NOISE = {
    ".gitattributes": b"x",
    "README.md": b"x",
    "flax_model.msgpack": b"x",
    "model.onnx": b"x",
    "tokenizer.py": b"x",
}
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """The files of a chat model's repository."""
    made = tmp_path_factory.mktemp("model")
    checkpoint = open_checkpoint(write_chat_model(made / "chat.gguf"))
    folder = write_folder(made / "folder", {n: checkpoint.read(n) for n in checkpoint.tensors}, checkpoint.config)
    tokenizer, settings = checkpoint.tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(settings.pop("chat_template"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 257, "temperature": 0.5}))
    return files_of(folder)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """The files of a model in three shards, without a tokenizer."""
    return files_of(write_folder(tmp_path_factory.mktemp("sharded"), PARAMS, shards=3))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local Hub, and an environment in which child processes use it with a cache of their own."""
    for name in list(os.environ):
        if name.startswith("HF_") or name.lower().endswith("_proxy") or name == "TRANSFORMERS_OFFLINE":
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    with running() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.address)
        yield hub


def ask(code, **environment):
    """Run `code` in a child process and return the lines it prints; its `said` prints an OSError or ValueError."""
    script = (
        "import sys, os, llama; from llama.checkpoints import find\n"
        "def said(call):\n"
        "    try: print(call())\n"
        "    except (OSError, ValueError) as error: print(f'{type(error).__name__}: {error}')\n" + code
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | environment, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def command(*arguments, **environment):
    asked = [sys.executable, "-m", "llama", *map(str, arguments)]
    return subprocess.run(asked, capture_output=True, text=True, env=os.environ | environment, timeout=120)


# Fails on any network access.
BLOCKED = "import socket\ndef refuse(*_): raise AssertionError('used the network')\nsocket.socket.connect = refuse\n"
SUM = "sum(float(abs(p).sum()) for p in llama.reference.load('org/tiny')[0].values())"


def test_a_model_comes_whole_and_is_used_again_without_the_network(hub, chat_model):
    hub.repositories["org/tiny"] = Repository({"main": chat_model | NOISE | {"pytorch_model.bin": b"not wanted"}})
    folder, total = ask(f"print(find('org/tiny')); print({SUM})")
    assert sorted(hub.downloaded()) == sorted([*SMALL, WEIGHTS])
    assert hub.downloaded()[-1] == WEIGHTS  # after the small files: its presence marks the model as complete
    assert files_of(Path(folder)) == chat_model
    asked = len(hub.log)
    again = ask(
        f"{BLOCKED}print(find('org/tiny')); print({SUM})\n"
        "model = llama.LlamaForCausalLM.from_pretrained('org/tiny'); print(model.name_or_path)\n"
        "print(model.generation_config.temperature, llama.GenerationConfig.from_pretrained('org/tiny').temperature)\n"
        "print(llama.LlamaConfig.from_pretrained('org/tiny', revision='main').vocab_size)\n"
        "tokenizer = llama.load_tokenizer('org/tiny', local_files_only=True)\n"
        "print(tokenizer.decode(tokenizer.encode('hi')))\n"
        "print(llama.LlamaTokenizerFast.from_pretrained('org/tiny').chat_template is not None)"
    )
    assert again == [folder, total, "org/tiny", "0.5 0.5", "258", "hi", "True"]
    assert len(hub.log) == asked


def test_each_gets_its_own_files_and_no_more(hub, chat_model):
    hub.repositories["org/tiny"] = Repository({"main": chat_model | NOISE})
    held = ask(
        "where = find('org/tiny', wanted='generation_config.json'); print(sorted(os.listdir(where)))\n"
        "for take in (llama.LlamaConfig, llama.LlamaTokenizerFast, llama.LlamaForCausalLM):\n"
        "    take.from_pretrained('org/tiny'); print(sorted(os.listdir(where)))"
    )
    steps = ["generation_config.json"], ["config.json", "generation_config.json"], SMALL, sorted([*SMALL, WEIGHTS])
    assert held == [str(names) for names in steps]
    assert sorted(hub.downloaded()) == steps[-1]


def test_what_a_model_is_is_told_without_its_weights(hub, chat_model, sharded):
    hub.repositories |= {"org/one": Repository({"main": chat_model}), "org/three": Repository({"main": sharded})}
    for name, small, files in (("one", ["config.json"], "1 file"), ("three", ["config.json", INDEX], "3 files")):
        told = command("info", f"org/{name}")
        assert (told.returncode, told.stderr) == (0, "")
        assert f"Hugging Face's safetensors, {files}:" in told.stdout
        asked = {(path.rsplit("/", 1)[1], part) for method, path, part, _ in hub.log if method == "GET"}
        assert {part for file, part in asked if file.endswith(WEIGHTS[5:])} == {"bytes=0-100000"}
        whole = Path(told.stdout.split()[1])
        assert sorted(os.listdir(whole)) == small
        ask(f"find('org/{name}', wanted='parameters')")
        hub.log.clear()
        again = command("info", f"org/{name}")
        assert again.stdout == told.stdout
        assert not hub.log
    missing = command("info", "org/none")
    assert (missing.returncode, missing.stderr.count("\n")) == (1, 1)
    assert "has no model of that name" in missing.stderr


def test_what_a_model_is_is_told_without_its_tokenizer_where_it_has_to_come_whole(hub, chat_model, tmp_path):
    folder = write_folder(tmp_path / "bin", PARAMS)
    torch.save({n: torch.tensor(a) for n, a in PARAMS.items()}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub.repositories["org/bin"] = Repository({"main": chat_model | files_of(folder)})
    hub.repositories["org/bin"].branches["main"].pop(WEIGHTS)
    told = command("info", "org/bin")
    assert (told.returncode, told.stderr) == (0, "")
    assert "Hugging Face's .bin, 1 file:" in told.stdout
    assert not any("token" in name for name in hub.downloaded())


def test_commands_take_an_id(hub, chat_model):
    hub.repositories["org/tiny"] = Repository({"main": chat_model, "v2": chat_model | {"params.json": b"{}"}})
    fetched, pinned = command("fetch", "org/tiny"), command("fetch", "org/tiny", "--revision", "v2")
    assert (fetched.returncode, fetched.stderr) == (0, "")
    assert os.listdir(fetched.stdout.strip()) != os.listdir(pinned.stdout.strip())
    hub.repositories.clear()
    answered = command("generate", "--model", "org/tiny", "--backend", "reference", "--max-new-tokens", 2, "Hi")
    assert (answered.returncode, answered.stderr[:10]) == (0, "[2 tokens,")


def test_shards_are_those_that_the_index_names(hub, sharded):
    held = sharded | {"model-00001-of-00009.safetensors": b"of another"}
    hub.repositories["org/tiny"] = Repository({"main": held})
    total, lacking = ask(f"print({SUM}); said(lambda: find('org/tiny'))")
    assert sorted(hub.downloaded()) == sorted(sharded)
    assert float(total) == pytest.approx(sum(float(np.abs(array).sum()) for array in PARAMS.values()))
    assert lacking == "FileNotFoundError: org/tiny on the Hub has no tokenizer.json or tokenizer.model"


def test_an_interrupted_download_is_not_taken_for_whole_and_goes_on(hub, sharded, tmp_path):
    repository = hub.repositories["org/tiny"] = Repository({"main": sharded})
    last = sorted(sharded)[-2]
    folder, _ = ask(f"print(find('org/tiny', wanted='parameters')); print({SUM})")
    os.unlink(f"{folder}/{last}")  # as if the download had not reached it
    offline, *_ = ask("said(lambda: llama.reference.load('org/tiny'))", HF_HUB_OFFLINE="1")
    assert offline == (
        f"FileNotFoundError: org/tiny is not a local path, nor is all of it in the cache {tmp_path}/home/hub, and "
        "HF_HUB_OFFLINE is set: allow network access, or give the path of a model"
    )
    for blob in (tmp_path / "home/hub/models--org--tiny/blobs").iterdir():
        if blob.read_bytes() == sharded[last]:
            blob.unlink()
    hub.log.clear()
    repository.cut[last] = [1000]  # then the connection drops midway
    ask(f"import huggingface_hub.constants as c; c.DOWNLOAD_CHUNK_SIZE = 500; print({SUM})")
    assert hub.downloaded() == [last, last]
    assert [span for method, path, span, _ in hub.log if path.endswith(last) and method == "GET"] == [
        None,
        "bytes=1000-",
    ]


FETCH = "from huggingface_hub import hf_hub_download\nfor name in {}: hf_hub_download('org/tiny', name)\n"


def test_single_files_in_the_cache_are_not_taken_for_all_of_a_model(hub, chat_model, tmp_path):
    hub.repositories["org/tiny"] = Repository({"main": chat_model})
    ask(FETCH.format(["config.json", WEIGHTS, "tokenizer.json"]))
    hub.log.clear()
    use = (
        "print(open_checkpoint('org/tiny', wanted='parameters').generation_config['eos_token_id'])\n"
        "print(llama.load_tokenizer('org/tiny').chat_template is not None)"
    )
    use = f"from llama.checkpoints import open_checkpoint\n{use}"
    assert ask(use) == ["257", "True"]
    assert sorted(hub.downloaded()) == ["chat_template.jinja", "generation_config.json", "tokenizer_config.json"]
    asked = len(hub.log)
    shutil.rmtree(tmp_path / "home/hub/models--org--tiny/trees")  # the file listing, which older versions do not keep
    assert ask(BLOCKED + use) == ["257", "True"]
    assert len(hub.log) == asked


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}])
def test_without_a_network_single_files_in_the_cache_are_used(hub, chat_model, environment):
    hub.repositories["org/tiny"] = Repository({"main": chat_model})
    ask(FETCH.format(["config.json", WEIGHTS, "tokenizer.json"]))
    hub.shutdown()
    hub.server_close()
    use = "print(llama.load_tokenizer('org/tiny').chat_template); print(find('org/tiny', wanted='parameters').name)"
    assert ask(use, **environment) == ["None", hub.repositories["org/tiny"].commit("main")[0]]
    told = command("info", "org/tiny", **environment)
    assert (told.returncode, told.stderr) == (0, "")


def test_weights_that_are_no_safetensors(hub, chat_model, sharded, tmp_path):
    import torch

    torch.save({name: torch.from_numpy(array) for name, array in PARAMS.items()}, tmp_path / "pytorch_model.bin")
    stored = {"config.json": sharded["config.json"], "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()}
    meta = files_of(write_meta(tmp_path / "meta", PARAMS, shards=2)) | {"tokenizer.model": llama_like()}
    hub.repositories["org/tiny"] = Repository({"main": stored})
    hub.repositories["org/meta"] = Repository({"main": meta | NOISE})
    below = {f"original/{name}": data for name, data in meta.items()}
    hub.repositories["org/below"] = Repository({"main": below | {"config.json": b"{}"}})
    hub.repositories["org/both"] = Repository({"main": below | chat_model})
    total, width, *folders = ask(
        f"print({SUM})\nprint(llama.LlamaConfig.from_pretrained('org/meta').intermediate_size)\n"
        "for name in ('meta', 'below', 'both'): print(find(f'org/{name}'))\n"
        "print(find('org/both', subfolder='original'))"
    )
    assert float(total) == pytest.approx(sum(float(np.abs(array).sum()) for array in PARAMS.values()))
    assert int(width) == FIELDS["intermediate_size"]  # known from Meta's shards alone
    assert [sorted(os.listdir(folder)) for folder in folders] == [
        sorted(meta), sorted(meta), sorted([*chat_model, "original"]), sorted(meta)
    ]  # fmt: skip
    hub.log.clear()
    again = ask("for name in ('meta', 'below', 'both'): print(find(f'org/{name}'))")
    assert (again, hub.log) == (folders[:3], [])
    os.unlink(f"{folders[0]}/consolidated.01.pth")  # no index names it, but the repository's file listing does
    assert ask("said(lambda: find('org/meta', local_files_only=True)); print(find('org/meta'))")[1:] == folders[:1]
    assert os.path.exists(f"{folders[0]}/consolidated.01.pth")


def test_a_gguf_file_is_named(hub, tmp_path):
    data = write_chat_model(tmp_path / "chat.gguf").read_bytes()
    hub.repositories["org/tiny"] = Repository(
        {"main": {"a.Q4.gguf": data, "sub/b.gguf": data + bytes(1), "README.md": b""}}
    )
    found = ask(
        "print(find('org/tiny/a.Q4.gguf'))\n"
        "print(llama.LlamaConfig.from_pretrained('org/tiny/sub/b.gguf').vocab_size)\n"
        "print(llama.load_tokenizer('org/tiny', gguf_file='a.Q4.gguf').name_or_path); said(lambda: find('org/tiny'))\n"
        "said(lambda: find('org/tiny/c.gguf'))"
    )
    assert found[0].endswith("/a.Q4.gguf")
    assert found[1:3] == ["258", "org/tiny"]
    assert found[3].endswith("has no config.json or params.json; it has GGUF files, so give one of them: "
                             "org/tiny/a.Q4.gguf")  # fmt: skip
    assert found[4].startswith("FileNotFoundError: org/tiny on the Hub has no c.gguf; it has GGUF files")
    assert hub.downloaded() == ["a.Q4.gguf", "sub/b.gguf"]


def test_revisions(hub, chat_model, tmp_path):
    newer = chat_model | {
        "config.json": json.dumps(json.loads(chat_model["config.json"]) | {"use_cache": False}).encode()
    }
    repository = hub.repositories["org/tiny"] = Repository({"main": chat_model, "v2": newer})
    commit = repository.commit("main")[0]
    old, new, pinned, missing = ask(
        f"for name in ('main', 'v2', {commit!r}, 'v3'): said(lambda: find('org/tiny', revision=name))"
    )
    assert (old, old.endswith(commit)) == (pinned, True)
    assert missing == (
        "FileNotFoundError: org/tiny has no revision 'v3'; its branches, tags and commits are listed at "
        f"{hub.address}/org/tiny/commits"
    )
    hub.log.clear()
    repository.branches["main"] = newer  # the branch moves
    assert ask("print(find('org/tiny'))") == [old]
    assert hub.log == []
    updated = ask("print(find('org/tiny', update=True)); print(find('org/tiny'))")
    assert updated == [new, new]
    assert hub.downloaded() == []  # already in the cache, under its other name
    ask("find('org/tiny', force_download=True)")
    assert sorted(hub.downloaded()) == sorted(chat_model)
    here = ask(f"said(lambda: find({str(tmp_path)!r}, revision='v2'))")
    assert here == [f"ValueError: {tmp_path} is not on the Hub and has no revision 'v2'; leave revision out"]


def test_tokens_open_what_is_gated_or_private(hub, chat_model, tmp_path):
    hub.repositories["org/gated"] = Repository({"main": chat_model}, gated="right")
    hub.repositories["org/mine"] = Repository({"main": chat_model}, private="right")
    tries = "for where in ('org/gated', 'org/mine'):\n    said(lambda: find(where, token={}, cache_dir={!r}))\n"
    gated = (
        f"PermissionError: org/gated is gated: accept its licence at {hub.address}/org/gated, then log in with "
        "`hf auth login` or set HF_TOKEN"
    )
    missing = (
        f"FileNotFoundError: org/mine is not a local path, and {hub.address} has no model of that name, or only a "
        "private one. Check the spelling; for a private model log in with `hf auth login` or set HF_TOKEN"
    )
    cache = str(tmp_path / "refused")
    revoked = f"PermissionError: {hub.address} does not let this token read org/gated; log in again with"
    assert ask(tries.format("None", cache)) == [gated, missing]
    assert {token for *_, token in hub.log} == {None}
    assert ask(tries.format("False", cache), HF_TOKEN="right") == [gated, missing]
    assert {token for *_, token in hub.log} == {None}
    assert ask(tries.format("'wrong'", cache)) == [gated, missing]
    assert ask(tries.format("'revoked'", cache))[0].startswith(revoked)
    hub.log.clear()
    for told, environment in (("'right'", {}), ("None", {"HF_TOKEN": "right"})):
        cache = str(tmp_path / told)
        found = ask(tries.format(told, cache), **environment)
        assert all(where.startswith(cache) for where in found), found
        assert {token for *_, token in hub.log} == {"Bearer right"}, hub.log


def test_what_is_not_there_is_said_in_a_sentence(hub, chat_model, tmp_path):
    hub.repositories["org/tiny"] = Repository({"main": NOISE})
    hub.repositories["org/index"] = Repository(
        {"main": chat_model | {WEIGHTS + ".index.json": b'{"weight_map": {"a": "gone.safetensors"}}'}}
    )
    del hub.repositories["org/index"].branches["main"][WEIGHTS]
    no, lacking, shard, *paths = ask(
        "wrong = 'a/b/c', 'a--b/c', 'a/b.', './a/b', 'a/b/', '/a/b', 'b'\n"
        "for where in ('org/typo', 'org/tiny', 'org/index', *wrong): said(lambda: find(where))"
    )
    assert "no model of that name, or only a private one" in no
    assert lacking == "FileNotFoundError: org/tiny on the Hub has no config.json or params.json"
    assert shard == ("FileNotFoundError: org/index on the Hub has no gone.safetensors, which its other files refer to")
    for path, said in zip(("a/b/c", "a--b/c", "a/b.", "./a/b", "a/b/", "/a/b", "b"), paths, strict=True):
        assert said.startswith(f"FileNotFoundError: {path} does not exist; give a folder with config.json")
    done = command("generate", "-m", "org/typo", "Hi")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("llama: org/typo is not a local path, and ")
    (tmp_path / "file").touch()
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    full = "import shutil, types; shutil.disk_usage = lambda path: types.SimpleNamespace(free=10, total=10, used=0)\n"
    hub.repositories["org/tiny"] = Repository({"main": chat_model})
    room, place = ask(
        f"{full}said(lambda: find('org/tiny'))\nsaid(lambda: find('org/tiny', cache_dir={str(tmp_path / 'file')!r}))"
    )
    (stopped,) = ask(f"{limit}said(lambda: find('org/tiny'))")
    assert stopped == (
        f"OSError: {tmp_path}/home/hub cannot be written to (File too large); make room, or set HF_HOME or cache_dir "
        "to another folder"
    )
    assert "needs 0.00 GB" in room
    assert room.endswith("has 0.00 GB free; set HF_HOME or cache_dir to another folder")
    assert place.startswith(f"OSError: {tmp_path / 'file'} cannot be written to (Not a directory); make room")
    assert ask("print(open(find('org/tiny') / 'model.safetensors', 'rb').read()[-9:])") == [
        str(chat_model[WEIGHTS][-9:])
    ]


def test_without_a_network(hub, chat_model, tmp_path):
    hub.repositories["org/tiny"] = Repository({"main": chat_model})
    (folder,) = ask("print(find('org/tiny'))")
    hub.shutdown()
    hub.server_close()
    try_all = "said(lambda: find('org/tiny')); said(lambda: find('org/other'))"
    cached, gone = ask(try_all)
    assert cached == folder
    assert gone.startswith(f"OSError: org/other is not a local path, and could not be downloaded from {hub.address} (")
    assert gone.endswith("check the network and try again: complete files are not downloaded again")
    cached, gone = ask(BLOCKED + try_all, HF_HUB_OFFLINE="1")
    assert cached == folder
    assert gone.endswith("and HF_HUB_OFFLINE is set: allow network access, or give the path of a model")
    gone, both = ask(
        f"{BLOCKED}for update in (False, True):\n"
        "    said(lambda: find('org/other', local_files_only=True, update=update))"
    )
    assert both == (
        "ValueError: org/other cannot be downloaded again or updated while local_files_only is set; unset one of them"
    )
    assert "and local_files_only is set: allow network access" in gone


def test_a_path_goes_before_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "org" / "tiny" / "deep", PARAMS)
    assert np.array_equal(
        reference.load("org/tiny", subfolder="deep")[0]["model.norm.weight"], PARAMS["model.norm.weight"]
    )
    with pytest.raises(FileNotFoundError, match="org/tiny/depp does not exist; give a folder"):
        reference.load("org/tiny", subfolder="depp")
    with pytest.raises(ValueError, match="where must be a path or a name, got 3"):
        load_tokenizer(3)
    assert hub.log == []
