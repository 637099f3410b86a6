"""The page of all results: its content, that it is self-contained, and how a browser renders it."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llama import cli
from llama.benchmarks import harness, pictures, report
from llama.benchmarks.tables import filled

ROOT = Path(__file__).parent.parent
BROWSER = ROOT / ".venv" / "browser"
HEADER = {
    "command": "llama bench kernels --quick",
    "date": "2026-11-22",
    "device": "a GPU <of> ours",
    "driver": "1.2",
    "clocks": "1 GHz",
    "versions": {"torch": "2"},
    "limits": {"copy_gbps": 100.0, "product_tflops": {"float32": 1.5}},
}
KERNELS = [
    {"op": op, "model": "7b", "shape": {"B": 1, "T": tokens}, "dtype": "float32", "provider": provider,
     "median_us": 10.0 * tokens, "p10_us": 9.0, "p90_us": 11.0, "best_us": 9.0, "bytes": 1000 * tokens,
     "flops": 400 * tokens, "gbps": 90.0, "of_limit": 0.9, "error": 1e-7, "ratio": 1.0, "cache": "cold", "graph": False}
    for op in ("rms_norm", "swiglu") for tokens in (1, 64) for provider in ("triton", "eager")
]  # fmt: skip
MODEL = [
    {"model": "tiny & <small>", "test": test, "batch": batch, "provider": provider, "backend": "torch",
     "dtype": "float32", "threads": 1, "runs": 2, "tokens_per_s": {"median": 123.4, "p10": 120.0, "p90": 125.0},
     "ratio": 1.0, "of_floor": 0.47, "bound": "memory", "peak_memory_mb": None, "time_to_first_token_ms": None,
     "read_bandwidth_gbps": 40.0, "product_tflops": 0.1, "error": None}
    for test in ("pp512", "tg128") for batch in (1, 8) for provider in ("llama", "transformers")
]  # fmt: skip
STATIC = [
    {"kernel": "swiglu", "target": "sm_90", "config": {"shape": "1536 bfloat16"}, "registers": 30, "spills": 0,
     "shared_bytes": 512, "mma": None, "occupancy": 0.75, "hash": "secret", "problems": [], "error": None,
     "roofline": {"chip": "H100 SXM", "intensity": 1.0, "ridge": 295.0, "bound": "memory", "floor_us": 1.0}},
    {"kernel": "rope", "target": "sm_90", "config": {"shape": "x"}, "registers": None, "spills": None,
     "shared_bytes": None, "mma": None, "hash": "rope x", "problems": ["does not compile"], "error": "it broke"},
]  # fmt: skip
RIVALS = {
    "command": "python -m benchmarks.cpu --runs 7", "date": "2026-11-22", "device": "a CPU", "versions": {"numpy": "2"},
    "rows": [
        {"what": "decode", "unit": "tokens/s", "threads": 1, "runs": 7,
         "best": {"reference": 54.3, "transformers": 32.5},
         "median": {"reference": 50.0, "transformers": 25.0}, "ratio_of_bests": 1.67, "ratio_of_medians": 2.0},
        {"what": "import llama", "unit": "s", "runs": 7, "best": 0.002, "median": 0.002},
    ],
}  # fmt: skip


def lines(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    with harness.lines_to(path, "any", header) as keep:
        for row in rows:
            keep(row)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A folder with every kind of results."""
    folder = tmp_path_factory.mktemp("results")
    lines(folder / "gpu" / "kernels.jsonl", HEADER, KERNELS)
    lines(folder / "gpu" / "model.jsonl", HEADER | {"command": "llama bench model"}, MODEL)
    (folder / "static.jsonl").write_text("".join(json.dumps(row) + "\n" for row in STATIC))
    (folder / "cpu.json").write_text(json.dumps(RIVALS))
    return folder


