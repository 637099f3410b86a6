"""The README's code, commands, links and tables are correct and up to date."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llama.benchmarks.tables import filled

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (0, ["The capital of France is Paris"]),
        (1, ["system\n", "Où est la gare? 🚉"]),
        (2, ["LlamaForCausalLM, backend='auto'", "LlamaRMSNorm", "61  rms_norm", "30  swiglu"]),
        (3, ["[' Paris'", "The capital of France is Paris"]),
    ],
)
def test_its_code_runs(tmp_path, place, words):
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[place]
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(words[0])
    assert all(word in done.stdout for word in words), done.stdout
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


def test_its_commands_exist():
    for command in re.findall(r"^    llama (\w+)", README, re.MULTILINE):
        assert subprocess.run([sys.executable, "-m", "llama", command, "--help"], capture_output=True).returncode == 0
    targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(re.findall(r"(?:`|^    )make (\w+)", README, re.MULTILINE)) <= set(targets)


def test_its_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_its_tables_are_those_of_the_committed_results():
    assert {"model", "cpu", "tokenizer"} <= set(re.findall(r"<!-- table: ([\w-]+) -->\n\|", README))
    assert README.count("<!-- table: ") == README.count("<!-- end -->")
    assert filled(README) == README, "the tables are out of date; run python -m benchmarks.tables"


def test_a_table_comes_from_the_results_that_are_there(tmp_path):
    rows = [
        {"what": "decode", "unit": "tokens/s", "threads": threads, "best": {"reference": 10.0 * threads, "other": 4.0}}
        for threads in (1, 2)
    ]
    rows.append({"what": "prefill 512", "unit": "s", "threads": 1, "best": {"reference": 1.0, "other": 2.5}})
    (tmp_path / "cpu.json").write_text(json.dumps({"command": "python -m benchmarks.cpu", "device": "d", "rows": rows}))
    text = "before\n<!-- table: cpu -->\nold\n<!-- end -->\n<!-- table: model -->\nkept\n<!-- end -->\n"
    assert filled(text, tmp_path) == (
        "before\n<!-- table: cpu -->\n| | reference | other |\n|---|---|---|\n| decode, tokens/s | 10.0 | 4.0 |\n"
        "| prefill of 512 tokens, s | 1.00 | 2.50 |\n<!-- end -->\n<!-- table: model -->\nkept\n<!-- end -->\n"
    )
    with pytest.raises(ValueError, match="unknown table 'nope'; choose from model, cpu, tokenizer"):
        filled("<!-- table: nope -->\n<!-- end -->", tmp_path)
