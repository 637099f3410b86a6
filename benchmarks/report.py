"""All results as one self-contained HTML page, with tables and pictures: `llama bench report`.

    llama bench report                                   # the committed results, into report.html
    llama bench report --results build/bench --pictures  # other results; pictures next to each, light and dark

Every section says what was run, when and on what, and how it was measured, in the words of the benchmark's own
docstring. The page follows the reader's light or dark mode.
"""

import ast
import json
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from . import harness

Row = dict[str, Any]
# The file whose docstring says how results of this kind were measured.
METHODS = {"kernels": "kernels.py", "model": "generation.py", "static": "../llama/static.py"}
TITLES = {"kernels": "Kernels", "model": "A whole model", "static": "Machine code for GPUs that need not be there"}
# Titles of the other results, by file name.
NAMES = {
    "model": "The PyTorch model, by its parts",
    "cpu": "The NumPy reference",
    "products": "The products of decoding",
    "tokenizer": "The tokenizers",
    "convert": "Converting checkpoints",
}
LABELS = {
    "median_us": "median, µs",
    "p10_us": "p10, µs",
    "p90_us": "p90, µs",
    "best_us": "best, µs",
    "gbps": "GB/s",
    "tflops": "TFLOP/s",
    "read_bandwidth_gbps": "reading, GB/s",
    "product_tflops": "product, TFLOP/s",
    "peak_memory_mb": "peak memory, MB",
    "time_to_first_token_ms": "first token, ms",
    "shared_bytes": "shared memory, bytes",
    "error": "error, relative",
    "ratio": "theirs / ours",
}
HIDDEN = ("hash", "function", "seconds", "mma_wanted", "wide_wanted")  # of static's, for its own tests


