"""`generate`: text generation with the options, defaults and order of operations of transformers."""

import inspect
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..cache import Cache, DynamicCache, StaticCache, as_cache
from ..outputs import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput
from ..tokenization import TextStream
from .config import GenerationConfig, own_copy
from .processors import LogitsProcessorList, processors_for
from .stopping import MaxLengthCriteria, StoppingCriteriaList, StopStringCriteria, criteria_for

OWN_ARGUMENTS = (
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
)
MODEL_INPUTS = (
    "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "input_ids", "tokenizer", "decoding",
)  # fmt: skip
DECODINGS = ("plain", "auto", "static", "graph")


class Reader:
    """A model and its KV cache: runs the model on the tokens that the cache does not hold yet.

    Args:
        mask: (B, P) of the prompt, None if there is no padding.
        position_ids: (B, P) of the prompt, None to derive them from the mask.
        limit: the maximum length of the texts.
        inputs_embeds: (B, P, E), read in place of the prompt's ids, of which there may be fewer or none.
        learnt: the number of peft's virtual tokens in the cache.
        chunk: the maximum number of prompt tokens per forward pass, None for all of them.
        more: further arguments of the model's own `prepare_inputs_for_generation`.
    """

    def __init__(self, model: nn.Module, cache: Cache | None, mask: torch.Tensor | None = None,
                 position_ids: torch.Tensor | None = None, limit: int = 0, inputs_embeds: torch.Tensor | None = None,
                 ids_length: int = 0, learnt: int = 0, chunk: int | None = None,
                 more: dict[str, Any] | None = None, **outputs: bool):  # fmt: skip
        self.model, self.cache, self.chunk, self.outputs = model, cache, chunk, outputs
        self.prepares, self.more = _prepares(model), more or {}
        self.embeds = inputs_embeds
        self.ahead = learnt if inputs_embeds is None else inputs_embeds.shape[1] - ids_length
        if mask is not None:
            if position_ids is None:
                position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
            mask = F.pad(mask, (0, max(limit + self.ahead - mask.shape[1], 0)), value=1)
        self.mask, self.positions = mask, position_ids

    @property
    def length(self) -> int:
        """The number of tokens in the cache."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    def read(self, ids: torch.Tensor, keep: int = 1) -> Any:
        """Run the model on what is new in `ids` (B, S), the texts so far; the logits are of the last `keep` tokens."""
        end = ids.shape[1] + self.ahead
        if self.chunk is not None:
            while self.length + self.chunk + keep <= end:
                self._read(ids, self.length + self.chunk, keep=1)
        return self._read(ids, end, keep)

    def _read(self, ids: torch.Tensor, end: int, keep: int) -> Any:
        start, embeds, new = self.length, self.embeds, None
        if embeds is None or start >= embeds.shape[1]:
            embeds, new = None, ids[:, start - self.ahead : end - self.ahead]
        else:
            embeds = embeds[:, start:end]
        positions = self.positions
        if positions is not None:
            while positions.shape[1] < end:
                positions = torch.cat([positions, positions[:, -1:] + 1], dim=1)
            self.positions, positions = positions, positions[:, start:end]
        mask = None if self.mask is None else self.mask[:, :end]
        inputs = {
            "input_ids": new, "attention_mask": mask, "position_ids": positions, "past_key_values": self.cache,
            "inputs_embeds": embeds, "use_cache": self.cache is not None,
        }  # fmt: skip
        if self.prepares:
            inputs = self._prepared(ids[:, : end - self.ahead], start, end, inputs)
        return self.model(**inputs | {"logits_to_keep": keep, "return_dict": True} | self.outputs)

    def _prepared(self, ids: torch.Tensor, start: int, end: int, inputs: dict[str, Any]) -> dict[str, Any]:
        """Pass the inputs for tokens start to end through `prepare_inputs_for_generation`."""
        del inputs["input_ids"]
        inputs["inputs_embeds"] = self.embeds
        if inputs["position_ids"] is None:
            inputs["position_ids"] = torch.arange(start, end, device=ids.device).expand(len(ids), -1)
        cls: Any = type(self.model)  # not the instance's, which may be peft's: `_learnt` calls that, once
        return cls.prepare_inputs_for_generation(
            self.model, ids, next_sequence_length=end - start, is_first_iteration=start == 0, **inputs | self.more
        )


def _prepares(model: nn.Module) -> bool:
    """Whether the model's class overrides `prepare_inputs_for_generation`."""
    prepare = getattr(type(model), "prepare_inputs_for_generation", None)
    return isinstance(model, GenerationMixin) and prepare is not GenerationMixin.prepare_inputs_for_generation


