"""Texts that tell tokenizers apart: thousands of lines drawn from a seed, and a few hundred chosen by hand.

Draws use `random()` alone, the one method of `random.Random` whose sequence Python promises to keep for a seed.
"""

import random

split = str.split
WORDS = split(
    "the of and to in is that for it as was with be by on not he his but at are this have from or had an they which "
    "one you were her all she there would their we him been has when who will more no if out so said what up its about "
    "into than them can only other new some could time these two may then do first any my now such like our over man "
    "me even most made after also did many before must through back years where much your way well down should because "
    "each just those people how too little state good very make world still own see men work long get here between "
    "both life being under never day same another know while last might us great old year off come since against go "
    "came right used take three Hello this is a test Banana tokenizer model language attention"
)
NAMES = split("x y i self value items count result data index key node left right total path name config width")
FOREIGN = split(
    "naïve café Ünïcödé façade año Übergröße crème brûlée Þórður Łódź İstanbul ångström cœur ﬁancé Ω≈ç√ "
    "e\u0301te\u0301 a\u0308rger \u1e9b\u0323 Привет мир как дела γνῶθι σεαυτόν 生活的真谛是 你好，世界！ 我喜歡學習 "
    "日本語のテスト カタカナ ﾊﾝｶｸ 漢字 한국어 안녕하세요 세상 "
    "𠮷野家 𪚥 مرحبا بالعالم السلام عليكم שלום עולם עִבְרִית नमस्ते दुनिया ภาษาไทย ปี ird ด ไม่เป็นไร ខ្មែរ አማርኛ ქართული "
    "\u200fعربي\u200e \u202eRTL\u202c vi\u1ec7t"
)
EMOJI = [
    "😀",
    "🦙",
    "👍🏽",
    "👩\u200d👩\u200d👧\u200d👦",
    "👨🏿\u200d🚀",
    "🏳️\u200d🌈",
    "🇰🇷",
    "🇺🇸🇫🇷",
    "❤️",
    "☕",
    "1️⃣",
    "🧑🏻\u200d❤️\u200d🧑🏾",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
    "✨",
    "©",
    "™",
    "\ufe0f",
    "\u200d",
    "🇦",
]
# Control characters, kinds of space, and characters with special meanings in text processing.
CONTROLS = (
    "\0\x01\x07\b\t\n\v\f\r\x1b\x1f\x7f\x80\x85\xa0\xad\u1680\u2000\u2003\u200b\u2028\u2029\u202f\u205f\u2060\u3000"
)
CONTROLS += "\ufeff\ufffd\uffff\U0001f9ff\U0010ffff"
SPECIAL = split("<s> </s> <unk>")
NEARLY_SPECIAL = [
    "<S>",
    "<s",
    "<",
    "s>",
    "<s/>",
    "</",
    "s>",
    "<<s>>",
    "<pad>",
    "<0x0A>",
    "<0xE2>",
    "<unk",
    "<",
    "unk>",
    "[INST]",
    "[/INST]",
    "<<SYS>>",
    "<|eot|>",
    "▁",
    "▁▁",
    "▁a",
]
PUNCTUATION = split(". , ! ? : ; ' \" ( ) [ ] { } - -- ... / \\ @ # $ % ^ & * _ + = < > ~ ` | 's n't 'm 've 're")


class Draw:
    """Choices that stay the same for a seed in every version of Python."""

    def __init__(self, seed: int):
        self.random = random.Random(seed).random

    def below(self, stop: int) -> int:
        return int(self.random() * stop)

    def one(self, choices):
        return choices[self.below(len(choices))]

    def many(self, choices, low: int, high: int) -> list:
        return [self.one(choices) for _ in range(low + self.below(high - low + 1))]


def english(draw: Draw) -> str:
    text = " ".join(draw.many(WORDS, 1, 16))
    if draw.random() < 0.5:
        text = text[0].upper() + text[1:] + draw.one(PUNCTUATION[:6])
    if draw.random() < 0.2:
        text += draw.one([" ", "  ", "   "]) + str(draw.below(10 ** (1 + draw.below(9))))
    return text


