"""Ask transformers what its LLaMA tokenizers give, and write it down beside this file. Run by hand:

    PYTHON tests/goldens/make_tokenizer_goldens.py

once with a PYTHON that has transformers 4.46.3, sentencepiece and protobuf, which writes the model too unless there is
one, and once with one that has transformers 5.23, which reads what the first wrote. The files say what made them.
"""

import json
import logging
import platform
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import sentencepiece  # noqa: E402
import sentencepiece_models  # noqa: E402
import tokenizer_cases as cases  # noqa: E402
import tokenizer_texts as texts  # noqa: E402
import tokenizers  # noqa: E402
import transformers  # noqa: E402

MODEL = HERE / "tokenizer.model"


def versions() -> dict:
    return {
        "command": "PYTHON tests/goldens/make_tokenizer_goldens.py",
        "python": platform.python_version(),
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "sentencepiece": sentencepiece.__version__,
    }


def write(name: str, content: dict) -> None:
    """One line for each entry of each section: small, and yet a change shows as a few lines."""

    def line(value) -> str:
        return json.dumps(value, ensure_ascii=True, separators=(",", ":"))

    sections = []
    for section, entries in content.items():
        rows = ",\n".join(f"{line(key)}:{line(value)}" for key, value in entries.items())
        sections.append(f"{line(section)}:{{\n{rows}\n}}")
    (HERE / name).write_text("{\n" + ",\n".join(sections) + "\n}\n", encoding="ascii")
    print(f"{name}: {(HERE / name).stat().st_size:,} bytes")


def hashed(results: list) -> dict:
    return {"marks": cases.marks(results), "blocks": cases.blocks(results)}


def compared(fast: list, slow: list) -> dict:
    """The fast class's results: where they are not the slow one's, and proof of what they are."""
    return {"differs": cases.bitmap([a != b for a, b in zip(fast, slow, strict=True)]), "blocks": cases.blocks(fast)}


def decoded(tokenizer, rows, options) -> list[str]:
    return [tokenizer.decode(row, **options) for row in rows]


def name_of(options: dict) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items())


def four() -> None:
    """Everything, of both classes of transformers 4.46."""
    from transformers import LlamaTokenizer, LlamaTokenizerFast

    classes = {"slow": LlamaTokenizer, "fast": LlamaTokenizerFast}

    def making(kind):
        return lambda **make: classes[kind](vocab_file=str(MODEL), **make)

    lines = texts.lines(**cases.LINES)
    few = lines[: cases.AROUND]
    rows = texts.id_rows(**cases.ROWS)
    chosen = texts.chosen()
    encoded, around, decoding, whole = {}, {}, {}, {}
    for variant, make in cases.VARIANTS.items():
        ids, kept, said = {}, {}, {}
        for kind in classes:
            tokenizer = making(kind)(**make)
            ids[kind] = [tokenizer.encode(line) for line in lines]
            kept[kind] = [tokenizer.encode(text) for text in chosen]
        encoded[variant] = {"slow": hashed(ids["slow"]), "fast": compared(ids["fast"], ids["slow"])}
        whole[variant] = {
            "slow": kept["slow"],
            "fast": {str(at): b for at, (a, b) in enumerate(zip(kept["slow"], kept["fast"], strict=True)) if a != b},
        }
        for bos in (True, False):
            for eos in (True, False):
                for kind in classes:
                    tokenizer = making(kind)(**make, add_bos_token=bos, add_eos_token=eos)
                    ids[kind] = tokenizer(few)["input_ids"]
                around[f"{variant},bos={bos},eos={eos}"] = {
                    kind: cases.blocks(results) for kind, results in ids.items()
                }
        for options in cases.DECODING:
            for kind in classes:
                tokenizer = making(kind)(**make)
                tokenizer.add_tokens(cases.ADDED)
                said[kind] = decoded(tokenizer, rows, options)
            decoding[f"{variant},{name_of(options)}"] = {
                "slow": hashed(said["slow"]),
                "fast": compared(said["fast"], said["slow"]),
            }
        print(variant, "done")
    about = versions() | {"lines": cases.LINES, "rows": cases.ROWS}
    write("tokenizer_lines.json", {"about": about, "encode": encoded, "around": around, "decode": decoding})
    write("tokenizer_chosen.json", {"about": versions(), "encode": whole})

    results = {}
    for name, (make, steps) in cases.cases().items():
        given = {}
        for kind in classes:
            with tempfile.TemporaryDirectory() as folder:
                given[kind] = cases.run(making(kind), make, steps, Path(folder))
        # step by step, the fast class's result only where it is another
        results[name] = {
            "slow": given["slow"],
            "fast": {str(at): b for at, (a, b) in enumerate(zip(given["slow"], given["fast"], strict=True)) if a != b},
        }
    write("tokenizer_cases.json", {"about": versions(), "cases": results})

    saved = {}
    for variant, make in cases.VARIANTS.items():
        saved[variant] = json.loads(making("fast")(**make)._tokenizer.to_str())
    model = next(iter(saved.values()))["model"]
    assert all(parts.pop("model") == model for parts in saved.values())
    write("tokenizer_json.json", {"about": versions(), "model": model, "variants": saved})


def five() -> None:
    """Of transformers 5: what it makes of the .model file, and of the tokenizer.json files that 4.46 wrote."""
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    lines = texts.lines(**cases.LINES)
    written = json.loads((HERE / "tokenizer_json.json").read_text(encoding="ascii"))
    found = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for variant in cases.VARIANTS:
            path = folder / "tokenizer.json"
            path.write_text(json.dumps(written["variants"][variant] | {"model": written["model"]}), encoding="utf-8")
            tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path))
            found[f"tokenizer.json,{variant}"] = {"blocks": cases.blocks([tokenizer.encode(line) for line in lines])}
            path.unlink()
        (folder / "tokenizer.model").write_bytes(MODEL.read_bytes())
        try:
            tokenizer = LlamaTokenizer.from_pretrained(folder)
            ids = [tokenizer.encode(text) for text in texts.chosen()]
            found["tokenizer.model"] = {"chosen": ids, "blocks": cases.blocks([tokenizer.encode(x) for x in lines])}
        except Exception as error:
            found["tokenizer.model"] = {"raises": f"{type(error).__name__}: {str(error)[:80]}"}
    write("tokenizer_five.json", {"about": versions(), "encode": found})


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    if not MODEL.exists():
        MODEL.write_bytes(sentencepiece_models.llama_like())
    four() if transformers.__version__.startswith("4.") else five()
