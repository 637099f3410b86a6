"""Other implementations of the operations in `llama.kernels`: one callable per provider, on the same inputs.

Inputs are named as the reference's arguments. `eager` is what transformers does, `compile` is torch.compile of that,
`fused` is PyTorch's single operation where it has one; `sdpa-*` force one backend of PyTorch's attention. No gradients
are computed.
"""

import importlib.util
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from llama import ops, reference

from .shapes import PAGE, Case

Inputs = dict[str, Any]
EPS, PAST = 1e-5, 1024  # PAST: tokens that the cache holds before those of apply_rope_to_cache
MODULES = {"add_rms_norm": "rms_norm", "apply_rope": "rope", "apply_rope_to_cache": "rope",
           "linear_cross_entropy": "cross_entropy", "gemv_swiglu": "gemv"}  # fmt: skip
SDPA = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
PACKAGES = {"liger": "liger_kernel", "flash-attn": "flash_attn"}
PEERS = ("eager", "compile", "fused", *SDPA, *PACKAGES)
ON_GPUS = ("sdpa-cudnn", "sdpa-efficient", *PACKAGES)


def here(device: torch.device) -> list[str]:
    """The peers available on this device."""
    names = [name for name in PEERS if device.type == "cuda" or name not in ON_GPUS]
    return [name for name in names if name not in PACKAGES or importlib.util.find_spec(PACKAGES[name])]


