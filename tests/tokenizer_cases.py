"""Named sequences of tokenizer calls, and their results as JSON, for both transformers' classes and ours."""

import base64
import hashlib
import json
import pickle
import warnings
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tokenizer_texts import chosen
from tokenizers import AddedToken

# Options that change the ids of a text itself; add_bos_token and add_eos_token only add ids around them.
VARIANTS = {
    f"legacy={legacy},add_prefix_space={prefix}": {"legacy": legacy, "add_prefix_space": prefix}
    for legacy, prefix in product([True, False], [True, False])
}
DEFAULT = {"legacy": True, "add_prefix_space": True}
NEW = {"legacy": False, "add_prefix_space": True}
LINES = {"seed": 1, "count": 20_000}
AROUND = 2_000  # of these lines are run with every combination of add_bos_token and add_eos_token
ROWS = {"seed": 2, "count": 1_500, "size": 2_004}  # the last four are ids of ADDED
ADDED = [
    AddedToken("<new>"),
    AddedToken("<mark>", special=True),
    AddedToken("wordy"),
    AddedToken("<pad>", special=True),
]
DECODING = [
    {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean, "spaces_between_special_tokens": spaces}
    for skip, clean, spaces in product([False, True], repeat=3)
]

FEW = ["Hello world", "The quick brown fox jumps over the lazy dog.", "生活的真谛是", "", "  x = 1\n"]
PAIRS = [["Hello", "world"], ["The quick brown fox", "this is a test of pairs"], ["", "a"], ["a b c", ""], ["é", " é"]]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello!"},
    {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": " 1 + 1? "},
    {"role": "assistant", "content": "2"},
]
PLAIN = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
MASKED = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] != 'assistant' %}"
    "{{ '[' + message['role'] + '] ' + message['content'] }}{% else %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
TOOLED = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% if documents %}{% for d in documents %}{{ d['title'] + ': ' + d['text'] }}\n{% endfor %}{% endif %}"
    "{% for message in messages %}{{ message['content'] }}{% endfor %}{{ mood }}"
)
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add <two> numbers & more.",
        "parameters": {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]},
    },
}
DOCUMENTS = [{"title": "Llamas", "text": "They hum."}, {"title": "é", "text": "生"}]


def add(number_a: float, word: str = "x", many: list[int] | None = None) -> float:
    """
    Add two numbers.

    Args:
        number_a: The first.
        word: Which to take. (choices: ["x", "y"])
        many: More of them.

    Returns:
        The sum.
    """
    return number_a


split = str.split


def step(name: str, *args: Any, **kwargs: Any) -> tuple:
    return name, args, kwargs


