"""The model's operations, one function per hot path, and the only place that chooses between Triton and PyTorch.

Layout is (batch, heads, sequence, head_dim) throughout. Semantics are transformers'; a query with all keys masked
(False or -∞) yields zeros, as in the reference. The kernels have no backward pass yet: when gradients are needed,
PyTorch's operations run, whatever the backend.
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

try:  # private APIs that tell which modes, transforms and hooks are active; they may move
    from torch._C import _len_torch_dispatch_stack, _len_torch_function_stack
    from torch._C._functorch import peek_interpreter_stack
    from torch.nn.modules.module import _has_any_global_hook

    CAN_TELL = hasattr(forward_ad, "_current_level")
except ImportError:
    CAN_TELL = False  # then no shortcut is taken

BACKENDS = ("auto", "torch", "triton")
WIDEST_ROW = 16384  # of the RMSNorm kernels; the same as in kernels/tiles.py
MOST_ROWS = 4  # of the gemv kernels; the same as in kernels/gemv.py
LARGE = 2**25  # elements; one core takes about 5 ms to read a matrix of this size
IN_CACHE = 2**15  # elements; smaller weights stay in a core's cache, where the NumPy detour costs more than it saves


@cache
def has_triton() -> bool:
    """Whether a Triton that the kernels support is installed: 3.6 or later."""
    if importlib.util.find_spec("triton") is None:
        return False
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 6)


def check_backend(backend: str) -> str:
    """Return `backend` if this machine supports it: "triton" (a GPU, or a CPU under TRITON_INTERPRET=1), "torch", or
    "auto", which uses Triton for tensors on a GPU and PyTorch elsewhere.

    Raises:
        ValueError: it does not; the message says what to do.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "triton":
        if not has_triton():
            raise ValueError('the triton backend needs Triton 3.6 or later: pip install triton, or backend="torch"')
        if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
            raise ValueError(
                'the triton backend needs a GPU and there is none; use backend="torch". For tests, '
                "TRITON_INTERPRET=1, set before Python starts, runs the kernels on a CPU, slowly"
            )
        if torch.cuda.is_available() and not _kernels_were_made_for(None):
            raise ValueError(
                "the triton backend needs an NVIDIA GPU (Ampere or later) or an AMD Instinct; use backend='torch'"
            )
    return backend


class Computes:
    """Mixin for modules whose operations may run on the kernels. `backend` is one of BACKENDS."""

    backend = "auto"


def uses_triton(backend: str, *tensors: torch.Tensor) -> bool:
    """Whether the kernels handle these tensors: requested, or "auto" with a GPU, and no gradient is needed."""
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
    """Whether vmap or forward-mode AD is active, which the kernels' operators do not support."""
    if torch.compiler.is_compiling() or not CAN_TELL:
        return False
    return forward_ad._current_level >= 0 or peek_interpreter_stack() is not None


@torch.compiler.assume_constant_result  # outermost: torch.compile traces through functools.cache
def _has_kernels(index: int | None) -> bool:
    return _kernels_were_made_for(index)


@cache
def _kernels_were_made_for(index: int | None) -> bool:
    """Whether the kernels support this GPU: NVIDIA from Ampere on, or AMD Instinct."""
    if not has_triton():
        return False
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.startswith(("gfx90a", "gfx94", "gfx95"))
    return torch.cuda.get_device_capability(index) >= (8, 0)


class _Rows(threading.local):
    """This thread's `rows_for_numpy`: whether NumPy computes the products, and with which function."""

    active = False
    product: Callable[..., np.ndarray] = np.dot


_rows = _Rows()


def numpy_has_rows() -> bool:
    """Whether this thread is inside `rows_for_numpy`, with a row that suits it."""
    return _rows.active


