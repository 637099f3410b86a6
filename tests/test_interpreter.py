"""Triton's interpreter with our fixes, on which the other kernel tests rely."""

import json
import os
import subprocess
import sys
from pathlib import Path

import interpreter_probe as probe
import numpy as np
import pytest
import torch

from llama.kernels import launch

if not launch.INTERPRETED:
    pytest.skip("kernels run natively here, without the interpreter", allow_module_level=True)


def test_it_rounds_every_number_to_bfloat16_as_pytorch_does():
    assert probe.wrongly_rounded() == 0


def test_it_reads_every_bfloat16():
    assert probe.wrongly_widened() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_it_multiplies_matrices(dtype):
    assert probe.wrong_products(dtype) == 0


def test_it_is_silent_where_a_gpu_is():
    """pytest turns every warning into an error here."""
    np.testing.assert_array_equal(probe.silent_numbers(), [np.inf, -np.inf, np.inf, np.nan])


@pytest.mark.parametrize("n", [0, 1, 5])
def test_it_counts_with_numbers_from_memory(n):
    assert probe.counted(n) == n * (n - 1) // 2


def test_numpy_warns_as_ever_outside_of_kernels():
    probe.silent_numbers()
    with pytest.warns(RuntimeWarning, match="divide by zero"):
        np.float32(1) / np.zeros(1, np.float32)


def test_an_error_in_a_kernel_leaves_the_interpreter_usable():
    with pytest.raises(Exception, match="arange"):
        probe._convert_kernel[(1,)](torch.zeros(1), torch.zeros(1), N=3)  # not a power of two
    assert probe.wrong_products() == 0
    assert probe.counted(4) == 6


def test_mending_twice_is_mending_once():
    from triton.runtime import interpreter

    before = interpreter._convert_float, interpreter.GridExecutor.__call__
    from llama.kernels.interpreter import make_right

    assert make_right()
    assert (interpreter._convert_float, interpreter.GridExecutor.__call__) == before


def test_as_triton_ships_it_it_does_none_of_this():
    """When this fails, Triton has been fixed and `kernels/interpreter.py` can go."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpreter_probe.py")],
        env=env, capture_output=True, text=True, check=True,
    )  # fmt: skip
    wrong = json.loads(done.stdout)
    assert wrong["rounded"] > 2**16  # half of all inexact values are off
    assert wrong["products"] > 900
    assert wrong["warnings"] >= 3
