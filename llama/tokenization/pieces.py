"""Join SentencePiece pieces into text, as the SentencePiece library does."""

import codecs
import re
from collections.abc import Collection, Sequence

BYTE = re.compile("<0x([0-9A-F]{2})>")
SPACE = "▁"

codecs.register_error("each-byte", lambda error: ("\N{REPLACEMENT CHARACTER}" * (error.end - error.start), error.end))  # type: ignore[attr-defined]


def join(
    tokens: Sequence[str],
    added: Collection[str],
    apart: Collection[str],
    prefix: bool,
    everywhere: bool,
) -> str:
    """Join `tokens` into text.

    The space that encoding put before the text, or before each part between added tokens, is removed; all other spaces
    stay. Every byte of invalid UTF-8 becomes U+FFFD.

    Args:
        added: the added tokens, which are written as they are.
        apart: the added tokens that get a space on both sides.
        prefix: whether encoding puts a space before the text.
        everywhere: whether encoding also puts one after each added token.
    """
    parts: list[str] = []
    text, run = "", []
    strip = prefix
    for token in tokens:
        if token not in added:
            run.append(token)
            continue
        text += plain(run, strip)
        run, strip = [], prefix and everywhere
        if token in apart:
            parts += [text, token] if text else [token]
            text, strip = "", prefix
        else:
            text += token
    text += plain(run, strip)
    return " ".join([*parts, text] if text else parts) if parts else text


def plain(pieces: list[str], strip: bool) -> str:
    """Join the pieces of one part of a text, without its leading space if `strip`."""
    joined = "".join(pieces)
    if "<0x" in joined:
        joined = "".join(_with_bytes(pieces))
    text = joined.replace(SPACE, " ")
    return text[1:] if strip and pieces and pieces[0].startswith(SPACE) else text


def _with_bytes(pieces: list[str]) -> list[str]:
    done, run = [], bytearray()
    for piece in pieces:
        if match := BYTE.fullmatch(piece):
            run.append(int(match[1], 16))
            continue
        if run:
            done.append(run.decode("utf-8", "each-byte"))
            run = bytearray()
        done.append(piece)
    return [*done, run.decode("utf-8", "each-byte")]