def product(weight: np.ndarray, row: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """weight (M, N) times row (N,), by the function that this thread's `rows_for_numpy` chose."""
    return _rows.product(weight, row, out)


def linear(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`module(x)`, by a faster path where there is one; see `linears`."""
    return linears((module,), x)[0]


def linears(modules: tuple[nn.Module, ...], x: torch.Tensor) -> list[torch.Tensor]:
    """`module(x)` for each module.

    Inside `rows_for_numpy`, a single row goes through NumPy, whose BLAS reads the weights at least 1.4 times as fast as
    PyTorch's (NOTES.md). Anything but a plain nn.Linear (an adapter, a quantised layer, one with hooks) is just called.
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
    """Let NumPy compute the products of one row with matrices of up to `size` elements, as in every decoding step.

    Applies to float32 on a CPU that no gradient, trace, mode or hook observes. Meanwhile PyTorch is limited to this
    thread: its workers spin for milliseconds after each parallel region, on the cores that BLAS needs. The limit is set
    in OpenMP, where it affects this thread only; `torch.set_num_threads` also affects threads started later, and is
    used only where PyTorch has another pool. For large matrices BLAS gets as many threads as PyTorch had. For those
    read in less than a scheduler's time slice it gets one: a thread whose core is taken by another process would delay
    each of a token's few hundred products by a whole slice. One thread computes a product row by row (`np.vecdot`),
    which reads a memory-mapped file a quarter faster than BLAS's own order does.

    BLAS's thread count belongs to the process or to the calling thread, depending on its build. So the first thread to
    enter records it, and every thread that leaves restores it.
    """
    if _rows.active or not _suits_numpy(x):
        yield
        return
    threads = torch.get_num_threads()  # first: a thread's first PyTorch call sets its OpenMP thread count
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
    """The thread counts of BLAS's pools before the first thread entered `rows_for_numpy`."""

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0
        self.blas: list[int] = []


_pools = _Pools()


def _set_threads(libraries: list[Any], numbers: list[int]) -> None:
    for library, number in zip(libraries, numbers, strict=True):
        library.set_num_threads(number)


@cache
def _libraries(api: str) -> list[Any]:
    """threadpoolctl's controllers of all loaded libraries for "blas" (NumPy's) or "openmp" (PyTorch's)."""
    return ThreadpoolController().select(user_api=api).lib_controllers


def _suits_numpy(x: torch.Tensor) -> bool:
    """Whether `x` is a single float32 row on a CPU, and nothing observes the operations on it."""
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
    """Whether calling `module` is F.linear with its own float32 CPU weight and nothing more."""
    if type(module) is not nn.Linear:
        return False
    weight = module._parameters.get("weight")  # faster than nn.Module.__getattr__
    return type(weight) is nn.Parameter and weight.dtype == torch.float32 and weight.is_cpu and is_unwatched(module)


_own_forwards: dict[type, Any] = {cls: cls.forward for cls in (nn.Linear, nn.SiLU, nn.Embedding)}


def note_forwards(*classes: type[nn.Module]) -> None:
    """Record these classes' own forwards, so that `is_unwatched` notices when one is monkey-patched."""
    _own_forwards.update({cls: cls.forward for cls in classes})


def is_unwatched(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's own forward and nothing more."""
    own = _own_forwards.get(type(module))
    return (
        "forward" not in module.__dict__  # how Hugging Face's accelerate adds hooks
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and (own is None or type(module).forward is own)
    )


def runs_bare(module: nn.Module) -> bool:
    """`is_unwatched`, and without global module hooks, except under torch.compile, which honours those itself."""
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
    """Rotate q (B, H, T, D) and k (B, K, T, D) by cos and sin (B or 1, T, D), pairing dimension i with i + D/2."""
    if uses_triton(backend, q, k):
        from .kernels import rope as kernel

        return kernel.apply_rope(q, k, cos, sin)
    cos, sin = cos[:, None], sin[:, None]
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin


def _rotate_half(x: torch.Tensor) -> torch.Tensor:
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


class Padding(NamedTuple):
    """What the tokens attend to if not simply all before them, in the form that the kernels take instead of a mask.

    keys: (B, S) bool, False at padding. starts, lengths: (B,) int32, where a row's keys begin and end.
    first_keys: (B, T) int32, the first token of each token's own sequence, where rows are packed.
    """

    keys: torch.Tensor | None
    starts: torch.Tensor | None
    lengths: torch.Tensor | None
    first_keys: torch.Tensor | None


def padding_of(keys: torch.Tensor | None, first_keys: torch.Tensor | None) -> Padding:
    """Make a `Padding` from keys (B, S) and first_keys (B, T), without a device synchronisation."""
    if keys is None:
        return Padding(None, None, None, first_keys)
    place = torch.arange(keys.shape[1], dtype=torch.int32, device=keys.device)
    starts = torch.where(keys, place, keys.shape[1]).amin(1)
    lengths = torch.where(keys, place + 1, 0).amax(1)
    return Padding(keys, starts, lengths, first_keys)


def as_mask(padding: Padding, T: int, S: int) -> torch.Tensor:
    """`padding` as a bool mask (B, 1, T, S), for PyTorch."""
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
        mask: (B or 1, H or 1, T, S); bool, True where a query may attend, or float, added to the scores. None is
            causal, the queries being the last T of S; so is a `Padding`. The kernels take only these two; 4-D masks go
            to PyTorch.
    """
    fits = q.shape[-1] <= 256 and q.dtype == k.dtype == v.dtype  # mixed dtypes: autocast casts them
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
    grouped = bool(q.shape[1] != k.shape[1])  # torch.jit.trace turns sizes into tensors
    if grouped and q.device.type == "cuda" and (mask is not None or q.dtype == torch.float32):
        times = q.shape[1] // k.shape[1]  # CUDA's fused kernels need half precision and no mask for grouped heads
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
    """`apply_rope`, then write k and v into caches (B, K, S, D) at their positions (B, T); return the rotated q."""
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
    """`attention` of one token per row, q (B, H, 1, D), to the first lengths (B,) entries of caches (B, K, S, D),
    except where mask (B, S), if given, is False. The entries left out must be finite."""
    if q.shape[-1] <= 256 and uses_triton(backend, q, k_cache, v_cache):
        from .kernels import decode_attention as kernel

        return kernel.decode_attention(q, k_cache, v_cache, lengths, mask)
    seen = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None]
    seen = seen if mask is None else seen & mask
    return attention(q, k_cache, v_cache, seen[:, None, None], backend="torch")


def gemv(
    x: torch.Tensor, weights: list[torch.Tensor], biases: list[torch.Tensor | None], backend: str = "auto"
) -> list[torch.Tensor]:
    """weight x + bias for each of up to three weights; x is (B, 1, I), with few rows, as in decoding."""
    if not _suits_gemv(x, biases, weights, backend):
        return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    from .kernels import gemv as kernel

    return list(kernel.gemv(x[:, 0], *weights)[:, None].split([len(weight) for weight in weights], dim=-1))


def gemv_swiglu(
    x: torch.Tensor, gate: torch.Tensor, gate_bias: torch.Tensor | None,
    up: torch.Tensor, up_bias: torch.Tensor | None, backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """`swiglu` of the gate and up projections of x."""
    if not _suits_gemv(x, [gate_bias, up_bias], [gate, up], backend):
        return swiglu(F.linear(x, gate, gate_bias), F.linear(x, up, up_bias), backend)
    from .kernels import gemv as kernel

    return kernel.gemv_swiglu(x[:, 0], gate, up)[:, None]


def _suits_gemv(x: torch.Tensor, biases: list[torch.Tensor | None], weights: list[torch.Tensor], backend: str) -> bool:
    few = len(x) <= MOST_ROWS and all(bias is None for bias in biases)
    return few and are_plain(weights) and uses_triton(backend, x, *weights)


def are_plain(weights: Iterable[torch.Tensor]) -> bool:
    """Whether none is a tensor subclass (quantised, sharded), whose values are not simply its storage."""
    return all(type(weight) in (torch.Tensor, nn.Parameter) for weight in weights)


def attention_weights(q: torch.Tensor, k: torch.Tensor, mask: "torch.Tensor | Padding | None") -> torch.Tensor:
    """The weights that `attention` computes internally, (B, H, T, S) in q's dtype."""
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
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # not -∞, which makes a fully masked row NaN
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype).masked_fill(~mask, 0)


def weigh(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Σ_s weights[t, s] v_s, (B, H, T, D): the other half of `attention`."""
    B, H, T, S = weights.shape
    K, D = v.shape[1], v.shape[3]
    return (weights.view(B, K, H // K * T, S) @ v).view(B, H, T, D)


def causal_mask(T: int, S: int, device: torch.device) -> torch.Tensor:
    """(1, 1, T, S) bool: the last T of S tokens see themselves and all before them."""
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)[None, None]


def swiglu(gate: torch.Tensor, up: torch.Tensor, backend: str = "auto") -> torch.Tensor:
    """silu(gate) · up                                                              (Shazeer 2020, eq. 5)"""
    if uses_triton(backend, gate, up):
        from .kernels import swiglu as kernel

        return kernel.swiglu(gate, up)
    activated = F.silu(gate)
    return activated * up if torch.is_grad_enabled() else activated.mul_(up)  # saves paging in a buffer


def cross_entropy(
    logits: torch.Tensor,
    targets: torch.Tensor,
    num_items: "int | torch.Tensor | None" = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> torch.Tensor:
    """Mean of -log p over the targets, in float32; with `num_items`, their sum divided by that number.

    Args:
        logits: (..., V). targets: (...) ids; those equal to `ignore_index` are ignored.
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
