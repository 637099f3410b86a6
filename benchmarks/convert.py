"""Converting Meta's files: memory against the 700 MB promised, time against copying them twice, and 70B's shapes.

    python -m benchmarks.convert                              # a table, and benchmarks/results/convert.json
    python -m benchmarks.convert --transformers OTHER/python  # also that environment's converter, transformers 4.46

The checkpoint is synthetic: two bfloat16 shards, 2 GB. Both commands are timed as whole processes, from the start of
Python to the last file. The source is in the page cache, except for "from the disk", as with a checkpoint downloaded
yesterday or larger than memory. The result is compared with its source once, by `--verify`. Needs about 12 GB of disk
space in $TMPDIR.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llama.checkpoints.convert import convert
from llama.checkpoints.meta_shards import MetaShard, params_json
from llama.checkpoints.names import rotated_heads
from llama.checkpoints.stored import Stored
from llama.checkpoints.torch_zip import torch_zip
from llama.checkpoints.write import AHEAD, PIECE
from llama.reference import Config, parameter_shapes

from . import harness

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # for meta_files

BFLOAT16 = np.dtype("bfloat16")
SMALL = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632,
         "num_hidden_layers": 20, "num_attention_heads": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
         "max_position_embeddings": 4096}  # fmt: skip
LARGE = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 8192, "intermediate_size": 28672,
         "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
         "max_position_embeddings": 4096}  # fmt: skip
SHARDS = {"small": 2, "large": 8}


def small(folder: Path) -> Path:
    """Write 2 GB of random weights in two shards, with a tokenizer of matching size."""
    from meta_files import write_meta
    from sentencepiece_models import fetched

    torch.manual_seed(0)
    shapes = parameter_shapes(Config.from_dict(SMALL))
    params = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02) for name, shape in shapes}
    said = {"multiple_of": 256, "ffn_dim_multiplier": None, "vocab_size": 32000}
    return write_meta(folder, params, SMALL, SHARDS["small"], torch.bfloat16, said=said, tokenizer=fetched())


class Shapes:
    """A checkpoint of zeros, which takes no memory."""

    path = Path("shapes")

    def __init__(self, fields: dict[str, Any]):
        self.config = fields
        self.tensors = {name: Stored(BFLOAT16, shape) for name, shape in parameter_shapes(Config.from_dict(fields))}

    def read(self, name: str) -> np.ndarray:
        return np.zeros(self.tensors[name].shape, BFLOAT16)


class Holes:
    """A sparse file: pieces of zeros become holes, which take no space."""

    def __init__(self, path: Path):
        self._file = open(path, "wb")  # noqa: SIM115

    def write(self, data: bytes) -> int:
        if len(data) == PIECE and not any(data[:64]):
            self._file.seek(len(data), os.SEEK_CUR)
        else:
            self._file.write(data)
        return len(data)

    def flush(self) -> None:
        self._file.flush()


def sparse(folder: Path, fields: dict[str, Any], shards: int) -> Path:
    """Write Meta's files for these shapes, with holes for weights."""
    import json

    folder.mkdir()
    for number in range(shards):
        shard, file = MetaShard(Shapes(fields), number, shards), Holes(folder / f"consolidated.{number:02}.pth")
        torch_zip(file, shard.tensors, shard.read)  # type: ignore[arg-type]
        file.flush()
    (folder / "params.json").write_text(json.dumps(params_json(fields, folder)))
    return folder


def planned_peak(fields: dict[str, Any], shards: int) -> int:
    """Peak bytes on top of Python and its libraries: the tensor that needs most, and the pieces waiting to be hashed.

    A tensor needs itself, one shard's mapped part of it, and for q and k that part reordered.
    """
    tensors = Shapes(fields).tensors
    most = max(
        stored.nbytes + stored.nbytes // shards * (2 if rotated_heads(name, fields) else 1)
        for name, stored in tensors.items()
        if len(stored.shape) > 1
    )
    return most + AHEAD * PIECE


def command(source: Path, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "llama", "convert", str(source), str(out), *more]


