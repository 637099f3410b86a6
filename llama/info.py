"""`llama info`: describe a model and the memory it needs, from the headers of its files alone."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from .checkpoints import FLOATS, Checkpoint
from .checkpoints.gguf import GGUFFile
from .checkpoints.huggingface import HuggingFaceFolder
from .checkpoints.meta import MetaFolder
from .checkpoints.names import EMBEDDING, FREQUENCIES, HEAD
from .reference import Config, parameter_shapes

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}  # the dtypes a model runs in, and their sizes in bytes
DEFAULT_TOKENS = 4096
MOST = 10**12  # upper bound on tokens and on texts


@dataclass
class Info:
    """Facts about a model.

    parameters: their number, a tied head counted once; `embedding` is the embedding's share.
    stored: bytes in the files by type, quantised types under their own names.
    missing: the first tensor that the configuration asks for and the files lack.
    memory: by dtype, the bytes of the weights and of the cache. The cache keeps a key and a value for every token,
        layer and key/value head: 2 · layers · batch · kv_heads · tokens · head_dim elements. Activations (a few rows of
        the hidden size, and the logits) come on top.
    """

    path: str
    format: str
    files: int
    architecture: str
    config: Config
    parameters: int
    embedding: int
    stored: dict[str, int]
    missing: str | None
    tokens: int
    batch: int
    memory: dict[str, dict[str, int]]

    def as_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        return asdict(self)

    def lines(self) -> Iterator[str]:
        """A readable description, line by line."""
        c = self.config
        stored = ", ".join(f"{in_bytes(size)} {kind}" for kind, size in self.stored.items())
        tied = " (the head's too)" if c.tie_word_embeddings else ""
        heads = "one" if c.num_key_value_heads == 1 else f"{c.num_key_value_heads:,}"
        rope = dict(c.rope_parameters)
        kind, theta = rope.pop("rope_type"), rope.pop("rope_theta")
        # leaves out longrope's factors, which are lists of one number per frequency
        said = [f"{key} {value:g}" for key, value in rope.items() if isinstance(value, int | float)]
        yield f"path          {self.path}"
        yield f"format        {self.format}, {self.files:,} file{'s' * (self.files != 1)}: {stored}"
        yield f"architecture  {self.architecture}"
        yield f"layers        {c.num_hidden_layers:,} of width {c.hidden_size:,}, MLP of width {c.intermediate_size:,}"
        yield f"heads         {c.num_attention_heads:,} of size {c.head_dim:,}, {heads} for keys and values"
        yield f"parameters    {self.parameters:,}, of which {self.embedding:,} are the embedding's{tied}"
        yield f"vocabulary    {c.vocab_size:,} tokens"
        yield f"context       {c.max_position_embeddings:,} tokens"
        yield f"RoPE          {kind}, " + ", ".join([f"theta {theta:g}", *said])
        if self.missing:
            yield f"incomplete    the tensor {self.missing} is missing"
        yield ""
        texts = "" if self.batch == 1 else f" in each of {self.batch:,} texts"
        yield f"memory to run it, with a cache of {self.tokens:,} tokens{texts}"
        yield f"{'':12}{'weights':>12}{'cache':>12}{'together':>12}"
        for dtype, needed in self.memory.items():
            cells = (needed["weights"], needed["cache"], needed["weights"] + needed["cache"])
            yield f"  {dtype:10}" + "".join(f"{in_bytes(cell):>12}" for cell in cells)


def info(checkpoint: Checkpoint, tokens: int | None = None, batch: int = 1) -> Info:
    """Describe a checkpoint from its headers.

    Args:
        tokens: the length of the cache for each of the `batch` texts; by default 4096, or the context if shorter.

    Raises:
        ValueError, OSError: a file is missing or damaged, or does not match the configuration; the message names it.
    """
    fields = checkpoint.config
    try:
        config = Config.from_dict(fields)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    for name, value in (("tokens", tokens), ("batch", batch)):
        if value is not None and not 1 <= value <= MOST:
            raise ValueError(f"{name} must be at least 1 and at most {MOST:,}, got {value}")
    tokens = min(DEFAULT_TOKENS, config.max_position_embeddings) if tokens is None else tokens
    tensors = {n: s for n, s in checkpoint.tensors.items() if not n.endswith(FREQUENCIES)}
    missing = None
    for name, shape in parameter_shapes(config, classifier="score.weight" in tensors):
        if name not in tensors:  # unless it is a base model or a quantised one, whose tensors have other names
            usual = EMBEDDING in tensors and all(stored.dtype.name in FLOATS for stored in tensors.values())
            missing = name if usual else None
            break
        if tensors[name].shape != shape and tensors[name].dtype.name in FLOATS:
            raise ValueError(
                f"{checkpoint.path}: the tensor {name} has shape {tensors[name].shape}; the configuration asks for "
                f"{shape}. Correct its configuration, or download it again."
            )
    tied = config.tie_word_embeddings and HEAD in tensors
    parameters = sum(s.size for name, s in tensors.items() if not (tied and name == HEAD))
    embedding = sum(stored.size for name, stored in tensors.items() if name.endswith("embed_tokens.weight"))
    kept = 2 * config.num_hidden_layers * batch * config.num_key_value_heads * tokens * config.head_dim
    memory = {dtype: {"weights": parameters * width, "cache": kept * width} for dtype, width in WIDTHS.items()}
    name, files = _format(checkpoint)
    said = fields.get("architectures")
    architecture = str(said[0]) if isinstance(said, list) and said else "LlamaForCausalLM"
    stored = _bytes_by_type(checkpoint)
    return Info(str(checkpoint.path), name, files, architecture, config, parameters, embedding, stored, missing,
                tokens, batch, memory)  # fmt: skip


def in_bytes(count: int) -> str:
    """Format a size like "1.23 GB": three significant digits and a power of 1000."""
    if count < 1000:
        return f"{count} bytes"
    units = ("kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB", "RB", "QB")
    size, power = count / 1000, 0
    while size >= 999.5 and power < len(units) - 1:
        size, power = size / 1000, power + 1
    return f"{size:#.3g}".rstrip(".") + f" {units[power]}"


def _format(checkpoint: Checkpoint) -> tuple[str, int]:
    """The name of the format, and the number of files with weights."""
    if isinstance(checkpoint, GGUFFile):
        return "GGUF", 1
    if isinstance(checkpoint, MetaFolder):
        return f"Meta's .pth, LLaMA {checkpoint.version}", len(checkpoint.files)
    assert isinstance(checkpoint, HuggingFaceFolder)
    files = checkpoint.files
    return "Hugging Face's " + ("safetensors" if files[0].suffix == ".safetensors" else ".bin"), len(files)


def _bytes_by_type(checkpoint: Checkpoint) -> dict[str, int]:
    stored: Counter[str] = Counter()
    if isinstance(checkpoint, GGUFFile):
        for kind, size in checkpoint.kinds.values():
            stored[kind] += size
    else:
        for tensor in checkpoint.tensors.values():
            stored[tensor.dtype.name] += tensor.nbytes
    return dict(stored.most_common())
