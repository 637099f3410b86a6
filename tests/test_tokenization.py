"""What the tokenizers guarantee beyond transformers' results: exact round trips, identical classes, clear errors."""

import copy
import json
import os
import pickle
import time

import numpy as np
import pytest
import sentencepiece_models
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_texts import lines
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

import llama
from llama import LlamaTokenizer, LlamaTokenizerFast, TextStream, load_tokenizer
from llama.tokenization import chat
from llama.tokenization.model_file import SentencePieceFile

CLASSES = [LlamaTokenizer, LlamaTokenizerFast]
WAYS = [(legacy, prefix) for legacy in (True, False) for prefix in (True, False)]
ADDED = [AddedToken("<new>", normalized=False), AddedToken("<mark>", special=True, lstrip=True), "word"]
MARKS = [" ", "  ", "\n", "<s>", "</s>", "<unk>", "<new>", "<mark>", "word", "Hello", "▁", "é", "🦙", "a", "1"]
TEXT = st.lists(st.text(max_size=8) | st.sampled_from(MARKS), max_size=8).map("".join)
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tokenizer.model"
    path.write_bytes(sentencepiece_models.llama_like())
    return path


@pytest.fixture(scope="session")
def made(model):
    """Both classes in each of WAYS, with added tokens."""
    built = {}
    for legacy, prefix in WAYS:
        for kind in CLASSES:
            tokenizer = kind(str(model), legacy=legacy, add_prefix_space=prefix, pad_token="</s>")
            tokenizer.add_tokens(ADDED)
            built[kind, legacy, prefix] = tokenizer
    return built


def both(made, way):
    return [made[kind, *way] for kind in CLASSES]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=150)
@given(text=TEXT, pair=st.none() | TEXT, split=st.booleans())
def test_both_classes_give_the_same_ids_and_the_same_text(made, way, text, pair, split):
    slow, fast = both(made, way)
    given_ = slow(text, pair, split_special_tokens=split, return_special_tokens_mask=True, return_token_type_ids=True)
    assert (
        fast(text, pair, split_special_tokens=split, return_special_tokens_mask=True, return_token_type_ids=True)
        == given_
    )
    for skip in (True, False):
        for spaces in (True, False):
            options = dict(skip_special_tokens=skip, spaces_between_special_tokens=spaces)
            assert fast.decode(given_.input_ids, **options) == slow.decode(given_.input_ids, **options)


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=150)
@given(text=TEXT)
def test_decode_undoes_encode_but_for_what_reads_as_a_space(made, kind, way, text):
    tokenizer = made[kind, *way]
    text = text.replace("<mark>", "")  # which strips the spaces before it
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text.replace("▁", " ")


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=100)
@given(data=st.data())
def test_a_stream_gives_the_text_of_any_ids(made, kind, way, data):
    tokenizer = made[kind, *way]
    some = st.sampled_from([0, 1, 2, 3 + 0xC3, 3 + 0xA9, 3 + 0xF0, 3 + 0x9F, 259, 260, 2000, 2001, 2002])
    ids = data.draw(st.lists(some | st.integers(0, len(tokenizer) - 1), max_size=25))
    for skip in (True, False):
        stream = TextStream(tokenizer, skip)
        assert "".join([*map(stream.put, ids), stream.end()]) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=100)
@given(ids=st.lists(st.integers(3, 258) | st.sampled_from([1, 259, 3 + 0xC3, 3 + 0xA9]), max_size=20))
def test_a_stream_waits_where_the_library_judges_runs_of_bytes(model, ids):
    """A tokenizer.json decodes as written: one invalid byte garbles its whole run of bytes."""
    tokenizer = LlamaTokenizerFast(LlamaTokenizerFast(model).backend_tokenizer)
    stream = TextStream(tokenizer, skip_special_tokens=False)
    assert "".join([*map(stream.put, ids), stream.end()]) == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", CLASSES)
