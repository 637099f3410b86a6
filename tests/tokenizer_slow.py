"""How transformers' slow LlamaTokenizer decodes ids, and where that does not invert encoding."""

from collections.abc import Collection
from typing import Any, NamedTuple

BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
# Each of these loses or adds spaces; our tokenizers have none of them.
QUIRKS = {
    "twice": "legacy=True strips two leading spaces, its own and SentencePiece's, though encoding added one",
    "unasked": "legacy=True strips a leading space though add_prefix_space=False added none",
    "shifted": "legacy=True puts the space due before a special token in front of the text that precedes it",
    "first": "a special token at the front is followed by a space, though none was encoded",
    "stripped": "legacy=False strips a space after an added token, though encoding added none there",
    "trailing": "spaces_between_special_tokens=True ends in a space if the last ids decode to no text",
}


class Added(NamedTuple):
    """A token that decodes to its own content."""

    content: str
    special: bool
    apart: bool  # subject to spaces_between_special_tokens: all but bos_token, eos_token and the like


def decoded(
    ids: list[int],
    pieces: Any,
    added: dict[int, Added],
    *,
    legacy: bool,
    prefix: bool,
    skip: bool = False,
    spaces: bool = False,
    quirks: Collection[str] = QUIRKS,
) -> str:
    """Decode `ids` with the given QUIRKS; with all of them, the result is that of transformers."""
    parts: list[str] = []
    segment: list[int] = []
    touched = True  # whether encoding prefixed this segment with a space, or decoding separates it with spaces

    def text_of_segment() -> str:
        return _text(segment, pieces, added, legacy, prefix, prefix and (touched or "stripped" in quirks), quirks)

    for number in ids:
        if skip and number in added and added[number].special:
            continue
        if number in added and added[number].apart:
            if segment and (text := text_of_segment()):
                parts.append(text)
            parts.append(added[number].content)
            segment, touched = [], legacy or spaces
        else:
            segment.append(number)
    if segment and ((text := text_of_segment()) or "trailing" in quirks):
        parts.append(text)
    return (" " if spaces else "").join(parts)


def _text(ids, pieces, added, legacy, prefix, strip, quirks) -> str:
    out, run = "", []
    for at, number in enumerate([*ids, None]):
        special = number in added
        if number is not None and not special:
            run.append(pieces.id_to_piece(number))
            if "first" in quirks and prefix and at == 1 and ids[0] in added and not run[0].startswith("▁"):
                out += " "
            continue
        if special and run and legacy and "shifted" in quirks:
            out += " "
        if run:
            first = at == len(run)
            if first and strip and run[0].startswith("▁"):
                run[0] = run[0][1:]
            if legacy and (("twice" in quirks if first else True) if prefix else "unasked" in quirks):
                at_front = next((i for i, piece in enumerate(run) if piece), 0)
                run[at_front] = run[at_front].removeprefix("▁")
        out += _plain(run) + (added[number].content if special else "")
        run = []
    return out


def _plain(run: list[str]) -> str:
    text, waiting = "", b""
    for piece in [*run, ""]:
        if piece in BYTES:
            waiting += bytes([BYTES[piece]])
            continue
        while waiting:
            size = next((n for n in (1, 2, 3, 4) if _is_character(waiting[:n])), 0)
            text += waiting[:size].decode() if size else "\N{REPLACEMENT CHARACTER}"
            waiting = waiting[size or 1 :]
        text += piece.replace("▁", " ")
    return text


def _is_character(data: bytes) -> bool:
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False


def cleaned(text: str) -> str:
    """Remove the spaces that clean_up_tokenization_spaces removes."""
    for spaced in (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(spaced, spaced.strip())
    return text