def cases() -> dict[str, tuple[dict, list[tuple]]]:
    """The constructor arguments of each case, and the steps to run on that tokenizer."""
    made: dict[str, tuple[dict, list[tuple]]] = {}

    def case(name: str, *steps: tuple, **make: Any) -> None:
        assert name not in made
        after = [step("added")] if any(taken[0] == "roundtrip" for taken in steps) else []
        made[name] = DEFAULT | make, [*steps, *after]

    call = lambda *args, **kwargs: step("__call__", *args, **kwargs)  # noqa: E731
    padded = {"pad_token": "</s>"}
    legacies = [("legacy", DEFAULT), ("new", NEW)]

    # Attributes
    case(
        "attributes",
        *[step("get", name) for name in split("bos_token eos_token unk_token pad_token bos_token_id eos_token_id")],
        *[step("get", name) for name in split("unk_token_id pad_token_id sep_token cls_token mask_token")],
        *[step("get", name) for name in split("vocab_size padding_side truncation_side model_max_length")],
        *[step("get", name) for name in split("model_input_names all_special_tokens all_special_ids is_fast")],
        *[step("get", name) for name in split("special_tokens_map additional_special_tokens add_bos_token")],
        *[step("get", name) for name in split("add_eos_token legacy use_default_system_prompt pad_token_type_id")],
        *[step("get", name) for name in split("max_len_single_sentence max_len_sentences_pair vocab_files_names")],
        *[step("get", name) for name in split("added_tokens_encoder added_tokens_decoder chat_template")],
        step("get", "clean_up_tokenization_spaces"),
        step("len"),
        step("get_vocab"),
        step("get_added_vocab"),
        step("num_special_tokens_to_add"),
        step("num_special_tokens_to_add", pair=True),
    )
    case(
        "attributes/all-given",
        *[step("get", name) for name in split("bos_token_id pad_token pad_token_id all_special_tokens padding_side")],
        step("get", "special_tokens_map"),
        step("get", "additional_special_tokens_ids"),
        step("get", "model_max_length"),
        step("len"),
        call("Hello <x> <y>world<pad>"),
        pad_token="<pad>",
        unk_token=AddedToken("<unk>", normalized=False, special=True),
        padding_side="left",
        truncation_side="left",
        model_max_length=7,
        additional_special_tokens=["<x>", "<y>"],
        add_eos_token=True,
        clean_up_tokenization_spaces=True,
    )
    for title, make in legacies:
        texts = chosen()[:90]
        case(f"tokenize/{title}", *[step("tokenize", text) for text in texts], **make)
        case(
            f"split_special_tokens/{title}",
            *[step("tokenize", text, split_special_tokens=True) for text in ("Hello <s>.", "<s>", "a</s> b")],
            *[call(text, split_special_tokens=True) for text in ("Hello <s>.", "<s>", "a</s> b")],
            **make,
        )
        case(
            f"split_special_tokens/made-{title}",
            *[call(text) for text in chosen()[:60]],
            split_special_tokens=True,
            **make,
        )
        case(
            f"pairs/{title}",
            *[call(*pair) for pair in PAIRS],
            call([p[0] for p in PAIRS], [p[1] for p in PAIRS]),
            **make,
        )
        case(
            f"pairs/eos-{title}",
            *[call(*pair, return_token_type_ids=True, return_special_tokens_mask=True) for pair in PAIRS],
            call(PAIRS, return_token_type_ids=True),
            step("encode", "Hello", "world"),
            step("tokenize", "Hello", pair="world"),
            add_eos_token=True,
            **make,
        )
        case(
            f"decode/whole-{title}",
            *[step("roundtrip", text) for text in chosen()[:90]],
            step("decode", [1, 2, 0]),
            step("decode", []),
            step("decode", 1),
            step("decode", 300),
            step("decode", np.array([300, 301, 1999])),
            step("batch_decode", [[1, 300], [301, 2], []]),
            step("batch_decode", np.array([[1, 300], [301, 2]]), skip_special_tokens=True),
            step("batch_decode", [300, 301]),
            step("decode", [243, 162, 155]),
            step("decode", [243, 162, 155, 131]),
            step("decode", [3 + 0xC3, 3 + 0xA9, 3 + 0xC3]),
            step("decode", [3 + 0xC3, 1, 3 + 0xA9]),
            step("decode", [3 + 0x0A, 300]),
            step("decode", [1, 3 + 0x20, 300]),
            **make,
        )
        case(
            f"decode/no-prefix-{title}",
            *[step("roundtrip", t) for t in chosen()[:60]],
            **make | {"add_prefix_space": False},
        )
        case(
            f"decode/each-{title}",
            *[step("decode", [number]) for number in [*range(3), 3, 13, 35, 200, 258, *range(259, 340), 1760, 1761]],
            **make,
        )
        case(
            f"words/{title}",
            call(["Hello", "world", " spaced", "", "生活"], is_split_into_words=True),
            call([["Hello", "world"], ["a"]], is_split_into_words=True),
            call(["Hello", "<s>", "world"], ["second", "text"], is_split_into_words=True),
            **make,
        )

    # BOS and EOS
    for bos, eos in product([True, False], repeat=2):
        case(
            f"around/bos={bos},eos={eos}",
            call("Hello"),
            call("Hello", add_special_tokens=False),
            call("Hello", "world", return_special_tokens_mask=True),
            step("build_inputs_with_special_tokens", [5]),
            step("build_inputs_with_special_tokens", [5], [6, 7]),
            step("create_token_type_ids_from_sequences", [5, 6]),
            step("create_token_type_ids_from_sequences", [5, 6], [7]),
            step("get_special_tokens_mask", [5, 6]),
            step("get_special_tokens_mask", [5, 6], [7]),
            step("get_special_tokens_mask", [1, 5, 0, 2], already_has_special_tokens=True),
            step("get_special_tokens_mask", [1, 5], [6], already_has_special_tokens=True),
            step("num_special_tokens_to_add", True),
            add_bos_token=bos,
            add_eos_token=eos,
        )
    case(
        "around/set-later",
        step("set", "add_eos_token", True),
        call("Hello"),
        step("set", "add_bos_token", False),
        call("Hello", "world"),
        step("set", "bos_token", "</s>"),
        step("set", "add_bos_token", True),
        call("Hello"),
        step("get", "bos_token_id"),
    )
    case("around/bos-none", step("get", "bos_token"), call("Hello"), bos_token=None, add_bos_token=False)
    case("around/other-bos", call("Hello"), step("len"), step("get", "bos_token_id"), bos_token="<begin>")

    # Padding and truncation
    for side in ("left", "right"):
        title, make = f"-{side}", padded | {"padding_side": side}
        case(
            f"padding{title}",
            call(FEW, padding=True),
            call(FEW, padding="longest", return_token_type_ids=True, return_special_tokens_mask=True),
            call(FEW, padding="max_length", max_length=12),
            call(FEW, padding="max_length", max_length=12, truncation=True),
            call(FEW, padding=True, pad_to_multiple_of=8),
            call("Hello", padding="max_length", max_length=9, pad_to_multiple_of=8),
            call("Hello", padding=True),
            call(FEW, padding="do_not_pad"),
            call(FEW, padding=False),
            call(FEW, padding=True, return_tensors="np"),
            call(FEW, padding=True, return_attention_mask=False),
            call(FEW, padding=True, return_length=True),
            call(FEW, padding=True, max_length=3),
            call("Hello", return_tensors="np"),
            call(FEW[:2], [FEW[1], FEW[0]], padding=True),
            step("pad", {"input_ids": [[1, 2, 3], [4]]}),
            step("pad", {"input_ids": [[1, 2, 3], [4]], "attention_mask": [[1, 1, 0], [1]]}, return_tensors="np"),
            step("pad", [{"input_ids": [1, 2, 3]}, {"input_ids": [4]}], pad_to_multiple_of=4),
            step("pad", {"input_ids": [1, 2]}, padding="max_length", max_length=4),
            step("pad", {"input_ids": [[1, 2], []]}, return_attention_mask=False),
            **make,
        )
        case(
            f"truncation{title}",
            *[call(FEW[1], max_length=size, truncation=True) for size in (1, 2, 5, 40)],
            *[
                call(*pair, max_length=size, truncation=strategy)
                for pair in [PAIRS[1], PAIRS[1][::-1]]
                for size in (6, 9)
                for strategy in (True, "longest_first", "only_first", "only_second", "do_not_truncate", False)
            ],
            call(FEW, max_length=4, truncation=True),
            step("encode", FEW[1], max_length=6, truncation=True),
            truncation_side=side,
        )
        case(
            f"overflow{title}",
            *[
                call(text, max_length=size, truncation=True, stride=stride, return_overflowing_tokens=True)
                for text in (FEW[0], FEW[1])
                for size, stride in ((6, 0), (6, 2), (7, 5), (50, 0))
            ],
            *[
                call(*PAIRS[1], max_length=8, truncation=strategy, stride=1, return_overflowing_tokens=True)
                for strategy in ("only_first", "only_second", True)
            ],
            truncation_side=side,
        )
        case(
            f"overflow/batch{title}",
            call(FEW, max_length=5, truncation=True, stride=1, return_overflowing_tokens=True),
            call(FEW, max_length=5, truncation=True, padding=True, return_overflowing_tokens=True, return_length=True),
            truncation_side=side,
            **padded,
        )
    case("truncation/model_max_length", call(FEW[1], truncation=True), call(FEW[1]), model_max_length=5)
    case(
        "prepare_for_model",
        step("prepare_for_model", [5, 6, 7]),
        step("prepare_for_model", [5, 6, 7], [8, 9], return_token_type_ids=True, return_special_tokens_mask=True),
        step("prepare_for_model", [5, 6, 7], max_length=3, truncation=True, return_overflowing_tokens=True),
        step("prepare_for_model", [5, 6, 7], padding="max_length", max_length=6, add_special_tokens=False),
        step("truncate_sequences", [5, 6, 7, 8], [9, 10], 2, "longest_first"),
        step("truncate_sequences", [5, 6, 7, 8], None, 2, "only_first", 1),
        call([]),
        step("encode_plus", "Hello", "world"),
        step("batch_encode_plus", ["Hello", "world"]),
        step("batch_encode_plus", [["Hello", "world"]]),
        **padded,
    )

    # Added tokens
    texts = [
        *[
            "<new>",
            "a<new>b",
            "a <new> b",
            " <new> ",
            "<new><new>",
            "x<new>y<s>z",
            "<s><new> a",
            "a  <new>  b<new>",
            "<New>",
        ],
        *["anew newer", "<new>.", "生<new>活", "\n<new>\n", "<new", "Hello<new>"],
    ]
    kinds: dict[str, Any] = {
        "str": "<new>",
        "plain": AddedToken("<new>", normalized=False),
        "normalized": AddedToken("<new>", normalized=True),
        "lstrip": AddedToken("<new>", lstrip=True, normalized=False),
        "rstrip": AddedToken("<new>", rstrip=True, normalized=False),
        "both": AddedToken("<new>", lstrip=True, rstrip=True, normalized=False),
        "single_word": AddedToken("<new>", single_word=True, normalized=False),
        "special": AddedToken("<new>", special=True, normalized=False),
        "special-both": AddedToken("<new>", special=True, lstrip=True, rstrip=True, normalized=False),
    }
    for title, make in legacies:
        for kind, token in kinds.items():
            case(
                f"added/{kind}-{title}",
                step("add_tokens", [token]),
                step("len"),
                *[step("roundtrip", text) for text in texts],
                *[step("tokenize", text) for text in texts[:4]],
                **make,
            )
        case(
            f"added/word-{title}",
            step("add_tokens", [AddedToken("new", single_word=True, normalized=False), "two words", " lead"]),
            *[
                step("roundtrip", text)
                for text in ["new newer anew new.", "two words", "a two wordsb", "b lead", "new"]
            ],
            **make,
        )
        case(
            f"added/known-{title}",
            step("add_tokens", ["<new>", "Hello", "<s>", "<0x0A>"]),
            step("len"),
            step("add_tokens", ["<new>"]),
            step("add_tokens", "<one>", special_tokens=True),
            step("get_added_vocab"),
            *[step("roundtrip", text) for text in ["Hello", " Hello world", "aHello<one> <new>", "\n", "<0x0A>"]],
            step("convert_tokens_to_ids", ["<new>", "Hello", "<one>", "<none>"]),
            step("convert_ids_to_tokens", [2000, 2001, 2002, 1, 300]),
            **make,
        )
        case(
            f"added/special-names-{title}",
            step("add_special_tokens", {"pad_token": "<pad>", "additional_special_tokens": ["<a>", "<b>"]}),
            step("get", "special_tokens_map"),
            step("get", "all_special_ids"),
            step("add_special_tokens", {"additional_special_tokens": ["<c>"]}, replace_additional_special_tokens=False),
            step("get", "additional_special_tokens"),
            step("add_special_tokens", {"additional_special_tokens": ["<d>"]}),
            step("get", "additional_special_tokens"),
            step("add_special_tokens", {"mask_token": AddedToken("<mask>", lstrip=True)}),
            *[step("roundtrip", text) for text in ["<a>x<b> <c>", "x  <mask> y", "<pad><pad>", "z<d>"]],
            call(["x", "x y z"], padding=True),
            step("len"),
            **make,
        )

    # Tokens and ids
    case(
        "convert",
        step("convert_tokens_to_ids", "▁Hello"),
        step("convert_tokens_to_ids", ["▁Hello", "zzz", "<0x0A>", "<s>", "▁▁"]),
        step("convert_tokens_to_ids", []),
        step("convert_ids_to_tokens", 300),
        step("convert_ids_to_tokens", [0, 1, 2, 13, 259, 1999]),
        step("convert_ids_to_tokens", [0, 1, 300], skip_special_tokens=True),
        step("convert_ids_to_tokens", 2000),
        step("convert_ids_to_tokens", [-1]),
        step("convert_tokens_to_string", ["▁Hello", "▁world"]),
        step("convert_tokens_to_string", ["Hello", "▁world"]),
        step("convert_tokens_to_string", ["▁", "<0xC3>", "<0xA9>", "<s>", "▁a"]),
        step("convert_tokens_to_string", ["<s>", "▁a", "b"]),
        step("convert_tokens_to_string", []),
        step("decode", [2000]),
        step("decode", [-1]),
    )
    case(
        "pickle", step("pickle"), call("Hello <x>"), step("len"), additional_special_tokens=["<x>"], add_eos_token=True
    )
    case("pickle/new", step("pickle"), call(" Hello <s>x"), step("decode", [1, 300, 301]), **NEW)
    case(
        "errors",
        call(None),
        call(3),
        call([3]),
        call(FEW, padding=True),
        call("a", return_tensors="xy"),
        call("a", padding="sideways"),
        call("a", truncation="sideways"),
        call(FEW, return_tensors="np"),
        step("encode", None),
        step("set", "padding_side", "up"),
        call(["a", "b c"], padding=True),
        step("apply_chat_template", CHAT),
        step("add_tokens", [3]),
        step("decode", "text"),
        step("add_special_tokens", {"nothing_token": "<x>"}),
        step("prepare_for_model", "text"),
    )

    # Chats
    for title, template in (("plain", PLAIN), ("masked", MASKED), ("tools", TOOLED)):
        case(
            f"chat/{title}",
            step("apply_chat_template", CHAT, tokenize=False),
            step("apply_chat_template", CHAT),
            step("apply_chat_template", CHAT[:4], tokenize=False, add_generation_prompt=True),
            step("apply_chat_template", CHAT, tokenize=False, continue_final_message=True),
            step("apply_chat_template", CHAT[:3], continue_final_message=True),
            step("apply_chat_template", CHAT, continue_final_message=True, add_generation_prompt=True),
            step("apply_chat_template", CHAT, return_dict=True),
            step("apply_chat_template", [CHAT, CHAT[:3]], tokenize=False),
            step("apply_chat_template", [CHAT, CHAT[:3]], return_dict=True, padding=True),
            step("apply_chat_template", CHAT, return_dict=True, return_assistant_tokens_mask=True),
            step("apply_chat_template", CHAT, return_tensors="np"),
            step("apply_chat_template", CHAT, max_length=6, truncation=True),
            step("apply_chat_template", CHAT, padding="max_length", max_length=120, return_dict=True),
            step("apply_chat_template", CHAT, tokenize=False, tools=[TOOL], documents=DOCUMENTS, mood="glad"),
            step("apply_chat_template", CHAT, tokenize=False, tools=[add]),
            step("apply_chat_template", CHAT, chat_template="{{ messages | length }}", tokenize=False),
            step("apply_chat_template", CHAT, tools=[3], tokenize=False),
            step("apply_chat_template", CHAT, tokenize=False, return_dict=True),
            step("get_chat_template"),
            chat_template=template,
            **padded,
        )
    case(
        "chat/named",
        step("apply_chat_template", CHAT, tokenize=False),
        step("apply_chat_template", CHAT, chat_template="short", tokenize=False),
        step("apply_chat_template", CHAT, tools=[TOOL], tokenize=False),
        step("apply_chat_template", CHAT, chat_template="absent {{ bos_token }}", tokenize=False),
        step("get_chat_template", "short"),
        chat_template={"default": PLAIN, "short": "{{ messages[0]['role'] }}", "tool_use": TOOLED},
    )

    # Files
    for title, make in [
        *legacies,
        ("eos", {"add_eos_token": True}),
        ("chat", {"chat_template": PLAIN, "pad_token": "<pad>"}),
    ]:
        case(
            f"save/{title}",
            step("add_tokens", [AddedToken("<new>", lstrip=True), AddedToken("<sp>", special=True)]),
            step("save_pretrained", "{dir}/out"),
            step("files", "{dir}/out"),
            step("reload", "{dir}/out"),
            *[call(text) for text in ("Hello <new> <sp>.", " <s>x", "")],
            step("len"),
            **make,
        )
    case("save/untouched", step("save_pretrained", "{dir}/out"), step("files", "{dir}/out"))
    case(
        "save/vocabulary",
        step("mkdir", "{dir}/v"),
        step("save_vocabulary", "{dir}/v"),
        step("save_vocabulary", "{dir}/v", filename_prefix="my"),
        step("files", "{dir}/v"),
        step("save_vocabulary", "{dir}/absent"),
        step("save_pretrained", "{dir}/p", filename_prefix="my"),
        step("files", "{dir}/p"),
    )

    # Fast class only
    for title, make in legacies:
        offsets = ["Hello world", " Hello", "  Hello", "a  b", "é生😀x", "<s>a <s> b", "", "\n x", "▁a", "e\u0301 🇰🇷"]
        case(
            f"offsets/{title}",
            *[call(text, return_offsets_mapping=True) for text in offsets],
            call("Hello world", " second one", return_offsets_mapping=True),
            *[step("encoding", text) for text in offsets],
            step("encoding", "Hello world", "second"),
            step("encoding", ["Hello", "two words"], is_split_into_words=True),
            call(
                "a b c d e f g h",
                max_length=5,
                truncation=True,
                stride=1,
                return_overflowing_tokens=True,
                return_offsets_mapping=True,
            ),
            **make,
        )
    case(
        "post_processor",
        step("set", "bos_token", "</s>"),
        call("Hello"),
        step("update_post_processor"),
        call("Hello"),
        step("set", "add_eos_token", True),
        call("Hello", "world"),
        step("set", "bos_token", None),
        step("update_post_processor"),
    )
    return made


