"""`LlamaConfig`: transformers' configuration class, checked by the reference's `Config`."""

import copy
import json
import os
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from . import reference
from .checkpoints import open_checkpoint
from .checkpoints.huggingface import read_json, write_json
from .checkpoints.where import hub_options

if TYPE_CHECKING:
    import torch

# Settings that every transformers configuration has; a file contains those that differ from these defaults.
GENERAL = {
    "architectures": None,
    "attn_implementation": None,
    "is_encoder_decoder": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "problem_type": None,
    "return_dict": True,
    "name_or_path": "",
}
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
ATTENTION = (None, "eager", "sdpa")


class LlamaConfig:
    """The configuration of a LLaMA model: transformers' `LlamaConfig`, in the spellings of both 4.x and 5.x.

    The arguments, their order and their defaults (those of LLaMA 7B) are transformers 4.x's. RoPE may be given as
    `rope_theta` and `rope_scaling` (4.x) or as `rope_parameters` (5.x), the dtype as `torch_dtype` or `dtype`; each can
    be read and set under either name, since they are views of one state. Any other keyword is kept as an attribute and
    written to the file, except a near miss of a field's name, which is rejected as a typo.

    Args:
        num_key_value_heads: None becomes `num_attention_heads`.
        head_dim: None becomes `hidden_size // num_attention_heads`.
        hidden_act: a name that transformers knows, or a function of a tensor, which cannot be saved.
        pretraining_tp: accepted for old files, without effect: slicing the products would give the same result.

    Raises:
        ValueError: a value is invalid; the message names the field. Checked again when a model is built.
    """

    model_type = "llama"
    attribute_map: ClassVar[dict[str, str]] = {}
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]  # a list: Trainer adds to it

    def __init__(
        self,
        vocab_size: int = 32000,
        hidden_size: int = 4096,
        intermediate_size: int = 11008,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        hidden_act: "str | Callable[[torch.Tensor], torch.Tensor]" = "silu",
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        use_cache: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = 1,
        eos_token_id: int | list[int] | None = 2,
        pretraining_tp: int = 1,
        tie_word_embeddings: bool = False,
        rope_theta: float | None = None,
        rope_scaling: dict[str, Any] | None = None,
        attention_bias: bool = False,
        attention_dropout: float = 0.0,
        mlp_bias: bool = False,
        head_dim: int | None = None,
        **kwargs: Any,
    ):
        given = {name: value for name, value in locals().items() if name not in ("self", "kwargs", "__class__")}
        rope = {name: given.pop(name) for name in ("rope_theta", "rope_scaling")}
        rope["rope_parameters"] = kwargs.pop("rope_parameters", None)
        rope["original_max_position_embeddings"] = kwargs.get("original_max_position_embeddings")
        rope["partial_rotary_factor"] = kwargs.get("partial_rotary_factor")
        kind = kwargs.pop("model_type", None)
        if kind not in (None, "llama", self.model_type):  # a subclass may have its own
            raise ValueError(f"model_type is {kind!r}; only {self.model_type!r} models can be read")
        dtype, torch_dtype = kwargs.pop("dtype", None), kwargs.pop("torch_dtype", None)
        self._dtype = _dtype_name(torch_dtype if dtype is None else dtype)
        kwargs["attn_implementation"] = kwargs.pop("_attn_implementation", kwargs.get("attn_implementation"))
        kwargs["name_or_path"] = kwargs.pop("_name_or_path", kwargs.get("name_or_path", ""))
        labels = {name: kwargs.pop(name, None) for name in ("num_labels", "id2label", "label2id")}
        vars(self).update(given)
        self._set_labels(**labels)
        for name, value in (GENERAL | kwargs).items():
            setattr(self, name, value)
        self._check_general()
        known = {"model_type": None if kind is None else "llama"}
        checked = reference.Config.from_dict(kwargs | self._numbers() | rope | known)  # also rejects typos in kwargs
        self.num_key_value_heads, self.head_dim = checked.num_key_value_heads, checked.head_dim
        self.pretraining_tp, self.attention_dropout = checked.pretraining_tp, checked.attention_dropout  # for null
        self._rope = checked.rope_parameters

    if TYPE_CHECKING:
        # the arguments, and any other field of a file
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def checked(self) -> reference.Config:
        """This configuration as the reference's `Config`, which checks it."""
        self._check_general()
        checked = reference.Config(**self._numbers(), rope_parameters=self._rope)
        self.num_key_value_heads, self.head_dim = checked.num_key_value_heads, checked.head_dim
        return checked

    def _numbers(self) -> dict[str, Any]:
        """The fields that the reference has too, except RoPE."""
        names = [field.name for field in fields(reference.Config) if field.name != "rope_parameters"]
        numbers = {name: getattr(self, name) for name in names}
        return numbers | {"hidden_act": "silu"} if callable(self.hidden_act) else numbers

    def _check_general(self) -> None:
        if self.problem_type not in PROBLEM_TYPES:
            raise ValueError(f"problem_type must be one of {PROBLEM_TYPES}, got {self.problem_type!r}")
        if self.attn_implementation not in ATTENTION:
            raise ValueError(
                f"attn_implementation must be one of {ATTENTION}, got {self.attn_implementation!r}; "
                "the kernels are chosen by `backend`"
            )

    # -- RoPE: one state, three names ---------------------------------------------------------------------------------

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """transformers 5's form: `rope_type`, `rope_theta` and the type's parameters, with defaults filled in."""
        return self._rope

    @rope_parameters.setter
    def rope_parameters(self, value: dict[str, Any] | None) -> None:
        self._rope = reference.Config(**self._numbers(), rope_parameters=value or {}).rope_parameters

    @property
    def rope_scaling(self) -> dict[str, Any] | None:
        """transformers 4's form: None, or `rope_type` and its parameters."""
        if self._rope["rope_type"] == "default":
            return None
        return {key: value for key, value in self._rope.items() if key != "rope_theta"}

    @rope_scaling.setter
    def rope_scaling(self, value: dict[str, Any] | None) -> None:
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"rope_scaling must be a dictionary or None, got {value!r}")
        self.rope_parameters = {"rope_theta": self.rope_theta} | (value or {})

    @property
    def rope_theta(self) -> float:
        return self._rope["rope_theta"]

    @rope_theta.setter
    def rope_theta(self, value: float) -> None:
        self.rope_parameters = self._rope | {"rope_theta": value}

    # -- labels and dtype ---------------------------------------------------------------------------------------------

    @property
    def num_labels(self) -> int:
        return len(self.id2label)

    @num_labels.setter
    def num_labels(self, value: int) -> None:
        if value != self.num_labels:
            self._set_labels(num_labels=value)

    def _set_labels(self, num_labels: int | None = None, id2label: dict | None = None, label2id: dict | None = None):
        if id2label is None:
            count = 2 if num_labels is None else num_labels
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise ValueError(f"num_labels must be a positive integer, got {num_labels!r}")
            id2label = {i: f"LABEL_{i}" for i in range(count)}
        elif num_labels is not None and num_labels != len(id2label):
            raise ValueError(f"num_labels is {num_labels}, but id2label has {len(id2label)}; pass only one of them")
        if not isinstance(id2label, dict) or not all(str(number).isdecimal() for number in id2label):
            raise ValueError(f"id2label must be a dictionary from integers to names, got {id2label!r}")
        self.id2label = {int(number): label for number, label in id2label.items()}
        self.label2id = label2id or {label: number for number, label in self.id2label.items()}

    @property
    def dtype(self) -> "torch.dtype | None":
        import torch

        return None if self._dtype is None else getattr(torch, self._dtype)

    @dtype.setter
    def dtype(self, value: "str | torch.dtype | None") -> None:
        self._dtype = _dtype_name(value)

    torch_dtype = dtype

    # -- what libraries expect of a configuration ---------------------------------------------------------------------

    @property
    def use_return_dict(self) -> bool:
        return self.return_dict

    @property
    def _attn_implementation(self) -> str:
        return self.attn_implementation or "sdpa"

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | None) -> None:
        self.attn_implementation = value

    @property
    def _name_or_path(self) -> str:
        return self.name_or_path

    @_name_or_path.setter
    def _name_or_path(self, value: str) -> None:
        self.name_or_path = value

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "LlamaConfig":
        """The configuration itself: the model is text-only."""
        return self

    def update(self, values: dict[str, Any]) -> None:
        """Set attributes from a dictionary."""
        for name, value in values.items():
            setattr(self, name, value)

    # -- loading and saving -------------------------------------------------------------------------------------------

    def _plain(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}

    def to_dict(self) -> dict[str, Any]:
        """All settings, with RoPE in both spellings, ready for JSON (the dtype by name)."""
        data = copy.deepcopy(self._plain())
        rope = copy.deepcopy(self._rope)
        scaling = copy.deepcopy(self.rope_scaling)
        if scaling and "factor" in scaling:
            scaling["factor"] = float(scaling["factor"])  # 4.x warns about an integer
        data |= {"rope_parameters": rope, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
        name = "original_max_position_embeddings"
        if name in rope and (name in data or rope["rope_type"] == "longrope"):  # where 4.x looks for it
            data[name] = rope[name]
        return data | {"model_type": self.model_type, "torch_dtype": self._dtype, "num_labels": self.num_labels}

    def to_diff_dict(self) -> dict[str, Any]:
        """The contents of config.json: the model's own settings, and the general ones that are not defaults."""
        data = self.to_dict()
        if data["id2label"] == {0: "LABEL_0", 1: "LABEL_1"}:
            del data["id2label"], data["label2id"]
        del data["num_labels"]  # implied by id2label
        del data["name_or_path"]  # where it came from, not what it is
        general = GENERAL | {"torch_dtype": None, "pad_token_id": None}
        return {key: value for key, value in data.items() if key not in general or value != general[key]}

    def to_json_string(self, use_diff: bool = True) -> str:
        """The contents of config.json: sorted, indented, with a newline at the end."""
        data = self.to_diff_dict() if use_diff else self.to_dict()
        return json.dumps(self._writable(data), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, path: str | os.PathLike[str], use_diff: bool = True) -> None:
        write_json(Path(path), self._writable(self.to_diff_dict() if use_diff else self.to_dict()))

    def _writable(self, data: dict[str, Any]) -> dict[str, Any]:
        if callable(data["hidden_act"]):
            raise ValueError("hidden_act is a function, which JSON cannot hold; use an activation's name to save it")
        return _string_keys(data)

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Write config.json, which transformers 4.46 and 5.x both read with RoPE intact."""
        if kwargs.get("push_to_hub"):
            raise ValueError("push_to_hub is not supported; save a folder and upload it with huggingface_hub")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / "config.json")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A configuration from a dictionary. Keywords that name its attributes override them; others are unused."""
        if not isinstance(config_dict, dict):
            raise ValueError(f"config_dict must be a dictionary, got {type(config_dict).__name__}")
        config = cls(**config_dict)
        used = {name for name in kwargs if hasattr(config, name)}
        rope = ("rope_parameters", "rope_scaling", "rope_theta")  # last, and in this order: they depend on the rest
        config.update({name: kwargs[name] for name in sorted(used, key=lambda name: (name in rope, name))})
        if used:
            config.checked()
        unused = {name: value for name, value in kwargs.items() if name not in used}
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike[str]) -> "LlamaConfig":
        return cls.from_dict(read_json(Path(json_file)))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, return_unused_kwargs: bool = False, **kwargs: Any):
        """Load the configuration from a folder, a `.gguf` file, an alias, a config.json or a Hugging Face id, of which
        nothing else is downloaded.

        Args:
            kwargs: fields that override the file's; and for the Hub `revision`, `token`, `cache_dir`,
                `local_files_only`, `force_download`, `subfolder`, `gguf_file`.
        """
        where, hub = pretrained_model_name_or_path, hub_options(kwargs)
        is_json = isinstance(where, str | os.PathLike) and str(where).endswith(".json")
        data = read_json(Path(where)) if is_json else open_checkpoint(where, wanted="config", **hub).config
        config, unused = cls.from_dict(data, return_unused_kwargs=True, **kwargs)
        config.name_or_path = str(where if isinstance(where, str | os.PathLike) else where.path)
        return (config, unused) if return_unused_kwargs else config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LlamaConfig) and self.to_diff_dict() == other.to_diff_dict()

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(_string_keys(self.to_diff_dict()), indent=2, default=repr)}"


def _dtype_name(dtype: "str | torch.dtype | None") -> str | None:
    if dtype is None:
        return None
    name = str(dtype).removeprefix("torch.")
    if name not in ("float64", "float32", "float16", "bfloat16"):
        raise ValueError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype!r}")
    return name


def _string_keys(data: dict[str, Any]) -> dict[str, Any]:
    """Make id2label's keys strings, as in JSON; sorting a mix would fail."""
    return {key: {str(k): v for k, v in value.items()} if key == "id2label" else value for key, value in data.items()}
