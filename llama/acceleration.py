"""Our kernels inside a transformers model: `llama.accelerate(model)`, undone by `restore()`.

Only this one model changes: each module whose type is exactly a class of transformers becomes an instance of a subclass
of it, with the same parameters, children and hooks. Such a module calls `llama.ops` when the kernels can compute, and
transformers' own code when they cannot: gradients are needed, attention weights are requested, or the mask is more than
padding. So nothing is lost but speed. Children are always called as modules, so adapters and quantised layers stay in
effect.

transformers passes padding to attention as a mask, made once per forward pass in the format registered for the name in
`config._attn_implementation`. From 4.53 on we can register our own, (B, S), which the kernels take. Older versions make
(B, 1, T, S), and padded batches then keep transformers' attention.
"""

import importlib
import warnings
from collections import Counter
from dataclasses import dataclass, field
from functools import cache, partial
from types import MethodType, TracebackType
from typing import Any

import torch
from torch import nn

from . import ops

WIDEST_HEAD = 256  # of the attention kernels
STARTS = ("sdpa", "eager")  # transformers' attentions that ours may replace; any other was chosen deliberately
OF_OTHERS = ("is_causal", "position_bias", "softcap", "cache", "sliding_window")  # arguments the kernels lack
KERNELS = {
    "LlamaRMSNorm": "rms_norm",
    "LlamaMLP": "swiglu",
    "LlamaAttention": "apply_rope, flash_attention, decode_attention",
    "LlamaSdpaAttention": "apply_rope, flash_attention, decode_attention",
}


def accelerate(model: nn.Module, backend: str = "auto") -> "Acceleration":
    """Make a Llama of transformers (4.46 or later) use this project's kernels, in place.

        with llama.accelerate(model):
            model.generate(...)

    RMSNorm, SwiGLU, RoPE and attention are replaced; parameters, the state dict, hooks and adapters stay as they are,
    and what `save_pretrained` writes does not change. The kernels have no backward pass yet: when gradients are needed,
    transformers' own code runs, with a warning the first time.

    Args:
        model: a transformers model that is or contains a `LlamaModel`: with any head, or inside PEFT's wrapper.
            Subclasses of transformers' classes are left alone; the report says so.
        backend: "triton" uses the kernels. "auto" uses them for tensors on a GPU that they support, and is bitwise
            identical to transformers elsewhere. "torch" uses this project's PyTorch operations, fewer and larger than
            transformers' own; attention, which would not differ, is left alone.

    Returns:
        An `Acceleration`: `print` it to see what was replaced; its `restore()` undoes everything.

    Raises:
        ValueError: the model has no `LlamaModel` or is already accelerated, or this machine lacks the backend.
        ImportError: transformers is not installed.
    """
    classes = _classes()
    ops.check_backend(backend)
    roots = _llamas(model)
    if any(type(module) in classes.values() for module in model.modules()):
        raise ValueError(
            f"this {type(model).__name__} is accelerated already: first call restore() on what accelerate returned or, "
            "for a copy, llama.acceleration.restore(model)"
        )
    modeling = _modeling()
    handle, state = Acceleration(model, backend), _State(backend, _registered(), _silus(), _returns_past())
    for root in roots:
        excuse = _why_not_attention(root, backend)
        for module in root.modules():
            theirs = type(module)
            if isinstance(module, (modeling.LlamaRMSNorm, modeling.LlamaMLP, modeling.LlamaAttention)):
                reason = excuse if isinstance(module, modeling.LlamaAttention) else None
                if (reason := reason or _why_not(module)) is None:
                    _become(module, classes[theirs])
                    module._acceleration = state
                    handle.replaced[theirs.__name__] += 1
                else:
                    handle.left[theirs.__name__, reason] += 1
        config: Any = root.config
        if excuse is None and _registered():
            start = config._attn_implementation
            config._attn_implementation = _name(backend, _registered().get(start, start))
    return handle


def restore(model: nn.Module) -> None:
    """Undo `accelerate` in a model, or in a copy of one; a no-op for any other."""
    originals = {ours: theirs for theirs, ours in _classes().items()}
    for module in model.modules():
        if type(module) in originals:
            _become(module, originals[type(module)])
            del module._acceleration
        config: Any = module.__dict__.get("config")
        name = getattr(config, "_attn_implementation", None)
        if isinstance(name, str) and name in _registered():
            config._attn_implementation = _registered()[name]


