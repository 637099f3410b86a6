"""Tokenizers as replacements for transformers': shared files, keywords, encodings and threads."""

import copy
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import llama
from llama import BatchEncoding, LlamaTokenizer, LlamaTokenizerFast, TextStream, load_tokenizer
from llama.checkpoints.huggingface import HuggingFaceFolder

MODEL = Path(__file__).parent / "goldens" / "tokenizer.model"
CLASSES = [LlamaTokenizer, LlamaTokenizerFast]
HELLO = [{"role": "user", "content": "hello"}]
TEXT = "a <pad><a> <b><|im_end|><image> x<q> the  <p> ▁the</s>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder written by `save_pretrained`, with 2000 tokens."""
    path = tmp_path_factory.mktemp("saved")
    LlamaTokenizerFast(MODEL).save_pretrained(path)
    return path


@pytest.fixture
def bare(folder, tmp_path):
    """A folder with tokenizer.json alone."""
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    return tmp_path


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    return library


def write(path: Path, name: str, content: dict) -> None:
    (path / name).write_text(json.dumps(content), encoding="utf-8")


# Files


def test_what_transformers_saved_again_keeps_its_bos(folder, tmp_path):
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).encode("a b") == load_tokenizer(folder).encode("a b")
    assert load_tokenizer(tmp_path).encode("a b")[0] == 1


@pytest.mark.parametrize(
    "said",
    [
        {"pad_token": "<pad>"},
        {"pad_token": AddedToken("<p>", lstrip=True)},
        {"eos_token": "<|im_end|>"},
        {"eos_token": "▁the"},  # already in the vocabulary
        {"additional_special_tokens": ["<a>", "<b>"]},
        {"extra_special_tokens": ["<q>"]},
        {"extra_special_tokens": {"image_token": "<image>"}},
    ],
    ids=str,
)
def test_special_tokens_that_a_tokenizer_json_lacks_are_added(folder, said):
    ours, library = load_tokenizer(folder, **said), transformers.AutoTokenizer.from_pretrained(folder, **said)
    assert ours.encode(TEXT) == library.encode(TEXT)
    assert len(ours) == len(library)
    assert (ours.pad_token_id, ours.eos_token_id) == (library.pad_token_id, library.eos_token_id)
    assert ours.all_special_tokens == library.all_special_tokens
    left = ours.decode(ours.encode(TEXT), skip_special_tokens=True)
    assert not any(token in left for token in library.all_special_tokens)


def test_special_tokens_and_their_names_come_back_from_files(folder, tmp_path):
    made = load_tokenizer(folder, extra_special_tokens={"image_token": "<image>"}, additional_special_tokens=["<a>"])
    assert (made.image_token, made.image_token_id) == ("<image>", made.convert_tokens_to_ids("<image>"))
    assert made.all_special_tokens[-2:] == ["<a>", "<image>"]
    made.save_pretrained(tmp_path / "ours")
    library = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    library.save_pretrained(tmp_path / "theirs")
    for where in ("ours", "theirs"):
        again = load_tokenizer(tmp_path / where)
        assert again.image_token_id == made.image_token_id == library.image_token_id
        assert again.encode(TEXT) == made.encode(TEXT)
    with pytest.raises(AttributeError, match="video_token"):
        made.video_token  # noqa: B018
    with pytest.raises(ValueError, match="'decode' cannot be used as the name of a token"):
        load_tokenizer(folder, extra_special_tokens={"decode": "<d>"})


def test_additional_and_extra_special_tokens_both_count():
    for kind in CLASSES:
        made = kind(MODEL, additional_special_tokens=["<a>"], extra_special_tokens=["<q>"])
        assert made.convert_tokens_to_ids(["<a>", "<q>"]) == [2000, 2001]
        assert kind(MODEL, extra_special_tokens={"image_token": "<i>"}).image_token_id == 2000


