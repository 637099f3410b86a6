"""Chat templates: jinja2 programs, shipped with a checkpoint, that render conversations as text.

They are untrusted code. They run in jinja2's immutable sandbox, as in transformers, and within limits on loop
iterations, on the length of the output and on the size of intermediate values.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from inspect import isroutine
from string import Formatter
from typing import Any

from jinja2 import TemplateError, nodes, pass_context, pass_eval_context
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from . import special
from .batch import BatchEncoding
from .tools import schema_of

MAX_STEPS = 1_000_000  # loop iterations and calls
MAX_TEXT = 100_000_000  # characters
MAX_FACTOR = 1_000_000  # largest width or other argument that lengthens text
LENGTHENING = ("center", "expandtabs", "ljust", "rjust", "to_bytes", "zfill")  # methods with such an argument

# Meta's repository "llama", llama/generation.py (July 2023).
DEFAULT_SYSTEM_PROMPT = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)
# Llama 2's format, from the same file: the system prompt is part of the first user message.
LLAMA_2_TEMPLATE = """\
{%- set system = default_system_prompt -%}
{%- set turns = messages -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set turns = messages[1:] -%}
{%- elif '<<SYS>>' in messages[0]['content'] -%}
    {%- set system = none -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- set content = message['content'] -%}
    {%- if loop.first and system is not none -%}
        {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content -%}
    {%- endif -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
    {%- elif message['role'] == 'system' -%}
        {{- '<<SYS>>\\n' + content.strip() + '\\n<</SYS>>\\n\\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + content.strip() + ' ' + eos_token -}}
    {%- endif -%}
{%- endfor -%}
"""
CONTINUED = "\N{OBJECT REPLACEMENT CHARACTER}continued here\N{OBJECT REPLACEMENT CHARACTER} "  # its space is to be kept

Templates = str | dict[str, str] | None


def templates(said: Any) -> Templates:
    """Parse `chat_template` of tokenizer_config.json or a constructor: one template, or several by name."""
    if isinstance(said, list):
        named = {t.get("name"): t.get("template") for t in said if isinstance(t, dict)}
        said = named if said and len(named) == len(said) else 0
    if isinstance(said, dict) and said and all(isinstance(text, str) for pair in said.items() for text in pair):
        return dict(said)
    if not isinstance(said, str | None):
        raise ValueError(f"chat_template in tokenizer_config.json must be a string, or templates by name; got {said!r}")
    return said


def as_saved(said: str | dict[str, str]) -> Any:
    """Templates as tokenizer_config.json writes them."""
    return said if isinstance(said, str) else [{"name": name, "template": text} for name, text in said.items()]


class ChatTemplates(special.SpecialTokens):
    """Mixin that implements a tokenizer's `apply_chat_template`."""

    chat_template: Templates
    use_default_system_prompt: bool
    is_fast: bool
    __call__: Callable[..., BatchEncoding]

    @property
    def default_chat_template(self) -> str | None:
        """Llama 2's template if the tokenizer has its special tokens, else None."""
        return LLAMA_2_TEMPLATE if (self.bos_token, self.eos_token) == ("<s>", "</s>") else None

    def get_chat_template(self, chat_template: str | None = None, tools: Any = None) -> str:
        """Return the template that `apply_chat_template` uses.

        Args:
            chat_template: a template, or the name of one of this tokenizer's.
            tools: if given, a template named "tool_use" is preferred to the default.

        Raises:
            ValueError: there is no template.
        """
        own = self.chat_template
        if isinstance(own, dict):
            if chat_template is None:
                chat_template = "tool_use" if tools is not None and "tool_use" in own else "default"
                if chat_template not in own:
                    raise ValueError(f"chat_template must be one of {', '.join(map(repr, own))}, or a template")
            return own.get(chat_template, chat_template)
        found = chat_template or own or self.default_chat_template
        if not found:
            raise ValueError("this tokenizer has no chat template; encode plain text instead")
        return found

    def apply_chat_template(
        self,
        conversation: Any,
        tools: Sequence[Any] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        padding: Any = False,
        truncation: Any = False,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
        return_assistant_tokens_mask: bool = False,
        tokenizer_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation, [{"role": "user", "content": "..."}, ...], in the model's format, as ids or as text.

        The template writes the special tokens; tokenization adds none.

        Args:
            conversation: one conversation, or a list of them.
            tools: functions that the model may call, passed to the template: JSON schemas, or Python functions with
                type hints and a docstring that has an "Args:" section.
            documents: dictionaries of strings, passed to the template.
            chat_template: a template, or the name of one of the tokenizer's, instead of the default.
            add_generation_prompt: end with the header of the assistant's reply.
            continue_final_message: end inside the last message, for the model to continue it.
            tokenize: return ids; otherwise text.
            return_dict: return all model inputs, as `__call__` does, rather than ids only.
            return_assistant_tokens_mask: add `assistant_masks` to that dictionary: 1 between {% generation %} and
                {% endgeneration %} of the template.
            tokenizer_kwargs: further arguments of `__call__`.
            kwargs: further variables for the template.

        Raises:
            ValueError: the tokenizer has no template, or the template raises, fails or exceeds its limits.
        """
        if return_dict and not tokenize:
            raise ValueError("return_dict=True needs tokenize=True")
        if add_generation_prompt and continue_final_message:
            raise ValueError("continue_final_message and add_generation_prompt are mutually exclusive; set only one")
        if return_assistant_tokens_mask and not return_dict:
            raise ValueError("return_assistant_tokens_mask needs return_dict=True")
        if hasattr(conversation, "messages"):
            conversation = conversation.messages
        if not isinstance(conversation, list | tuple) or not conversation:
            raise ValueError("conversation must be a non-empty list of messages or of conversations")
        many = isinstance(conversation[0], list | tuple) or hasattr(conversation[0], "messages")
        chats = [getattr(one, "messages", one) for one in conversation] if many else [conversation]
        source = self.get_chat_template(chat_template, tools)
        names: dict[str, Any] = {"tools": _schemas(tools), "documents": documents}
        if source is LLAMA_2_TEMPLATE:
            names["default_system_prompt"] = DEFAULT_SYSTEM_PROMPT if self.use_default_system_prompt else None
        names |= self.special_tokens_map | {"add_generation_prompt": add_generation_prompt} | kwargs
        rendered = [_rendered(source, chat, names, continue_final_message) for chat in chats]
        texts = [text for text, _ in rendered]
        if not tokenize:
            return texts if many else texts[0]
        out = self(
            texts if many else texts[0], add_special_tokens=False, padding=padding, truncation=truncation,
            max_length=max_length, return_tensors=return_tensors, **(tokenizer_kwargs or {}),
        )  # fmt: skip
        if not return_dict:
            return out["input_ids"]
        if return_assistant_tokens_mask:
            masks = [_mask(out, row, spans) for row, (_, spans) in enumerate(rendered)]
            lists = return_tensors is None
            out["assistant_masks"] = (masks if many else masks[0]) if lists else _like(out["input_ids"], masks)
        return out


def _schemas(tools: Sequence[Any] | None) -> list[Any] | None:
    for tool in tools or []:
        if not isinstance(tool, Mapping) and not isroutine(tool):
            raise ValueError(f"tools must be JSON schemas (dictionaries) or functions, got {type(tool).__name__}")
    return None if tools is None else [tool if isinstance(tool, Mapping) else schema_of(tool) for tool in tools]


def _mask(out: BatchEncoding, row: int, spans: list[tuple[int, int]]) -> list[int]:
    if not spans:
        return [0] * len(_row_of(out["input_ids"], row))
    found = zip(out.sequence_ids(row), out._row(row).spans, strict=True)
    return [int(which is not None and any(a < end and b > start for start, end in spans)) for which, (a, b) in found]


def _row_of(ids: Any, row: int) -> Any:
    return ids if isinstance(ids, list) and ids and not isinstance(ids[0], list) else ids[row]


def _like(other: Any, values: list[list[int]]) -> Any:
    import numpy as np

    return np.array(values) if isinstance(other, np.ndarray) else other.new_tensor(values)


@dataclass
class Run:
    """The state of one run of a template."""

    steps: int = 0
    written: list[str] = field(default_factory=list)
    length: int = 0
    generated: list[tuple[int, int]] = field(default_factory=list)

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TemplateError(f"it takes more than {MAX_STEPS:,} loop iterations and calls")

    def write(self, text: str) -> None:
        self.written.append(text)
        self.length += len(text)
        if self.length > MAX_TEXT:
            raise TemplateError(f"it writes more than {MAX_TEXT:,} characters")


_run: ContextVar[Run] = ContextVar("run")


def _rendered(source: str, chat: Any, names: Mapping[str, Any], continued: bool) -> tuple[str, list[tuple[int, int]]]:
    """Render a conversation; return the text and the spans of characters that the template marks as the assistant's."""
    if not isinstance(chat, list | tuple) or not all(isinstance(message, Mapping) for message in chat):
        raise ValueError("a conversation must be a list of messages, each a dictionary of role and content")
    if not chat:
        raise ValueError("a conversation must have at least one message")
    chat = _marked(chat) if continued else chat
    run = Run()
    token = _run.set(run)
    try:
        for text in _compiled(source).generate(messages=chat, **names):
            run.write(text)
    except (Exception, RecursionError) as error:  # a template is untrusted code and can fail in any way
        raise ValueError(f"the chat template fails on this conversation: {error}") from error
    finally:
        _run.reset(token)
    text = "".join(run.written)
    return (_ending(text) if continued else text), run.generated


def _marked(chat: Sequence[Any]) -> list[Any]:
    """Append a marker to the last message of a conversation, where the rendered text is to end."""
    last = dict(chat[-1])
    content = last.get("content")
    if isinstance(content, str):
        last["content"] = content + CONTINUED
    else:
        blocks = [dict(block) if isinstance(block, Mapping) else block for block in content or []]
        texts = [block for block in blocks if isinstance(block, dict) and isinstance(block.get("text"), str)]
        if not texts:
            raise ValueError("continue_final_message: the last message has no text to continue")
        texts[-1]["text"] += CONTINUED
        last["content"] = blocks
    return [*chat[:-1], last]


def _ending(text: str) -> str:
    """Cut the text at the marker and, if the template has stripped the message, strip its end."""
    at = text.rfind(CONTINUED.strip())
    if at < 0:
        raise ValueError("continue_final_message: the chat template drops or alters the last message")
    return text[:at] if text[at:].startswith(CONTINUED) else text[:at].rstrip()


class Generation(Extension):
    """The tag {% generation %} ... {% endgeneration %}, which marks the assistant's text."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_generated"), [], [], body).set_lineno(line)

    @pass_eval_context
    def _generated(self, context: Any, caller: Callable[[], str]) -> str:
        text, run = caller(), _run.get()
        run.generated.append((run.length, run.length + len(text)))
        return text


class Limited(ImmutableSandboxedEnvironment):
    """The sandbox, with loop iterations and calls counted, and very large values refused."""

    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [value for value in (left, right) if isinstance(value, int | float)]
        if operator == "%":
            check_widths(left)
        elif operator == "**":
            if any(abs(size) > 1000 for size in sizes):
                raise TemplateError("a power in it is too large")
        elif operator == "*" and len(sizes) == 1:  # repetition of a text or a list
            other = right if isinstance(left, int | float) else left
            check_product(other, range(max(0, int(sizes[0]))))
        elif operator == "*" and any(isinstance(size, int) and size.bit_length() > 1000 for size in sizes):
            raise TemplateError("a number in it is too large")
        return check_length(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        _run.get().step()
        method = getattr(function, "__wrapped__", function)  # str.format, which the sandbox wraps
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | bytes | int) and name in LENGTHENING:
            check_numbers(*args, *kwargs.values())
        elif isinstance(owner, str) and name in ("format", "format_map"):
            check_fields(owner)
        elif isinstance(owner, str) and name in ("replace", "join"):
            for other in args:
                check_product(owner, other)
        return super().call(context, function, *args, **kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for block in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            count = nodes.Filter(nodes.Const(""), COUNT, [], [], None, None, lineno=block.lineno)
            block.body.insert(0, nodes.ExprStmt(count, lineno=block.lineno))  # type: ignore[attr-defined]
        Lengths().visit(tree)
        tree.set_environment(self)
        return tree


class Lengths(NodeTransformer):
    """Insert a check of the length of every `~` concatenation."""

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return nodes.Filter(node, LENGTH, [], [], None, None, lineno=node.lineno)


COUNT, LENGTH = "count a round", "check a length"  # filters that no template can name


def check_numbers(*values: Any) -> None:
    if any(isinstance(value, int) and abs(value) > MAX_FACTOR for value in values):
        raise TemplateError("a number it passes to a function is too large")


def check_length(value: Any) -> Any:
    if isinstance(value, str | list | tuple) and len(value) > MAX_TEXT:
        raise TemplateError(f"it builds a value of more than {MAX_TEXT:,} characters")
    return value


def check_product(one: Any, other: Any) -> None:
    """Bound the length of repetitions and replacements: at most the product of two lengths."""
    if hasattr(one, "__len__") and hasattr(other, "__len__") and len(one) * len(other) > MAX_TEXT:
        raise TemplateError("it repeats a value too many times")


def check_widths(form: Any) -> None:
    """Refuse large widths in a %-format ("%999999999d") and widths given by an argument ("%*d")."""
    if isinstance(form, str | bytes):
        text = str(form).replace("%%", "")
        before = "[%)]" if "%(" in text else "%"
        if re.search(before + r"[-+ #0]*(\d*\.)?(\d{7}|\*)", text):
            raise TemplateError("a width in it is too large")


def check_fields(form: str) -> None:
    """The same for str.format: "{:999999999}", and "{:{}}" with the width given by an argument."""
    if any(re.search(r"\d{7}|{", spec or "") for _, _, spec, _ in Formatter().parse(form)):
        raise TemplateError("a width in it is too large")


def _limited(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a filter so that it refuses very large numbers and products."""
    lengthening = function.__name__ not in ("do_format", "do_join", "do_replace")

    def checked(*args: Any, **kwargs: Any) -> Any:
        if lengthening:
            check_numbers(*args[1:], *kwargs.values())
        texts = [value for value in (*args, *kwargs.values()) if isinstance(value, str | list | tuple)]
        for other in texts[1:]:
            check_product(texts[0], other)
        if function.__name__ == "do_format":
            check_widths(texts[0] if texts else None)
        return function(*args, **kwargs)

    vars(checked).update(vars(function))  # the markers of pass_context and the like
    return checked


@pass_context
def _count(context: Any, value: str) -> str:
    _run.get().step()
    return value


@lru_cache(maxsize=1)
def _environment() -> Limited:
    """The jinja2 environment of transformers, with limits."""

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        check_numbers(indent)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Limited(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    for name in ("batch", "center", "format", "indent", "join", "replace", "slice", "wordwrap"):
        environment.filters[name] = _limited(environment.filters[name])
    environment.filters["tojson"] = tojson
    environment.filters |= {COUNT: _count, LENGTH: check_length}
    environment.globals.pop("lipsum")  # generates as much text as it is asked for
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


@lru_cache(maxsize=32)
def _compiled(source: str) -> Any:
    return _environment().from_string(source)
