"""Conversions that are interrupted, run out of disk space or meet damage never look finished, and can be repeated."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from checkpoint_files import FIELDS, random_params, write_folder, write_gguf
from meta_files import write_meta
from test_convert import assert_equal, cast, llama, tensors_of, tokens

from llama.checkpoints import convert as convert_module
from llama.checkpoints import open_checkpoint
from llama.checkpoints.convert import convert
from llama.checkpoints.meta import MetaFolder
from llama.checkpoints.pickles import TorchZip

PARAMS = random_params()
LAST = ("config.json", "params.json")  # what makes a folder a model
pytestmark = pytest.mark.filterwarnings("ignore:no tokenizer is written", "ignore:Meta's layout cannot store max")


@pytest.fixture
def source(tmp_path):
    return write_meta(tmp_path / "source", PARAMS, shards=2, dtype=torch.bfloat16)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def looks_finished(out) -> bool:
    return any((out / name).exists() for name in LAST)


# --- interruptions ---

# Kill a conversion at its n-th disk operation, for every n. Forking makes each one cheap.
KILLER = """
    import os, signal, sys, warnings
    from pathlib import Path
    from llama.checkpoints.convert import convert

    warnings.simplefilter("ignore")
    source, place, options = Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3])
    steps = 0

    def counted(function, fatal):
        def call(*arguments, **more):
            global steps
            steps += 1
            if steps == fatal:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **more)
        return call

    fatal, status = 0, 1
    while status != 0:
        fatal += 1
        if not (child := os.fork()):
            for name in ("mkdir", "fsync", "replace", "unlink"):
                setattr(os, name, counted(getattr(os, name), fatal))
            convert(source, place / str(fatal), **options)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert status == 0 or os.WIFSIGNALED(status), "the conversion itself failed"
    print(fatal)
