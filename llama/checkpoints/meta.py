"""Folders in Meta's layout: consolidated.00.pth, consolidated.01.pth ... (the shards), params.json, tokenizer.model.

It differs from Hugging Face's layout in the tensor names, in splitting each tensor (except the norms) across all
shards, and in the rows of q and k, which are interleaved pairs. params.json says less than config.json: the rest is
inferred from the shapes and from what is known of each version.
"""

import re
from collections.abc import Mapping
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from ..reference import Config, parameter_shapes
from ..reference.rope import deinterleave
from . import names
from .huggingface import MANIFEST, HuggingFaceFolder, check_whole, read_json
from .names import HEAD
from .pickles import TorchZip
from .stored import Stored, dtype_of, release

PARAMS = "params.json"
CONTEXT = "max_position_embeddings"  # in conversion.json
SHARD = re.compile(r"consolidated\.(\d+)\.pth")

# Billions of parameters and number of shards, by the names used in Meta's and transformers' scripts.
SIZES = {"1B": (1.24, 1), "3B": (3.21, 1), "7B": (6.74, 1), "8B": (8.03, 1), "13B": (13.02, 2), "30B": (32.5, 4),
         "34B": (33.7, 4), "65B": (65.3, 8), "70B": (69.8, 8), "405B": (405.9, 8),
         "405B-MP16": (405.9, 16)}  # fmt: skip
LENGTHS = {"1": 2048, "2": 4096, "3": 8192, "3.1": 131072, "3.2": 131072, "Guard-3": 131072}
CODE_LENGTH = 16384  # Code Llama's, recognised by its rope_theta
FACTORS = {"3.1": 8.0, "3.2": 32.0, "Guard-3": 8.0}  # default factors of the scaled RoPE
LLAMA3_THETA, LLAMA3_VOCABULARY = 500000.0, 100_000  # Llama 3 has 128256 tokens, earlier versions 32000


class Part(NamedTuple):
    """How the shards hold a tensor: Meta's name, the axis it is split along (None: every shard has the whole tensor),
    and how many consecutive shards hold the same part."""

    name: str
    axis: int | None
    copies: int