def plain(value: Any, folder: str = "") -> Any:
    """Convert `value` to JSON types, the same for transformers' objects and ours."""
    if isinstance(value, AddedToken):
        flags = ["single_word", "lstrip", "rstrip", "normalized", "special"]
        return {"content": value.content} | {name: getattr(value, name) for name in flags}
    if isinstance(value, Mapping):
        return {str(key): plain(item, folder) for key, item in value.items()}
    if hasattr(value, "data") and isinstance(value.data, dict):  # a BatchEncoding
        return plain(value.data, folder)
    if isinstance(value, np.ndarray):
        return {"array": plain(value.tolist()), "dtype": str(value.dtype)}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [plain(item, folder) for item in value]
    if isinstance(value, str):
        return value.replace(folder, "{dir}") if folder else value
    if isinstance(value, int) and not isinstance(value, bool) and value > 10**20:
        return "very large"
    if value is None or isinstance(value, bool | int | float):
        return value
    return {"type": type(value).__name__}


def files(folder: Path) -> dict:
    """The files in a folder by name: JSON contents, but only the keys of a tokenizer.json; checksums of the rest."""
    said: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith("tokenizer.json"):
            said[path.name] = sorted(json.loads(path.read_text(encoding="utf-8")))
        elif path.suffix == ".json":
            said[path.name] = json.loads(path.read_text(encoding="utf-8"))
        else:
            said[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return said


def encoding(tokenizer, args, kwargs) -> dict:
    """Everything a fast tokenizer reports about where its tokens come from."""
    batch = tokenizer(*args, **kwargs)
    text = args[0] if isinstance(args[0], str) else ""
    return {
        "tokens": batch.tokens(),
        "word_ids": batch.word_ids(),
        "sequence_ids": batch.sequence_ids(),
        "char_to_token": [batch.char_to_token(at) for at in range(len(text))],
        "token_to_chars": [batch.token_to_chars(at) for at in range(len(batch["input_ids"]))],
        "char_to_word": [batch.char_to_word(at) for at in range(len(text))],
    }


def added(tokenizer) -> list:
    """The id of each added token, followed by the fields of tokenizer_slow.Added."""
    special, more = tokenizer.all_special_tokens, tokenizer.additional_special_tokens
    said = []
    for number, token in tokenizer.added_tokens_decoder.items():
        apart = token.content not in special or (token.content in more and number >= tokenizer.vocab_size)
        said.append([number, token.content, token.content in special, apart])
    return said


def take(tokenizer, name: str, args: tuple, kwargs: dict):
    if name == "get":
        return getattr(tokenizer, args[0])
    if name == "set":
        return setattr(tokenizer, *args)
    if name == "len":
        return len(tokenizer)
    if name == "get_vocab":
        vocab = tokenizer.get_vocab()
        return [len(vocab), digest(sorted(vocab.items(), key=lambda item: item[1]))]
    if name == "roundtrip":
        ids = tokenizer.encode(*args)
        return [
            ids,
            tokenizer.decode(ids),
            tokenizer.decode(ids, skip_special_tokens=True),
            tokenizer.decode(ids, spaces_between_special_tokens=False),
            tokenizer.decode(ids, skip_special_tokens=True, spaces_between_special_tokens=False),
        ]
    if name == "save_pretrained":  # transformers also returns files that it does not write
        return sorted(path for path in tokenizer.save_pretrained(*args, **kwargs) if Path(path).exists())
    if name == "added":
        return added(tokenizer)
    if name == "files":
        return files(Path(args[0]))
    if name == "mkdir":
        return Path(args[0]).mkdir()
    if name == "encoding":
        return encoding(tokenizer, args, kwargs)
    return getattr(tokenizer, name)(*args, **kwargs)


def run(make_tokenizer, make: dict, steps: list[tuple], folder: Path) -> list:
    """The result of each step; an exception is a result too."""
    tokenizer = make_tokenizer(**make)
    given: list[Any] = []
    for name, args, kwargs in steps:
        args = tuple(arg.replace("{dir}", str(folder)) if isinstance(arg, str) else arg for arg in args)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if name == "reload":
                    tokenizer = type(tokenizer).from_pretrained(*args, **kwargs)
                    given.append(None)
                elif name == "pickle":
                    tokenizer = pickle.loads(pickle.dumps(tokenizer))
                    given.append(None)
                else:
                    given.append(plain(take(tokenizer, name, args, kwargs), str(folder)))
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            given.append({"raises": type(error).__name__, "message": first.replace(str(folder), "{dir}")[:100]})
    return given


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def marks(results: list) -> str:
    """Two bytes per result, enough to show which ones differ; `blocks` proves that none do."""
    return base64.b64encode(bytes.fromhex("".join(digest(result)[:4] for result in results))).decode()


def blocks(results: list, size: int = 100) -> list[str]:
    return [digest(results[at : at + size]) for at in range(0, len(results), size)]


def bitmap(flags: list[bool]) -> str:
    return base64.b64encode(np.packbits(flags).tobytes()).decode()


def unpack(bits: str, count: int) -> list[bool]:
    return np.unpackbits(np.frombuffer(base64.b64decode(bits), np.uint8))[:count].astype(bool).tolist()


def strays(results: list, golden: dict) -> list[int]:
    """Indices of results whose golden `marks` differ or, if none do, the starts of `blocks` that differ."""
    theirs, ours = base64.b64decode(golden["marks"]), base64.b64decode(marks(results))
    differing = [at for at in range(len(results)) if theirs[2 * at : 2 * at + 2] != ours[2 * at : 2 * at + 2]]
    if not differing and blocks(results) != golden["blocks"]:
        return [
            100 * at
            for at, pair in enumerate(zip(blocks(results), golden["blocks"], strict=True))
            if pair[0] != pair[1]
        ]
    return differing
