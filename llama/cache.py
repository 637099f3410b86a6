"""Keys and values of the tokens seen so far, under transformers' names: `DynamicCache`, `StaticCache`."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from .config import LlamaConfig

Pair = tuple[torch.Tensor, torch.Tensor]


class CacheLayer:
    """One layer's keys (after RoPE) and values: views (B, K, length, D) of buffers with room behind.

    Without gradients new tokens are written into the buffers, which double when full: appending costs the tokens, not
    the past. Under autograd, whose saved tensors must not change, the past is concatenated. Nor is anything written
    over that somebody may hold: what was handed in, or was looked at before a crop, is copied first. With a
    `max_length` there is one buffer, and it is written over.
    """

    def __init__(self, max_length: int | None = None):
        self.max_length = max_length
        self.length = 0
        self._ours = False  # whether nobody else holds the places from `length` on
        self._lent = False  # whether somebody has looked at those before `length`
        self._keys: torch.Tensor | None = None
        self._values: torch.Tensor | None = None

    @property
    def is_initialized(self) -> bool:
        return self._keys is not None

    @property
    def keys(self) -> torch.Tensor | None:
        self._lent = True
        return None if self._keys is None else self._keys[:, :, : self.length]

    @keys.setter
    def keys(self, keys: torch.Tensor) -> None:
        self._put(keys, self.values)

    @property
    def values(self) -> torch.Tensor | None:
        self._lent = True
        return None if self._values is None else self._values[:, :, : self.length]

    @values.setter
    def values(self, values: torch.Tensor) -> None:
        self._put(self.keys, values)

    def _put(self, keys: torch.Tensor | None, values: torch.Tensor | None) -> None:
        """Hold these, (B, K, length, D). One is put after the other, so their lengths may differ in between."""
        self._keys, self._values, self._ours = keys, values, False
        self.length = max(held.shape[2] for held in (keys, values) if held is not None)

    def append(self, k: torch.Tensor, v: torch.Tensor) -> Pair:
        """Take (B, K, T, D) of new keys and values; give all so far."""
        start, end = self.length, self.length + k.shape[2]
        if self.max_length is not None and end > self.max_length:
            raise ValueError(f"the cache has room for {self.max_length} tokens and {end} are needed; make it larger")
        if self._keys is None or self._values is None:
            if self.max_length is None:  # a prompt that is read at once is kept as it comes
                self._keys, self._values, self.length = k, v, end
                return k, v
            shape = (k.shape[0], k.shape[1], self.max_length, k.shape[3])
            self._keys, self._values = k.new_empty(shape), v.new_empty(shape)
        if start == 0 and (k.shape[0], k.dtype, k.device) != (len(self._keys), self._keys.dtype, self._keys.device):
            self._keys = self._values = None
            return self.append(k, v)
        if k.shape[0] != self._keys.shape[0]:
            raise ValueError(f"the cache holds {self._keys.shape[0]} rows and {k.shape[0]} come; reorder or reset it")
        if torch.is_grad_enabled():
            self._ours = False
            self._keys = torch.cat([self._keys[:, :, :start], k], dim=2)
            self._values = torch.cat([self._values[:, :, :start], v], dim=2)
        else:
            if end > self._keys.shape[2] or not (self._ours or self.max_length) or _is_frozen(self._keys):
                self._ours = True
                room = max(end, 2 * start)
                self._keys, self._values = (
                    torch.cat([old[:, :, :start], new, new.new_empty(*new.shape[:2], room - end, new.shape[3])], dim=2)
                    for old, new in ((self._keys, k), (self._values, v))
                )
            else:
                self._keys[:, :, start:end] = k
                self._values[:, :, start:end] = v
        self.length = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def crop(self, length: int) -> None:
        """Forget all tokens from place `length` on."""
        if length < self.length:
            self.length, self._ours, self._lent = length, self._ours and not self._lent, False

    def select(self, rows: torch.Tensor) -> None:
        """Keep (and repeat) these rows of the batch."""
        if self._keys is not None and self._values is not None:
            rows = rows.to(self._keys.device)
            self._keys, self._values = self._keys.index_select(0, rows), self._values.index_select(0, rows)


def _is_frozen(x: torch.Tensor) -> bool:
    """Whether `x` was made in inference mode, and this is outside of it: then it may not be written to."""
    return not torch.compiler.is_compiling() and x.is_inference() and not torch.is_inference_mode_enabled()


class _OfLayers(list):
    """Every layer's keys or values, as 4.x's caches show them: a tensor put into a place is put into the cache."""

    def __init__(self, layers: list[CacheLayer], name: str):
        super().__init__(getattr(layer, name) for layer in layers)
        self._layers, self._name = layers, name

    def __setitem__(self, index: Any, tensor: Any) -> None:
        setattr(self._layers[index], self._name, tensor)
        super().__setitem__(index, tensor)

    def append(self, tensor: Any) -> None:
        raise TypeError("a layer is added to a cache by update(keys, values, layer_idx), not in its key_cache")


class Cache:
    """What the models keep between calls. One object serves as transformers' `Cache` and as its tuple of pairs:

    `cache[layer]` is (keys, values), each (B, num_key_value_heads, length, head_dim), and iterating gives them all.
    """

    max_cache_len: int | None = None
    is_compileable = False  # transformers' generate asks, and would compile the model

    def __init__(self) -> None:
        self.layers: list[CacheLayer] = []

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int,
               cache_kwargs: dict[str, Any] | None = None) -> Pair:  # fmt: skip
        """Append (B, K, T, D) keys and values to a layer; give all of them."""
        while len(self.layers) <= layer_idx:
            self.layers.append(CacheLayer(self.max_cache_len))
        return self.layers[layer_idx].append(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The tokens held."""
        return self.layers[layer_idx].length if layer_idx < len(self.layers) else 0

    def get_max_cache_shape(self, layer_idx: int = 0) -> int | None:
        """The tokens there is room for; None: any number."""
        return self.max_cache_len

    get_max_length = get_max_cache_shape

    @property
    def seen_tokens(self) -> int:
        return self.get_seq_length()

    @property
    def key_cache(self) -> list[torch.Tensor | None]:
        return _OfLayers(self.layers, "keys")

    @property
    def value_cache(self) -> list[torch.Tensor | None]:
        return _OfLayers(self.layers, "values")

    def __len__(self) -> int:
        return len(self.layers)

    def __bool__(self) -> bool:
        return True  # an empty cache is a cache

    def __getitem__(self, layer_idx: int) -> Pair:
        layer = self.layers[layer_idx]
        if layer.keys is None or layer.values is None:
            raise KeyError(f"layer {layer_idx} of the cache holds nothing yet")
        return layer.keys, layer.values

    def __iter__(self) -> Iterator[Pair]:
        return (self[index] for index in range(len(self)))

    def to_legacy_cache(self) -> tuple[Pair, ...]:
        """transformers 4's form: a tuple over layers of (keys, values)."""
        return tuple(self)

    def crop(self, max_length: int) -> None:
        """Forget all tokens from place `max_length` on; negative counts from the end."""
        length = self.get_seq_length()
        keep = max_length if max_length >= 0 else max(length + max_length, 0)
        for layer in self.layers:
            layer.crop(keep)

    def reset(self) -> None:
        """Forget all tokens; buffers stay."""
        self.crop(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row beam_idx[i] was."""
        for layer in self.layers:
            layer.select(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, neighbours equal."""
        for layer in self.layers:
            if layer._keys is not None:
                layer.select(torch.arange(len(layer._keys)).repeat_interleave(repeats))


class DynamicCache(Cache):
    """A cache that grows with the text.

    Args:
        ddp_cache_data: layers of (keys, values) to begin with; the tensors are taken over, not copied.
        config: accepted as transformers does; nothing in it is needed.
    """

    def __init__(self, ddp_cache_data: Iterable[Pair] | None = None, config: "LlamaConfig | None" = None):
        super().__init__()
        if hasattr(ddp_cache_data, "hidden_size"):  # 4.x took no data, 5.x's examples pass a configuration first
            ddp_cache_data = None
        for index, (keys, values) in enumerate(ddp_cache_data or ()):
            self.update(keys, values, index)

    @classmethod
    def from_legacy_cache(cls, past_key_values: Iterable[Pair] | None = None) -> Self:
        """A cache of a tuple over layers of (keys, values)."""
        return cls(past_key_values)

    def batch_split(self, full_batch_size: int, split_size: int) -> list[Self]:
        """Caches of `split_size` rows each, in order."""
        starts = range(0, full_batch_size, split_size)
        return [type(self)([(k[i : i + split_size], v[i : i + split_size]) for k, v in self]) for i in starts]


class StaticCache(Cache):
    """A cache of one allocation, for at most `max_cache_len` tokens. Longer texts are an error.

    transformers hands the model all `max_cache_len` places and masks those that are empty; ours hands the tokens it
    holds, so attentions are as wide as the text.

    The buffers are made when the first tokens come, for their rows, dtype and device.

    Args:
        config: the model's.
        max_cache_len: the tokens there is room for.
        batch_size, max_batch_size, device, dtype: accepted as transformers does; the tokens say it themselves.
    """

    def __init__(self, config: "LlamaConfig", max_cache_len: int | None = None, batch_size: int | None = None,
                 device: "torch.device | str | None" = None, dtype: torch.dtype | None = None,
                 max_batch_size: int | None = None):  # fmt: skip
        super().__init__()
        if max_cache_len is None or max_cache_len < 1:
            raise ValueError(f"max_cache_len must be the number of tokens to make room for, got {max_cache_len}")
        self.max_cache_len = max_cache_len
        self.layers = [CacheLayer(max_cache_len) for _ in range(config.num_hidden_layers)]


def as_cache(past_key_values: Any) -> Any:
    """The cache in `past_key_values`: an object that is one already, of ours or of transformers', or a tuple's."""
    layers = getattr(past_key_values, "layers", ())
    if not isinstance(past_key_values, Cache) and any(hasattr(layer, "max_cache_len") for layer in layers):
        raise ValueError("transformers' StaticCache hands over its empty places too; use llama.StaticCache")
    if hasattr(past_key_values, "update") and hasattr(past_key_values, "get_seq_length"):
        return past_key_values
    if isinstance(past_key_values, tuple | list):
        return DynamicCache(past_key_values)
    raise ValueError(f"past_key_values must be a Cache or a tuple of pairs, got {type(past_key_values).__name__}")