def test_added_tokens_of_the_slow_class_reach_a_tokenizer_json(bare):
    slow = LlamaTokenizer(MODEL)
    slow.add_tokens(["NEWTOK"])
    slow.save_pretrained(bare)
    assert load_tokenizer(bare).convert_tokens_to_ids("NEWTOK") == 2000
    assert 2000 in load_tokenizer(bare).encode("a NEWTOK")


@pytest.mark.parametrize("listed", [{"2001": "<x>"}, {"1999": "<x>"}])
def test_an_added_token_that_cannot_have_its_id_is_refused(bare, listed):
    listed = {number: {"content": token, "special": True} for number, token in listed.items()}
    write(bare, "tokenizer_config.json", {"added_tokens_decoder": listed})
    with pytest.raises(ValueError, match="which is taken or leaves a gap"):
        load_tokenizer(bare)


def test_a_model_folders_tokenizer_is_the_one_that_load_tokenizer_gives(bare):
    write(bare, "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    (bare / "chat_template.jinja").write_text("{{ bos_token }}[{{ messages[0].content }}]{{ eos_token }}")
    (bare / "additional_chat_templates").mkdir()
    (bare / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    loaded, checkpoints = load_tokenizer(bare), LlamaTokenizerFast(*HuggingFaceFolder(bare).tokenizer())
    assert loaded.apply_chat_template(HELLO, tokenize=False) == "<s>[hello]</s>"
    for made in (loaded, checkpoints):
        assert made.special_tokens_map == loaded.special_tokens_map
        assert made.chat_template == loaded.chat_template
        assert made.encode("a<pad>") == loaded.encode("a<pad>")


@pytest.mark.parametrize("kind", CLASSES)
def test_a_changed_chat_template_is_the_one_that_is_read_again(kind, tmp_path):
    made = kind(MODEL, chat_template="NEW")
    (tmp_path / "additional_chat_templates").mkdir()
    for stale in ("chat_template.jinja", "additional_chat_templates/rag.jinja"):
        (tmp_path / stale).write_text("OLD")
    made.save_pretrained(tmp_path, safe_serialization=True, save_jinja_files=True)
    assert kind.from_pretrained(tmp_path).chat_template == "NEW"
    if made.is_fast:  # transformers 5 needs another library for the slow class's file
        assert transformers.AutoTokenizer.from_pretrained(tmp_path).chat_template == "NEW"
    with pytest.raises(ValueError, match="'colour' is not an option"):
        made.save_pretrained(tmp_path, colour="red")


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer"])
def test_padding_is_on_the_side_where_transformers_has_it(bare, name):
    write(bare, "tokenizer_config.json", {"tokenizer_class": name, "bos_token": "<s>", "pad_token": "</s>"})
    library = transformers.AutoTokenizer.from_pretrained(bare)
    ours = llama.AutoTokenizer.from_pretrained(bare)
    assert ours.padding_side == library.padding_side == ("left" if name == "LlamaTokenizer" else "right")
    assert LlamaTokenizerFast.from_pretrained(bare).padding_side == "left"  # as in transformers' class of this name
    assert load_tokenizer(bare, padding_side="left").padding_side == "left"
    ours.save_pretrained(bare)
    assert load_tokenizer(bare).padding_side == ours.padding_side


def test_damaged_files_are_named(bare):
    for name, content, message in [
        ("added_tokens.json", {"<x>": "many"}, r"added_tokens\.json: added tokens must be a mapping from ids"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": "<x>"}},
            r"tokenizer_config\.json: added",
        ),
        ("tokenizer_config.json", {"model_input_names": 5}, "model_input_names must be a list"),
        ("tokenizer_config.json", {"additional_special_tokens": "<x>"}, "additional_special_tokens must be a list"),
    ]:
        write(bare, name, content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(bare)
        (bare / name).unlink()
    (bare / "chat_template.jinja").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not valid UTF-8"):
        load_tokenizer(bare)
    (bare / "m.gguf").write_bytes(b"GGUF" + bytes(40))
    with pytest.raises(ValueError, match=r"m\.gguf is a GGUF file.*LlamaTokenizerFast"):
        LlamaTokenizer.from_pretrained(bare / "m.gguf")


# Calls


@pytest.mark.parametrize("kind", CLASSES)
def test_none_in_a_batch_is_named(kind):
    made = kind(MODEL)
    for call in (made, made.batch_encode_plus):
        with pytest.raises(ValueError, match="a list with NoneType in it"):
            call(["a", None])


@pytest.mark.parametrize("kind", CLASSES)
def test_numpys_whole_numbers_are_whole_numbers(kind):
    made = kind(MODEL, pad_token="</s>")
    texts, options = ["a b c", "a"], dict(truncation=True, padding=True, return_overflowing_tokens=True)
    for number in (int, np.int64, np.uint8):
        out = made(texts, max_length=number(4), stride=number(1), pad_to_multiple_of=number(2), **options)
        assert {len(ids) for ids in out["input_ids"]} == {4}
    for name, wrong in [("max_length", 2.0), ("max_length", True), ("stride", -1), ("pad_to_multiple_of", 0)]:
        with pytest.raises(ValueError, match=f"{name} must be an integer"):
            made("a", padding=True, **{name: wrong})


@pytest.mark.parametrize("kind", CLASSES)
def test_advice_on_a_text_that_cannot_be_cut_can_be_followed(kind):
    with pytest.raises(ValueError, match="max_length is too small") as caught:
        kind(MODEL)("a", truncation="longest_first", max_length=0)
    assert "longest_first" not in str(caught.value)


@pytest.mark.parametrize("kind", CLASSES)
def test_keywords_that_change_nothing_are_taken(kind, tmp_path):
    kind(MODEL).save_pretrained(tmp_path)
    idle = dict(use_fast=True, config=None, _commit_hash=None, use_auth_token=None, trust_remote_code=False)
    made = kind.from_pretrained(tmp_path, **idle)
    assert made.decode(made.encode("a b"), use_source_tokenizer=True) == "<s>a b" or kind is LlamaTokenizer
    assert made("a", return_tensors="pt").to("cpu", non_blocking=True).input_ids.device.type == "cpu"
    assert made.vocab == made.get_vocab()


@pytest.mark.parametrize("kind", CLASSES)
def test_a_list_of_ids_is_decoded_as_each_of_them(kind):
    made = kind(MODEL)
    made.add_tokens(["QQ"])
    ids = made.encode("QQy", add_special_tokens=False)
    one = made.decode(ids, spaces_between_special_tokens=True)
    assert made.decode([ids], spaces_between_special_tokens=True) == [one]
    assert one != made.decode(ids)


def test_a_text_of_bytes_keeps_its_spaces():
    library = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_level(), clean_up_tokenization_spaces=True)
    ours = LlamaTokenizerFast(byte_level(), {"clean_up_tokenization_spaces": True})
    ids = ours.encode(text := "hello , world ! n't")
    for said in (None, True, False):
        assert ours.decode(ids, clean_up_tokenization_spaces=said) == text
        assert library.decode(ids, clean_up_tokenization_spaces=said) == text


def test_special_tokens_without_a_name_are_skipped_and_not_listed():
    library = byte_level()
    library.add_special_tokens(["<|end|>", "<|reserved|>"])
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=library, eos_token="<|end|>")
    ours = LlamaTokenizerFast(library, {"eos_token": "<|end|>"})
    assert ours.all_special_tokens == theirs.all_special_tokens == ["<|end|>"]
    assert ours.all_special_ids == theirs.all_special_ids
    ids = ours.encode("a<|reserved|>b<|end|>")
    assert ours.decode(ids, skip_special_tokens=True) == theirs.decode(ids, skip_special_tokens=True) == "ab"
    stream = TextStream(ours)
    assert "".join([*map(stream.put, ids), stream.end()]) == "ab"


def test_a_single_text_has_a_list_of_one_length(folder):
    ours, library = load_tokenizer(folder), transformers.AutoTokenizer.from_pretrained(folder)
    for options in (dict(), dict(return_tensors="np")):
        assert ours("a b", return_length=True, **options)["length"] == library("a b", return_length=True)["length"]


def test_tokens_added_through_the_librarys_tokenizer_count():
    made = LlamaTokenizerFast(MODEL)
    assert made.decode([1, 259], skip_special_tokens=True) == made.decode([259])
    made.tokenize("<s>", split_special_tokens=True)
    made.backend_tokenizer.add_special_tokens(["<late>"])
    assert made.decode(made.encode("a<late>"), skip_special_tokens=True) == "a"
    assert made.tokenize("<late>", split_special_tokens=True) != ["<late>"] == made.tokenize("<late>")


# Threads


def test_special_tokens_stay_text_while_other_threads_encode():
    """split_special_tokens guards against text that smuggles in special tokens: it must not leak between threads."""
    made, text = LlamaTokenizerFast(MODEL), "hello </s> <s> world " * 5
    wanted = {split: made.encode(text, split_special_tokens=split) for split in (True, False)}
    assert wanted[True] != wanted[False]

    def encode(number: int) -> bool:
        split = number % 3 > 0
        out = made([text] * 2, split_special_tokens=split)
        return out.input_ids == [wanted[split]] * 2 and out.token_to_chars(1, 3) is not None

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(encode, range(300)))


