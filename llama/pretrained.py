"""The models' base class: loading, saving, resizing, tying and pruning. transformers' `PreTrainedModel`."""

import difflib
import inspect
import os
import warnings
from collections.abc import Container, Iterable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from . import ops
from .checkpoints import ALIASES, Checkpoint, open_checkpoint
from .checkpoints.names import FREQUENCIES, find
from .checkpoints.torch_files import as_torch, replaced, save_weights, torch_dtype
from .checkpoints.where import hub_options
from .config import LlamaConfig
from .generation.config import GenerationConfig, own_copy
from .progress import progress

# Keywords of transformers' from_pretrained without effect here: files are always memory-mapped and never executed, and
# a model is on one device.
IDLE = {"low_cpu_mem_usage", "use_safetensors", "trust_remote_code", "weights_only", "resume_download", "_fast_init",
        "offload_folder", "offload_state_dict", "offload_buffers", "max_memory"}  # fmt: skip
# Unsupported keywords, which callers may pass as None.
ABSENT = ("variant", "quantization_config", "device_mesh", "tp_plan", "tp_size")
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HEADS = ("lm_head.", "score.", "qa_outputs.")
LOADING: ContextVar[bool] = ContextVar("loading", default=False)


def device_of_weights() -> torch.device | None:
    """The device on which our modules create their weights: "meta" while loading a checkpoint, which provides them.

    Modules that a subclass adds are created normally, since the checkpoint may lack their weights.
    """
    return torch.device("meta") if LOADING.get() else None


