"""Build tokenizers of the `tokenizers` library from vocabularies."""

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from .model_file import BPE, NORMAL, UNUSED, USER_DEFINED, SentencePieceFile

LLAMA3_WORDS = (  # Meta's llama-models, tokenizer.py
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = [  # Meta's llama3, tokenizer.py
    "<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_special_token_{n}|>" for n in range(4)),
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{n}|>" for n in range(5, 251)),
]  # fmt: skip
LLAMA31_SPECIAL = [  # Meta's llama-models, tokenizer.py: same file as in Llama 3, but other names
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eom_id|>", "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{n}|>" for n in range(3, 248)),
]  # fmt: skip


def from_sentencepiece(file: SentencePieceFile, name: str, legacy: bool, prefix: bool) -> Tokenizer:
    """Build a tokenizer equivalent to a SentencePiece model of Llama's kind.

    A space is put before the text; with `legacy`, before each part between added tokens. The usual way to do the
    former, Metaspace's "first", skips texts that begin with a space. So the normalizer first turns spaces into "▁"; one
    Metaspace then prepends a real space, which no text can begin with any more, and another turns that into "▁".

    Raises:
        ValueError: the model is of another kind, which only `LlamaTokenizer` supports.
    """
    if file.model_type != BPE or file.normalized or file.remove_extra_whitespaces or not file.escape_whitespaces:
        raise ValueError(
            f"{name} is not a model of Llama's kind (byte-pair encoding, no normalization); use LlamaTokenizer for it"
        )
    usable = {p for p, type_ in zip(file.pieces, file.types, strict=True) if type_ in (NORMAL, USER_DEFINED, UNUSED)}
    tokenizer = sentencepiece_bpe(file.pieces, file.scores, prefix and legacy, usable)
    if prefix and not legacy:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Metaspace(" ", prepend_scheme="first", split=False),
                pre_tokenizers.Metaspace("▁", prepend_scheme="never", split=False),
            ]
        )
    marks = [p for p, type_ in zip(file.pieces, file.types, strict=True) if type_ == USER_DEFINED]
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in marks])
    return tokenizer


def sentencepiece_bpe(
    pieces: list[str], scores: list[float], add_space_prefix: bool, usable: set[str] | None = None
) -> Tokenizer:
    """Build a tokenizer of SentencePiece's kind, which Llama 1 and 2 use: of all pairs that form a piece, the one with
    the best score merges first, the leftmost among equals; characters that no piece covers are encoded as bytes.

    Args:
        usable: the pieces that merges may use and produce; by default all.
    """
    if len(scores) != len(pieces):
        raise ValueError(f"the tokenizer has {len(pieces)} tokens but {len(scores)} scores")
    vocab = {piece: number for number, piece in enumerate(pieces)}
    known = vocab.keys() if usable is None else usable
    pairs = [
        (-scores[vocab[piece]], -cut, cut - len(piece), piece)
        for piece in known
        for cut in range(1, len(piece))
        if piece[:cut] in known and piece[cut:] in known
    ]
    pairs.sort()  # at equal scores, longer pieces first
    merges = [(piece[:-minus], piece[-minus:]) for _, minus, _, piece in pairs]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=pieces[0], fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if add_space_prefix else replace
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        + [decoders.Strip(" ", 1, 0)] * add_space_prefix
    )
    return tokenizer


def from_ranks(tokens: list[bytes], special: list[str]) -> Tokenizer:
    """Build Llama 3's tokenizer: of all pairs that form a token, the one with the lowest rank merges first. The ids of
    the `special` tokens follow those of `tokens`.
    """
    letters = byte_letters()
    words = ["".join(letters[byte] for byte in token) for token in tokens]
    vocab = {word: rank for rank, word in enumerate(words)}
    merges = []
    for word in words:
        cuts = [(word[:cut], word[cut:]) for cut in range(1, len(word)) if word[:cut] in vocab and word[cut:] in vocab]
        merges += sorted(cuts, key=lambda pair: (vocab[pair[0]], vocab[pair[1]])) if len(cuts) > 1 else cuts
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return tokenizer


def byte_letters() -> list[str]:
    """The character that byte-level vocabularies use for each byte: its own if printable, else one above 255."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    above = iter(range(256, 512))
    return [chr(byte) if byte in seen else chr(next(above)) for byte in range(256)]