# Many added tokens


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", CLASSES)
def test_adding_and_decoding_take_as_many_steps_as_there_are_tokens(kind, special):
    """Counted in Python calls: twice the tokens take twice the calls to add, and the same number to decode."""
    adding, decoding = [], []
    for count in (200, 400):
        made = kind(MODEL)
        tokens = [f"<image_{number}>" for number in range(count)]
        adding.append(calls(lambda m=made, t=tokens: m.add_tokens(t, special_tokens=special)))
        assert made.convert_tokens_to_ids(tokens) == list(range(2000, 2000 + count))
        made.decode([5, 2000], skip_special_tokens=True)
        decoding.append(calls(lambda m=made: m.decode([5, 2000], skip_special_tokens=True)))
    assert adding[1] < 2.2 * adding[0]
    assert decoding[1] == decoding[0]


def calls(function) -> int:
    count = 0

    def seen(frame, event, arg):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_many_tokens_of_a_file_are_added_with_their_ids(tmp_path):
    slow = LlamaTokenizer(MODEL, additional_special_tokens=["<a>"])
    slow.add_tokens([f"t{number}" for number in range(500)])
    slow.save_pretrained(tmp_path)
    for kind in CLASSES:
        assert kind.from_pretrained(tmp_path).get_added_vocab() == slow.get_added_vocab()