@given(texts=st.lists(TEXT, min_size=1, max_size=4), way=st.sampled_from(WAYS))
@settings(max_examples=40)
def test_a_batch_is_its_texts_one_by_one(made, kind, texts, way):
    tokenizer = made[kind, *way]
    batch = tokenizer(texts)
    assert batch.input_ids == [tokenizer.encode(text) for text in texts]
    padded = tokenizer(texts, padding=True, return_tensors="np")
    for row, mask, ids in zip(padded.input_ids, padded.attention_mask, batch.input_ids, strict=True):
        assert row[mask == 1].tolist() == ids
    assert tokenizer.batch_decode(batch.input_ids) == [tokenizer.decode(ids) for ids in batch.input_ids]


def test_offsets_cover_what_each_token_is_made_of(made):
    fast = made[LlamaTokenizerFast, False, True]
    batch = fast("Hello  wörld<new>x", return_offsets_mapping=True)
    assert batch.offset_mapping[0] == (0, 0)
    assert batch.offset_mapping[-1][1] == len("Hello  wörld<new>x")
    assert [a for a, _ in batch.offset_mapping] == sorted(a for a, _ in batch.offset_mapping)
    assert batch.tokens()[0] == "<s>"
    front = fast("<new>x", return_offsets_mapping=True)  # the prefix space corresponds to no character
    assert front.tokens()[1:3] == ["▁", "<new>"]
    assert front.offset_mapping[1:3] == [(0, 0), (0, 5)]
    late = fast("a new one")
    fast_copy = copy.deepcopy(fast)
    text = fast_copy("a new one")
    fast_copy.add_tokens(["new"])
    assert late.token_to_chars(1) == (0, 1)
    with pytest.raises(ValueError, match="changed since it encoded this text"):
        text.token_to_chars(1)


@pytest.mark.parametrize("kind", CLASSES)
def test_setters_take_effect_at_once(model, kind):
    tokenizer = kind(model)
    start = tokenizer.encode("a")
    tokenizer.add_eos_token = True
    assert tokenizer.encode("a") == [*start, 2]
    tokenizer.bos_token = "</s>"
    assert tokenizer.encode("a") == [2, *start[1:], 2]
    tokenizer.add_bos_token = False
    assert tokenizer.encode("a") == [*start[1:], 2]
    tokenizer.pad_token_id = 0
    assert tokenizer.pad_token == "<unk>"
    with pytest.raises(ValueError, match=r"pad_token '\[PAD\]' is not in the vocabulary; add it with"):
        tokenizer.pad_token = "[PAD]"
    tokenizer.add_bos_token = True
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match="add_bos_token = True but bos_token = None"):
        tokenizer.encode("a")


def test_the_library_is_told_of_new_special_tokens(model):
    tokenizer = LlamaTokenizerFast(model)
    tokenizer.add_eos_token = True
    assert tokenizer.backend_tokenizer.encode("a", "b").ids == tokenizer.encode("a", "b")


def test_a_tokenizer_json_is_obeyed_as_it_is_written(model, tmp_path):
    library = LlamaTokenizerFast(model).backend_tokenizer
    library.post_processor = TemplateProcessing(
        single="<s> $A </s> </s>", pair="$A <s> $B:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "legacy": False}))
    tokenizer = LlamaTokenizerFast.from_pretrained(tmp_path)
    plain = tokenizer.encode("a", add_special_tokens=False)
    assert tokenizer.encode("a") == [1, *plain, 2, 2] == library.encode("a").ids
    assert tokenizer("a", "b", return_token_type_ids=True).token_type_ids == library.encode("a", "b").type_ids
    assert (tokenizer.add_bos_token, tokenizer.add_eos_token) == (True, True)
    told = LlamaTokenizerFast.from_pretrained(tmp_path, add_bos_token=False)
    assert told.encode("a") == [*plain, 2]
    assert LlamaTokenizerFast(tokenizer_file=tmp_path / "tokenizer.json").encode("a") == [1, *plain, 2, 2]


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("way", WAYS)
def test_copies_pickles_and_saved_folders_do_the_same(made, tmp_path, kind, way):
    tokenizer = copy.deepcopy(made[kind, *way])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"], "pad_token": "<pad>"})
    tokenizer.add_eos_token = True
    tokenizer.chat_template = {"default": "{{ messages[0].content }}", "other": "no"}
    tokenizer.truncation_side = "left"
    tokenizer.save_pretrained(tmp_path)
    copies = [kind.from_pretrained(tmp_path), pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)]
    for other in copies:
        for text in ("", " a <new>b", "<new> <s>x<mark> <x>", "Hello  wörld 🦙\n", "word"):
            assert other.encode(text) == tokenizer.encode(text)
            assert other.decode(other.encode(text)) == tokenizer.decode(tokenizer.encode(text))
        assert other.special_tokens_map == tokenizer.special_tokens_map
        assert (other.truncation_side, other.chat_template) == ("left", tokenizer.chat_template)
        assert (len(other), other.legacy, other.add_prefix_space) == (len(tokenizer), *way)
        assert repr(other).startswith(f"{kind.__name__}(name_or_path=")