def code(draw: Draw) -> str:
    indent = draw.one([" " * 4 * draw.below(6), "\t" * draw.below(4), " " * draw.below(40)])
    name, other, number = draw.one(NAMES), draw.one(NAMES), draw.below(2000)
    return indent + draw.one(
        [
            f"def {name}(self, {other}={number}):",
            f"return {name}[{other}] + {number}.{draw.below(100)}",
            f"for {name} in range({number}):  # {draw.one(WORDS)} {draw.one(WORDS)}",
            f"if ({name} != NULL && {other}->{name} == 0x{number:X}) {{",
            f'    {name}.{other} = "{draw.one(WORDS)}\\n";',
            f"{name:<12}= {other:>8};",
            f"{name}\t{other}\t\t{number}",
            f"{{'{name}': [{number}, {number}], \"{other}\": None}}",
            "}" * (1 + draw.below(4)),
            f"import {name}.{other} as {draw.one(WORDS)}\n{indent}\n\n{indent}print({name})",
        ]
    )


def foreign(draw: Draw) -> str:
    return draw.one(["", " ", " "]).join(draw.many(FOREIGN, 1, 8))


def emoji(draw: Draw) -> str:
    return draw.one(["", "", " "]).join(draw.many([*EMOJI, *EMOJI, *WORDS], 1, 8))


def spaces(draw: Draw) -> str:
    runs = [" " * (1 + draw.below(20)), "\t", "\n", "\n\n", "\r\n", " ", "  ", "\xa0", "\u3000", "▁"]
    return "".join(draw.many([*runs, *runs, *draw.many(WORDS, 4, 4)], 1, 10))


def controls(draw: Draw) -> str:
    return "".join(draw.many([*CONTROLS, *CONTROLS, *draw.many(WORDS, 20, 20)], 1, 12))


def special(draw: Draw) -> str:
    parts = [*SPECIAL, *SPECIAL, *SPECIAL, *draw.many(WORDS, 5, 5), *draw.many(NEARLY_SPECIAL, 3, 3)]
    parts += [" ", "  ", ".", "\n", draw.one(FOREIGN), draw.one(EMOJI), draw.one(PUNCTUATION)]
    return draw.one(["", "", " "]).join(draw.many(parts, 1, 9))


def soup(draw: Draw) -> str:
    """Arbitrary characters from all of Unicode, the lower ranges more often."""
    stops = [0x80, 0x250, 0x2E80, 0xD800, 0x110000]
    text = ""
    for _ in range(1 + draw.below(12)):
        number = draw.below(draw.one(stops))
        text += chr(number if not 0xD800 <= number < 0xE000 else 0xFFFD)
    return text


def punctuated(draw: Draw) -> str:
    return "".join(
        word + draw.one(["", " ", " ", "  "]) for word in draw.many([*draw.many(WORDS, 8, 8), *PUNCTUATION], 2, 14)
    )


def mixed(draw: Draw) -> str:
    return draw.one(["", " ", "\n"]).join(draw.one(KINDS[:-1])(draw) for _ in range(2 + draw.below(3)))


KINDS = [english, code, foreign, emoji, spaces, controls, special, soup, punctuated, mixed]


def lines(seed: int, count: int) -> list[str]:
    """`count` texts, cycling through KINDS; some contain newlines, and some begin or end with spaces."""
    draw = Draw(seed)
    drawn = []
    for number in range(count):
        text = KINDS[number % len(KINDS)](draw)
        drawn.append(draw.one(["", "", "", "", " ", "  "]) + text + draw.one(["", "", "", "", " ", "\n"]))
    return drawn


def corpus(seed: int = 0, count: int = 6000) -> list[str]:
    """Lines to train a model on, without special tokens and controls, which it would learn to split."""
    draw = Draw(seed)
    kinds = [english, english, code, code, foreign, emoji, punctuated]
    return [part for number in range(count) for part in kinds[number % len(kinds)](draw).split("\n") if part.strip()]