# Encodings


@pytest.fixture(scope="module")
def pair(folder):
    return load_tokenizer(folder, pad_token="</s>"), transformers.AutoTokenizer.from_pretrained(
        folder, pad_token="</s>"
    )


def asked(batch) -> dict:
    """The answers of all methods and attributes of an encoding, as JSON."""
    found = {"n_sequences": batch.n_sequences, "is_fast": batch.is_fast}
    for row in range(len(batch.encodings)):
        size = len(batch.encodings[row])
        found[row] = {
            name: [getattr(batch, name)(row, token) for token in range(size)]
            for name in ("token_to_word", "token_to_sequence", "token_to_chars")
        }
        last = 1 if any(one == 1 for one in batch.sequence_ids(row)) else 0
        words = sorted({word for word in batch.word_ids(row) if word is not None})
        for which in range(last + 1):
            found[row, "tokens", which] = [batch.word_to_tokens(row, word, which) for word in words]
            here = [w for w, s in zip(batch.word_ids(row), batch.sequence_ids(row), strict=True) if s == which]
            found[row, "chars", which] = [batch.word_to_chars(row, word, which) for word in sorted(set(here))]
        for name in ("ids", "tokens", "offsets", "word_ids", "sequence_ids", "attention_mask", "special_tokens_mask"):
            found[row, name] = getattr(batch[row], name)
        found[row, "types"] = (batch[row].type_ids, batch[row].n_sequences, len(batch[row]))
    return json.loads(json.dumps({str(key): value for key, value in found.items()}))