class MetaFolder:
    """A `Checkpoint` in a folder, read without torch. Tensors are assembled from memory-mapped shards as they are read.

    Args:
        path: the folder with params.json; or its parent, which holds tokenizer.model and the model's folder.
        model_size, llama_version, num_shards: what the files should contain, as in transformers' script: "7B", "3.1",
            1. The files are checked against it. llama_version also decides where the files are ambiguous.
        instruct: whether a Llama 3 is an instruct model, which has more eos tokens. The files do not say; by default,
            the name of the folder or repository decides.

    Raises:
        ValueError, OSError: a file is missing, damaged or not as expected; the message names it.
    """

    def __init__(
        self,
        path: Path,
        model_size: str | None = None,
        llama_version: str | None = None,
        num_shards: int | None = None,
        instruct: bool | None = None,
    ):
        if not path.is_dir():
            raise ValueError(
                f"{path} is not a folder of Meta's files, the only kind that model_size, llama_version, num_shards and "
                "instruct apply to; leave these out, or give a folder that holds consolidated.00.pth"
            )
        self.path = _model_folder(path, model_size)
        if llama_version is not None and llama_version not in LENGTHS:
            raise ValueError(f"llama_version must be one of {', '.join(LENGTHS)}, got {llama_version!r}")
        self._said_version = llama_version
        self.instruct = called_instruct(self.path) if instruct is None else instruct
        self.files = _shard_files(self.path)
        size = _size(model_size)
        for name, wanted in (("num_shards", num_shards), ("model_size", size and size[1])):
            if wanted is not None and wanted != len(self.files):
                given = model_size if name == "model_size" else num_shards
                raise ValueError(
                    f"{self.path} holds {len(self.files)} shard{'s' * (len(self.files) != 1)}; {name} {given} means "
                    f"{wanted}. "
                    "Correct it or leave it out, or download the missing shards"
                )
        count = sum(self.tensors[n].size for n in self.tensors if n != HEAD or not self._tied) / 1e9 if size else 0.0
        if size and abs(count / size[0] - 1) > 0.03:
            held = f"{count:.2f} billion" if count > 0.1 else f"{count * 1e9:,.0f}"
            raise ValueError(
                f"{self.path} holds {held} parameters, but model_size {model_size} means {size[0]} billion; "
                "correct it or leave it out"
            )

    @cached_property
    def params(self) -> dict[str, Any]:
        """The contents of params.json."""
        if not (self.path / PARAMS).exists():
            check_whole(self.path)
        return read_json(self.path / PARAMS, hint="Meta's checkpoints have it next to their consolidated.*.pth")

    @cached_property
    def _context(self) -> int | None:
        """The context length that `llama convert` recorded; Meta's own code would reject it in params.json."""
        try:
            length = read_json(self.path / MANIFEST).get(CONTEXT)
        except (ValueError, OSError):
            return None
        return length if type(length) is int and 0 < length < 2**31 else None

    @cached_property
    def _shards(self) -> list[TorchZip]:
        shards = [TorchZip(path) for path in self.files]
        for number, shard in enumerate(shards):
            written = SHARD.fullmatch(f"{shard.folder}.pth")
            if written and int(written[1]) != number:
                raise ValueError(
                    f"{shard.path} was written as {written[0]}: the shards have been renamed; rename them back, or "
                    "download them again"
                )
        return shards

    @cached_property
    def version(self) -> str:
        """The given LLaMA version, else "1" (float16), "2" (also Code Llama), "3", "3.1" or "3.2" (tied)."""
        scaled = self.params.get("use_scaled_rope")
        third = bool(scaled) or self._theta == LLAMA3_THETA or self._vocab_size > LLAMA3_VOCABULARY
        if scaled:
            found = ["3.2", "3.1"] if self._tied else ["3.1", "3.2"]
        elif third or (self._embedding_axis == 0 and len(self.files) > 1):
            found = ["3"]
        else:
            half = self._first("tok_embeddings.weight").dtype == np.float16
            found = ["1", "2"] if half and "n_kv_heads" not in self.params else ["2", "1"]
        legal = set(found) | ({"Guard-3"} if scaled else set())
        if scaled is None and third:
            legal |= {"3", *FACTORS}  # the files are ambiguous, so the given version decides
        if self._said_version not in (None, *legal):
            raise ValueError(
                f"{self.path} holds LLaMA {' or '.join(sorted(legal))} according to its vocabulary and {PARAMS}, "
                f"not {self._said_version}; correct llama_version or leave it out"
            )
        return self._said_version or found[0]

    @cached_property
    def config(self) -> dict[str, Any]:
        params, shards = self.params, len(self.files)
        width, heads, vocab_size = self._number("dim"), self._number("n_heads"), self._vocab_size
        q, k = self._first("layers.0.attention.wq.weight"), self._first("layers.0.attention.wk.weight")
        head_dim = self._number("head_dim", q.shape[0] * shards // heads)
        kv_heads = self._number("n_kv_heads", max(k.shape[0] * shards // max(head_dim, 1), 1))
        intermediate = self._first("layers.0.feed_forward.w1.weight").shape[0] * shards
        self._check_intermediate(width, intermediate)
        third = self.version not in ("1", "2")
        length = CODE_LENGTH if self._theta > 1e4 and not third else LENGTHS[self.version]
        scaling = None
        if self.version in FACTORS:
            scaling = {
                "rope_type": "llama3",
                "factor": params.get("rope_scaling_factor", FACTORS[self.version]),
                "low_freq_factor": 1.0,
                "high_freq_factor": params.get("rope_high_freq_factor", 4.0),
                "original_max_position_embeddings": 8192,
            }
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": vocab_size,
            "hidden_size": width,
            "intermediate_size": intermediate,
            "num_hidden_layers": self._number("n_layers"),
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self._number("max_seq_len", self._context or length),
            "rms_norm_eps": params.get("norm_eps", 1e-5),
            "attention_bias": "layers.0.attention.wq.bias" in self._shards[0].tensors,
            "mlp_bias": "layers.0.feed_forward.w1.bias" in self._shards[0].tensors,
            "tie_word_embeddings": self._tied,
            **self._ends,
            # transformers 4 reads the first two, transformers 5 the third
            "rope_theta": self._theta,
            "rope_scaling": scaling,
            "rope_parameters": {"rope_theta": self._theta} | (scaling or {"rope_type": "default"}),
            "torch_dtype": dtype_of(t for t in self._shards[0].tensors.values() if len(t.shape) == 2).name,
        }

    @property
    def generation_config(self) -> dict[str, Any]:
        """The sampling settings of Meta's own examples."""
        return {"do_sample": True, "temperature": 0.6, "top_p": 0.9, **self._ends}

    @property
    def _ends(self) -> dict[str, Any]:
        """The bos and eos tokens; None where the vocabulary is too small to contain them."""
        first, last = (1, [2]) if self.version in ("1", "2") else (128000, [128001])
        known = [end for end in last + [128008, 128009] * self.instruct if end < self._vocab_size]
        return {
            "bos_token_id": first if first < self._vocab_size else None,
            "eos_token_id": known if len(known) > 1 else known[0] if known else None,
        }

    @cached_property
    def tensors(self) -> Mapping[str, Stored]:
        return {name: stored for name, (_, stored) in self._layout.items()}

    def read(self, name: str) -> np.ndarray:
        part, stored = self._layout[name]
        shards = self._shards[:: part.copies]
        pieces = [shard.read(part.name) for shard in shards]
        self._check_copies(name, part, pieces)
        heads = names.rotated_heads(name, self.config)
        if part.axis is None or (len(shards) == 1 and heads is None):
            return pieces[0]
        out, start = np.empty(stored.shape, stored.dtype), 0
        for piece in pieces:
            end = start + piece.shape[part.axis]
            place = (slice(None),) * part.axis + (slice(start, end),)
            out[place] = piece if heads is None else deinterleave(piece, heads // len(pieces))
            release(piece)
            start = end
        return out

    def tokenizer(self) -> tuple[Tokenizer, dict[str, Any]]:
        from ..tokenization import LlamaTokenizerFast

        if self.only_tokenizer_json:
            return HuggingFaceFolder(self.path).tokenizer()
        return LlamaTokenizerFast.from_pretrained(self.tokenizer_model, llama_version=self.version).contents()

    @property
    def only_tokenizer_json(self) -> bool:
        """Whether the folder has Hugging Face's tokenizer.json but no tokenizer.model."""
        return (self.path / "tokenizer.json").exists() and not (self.path / "tokenizer.model").exists()

    @property
    def tokenizer_model(self) -> Path:
        """The file tokenizer.model, next to params.json or, as for LLaMA 1, in the parent folder."""
        path = self.path / "tokenizer.model"
        above = self.path.absolute().parent / path.name
        if not path.exists() and not above.exists():
            raise FileNotFoundError(f"{path} does not exist, nor does {above}: the tokenizer is read from one of them")
        return path if path.exists() else above

    # -- what the files say -------------------------------------------------------------------------------------------

    def _number(self, name: str, default: int | None = None) -> int:
        value = self.params.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise ValueError(f"{self.path / PARAMS}: {name} must be a positive integer, got {value!r}")
        return value

    def _first(self, name: str) -> Stored:
        """The first shard's part of a matrix."""
        stored = self._shards[0].tensors.get(name)
        if stored is None:
            raise ValueError(f"{self.files[0]} lacks the tensor {name}; it is not one of Meta's models, or damaged")
        if len(stored.shape) != 2:
            raise ValueError(f"{self.files[0]}: {name} has shape {stored.shape}; it should be a matrix")
        return stored

    @property
    def _theta(self) -> float:
        value = self.params.get("rope_theta", 10000.0)
        if not isinstance(value, int | float):
            raise ValueError(f"{self.path / PARAMS}: rope_theta must be a number, got {value!r}")
        return float(value)

    @cached_property
    def _embedding_axis(self) -> int:
        """Llama 1 and 2 split the embedding along its width, Llama 3 along the vocabulary."""
        width, shards = self._number("dim"), len(self.files)
        shape = self._first("tok_embeddings.weight").shape
        if shape[1] == width:
            return 0
        if shape[1] * shards == width:
            return 1
        likely = ""
        if shape[1] and width % shape[1] == 0:
            likely = f" It would fit {width // shape[1]} shards: {self._missing(width, shape[1] * shards)}."
        raise ValueError(
            f"{self.files[0]}: tok_embeddings.weight has shape {shape}, which does not fit {shards} shard(s) and "
            f"a dim of {width} in {PARAMS}.{likely}"
        )

    @cached_property
    def _vocab_size(self) -> int:
        shape = self._first("tok_embeddings.weight").shape
        found = shape[0] * len(self.files) if self._embedding_axis == 0 else shape[0]
        said = self.params.get("vocab_size", -1)
        if said not in (-1, None, found):
            raise ValueError(
                f"{self.path}: {len(self.files)} shard(s) hold an embedding of {found} tokens, but {PARAMS} says "
                f"{said!r}; {self._missing(said, found)}"
            )
        return found

    @cached_property
    def _tied(self) -> bool:
        """Whether the head is tied: it is absent, or its first rows equal the embedding's (the rest is not read)."""
        head = self._shards[0].tensors.get("output.weight")
        if head is None:
            return True
        if head != self._first("tok_embeddings.weight"):
            return False
        rows, same = (self._shards[0].read(name)[:8] for name in ("output.weight", "tok_embeddings.weight"))
        return bool(rows.any()) and np.array_equal(rows, same)

    def _check_intermediate(self, width: int, found: int) -> None:
        """Check the width of the MLP against Meta's formula."""
        if "multiple_of" not in self.params:
            return
        multiple, factor = self._number("multiple_of"), self.params.get("ffn_dim_multiplier")
        if factor is not None and (not isinstance(factor, int | float) or not 0 < factor < 1e6):
            raise ValueError(f"{self.path / PARAMS}: ffn_dim_multiplier must be a positive number, got {factor!r}")
        expected = intermediate_size(width, multiple, factor)
        if expected != found:
            raise ValueError(
                f"{self.path}: {len(self.files)} shard(s) hold an MLP of width {found}, but {PARAMS} implies "
                f"{expected}; {self._missing(expected, found)}"
            )

    def _missing(self, whole: Any, found: int) -> str:
        """Which shards are probably missing if those present hold `found` of something instead of `whole`."""
        if isinstance(whole, int) and found and whole > found and whole * len(self.files) % found == 0:
            return f"consolidated.{len(self.files):02}.pth is missing, or {PARAMS} is another model's"
        return f"a shard is missing, or {PARAMS} is another model's"

    # -- the layout of the shards -------------------------------------------------------------------------------------

    @cached_property
    def _layout(self) -> dict[str, tuple[Part, Stored]]:
        """How each tensor is split, and its full dtype and shape, by Hugging Face's name. Checks all shards.

        Raises:
            ValueError: a shard lacks a tensor, or has an unexpected one or one of the wrong shape or dtype.
        """
        fields = self.config
        try:
            config = Config.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"{self.path / PARAMS}: {error}") from error
        shards, layout = len(self.files), {}
        known = {"rope.freqs"}
        tied_head = config.tie_word_embeddings and "output.weight" in self._shards[0].tensors
        head = [(HEAD, (config.vocab_size, config.hidden_size))] * tied_head
        for name, shape in chain(parameter_shapes(config), head):
            part = self._part(name, config)
            known.add(part.name)
            cut = shards // part.copies
            if part.axis is not None and (
                shape[part.axis] % cut or (names.rotated_heads(name, self.config) or cut) % cut
            ):
                raise ValueError(f"{self.path}: {part.name} of shape {shape} cannot be split into {shards} equal parts")
            expected = tuple(n // cut if axis == part.axis else n for axis, n in enumerate(shape))
            for shard in self._shards:
                stored = shard.tensors.get(part.name)
                if stored is None:
                    raise ValueError(f"{shard.path}: the tensor {part.name} is missing; download it again")
                dtype = self._shards[0].tensors[part.name].dtype
                if stored.shape != expected or stored.dtype != dtype:
                    raise ValueError(
                        f"{shard.path}: {part.name} is {stored.dtype} of shape {stored.shape}; {PARAMS} and {shards} "
                        f"shard(s) ask for {dtype} of {expected}. A shard is missing or from another model"
                    )
            layout[name] = part, Stored(dtype, shape)
        for shard in self._shards:
            frequencies = shard.tensors.get("rope.freqs")
            if frequencies is not None and 2 * frequencies.size != config.head_dim:
                raise ValueError(
                    f"{shard.path}: rope.freqs is for heads of size {2 * frequencies.size}, but {PARAMS} gives "
                    f"{config.head_dim}; its n_heads is wrong, or it is another model's"
                )
        for shard in self._shards:
            if unknown := sorted(
                n for n in shard.tensors.keys() - known if not n.endswith(".inner_attention.rope.freqs")
            ):
                raise ValueError(
                    f"{shard.path} holds {unknown[0]}, which a LLaMA with num_hidden_layers "
                    f"{config.num_hidden_layers} does not have"
                )
        return layout

    def _part(self, name: str, config: Config) -> Part:
        found, shards = names.find(name, "hugging_face"), len(self.files)
        assert found is not None  # the table has every tensor of LLaMA
        row, _, kind = found
        meta = names.rename(name, "hugging_face", "meta")
        assert meta is not None
        axis = self._embedding_axis if row.meta == "tok_embeddings" else row.axis
        if kind == ".bias" and axis == 1:
            axis = None
        shared = row.meta in ("attention.wk", "attention.wv") and config.num_key_value_heads < shards
        return Part(meta, axis, shards // config.num_key_value_heads if shared else 1)

    def _check_copies(self, name: str, part: Part, pieces: list[np.ndarray]) -> None:
        """Check that the copies of a part in several shards are equal; if not, the shards are of different models."""
        if part.copies > 1 or part.axis is None:
            for number, shard in enumerate(self._shards):
                kept = pieces[0 if part.axis is None else number // part.copies]
                copy = shard.read(part.name)
                if not np.array_equal(kept.view(f"u{kept.itemsize}"), copy.view(f"u{kept.itemsize}")):
                    raise ValueError(
                        f"{shard.path} holds another {part.name} than the shards before it; they are from different "
                        "models"
                    )
                if not np.shares_memory(kept, copy):
                    release(copy)


def intermediate_size(dim: int, multiple_of: int, multiplier: float | None) -> int:
    """Meta's formula for the width of the MLP: ⌈f · ⌊8/3 · dim⌋ / m⌉ · m, with f and m from params.json."""
    width = int(8 * dim / 3)
    width = width if multiplier is None else int(multiplier * width)
    return -(-width // multiple_of) * multiple_of


def is_meta(path: Path) -> bool:
    """Whether a folder is in Meta's layout: it has shards or params.json, or a subfolder has params.json."""
    here = any(SHARD.fullmatch(file.name) for file in path.iterdir())
    if here or (path / "config.json").exists():
        return here
    return (path / PARAMS).exists() or bool(_folders_below(path))


def _folders_below(path: Path) -> list[Path]:
    return sorted(file.parent for file in path.glob(f"*/{PARAMS}"))


def _model_folder(path: Path, model_size: str | None) -> Path:
    """`path`, or its subfolder with params.json: the one named after the size, or the only one."""
    if (path / PARAMS).exists():
        return path
    below = _folders_below(path)
    named = [folder for folder in below if folder.name == model_size]
    if len(below) > 1 and not named:
        listed = ", ".join(folder.name for folder in below)
        raise ValueError(f"{path} holds several models; give the folder of one of them: {listed}")
    return (named or below or [path])[0]


def called_instruct(folder: Path) -> bool:
    """Whether the folder's name, or in the Hub's cache the repository's, says so; "original" takes its parent's."""
    folder = folder.resolve()
    folder = folder.parent if folder.name == "original" else folder
    return "instruct" in (folder.parent.parent if folder.parent.name == "snapshots" else folder).name.lower()


def _shard_files(folder: Path) -> list[Path]:
    numbered = {int(found[1]): file for file in folder.iterdir() if (found := SHARD.fullmatch(file.name))}
    if not numbered:
        raise FileNotFoundError(
            f"{folder} holds no consolidated.00.pth, so it is not in Meta's layout, the only one that model_size, "
            "llama_version, num_shards and instruct apply to"
        )
    for number in range(max(numbered)):
        if number not in numbered:
            raise FileNotFoundError(f"{folder / f'consolidated.{number:02}.pth'} does not exist; download it again")
    return [numbered[number] for number in sorted(numbered)]


def _size(model_size: str | None) -> tuple[float, int] | None:
    """Billions of parameters and number of shards of "7B", or of "7Bf", as LLaMA 2's chat models are called."""
    if model_size is None:
        return None
    size = SIZES.get(model_size) or SIZES.get(model_size.removesuffix("f"))
    if size is None:
        raise ValueError(f"model_size must be one of {', '.join(SIZES)}, got {model_size!r}; or leave it out")
    return size