def id_rows(seed: int, count: int, size: int) -> list[list[int]]:
    """Random ids, with bytes of invalid UTF-8 and the first and last few ids over-represented."""
    draw = Draw(seed)
    rows = []
    for _ in range(count):
        row: list[int] = []
        for _ in range(1 + draw.below(8)):
            kind = draw.below(5)
            if kind == 0:
                row += draw.many([0, 1, 2, *range(size - 4, size)], 1, 2)
            elif kind == 1:
                row += [3 + byte for byte in draw.one(EMOJI + FOREIGN).encode()][draw.below(3) : 1 + draw.below(12)]
            elif kind == 2:
                row += [3 + draw.below(256) for _ in range(1 + draw.below(4))]
            else:
                row += [259 + draw.below(size - 259) for _ in range(1 + draw.below(6))]
        rows.append(row)
    return rows


def chosen() -> list[str]:
    """Texts whose ids the goldens hold in full: those of transformers' tests and issues, and edge cases near them."""
    texts = [
        *["", " ", "  ", "   ", " " * 15, " " * 16, " " * 17, " " * 33, "\n", "\n\n", "\t", "\r\n", " \n ", "\0"],
        *[
            "▁",
            "▁▁",
            " ▁",
            "▁ ",
            "▁a",
            "a▁b",
            "a ▁ b",
            "▁ ▁",
            "▁Hello",
            "Hello▁",
            "▁<s>",
            "<s>▁",
            "\xa0",
            "\xa0a",
            "\u3000",
        ],
        *["Hello this is a test", "This is a test", "A sample test", "Hi  Hello", "Hi   Hello", " Hello", "  Hello"],
        *[
            "Hello",
            "hello",
            "Hello world",
            "Hello ",
            "Hello  ",
            "Hello\n",
            "\nHello",
            "\tHello",
            "\n Hello",
            "Hello , it 's ok .",
        ],
        "The following string should be properly encoded: Hello.",
        "But ird and ปี   ird   ด",
        "The quick brown fox jumps over the lazy dog.",
        "生活的真谛是",
        "I was born in 92000, and this is falsé.",
        "Hey how are you doing",
        "Hello <s>.",
        "Hello  <s>  .",
        "<s>Hello",
        "<s> Hello<s>how",
        " <s> Hello<s> how",
        "<s> Hello<s>how<s>",
        "inform<s>. Hey.       .",
        "<s>inform. <s> Hey.",
        "<REPR_END>inform<s>. Hey.       .",
        "<s><s>",
        "<s> <s>",
        "<s></s><unk>",
        "<unk>Hello<unk>",
        "<s>>",
        "<<s>",
        "< s>",
        "<S>",
        "<0x0A>",
        "<0x0a>\n",
        "</s",
        "a</s>b </s> c",
        "1234567890 12 3.14 ١٢٣ ²³ Ⅻ 1️⃣",
        "e\u0301 é ﬁ fi Ⅳ Å Å ｆｕｌｌ",
        "👩‍👩‍👧‍👦",
        "🇰🇷🇺🇸",
        "\ufeffHello",
        "\u200bHello\u200b",
        "\x1b[31mred\x1b[0m",
        "a\0b",
        "if x:\n    return 1\n\n\n        # deep\n\tx = {'a':  1}",
        "a" * 100,
        "ab " * 50,
        "don't I'm it's we've they're",
        "don 't I 'm it 's we 've they 're , . ! ?",
    ]
    for before in ("", " ", "  ", "\n", "a", "a ", "a  ", ".", "生"):
        for token in ("<s>", "</s>", "<unk>"):
            texts += [before + token + after for after in ("", " ", "  ", "\n", "b", " b", "  b", ".", "生", "<s>")]
    return list(dict.fromkeys(texts))
