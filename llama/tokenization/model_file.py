"""Original tokenizer files: SentencePiece's `.model`, and the list of ranks that Llama 3 ships under the same name.

A `.model` is one protobuf message. The few fields that matter are parsed here: the `sentencepiece` library encodes with
such a file, but exposes neither the types of the pieces nor how text is normalized.
"""

import base64
import binascii
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # piece types
BPE = 2  # one of four model types
# Appended to a message, overrides normalizer_spec.add_dummy_prefix: in protobuf, the last value wins.
DUMMY_PREFIX = {False: b"\x1a\x02\x18\x00", True: b"\x1a\x02\x18\x01"}


@dataclass
class SentencePieceFile:
    """The contents of a `.model` file. Absent fields have protobuf's defaults."""

    data: bytes
    pieces: list[str]
    scores: list[float]
    types: list[int]
    model_type: int = 1
    normalized: bool = False  # whether characters are normalized, as with NFKC
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True
    escape_whitespaces: bool = True

    @classmethod
    def parse(cls, data: bytes, name: str) -> "SentencePieceFile":
        """Parse the bytes of the file `name`.

        Raises:
            ValueError: the file is truncated, damaged or of another kind.
        """
        file = cls(data, [], [], [])
        try:
            for number, value in fields(data):
                if number == 1 and isinstance(value, bytes):
                    file._add_piece(value)
                elif number == 2 and isinstance(value, bytes):
                    file.model_type = int(dict(fields(value)).get(3, 1))
                elif number == 3 and isinstance(value, bytes):
                    said = dict(fields(value))
                    file.normalized = bool(said.get(2, b""))
                    file.add_dummy_prefix = bool(said.get(3, 1))
                    file.remove_extra_whitespaces = bool(said.get(4, 1))
                    file.escape_whitespaces = bool(said.get(5, 1))
        except (ValueError, struct.error, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} is damaged or not a SentencePiece model ({error}); download it again") from error
        if not file.pieces:
            raise ValueError(f"{name} is not a SentencePiece model: it contains no pieces")
        if len(set(file.pieces)) < len(file.pieces):
            raise ValueError(f"{name} is damaged: it contains a piece twice; download it again")
        return file

    def _add_piece(self, message: bytes) -> None:
        # Fast path for the usual layout of a piece: text, score, no type. The general one takes three times as long.
        length = message[1]
        if message[0] == 0x0A and length < 128 and len(message) == length + 7 and message[length + 2] == 0x15:
            self.pieces.append(message[2 : length + 2].decode())
            self.scores.append(struct.unpack_from("<f", message, length + 3)[0])
            self.types.append(NORMAL)
            return
        said = dict(fields(message))
        self.pieces.append(said[1].decode())  # type: ignore[union-attr]
        self.scores.append(struct.unpack("<f", said[2])[0] if 2 in said else 0.0)  # type: ignore[arg-type]
        self.types.append(int(said.get(3, NORMAL)))

    def with_dummy_prefix(self, prefix: bool) -> bytes:
        """The file's bytes, with the space before every text turned on or off."""
        return self.data + DUMMY_PREFIX[prefix]


def fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the number and value of each field of a protobuf message; fixed-size numbers as raw bytes."""
    at, end = 0, len(message)
    while at < end:
        tag = shift = 0
        while True:
            byte = message[at] if at < end else -1
            if byte < 0 or shift > 63:
                raise ValueError("it is truncated" if byte < 0 else "a varint is too long")
            tag |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                break
        kind = tag & 7
        if kind in (0, 2):  # an integer, or the length of what follows
            value = shift = 0
            while True:
                byte = message[at] if at < end else -1
                if byte < 0 or shift > 63:
                    raise ValueError("it is truncated" if byte < 0 else "a varint is too long")
                value |= (byte & 127) << shift
                at, shift = at + 1, shift + 7
                if byte < 128:
                    break
            if kind == 0:
                yield tag >> 3, value
                continue
            size = value
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"unknown wire type {kind}")
        if size > end - at:
            raise ValueError("it is truncated")
        yield tag >> 3, message[at : at + size]
        at += size


def read_ranks(data: bytes, name: str) -> list[bytes]:
    """Read the tokens of a file in tiktoken's format, in order of rank. Each line is a token in base64 and its rank.

    Raises:
        ValueError: a line is malformed, a rank is missing, or a token occurs twice.
    """
    tokens: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), 1):
        try:
            token, rank = line.split()
            tokens[int(rank)] = base64.b64decode(token, validate=True)
        except (ValueError, binascii.Error) as error:
            raise ValueError(f"{name} is damaged: line {number} is not a base64 token and its rank") from error
    if not tokens or sorted(tokens) != list(range(len(tokens))) or len(set(tokens.values())) < len(tokens):
        raise ValueError(f"{name} is damaged: the ranks do not run from 0 to {len(tokens) - 1}, one per token")
    return [tokens[rank] for rank in range(len(tokens))]


def is_ranks(data: bytes) -> bool:
    """Whether this is tiktoken's format rather than SentencePiece's."""
    first = data[:200].split(b"\n", 1)[0].split()
    return len(first) == 2 and first[1].isdigit()


def read_model(path: str | os.PathLike[str]) -> bytes:
    """Read a tokenizer file.

    Raises:
        FileNotFoundError, ValueError: it does not exist; it is a folder, empty or a GGUF file.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; pass the tokenizer.model in it, or use from_pretrained")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; it should be the tokenizer's .model file")
    data = path.read_bytes()
    if not data:
        raise ValueError(f"{path} is empty; download it again")
    if data.startswith(b"GGUF"):
        raise ValueError(f"{path} is a GGUF file, not a tokenizer.model; LlamaTokenizerFast.from_pretrained reads it")
    return data
