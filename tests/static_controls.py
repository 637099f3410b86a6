"""Print one JSON record for each of several deliberately bad kernels: negative controls for `test_static.py`."""

import json
from unittest.mock import patch

import torch
import triton
import triton.language as tl

from llama import static
from llama.kernels import tiles
from llama.kernels.tiles import Attention


@triton.jit
def _in_float64(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, (tl.load(x_ptr + at).to(tl.float64) * 1.1 + 0.1).to(tl.float32))


@triton.jit
def _by_descriptor(x_ptr, y_ptr, BLOCK: tl.constexpr):
    x = tl.make_tensor_descriptor(x_ptr, [BLOCK, BLOCK], [BLOCK, 1], [BLOCK, BLOCK]).load([0, 0])
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at[:, None] * BLOCK + at[None, :], x)


@triton.jit
def _copy(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at))


def main() -> None:
    x, y = torch.empty(1 << 16, device="meta"), torch.empty(1 << 16, device="meta")
    with torch.device("meta"):
        prefill = {D: static._prefill("causal", D) for D in (128, 256)}
        exact = static._prefill("causal", 128, torch.float32)
    show("as it should be", prefill[128])
    show("one thing at a time", prefill[128]._replace(overlaps=True))
    with patch.dict(
        tiles.PREFILL["sm_90"], {128: Attention(128, 128, 4, 2, False), 256: Attention(128, 128, 8, 2, True)}
    ):
        show("too few warps", prefill[128])
        show("too wide a tile", prefill[256])
    show("a dot without matrix units", exact._replace(mma=static.LARGE_PRODUCTS))
    launches = {
        "a descriptor made on the device": lambda: _by_descriptor[(1,)](x, y, BLOCK=64, enable_fp_fusion=True),
        "float64": lambda: _in_float64[(1,)](x, y, BLOCK=1024, enable_fp_fusion=True),
        "a start that is not aligned": lambda: _copy[(1,)](x[1:], y, BLOCK=1024, enable_fp_fusion=True),
        "no such width": lambda: _copy[(1,)](x, y, BLOCK=1000, enable_fp_fusion=True),
    }
    for name, launch in launches.items():
        show(name, static.Case("control", name, launch))


def show(name: str, case: static.Case) -> None:
    for record in static.build(case, "sm_90"):
        print(json.dumps(record | {"control": name}))


main()
