"""The layer between PyTorch and the kernels: operator registration, argument checks and row layouts.

A kernel file registers its launch functions as operators in `torch.ops.llama_triton`, so that torch.compile can trace
them, and exposes public functions that validate their arguments. There are no backward kernels yet: asking for
gradients raises an error here, while `llama.ops` falls back to plain PyTorch.
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
    """Register the decorated function as the operator `schema`, on CPU (interpreted) and GPU; `fake` infers shapes.

    Calling the result goes through PyTorch's dispatcher; its `.launch` is the function itself.
    """
    name = schema.partition("(")[0]

    def register(launch: Callable[..., Any]) -> Any:
        _library.define(schema)

        def on_its_device(x: torch.Tensor, *rest: Any) -> Any:
            with torch.cuda.device_of(x):  # Triton launches on the current device, not the tensors'
                return launch(x, *rest)

        for key in ("CPU", "CUDA"):  # ROCm uses the CUDA key
            _library.impl(name, on_its_device, key)
        library.register_fake(f"llama_triton::{name}", fake, lib=_library)
        packet = getattr(torch.ops.llama_triton, name)
        written = [i for i, arg in enumerate(packet.default._schema.arguments) if arg.is_write]

        def count(keys: Any, *args: Any) -> Any:  # as PyTorch's own operators: autograd detects in-place writes
            torch.autograd.graph.increment_version([args[i] for i in written])
            with torch._C._AutoDispatchBelowADInplaceOrView():
                return packet.default.redispatch(keys & torch._C._after_ADInplaceOrView_keyset, *args)

        if written:
            _library.impl(name, count, "ADInplaceOrView", with_keyset=True)
        packet.launch = launch
        return packet

    return register


def check(name: str, *tensors: torch.Tensor | None) -> None:
    """Check that a kernel can take these tensors: one device that Triton supports, a known dtype, and no gradients.

    Raises:
        ValueError: one of these does not hold; the message says which.
    """
    given = [tensor for tensor in tensors if tensor is not None]
    device = given[0].device
    for tensor in given:
        if tensor.device != device:
            raise ValueError(f"{name}: all tensors must be on the same device, got {device} and {tensor.device}")
        if tensor.is_floating_point() and tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: dtypes must be float32, float16 or bfloat16, got {tensor.dtype}")
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"{name}: Triton kernels need a GPU, but the tensors are on {device}. To test them on a CPU, in Triton's "
            "interpreter, set TRITON_INTERPRET=1 before starting Python"
        )
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    if differentiated or getattr(forward_ad, "_current_level", -1) >= 0:
        raise ValueError(f"{name} has no backward kernel yet: call it under torch.no_grad(), or use llama.ops instead")


def family(device: torch.device) -> str:
    """Return the key of this device's configurations in `tiles`."""
    if INTERPRETED:
        return "interpreter"
    if device.type == "meta":  # compiled ahead of time, for the active target
        return family_of(triton.runtime.driver.active.get_current_target())
    return _family_of_device(device.index)


@cache
def _family_of_device(index: int | None) -> str:
    with torch.cuda.device(index):
        return family_of(triton.runtime.driver.active.get_current_target())


def family_of(target: GPUTarget) -> str:
    """Return the family of chips with the same shared memory and matrix units; gfx942 for all of AMD's."""
    if target.backend == "hip":
        return "gfx942"
    major = target.arch // 10
    if target.arch == 80:
        return "sm_80"
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_89")  # 8.6, 8.9, 12.x: 100 kB of shared memory


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. `triton.cdiv` does the same but adds microseconds to every launch."""
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The smallest power of two >= n, for n > 0. Replaces `triton.next_power_of_2` for the same reason as `cdiv`."""
    return 1 << (n - 1).bit_length()


def common_power(*tensors: torch.Tensor) -> int:
    """The largest power of two, at most 16, that divides every stride except those of the last axis."""
    return math.gcd(16, *(stride for tensor in tensors for stride in tensor.stride()[:-1]))


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Reshape x (..., N) to (outer, inner, N), as a view if strides allow, which is nearly always.

    Copies only if more than two leading axes cannot be merged, as after unusual permutations. x must not be empty.
    """
    if x.dim() <= 2:
        return x.view(1, -1, x.shape[-1])
    for shape in ((1, -1, x.shape[-1]), (x.shape[0], -1, x.shape[-1]), (-1, *x.shape[-2:])):
        try:
            return x.view(shape)
        except RuntimeError:
            continue
    return x.reshape(1, -1, x.shape[-1])