@dataclass
class Run:
    """The state of one call of `generate`, shared by all decoding strategies.

    ids: (B, limit), of which the first `length` columns are filled. ends: the end tokens, None for none. cache_is_seen:
    the reader's cache was passed in, or may be returned.
    """

    model: Any
    config: GenerationConfig
    reader: Reader
    ids: torch.Tensor
    length: int
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    ends: torch.Tensor | None
    pad: int
    record: dict[str, list] = field(default_factory=dict)
    decoding: str = "plain"
    cache_is_seen: bool = True

    @property
    def limit(self) -> int:
        return self.ids.shape[1]

    @property
    def text(self) -> torch.Tensor:
        """(B, length): the text so far."""
        return self.ids[:, : self.length]

    @property
    def kept_scores(self) -> tuple[torch.Tensor, ...] | None:
        return tuple(self.record["scores"]) if "scores" in self.record else None

    def keep(self, **values: Any) -> None:
        """Record those values of a step that were requested."""
        for name, kept in self.record.items():
            kept.append(values[name])

    def choose(self, scores: torch.Tensor) -> torch.Tensor:
        """(B, V) processed scores -> (B,) tokens."""
        if not self.config.do_sample:
            return scores.argmax(-1)
        return torch.multinomial(F.softmax(scores, dim=-1), num_samples=1).squeeze(1)

    def append(self, tokens: torch.Tensor) -> None:
        self.ids[:, self.length] = tokens
        self.length += 1


def write(run: Run) -> Iterator[torch.Tensor]:
    """Greedy search or sampling: yield each step's (B,) tokens. Rows that are done get padding."""
    running: torch.Tensor | None = None  # None: all rows
    while run.length < run.limit:
        out = run.reader.read(run.text)
        logits = out.logits[:, -1].float()
        kept = logits.clone() if "logits" in run.record else None  # a processor may modify its input
        scores = run.processors(run.text, logits) if run.processors else logits
        if run.record:
            run.keep(scores=scores, logits=kept, attentions=out.attentions, hidden_states=out.hidden_states)
        del out
        tokens = run.choose(scores)
        if running is not None and run.ends is not None:
            tokens = torch.where(running, tokens, run.pad)
        run.append(tokens)
        yield tokens
        if run.criteria:
            done = run.criteria(run.text, run.kept_scores)
            running = ~done if running is None else running & ~done
            if not running.any():
                return


