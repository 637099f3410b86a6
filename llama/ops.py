"""What the model computes with, one function for each hot path: the one place that chooses Triton or PyTorch.

Layout is (batch, heads, sequence, head_dim) everywhere. Semantics are transformers'; a query that may see no key
(False or -∞ in its mask) gives zeros, as in the reference. The kernels have no backward pass yet: where gradients are
wanted PyTorch's operations compute, whatever the backend.
"""

import importlib.util
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import torch
from threadpoolctl import ThreadpoolController  # type: ignore[import-untyped]
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F

try:  # who watches is PyTorch's own affair, and where it says so may move
    from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
    from torch._C._functorch import peek_interpreter_stack
    from torch.nn.modules.module import _has_any_global_hook

    CAN_TELL = hasattr(forward_ad, "_current_level")
except ImportError:
    CAN_TELL = False  # then nothing takes the detour

BACKENDS = ("auto", "torch", "triton")
WIDEST_ROW = 16384  # of the kernels for RMSNorm: kernels/tiles.py says the same
MOST_ROWS = 4  # of the kernels for products of a few rows: kernels/gemv.py says the same
LARGE = 2**25  # a matrix of as many numbers takes one core some five milliseconds to read
IN_CACHE = 2**15  # weights of fewer numbers stay in a core's cache, and NumPy's detour costs more than it brings


@cache
def has_triton() -> bool:
    """Whether there is a Triton that the kernels know: 3.6 or later."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


def check_backend(backend: str) -> str:
    """`backend`, if this machine has it: "triton" (a GPU, or a CPU under TRITON_INTERPRET=1), "torch", or "auto", which
    takes Triton for what lies on a GPU and PyTorch elsewhere.

    Raises:
        ValueError: it has not, and what to do.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        if not has_triton():
            raise ValueError('the triton backend needs Triton 3.6 or later: pip install triton, or backend="torch"')
        if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
            raise ValueError(
                'the triton backend needs a GPU and there is none; backend="torch" runs here. For tests '
                "TRITON_INTERPRET=1, set before Python starts, runs the kernels on a CPU, slowly"
            )
        if torch.cuda.is_available() and not _kernels_were_made_for(None):
            raise ValueError(
                "the triton backend wants NVIDIA's GPUs from Ampere on, or AMD's Instinct; backend='torch' runs here"
            )
    return backend


class Computes:
    """A module whose work `ops` may hand to the kernels. `backend` is one of BACKENDS."""

    backend = "auto"