"""


@pytest.mark.parametrize("options", [{"max_shard_size": "80KB"}, {"to": "meta", "num_shards": 2}])
def test_killed_at_every_step_it_goes_on(tmp_path, source, options):
    if "to" in options:
        source = convert(source, tmp_path / "folder")
    whole = contents(convert(source, tmp_path / "whole", **options))
    place = tmp_path / "killed"
    place.mkdir()
    command = [sys.executable, "-c", textwrap.dedent(KILLER), source, place, repr(options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    steps, finished = int(done.stdout), 0
    assert steps > 15
    for step in range(1, steps):
        out = place / str(step)
        if looks_finished(out):
            finished += 1
            assert whole.items() <= contents(out).items(), step
        convert(source, out, **options)
        assert contents(out) == whole, step
    assert finished < 5  # of more than 15


def test_killed_at_random_moments_it_goes_on(tmp_path, source):
    """Kill it from outside while it writes, with every fsync slowed down."""
    slow = "import os, time; real = os.fsync; os.fsync = lambda file: (time.sleep(0.005), real(file));"
    run = "import sys; from llama.cli import main; sys.argv[0] = 'llama'; main()"
    out, rng, kills = tmp_path / "out", random.Random(0), 0
    lock = out / ".conversion.lock"
    while True:
        arguments = ["convert", source, out, "--max-shard-size", "40KB"]
        child = subprocess.Popen([sys.executable, "-c", slow + run, *arguments], stderr=subprocess.DEVNULL)
        while not lock.exists() and child.poll() is None:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1 * (kills + 1)))
        child.kill()
        if child.wait() == 0:
            break
        assert child.returncode == -signal.SIGKILL
        kills += 1
        lock.unlink(missing_ok=True)
        assert not looks_finished(out) or not list(out.glob("*.partial"))
    assert kills
    assert_equal(tensors_of(out), cast(PARAMS, torch.bfloat16))
    assert contents(out).keys() == contents(convert(source, tmp_path / "whole", max_shard_size="40KB")).keys()


def test_what_is_finished_is_not_written_again(tmp_path, source):
    class Interrupted(MetaFolder):
        def read(self, name):
            if name == "model.layers.1.self_attn.o_proj.weight":
                raise KeyboardInterrupt
            return super().read(name)

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        convert(Interrupted(source), out, max_shard_size="30KB")
    assert not looks_finished(out)
    assert not list(out.glob("*.partial"))
    before = {path.name: path.stat() for path in out.glob("*.safetensors")}
    assert len(before) > 1
    damaged = out / max(before)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"!")  # detected by its SHA-256
    with open(damaged, "rb"):  # while it is open, its inode cannot be given to the file that replaces it
        convert(source, out, max_shard_size="30KB")
    after = {path.name: path.stat() for path in out.glob("*.safetensors")}
    assert len(after) > len(before)
    for name in before:
        assert (before[name].st_ino == after[name].st_ino) == (name != damaged.name)
    assert_equal(tensors_of(out), cast(PARAMS, torch.bfloat16))


def test_begun_with_other_settings_it_begins_anew(tmp_path, source):
    class Interrupted(MetaFolder):
        def read(self, name):
            if name == "model.norm.weight":
                raise KeyboardInterrupt
            return super().read(name)

    with pytest.raises(KeyboardInterrupt):
        convert(Interrupted(source), tmp_path / "out", max_shard_size="30KB")
    begun = (
        r"conversion without --dtype, with --max-shard-size 30000, not finished; "
        r"the conversion starts over and \d finished files"
    )
    with pytest.warns(match=begun):
        convert(source, tmp_path / "out", dtype="float32")
    assert_equal(tensors_of(tmp_path / "out"), cast(cast_params(torch.bfloat16), torch.float32))
    assert contents(tmp_path / "out") == contents(convert(source, tmp_path / "whole", dtype="float32"))


def cast_params(dtype):
    return {name: tensor.float().numpy() for name, tensor in cast(PARAMS, dtype).items()}


def test_two_at_once_are_refused(tmp_path, source):
    class Meanwhile(MetaFolder):
        def read(self, name):
            with pytest.raises(OSError, match="another process is converting into"):
                convert(source, tmp_path / "out")
            return super().read(name)

    convert(Meanwhile(source), tmp_path / "out")
    assert_equal(tensors_of(tmp_path / "out"), cast(PARAMS, torch.bfloat16))


def test_ctrl_c_says_how_it_goes_on(tmp_path, source):
    slow = "import os, time; real = os.fsync; os.fsync = lambda file: (time.sleep(0.2), real(file));"
    run = "import sys; from llama.cli import main; sys.argv[0] = 'llama'; main()"
    command = [sys.executable, "-c", slow + run, "convert", source, tmp_path / "out"]
    child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "conversion.json").exists() and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    said = child.communicate()[1]
    assert "llama: interrupted; run the same command again to resume" in said
    assert "Traceback" not in said
    assert child.returncode == 130
    assert not looks_finished(tmp_path / "out")


# --- full disk ---


@pytest.mark.parametrize("to", ["huggingface", "meta"])
@pytest.mark.parametrize("limit", [100, 30_000])  # too small for the manifest, and for the weights
def test_a_full_disk_is_named_and_left_behind(tmp_path, to, limit):
    source = write_folder(tmp_path / "source", PARAMS)
    arguments = ["convert", source, tmp_path / "out", "--to", to]
    allowed = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    done = llama(*arguments, preexec_fn=allowed)
    assert done.returncode == 1
    file = {100: "conversion.json", 30_000: "model.safetensors" if to == "huggingface" else "consolidated.00.pth"}[
        limit
    ]
    assert done.stderr.endswith(f"{file} could not be written (File too large); make room and try again\n")
    assert "[Errno" not in done.stderr
    assert "Traceback" not in done.stderr
    assert not looks_finished(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.partial"))
    assert llama(*arguments).returncode == 0
    reread = open_checkpoint(tmp_path / "out")
    assert all(np.array_equal(reread.read(name), array) for name, array in PARAMS.items())


# --- damage ---


def cut(path):
    path.write_bytes(path.read_bytes()[:-5000])


def flip(path, at=20_000):
    """Flip a bit in the middle of a tensor."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap(one, other):
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


