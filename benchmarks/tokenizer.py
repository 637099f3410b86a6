"""The tokenizers against transformers and SentencePiece, interleaved, on a Llama-like vocabulary of 32,000 pieces.

    python -m benchmarks.tokenizer           # a table, and benchmarks/results/tokenizer.json

CPU-bound: compare seconds for building, and millions of characters per second for encoding. Short texts show the
overhead per text, long ones the cost per character. The model file is the tests' Apache-licensed one, with Llama 2's
settings.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import sentencepiece
import transformers

from llama import LlamaTokenizer, LlamaTokenizerFast

from . import harness
from .cpu import timed

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # where the model and the texts are


def texts() -> dict[str, list[str]]:
    """The same half a million characters as lines, as documents, and as one text."""
    from tokenizer_texts import lines

    special = ("<unk>", "<s>", "</s>")  # which only SentencePiece treats as text
    short = [line for line in lines(1, 20_000) if not any(token in line for token in special)]
    return {
        "lines": short,
        "documents": ["\n".join(short[at : at + 100]) for at in range(0, len(short), 100)],
        "one text": ["\n".join(short)],
    }


def rates(rivals: dict[str, Callable[[list[str]], list[list[int]]]], what: str, runs: int) -> list[dict]:
    """Millions of characters per second; asserts that the rivals agree on every id."""
    rows = []
    for kind, batch in texts().items():
        first, *others = (encode(batch) for encode in rivals.values())
        assert all(other == first for other in others), f"the providers disagree on {kind}"
        size = sum(map(len, batch)) / 1e6
        turns = {name: timed(partial(encode, batch)) for name, encode in rivals.items()}
        seconds = harness.take_turns(turns, runs)
        speeds = {name: [size / second for second in values] for name, values in seconds.items()}
        rows.append(harness.row(f"{what}, {kind}", "Mchar/s", speeds, max))
    return rows


def measure(model: Path, runs: int) -> list[dict]:
    fast, slow = LlamaTokenizerFast(model, add_bos_token=False), LlamaTokenizer(model, add_bos_token=False)
    alone = sentencepiece.SentencePieceProcessor(model_file=str(model))
    with tempfile.TemporaryDirectory() as folder:
        fast.save_pretrained(folder)
        theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        building = {
            "from the .model": timed(lambda: LlamaTokenizerFast(model)),
            "from its tokenizer.json": timed(lambda: LlamaTokenizerFast.from_pretrained(folder)),
        }
        rows = [harness.row("build the fast class", "s", harness.take_turns(building, runs))]
        rivals = {"llama": lambda b: fast(b)["input_ids"], "transformers": lambda b: theirs(b)["input_ids"]}
        rows += rates(rivals, "fast class, batch", runs)
        one_by_one = {
            "llama": lambda b: [fast(text)["input_ids"] for text in b],
            "transformers": lambda b: [theirs(text)["input_ids"] for text in b],
        }
        rows += rates(one_by_one, "fast class, one by one", runs)
    one_by_one = {
        "llama": lambda b: [slow(text)["input_ids"] for text in b],
        "sentencepiece": lambda b: [alone.encode(text, out_type=int) for text in b],
    }
    rows += rates(one_by_one, "slow class, one by one", runs)
    batches = {"llama": lambda b: slow(b)["input_ids"], "sentencepiece": lambda b: alone.encode(b, out_type=int)}
    return rows + rates(batches, "slow class, batch", runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "tokenizer.json")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    from sentencepiece_models import PACKAGE, fetched

    harness.write(options.out, "tokenizer", f"tokenizer.model.v1 of {PACKAGE}", measure(fetched(), options.runs))


if __name__ == "__main__":
    main()