def uses_triton(backend: str, *tensors: torch.Tensor) -> bool:
    """Whether the kernels compute with these: they are asked for or "auto" finds a GPU, and no gradient is wanted."""
    if backend == "torch" or (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return False
    if _is_transformed():
        return False
    if backend == "triton":
        return True
    device, dtype = tensors[0].device, tensors[0].dtype
    fits = dtype in (torch.float32, torch.float16, torch.bfloat16)
    return fits and device.type == "cuda" and _has_kernels(device.index)


def _is_transformed() -> bool:
    """Whether vmap or a forward derivative is under way, of which the operators know nothing."""
    if torch.compiler.is_compiling() or not CAN_TELL:
        return False
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result  # outermost: torch.compile looks through a cache
def _has_kernels(index: int | None) -> bool:
    return _kernels_were_made_for(index)


@cache
def _kernels_were_made_for(index: int | None) -> bool:
    """Whether the kernels were made for this GPU: NVIDIA's from Ampere on, AMD's Instinct."""
    if not has_triton():
        return False
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.startswith(("gfx90a", "gfx94", "gfx95"))
    return torch.cuda.get_device_capability(index) >= (8, 0)


class _Rows(threading.local):
    """Whether this thread is in `rows_for_numpy`, and NumPy may take the products; and how it takes them."""

    active = False
    product: Callable[..., np.ndarray] = np.dot


_rows = _Rows()


def numpy_has_rows() -> bool:
    """Whether this is within `rows_for_numpy`, of a row that suits it."""
    return _rows.active


def product(weight: np.ndarray, row: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """weight (M, N) times row (N,), as this thread's `rows_for_numpy` would have it."""
    return _rows.product(weight, row, out)


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`module(x)`, by a quicker way where there is one: `linears` of one."""
    return linears((module,), x)[0]


def linears(modules: tuple[nn.Module, ...], x: torch.Tensor) -> list[torch.Tensor]:
    """`module(x)` of each.

    Within `rows_for_numpy` one row goes through NumPy, whose BLAS reads the weights half as fast again as PyTorch's, or
    better (NOTES.md). Whatever is not a plain nn.Linear (an adapter, a quantised layer, one with hooks) is called and
    nothing else.
    """
    if not (_rows.active and _is_row(x)):
        return [module(x) for module in modules]
    row = x.numpy().reshape(-1)
    return [_product(module, x, row) if is_plain(module) else module(x) for module in modules]


def _product(module: nn.Linear, x: torch.Tensor, row: np.ndarray) -> torch.Tensor:
    weight, bias = module.weight.detach(), module.bias
    if weight.numel() < IN_CACHE:
        return F.linear(x, weight, bias)
    y = torch.from_numpy(product(weight.numpy(), row))
    return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], -1)


@contextmanager
def rows_for_numpy(x: torch.Tensor, size: int) -> Iterator[None]:
    """Let NumPy take the products of one row with matrices of up to `size` numbers, as in every step of decoding.

    That is float32 on a CPU of which nobody keeps a record. PyTorch stays on this thread meanwhile: its workers go on
    spinning for milliseconds after each parallel region, on the cores that BLAS's need. OpenMP itself is told so, for
    that concerns this thread alone; `torch.set_num_threads` tells all threads to come as well, and is used only where
    PyTorch has another pool. For large matrices BLAS takes as many threads as PyTorch had. For those that are read in
    less time than a scheduler's slice it takes one: a thread whose core somebody else uses would hold up each of a
    token's few hundred products for a whole slice. One thread takes a product row by row (`np.vecdot`), which reads a
    mapped file a quarter faster than BLAS's own order does.

    BLAS's number of threads may belong to the process or to the thread that sets it, as its build has it. So the first
    thread that comes in notes what it was, and every one that leaves gives that back.
    """
    if _rows.active or not _suits_numpy(x):
        yield
        return
    threads = torch.get_num_threads()  # first of all: a thread's first call of PyTorch sets OpenMP's number
    libraries, openmp = _libraries("blas"), _libraries("openmp")
    before = [library.num_threads for library in openmp]
    with _pools.lock:
        if _pools.inside == 0:
            _pools.blas = [library.num_threads for library in libraries]
        _pools.inside += 1
        _set_threads(libraries, [threads if size >= LARGE else 1] * len(libraries))
    _rows.active, _rows.product = True, np.dot if size >= LARGE and threads > 1 else np.vecdot
    _set_threads(openmp, [1] * len(openmp))
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        _rows.active = False
        _set_threads(openmp, before)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        with _pools.lock:
            _pools.inside -= 1
            _set_threads(libraries, _pools.blas)


class _Pools:
    """What BLAS's pools of threads had before the first thread came in."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.blas: list[int] = []


_pools = _Pools()


def _set_threads(libraries: list[Any], numbers: list[int]) -> None:
    for library, number in zip(libraries, numbers, strict=True):
        library.set_num_threads(number)


@cache
def _libraries(api: str) -> list[Any]:
    """NumPy's or PyTorch's ("blas", "openmp"), and any other that is loaded, as threadpoolctl knows them."""
    return ThreadpoolController().select(user_api=api).lib_controllers


def _suits_numpy(x: torch.Tensor) -> bool:
    """Whether `x` is one row of float32 on a CPU, and nobody records what is done with it."""
    return (
        _is_row(x)
        and not torch.is_grad_enabled()
        and CAN_TELL
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
        and not _len_torch_dispatch_stack()  # modes that count, fake or trace operations
        and not _len_torch_function_stack()
        and peek_interpreter_stack() is None  # vmap and the like
        and forward_ad._current_level < 0
        and not _has_any_global_hook()
    )


def _is_row(x: torch.Tensor) -> bool:
    return x.numel() == x.shape[-1] and type(x) is torch.Tensor and x.dtype == torch.float32 and x.is_cpu


def is_plain(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling `module` is F.linear of its own float32 weight and nothing more."""
    if type(module) is not nn.Linear:
        return False
    weight = module._parameters.get("weight")  # nn.Module's own look-up takes longer
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.is_cpu and is_unwatched(module)


_own_forwards: dict[type, Any] = {cls: cls.forward for cls in (nn.Linear, nn.SiLU, nn.Embedding)}


def note_forwards(*classes: type[nn.Module]) -> None:
    """Remember the forwards of these classes as their own, so that `is_unwatched` sees when somebody replaces one."""
    _own_forwards.update({cls: cls.forward for cls in classes})


def is_unwatched(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's own forward and nothing more."""
    own = _own_forwards.get(type(module))
    return (
        "forward" not in module.__dict__  # how accelerate attaches itself
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and (own is None or type(module).forward is own)
    )


def runs_bare(module: nn.Module) -> bool:
    """`is_unwatched`, by hooks on all modules either; torch.compile, which obeys those itself, does not look."""
    return is_unwatched(module) and (torch.compiler.is_compiling() or (CAN_TELL and not _has_any_global_hook()))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, backend: str = "auto") -> torch.Tensor:
    """x / sqrt(mean(x²) + ε) in float32, rounded to x's dtype, then times weight    (Zhang & Sennrich 2019, eq. 4)"""
    if x.shape[-1] <= WIDEST_ROW and uses_triton(backend, x, weight):
        from .kernels import rms_norm as kernel

        return kernel.rms_norm(x, weight, eps)
    if _rows.active and _is_row(x) and weight.dtype == torch.float32:
        row = x.numpy().reshape(-1)
        with np.errstate(all="ignore"):
            row = row * (1 / np.sqrt(np.float32(float(row @ row) / len(row) + eps)))
        return torch.from_numpy(row).view(x.shape) * weight.detach()
    if x.dtype == weight.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x, weight.shape, None, eps) * weight


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(residual + x), residual + x): the end of one sub-layer and the start of the next."""
    if x.shape[-1] <= WIDEST_ROW and uses_triton(backend, x, residual, weight):
        from .kernels import rms_norm as kernel

        return kernel.add_rms_norm(x, residual, weight, eps)
    residual = residual + x
    return rms_norm(residual, weight, eps, backend), residual


def apply_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn q (B, H, T, D) and k (B, K, T, D) by their positions' angles; cos and sin (B or 1, T, D), halves pairing."""
    if uses_triton(backend, q, k):
        from .kernels import rope as kernel

        return kernel.apply_rope(q, k, cos, sin)
    cos, sin = cos[:, None], sin[:, None]
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