class LlamaPreTrainedModel(ops.Computes, nn.Module):
    """The base class of all models."""

    config_class = LlamaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ("LlamaDecoderLayer",)
    _tied_weights_keys: tuple[str, ...] = ()

    config: LlamaConfig
    generation_config: GenerationConfig

    def __init__(self, config: LlamaConfig):
        super().__init__()
        if not isinstance(config, LlamaConfig):
            more = "; convert it by llama.LlamaConfig.from_dict(config.to_dict())" if hasattr(config, "to_dict") else ""
            raise ValueError(f"config must be a LlamaConfig, got {_class_name(config)}{more}")
        config.checked()  # it may have been modified since it was created
        pad = config.pad_token_id
        if pad is not None and pad >= config.vocab_size:
            raise ValueError(f"pad_token_id ({pad}) must be below vocab_size ({config.vocab_size})")
        self.config = config
        self.gradient_checkpointing = False
        self.gradient_checkpointing_kwargs: dict[str, Any] = {"use_reentrant": False}

    def post_init(self) -> None:
        """Initialise, tie and prune the weights as configured. The last line of every constructor."""
        if self.can_generate():
            self.generation_config = GenerationConfig.from_model_config(self.config)
        if not self.base_model_prefix:
            for layer, heads in (getattr(self.config, "pruned_heads", None) or {}).items():
                self._attention(int(layer)).prune_heads(set(heads))
        if not any(parameter.is_meta for parameter in self.parameters()):
            # the base model has initialised its own
            for name, module in self.named_children():
                if name != self.base_model_prefix:
                    module.apply(self._init_weights)
        self.tie_weights()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal with std `initializer_range` (not truncated); biases and the padding embedding 0, norms 1."""
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                module.weight[module.padding_idx].zero_()

    # -- properties ---------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.float32)

    def set_backend(self, backend: str) -> None:
        """Choose the implementation: "torch", "triton" (a GPU, or a CPU under TRITON_INTERPRET=1), or "auto", which
        uses Triton for tensors on a GPU. When gradients are needed, PyTorch's operations run regardless."""
        ops.check_backend(backend)
        for module in self.modules():
            if isinstance(module, ops.Computes):
                module.backend = backend

    @property
    def base_model(self) -> "LlamaPreTrainedModel":
        """The model without its head."""
        return getattr(self, self.base_model_prefix, self) if self.base_model_prefix else self

    @property
    def name_or_path(self) -> str:
        return self.config.name_or_path

    @property
    def framework(self) -> str:
        return "pt"

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[0, 1 % self.config.vocab_size]], device=self.device)}

    @classmethod
    def can_generate(cls) -> bool:
        return hasattr(cls, "generate")

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """The number of parameters, counting tied ones once."""
        embeddings = {id(self.get_input_embeddings().weight)} if exclude_embeddings else set()
        return sum(
            p.numel() for p in self.parameters() if id(p) not in embeddings and (p.requires_grad or not only_trainable)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the parameters, and by default of the buffers."""
        tensors = [*self.parameters(), *(self.buffers() if return_buffers else ())]
        return sum(t.nbytes for t in tensors)

    def _wants_dict(self, return_dict: bool | None) -> bool:
        return self.config.return_dict if return_dict is None else return_dict

    def set_attn_implementation(self, attn_implementation: str) -> None:
        """Choose the attention implementation: "eager" or "sdpa"."""
        before, self.config.attn_implementation = self.config.attn_implementation, attn_implementation
        try:
            self.config.checked()
        except ValueError:
            self.config.attn_implementation = before
            raise

    # -- embeddings and heads -----------------------------------------------------------------------------------------

    def get_input_embeddings(self) -> nn.Embedding:
        return self.base_model.embed_tokens  # type: ignore[return-value]

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.base_model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear | None:
        """The head that scores the vocabulary, or None."""
        return getattr(self, "lm_head", None)

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        if self.get_output_embeddings() is None:
            raise ValueError(f"{type(self).__name__} has no output embeddings to set")
        self.lm_head = new_embeddings

    def get_decoder(self) -> "LlamaPreTrainedModel":
        return self.base_model

    def set_decoder(self, decoder: "LlamaPreTrainedModel") -> None:
        setattr(self, self.base_model_prefix, decoder)

    def tie_weights(self) -> None:
        """Share the embedding's weight with the head if `config.tie_word_embeddings`, otherwise untie them."""
        head = self.get_output_embeddings()
        if head is None:
            return
        embedding = self.get_input_embeddings()
        if self.config.tie_word_embeddings:
            head.weight = embedding.weight
            head.out_features = embedding.num_embeddings
        elif head.weight is embedding.weight:
            head.weight = nn.Parameter(embedding.weight.detach().clone(), embedding.weight.requires_grad)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """Grow or shrink the vocabulary, embedding and head, to `new_num_tokens`. Return the embedding.

        New rows are the mean of the old ones, so that a new token starts as an average one (Hewitt 2021); transformers
        adds noise of a billionth of the rows' covariance. `mean_resizing=False` draws them as at initialisation.

        Args:
            pad_to_multiple_of: round the number up to a multiple of this, which suits some hardware.
        """
        old = self.get_input_embeddings()
        count = old.num_embeddings if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            if not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1:
                raise ValueError(f"pad_to_multiple_of must be a positive integer, got {pad_to_multiple_of!r}")
            count = -(-count // pad_to_multiple_of) * pad_to_multiple_of
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"new_num_tokens must be a positive integer, got {new_num_tokens!r}")
        if count != old.num_embeddings:
            old.weight = self._resized(old.weight, count, mean_resizing)
            old.num_embeddings = count
            if old.padding_idx is not None and old.padding_idx >= count:
                old.padding_idx = self.config.pad_token_id = None
                vars(self.base_model)["padding_idx"] = None
            head = self.get_output_embeddings()
            if head is not None and not self.config.tie_word_embeddings:
                head.weight = self._resized(head.weight, count, mean_resizing)
                head.out_features = count
        self.config.vocab_size = count
        vars(self)["vocab_size"] = vars(self.base_model)["vocab_size"] = count
        self.tie_weights()
        return old

    @torch.no_grad()
    def _resized(self, weight: torch.Tensor, rows: int, mean: bool) -> nn.Parameter:
        new = weight.new_empty(rows, weight.shape[1])
        shared = min(rows, len(weight))
        new[:shared] = weight[:shared]
        if mean:
            new[shared:] = weight.mean(dim=0, dtype=torch.promote_types(weight.dtype, torch.float32)).to(weight.dtype)
        else:
            new[shared:].normal_(0.0, self.config.initializer_range)
        return nn.Parameter(new, weight.requires_grad)

    def prune_heads(self, heads_to_prune: Mapping[int, Iterable[int]]) -> None:
        """Remove attention heads, {layer: [heads]}, by their original indices even after earlier pruning.

        A key/value head is removed with the last query head of its group. Pruned heads are recorded in
        `config.pruned_heads` and saved with it. (Documented in transformers, where it raises or has been removed.)
        """
        asked = {layer: set(heads) for layer, heads in heads_to_prune.items()}
        layers, legal = range(self.config.num_hidden_layers), range(self.config.num_attention_heads)
        for layer, heads in asked.items():
            if layer not in layers or any(head not in legal for head in heads):
                raise ValueError(
                    f"heads_to_prune names layer {layer}, heads {list(heads)}; valid are layers 0 to {layers[-1]} "
                    f"and heads 0 to {legal[-1]}"
                )
        for layer, heads in asked.items():
            if set(self.base_model._attention(layer).heads) <= heads:
                raise ValueError(f"layer {layer} would be left without any attention head; keep at least one")
        pruned = {int(k): set(v) for k, v in (getattr(self.config, "pruned_heads", None) or {}).items()}
        for layer, heads in asked.items():
            self.base_model._attention(layer).prune_heads(heads)
            pruned[layer] = pruned.get(layer, set()) | heads
        self.config.pruned_heads = {layer: sorted(heads) for layer, heads in sorted(pruned.items())}

    def _attention(self, layer: int) -> Any:
        return self.get_submodule(f"layers.{layer}.self_attn")

    # -- training -----------------------------------------------------------------------------------------------------

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """`gradient_checkpointing_enable` under its name in transformers 5."""
        self.gradient_checkpointing_enable(activation_checkpointing_kwargs, every_n_layers, offload)

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: dict[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Keep only the layers' inputs while training and recompute the rest, to save memory. Disables the cache.

        Args:
            gradient_checkpointing_kwargs: for `torch.utils.checkpoint.checkpoint`.
            every_n_layers, offload: transformers 5 can skip layers and offload inputs to the CPU; here all layers are
                recomputed and nothing is offloaded.
        """
        if every_n_layers != 1 or offload:
            raise ValueError("every layer is recomputed and nothing is offloaded; leave out every_n_layers and offload")
        base = self.base_model
        base.gradient_checkpointing = True
        base.gradient_checkpointing_kwargs = {"use_reentrant": False} | (gradient_checkpointing_kwargs or {})

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.gradient_checkpointing = False

    def activation_checkpointing_disable(self) -> None:
        self.gradient_checkpointing_disable()

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.base_model.gradient_checkpointing

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.is_gradient_checkpointing

    def enable_input_require_grads(self) -> None:
        """Make the embedding's output require gradients even if its weight is frozen, as adapters need."""
        self.disable_input_require_grads()
        self._input_grads_hook = self.get_input_embeddings().register_forward_hook(
            lambda module, inputs, output: output.requires_grad_(True)
        )

    def disable_input_require_grads(self) -> None:
        if hook := vars(self).pop("_input_grads_hook", None):
            hook.remove()

    # -- loading and saving -------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: LlamaConfig, **kwargs: Any) -> Self:
        """A newly initialised model in the configuration's dtype; keywords override its fields."""
        config, unused = cls._configuration(config, _meant(kwargs))
        if unused:
            raise ValueError(f"from_config has no argument {sorted(unused)[0]}")
        model = cls(config)
        return model if config.dtype is None else model.to(config.dtype)

    _from_config = from_config

    @classmethod
    def _configuration(cls, config: Any, fields: dict[str, Any]) -> tuple[LlamaConfig, dict[str, Any]]:
        """Return a copy of `config` (ours, transformers' or a file's dictionary) with `fields` overriding its own, and
        those of `fields` that it does not have. Its class stays if it is ours, and is this model's otherwise."""
        kind = type(config) if isinstance(config, LlamaConfig) else cls.config_class
        said = config if isinstance(config, dict) else config.to_dict()
        return kind.from_dict(said, return_unused_kwargs=True, **fields)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: "str | os.PathLike[str] | Checkpoint",
        *,
        config: Any = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        backend: str = "auto",
        torch_dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        generation_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a model from a folder (safetensors or .bin, sharded or not, or Meta's consolidated.*.pth), a `.gguf`
        file, a Hugging Face id or an alias, in eval mode.

        Weights that the file stores in the requested dtype are memory-mapped, not copied: nothing is held twice, and
        pages are read on first use.

        Args:
            config: a `LlamaConfig` (or transformers') to use instead of the file's.
            dtype: of the weights; "auto", the default, is the file's. `torch_dtype` is transformers 4's name.
            device: the target device; a `device_map` with one device ("auto", "cpu", {"": "cuda:0"}) works too.
            backend: see `set_backend`.
            ignore_mismatched_sizes: reinitialise weights whose shape differs from the file's, instead of raising.
            output_loading_info: return (model, {"missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"}).
            state_dict: weights to use instead of the file's.
            generation_config: options of `generate` to use instead of the file's.
            kwargs: configuration fields that override the file's; extra arguments of a subclass's constructor; and for
                the Hub `revision`, `token`, `cache_dir`, `local_files_only`, `force_download`, `subfolder`,
                `gguf_file`, as explained in `llama.checkpoints.find`.

        A head that the file lacks is newly initialised, with a warning, and so is anything that a subclass adds. Base
        models and models with a head read each other's files.

        Raises:
            ValueError, OSError: a file, a tensor or an argument is missing, damaged or invalid; the message names it.
        """
        ops.check_backend(backend)
        where, hub, kwargs = pretrained_model_name_or_path, hub_options(kwargs), _meant(kwargs)
        checkpoint = open_checkpoint(where, wanted="parameters", **hub)
        if config is not None and not hasattr(config, "to_dict"):
            raise ValueError(f"config must be a LlamaConfig, got {_class_name(config)}")
        config, unused = cls._configuration(checkpoint.config if config is None else config, kwargs)
        taken = inspect.signature(cls.__init__).parameters  # a subclass's constructor may take more arguments
        more = {name: unused.pop(name) for name in taken if name in unused}
        if unused:
            name = sorted(unused)[0]
            near = difflib.get_close_matches(name, [*vars(config), "dtype", "device", "backend", "device_map"], n=1)
            raise ValueError(f"from_pretrained has no argument {name}" + (f"; did you mean {near[0]}?" if near else ""))
        config.name_or_path = str(where if isinstance(where, str) and where not in ALIASES else checkpoint.path)
        tensors = _Tensors(checkpoint, state_dict, cls.base_model_prefix)
        wanted = _wanted_dtype(torch_dtype if dtype is None else dtype, config, tensors)
        if config.num_hidden_layers > max(len(tensors.stored), 1000):
            raise ValueError(
                f"{checkpoint.path}: the configuration asks for {config.num_hidden_layers} layers, and the file holds "
                f"{len(tensors.stored)} tensors. Correct its configuration, or download it again."
            )
        before = LOADING.set(True)
        try:
            model = cls(config, **more)
        except RuntimeError as error:  # more elements than 63 bits can count
            raise ValueError(f"{checkpoint.path}: the configuration asks for too large a model ({error})") from error
        finally:
            LOADING.reset(before)
        info = model._load(tensors, wanted, _one_device(device, device_map), ignore_mismatched_sizes)
        if info["missing_keys"] and not output_loading_info:
            _judge_missing(checkpoint.path, cls, info["missing_keys"], tensors)
        extra = [name for name in info["unexpected_keys"] if not name.startswith(HEADS)]
        if extra and not output_loading_info:
            warnings.warn(f"{checkpoint.path}: {len(extra)} tensors are not used, among them {extra[0]}", stacklevel=2)
        config.dtype = wanted
        model.set_backend(backend)
        if model.can_generate() and generation_config is not None:
            model.generation_config = own_copy(generation_config)
        elif model.can_generate() and checkpoint.generation_config:
            model.generation_config = GenerationConfig.from_dict(checkpoint.generation_config)
        model.eval()
        return (model, info) if output_loading_info else model

    def _load(self, tensors: "_Tensors", dtype: torch.dtype, device: torch.device, ignore_mismatched: bool) -> dict:
        """Load the tensors into the parameters and buffers; initialise the missing parameters."""
        files = tensors.stored
        head, embedding = (tensors.find(n) for n in ("lm_head.weight", f"{self.base_model_prefix}.embed_tokens.weight"))
        ties = self._tied_weights_keys and self.config.tie_word_embeddings
        if ties and head and embedding and not _equal(tensors.read(head), tensors.read(embedding)):
            warnings.warn("lm_head.weight differs from the embedding, so they are not tied", stacklevel=4)
            self.config.tie_word_embeddings = False
            self.lm_head.weight = nn.Parameter(torch.empty_like(self.lm_head.weight))
        kept = self.state_dict(keep_vars=True)
        parameters, buffers = dict(self.named_parameters()), dict(self.named_buffers())
        first: dict[int, str] = {}
        places = {name: [name] for name in buffers}  # a subclass may use one parameter under several
        for name, parameter in self.named_parameters(remove_duplicate=False):
            places.setdefault(first.setdefault(id(parameter), name), []).append(name)
        wanted = parameters | {name: buffer for name, buffer in buffers.items() if name in kept}
        found: dict[str, str] = {}
        taken: set[str] = set()
        for name in sorted(wanted, key=lambda name: not tensors.is_body(name)):
            if (file := tensors.find(name, taken)) is not None:
                found[name] = file
                taken.add(file)
        missing, mismatched = [name for name in wanted if name not in found], []
        for name, file in list(found.items()):
            was, now = torch.Size(files[file].shape), wanted[name].shape
            if name in parameters and tensors.dtype(file) not in FLOATS:
                kind = str(tensors.dtype(file)).removeprefix("torch.")
                raise ValueError(
                    f"{tensors.checkpoint.path}: {file} is stored as {kind}; quantised models are not supported"
                )
            if was != now and not ignore_mismatched:
                raise ValueError(
                    f"size mismatch for {name}: the file holds {tuple(was)}, the configuration asks for {tuple(now)}. "
                    "Correct the configuration or download the model again; in Python, ignore_mismatched_sizes=True "
                    "reinitialises such weights"
                )
            if was != now:
                mismatched.append((name, was, now))
                del found[name]

        drawn = [name for name in parameters if name not in found]
        for name in drawn:
            tensor: torch.Tensor = parameters[name]
            if tensor.is_meta:  # one of our own; `_init_weights` initialises all but the norms
                fill = torch.zeros if name.endswith("bias") else torch.ones
                tensor = fill(tensor.shape, dtype=dtype, device=device)
            self._put(places[name], tensor, dtype, device)
        for module in {self.get_submodule(name.rpartition(".")[0]): None for name in drawn}:
            self._init_weights(module)
        for name, file in progress(list(found.items()), "loading", "tensors"):
            self._put(places[name], tensors.read(file), dtype, device)
        for name in buffers.keys() - found.keys():
            self._put(places[name], buffers[name], dtype, device)
        self.tie_weights()
        taken.update(*(names[1:] for names in places.values()))
        if self.config.tie_word_embeddings:
            taken.add("lm_head.weight")
        unexpected = sorted(file for file in files if file not in taken and not file.endswith(FREQUENCIES))
        return {
            "missing_keys": missing,
            "unexpected_keys": unexpected,
            "mismatched_keys": mismatched,
            "error_msgs": [],
        }

    def _put(self, names: list[str], tensor: torch.Tensor, dtype: torch.dtype, device: torch.device) -> None:
        """Replace a parameter or buffer, under all its names, by a tensor as `.to(device, dtype)` would leave it."""
        places = [(self.get_submodule(owner), leaf) for owner, _, leaf in (name.rpartition(".") for name in names)]
        old = getattr(*places[0])
        keeps_dtype = places[0][1] == "inv_freq" or not tensor.is_floating_point()
        new = tensor.to(device, tensor.dtype if keeps_dtype else dtype)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, old.requires_grad)
        for module, leaf in places:
            setattr(module, leaf, new)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        max_shard_size: int | str = "5GB",
        safe_serialization: bool = True,
        **kwargs: Any,
    ) -> None:
        """Save config.json, generation_config.json and the weights to a folder that transformers 4 and 5 can load.

        Files are moved into place once all are complete; earlier weights under other names are then deleted.

        Args:
            max_shard_size: split the weights into files of at most this size: bytes, or "200MB", "5GB".
            safe_serialization: write safetensors; False writes pytorch_model.bin.
            state_dict: weights to save instead, under this model's names.
        """
        if kwargs.pop("push_to_hub", False):
            raise ValueError("push_to_hub is not supported; save a folder and upload it with huggingface_hub")
        for name in ("save_function", "variant", "token", "save_peft_format"):
            if kwargs.pop(name, None) not in (None, True, torch.save):
                raise ValueError(f"save_pretrained does not support {name}; leave it out")
        if kwargs:
            raise ValueError(f"save_pretrained has no argument {sorted(kwargs)[0]}")
        if not is_main_process:
            return
        folder = Path(save_directory)
        if folder.is_file():
            raise ValueError(f"{folder} is a file; save_directory must be a folder")
        tensors = dict(self.state_dict() if state_dict is None else state_dict)
        if self.config.tie_word_embeddings:
            embedding = next((t for name, t in tensors.items() if name.endswith("embed_tokens.weight")), None)
            for name in self._tied_weights_keys:
                head = tensors.get(name)
                if head is not None and embedding is not None and _equal(head, embedding):
                    del tensors[name]
        config = type(self.config).from_dict(self.config.to_dict())
        config.architectures, config.dtype = [type(self).__name__], self.dtype
        with replaced(folder) as partial:
            config.save_pretrained(partial)
            if self.can_generate():
                self.generation_config.save_pretrained(partial)
            save_weights(tensors, partial, max_shard_size, safe_serialization)


def _meant(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords that have an effect here."""
    return {
        name: value for name, value in kwargs.items() if name not in IDLE and not (name in ABSENT and value is None)
    }


class _Tensors:
    """The tensors of a checkpoint or state dict, looked up by the names of a model with this prefix."""

    def __init__(self, checkpoint: Checkpoint, state_dict: Mapping[str, torch.Tensor] | None, prefix: str):
        self.checkpoint, self.state_dict = checkpoint, state_dict
        self.stored: Mapping[str, Any] = checkpoint.tensors if state_dict is None else state_dict
        self.prefix = prefix and f"{prefix}."

    def is_body(self, name: str) -> bool:
        """Whether a parameter of this name belongs to the base model."""
        return name.startswith(self.prefix)

    def is_llamas(self, name: str) -> bool:
        """Whether every Llama's base model has it, unlike, say, an adapter added to a layer."""
        return self.is_body(name) and find("model." + name.removeprefix(self.prefix), "hugging_face") is not None

    def find(self, name: str, taken: Container[str] = ()) -> str | None:
        """A parameter's name in the file, or None: base models and those with a head read each other's files."""
        names, inside = [name], name.removeprefix(self.prefix)
        if self.is_body(name):
            prefixes = (self.prefix, "model.", "transformer.", "") if self.prefix else ("model.", "transformer.", "")
            names = [prefix + inside for prefix in prefixes]
        return next((name for name in names if name in self.stored and name not in taken), None)

    def read(self, name: str) -> torch.Tensor:
        return as_torch(self.checkpoint.read(name)) if self.state_dict is None else self.state_dict[name]

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype, without reading it."""
        return torch_dtype(self.stored[name].dtype) if self.state_dict is None else self.state_dict[name].dtype


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def _class_name(value: Any) -> str:
    """The name of its class, with the module if it has the same name as ours."""
    kind = type(value)
    return f"{kind.__module__}.{kind.__name__}" if kind.__name__ == LlamaConfig.__name__ else kind.__name__


def _judge_missing(path: Path, cls: type, missing: list[str], tensors: _Tensors) -> None:
    """Warn about a missing head or a subclass's additions, which a base model's file lacks; raise for anything else."""
    body = [name for name in missing if tensors.is_llamas(name)]
    if body:
        more = f" and {len(body) - 1} others" if len(body) > 1 else ""
        raise ValueError(
            f"{path}: the tensor {body[0]} is missing{more}. Correct its configuration, or download it again."
        )
    more = f" and {len(missing) - 4} others" if len(missing) > 4 else ""
    warnings.warn(
        f"{path} has no {', '.join(missing[:4])}{more}: {cls.__name__} initialises them, and they must be trained",
        stacklevel=3,
    )


def _wanted_dtype(asked: str | torch.dtype | None, config: LlamaConfig, tensors: _Tensors) -> torch.dtype:
    if asked not in (None, "auto"):
        config.dtype = asked
    if config.dtype is not None:
        return config.dtype
    dtypes = map(tensors.dtype, tensors.stored)
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)


def _one_device(device: Any, device_map: Any) -> torch.device:
    if isinstance(device_map, Mapping):
        places = set(map(str, device_map.values()))
        if len(places) != 1:
            raise ValueError(f'device_map must name one device, {{"": device}}; got {dict(device_map)}')
        device_map = next(iter(device_map.values()))
    if device is not None and device_map is not None:
        raise ValueError("device and device_map mean the same; pass only one of them")
    where = device if device_map is None else device_map
    if where in ("auto", "balanced", "sequential"):
        where = "cuda" if torch.cuda.is_available() else "cpu"
    where = "cpu" if where is None else where
    try:
        found = torch.device(where)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be one that PyTorch knows, got {where!r}: {error}") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {where!r}, but PyTorch finds no GPU; use 'cpu'")
    return found