@pytest.mark.parametrize("split", [True, False])
def test_an_encoding_answers_as_transformers_does(pair, split):
    texts = [["hello there", "world", "<s> a"], ["a"]] if split else ["hello  there world", "a"]
    ours, library = (made(texts, texts[::-1], is_split_into_words=split, padding=True) for made in pair)
    assert asked(ours) == asked(library)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one)), dict.copy])
def test_a_copied_encoding_still_knows_its_words(pair, copied):
    batch = pair[0](["hello there world", "a"], padding=True)
    if copied is dict.copy:
        copied = BatchEncoding.copy
    assert asked(copied(batch)) == asked(batch)
    assert copied(batch) == batch
    assert len(pickle.dumps(batch)) < 10_000  # the tokenizer is not pickled with it


def test_data_is_the_encoding_itself(pair):
    for made in pair:
        batch = made("a")
        batch.data["labels"] = [1, 2]
        assert batch["labels"] == [1, 2]
        assert batch.convert_to_tensors("pt", prepend_batch_axis=True)["labels"].tolist() == [[1, 2]]
        assert batch["input_ids"].dtype == torch.int64


def test_slow_encodings_know_no_places():
    batch = LlamaTokenizer(MODEL)("a")
    assert (batch.encodings, batch.n_sequences, batch.is_fast) == (None, None, False)
    with pytest.raises(ValueError, match="needs an encoding by LlamaTokenizerFast"):
        batch[0]
    with pytest.raises(KeyError, match="colour"):
        batch["colour"]


def test_numbers_with_a_point_have_pytorchs_type(pair):
    ours, _ = pair
    rows = [{"input_ids": [1, 2], "label": 0.5}, {"input_ids": [1], "label": 1.5}]
    for made in pair:
        assert transformers.DataCollatorWithPadding(made)(rows)["labels"].dtype == torch.float32
    tensors = {"input_ids": [[1, 2]], "weights": torch.tensor([[0.5, 1.0]])}
    assert ours.pad(tensors, return_tensors="pt")["weights"].dtype == torch.float32
    assert ours.pad(tensors, return_tensors="np")["weights"].dtype == np.float64


# Chat templates


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(messages[0].ts) }}",
        "{{ '{}'.format(messages[0].ts) }}",
        "{{ '{{{}}} of {:>5}'.format(messages[0].ts, 'x') }}",
        "{{ '%d' | format(messages[0].ts) }}",
        "{{ 'call 5551234567, 100%% *sure*, %s' % messages[0].ts }}",
        "{{ messages[0].get('x', 5000000) }}",
        "{{ dict(ts=messages[0].ts) }}",
        "{{ [messages[0].ts, 3] | join(',') }}",
        "{{ messages[0] | tojson(indent=2) }}",
    ],
)
def test_large_numbers_are_data_like_any_other(pair, template):
    chat = [{"role": "user", "content": "hello", "ts": 1_700_000_000}]
    ours, library = (made.apply_chat_template(chat, chat_template=template, tokenize=False) for made in pair)
    assert ours == library


@pytest.mark.parametrize(
    "template",
    [
        "{{ '%*d' % (1500000000, 1) }}",
        "{{ '%*d' | format(1500000000, 1) }}",
        "{{ '%(a)1500000000d' % {'a': 1} }}",
        "{{ '%.*f' % (1500000000, 1.0) }}",
        "{{ '{:{}}'.format(1, 1500000000) }}",
        "{{ '{{{:{}}}}'.format(1, 1500000000) }}",
        "{{ '{:>{w}}'.format(1, w=1500000000) }}",
        "{{ 'x'.center(1500000000) }}",
        "{{ (1).to_bytes(1500000000, 'big') }}",
        "{{ [1] | tojson(indent=1500000000) }}",
    ],
)
def test_widths_that_would_fill_the_memory_are_refused(pair, template):
    with pytest.raises(ValueError, match="too large"):
        pair[0].apply_chat_template(HELLO, chat_template=template, tokenize=False)