class Padding(NamedTuple):
    """Whom the tokens see where that is not simply all before them, for kernels, which make no mask of it.

    keys: (B, S) bool, False where there is padding. starts, lengths: (B,) int32, where a row's keys begin and end.
    first_keys: (B, T) int32, the first token of a token's own text, where rows hold several.
    """

    keys: torch.Tensor | None
    starts: torch.Tensor | None
    lengths: torch.Tensor | None
    first_keys: torch.Tensor | None


def padding_of(keys: torch.Tensor | None, first_keys: torch.Tensor | None) -> Padding:
    """A `Padding` of keys (B, S) and first_keys (B, T). On a GPU nothing waits for it."""
    if keys is None:
        return Padding(None, None, None, first_keys)
    place = torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device)
    starts = torch.where(keys, place, keys.shape[1]).amin(1)
    lengths = torch.where(keys, place + 1, 0).amax(1)
    return Padding(keys, starts, lengths, first_keys)


def as_mask(padding: Padding, T: int, S: int) -> torch.Tensor:
    """The same as a mask (B, 1, T, S), bool: for PyTorch."""
    tables = [table for table in padding if table is not None]
    mask = causal_mask(T, S, tables[0].device)
    if padding.keys is not None:
        mask = mask & padding.keys[:, None, None, :]
    if padding.first_keys is not None:
        key = torch.arange(S, device=mask.device)
        mask = mask & (key >= padding.first_keys[:, None, :, None])
    return mask


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: "torch.Tensor | Padding | None" = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """softmax(q kᵀ / √D + mask) v, each key/value head serving a group of query heads.

    Args:
        q: (B, H, T, D). k, v: (B, K, S, D).
        mask: (B or 1, H or 1, T, S); bool, True where a query may look, or float, which is added. None is causal, the
            queries being the last T of S; a `Padding` is causal too. The kernels take these two, and leave masks of
            four axes to PyTorch.
    """
    fits = q.shape[-1] <= 256 and q.dtype == k.dtype == v.dtype  # of several dtypes autocast makes one
    if fits and not isinstance(mask, torch.Tensor) and not dropout and uses_triton(backend, q, k, v):
        return _attend_in_triton(q, k, v, mask)
    if isinstance(mask, Padding):
        mask = as_mask(mask, q.shape[2], k.shape[2])
    causal = False
    if mask is None and q.shape[2] > 1:
        if q.shape[2] == k.shape[2]:
            causal = True
        else:
            mask = causal_mask(q.shape[2], k.shape[2], q.device)
    grouped = bool(q.shape[1] != k.shape[1])  # torch.jit.trace makes tensors of sizes
    if grouped and q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
        times = q.shape[1] // k.shape[1]  # CUDA's fused kernels take grouped heads only in halves without a mask
        k, v, grouped = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1), False
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, causal, enable_gqa=grouped)