@pytest.mark.parametrize("way", WAYS)
def test_transformers_reads_what_the_fast_class_saves(model, tmp_path, way):
    tokenizer = LlamaTokenizerFast(str(model), legacy=way[0], add_prefix_space=way[1], pad_token="</s>")
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [*lines(1, 1000), "", " ", "  a", "<s>Hello <s> a", "x</s>"]
    assert dict(theirs(texts, padding=True)) == dict(tokenizer(texts, padding=True))


@pytest.mark.parametrize("kind", CLASSES)
def test_sampling_loses_no_text(model, kind):
    if kind is LlamaTokenizerFast:
        return
    for legacy, prefix in WAYS:
        options = {"enable_sampling": True, "nbest_size": -1, "alpha": 0.3}
        tokenizer = kind(model, sp_model_kwargs=options, legacy=legacy, add_prefix_space=prefix)
        text = "Hello world, this is <s> a test"
        ids = [tokenizer.encode(text, add_special_tokens=False) for _ in range(20)]
        assert {tokenizer.decode(one) for one in ids} == {text}
        assert len(set(map(tuple, ids))) > 1


def test_load_tokenizer_reads_whatever_there_is(model, tmp_path, smollm2):
    wanted = LlamaTokenizer(model).encode("Hello  there")
    assert load_tokenizer(model).encode("Hello  there") == wanted  # the file
    assert load_tokenizer(model.parent).encode("Hello  there") == wanted  # its folder
    assert type(load_tokenizer(model, use_fast=False)) is LlamaTokenizer
    assert type(llama.AutoTokenizer.from_pretrained(model.parent, use_fast=False)) is LlamaTokenizer
    LlamaTokenizerFast(model, legacy=False).save_pretrained(tmp_path)
    assert type(load_tokenizer(tmp_path)) is LlamaTokenizerFast
    assert not load_tokenizer(tmp_path).legacy
    assert load_tokenizer(tmp_path, from_slow=True, legacy=True).legacy
    assert load_tokenizer(tmp_path / "tokenizer.json").encode("Hello  there") == wanted
    assert load_tokenizer(smollm2).encode("a") == load_tokenizer("smollm2").encode("a")


def test_llama_3s_ranks_make_its_tokenizer(tmp_path):
    import base64

    tokens = [bytes([byte]) for byte in range(256)] + [b"ab", b" a", b"abc", " é".encode()]
    lines = b"\n".join(base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens))
    path = tmp_path / "tokenizer.model"
    path.write_bytes(lines)
    tokenizer = load_tokenizer(path)
    assert tokenizer.encode("abc a é") == [260, 258, 257, 259]
    assert tokenizer.decode(tokenizer.encode("abc 🦙<|eot_id|>"), skip_special_tokens=True) == "abc 🦙"
    assert tokenizer.bos_token_id == 260
    assert len(tokenizer) == 260 + 256
    with pytest.raises(ValueError, match="is a Llama 3 tokenizer"):
        LlamaTokenizer(path)
    for wrong in (lines.replace(b" 7\n", b" 8\n"), lines.replace(b" 7\n", b" x\n")):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"tokenizer\.model is damaged"):
            load_tokenizer(path)