class GenerationMixin:
    """`generate` for a language model: an nn.Module with `config`, `generation_config` and transformers' forward."""

    config: Any
    generation_config: GenerationConfig

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: Iterable | None = None,
        stopping_criteria: Iterable | None = None,
        prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None = None,
        synced_gpus: bool | None = None,
        assistant_model: Any = None,
        streamer: Any = None,
        negative_prompt_ids: torch.Tensor | None = None,
        negative_prompt_attention_mask: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generate text after the prompts: transformers' `generate`.

        Args:
            inputs: (B, T) ids, shorter prompts padded on the left; also accepted as `input_ids`. Without either, and
                without `inputs_embeds`, the text begins with `bos_token_id`.
            generation_config: options; those it does not set come from the model's own. `kwargs` override both.
            logits_processor, stopping_criteria: additional ones, combined with those of the options.
            prefix_allowed_tokens_fn: maps a prompt's index and the ids so far to the ids that may follow.
            assistant_model: a smaller model with the same vocabulary, for speculative decoding (batch of one).
            streamer: an object whose `put` receives the prompts, then each step's tokens; `end` is called last.
            negative_prompt_ids, negative_prompt_attention_mask: for `guidance_scale`.
            kwargs: fields of `GenerationConfig`; `attention_mask` (B, T), `position_ids`, `inputs_embeds` (B, T, E),
                `past_key_values` (a cache that holds the first tokens of the prompt), `tokenizer` (for `stop_strings`).
                And `decoding`: "plain", the default; "static" runs steps of a fixed shape over a preallocated cache;
                "graph", experimental, replays such a step as a CUDA graph; "auto" does so wherever it can, and
                is plain elsewhere. All but "plain" keep their buffers for the next call (`llama.decoding.release` frees
                them), and go on sampling from scores that are NaN, for which "plain" raises.

        Returns:
            (B · num_return_sequences, length) ids, prompts included (unless only `inputs_embeds` was passed); or, with
            `return_dict_in_generate`, an output object with the ids and whatever else was requested.

        Raises:
            ValueError: an unknown or unusable option, padding on the right, or a cache that does not fit.
        """
        run = self._prepare(inputs, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn,
                            negative_prompt_ids, negative_prompt_attention_mask, kwargs)  # fmt: skip
        config = run.config
        if config.num_beams > 1:
            if streamer is not None:
                raise ValueError("a streamer needs num_beams=1: a beam may still be discarded")
            if config.guidance_scale not in (None, 1):
                raise ValueError("guidance_scale needs num_beams=1: its unconditional text cannot follow the beams")
            if assistant_model is not None or config.prompt_lookup_num_tokens is not None:
                raise ValueError("speculative decoding (assistant_model, prompt_lookup_num_tokens) needs num_beams=1")
            from .. import decoding
            from .beams import beam_search

            decoding.takes(run)
            sequences, beams = beam_search(run)
            return self._result(run, sequences, **beams)
        if streamer is not None:
            streamer.put(run.text.cpu())
        for tokens in self._writer(run, assistant_model, watched=streamer is not None):
            if streamer is not None:
                streamer.put(tokens.cpu())
        if streamer is not None:
            streamer.end()
        return self._result(run, run.text.clone() if run.length < run.limit else run.ids)

    @torch.no_grad()
    def steps(self, inputs: torch.Tensor | None = None, **kwargs: Any) -> Iterator[torch.Tensor]:
        """`generate`, step by step: yield the (B,) new tokens of every step as soon as they are known."""
        options = {name: kwargs.pop(name, None) for name in OWN_ARGUMENTS}
        assistant_model = kwargs.pop("assistant_model", None)
        run = self._prepare(inputs, **options, kwargs=kwargs)
        if run.config.num_beams > 1:
            raise ValueError("steps needs num_beams=1: a beam may still be discarded")
        yield from self._writer(run, assistant_model)

    @torch.no_grad()
    def stream(self, inputs: torch.Tensor | None = None, *, tokenizer: Any, skip_special_tokens: bool = True,
               **kwargs: Any) -> Iterator[str]:  # fmt: skip
        """`generate` for one prompt, as text: yield pieces of whole characters, each as soon as it is certain.

        Stop strings are left out. Arguments are those of `generate`; invalid ones raise at the first piece.
        """
        options = {name: kwargs.pop(name, None) for name in OWN_ARGUMENTS}
        assistant_model = kwargs.pop("assistant_model", None)
        run = self._prepare(inputs, **options, kwargs=kwargs | {"tokenizer": tokenizer})
        if len(run.ids) != 1 or run.config.num_beams > 1:
            raise ValueError("stream generates one text: pass one prompt, num_beams=1 and num_return_sequences=1")
        stops = next((c.stop_strings for c in run.criteria if isinstance(c, StopStringCriteria)), ())
        text, pending = TextStream(tokenizer, skip_special_tokens), ""
        pieces = (text.put(int(token)) for token in self._writer(run, assistant_model))
        for piece in chain(pieces, (text.end() for _ in range(1))):
            pending += piece
            first = min((place for stop in stops if (place := pending.find(stop)) >= 0), default=None)
            if first is not None:
                pending = pending[:first]
                break
            held = max((n for stop in stops for n in range(len(stop)) if pending.endswith(stop[:n])), default=0)
            if len(pending) > held:
                yield pending[: len(pending) - held]
                pending = pending[len(pending) - held :]
        if pending:
            yield pending

    def _writer(self, run: Run, assistant_model: Any, watched: bool = True) -> Iterator[torch.Tensor]:
        """`watched`: each token is used as soon as it is generated."""
        drafts = assistant_model is not None or run.config.prompt_lookup_num_tokens is not None
        if run.decoding != "plain":
            from .. import decoding

            if decoding.takes(run, drafts):
                return decoding.write(run, watched)
        if not drafts:
            return write(run)
        from .speculative import write_speculatively

        return write_speculatively(run, assistant_model)

    def _prepare(self, inputs, generation_config, logits_processor, stopping_criteria, prefix_allowed_tokens_fn,
                 negative_prompt_ids, negative_prompt_attention_mask,
                 kwargs: dict[str, Any]) -> Run:  # fmt: skip
        """Merge the options, validate the inputs, expand them to one row per generated text, and create the cache."""
        config, given = self._options(generation_config, kwargs)
        embeds, device = given["inputs_embeds"], self.device  # type: ignore[attr-defined]
        if device.type == "meta":  # accelerate loads the weights for each call
            told = next((t for t in (inputs, given["input_ids"], embeds) if t is not None), None)
            device = torch.device("cpu") if told is None else told.device
        ids = self._ids(inputs, given["input_ids"], embeds, config, device)
        prompt = ids.shape[1] if embeds is None else embeds.shape[1]
        ends, pad = _special_tokens(config, self.config.vocab_size, device)

        mask = self._mask(given["attention_mask"], ids, embeds, config, pad, prompt)
        cache, static = given["past_key_values"], config.cache_implementation == "static"
        learnt = 0
        if cache is None and "prepare_inputs_for_generation" in vars(self):
            embeds, cache, mask, learnt = self._learnt(ids, embeds, mask, prompt)
            prompt += learnt
        cache = None if cache is None else as_cache(cache)
        if cache is not None and cache.get_seq_length() >= prompt:
            raise ValueError(
                f"the cache holds {cache.get_seq_length()} tokens; the prompt must have those and at least one more, "
                f"got {prompt}"
            )
        positions = self.config.max_position_embeddings
        asked = config.max_length
        if not ids.shape[1]:  # embeddings alone: the lengths count them, but the ids do not include them
            if config.max_new_tokens is None and config.given("max_length"):
                config.max_length -= prompt
            config.min_length = max(config.min_length - prompt, 0)
        limit = config.total_length(ids.shape[1], positions)
        if limit <= ids.shape[1]:
            raise ValueError(
                f"Input length of input_ids is {prompt}, but `max_length` is set to {asked}: "
                "there is no room for a token; set `max_new_tokens`, or `max_length` above it"
            )
        criteria = criteria_for(
            config, ids.shape[1], tokenizer=given["tokenizer"], extra=stopping_criteria or (),
            max_position_embeddings=positions,
        )  # fmt: skip
        lengths = [c.max_length for c in stopping_criteria or () if type(c) is MaxLengthCriteria]
        limit = max(min(lengths), ids.shape[1] + 1) if lengths else limit
        criteria = StoppingCriteriaList(c for c in criteria if type(c) is not MaxLengthCriteria)

        times = max(config.num_beams, config.num_return_sequences)
        position_ids, more = given["position_ids"], given["more"]
        if position_ids is not None:
            position_ids = position_ids.expand(len(ids), -1)
        if times > 1:
            more = {
                name: value.repeat_interleave(times, dim=0) if isinstance(value, torch.Tensor) else value
                for name, value in more.items()
            }
            ids = ids.repeat_interleave(times, dim=0)
            mask, embeds, position_ids = (
                None if t is None else t.repeat_interleave(times, dim=0) for t in (mask, embeds, position_ids)
            )
            if cache is not None and cache.get_seq_length() and len(next(iter(cache))[0]) != len(ids):
                cache.batch_repeat_interleave(times)
        if cache is None and (config.use_cache or embeds is not None):
            cache = StaticCache(self.config, limit + prompt - ids.shape[1]) if static else DynamicCache()
        record: dict[str, list] = {}
        if config.return_dict_in_generate:
            kept = ("scores", "logits", "attentions", "hidden_states")
            record = {name: [] for name in kept if getattr(config, f"output_{name}")}
        outputs = {f"output_{name}": name in record for name in ("attentions", "hidden_states")}
        chunk = config.prefill_chunk_size
        if chunk is not None and cache is None:
            raise ValueError("prefill_chunk_size needs use_cache=True: the cache carries what each chunk has read")
        if any(outputs.values()) or self.config.checked().angles_follow_length:
            chunk = None  # the requested outputs, or the RoPE angles, are those of the whole prompt
        reader = Reader(self, cache, mask, position_ids, limit, embeds, ids.shape[1], learnt, chunk, more, **outputs)  # type: ignore[arg-type]
        processors = processors_for(
            config, ids.shape[1], device=device, prefix_allowed_tokens_fn=prefix_allowed_tokens_fn,
            extra=logits_processor or (), model=self, attention_mask=mask if embeds is None else None,
            negative_prompt_ids=negative_prompt_ids, negative_prompt_attention_mask=negative_prompt_attention_mask,
            max_position_embeddings=positions,
        )  # fmt: skip
        buffer = F.pad(ids, (0, limit - ids.shape[1]), value=pad)
        run = Run(self, config, reader, buffer, ids.shape[1], processors, criteria, ends, pad, record)
        run.cache_is_seen = given["past_key_values"] is not None or bool(config.return_dict_in_generate)
        run.decoding = given["decoding"] or "plain"
        if run.decoding not in DECODINGS:
            raise ValueError(f"decoding must be one of {', '.join(DECODINGS)}, got {run.decoding!r}")
        return run

    def _options(self, generation_config, kwargs: dict[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
        """The options (the call's override the given config's, which override the model's) and the other inputs."""
        config = GenerationConfig() if generation_config is None else own_copy(generation_config)
        fallback = {k: v for k, v in self.generation_config.to_diff_dict().items() if not k.startswith("_")}
        config.update(defaults_only=True, allow_custom_entries=True, **fallback)
        unused = config.update(**kwargs | ({"top_k": 0} if kwargs.get("top_k", 0) is None else {}))  # None: no top-k
        given = {name: unused.pop(name, None) for name in MODEL_INPUTS}
        for name in ("cache_position", "labels", "return_dict", "logits_to_keep", "num_logits_to_keep"):
            unused.pop(name, None)  # may come with a batch or a prepared call, but generation sets them itself
        given["more"] = {}
        if _prepares(self):  # type: ignore[arg-type]
            takers = (self.prepare_inputs_for_generation, self.forward)  # type: ignore[attr-defined]
            takes = {name for taker in takers for name in inspect.signature(taker).parameters}
            given["more"] = {name: unused.pop(name) for name in takes & unused.keys()}
        if unused:
            raise ValueError(
                f"The following `model_kwargs` are not used by the model: {sorted(unused)} (note: typos in the "
                "generate arguments also show up here)"
            )
        return config, given

    def _learnt(self, ids: torch.Tensor, embeds: torch.Tensor | None, mask: torch.Tensor | None, prompt: int):
        """Add the virtual tokens that peft has trained: the embeddings, cache and mask with them, and their number.

        peft replaces `prepare_inputs_for_generation` on the model instance for this.
        """
        ones = torch.ones(len(ids), prompt, dtype=torch.long, device=ids.device)
        prepared = self.prepare_inputs_for_generation(
            ids, past_key_values=None, attention_mask=ones if mask is None else mask, inputs_embeds=embeds
        )
        given_mask = prepared["attention_mask"]
        learnt = 0 if given_mask is None else given_mask.shape[1] - prompt
        if learnt and mask is not None:
            mask = F.pad(mask, (learnt, 0), value=1)
        return prepared.get("inputs_embeds", embeds), prepared["past_key_values"], mask, learnt

    def _ids(self, inputs, input_ids, embeds, config: GenerationConfig, device) -> torch.Tensor:
        """The prompts' ids (B, T); (B, 0) if only embeddings are given."""
        if inputs is not None and input_ids is not None:
            raise ValueError("inputs and input_ids are the same argument; pass only one of them")
        ids = input_ids if inputs is None else inputs
        if ids is None and embeds is not None:
            return torch.zeros(len(embeds), 0, dtype=torch.long, device=device)
        if ids is None:
            if config.bos_token_id is None:
                raise ValueError("there is neither a prompt nor a bos_token_id to begin with; pass input_ids")
            return torch.full((1, 1), config.bos_token_id, dtype=torch.long, device=device)
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.is_floating_point():
            raise ValueError(
                "input_ids must be a tensor (batch, length) of integers, got "
                + (f"{tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__)
            )
        if not ids.shape[1] and embeds is None:
            raise ValueError("input_ids must hold at least one token")
        return ids.to(device, torch.long)

    def _mask(self, mask, ids, embeds, config: GenerationConfig, pad: int, prompt: int) -> torch.Tensor | None:
        """The prompts' attention mask (B, T), 0 for padding; None if there is no padding."""
        B = len(ids)
        if mask is None:
            known = config.pad_token_id is not None and config.pad_token_id >= 0 and embeds is None
            ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
            if known and pad in ends and B > 1 and bool((ids[:, 0] == pad).any()):
                warnings.warn(
                    "the padding token is also the end token, so padding cannot be told from text: pass attention_mask",
                    stacklevel=4,
                )
            if not known or pad in ends or not bool((ids == pad).any()):
                return None
            mask = ids != pad
        if mask.dim() != 2 or mask.shape != (B, prompt):
            raise ValueError(f"`attention_mask` passed to `generate` must be {(B, prompt)}, got {tuple(mask.shape)}")
        mask = (mask.to(ids.device) != 0).long()
        if bool(mask.all()):
            return None
        if not bool(mask[:, -1].all()):
            raise ValueError("generation continues from the last token: pad prompts on the left (the mask ends with 0)")
        return mask

    def _result(self, run: Run, sequences: torch.Tensor, **beams: torch.Tensor) -> Any:
        if not run.config.return_dict_in_generate:
            return sequences
        record: dict[str, Any] = {name: tuple(values) for name, values in run.record.items()}
        record |= {"sequences": sequences, "past_key_values": run.reader.cache if run.config.use_cache else None}
        if not beams:
            return GenerateDecoderOnlyOutput(record)
        if not run.config.output_scores:
            del beams["sequences_scores"]
        return GenerateBeamDecoderOnlyOutput(record | beams)

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, past_key_values: Any = None, attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None, next_sequence_length: int | None = None,
        is_first_iteration: bool | None = None, **kwargs: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """The arguments of `forward` for reading `input_ids`, the whole text, from where the cache ends.

        If a subclass overrides this, `generate` calls it before every forward pass. So do libraries that have their own
        generation loop. `next_sequence_length` is the number of tokens to read, by default all new ones.
        """
        past, n = 0 if past_key_values is None else as_cache(past_key_values).get_seq_length(), next_sequence_length
        new = {"input_ids": input_ids[:, past:] if n is None else input_ids[:, -n:]}
        if inputs_embeds is not None and past < inputs_embeds.shape[1]:
            new = {"inputs_embeds": inputs_embeds[:, past : None if n is None else past + n]}
        return new | {"past_key_values": past_key_values, "attention_mask": attention_mask} | kwargs

    def compute_transition_scores(
        self,
        sequences: torch.Tensor,
        scores: tuple[torch.Tensor, ...],
        beam_indices: torch.Tensor | None = None,
        normalize_logits: bool = False,
    ) -> torch.Tensor:
        """(B, steps): the score of each generated token, from the output of `output_scores`; 0 after a beam's end.

        Args:
            beam_indices: (B, steps), from the output of a beam search.
            normalize_logits: normalize the scores to log probabilities.
        """
        steps = torch.stack(scores)  # (steps, B · beams, V)
        if normalize_logits:
            steps = steps.log_softmax(-1)
        if beam_indices is None:
            came_from = torch.arange(len(sequences), device=steps.device)[:, None].expand(-1, len(steps))
        else:
            came_from = beam_indices[:, : int((beam_indices >= 0).sum(-1).max())]
        written = came_from.shape[1]
        tokens, step = sequences[:, sequences.shape[1] - written :], torch.arange(written, device=steps.device)
        return steps[step[None], came_from.clamp(min=0), tokens].masked_fill(came_from < 0, 0.0)


def _special_tokens(config: GenerationConfig, vocab_size: int, device) -> tuple[torch.Tensor | None, int]:
    """The end tokens (n,), None for none, and the padding of finished rows: `pad_token_id` or the first end token."""
    ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else config.eos_token_id or []
    pad = config.pad_token_id
    for name, token in (*(("eos_token_id", end) for end in ends), ("pad_token_id", pad)):
        if token is not None and token >= vocab_size:
            raise ValueError(f"{name} is {token}, but the model only knows ids below {vocab_size}")
    if pad is None or pad < 0:
        pad = ends[0] if ends else 0
    return torch.tensor(ends, device=device) if ends else None, pad