KINDS = {
    "meta": lambda place: write_meta(place, PARAMS, shards=2),
    "folder": lambda place: write_folder(place, PARAMS, shards=2),
    "gguf": lambda place: write_gguf(place.with_suffix(".gguf"), PARAMS, extra=tokens),
}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
DAMAGE = {
    "meta, cut": ("meta", lambda d: cut(d / "consolidated.01.pth"), "consolidated.01.pth"),
    "meta, one lost": ("meta", lambda d: (d / "consolidated.00.pth").unlink(), "consolidated.00.pth"),
    "meta, the last lost": ("meta", lambda d: (d / "consolidated.01.pth").unlink(), "params.json"),
    "meta, one twice": ("meta", lambda d: shutil.copy(d / "consolidated.01.pth", d / "consolidated.02.pth"), "source"),
    "meta, no params": ("meta", lambda d: (d / "params.json").unlink(), "params.json"),
    "folder, cut": ("folder", lambda d: cut(d / SECOND), SECOND),
    "folder, one lost": ("folder", lambda d: (d / FIRST).unlink(), FIRST),
    "folder, swapped": ("folder", lambda d: swap(d / FIRST, d / SECOND), "index.json"),
    "folder, no config": ("folder", lambda d: (d / "config.json").unlink(), "config.json"),
    "gguf, cut": ("gguf", cut, "source.gguf"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_sources_are_named(tmp_path, damage):
    kind, change, named = DAMAGE[damage]
    whole = KINDS[kind](tmp_path / "source")
    kept = tmp_path / "kept"
    (shutil.copytree if whole.is_dir() else shutil.copy)(whole, kept)
    change(whole)
    done = llama("convert", whole, tmp_path / "out")
    assert done.returncode == 1
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    assert not looks_finished(tmp_path / "out")
    shutil.rmtree(whole) if whole.is_dir() else whole.unlink()
    kept.rename(whole)
    convert(whole, tmp_path / "out", verify=True)


def test_metas_checklist_is_held_against_the_files(tmp_path, source):
    import hashlib

    lines = [f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(source.iterdir())]
    (source / "checklist.chk").write_text("".join(lines))
    convert(source, tmp_path / "out")
    flip(source / "consolidated.00.pth")  # nothing else detects it
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth is damaged: its MD5 is not the one in checklist\.chk"):
        convert(source, tmp_path / "again")
    assert not looks_finished(tmp_path / "again")
    flip(source / "consolidated.00.pth")
    convert(source, tmp_path / "again")
    assert_equal(tensors_of(tmp_path / "again"), cast(PARAMS, torch.bfloat16))


@pytest.mark.parametrize("mark", ["  ", " *"])  # as written by md5sum and md5sum -b
def test_a_damaged_source_is_known_before_the_old_model_goes(tmp_path, source, mark):
    old = write_folder(tmp_path / "out", PARAMS)
    before = contents(old)
    lines = [f"{'0' * 32}{mark}consolidated.{number:02}.pth\n" for number in range(2)]
    (source / "checklist.chk").write_text("".join(lines))
    with pytest.raises(ValueError, match=r"consolidated\.00\.pth is damaged: its MD5 is not"):
        convert(source, old, force=True)
    (source / "checklist.chk").write_text(lines[0])
    with pytest.raises(ValueError, match=r"checklist\.chk does not list consolidated\.01\.pth"):
        convert(source, old, force=True)
    assert contents(old) == before


def test_verify_holds_metas_files_against_their_own_checksums(tmp_path, source):
    flip(source / "consolidated.01.pth")
    with pytest.raises(ValueError, match=r"consolidated\.01\.pth is damaged: consolidated\.01/data/\d+ in it fails"):
        convert(source, tmp_path / "out", verify=True)
    assert not (tmp_path / "out").exists()
    flip(source / "consolidated.01.pth")
    assert convert(source, tmp_path / "out", verify=True)


def test_verify_reads_a_tied_head_that_metas_layout_repeats(tmp_path, monkeypatch):
    fields = FIELDS | {"vocab_size": 64, "tie_word_embeddings": True}
    params = {name: array for name, array in random_params(fields).items() if name != "lm_head.weight"}
    source, real = write_folder(tmp_path / "model", params, fields), convert_module.write_file

    def flipped(folder, planned, advance):
        digest = real(folder, planned, advance)
        held = TorchZip(folder / planned.name)
        flip(folder / planned.name, held._offsets[held._views["output.weight"].storage.key] + 9000)  # in the middle
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "write_file", flipped)
        with pytest.raises(ValueError, match=r"out: lm_head\.weight does not match \S+; convert"):
            convert(source, tmp_path / "out", to="meta", verify=True)
    assert not looks_finished(tmp_path / "out")
    convert(source, tmp_path / "out", to="meta", verify=True)


@pytest.mark.parametrize("options", [{}, {"dtype": "float32"}, {"num_key_value_heads": 1}, {"to": "meta"}])
@pytest.mark.parametrize("at", [-1, -20_000, -70_000])
def test_verify_finds_a_bit(tmp_path, source, monkeypatch, options, at):
    real = convert_module.write_file

    def flipped(folder, planned, advance):
        digest = real(folder, planned, advance)
        data = bytearray((folder / planned.name).read_bytes())
        position = at if planned.name.endswith(".safetensors") else len(data) * 9 // 10 // 64 * 64 + at % 64
        data[position] ^= 1
        (folder / planned.name).write_bytes(data)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "write_file", flipped)
        with pytest.raises(ValueError, match=r"out: \S+( of consolidated\S+)? does not match \S+; convert it again"):
            convert(source, tmp_path / "out", verify=True, **options)
    assert not looks_finished(tmp_path / "out")
    assert convert(source, tmp_path / "out", verify=True, **options)


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path, source):
    class Changing(MetaFolder):
        def read(self, name):
            return super().read(name)[:8]

    with pytest.raises(ValueError, match=r"was read as bfloat16 \(8, 64\) instead of "):
        convert(Changing(source), tmp_path / "out")
    assert not looks_finished(tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["conversion.json"]