def inputs(case: Case, device: torch.device) -> Inputs:
    """Random arguments of the operation, laid out as in a model: heads inside tokens, contiguous caches."""
    size, dtype = case.shape, getattr(torch, case.dtype)
    generator = torch.Generator(device).manual_seed(0)
    B, T, S, H, K, D, E, V = (size.get(letter, 0) for letter in "BTSHKDEV")

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    def heads(number: int) -> torch.Tensor:
        return normal(B, T, number, D).transpose(1, 2)

    def labels() -> torch.Tensor:
        return torch.randint(V, (B, T), device=device, generator=generator)

    if case.op in ("rms_norm", "add_rms_norm"):
        names = ("x", "residual")[: 1 + (case.op == "add_rms_norm")]
        return {name: normal(B, T, E) for name in names} | {"weight": normal(E), "eps": EPS}
    if case.op in ("apply_rope", "apply_rope_to_cache"):
        angle = torch.rand((1, T, D // 2), device=device, generator=generator).mul(6.28).repeat(1, 1, 2)
        turn = {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}
        if case.op == "apply_rope":
            return {"q": heads(H), "k": heads(K)} | turn
        caches = {name: torch.zeros((B, K, PAST + T, D), dtype=dtype, device=device) for name in ("k_cache", "v_cache")}
        places = torch.arange(PAST, PAST + T, device=device).expand(B, T)
        return {"q": heads(H), "k": heads(K), "v": heads(K)} | turn | caches | {"positions": places}
    if case.op == "gemv":
        widths = {"q": H * D, "k": K * D, "v": K * D}
        return {"x": normal(B, E)} | {name: normal(width, E) * E**-0.5 for name, width in widths.items()}
    if case.op == "gemv_swiglu":
        return {"x": normal(B, E)} | {name: normal(size["F"], E) * E**-0.5 for name in ("gate", "up")}
    if case.op == "swiglu":
        return {"gate": normal(B, T, size["F"]), "up": normal(B, T, size["F"])}
    if case.op == "flash_attention":
        return {"q": heads(H), "k": heads(K), "v": heads(K)}
    if case.op == "decode_attention":
        given: Inputs = {"q": heads(H), "lengths": torch.full((B,), S, device=device)}
        if size.get("masked"):  # a batch padded on the left, each row a little more than the one before
            padding = torch.arange(1, B + 1, device=device) * S // (4 * B)
            given["mask"] = torch.arange(S, device=device) >= padding[:, None]
        if not size.get("page"):
            return given | {"k_cache": normal(B, K, S, D), "v_cache": normal(B, K, S, D)}
        pages = torch.randperm(B * S // PAGE, device=device, generator=generator).to(torch.int32).view(B, S // PAGE)
        return given | {"k_cache": normal(pages.numel(), K, PAGE, D), "v_cache": normal(pages.numel(), K, PAGE, D),
                        "block_table": pages}  # fmt: skip
    if case.op == "cross_entropy":
        return {"logits": normal(B, T, V), "labels": labels()}
    return {"hidden": normal(B, T, E), "weight": normal(V, E) * E**-0.5, "labels": labels()}


def outputs(case: Case, given: Inputs, call: Callable[[], Any]) -> list[torch.Tensor]:
    """A provider's results as a list; of caches, which are zeroed first, the part that it should write."""
    written = [given[name] for name in ("k_cache", "v_cache") if case.op == "apply_rope_to_cache"]
    for cache in written:
        cache.zero_()
    result = call()
    results = list(result) if isinstance(result, tuple | list) else [result]
    if case.op == "gemv":  # the kernel returns one tensor
        results = [torch.cat(results, 1)]
    return results + [cache[:, :, PAST:] for cache in written]


# -- ours --------------------------------------------------------------------------------------------------------------


def ours(case: Case, given: Inputs, backend: str) -> Callable[[], Any]:
    """The kernel itself ("triton"), or what `llama.ops` and the model do without it ("torch")."""
    if backend == "triton":
        module = import_module(f"llama.kernels.{MODULES.get(case.op, case.op)}")
        function = getattr(module, case.op)
        return partial(function, *given.values()) if case.op == "gemv" else partial(function, **given)
    return partial(_TORCH[case.op], **given)


def _to_cache(rope: Callable[..., Any], q, k, v, cos, sin, k_cache, v_cache, positions) -> torch.Tensor:
    """Store as `llama.cache` does, in a slice of the buffers: here everything after PAST."""
    q, k = rope(q, k, cos, sin)
    k_cache[:, :, PAST:] = k
    v_cache[:, :, PAST:] = v
    return q


def _linears(x, q, k, v) -> list[torch.Tensor]:
    return [F.linear(x, weight) for weight in (q, k, v)]


def _gated(swiglu: Callable[..., torch.Tensor], x, gate, up) -> torch.Tensor:
    return swiglu(F.linear(x, gate), F.linear(x, up))


def _decode(attend: Callable[..., Any], q, k_cache, v_cache, lengths, block_table=None, mask=None) -> torch.Tensor:
    """All rows are full, so `lengths` changes nothing."""
    masks = [] if mask is None else [mask[:, None, None]]
    return attend(q, gathered(k_cache, block_table), gathered(v_cache, block_table), *masks)


def gathered(cache: torch.Tensor, block_table: torch.Tensor | None) -> torch.Tensor:
    """A paged cache (pages, K, page, D) copied to (B, K, S, D); any other as it is."""
    if block_table is None:
        return cache
    return cache[block_table.long()].transpose(1, 2).flatten(2, 3)


def _losses_of(loss: Callable[..., Any], hidden, weight, labels) -> torch.Tensor:
    return loss(hidden @ weight.T, labels)


_TORCH: dict[str, Callable[..., Any]] = {
    "rms_norm": partial(ops.rms_norm, backend="torch"),
    "add_rms_norm": partial(ops.add_rms_norm, backend="torch"),
    "apply_rope": partial(ops.apply_rope, backend="torch"),
    "apply_rope_to_cache": partial(_to_cache, partial(ops.apply_rope, backend="torch")),
    "swiglu": partial(ops.swiglu, backend="torch"),
    "gemv": _linears,
    "gemv_swiglu": partial(_gated, partial(ops.swiglu, backend="torch")),
    "flash_attention": partial(ops.attention, backend="torch"),
    "decode_attention": partial(_decode, partial(ops.attention, backend="torch")),
    "cross_entropy": lambda logits, labels: ops.cross_entropy(logits, labels, backend="torch"),
    "linear_cross_entropy": partial(_losses_of, partial(ops.cross_entropy, backend="torch")),
}


# -- theirs ------------------------------------------------------------------------------------------------------------


def providers(case: Case, given: Inputs, backend: str, peers: Iterable[str]) -> dict[str, Callable[[], Any]]:
    """Ours, under its backend's name, then those of the peers that have this operation."""
    known: dict[str, Mapping[str, Callable[..., Any]]] = {
        "eager": _EAGER, "compile": _EAGER, "fused": _FUSED, **{name: _sdpa(name) for name in SDPA},
        "liger": _LIGER, "flash-attn": _FLASH_ATTN,
    }  # fmt: skip
    calls = {backend: ours(case, given, backend)}
    for name in peers:
        function = known[name].get(case.op)
        if function is None or (name == "flash-attn" and {"page", "masked"} & {*case.shape}):
            continue  # its pages have at least 256 tokens, and it has no masks
        if name == "compile":
            function = torch.compile(function, fullgraph=True, dynamic=False)
        own: Inputs = {}
        if name == "liger":  # its RoPE may overwrite q and k; rotating them repeatedly costs the same
            own = {key: given[key].clone() for key in ("q", "k") if key in given}
        if name == "flash-attn" and "lengths" in given:  # in the dtype that it needs
            own = {"lengths": given["lengths"].int()}
        calls[name] = partial(function, **given | own)
    return calls


def _eager_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x32 = x.float()
    return weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _eager_rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    def turned(x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.chunk(2, -1)
        return x * cos[:, None] + torch.cat((-x2, x1), -1) * sin[:, None]

    return turned(q), turned(k)


def _eager_swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate) * up


def _eager_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    times, T, S = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    if T > 1:
        unseen = torch.ones(T, S, dtype=torch.bool, device=q.device).triu(1 + S - T)
        scores = scores.masked_fill(unseen, float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return F.softmax(scores, -1, dtype=torch.float32).to(q.dtype) @ v


def _eager_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


def _added(norm: Callable[..., torch.Tensor], x, residual, weight, eps) -> tuple[torch.Tensor, torch.Tensor]:
    residual = residual + x
    return norm(residual, weight, eps), residual


def _fused_rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


_EAGER: dict[str, Callable[..., Any]] = {
    "rms_norm": _eager_rms_norm,
    "add_rms_norm": partial(_added, _eager_rms_norm),
    "apply_rope": _eager_rope,
    "apply_rope_to_cache": partial(_to_cache, _eager_rope),
    "swiglu": _eager_swiglu,
    "gemv": _linears,
    "gemv_swiglu": partial(_gated, _eager_swiglu),
    "flash_attention": _eager_attention,
    "decode_attention": partial(_decode, _eager_attention),
    "cross_entropy": _eager_loss,
    "linear_cross_entropy": partial(_losses_of, _eager_loss),
}
_FUSED: dict[str, Callable[..., Any]] = {
    "rms_norm": _fused_rms_norm,
    "add_rms_norm": partial(_added, _fused_rms_norm),
}


def _sdpa(name: str) -> dict[str, Callable[..., Any]]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        with sdpa_kernel([SDPA[name]]):
            return F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1]
            )

    return {"flash_attention": attend, "decode_attention": partial(_decode, attend)}


# Written against liger-kernel 0.8.5 and flash-attn 2; both need a GPU, and have not run yet.


def _liger(name: str, *names: str) -> Callable[..., Any]:
    """A function of Liger's that takes these inputs in this order, with batch and tokens flattened."""

    def call(**given: Any) -> Any:
        function = getattr(import_module("liger_kernel.transformers.functional"), name)
        return function(*(given[key].flatten(0, 1) if key in ("logits", "hidden", "labels") else given[key]
                          for key in names))  # fmt: skip

    return call


def _flash_attn(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return import_module("flash_attn").flash_attn_func(q, k, v, causal=True).transpose(1, 2)


def _flash_attn_decode(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor) -> Any:
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    call = import_module("flash_attn").flash_attn_with_kvcache
    return call(q, k, v, cache_seqlens=lengths).transpose(1, 2)


_LIGER: dict[str, Callable[..., Any]] = {
    "rms_norm": _liger("liger_rms_norm", "x", "weight", "eps"),
    "add_rms_norm": _liger("liger_fused_add_rms_norm", "x", "residual", "weight", "eps"),
    "apply_rope": _liger("liger_rope", "q", "k", "cos", "sin"),
    "swiglu": _liger("liger_swiglu", "gate", "up"),
    "cross_entropy": _liger("liger_cross_entropy", "logits", "labels"),
    "linear_cross_entropy": _liger("liger_fused_linear_cross_entropy", "hidden", "weight", "labels"),
}
_FLASH_ATTN: dict[str, Callable[..., Any]] = {"flash_attention": _flash_attn, "decode_attention": _flash_attn_decode}


# -- expected results --------------------------------------------------------------------------------------------------

WINDOW = 16  # tokens compared with the reference at the start, in the middle and at the end; all of them if few
Truth = list[tuple[list[int], slice, list[Any]]]  # rows (empty: everything), tokens, the expected results there


def truth(case: Case, given: Inputs) -> Truth:
    """The reference's results for these inputs in float64: all of a loss or of gemv.

    Otherwise those of the first and the last row, and of long ones only three windows of tokens.
    """
    if case.op in ("cross_entropy", "linear_cross_entropy"):
        return [([], slice(None), [np.array(_loss(**given))])]
    if case.op in ("gemv", "gemv_swiglu"):
        x, *weights = (x.double().cpu().numpy() for x in given.values())
        return [([], slice(None), [getattr(reference, case.op)(x, *weights)])]
    B, T = case.shape["B"], case.shape["T"]
    rows = sorted({0, B - 1})
    starts = range(0, T, WINDOW) if T <= 3 * WINDOW else (0, T // 2, T - WINDOW)
    places = [slice(start, min(start + WINDOW, T)) for start in starts]
    return [(rows, tokens, _truth(case, given, rows, tokens)) for tokens in places]


def error(truth: Truth, results: list[torch.Tensor]) -> float:
    """The largest difference from the truth, relative to its largest value; NaN if any result is not finite."""
    if not all(bool(result.isfinite().all()) for result in results):
        return float("nan")
    worst = 0.0
    for rows, tokens, wanted in truth:
        for result, right in zip(results, wanted, strict=True):
            found = _exact(result, rows, tokens) if rows else result.double().cpu().numpy()
            worst = max(worst, float(np.abs(found - right).max() / np.abs(right).max()))
    return worst


def _exact(x: torch.Tensor, rows: list[int], tokens: slice) -> np.ndarray:
    """Some rows and tokens of (B, T, ...) or (B, heads, T, D) in float64; a single row serves all rows."""
    x = x[rows] if len(x) > 1 else x
    return (x[:, :, tokens] if x.dim() == 4 else x[:, tokens]).double().cpu().numpy()


def _truth(case: Case, given: Inputs, rows: list[int], tokens: slice) -> list[Any]:
    def part(name: str, tokens: slice = tokens) -> np.ndarray:
        return _exact(given[name], rows, tokens)

    if case.op in ("rms_norm", "add_rms_norm"):
        weight = given["weight"].double().cpu().numpy()
        if case.op == "rms_norm":
            return [reference.rms_norm(part("x"), weight, EPS)]
        return list(reference.add_rms_norm(part("x"), part("residual"), weight, EPS))
    if case.op in ("apply_rope", "apply_rope_to_cache"):
        turned = list(reference.apply_rope(part("q"), part("k"), part("cos"), part("sin")))
        return turned if case.op == "apply_rope" else [*turned, part("v")]
    if case.op == "swiglu":
        return [reference.swiglu(part("gate"), part("up"))]
    if case.op == "flash_attention":  # the reference's queries are the last of its keys
        seen = slice(0, tokens.stop)
        return [reference.flash_attention(part("q"), part("k", seen), part("v", seen))]
    table = given.get("block_table")
    caches = [gathered(given[name], None if table is None else table[rows]) for name in ("k_cache", "v_cache")]
    if table is None:
        caches = [cache[rows] for cache in caches]
    k, v = (cache.double().cpu().numpy() for cache in caches)
    mask = given["mask"][rows].cpu().numpy() if "mask" in given else None
    return [reference.decode_attention(part("q"), k, v, None, mask)]


def _loss(labels: torch.Tensor, logits: torch.Tensor | None = None, hidden: torch.Tensor | None = None,
          weight: torch.Tensor | None = None) -> float:  # fmt: skip
    """`reference.cross_entropy` in PyTorch, in float64 on the inputs' device: NumPy would take minutes."""
    total, places = 0.0, labels.flatten()
    matrix = None if weight is None else weight.double().T
    source = logits if hidden is None else hidden
    assert source is not None
    for first in range(0, len(places), 256):
        piece = slice(first, first + 256)
        x = source.flatten(0, 1)[piece].double()
        x = x if matrix is None else x @ matrix
        total += float(F.cross_entropy(x, places[piece], reduction="sum"))
    return total / len(places)