@dataclass
class Acceleration:
    """What `accelerate` did. As a context manager, it undoes that on exit."""

    model: nn.Module
    backend: str
    replaced: Counter[str] = field(default_factory=Counter)
    """transformers' class -> the number of its modules that were replaced."""
    left: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(class, reason) -> the number of modules left alone."""
    active: bool = True

    def restore(self) -> None:
        """Restore the model exactly as it was. Calling it again is a no-op."""
        if self.active:
            restore(self.model)
            self.active = False

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()

    def __str__(self) -> str:
        rows = [(name, number, KERNELS[name]) for name, number in self.replaced.items()]
        rows += [(name, number, f"left alone: {reason}") for (name, reason), number in self.left.items()]
        wide = max((len(name) for name, _, _ in rows), default=0)
        how = {
            "auto": "kernels on a GPU, transformers' own code elsewhere",
            "triton": "kernels",
            "torch": "PyTorch's operations",
        }[self.backend]
        state = "" if self.active else ", restored"
        lines = [f"{type(self.model).__name__}, backend={self.backend!r} ({how}){state}"]
        lines += [f"  {name:{wide}}  {number:4}  {what}" for name, number, what in rows]
        if self.backend != "torch":
            if "LlamaAttention" in self.replaced or "LlamaSdpaAttention" in self.replaced:
                lines += [] if _registers_masks() else ["  rows with padding keep transformers' attention before 4.53"]
            lines.append("  when gradients are needed, transformers' own code runs: no kernel has a backward pass")
        return "\n".join(lines)


@dataclass
class _State:
    """What the modules of one accelerated model share, including what torch.compile could not look up by itself."""

    backend: str
    names: dict[str, str]
    """`_registered()`"""
    silus: tuple[type, ...]
    returns_past: bool
    told: bool = False
    """whether the warning about training was given"""


class _Accelerated(nn.Module):
    """Mixin in front of one of transformers' classes, whose own code is `super().forward`."""

    _acceleration: _State

    def _takes(self, x: torch.Tensor) -> bool:
        """Whether `ops`, and not transformers' own code, handles this input."""
        state = self._acceleration
        if state.backend == "torch":
            return True
        if not torch.is_grad_enabled():
            return ops.uses_triton(state.backend, x)
        if ops.uses_triton(state.backend, x, *self.parameters()):
            return True
        compiling = torch.compiler.is_compiling()
        if self.training and not state.told and not compiling and ops.uses_triton(state.backend, x.detach()):
            state.told = True
            warnings.warn(
                "an accelerated model is training: the kernels have no backward pass yet, so transformers' own code "
                "runs. Under torch.no_grad() the kernels do",
                stacklevel=2,
            )
        return False


class _RMSNorm(_Accelerated):
    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not self._takes(hidden_states):
            return super().forward(hidden_states)
        return ops.rms_norm(hidden_states, self.weight, self.variance_epsilon, self._acceleration.backend)


class _MLP(_Accelerated):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        is_silu = type(self.act_fn) in self._acceleration.silus and ops.is_unwatched(self.act_fn)
        if not (is_silu and self._takes(x)):
            return super().forward(x)
        return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x), self._acceleration.backend))