class Page(HTMLParser):
    """A parsed page: what it loads, its open tags, tables and text."""

    VOID = ("meta", "img", "source", "br", "link", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.loads, self.targets, self.ids, self.tables, self.words = [], [], [], [], [], []
        self.alts = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self.loads += [attrs[name] for name in ("src", "srcset", "data", "poster", "action") if name in attrs]
        self.targets += [attrs["href"]] if "href" in attrs else []
        self.ids += [attrs["id"]] if "id" in attrs else []
        assert tag not in ("script", "link", "iframe", "object", "embed")
        if tag == "img":
            self.alts.append(attrs["alt"])
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def page(results, tmp_path_factory):
    return Page(report.write([results], tmp_path_factory.mktemp("page") / "report.html").read_text())


def test_the_page_needs_nothing_from_elsewhere(page):
    assert page.loads
    assert all(load.startswith("data:image/svg+xml;base64,") for load in page.loads)
    assert set(page.targets) == {f"#{name}" for name in page.ids}
    assert "url(" not in "".join(page.words)
    assert "@import" not in "".join(page.words)


def test_every_kind_of_result_has_its_table_and_its_picture(page):
    heads = [table[0] for table in page.tables]
    assert all(len(row) == len(table[0]) for table in page.tables for row in table)
    kernels, swiglu, model, rivals, static = page.tables
    assert [len(table) for table in page.tables] == [5, 5, 9, 3, 3]
    assert {"shape", "provider", "median, µs"} <= set(heads[0])
    assert kernels[1][heads[0].index("shape")] == "B=1 T=1"
    assert len(swiglu) == 5
    assert "test" in heads[2]
    assert "reference, best (median)" in heads[3]
    assert rivals[1][heads[3].index("reference, best (median)")] == "54.3 (50)"
    assert "does not compile" in static[2]
    assert "secret" not in "".join(page.words)
    assert len(page.alts) == 5
    assert model[1][0] == "pp512"


def test_what_is_the_same_in_all_rows_is_said_once(page):
    text = " ".join("".join(page.words).split())
    assert "8 rows; in all of them model tiny & <small>" in text  # and is escaped
    assert "of floor 47%" in text
    assert "tokens/s (min – max) 123 (120 – 125)" in text


def test_device_method_and_command_stand_beside_every_table(page):
    text = "".join(page.words)
    assert "a GPU <of> ours" in text
    assert "copy_gbps 100.0" in text
    for command in ("llama bench kernels --quick", "llama bench model", "python -m benchmarks.cpu --runs 7"):
        assert command in text
    for method in (
        "CUDA graph",
        "llama-bench's names",
        "the NumPy reference against transformers",
        "no double precision",
    ):
        assert method in text  # the benchmarks' own descriptions


def test_a_table_leaves_out_what_says_nothing():
    made = report.table([{"a": 1, "b": 2.0, "c": None, "hash": "x"}, {"a": 1, "b": 123456.7, "c": None, "d": "e"}])
    assert made == (["b", "d"], [["2", ""], ["123457", "e"]], {"a": "1"})
    assert report.table([{"a": 1}]) == (["a"], [["1"]], {})


def test_the_committed_results_make_a_page(tmp_path):
    found = Page(report.write([], tmp_path / "report.html").read_text())
    files = list(harness.RESULTS.rglob("*.json*"))
    assert len(found.ids) == len(files)
    assert all(str(path.name) in "".join(found.words) for path in files)


def test_pictures_lie_beside_the_results_light_and_dark(tmp_path):
    lines(tmp_path / "a" / "kernels.jsonl", HEADER, KERNELS)
    report.write([tmp_path], tmp_path / "report.html", beside=True)
    names = sorted(path.name for path in (tmp_path / "a").glob("*.svg"))
    assert names == [f"kernels.{name}.{style}.svg" for name in ("by-size", "roofline") for style in ("dark", "light")]
    drawn = {path.name: path.read_text() for path in (tmp_path / "a").glob("*.svg")}
    for name, text in drawn.items():
        assert ET.fromstring(text).tag.endswith("svg")
        assert pictures.STYLES[name.split(".")[2]]["paper"] in text
    report.write([tmp_path], tmp_path / "report.html", beside=True)
    assert drawn == {path.name: path.read_text() for path in (tmp_path / "a").glob("*.svg")}


def luminance(colour):
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("style", ["light", "dark"])
def test_colours_stand_out_from_the_paper(style):
    colours = pictures.STYLES[style]

    def contrast(colour):  # WCAG 2.2: 4.5 for text, 3 for graphics; below that, markers help
        low, high = sorted((luminance(colour), luminance(colours["paper"])))
        return (high + 0.05) / (low + 0.05)

    assert contrast(colours["ink"]) > 7
    assert all(contrast(colour) > 2 for colour in colours["series"])
    assert len(set(colours["series"])) == len(colours["series"])


def test_a_page_says_where_it_lies(results, tmp_path, monkeypatch, capsys):
    out = tmp_path / "page.html"
    monkeypatch.setattr(sys, "argv", ["llama", "bench", "report", "--results", str(results), "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert capsys.readouterr().out.strip() == str(out)
    assert out.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", "{}"),
        ("a.json", '{"rows": 3}'),
        ("a.json", '{"rows": [1]}'),
        ("a.json", '{"rows": [{"other": 1}]}'),
        ("a.json", '["rows"]'),
        ("a.json", "\x00not JSON"),
        ("a.jsonl", ""),
        ("a.jsonl", "[1]\n"),
        ("a.jsonl", '{"device": "d"}\n{"op": 1}\n'),
        ("a.jsonl", json.dumps(HEADER) + '\n{"op": "rms_norm"'),
        ("a.jsonl", json.dumps(HEADER) + '\n{"op": "x"}\n{"test": "y"}\n'),
        ("a.jsonl", json.dumps(STATIC[0]) + "\n[]\n"),
    ],
)
def test_a_foreign_file_is_named_in_a_sentence(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is not a results file of llama bench or python -m benchmarks; move"):
        report.write([tmp_path], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_pictures_hold_what_was_left_out_and_what_is_far_below():
    theirs = [row for row in KERNELS if row["provider"] == "eager"]  # as when ours ran out of memory
    named = HEADER | {"ours": "triton"}
    assert [picture.name for picture in pictures.pictures("kernels", named, theirs)] == ["by-size"]
    drawn, *_ = pictures.pictures("kernels", named, [*theirs[:1], *KERNELS])
    assert "Roofline of triton" in drawn.words
    low = [row | {"of_floor": 1.2e-5, "ratio": None} for row in MODEL if row["provider"] != "llama"]
    for rows in (low, [row | {"provider": "llama"} for row in low]):
        (picture,) = pictures.pictures("model", HEADER, rows)
        assert "from min to max" in picture.words
        assert picture.svg("light")


def test_few_turns_have_ends_and_many_have_percentiles():
    rows = [{"runs": runs, "tokens_per_s": {"median": 2.0, "p10": 1.0, "p90": 3.0}, "x": x}
            for runs in (6, 7) for x in (1, 2)]  # fmt: skip
    assert "tokens/s (min – max)" in report.table(rows[:2]).common
    assert "tokens/s (p10 – p90)" in report.table(rows[2:]).common


def test_the_readme_has_a_table_of_every_device_that_was_measured(tmp_path):
    text = "".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("batches", "kernels"))
    assert filled(text, tmp_path) == text
    for device in ("a", "b"):
        lines(tmp_path / device / "kernels.jsonl", HEADER | {"device": device}, KERNELS)
    without = [*MODEL[:1], MODEL[1] | {"ratio": None}]
    lines(tmp_path / "a" / "model.jsonl", HEADER, without)
    made = filled(text, tmp_path)
    assert "a, 2026-11-22, `llama bench kernels --quick`:\n\n| operation | shapes | of the limit |" in made
    assert made.count("| swiglu | ") == 2
    assert "| pp512 | 1 | transformers, torch | 123.4 |  | 0.47 |" in made


def test_kernels_stand_in_the_readme_by_their_medians(tmp_path):
    rows = [row | {"of_limit": limit, "ratio": 1.0 if row["provider"] == "triton" else 2 * limit}
            for row, limit in zip(KERNELS, (0.5, 0.5, 0.9, 0.9) * 2, strict=True)]  # fmt: skip
    lines(tmp_path / "a" / "kernels.jsonl", HEADER | {"ours": "triton"}, rows)
    made = filled("<!-- table: kernels -->\n<!-- end -->", tmp_path)
    assert "| rms_norm | 2 | 0.70 (0.50 – 0.90) | 1.40 (1.00 – 1.80) |" in made


@pytest.mark.skipif(sys.platform != "linux", reason="make bench compiles on Linux alone")
@pytest.mark.parametrize("printed", ["", "a row"])
def test_make_bench_keeps_no_empty_file(tmp_path, printed):
    """With stubs for the commands: one that fails before printing a row must not leave an empty file behind."""
    tools, kept = tmp_path / "bin", tmp_path / "out"
    tools.mkdir()
    for name in ("python", "pytest", "llama"):
        (tools / name).write_text(f'#!/bin/sh\n[ "$2" != static ] || {{ printf "{printed}"; exit 1; }}\n')
        (tools / name).chmod(0o755)
    command = ["make", "bench", f"BIN={tools}", f"RESULTS={kept}", "READY="]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in kept.iterdir()] == ["static.jsonl"] * bool(printed)


def test_the_page_gets_its_folder(results, tmp_path):
    assert report.write([results], tmp_path / "new" / "page.html").is_file()
    with pytest.raises(ValueError, match="new is a folder; --out must name a file"):
        report.write([results], tmp_path / "new")


def test_no_results_and_no_folder_are_said(tmp_path):
    with pytest.raises(ValueError, match="has no results; create some with llama bench model --out DIR"):
        report.write([tmp_path], tmp_path / "report.html")
    with pytest.raises(FileNotFoundError, match="nowhere is not a folder; --results takes folders"):
        report.write([tmp_path / "nowhere"], tmp_path / "report.html")


def test_without_matplotlib_it_says_what_is_missing():
    code = "import sys; sys.modules['matplotlib'] = None; sys.argv[1:] = ['bench', 'report']; " \
           "from llama import cli; cli.main()"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "llama: pictures need matplotlib: pip install matplotlib\n"


LOOK = """JSON.stringify({
    paper: getComputedStyle(document.body).backgroundColor,
    ink: getComputedStyle(document.body).color,
    shown: [...document.images].map(image => image.complete && image.naturalWidth > 0 && image.alt !== ""),
    dark: [...document.images].map(image => image.currentSrc === image.parentNode.firstElementChild.srcset),
    rows: [...document.querySelectorAll("tbody tr")].length,
    overflow: document.documentElement.scrollWidth - window.innerWidth,
    links: [...document.links].map(link => document.querySelector(link.getAttribute("href")) !== null),
})"""


@pytest.mark.parametrize("style", ["light", "dark"])
def test_a_browser_shows_all_of_it_and_asks_for_nothing(results, tmp_path, style):
    if not (BROWSER / "PyQt6").is_dir():
        pytest.fail("no browser is installed; run `make .venv/browser`")
    out, shot = report.write([results], tmp_path / "report.html"), tmp_path / "page.png"
    script = [sys.executable, ROOT / "tests" / "browser.py", out, style, shot, LOOK]
    done = subprocess.run(script, capture_output=True, text=True, timeout=100,
                          env=os.environ | {"PYTHONPATH": str(BROWSER)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    seen = json.loads(found["result"])
    assert found["loaded"]
    assert found["asked"] == [out.as_uri()[:100]]
    assert found["console"] == []
    assert seen["shown"] == [True] * 5
    assert seen["dark"] == [style == "dark"] * 5
    assert seen["links"] == [True] * 4
    assert seen["rows"] == 4 + 4 + 8 + 2 + 2
    assert seen["overflow"] <= 0
    paper = tuple(map(int, re.findall(r"\d+", seen["paper"])))
    assert "#{:02x}{:02x}{:02x}".format(*paper) == pictures.STYLES[style]["paper"]
    from PIL import Image

    counts = Image.open(shot).convert("RGB").getcolors(2**24)
    count, colour = max(counts)
    assert colour == paper
    assert count < sum(n for n, _ in counts) * 0.995  # something is drawn on it
    assert len(counts) > 50
