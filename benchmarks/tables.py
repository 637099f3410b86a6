"""The README's tables: regenerates what is between its markers from the committed results.

    python -m benchmarks.tables              # <!-- table: model --> ... <!-- end -->; tests/test_readme.py compares

A table without results is left unchanged.
"""

import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import harness
from .report import Row, read

README = Path(__file__).parent.parent / "README.md"
MARKED = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rivals(rows: list[Row], lines: dict[str, tuple[str, int]]) -> str:
    """A table of each rival's best. `lines`: label -> (the row's `what`, the number of decimals)."""
    found: dict[str, Any] = {row["what"]: row.get("best") for row in rows}
    names = list(found[next(iter(lines.values()))[0]])
    table = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for label, (what, digits) in lines.items():
        table.append(f"| {label} | " + " | ".join(f"{found[what][name]:.{digits}f}" for name in names) + " |")
    return "\n".join(table)


def plain(rows: list[Row]) -> list[Row]:
    """The rows in float32 on one thread, or that do not say."""
    return [row for row in rows if row.get("dtype", "float32") == "float32" and row.get("threads", 1) == 1]


def model(rows: list[Row]) -> str:
    rows = plain(rows)
    table = rivals(rows, {
        "decode, tokens/s": ("decode", 1), "prefill of 512 tokens, s": ("prefill 512", 2),
        "loading, s": ("load", 3), "peak memory, MB": ("peak memory", 0),
    })  # fmt: skip
    reached = next(row["of_floor"] for row in rows if row["what"] == "decode")
    ours, theirs = (f"{reached[name]:.2f}" for name in ("llama", "transformers"))
    return f"{table}\n\nDecode reaches {ours} of what the memory allows, transformers {theirs}."


def cpu(rows: list[Row]) -> str:
    lines = {"decode, tokens/s": ("decode", 1), "prefill of 512 tokens, s": ("prefill 512", 2)}
    return rivals(plain(rows), lines)


def tokenizer(rows: list[Row]) -> str:
    lines = {
        f"{kind}, {how}, million characters/s": (f"fast class, {way}, {kind}", 1)
        for kind, how, way in (
            ("lines", "in a batch", "batch"),
            ("documents", "in a batch", "batch"),
            ("documents", "one by one", "one by one"),
        )
    }
    return rivals(rows, lines)


def convert(rows: list[Row]) -> str:
    """A table of each rival's best, for rows with several rivals."""
    rows = [row for row in rows if len(row.get("best", ())) > 1]
    names = list(dict.fromkeys(name for row in rows for name in row["best"]))
    table = [f"| | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
    for row in rows:
        cells = (f"{row['best'][name]:.4g}" if name in row["best"] else "" for name in names)
        table.append(f"| {row['what']}, {row['unit']} | {' | '.join(cells)} |")
    return "\n".join(table)


def batches(rows: list[Row]) -> str:
    """The table of `llama bench model`."""
    table = ["| test | batch | provider | tokens/s | theirs / ours | of the floor |", "|---|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        cells = (row["test"], row["batch"], f"{row['provider']}, {row['backend']}",
                 f"{row['tokens_per_s']['median']:.4g}", ratio, f"{row['of_floor']:.2f}")  # fmt: skip
        table.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(table)


def kernels(rows: list[Row]) -> str:
    """The table of `llama bench kernels`, a line per operation: medians over its shapes (minimum – maximum)."""
    ours = ("triton", "torch")
    names = [name for name in dict.fromkeys(row["provider"] for row in rows) if name not in ours]
    head = ["operation", "shapes", "of the limit", *(f"{name} / ours" for name in names)]
    table = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for op in dict.fromkeys(row["op"] for row in rows):
        mine = [row for row in rows if row["op"] == op]
        reached = [row["of_limit"] for row in mine if row["provider"] in ours]
        ratios = [[row["ratio"] for row in mine if row["provider"] == name and row["ratio"]] for name in names]
        table.append(f"| {' | '.join([op, str(len(reached)), *map(_middle, [reached, *ratios])])} |")
    return "\n".join(table)


def _middle(values: list[float]) -> str:
    if not values:
        return ""
    return f"{statistics.median(values):.2f} ({min(values):.2f} – {max(values):.2f})"


# name -> (file, or pattern for a file per device; function that makes the table)
TABLES: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "model": ("model.json", model),
    "cpu": ("cpu.json", cpu),
    "tokenizer": ("tokenizer.json", tokenizer),
    "convert": ("convert.json", convert),
    "batches": ("*/model.jsonl", batches),
    "kernels": ("*/kernels.jsonl", kernels),
}


def filled(text: str, results: Path = harness.RESULTS) -> str:
    """`text` with every table regenerated.

    Raises:
        ValueError: a marker names an unknown table, or a results file is invalid.
    """

    def fill(found: re.Match[str]) -> str:
        start, name, end = found.groups()
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r}; choose from {', '.join(TABLES)}")
        pattern, build = TABLES[name]
        tables = []
        for path in sorted(results.glob(pattern)):
            kept = read(path)
            table = build(kept.rows)
            if "*" in pattern:
                note = f"; {kept.header['note']}" if kept.header.get("note") else ""
                place = f"{kept.header['device']}, {kept.header['date']}, `{kept.header['command']}`{note}"
                table = f"{place}:\n\n{table}"
            tables.append(table)
        return start + "\n\n".join(tables) + f"\n{end}" if tables else found[0]

    return MARKED.sub(fill, text)


if __name__ == "__main__":
    README.write_text(filled(README.read_text()))
