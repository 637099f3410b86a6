"""What stands between PyTorch and a kernel: which device, which operator, which rows.

A kernel file registers its launch function as an operator of `torch.ops.llama_triton`, so that torch.compile sees
through it, and exposes one public function that checks arguments and speaks to people. There are no backward kernels
yet: whoever asks for gradients gets an error here, and the plain PyTorch path from `llama.ops`.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import triton
from torch import library
from torch.autograd import forward_ad
from triton.backends.compiler import GPUTarget

from . import interpreter

INTERPRETED: bool = interpreter.make_right()  # TRITON_INTERPRET=1: kernels run in NumPy, on a CPU, for tests
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_library = library.Library("llama_triton", "FRAGMENT")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make the function below it the operator `schema`, on CPU (interpreted) and GPU; `fake` gives shapes alone.

    Calling what comes back goes through PyTorch's dispatcher; its `.launch` is the function itself.
    """
    name = schema.partition("(")[0]

    def register(launch: Callable[..., Any]) -> Any:
        _library.define(schema)

        def on_its_device(x: torch.Tensor, *rest: Any) -> Any:
            with torch.cuda.device_of(x):  # Triton launches on the current device, whatever the tensors lie on
                return launch(x, *rest)

        for key in ("CPU", "CUDA"):  # ROCm answers to CUDA
            _library.impl(name, on_its_device, key)
        library.register_fake(f"llama_triton::{name}", fake, lib=_library)
        packet = getattr(torch.ops.llama_triton, name)
        written = [i for i, arg in enumerate(packet.default._schema.arguments) if arg.is_write]

        def count(keys: Any, *args: Any) -> Any:  # as PyTorch's own operations do: autograd sees what was written over
            torch.autograd.graph.increment_version([args[i] for i in written])
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return packet.default.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

        if written:
            _library.impl(name, count, "ADInplaceOrView", with_keyset=True)
        packet.launch = launch
        return packet

    return register


def check(name: str, *tensors: torch.Tensor | None) -> None:
    """Whether a kernel can take these tensors: one device that Triton reaches, a dtype it knows, and no gradients.

    Raises:
        ValueError: and says which of these it is.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    for tensor in given:
        if tensor.device != device:
            raise ValueError(f"{name}: all tensors must be on one device, got {device} and {tensor.device}")
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: dtypes are float32, float16 and bfloat16, got {tensor.dtype}")
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"{name}: Triton's kernels run on a GPU, the tensors are on {device}. On a CPU only Triton's interpreter "
            "runs them, for tests: set TRITON_INTERPRET=1 before Python starts"
        )
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    if differentiated or getattr(forward_ad, "_current_level", -1) >= 0:
        raise ValueError(f"{name} has no backward kernel yet: call it under torch.no_grad(), or llama.ops in its place")


def family(device: torch.device) -> str:
    """The name under which `tiles` keeps this device's configurations."""
    if INTERPRETED:
        return "interpreter"
    if device.type == "meta":  # compiled ahead of time, for the target of the day
        return family_of(triton.runtime.driver.active.get_current_target())
    return _family_of_device(device.index)


@cache
def _family_of_device(index: int | None) -> str:
    with torch.cuda.device(index):
        return family_of(triton.runtime.driver.active.get_current_target())


def family_of(target: GPUTarget) -> str:
    """sm_80, sm_90 and sm_100 with the chips that share their shared memory and matrix units; gfx942 for AMD."""
    if target.backend == "hip":
        return "gfx942"
    major = target.arch // 10
    if target.arch == 80:
        return "sm_80"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_89")  # 8.6, 8.9, 12.x: 100 kB of shared memory


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` does the same and takes microseconds, which every launch would wait for."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is not below n > 0, as `triton.next_power_of_2`, and as `cdiv` for its speed."""
    return 1 << (n - 1).bit_length()


def common_power(*tensors: torch.Tensor) -> int:
    """The largest power of two, 16 at most, that divides every stride but those of the last axis."""
    return math.gcd(16, *(stride for tensor in tensors for stride in tensor.stride()[:-1]))


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """x (..., N) as (outer, inner, N): a view wherever strides allow, which is nearly always.

    Only where more than two leading axes cannot be joined, as after odd permutations, it is copied. x is not empty.
    """
    if x.dim() <= 2:
        return x.view(1, -1, x.shape[-1])
    for shape in ((1, -1, x.shape[-1]), (x.shape[0], -1, x.shape[-1]), (-1, *x.shape[-2:])):
        try:
            return x.view(shape)
        except RuntimeError:
            continue
    return x.reshape(1, -1, x.shape[-1])
