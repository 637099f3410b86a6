"""LlamaTokenizerFast: text to ids and back, chat templates, and streams that never split a character."""

import json

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from llama import LlamaTokenizerFast
from llama.checkpoints.gguf import GGUFFile, sentencepiece_bpe
from llama.tokenizer import TextStream

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
# Bytes for which SmolLM2's vocabulary has no token of their own.
SMOLLM2_LACKS = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}


def byte_tokenizer() -> LlamaTokenizerFast:
    """One token for each byte: every character beyond ASCII is split."""
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return LlamaTokenizerFast(tokenizer)


def piece_tokenizer() -> LlamaTokenizerFast:
    """SentencePiece's kind: pieces, scores, bytes for all the rest."""
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += ["▁", "a", "b", "c", "▁a", "ab", "bc", "▁ab", "abc"]
    scores = [0.0] * 259 + [-9.0, -8.0, -7.0, -6.0, -1.0, -3.0, -2.0, -4.0, -5.0]
    return LlamaTokenizerFast(sentencepiece_bpe(pieces, scores, add_space_prefix=True))


TOKENIZERS = {"bytes": byte_tokenizer(), "pieces": piece_tokenizer(), "smollm2": None}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(max_size=40))
def test_decode_undoes_encode_and_streams_give_the_same_text(name, text):
    tokenizer = TOKENIZERS[name] or LlamaTokenizerFast.from_pretrained("smollm2")
    TOKENIZERS[name] = tokenizer
    ids = tokenizer.encode(text)
    told_apart = name != "pieces" or "▁" not in text  # which SentencePiece's kind cannot tell from a space
    known = name != "smollm2" or not any(byte in SMOLLM2_LACKS for byte in text.encode())
    if told_apart and known:
        assert tokenizer.decode(ids) == text
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def streamed(tokenizer, ids):
    stream = TextStream(tokenizer)
    return [*(stream.put(token) for token in ids), stream.end()]


@given(ids=st.lists(st.integers(0, 255), max_size=30))
def test_streams_of_bytes_that_make_no_characters_give_their_text(ids):
    tokenizer = byte_tokenizer()
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


def test_streams_wait_for_whole_characters():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("né🦙!")
    assert len(ids) == 1 + 2 + 4 + 1
    assert streamed(tokenizer, ids) == ["n", "", "é", "", "", "", "🦙", "!", ""]
    assert streamed(tokenizer, ids[:5]) == ["n", "", "é", "", "", "\N{REPLACEMENT CHARACTER}"]


def test_pieces_merge_by_score_and_fall_back_to_bytes():
    tokenizer = piece_tokenizer()
    token = lambda text: [tokenizer._tokenizer.id_to_token(i) for i in tokenizer.encode(text)]  # noqa: E731
    assert token("abc") == ["▁a", "bc"]  # ▁a (-1) first, then bc (-2); neither ab nor abc by their place in the list
    assert token("cab") == ["▁", "c", "ab"]
    assert token("é") == ["▁", "<0xC3>", "<0xA9>"]


def test_a_llama_2_tokenizer_comes_through_gguf(tmp_path):
    pieces = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + ["▁", "a", "b", "▁a"]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_context_length(32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 259 + [-3.0, -2.0, -2.0, -1.0])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 4)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = LlamaTokenizerFast.from_pretrained(tmp_path / "m.gguf")
    assert tokenizer.encode("a b") == [1, 262, 259, 261]  # <s> ▁a ▁ b
    assert tokenizer.encode("a b", add_special_tokens=False) == [262, 259, 261]
    assert tokenizer.encode("a</s>")[-1] == 2
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.pad_token_id is None
    assert tokenizer.decode([1, 262, 259, 261, 2], skip_special_tokens=True) == "a b"

    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "config.json").write_text("{}")
    assert LlamaTokenizerFast.from_pretrained(tmp_path / "saved").encode("a b") == [1, 262, 259, 261]
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path / "saved")
    assert theirs("a b")["input_ids"] == [1, 262, 259, 261]


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "a  b123 c", ["a", "Ġ", "Ġb", "123", "Ġc"]),
        ("smollm", "a12 b", ["a", "1", "2", "Ġb"]),
        ("llama-bpe", "a12345 it's\n\n b", ["a", "123", "45", "Ġit", "'s", "ĊĊ", "Ġb"]),
    ],
)
def test_text_is_cut_as_each_family_cuts_it(pre, text, words):
    from llama.checkpoints.gguf import PRE_TOKENIZERS

    assert [word for word, _ in PRE_TOKENIZERS[pre]().pre_tokenize_str(text)] == words


def with_template(template, **config):
    return LlamaTokenizerFast(byte_tokenizer()._tokenizer, {"chat_template": template, **config})


HELLO = [{"role": "user", "content": "hello"}]


def test_templates_see_messages_tokens_and_more():
    template = "{% for m in messages %}{{ bos_token }}{{ m['role'] | tojson }}:{{ m.content }} {% endfor %}{{ mood }}"
    tokenizer = with_template(template, bos_token={"content": "<s>", "special": True})
    assert tokenizer.apply_chat_template(HELLO, tokenize=False, mood="glad") == '<s>"user":hello glad'
    assert tokenizer.apply_chat_template(HELLO, mood="glad") == tokenizer.encode('<s>"user":hello glad')


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.__class__.__mro__ }}", "chat template fails"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "chat template fails"),
        ("{% set _ = messages.append(1) %}", "chat template fails"),
        ("{% for m in messages %}", "chat template fails"),
        ("{{ 1 + messages }}", "chat template fails"),
        ("{{ messages | length / 0 }}", "chat template fails"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "chat template fails"),
        ("{{ undefined.deeper }}", "chat template fails"),
    ],
)
def test_a_hostile_or_broken_template_is_refused(template, message):
    with pytest.raises(ValueError, match=message):
        with_template(template).apply_chat_template(HELLO)


def test_wrong_input_is_named(tmp_path):
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match="text must be a string, got NoneType"):
        tokenizer.encode(None)
    with pytest.raises(ValueError, match="ids must be those of tokens, below 256 as a rule; got 256"):
        tokenizer.decode([1, 256])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        LlamaTokenizerFast.from_pretrained(tmp_path)
    for text in ("{", '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises(ValueError, match=r"tokenizer\.json is not a readable tokenizer"):
            LlamaTokenizerFast.from_pretrained(tmp_path)


def test_an_unknown_tokenizer_in_gguf_is_named(tmp_path):
    def written(name, fill):
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return GGUFFile(tmp_path / name)

    def tokens(writer, model="gpt2", pre="gpt-2", merges=()):
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(["a", "b"])
        writer.add_token_types([1, 1])
        if merges:
            writer.add_token_merges(list(merges))

    for name, fill, message in (
        ("none.gguf", lambda w: None, "token_type are missing"),
        ("bert.gguf", lambda w: tokens(w, "bert"), "'bert' is unknown; known are 'gpt2' and 'llama'"),
        ("qwen.gguf", lambda w: tokens(w, pre="qwen2"), "'qwen2' is unknown; known are gpt-2, smollm, llama-bpe"),
        ("merges.gguf", lambda w: tokens(w, merges=["a c"]), r"merges\.gguf: the tokenizer in it cannot be used"),
        ("scores.gguf", lambda w: tokens(w, "llama"), "2 tokens and 0 scores"),
    ):
        with pytest.raises(ValueError, match=message):
            written(name, fill).tokenizer()


def test_the_fetched_tokenizer_config_is_what_transformers_reads(smollm2):
    config = json.loads((smollm2 / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>"
    assert config["chat_template"].startswith("{% for message in messages %}")