class _Attention(_Accelerated):
    """Attention with a mask of None (the first T keys are the queries' own; if T is 1, all keys are seen) or (B, L),
    False at padding among the first L keys, of which the queries are the last. Other masks are left to transformers."""

    config: Any
    layer_idx: int
    head_dim: int
    attention_dropout: float
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple:
        if args or not (self._takes(hidden_states) and self._suits(**kwargs)):
            return super().forward(hidden_states, *args, **kwargs)
        backend = self._acceleration.backend
        past_name = "past_key_values" if "past_key_values" in kwargs else "past_key_value"  # until 4.55
        past, mask, rotation = kwargs.get(past_name), kwargs.get("attention_mask"), kwargs["position_embeddings"]
        B, T, _ = hidden_states.shape
        q, k, v = (
            projection(hidden_states).view(B, T, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cos, sin = rotation
        q, k = ops.apply_rope(q, k, cos, sin, backend)
        if past is not None:
            where = kwargs.get("cache_position")  # which transformers 4's static cache needs
            more = () if where is None else ({"cos": cos, "sin": sin, "cache_position": where},)
            k, v = past.update(k, v, self.layer_idx, *more)
        seen = mask.shape[1] if mask is not None else T if T > 1 else k.shape[2]
        k, v = k[:, :, :seen], v[:, :, :seen]  # a static cache may have empty entries beyond
        out = ops.attention(q, k, v, None if mask is None else _padding(mask, T), 0.0, backend)
        out = self.o_proj(out.transpose(1, 2).reshape(B, T, -1))
        return (out, None, past) if self._acceleration.returns_past else (out, None)

    def _suits(self, **kwargs: Any) -> bool:
        """Whether the kernels support this call."""
        config, mask, names = self.config, kwargs.get("attention_mask"), self._acceleration.names
        if names:
            start = names.get(config._attn_implementation)
            if start is None or (start == "eager" and mask is None):  # eager: None means no mask at all
                return False  # no start: another attention was chosen since
        return (
            (mask is None or mask.dim() == 2)
            and kwargs.get("position_embeddings") is not None
            and not (kwargs.get("output_attentions") or getattr(config, "output_attentions", False))
            and not (self.training and self.attention_dropout)
            and getattr(self, "scaling", self.head_dim**-0.5) == self.head_dim**-0.5
            and getattr(self, "is_causal", True)
            and getattr(config, "is_causal", True)
            and all(kwargs.get(name) is None for name in OF_OTHERS)
        )


def _padding(keys: torch.Tensor, T: int) -> ops.Padding:
    """`ops.padding_of`, once for all layers: it is cached on the mask, which is new in every forward pass."""
    if T == 1:  # the kernel for one token needs nothing else
        return ops.Padding(keys, None, None, None)
    if torch.compiler.is_compiling():
        return ops.padding_of(keys, None)
    found = getattr(keys, "_padding", None)
    if found is None:  # cached without the mask, to avoid a reference cycle
        found = keys._padding = ops.padding_of(keys, None)._replace(keys=None)  # type: ignore[attr-defined]
    return found._replace(keys=keys)


def _mask(masks: Any, backend: str, start: str, **said: Any) -> torch.Tensor | None:
    """Make the mask for `_Attention` from the arguments that transformers passes to mask functions or, if it cannot be
    expressed so, the mask of the attention that ours replaced. `masks` is transformers' masking_utils."""
    given, batch, keys = said.get("attention_mask"), said["batch_size"], said["kv_length"]
    places = said.get("cache_position")  # lengths and offsets replace it from 5.x on
    T = said["q_length"] if places is None else len(places)
    device = said["device"] if places is None else places.device
    begin = said["q_offset"] if places is None else 0 if keys == T else None
    own = partial(masks.ALL_MASK_ATTENTION_FUNCTIONS[start], **said)
    if torch.is_grad_enabled() or not ops.uses_triton(backend, torch.empty(0, dtype=said["dtype"], device=device)):
        return own()
    is_causal = said["mask_function"] is masks.causal_mask_function and not said.get("use_vmap")
    if is_causal and said.get("kv_offset", 0) == 0 and begin is not None and not isinstance(begin, torch.Tensor):
        end = begin + T  # a dynamic cache ends here; a static one has entries beyond
        if given is None:
            if start != "eager" and (begin == 0 if T > 1 else end == keys):
                return None
            return torch.ones(batch, end, dtype=torch.bool, device=device)
        if given.shape[0] == batch and given.shape[1] >= end:
            return given[:, :end].to(torch.bool)
    if T == 1:  # whatever it means, for one query it just selects keys
        return masks.sdpa_mask(**said | {"allow_is_causal_skip": False})[:, 0, 0]
    return own()


def _attend(
    masks: Any, attend: Any, start: str,
    module: nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """transformers' attention with its own mask, for calls under our name that the kernels do not support."""
    if mask is not None and mask.dim() == 2:
        (B, L), T, S = mask.shape, q.shape[2], k.shape[2]
        mask = masks.ALL_MASK_ATTENTION_FUNCTIONS[start](
            batch_size=B, kv_length=S, kv_offset=0, q_length=T, q_offset=L - T, dtype=q.dtype, device=q.device,
            cache_position=torch.arange(L - T, L, device=q.device), mask_function=masks.causal_mask_function,
            attention_mask=nn.functional.pad(mask, (0, S - L)), config=getattr(module, "config", None),
        )  # fmt: skip
    return attend(module, q, k, v, mask, **kwargs)


# --- finding and replacing ---


def _llamas(model: nn.Module) -> list[nn.Module]:
    """Every `LlamaModel` in `model`."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"accelerate takes a transformers Llama model, got {type(model).__name__}")
    found = [module for module in model.modules() if isinstance(module, _modeling().LlamaModel)]
    if found:
        return found
    name = type(model).__name__
    if any(isinstance(module, ops.Computes) for module in model.modules()):
        raise ValueError(f"this {name} is this project's own and has the kernels already; see model.set_backend")
    kind = getattr(getattr(model, "config", None), "model_type", None)
    family = f" (model_type {kind!r})" if isinstance(kind, str) else ""
    raise ValueError(f"accelerate takes a transformers Llama model; there is no LlamaModel in this {name}{family}")


def _why_not(module: nn.Module) -> str | None:
    """Why this module is not replaced, or None if it is."""
    if type(module) not in _classes():
        return "not transformers' own class"
    if not _runs_its_class(module):
        return "its forward was replaced"
    config = module.__dict__.get("config")
    if _returns_past() and getattr(config, "pretraining_tp", 1) > 1:
        return "pretraining_tp slices its weights"
    activation: Any = getattr(module, "act_fn", None)
    if activation is not None and type(activation) not in _silus():
        return f"its activation is {type(activation).__name__}"
    return None


def _why_not_attention(root: nn.Module, backend: str) -> str | None:
    """Why attention is left alone in all of this `LlamaModel`, whose layers share a mask format, or None if not."""
    modeling = _modeling()
    config: Any = root.config
    start = _registered().get(config._attn_implementation, config._attn_implementation)
    if backend == "torch":
        return "transformers uses PyTorch's attention too"
    if start not in STARTS:
        return f"attn_implementation is {start!r}"
    if start == "eager" and not _registers_masks():
        return "its masks are 4-D before transformers 4.53; load with attn_implementation='sdpa'"
    layers: Any = root.layers
    owners = [(root, modeling.LlamaModel), *((layer, modeling.LlamaDecoderLayer) for layer in layers)]
    for module, own in owners:
        if type(module) is not own or not _runs_its_class(module):
            return f"its {type(module).__name__} is not transformers' own"
    for attention in (layer.self_attn for layer in layers):
        if (reason := _why_not(attention)) is not None:
            return f"the {type(attention).__name__} of one layer is left alone: {reason}"
        if attention.config is not config:
            return "its layers have a different configuration"
        if attention.head_dim > WIDEST_HEAD:
            return f"the kernels take a head_dim of up to {WIDEST_HEAD}, this is {attention.head_dim}"
    return None


def _runs_its_class(module: nn.Module) -> bool:
    """Whether calling `module` runs its class's forward, possibly inside a hook of Hugging Face's accelerate."""
    own = module.__dict__
    bound = own.get("_old_forward", own.get("forward"))
    return bound is None or getattr(bound, "__func__", None) is type(module).forward


def _become(module: nn.Module, cls: Any) -> None:
    """Change a module's class, and rebind forwards on the instance (where Hugging Face's accelerate keeps them)."""
    before = type(module).forward
    module.__class__ = cls
    for name in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(name), "__func__", None) is before:
            module.__dict__[name] = MethodType(cls.forward, module)


# --- transformers, imported when needed, and the differences between its versions ---


@cache
def _modeling() -> Any:
    try:
        importlib.import_module("transformers")
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError("llama.accelerate needs transformers: pip install transformers") from None
    return importlib.import_module("transformers.models.llama.modeling_llama")


def _silus() -> tuple[type, ...]:
    own = importlib.import_module("transformers.activations")
    return nn.SiLU, getattr(own, "SiLUActivation", nn.SiLU)


def _returns_past() -> bool:
    """Whether attention returns its cache, and has a class for SDPA (until 4.47)."""
    return hasattr(_modeling(), "LlamaSdpaAttention")


@cache
def _registers_masks() -> bool:
    """Whether mask functions can be registered with transformers (from 4.53 on)."""
    return hasattr(importlib.import_module("transformers"), "AttentionMaskInterface")


@cache
def _registered() -> dict[str, str]:
    """Our names for `config._attn_implementation` -> the attention that each replaces; empty if masks cannot be
    registered."""
    if not _registers_masks():
        return {}
    transformers = importlib.import_module("transformers")
    masks, utils = (importlib.import_module(f"transformers.{name}") for name in ("masking_utils", "modeling_utils"))
    names = {}
    for start in STARTS:
        attend = utils.ALL_ATTENTION_FUNCTIONS.get(start, _modeling().eager_attention_forward)
        for backend in ("auto", "triton"):
            names[_name(backend, start)] = start
            transformers.AttentionInterface.register(_name(backend, start), partial(_attend, masks, attend, start))
            transformers.AttentionMaskInterface.register(_name(backend, start), partial(_mask, masks, backend, start))
    return names


def _name(backend: str, start: str) -> str:
    return f"llama_triton_{backend}_for_{start}"


@cache
def _classes() -> dict[type, type]:
    """transformers' classes -> ours."""
    modeling = _modeling()
    _registered()  # here, so that unpickling a model does it too
    attention = modeling.LlamaSdpaAttention if _returns_past() else modeling.LlamaAttention
    return {
        theirs: type(f"Accelerated{theirs.__name__}", (ours, theirs), {"__module__": __name__})
        for theirs, ours in ((modeling.LlamaRMSNorm, _RMSNorm), (modeling.LlamaMLP, _MLP), (attention, _Attention))
    }


def __getattr__(name: str) -> type:
    """The generated classes, where pickle looks for them."""
    if name.startswith("AcceleratedLlama"):
        for cls in _classes().values():
            if cls.__name__ == name:
                return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