def _attend_in_triton(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, padding: Padding | None) -> torch.Tensor:
    padding = padding or Padding(None, None, None, None)
    if q.shape[2] == 1:
        from .kernels import decode_attention as decode

        return decode.decode_attention(q, k, v, None, padding.keys)
    from .kernels import flash_attention as flash

    out = flash.flash_attention(
        q, k, v, starts=padding.starts, lengths=padding.lengths, first_keys=padding.first_keys, mask=padding.keys
    )
    assert isinstance(out, torch.Tensor)
    return out


def apply_rope_to_cache(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, positions: torch.Tensor, backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """`apply_rope`, with k and v written into caches (B, K, S, D) at positions (B, T) of them; gives the turned q."""
    if uses_triton(backend, q, k, v):
        from .kernels import rope as kernel

        return kernel.apply_rope_to_cache(q, k, v, cos, sin, k_cache, v_cache, positions)
    q, k = apply_rope(q, k, cos, sin, backend)
    places = positions[:, None, :, None].expand_as(k)
    k_cache.scatter_(2, places, k)
    v_cache.scatter_(2, places, v)
    return q


def decode_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor,
    mask: torch.Tensor | None = None, backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """`attention` of one token per row, q (B, H, 1, D), to the first lengths (B,) places of caches (B, K, S, D), but
    for those that mask (B, S) calls padding, if it is given. What is not looked at must be finite."""
    if q.shape[-1] <= 256 and uses_triton(backend, q, k_cache, v_cache):
        from .kernels import decode_attention as kernel

        return kernel.decode_attention(q, k_cache, v_cache, lengths, mask)
    seen = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None]
    seen = seen if mask is None else seen & mask
    return attention(q, k_cache, v_cache, seen[:, None, None], backend="torch")


