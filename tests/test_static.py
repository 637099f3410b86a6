"""Compile every kernel in every shipped configuration, without a GPU, with the oldest and newest supported Triton.

Each run is a separate process: the compiler cannot share one with the interpreter, in which the other tests run the
kernels, nor can two versions of Triton. For each check, `static_controls.py` has a kernel that fails it on purpose.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton has no wheels for this platform")

ROOT = Path(__file__).parent.parent
VERSIONS = ("3.6.0", "3.9.0")
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
KEYS = {"kernel", "target", "config", "registers", "spills", "shared_bytes", "mma"}  # fields that callers rely on


def start(version, *command):
    """Start Python with that version of Triton, without the interpreter."""
    folder = ROOT / ".venv" / f"triton-{version}"
    if not (folder / "triton").is_dir():
        pytest.fail(
            f"Triton {version} is missing; run `make test` or "
            f"`pip install --no-deps --target {folder.relative_to(ROOT)} triton=={version}`"
        )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True, cwd=ROOT)


def records_of(process):
    output, _ = process.communicate(timeout=1200)
    return [json.loads(line) for line in output.splitlines()]


@pytest.fixture(scope="module")
def shipped():
    """The records of `llama bench static` by version of Triton; the versions compile in parallel."""
    command = ("-m", "llama", "bench", "static", "--json", "--target", ",".join(TARGETS))
    processes = {version: start(version, *command) for version in VERSIONS}
    return {version: records_of(process) for version, process in processes.items()}


@pytest.fixture(scope="module")
def controls():
    processes = {version: start(version, "tests/static_controls.py") for version in VERSIONS}
    return {version: {record["control"]: record for record in records_of(process)}
            for version, process in processes.items()}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_every_configuration_compiles_to_what_the_design_wants(shipped, version):
    """No spills, double precision, device scratch memory or serialized products; matrix units and 128-bit loads."""
    assert {record["triton"] for record in shipped[version]} == {version}
    wrong = {f"{record['target']} {record['kernel']} {record['config']}": record["problems"]
             for record in shipped[version] if record["problems"]}  # fmt: skip
    assert not wrong


@pytest.mark.parametrize("version", VERSIONS)
def test_every_target_has_every_kernel(shipped, version):
    kernels = {record["kernel"] for record in shipped[version]}
    assert len(kernels) >= 7
    for target in TARGETS:
        assert {record["kernel"] for record in shipped[version] if record["target"] == target} == kernels
    assert all(record.keys() >= KEYS for record in shipped[version])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("target", "mma"), [("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "MFMA")]
)
def test_prefill_multiplies_on_the_newest_matrix_units(shipped, version, target, mma):
    prefills = [record for record in shipped[version] if record["kernel"] == "flash_attention"
                and record["target"] == target and record["config"]["BLOCK_Q"] > 16
                and record["config"].get("PRECISION") == "ieee"
                and "bfloat16" in record["config"]["shape"]]  # fmt: skip
    assert len(prefills) >= 6
    assert {record["mma"] for record in prefills} == {mma}


CONTROLS = {
    "too few warps": "spills registers",
    "too wide a tile": "bytes of shared memory",
    "a descriptor made on the device": "scratch memory",
    "float64": "double precision",
    "a start that is not aligned": "no 128-bit load",
    "a dot without matrix units": "should use",
    "no such width": "does not compile",
    "one thing at a time": "does not overlap softmax with a product",
}


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("control", CONTROLS)
def test_a_kernel_made_wrong_on_purpose_is_found_out(controls, version, control):
    assert any(CONTROLS[control] in problem for problem in controls[version][control]["problems"])


@pytest.mark.parametrize("version", VERSIONS)
def test_the_hopper_kernel_is_there_in_every_variant(shipped, version):
    """Softmax overlaps a product, the producer gives up registers, and warps synchronise before they arrive."""
    records = [record for record in shipped[version] if record.get("function") == "_flash_attention_hopper_kernel"]
    assert len(records) == 6
    assert {record["target"] for record in records} == {"sm_90"}
    assert all(record["overlapped"] and record["register_moves"] for record in records)
    assert all(record["problems"] == [] for record in records)


def test_an_arrival_before_the_warps_have_met_is_found_out():
    from llama.machine_code import _asynchrony

    met = "bar.sync 0, 128;\n@%p1 mbarrier.arrive.shared::cta.b64 _, [%r1];\n"
    assert _asynchrony(met)["unguarded_arrivals"] == 0
    assert _asynchrony(met + "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r2];")["unguarded_arrivals"] == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_products_that_wait_for_one_another_are_found_out(controls, version):
    assert any("serialized" in problem for problem in controls[version]["too few warps"]["problems"])


@pytest.mark.parametrize("version", VERSIONS)
def test_the_kernel_made_right_has_no_problem(controls, version):
    assert controls[version]["as it should be"]["problems"] == []


def llama(*arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", "llama", *arguments], env=kept | environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip


def test_the_command_prints_a_line_for_each_configuration():
    done = llama("bench", "static", "--target", "sm_90", "--kernel", "swiglu")
    assert done.returncode == 0, done.stderr
    assert "swiglu" in done.stdout
    assert "registers" in done.stdout
    assert "configurations, 0 with a problem" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [(["--target", "sm_70"], 2, "sm_90"), (["--kernel", "attention"], 2, "flash_attention")],
)
def test_the_command_says_what_there_is(arguments, code, words):
    done = llama("bench", "static", *arguments)
    assert done.returncode == code
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_the_command_wants_no_interpreter():
    done = llama("bench", "static", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert "unset" in done.stderr
    assert "Traceback" not in done.stderr