def seconds(out: Path, *commands: list[str], unread: Path | None = None) -> Callable[[], float]:
    """Seconds that the commands take in sequence, after evicting the files in `unread` from the page cache."""

    def measure() -> float:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        os.sync()
        for path in unread.iterdir() if unread else ():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        for one in commands:
            subprocess.run(one, check=True, capture_output=True)
        return time.perf_counter() - start

    return measure


def processor(measure: Callable[[], float]) -> Callable[[], float]:
    """The CPU seconds that `measure` takes, on all cores and including the kernel's."""

    def used() -> float:
        before = os.times()
        measure()
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    return used


def measure(work: Path, runs: int, python: str | None) -> list[dict]:
    source, out = small(work / "meta"), work / "out"
    size = sum(file.stat().st_size for file in source.iterdir())
    copies = [["cp", "-r", str(source), str(out / name)] for name in ("a", "b")]
    subprocess.run(command(source, out / "verified", "--verify"), check=True, capture_output=True)
    # The load average shows other work, which slows down the conversion, but not cp.
    about = {"gigabytes": round(size / 1e9, 3), "load_average": round(os.getloadavg()[0], 1)}
    rows = []
    for what, unread in (("wall, until it is on the disk", None), ("wall, from the disk and onto it", source)):
        rivals = {
            "llama convert": seconds(out, command(source, out / "a"), ["sync"], unread=unread),
            "cp, twice": seconds(out, *copies, ["sync"], unread=unread),
        }
        rows.append(harness.row(what, "s", harness.take_turns(rivals, runs), **about))
        about = {}
    busy = {"llama convert": seconds(out, command(source, out / "a")), "cp, twice": seconds(out, *copies)}
    busy = {name: processor(measure) for name, measure in busy.items()}
    rows.append(harness.row("processor", "s", harness.take_turns(busy, runs)))

    def peak(command: list[str]) -> list[float]:
        shutil.rmtree(out, ignore_errors=True)
        return [round(harness.peak_memory(command) / 1e6, 1)]

    def memory(what: str, peaks: dict[str, list[float]], **more: object) -> None:
        rows.append(harness.row(f"peak memory, {what}", "MB", peaks, **more))

    peaks = {"llama convert": peak(command(source, out))}
    if python:
        script = [python, "-m", "transformers.models.llama.convert_llama_weights_to_hf", "--input_dir", str(source),
                  "--num_shards", "2", "--llama_version", "2", "--output_dir", str(out / "b")]  # fmt: skip
        both = {"llama convert": seconds(out, command(source, out / "a")), "transformers": seconds(out, script)}
        found = subprocess.run([python, "-c", "import transformers as t; print(t.__version__)"], capture_output=True)
        rows.append(harness.row("wall, beside transformers' script", "s", harness.take_turns(both, min(runs, 3)),
                                transformers=found.stdout.decode().strip()))  # fmt: skip
        peaks["transformers"] = peak(script)
    memory("plain", peaks)
    memory("--verify", {"llama convert": peak(command(source, out, "--verify"))})
    memory("--dtype float32", {"llama convert": peak(command(source, out, "--dtype", "float32"))})
    folder = convert(source, work / "folder")
    memory("--to meta", {"llama convert": peak(command(folder, out, "--to", "meta", "--num-shards", "2"))})
    shutil.rmtree(folder)
    shutil.rmtree(source)
    planned = {
        what: round(planned_peak(fields, SHARDS["large"]) / 1e6, 1)
        for what, fields in (("80 layers", LARGE), ("1 layer", LARGE | {"num_hidden_layers": 1}))
    }
    one = sparse(work / "large", LARGE | {"num_hidden_layers": 1}, SHARDS["large"])
    whole = {"llama convert": peak(command(one, out))}
    memory("a layer of Llama 2 70B in 8 shards", whole, planned_beside_python=planned)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--transformers", metavar="PYTHON", help="Python of an environment with transformers 4.46")
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "convert.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        rows = measure(Path(work), options.runs, options.transformers)
    model = "LLaMA of 2048 × 20 layers, random, bfloat16; Llama 2 70B's shapes"
    harness.write(options.out, "convert", model, rows)


if __name__ == "__main__":
    main()