def gemv(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None], backend: str = "auto"
) -> list[torch.Tensor]:
    """weight x + bias of each of up to three, for the few rows of x (B, 1, I) that one token per text makes."""
    if not _suits_gemv(x, biases, weights, backend):
        return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    from .kernels import gemv as kernel

    return list(kernel.gemv(x[:, 0], *weights)[:, None].split([len(weight) for weight in weights], dim=-1))


def gemv_swiglu(
    x: torch.Tensor, gate: torch.Tensor, gate_bias: torch.Tensor | None,
    up: torch.Tensor, up_bias: torch.Tensor | None, backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """`swiglu` of the two products."""
    if not _suits_gemv(x, [gate_bias, up_bias], [gate, up], backend):
        return swiglu(F.linear(x, gate, gate_bias), F.linear(x, up, up_bias), backend)
    from .kernels import gemv as kernel

    return kernel.gemv_swiglu(x[:, 0], gate, up)[:, None]


def _suits_gemv(x: torch.Tensor, biases: list[torch.Tensor | None], weights: list[torch.Tensor], backend: str) -> bool:
    few = len(x) <= MOST_ROWS and all(bias is None for bias in biases)
    return few and are_plain(weights) and uses_triton(backend, x, *weights)


def are_plain(weights: Iterable[torch.Tensor]) -> bool:
    """Whether none is of a class of its own (quantised, sharded), whose numbers do not simply lie in its memory."""
    return all(type(weight) in (torch.Tensor, nn.Parameter) for weight in weights)


def attention_weights(q: torch.Tensor, k: torch.Tensor, mask: "torch.Tensor | Padding | None") -> torch.Tensor:
    """The softmax of `attention` itself, (B, H, T, S) in q's dtype: for those who want to see it."""
    B, H, T, D = q.shape
    K, S = k.shape[1], k.shape[2]
    if isinstance(mask, Padding):
        mask = as_mask(mask, T, S)
    scores = (q.reshape(B, K, H // K * T, D) @ k.transpose(2, 3)).view(B, H, T, S) * D**-0.5
    if mask is None:
        mask = causal_mask(T, S, q.device)
    if mask.dtype != torch.bool:
        scores = scores + mask
        mask = ~torch.isneginf(scores)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # not -∞: a row of it would be NaN
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype).masked_fill(~mask, 0)


def weigh(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Σ_s weights[t, s] v_s, (B, H, T, D): the other half of `attention`."""
    B, H, T, S = weights.shape
    K, D = v.shape[1], v.shape[3]
    return (weights.view(B, K, H // K * T, S) @ v).view(B, H, T, D)


def causal_mask(T: int, S: int, device: torch.device) -> torch.Tensor:
    """(1, 1, T, S) bool: the last T of S tokens see themselves and what was before them."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]


def swiglu(gate: torch.Tensor, up: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """silu(gate) · up                                                              (Shazeer 2020, eq. 5)"""
    if uses_triton(backend, gate, up):
        from .kernels import swiglu as kernel

        return kernel.swiglu(gate, up)
    activated = F.silu(gate)
    return activated * up if torch.is_grad_enabled() else activated.mul_(up)  # one buffer less to page in


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    num_items: "int | torch.Tensor | None" = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> torch.Tensor:
    """Mean over the targets of -log p, in float32; with `num_items` their sum over that number.

    Args:
        logits: (..., V). targets: (...) ids, those equal to `ignore_index` do not count.
    """
    reduction = "mean" if num_items is None else "sum"
    if uses_triton(backend, logits):
        from .kernels import cross_entropy as kernel

        loss = kernel.cross_entropy(logits, targets.to(logits.device), ignore_index, reduction)
        return loss if num_items is None else loss / num_items
    targets = targets.reshape(-1).to(logits.device, torch.long)
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets, ignore_index=ignore_index,
                           reduction=reduction)  # fmt: skip
    return loss if num_items is None else loss / num_items