class Results(NamedTuple):
    """A results file. `kind`: "kernels", "model", "static", or "rivals" for those with all providers in each row."""

    path: Path
    kind: str
    header: Row
    rows: list[Row]

    @property
    def title(self) -> str:
        name = self.path.stem
        return TITLES.get(self.kind) or NAMES.get(name, name)

    @property
    def method(self) -> list[str]:
        """The paragraphs of the benchmark's docstring."""
        words = str(self.header.get("command", "")).split()
        module = words[2].removeprefix("benchmarks.") + ".py" if words[:2] == ["python", "-m"] else ""
        file = Path(__file__).parent / METHODS.get(self.kind, module)
        if not file.is_file():
            return []
        return (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")


def read(path: Path) -> Results:
    """Read a results file of any of the benchmarks.

    Raises:
        ValueError: it is not one, or it is damaged. OSError: it cannot be read.
    """
    foreign = ValueError(f"{path} is not a results file of llama bench or python -m benchmarks; move it elsewhere")
    try:
        text = path.read_text()
        if path.suffix == ".json":
            header = json.loads(text)
            rows = header.pop("rows")
        elif "registers" in json.loads(text.partition("\n")[0]):  # static's files have no header
            header, rows = {}, [json.loads(line) for line in text.splitlines()]
        else:
            header, rows = harness.read_lines(path)
        if not all(isinstance(row, dict) for row in (header, *rows)):
            raise foreign
        for kind, key in (("kernels", "op"), ("model", "test"), ("static", "registers"), ("rivals", "what")):
            if all(key in row for row in rows):
                return Results(path, kind, header, rows)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise foreign from error
    raise foreign


def find(folders: Sequence[Path]) -> list[Results]:
    """All results below the folders: kernels first, then models, then the rest.

    Raises:
        ValueError: there are none, or a file is not one of ours. OSError: a folder does not exist.
    """
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is not a folder; --results takes folders of results files")
    files = [path for folder in folders for path in sorted(folder.rglob("*.json*")) if path.is_file()]
    files = list({path.resolve(): path for path in files}.values())
    found = [results for path in files if (results := read(path)).rows]
    if not found:
        where = ", ".join(map(str, folders))
        raise ValueError(f"{where} has no results; create some with llama bench model --out DIR")
    return sorted(found, key=lambda results: ("kernels", "model", "rivals", "static").index(results.kind))


class Table(NamedTuple):
    """Cells as text. `common` has the fields that are the same in all rows, which get no column."""

    columns: list[str]
    rows: list[list[str]]
    common: dict[str, str]


def table(rows: Sequence[Row]) -> Table:
    """A table of any rows, with a column for each field that differs."""
    flat = [{name: value for name, value in _flat(row) if name not in HIDDEN} for row in rows]
    names = list(dict.fromkeys(name for row in flat for name in row))
    cells = {name: [_cell(name, row.get(name)) for row in flat] for name in names}
    common = {name: texts[0] for name, texts in cells.items() if len(rows) > 1 and len(set(texts)) == 1}
    columns = [name for name in names if name not in common]
    body = [[cells[name][place] for name in columns] for place in range(len(rows))]
    low, high = harness.between(min(row.get("runs", harness.ENOUGH) for row in rows))
    labels = LABELS | {"tokens_per_s": f"tokens/s ({low} – {high})"}

    def label(name: str) -> str:
        return labels.get(name, name.replace("_", " "))

    said = {label(name): text for name, text in common.items() if text}
    return Table([label(name) for name in columns], body, said)


def _flat(row: Row) -> Iterable[tuple[str, Any]]:
    for name, value in row.items():
        if name == "best" and isinstance(value, Mapping):  # rivals: both numbers of each in one cell
            yield from ((f"{key}, best (median)", (best, row["median"][key])) for key, best in value.items())
        elif name == "median" and isinstance(value, Mapping):
            continue
        elif isinstance(value, Mapping) and name not in ("shape", "config") and "p10" not in value:
            yield from ((f"{name}, {key}", inner) for key, inner in value.items())
        else:
            yield name, value


def _cell(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        if "p10" in value:
            return f"{_number(value['median'])} ({_number(value['p10'])} – {_number(value['p90'])})"
        return " ".join(f"{key}={inner}" for key, inner in value.items())
    if isinstance(value, tuple):
        return f"{_number(value[0])} ({_number(value[1])})"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if name.startswith("of_"):
        return f"{value:.0%}"
    return _number(value) if isinstance(value, float) else str(value)


def _number(value: float) -> str:
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def write(folders: Sequence[Path], out: Path, beside: bool = False) -> Path:
    """Make the page. `beside`: also write every picture next to its results, as <results>.<picture>.<style>.svg.

    Raises:
        ValueError: a file is not a results file, or matplotlib is missing. OSError: a file cannot be read or written.
    """
    from .pictures import STYLES, pictures

    if out.is_dir():
        raise ValueError(f"{out} is a folder; --out must name a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    sections = []
    for results in find(folders or [harness.RESULTS]):
        drawn = []
        for picture in pictures(results.kind, results.header, results.rows):
            images = {style: picture.svg(style) for style in STYLES}
            if beside:
                for style, image in images.items():
                    results.path.with_suffix(f".{picture.name}.{style}.svg").write_text(image)
            data = {style: b64encode(image.encode()).decode() for style, image in images.items()}
            drawn.append({"words": picture.words, **data})
        facts = {key.replace("_", " "): _fact(value) for key, value in results.header.items() if value}
        groups: dict[str, list[Row]] = {}
        for row in results.rows:
            groups.setdefault(str(row.get("op") or row.get("target") or ""), []).append(row)
        tables = {name: table(rows) for name, rows in groups.items()}
        sections.append({"results": results, "facts": facts, "pictures": drawn, "tables": tables})
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(PAGE)
    out.write_text(page.render(sections=sections))
    return out


def _fact(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_fact(inner)}" for name, inner in value.items())
    return str(value)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>llama-triton: benchmarks</title>
<style>
:root { --paper: #ffffff; --ink: #1f2328; --pale: #5b6470; --line: #d8dde3; --stripe: #f5f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --ink: #e6e9ee; --pale: #a4adb8; --line: #363c45; --stripe: #1b1f26; }
}
body { background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 72rem; padding: 1rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; }
h2 { font-size: 1.3rem; margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; }
a { color: inherit; } code, pre { font: 0.85rem/1.45 ui-monospace, monospace; }
pre { white-space: pre-wrap; color: var(--pale); margin: 0.6rem 0; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; height: auto; } figcaption { color: var(--pale); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: 0.85rem; margin: 0.6rem 0; }
th { text-align: left; border-bottom: 1px solid var(--ink); vertical-align: bottom; }
th, td { padding: 0.2rem 0.9rem 0.2rem 0; font-variant-numeric: tabular-nums; }
td { white-space: nowrap; } tbody tr:nth-child(even) { background: var(--stripe); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; color: var(--pale); font-size: 0.85rem; }
dd { margin: 0; overflow-wrap: anywhere; } summary { cursor: pointer; margin: 0.4rem 0; }
</style>
</head>
<body>
<h1>Benchmarks of llama-triton</h1>
<nav><ul>
{% for section in sections %}
<li><a href="#r{{ loop.index }}">{{ section.results.title }}</a>:
{{ section.facts.device or section.results.path.name }}</li>
{% endfor %}
</ul></nav>
{% for section in sections %}
<section id="r{{ loop.index }}">
<h2>{{ section.results.title }}</h2>
<dl>
{% for name, fact in section.facts.items() %}
<dt>{{ name }}</dt><dd>{{ fact }}</dd>
{% endfor %}
<dt>file</dt><dd>{{ section.results.path }}</dd>
</dl>
{% if section.results.method %}
<details><summary>How it was measured</summary>
{% for paragraph in section.results.method %}
<pre>{{ paragraph }}</pre>
{% endfor %}
</details>
{% endif %}
{% for picture in section.pictures %}
<figure>
<picture><source media="(prefers-color-scheme: dark)" srcset="data:image/svg+xml;base64,{{ picture.dark }}">
<img src="data:image/svg+xml;base64,{{ picture.light }}" alt="{{ picture.words }}"></picture>
<figcaption>{{ picture.words }}</figcaption>
</figure>
{% endfor %}
{% for name, table in section.tables.items() %}
<details {{ "open" if loop.first }}>
<summary>{{ name or "Table" }}, {{ table.rows | length }} rows{{ "; in all of them " if table.common }}
{%- for key, value in table.common.items() %}{{ key }} {{ value }}{{ ", " if not loop.last }}{% endfor %}</summary>
<div class="wide"><table>
<thead><tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div></details>
{% endfor %}
</section>
{% endfor %}
</body>
</html>
"""
