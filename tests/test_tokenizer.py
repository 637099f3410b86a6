"""LlamaTokenizerFast: text to ids and back, chat templates, and streams that never split a character."""

import json
from itertools import pairwise

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from llama import LlamaTokenizerFast
from llama.checkpoints.gguf import GGUFFile, byte_level_bpe, sentencepiece_bpe
from llama.tokenization import TextStream

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
# Bytes without a token of their own in SmolLM2's vocabulary.
SMOLLM2_LACKS = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xC0, 0xC1, 0xF1, 0xF2, *range(0xF5, 0x100)}


def byte_tokenizer() -> LlamaTokenizerFast:
    """One token per byte, so that every non-ASCII character is split."""
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(BYTES)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return LlamaTokenizerFast(tokenizer)


def piece_tokenizer() -> LlamaTokenizerFast:
    """SentencePiece BPE: pieces with scores, and byte tokens for everything else."""
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
    told_apart = name != "pieces" or "▁" not in text  # which SentencePiece cannot tell from a space
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


def merged_by_score(text, scores):
    """SentencePiece's rule, spelt out: merge the adjacent pair with the best score, the leftmost on a tie."""
    parts = list(text)
    while True:
        pairs = [(-scores[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in scores]
        if not pairs:
            return parts
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


@given(
    words=st.lists(st.text("abc▁", min_size=2, max_size=5), unique=True, max_size=25),
    order=st.randoms(use_true_random=False),
    text=st.lists(st.sampled_from(["a", "b", "c", " ", " " * 9, " " * 20]), max_size=25).map("".join),
)
def test_pieces_merge_by_score_the_leftmost_first(words, order, text):
    """Distinct scores in any order, except that runs of spaces share the worst, as in Llama's own model."""
    runs = ["▁" * length for length in range(2, 17)]
    words = [word for word in words if word not in runs]
    order.shuffle(words)
    scores = {word: -1.0 - rank for rank, word in enumerate(words)} | dict.fromkeys(runs, -1e9)
    pieces = ["<unk>", "a", "b", "c", "▁", *scores]
    tokenizer = sentencepiece_bpe(pieces, [0.0] * 5 + list(scores.values()), add_space_prefix=True)
    found = [pieces[number] for number in tokenizer.encode(text).ids]
    assert found == (merged_by_score("▁" + text.replace(" ", "▁"), scores) if text else [])


def test_what_no_piece_covers_is_spelt_in_bytes():
    tokenizer = piece_tokenizer()
    assert tokenizer.encode("é") == [259, 3 + 0xC3, 3 + 0xA9]
    assert tokenizer.decode([259, 3 + 0xC3, 3 + 0xA9]) == "é"


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


def test_streams_pass_over_ids_without_a_token_and_special_ones():
    tokenizer = byte_tokenizer()
    end = tokenizer._tokenizer.add_special_tokens(["<end>"]) and tokenizer._tokenizer.token_to_id("<end>")
    ids = tokenizer.encode("é")
    assert streamed(tokenizer, [ids[0], 99_999, end, ids[1]]) == ["", "", "", "é", ""]
    assert "".join(map(TextStream(tokenizer, skip_special_tokens=False).put, [*ids, end])) == "é<end>"


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "a  b123 c", ["a", "Ġ", "Ġb", "123", "Ġc"]),
        ("smollm", "a12 b", ["a", "1", "2", "Ġb"]),
        ("llama-bpe", "a12345 it's\n\n b", ["a", "123", "45", "Ġit", "'s", "ĊĊ", "Ġb"]),
        ("llama3", "a1234", ["a", "123", "4"]),
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


def test_a_template_writes_all_special_tokens_itself():
    library = byte_tokenizer()._tokenizer
    library.add_special_tokens(["<s>"])
    library.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", library.token_to_id("<s>"))])
    template = "{{ bos_token }}{% for m in messages %}\n{{ m.content }}{% endfor %}"
    tokenizer = LlamaTokenizerFast(library, {"bos_token": "<s>", "chat_template": template})
    assert tokenizer.apply_chat_template(HELLO).count(tokenizer.bos_token_id) == 1
    assert tokenizer.apply_chat_template(HELLO, tokenize=False) == "<s>hello"
    assert len(tokenizer) == 257
    assert tokenizer.decode([256]) == "<s>"
    assert with_template("{{ strftime_now('%Y') }}").apply_chat_template(HELLO, tokenize=False).isdigit()


def test_a_template_in_a_file_of_its_own_counts(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert LlamaTokenizerFast.from_pretrained(tmp_path).apply_chat_template(HELLO, tokenize=False) == "hello"


def test_templates_see_what_transformers_shows_them():
    template = (
        "{{ tools is none }} {{ documents is none }} {{ pad_token is defined }} {{ eos_token }} "
        "{{ messages | tojson(indent=1) }} {{ {'b': 'é', 'a': 1} | tojson(sort_keys=true) }}"
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}"
    )
    settings = {"chat_template": template, "eos_token": "</s>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer()._tokenizer, **settings)
    expected = theirs.apply_chat_template(HELLO, tokenize=False)
    assert with_template(template, eos_token="</s>").apply_chat_template(HELLO, tokenize=False) == expected
    assert expected.startswith("True True False </s>")
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "{{ messages[0].content }}"}]
    assert with_template(several).apply_chat_template(HELLO, tokenize=False) == "hello"


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
    with pytest.raises(ValueError, match="ids must be those of tokens, normally below 256; got 256"):
        tokenizer.decode([1, 256])
    with pytest.raises(ValueError, match="not valid Unicode"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match=r"bos_token in tokenizer_config\.json must be a string, got 3"):
        with_template(None, bos_token=3)
    for template in ({"default": 1}, ["a"], 3):
        with pytest.raises(ValueError, match=r"chat_template in tokenizer_config\.json must be a string"):
            with_template(template)
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
        ("bare.gguf", lambda w: w.add_tokenizer_model("gpt2"), "token_type are missing"),
        ("bert.gguf", lambda w: tokens(w, "bert"), "'bert' is unknown; supported: 'gpt2' and 'llama'"),
        ("qwen.gguf", lambda w: tokens(w, pre="qwen2"), "'qwen2' is unknown; supported: gpt-2, smollm, llama-bpe"),
        ("merges.gguf", lambda w: tokens(w, merges=["a c"]), r"merges\.gguf: its tokenizer cannot be used"),
        ("scores.gguf", lambda w: tokens(w, "llama"), "2 tokens but 0 scores"),
    ):
        with pytest.raises(ValueError, match=message):
            written(name, fill).tokenizer()
    with pytest.raises(FileNotFoundError, match=r"none\.gguf holds no tokenizer"):
        written("none.gguf", lambda w: None).tokenizer()