@pytest.mark.parametrize("kind", CLASSES)
def test_bad_files_are_named(model, tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=r"absent\.model does not exist"):
        kind(tmp_path / "absent.model")
    with pytest.raises(ValueError, match="is a folder"):
        kind(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.\w+ does not exist"):
        kind.from_pretrained(tmp_path)
    data, path = model.read_bytes(), tmp_path / "tokenizer.model"
    for wrong in (b"", data[:1000], data[: len(data) // 2], b"\x00" * 50, b"hello", os.urandom(300), b"{}", b"\n\xff"):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match=r"tokenizer\.model is"):
            kind(path)


@settings(max_examples=200)
@given(data=st.data())
def test_a_damaged_model_is_read_or_refused(model, data):
    """Any bytes give a result or a ValueError, quickly, and never another error."""
    whole = model.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    for damaged in (whole[:at], whole[:at] + data.draw(st.binary(min_size=1, max_size=4)) + whole[at + 1 :]):
        try:
            SentencePieceFile.parse(damaged, "it")
        except ValueError as error:
            assert str(error).startswith("it is")  # noqa: PT017


@pytest.mark.parametrize("kind", CLASSES)
def test_bad_input_is_named(model, kind):
    tokenizer = kind(model)
    for call, message in [
        (lambda: tokenizer([]), "text is an empty list"),
        (lambda: tokenizer(None), "text must be a string"),
        (lambda: tokenizer([3]), "text must be a string, got int"),
        (lambda: tokenizer(["a"], "b"), "text_pair must be a list as long as text"),
        (lambda: tokenizer("a\ud800"), "not valid Unicode"),
        (lambda: tokenizer(["a", "b c"], padding=True), "does not have a padding token"),
        (lambda: tokenizer(["a", "b c d"], return_tensors="np"), "different lengths do not fit into one tensor"),
        (lambda: tokenizer("a", return_tensors="tf"), 'return_tensors must be "pt", "np" or None'),
        (lambda: tokenizer("a", truncation="middle", max_length=3), "truncation must be one of"),
        (lambda: tokenizer("a", max_length=0, truncation=True), "max_length is too small"),
        (lambda: tokenizer("a", max_length=-1), "max_length must be an integer"),
        (lambda: tokenizer("a", padding="around"), "padding must be one of"),
        (lambda: tokenizer.encode("a", colour="red"), "'colour' is not a tokenizer option"),
        (lambda: tokenizer.decode([len(tokenizer)]), f"got {len(tokenizer)}"),
        (lambda: tokenizer.decode([-1]), "got -1"),
        (lambda: tokenizer.decode("a"), "ids must be integers, got str"),
        (lambda: tokenizer.convert_ids_to_tokens(10**12), "got 1000000000000"),
        (lambda: tokenizer.add_special_tokens({"boss_token": "<b>"}), "'boss_token' is not a special token"),
        (lambda: kind(model, colour="red"), "'colour' is not a tokenizer option"),
        (lambda: kind.from_pretrained(model, colour="red"), "'colour' is not a tokenizer option"),
        (lambda: tokenizer.save_vocabulary("/nowhere"), "should be a directory"),
        (lambda: tokenizer.get_special_tokens_mask([1], [2], True), "should not supply a second sequence"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="colour"):
        tokenizer("a", colour="red")
    with pytest.raises(ValueError, match="sp_model_kwargs: 'colour' is not an option"):
        LlamaTokenizer(model, sp_model_kwargs={"colour": 1})
    with pytest.raises(ValueError, match="return_offsets_mapping needs LlamaTokenizerFast"):
        LlamaTokenizer(model)("a", return_offsets_mapping=True)
    assert tokenizer.decode([]) == tokenizer.convert_tokens_to_string([]) == ""
    assert tokenizer.decode(np.array([1, 2])) == "<s></s>"
    assert tokenizer.decode([[1], [2]]) == ["<s>", "</s>"]


def test_the_fast_class_leaves_other_kinds_of_model_to_sentencepiece(tmp_path):
    path = tmp_path / "m.model"
    path.write_bytes(sentencepiece_models.train(["a b c hello there"] * 50, 285, remove_extra_whitespaces=True))
    assert LlamaTokenizer(path).tokenize("hello   there")
    with pytest.raises(ValueError, match=r"m\.model is not a model of Llama's kind .*; use LlamaTokenizer for it"):
        LlamaTokenizerFast(path)


# Conversations


@pytest.mark.parametrize("kind", CLASSES)
def test_llama_2s_format_with_metas_system_prompt(model, kind):
    tokenizer = kind(model, use_default_system_prompt=True)
    prompt = chat.DEFAULT_SYSTEM_PROMPT
    text = tokenizer.apply_chat_template(HELLO, tokenize=False)
    assert text == f"<s>[INST] <<SYS>>\n{prompt}\n<</SYS>>\n\nhello [/INST]"
    assert tokenizer.apply_chat_template(HELLO) == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.apply_chat_template(HELLO).count(1) == 1
    tokenizer.use_default_system_prompt = False
    turns = [{"role": "system", "content": "Be brief."}, *HELLO, {"role": "assistant", "content": " hi "}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhello [/INST] hi </s>"
    )
    assert tokenizer.apply_chat_template(HELLO, tokenize=False) == "<s>[INST] hello [/INST]"
    with pytest.raises(ValueError, match="roles must alternate"):
        tokenizer.apply_chat_template(HELLO * 2)


def test_the_assistants_tokens_are_marked(model):
    tokenizer = LlamaTokenizerFast(model, chat_template=(
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{% endfor %}"
    ), pad_token="</s>")  # fmt: skip
    turns = [*HELLO, {"role": "assistant", "content": "Good day"}, *HELLO]
    for kind in (None, "np"):
        out = tokenizer.apply_chat_template(
            [turns, turns[:2]], return_dict=True, return_assistant_tokens_mask=True, padding=True, return_tensors=kind
        )
        for ids, mask in zip(out.input_ids, out.assistant_masks, strict=True):
            marked = [number for number, on in zip(ids, mask, strict=True) if on]
            assert tokenizer.decode(marked).strip() == "Good day"


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(9) recursive %}{{ loop(range(9)) }}{% endfor %}",
        "{{ 'x' * 10 ** 10 }}",
        "{{ [0] * 999999999999 }}",
        "{{ 10 ** 10 ** 10 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '%999999999d' | format(1) }}",
        "{{ '{:999999999}'.format(1) }}",
        "{{ 'x' | center(10 ** 3 * 10 ** 9) }}",
        "{{ 'x'.ljust(999999999) }}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='xxxxxxxx') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set x = 'x' * 99999 %}{{ x.replace('x', x) }}",
        "{% set x = 'x' * 99999 %}{{ x | replace('x', x) }}",
        "{{ lipsum(n=10000000) }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ cycler.__init__.__globals__ }}",
        "{% include 'x' %}",
    ],
)
def test_hostile_templates_end_soon_with_an_error(model, template):
    tokenizer = LlamaTokenizer(model, chat_template=template)
    start = time.monotonic()
    with pytest.raises(ValueError, match="the chat template fails on this conversation"):
        tokenizer.apply_chat_template(HELLO)
    assert time.monotonic() - start < 20  # a bound for slow machines; without limits these take hours or all memory


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(add_generation_prompt=True, continue_final_message=True), "mutually exclusive"),
        (dict(tokenize=False, return_dict=True), "return_dict=True needs tokenize=True"),
        (dict(return_assistant_tokens_mask=True), "needs return_dict=True"),
        (dict(tools=[3]), "tools must be JSON schemas"),
        (dict(conversation=[]), "conversation must be a non-empty list"),
        (dict(conversation=["hello"]), "each a dictionary"),
        (dict(continue_final_message=True, chat_template="{{ messages | length }}"), "drops or alters the last"),
    ],
)
def test_bad_conversations_are_named(model, options, message):
    tokenizer = LlamaTokenizer(model)
    with pytest.raises(ValueError, match=message):
        tokenizer.apply_chat_template(**{"conversation": HELLO} | options)


def test_production_code_needs_no_transformers_for_the_library_object(model):
    """`contents` returns what the constructor takes, which is also what a checkpoint's `tokenizer` returns."""
    tokenizer = LlamaTokenizerFast(model, legacy=False)
    library, settings_ = tokenizer.contents()
    assert isinstance(library, Tokenizer)
    assert LlamaTokenizerFast(library, settings_).encode(" a<s>b") == tokenizer.encode(" a<s>b")