def test_all_a_gguf_says_of_its_tokenizer_is_heard(tmp_path):
    pieces = ["<unk>", "<s>", "</s>", "▁", "a", "<mark>", "aa", "aaa", "aaaa"]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_context_length(32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores([0.0] * 6 + [-1.0] * 3)
    writer.add_token_types([2, 3, 3, 1, 1, 4, 1, 1, 1])
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(True)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    writer.add_unk_token_id(99)  # out of range, so ignored
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = LlamaTokenizerFast.from_pretrained(tmp_path / "m.gguf")
    assert tokenizer.encode("a") == [4, 2]  # no prefix space, no <s>, but </s>
    assert tokenizer.encode("a<mark>a", add_special_tokens=False) == [4, 5, 4]
    assert tokenizer.decode([3, 4, 5]) == " a<mark>"
    assert tokenizer.encode("a" * 7, add_special_tokens=False) == [8, 7]  # equal scores: merged from the left
    assert (tokenizer.pad_token, tokenizer.unk_token) == ("<unk>", None)
    assert tokenizer.all_special_ids == [1, 2, 0]
    assert tokenizer._tokenizer.encode("a", "a").ids == [4, 2, 4, 2]


def test_merges_go_by_their_order_and_llama_3_takes_whole_words_first():
    tokens = ["a", "b", "c", "ab", "bc", "abc"]
    assert byte_level_bpe(tokens, ["b c", "a b"], "gpt-2").encode("abc").ids == [0, 4]
    assert byte_level_bpe(tokens, [], "llama-bpe").encode("abc").ids == [5]


@pytest.mark.parametrize(
    ("pre", "says", "bos"), [("llama-bpe", None, True), ("llama-bpe", False, False), ("gpt-2", None, False)]
)
def test_llama_3_begins_with_bos_unless_its_file_says_otherwise(tmp_path, pre, says, bos):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_context_length(32)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["a", "<begin>"])
    writer.add_token_types([1, 3])
    writer.add_bos_token_id(1)
    if says is not None:
        writer.add_add_bos_token(says)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert LlamaTokenizerFast.from_pretrained(tmp_path / "m.gguf").encode("a") == [1] * bos + [0]


def test_the_fetched_tokenizer_config_is_what_transformers_reads(smollm2):
    config = json.loads((smollm2 / "tokenizer_config.json").read_text())
    assert config["eos_token"] == "<|im_end|>"
    assert config["chat_template"].startswith("{% for message in messages %}")
