"""The command line: `llama fetch`, `llama generate`, `llama chat`, `llama verify`, `llama bench`."""

import contextlib
import importlib
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from .session import Session

BACKENDS = click.Choice(["auto", "torch", "triton", "reference"])


class Group(click.Group):
    """Commands that end in a sentence when Ctrl-C stops them."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            click.echo("\nllama: interrupted", err=True)
            ctx.exit(130)


@click.group(
    cls=Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}
)
@click.version_option(package_name="llama-triton", prog_name="llama")
def cli() -> None:
    """LLaMA models: fetch them, ask them, talk to them.

    MODEL is everywhere a folder in Hugging Face's layout or in Meta's (consolidated.*.pth), a .gguf file, the id of a
    model on the Hugging Face Hub (org/name, or org/name/file.gguf), or the alias smollm2, which downloads 93 MB of
    real weights (SmolLM2-135M-Instruct, Apache-2.0) the first time. What was downloaded is used without asking the
    network again.
    """


def model_options(command: Any) -> Any:
    """The options that `generate` and `chat` share."""
    for option in (
        # from the last to the first: a decorator shows what it adds above what is there
        click.option("--seed", type=click.IntRange(0), help="Draw the same tokens every time."),
        click.option("--repetition-penalty", default=1.0, help="Above 1 makes tokens of the text so far less likely."),
        click.option("--min-p", default=0.0, help="Drop tokens below this fraction of the best probability."),
        click.option("--top-p", default=1.0, help="Draw from the fewest tokens that reach this probability."),
        click.option("--top-k", type=click.IntRange(1), help="Draw from this many likeliest tokens."),
        click.option("--temperature", default=0.0, help="0 takes the likeliest token, above 0 draws."),
        click.option("--max-new-tokens", type=click.IntRange(1), default=256, help="The longest answer."),
        click.option("--backend", type=BACKENDS, default="auto", help="What computes; auto is torch, where installed."),
        click.option("--model", "-m", default="smollm2", metavar="MODEL", help="The model to use."),
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("model", metavar="MODEL")
@click.option("--revision", metavar="NAME", help="A branch, tag or commit of a model on the Hub.")
@click.option("--update", is_flag=True, help="Ask the Hub for a newer commit, and download what it changed.")
def fetch(model: str, revision: str | None, update: bool) -> None:
    """Download MODEL once, a Hugging Face id or the alias smollm2; print the folder it lies in.

    For private and gated models log in with `hf auth login`, or set HF_TOKEN. HF_HOME names another place than
    ~/.cache/huggingface.
    """
    from .checkpoints import find

    click.echo(find(model, revision=revision, update=update))


@cli.command()
@click.argument("prompt")
@click.option("--raw", is_flag=True, help="Continue the text as it stands, without the model's chat template.")
@click.option("--system", help="A system message before the prompt.")
@model_options
def generate(prompt: str, raw: bool, system: str | None, **options: Any) -> None:
    """Answer PROMPT ("-" reads standard input), printing the words as they come.

    A model with a chat template is asked as its user would; a model without one continues the text.
    """
    prompt = sys.stdin.read() if prompt == "-" else prompt
    if raw and system is not None:
        raise click.UsageError("--system needs the chat template; leave --raw out")
    if not (raw or prompt.strip()):
        raise ValueError("the prompt is empty; give at least one word")
    session = open_session(**options)
    if raw or not session.tokenizer.chat_template:
        if system is not None:
            raise click.UsageError("--system needs a chat template, and this model has none")
        ids = session.tokenizer.encode(prompt)
    else:
        ids = session.render([*system_message(system), {"role": "user", "content": prompt}])
    for piece in session.answer(ids):
        click.echo(piece, nl=False)
    click.echo()
    click.echo(session.report(), err=True)


@cli.command()
@click.option("--system", help="A system message that opens the conversation.")
@model_options
def chat(system: str | None, **options: Any) -> None:
    """Talk with a model. /exit or the end of input leaves, Ctrl-C stops an answer.

    Where the input is no terminal, exits 1 if a line could not be answered.
    """
    session = open_session(**options)
    if not session.tokenizer.chat_template:
        raise click.UsageError(f"{options['model']} has no chat template; use llama generate")
    messages, failed = system_message(system), False
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (line editing and history at the prompt)
        click.echo("/exit or Ctrl-D leaves, Ctrl-C stops an answer.", err=True)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            click.echo("\n/exit or Ctrl-D leaves.", err=True)
            continue
        if line == "/exit":
            break
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        pieces: list[str] = []
        try:
            for piece in session.answer(session.render(messages)):
                pieces.append(piece)
                click.echo(piece, nl=False)
        except KeyboardInterrupt:
            click.echo(" ...", nl=False)
        except ValueError as error:  # the conversation has grown too long, or the template refuses it
            click.echo(f"llama: {error}", err=True)
            failed = True
        if pieces:
            messages.append({"role": "assistant", "content": "".join(pieces)})
        else:
            messages.pop()  # what was not answered was not said
        click.echo()
    if sys.stdin.isatty():
        click.echo()
    elif failed:
        sys.exit(1)


@cli.command()
@click.argument("model", default="smollm2")
@click.option(
    "--backend", type=click.Choice(["auto", "torch", "triton"]), default="auto", help="What is held against it."
)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    default="auto",
    help="What it computes in; auto is the file's.",
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="A text to run; more than one may be given.")
@click.pass_context
def verify(context: click.Context, model: str, backend: str, dtype: str, prompts: tuple[str, ...]) -> None:
    """Hold a backend against the NumPy reference, layer by layer, on MODEL.

    Prints the largest error of each layer, and how many next tokens agree. Exits 1 where an error is beyond the budget
    (relative to the layer's largest number: 1e-4 in float32, 3e-2 in float16, 0.25 in bfloat16), or where a next token
    differs that was not nearly tied.
    """
    from .checkpoints import open_checkpoint

    try:
        from .verify import verify
    except ImportError as error:
        raise ValueError('verify needs PyTorch: pip install "llama-triton[torch]"') from error
    report = verify(open_checkpoint(model), backend, dtype, prompts)
    for line in report.lines():
        click.echo(line)
    context.exit(0 if report.passed else 1)


@cli.command()
@click.argument("model", default="smollm2")
@click.option("--tokens", type=click.IntRange(1), help="What the cache is to hold.  [default: 4096, or the context]")
@click.option("--batch", type=click.IntRange(1), default=1, help="In how many texts at once.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with the whole configuration and plain bytes.")
def info(model: str, tokens: int | None, batch: int, as_json: bool) -> None:
    """Say what MODEL is and what memory it takes to run, from its headers: no weights are read.

    Nor are they downloaded of a model on the Hub that is in safetensors; in other formats they are.
    """
    from .checkpoints import open_checkpoint
    from .checkpoints.headers import headers_on_hub
    from .info import info

    found = info(headers_on_hub(model) or open_checkpoint(model, wanted="parameters"), tokens, batch)
    for line in [json.dumps(found.as_dict())] if as_json else found.lines():
        click.echo(line)


@cli.command()
@click.argument("where", required=False)
@click.argument("out", required=False)
@click.option("--to", type=click.Choice(["huggingface", "meta"]), default="huggingface", help="The layout to write.")
@click.option(
    "--dtype", type=click.Choice(["float32", "float16", "bfloat16"]), help="Cast to this; default: the source's."
)
@click.option(
    "--num-key-value-heads",
    "--num_key_value_heads",
    type=int,
    metavar="K",
    help="Make K key and value heads of those there are, each the mean of a group.",
)
@click.option("--max-shard-size", "--max_shard_size", default="5GB", metavar="SIZE", help="Begin a new file there.")
@click.option("--verify", is_flag=True, help="Read it all again and compare it bit by bit with the source.")
@click.option("--force", is_flag=True, help="Replace another model in OUT, or one changed since.")
@click.option("--revision", metavar="NAME", help="A branch, tag or commit, where WHERE is on the Hub.")
@click.option("--input-dir", "--input_dir", metavar="DIR", help="WHERE, as transformers' script calls it.")
@click.option("--output-dir", "--output_dir", metavar="DIR", help="OUT, as transformers' script calls it.")
@click.option("--model-size", "--model_size", metavar="SIZE", help="7B, 70B ...: Meta's files are checked against it.")
@click.option(
    "--llama-version", "--llama_version", metavar="VERSION",
    help="1, 2, 3, 3.1, 3.2: checked too, and decides between those that the files may be.",
)  # fmt: skip
@click.option(
    "--num-shards",
    "--num_shards",
    type=click.IntRange(1),
    metavar="N",
    help="How many consolidated.NN.pth there must be; how many to write with --to meta.",
)
@click.option(
    "--instruct", is_flag=True, help="Meta's files are a Llama 3 to talk with; their folder's name may say so."
)
@click.option("--safe-serialization", "--safe_serialization", type=bool, is_flag=False, flag_value=True, hidden=True)
def convert(
    where: str | None,
    out: str | None,
    input_dir: str | None,
    output_dir: str | None,
    safe_serialization: bool | None,
    model_size: str | None,
    llama_version: str | None,
    num_shards: int | None,
    instruct: bool,
    revision: str | None,
    **options: Any,
) -> None:
    """Write the model at WHERE (MODEL, or a folder of Meta's files) into the folder OUT.

    Only a tensor at a time is in memory, and dtypes stay as they are. What was interrupted goes on where it stopped
    when it is run again, and what is finished is left as it is, with all that was edited in it. The line of
    transformers' script works with `llama convert` in front:

        llama convert --input_dir DIR --model_size 7B --output_dir OUT
    """
    from .checkpoints import find, open_checkpoint
    from .checkpoints.convert import convert
    from .checkpoints.meta import MetaFolder

    if safe_serialization is False:
        raise click.UsageError("safetensors are all that is written; leave --safe-serialization out")
    places = [place for place in (input_dir, where, out, output_dir) if place is not None]
    if len(places) != 2:
        raise click.UsageError("give WHERE and OUT, or --input-dir and --output-dir: one place to read, one to write")
    facts: dict[str, Any] = {"model_size": model_size, "llama_version": llama_version, "instruct": instruct or None}
    if options["to"] == "meta":
        options["num_shards"] = num_shards or 1
    else:
        facts["num_shards"] = num_shards
    facts = {name: fact for name, fact in facts.items() if fact is not None}
    path = find(places[0], revision=revision)
    source = MetaFolder(path, **facts) if facts else open_checkpoint(path)
    try:
        click.echo(convert(source, places[1], **options))
    except KeyboardInterrupt:
        click.echo("llama: interrupted; the same command goes on where this one stopped", err=True)
        sys.exit(130)


@cli.group()
def bench() -> None:
    """Measure kernels and whole models, and make a page of the results."""


@bench.command()
@click.option(
    "--target", "targets", multiple=True, metavar="GPU", help="sm_80, sm_89, sm_90, sm_100, gfx942; default: all."
)
@click.option("--kernel", metavar="NAME", help="This kernel alone, as flash_attention.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line, with everything that was found.")
@click.pass_context
def static(context: click.Context, targets: tuple[str, ...], kernel: str | None, as_json: bool) -> None:
    """Compile every kernel in every configuration for GPUs that need not be there, and look at the machine code.

    Prints registers, spills, shared memory and the matrix instruction of each. Exits 1 where one has a problem: a
    spill, too much shared memory, double precision, no matrix instruction or no load of 128 bits where there could be.
    """
    try:
        from . import static
    except ImportError as error:
        raise ValueError('bench static needs PyTorch and Triton: pip install "llama-triton[torch]"') from error
    from .progress import progress

    names = [name for given in targets for name in given.split(",")] or list(static.TARGETS)
    for name in names:
        if name not in static.TARGETS:
            raise click.UsageError(f"no target is called {name!r}; there are {', '.join(static.TARGETS)}")
    try:
        work = static.work(names, kernel)
    except static.UnknownKernel as error:
        raise click.UsageError(str(error)) from error
    made, wrong = 0, 0
    for record in static.records(progress(work, "Compiling", "calls")):
        made, wrong = made + 1, wrong + bool(record["problems"])
        click.echo(json.dumps(record) if as_json else static.line(record))
    click.echo(f"{made} configuration{'s' * (made != 1)}, {wrong} with a problem", err=True)
    context.exit(1 if wrong else 0)


@bench.command()
@click.option("--op", "ops", metavar="NAMES", help="rms_norm, flash_attention ...; default: all.")
@click.option("--dtype", "dtypes", metavar="NAMES", help="float32, float16, bfloat16; default: bfloat16, CPU: float32.")
@click.option(
    "--model", "models", metavar="NAMES", help="7b, 8b, 70b, 135m: whose widths; default: 7b,8b,70b, CPU: 135m."
)
@click.option("--tokens", metavar="NUMBERS", help="Tokens of a row; for decode attention those in the cache.")
@click.option("--batch", metavar="NUMBERS", help="Rows.")
@click.option(
    "--peers", metavar="NAMES",
    help="eager, compile, fused, sdpa (or sdpa-flash ...), liger, flash-attn; default: those that are installed.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Few shapes: about a minute on a GPU.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto is a GPU if there is one.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines, the first of them the header.")
@click.option("--out", metavar="FILE", help="Keep the rows as JSON lines; in a folder, as <device>/kernels.jsonl.")
@click.pass_context
def kernels(context: click.Context, tokens: str | None, batch: str | None, quick: bool, device: str, as_json: bool,
            out: str | None, **lists: str | None) -> None:  # fmt: skip
    """Time every kernel at Llama's shapes beside its peers, and beside what the device allows.

    Norms, RoPE, SwiGLU, cross-entropy and decode attention are bound by memory: read GB/s. Prefill attention and linear
    cross-entropy are bound by arithmetic: read TFLOP/s. "of limit" compares with a copy and a matrix product, measured
    at the start; "ratio" says how many times as long a peer takes as we do; "error" is that against float64, over the
    largest number. A provider that does not compute the same is reported and not timed, and the exit code is then 1.

    Without a GPU the Triton kernels do not run, and our PyTorch path is timed in their place, at a few small shapes.
    """
    harness, bench = benchmarks("harness"), benchmarks("kernels")
    chosen = {key: names(text) or [] for key, text in lists.items()}
    try:
        plan = bench.plan(**chosen, tokens=numbers("--tokens", tokens) or [], batches=numbers("--batch", batch) or [],
                          quick=quick, device=device)  # fmt: skip
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    events = bench.run(plan, command_line(), say=lambda words: click.echo(words, err=True))
    header = next(events)
    for line in [json.dumps(header)] if as_json else bench.heading(header):
        click.echo(line)
    wrong = 0
    with harness.lines_to(Path(out) if out else None, "kernels", header) as keep:
        for event in events:
            if isinstance(event, dict):
                keep(event)
                click.echo(json.dumps(event) if as_json else bench.line(event))
            elif isinstance(event, bench.Left):
                wrong += event.wrong
                click.echo(
                    f"{event.case.op} {event.case.words()}: {event.words()}" if as_json else event.words(), err=as_json
                )
            elif not as_json:
                click.echo(bench.title(event))
    context.exit(1 if wrong else 0)


@bench.command()
@click.argument("where", default="smollm2")
@click.option("--backend", type=BACKENDS, default="auto", help="What computes our side.")
@click.option(
    "--peers", metavar="NAMES",
    help="transformers, llama.cpp, transformers-generate, transformers-compiled; default: of the first two those that "
    "are installed.",
)  # fmt: skip
@click.option(
    "--decoding", metavar="NAMES", help="plain, static, graph: also write with our generate, decoding in these ways."
)
@click.option("--prompt", metavar="NUMBERS", help="Lengths of the prompts to read.  [default: 512,4096]")
@click.option("--new", type=click.IntRange(0), default=128, help="How many tokens to write; 0 leaves writing out.")
@click.option("--batch", metavar="NUMBERS", help="How many texts at once.  [default: 1,8,32]")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto", help="auto is the file's."
)
@click.option("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto is a GPU if there is one.")
@click.option("--runs", type=click.IntRange(1), default=5, help="Turns of each provider.")
@click.option("--threads", type=click.IntRange(1), help="Of a CPU; default: as many as PyTorch takes.")
@click.option("--memory/--no-memory", default=True, help="Peak memory, on a CPU by a process for each line.")
@click.option("--format", "form", type=click.Choice(["md", "csv", "json"]), default="md", help="How rows are printed.")
@click.option("--out", metavar="FILE", help="Keep the rows as JSON lines; in a folder, as <device>/model.jsonl.")
def model(where: str, peers: str | None, decoding: str | None, prompt: str | None, batch: str | None, form: str,
          out: str | None, **options: Any) -> None:  # fmt: skip
    """Time the model WHERE as a whole, beside transformers and llama.cpp, turn by turn.

    pp512 reads a prompt of 512 tokens, tg128 writes 128 tokens, as llama-bench calls them. All providers are first
    checked to compute the same. "of floor" is how near each comes to what this machine's memory or arithmetic allows,
    measured in the same turns; "theirs / ours" says how many times as long it takes as we do.

    "llama" and "transformers" are bare loops over forward. --decoding, transformers-generate and transformers-compiled
    (its generate with a static cache, through torch.compile) write with a whole generate.
    """
    generation = benchmarks("generation")
    harness = benchmarks("harness")
    rows = generation.benchmark(
        where,
        peers=names(peers),
        decodings=names(decoding) or (),
        prompts=numbers("--prompt", prompt),
        batches=numbers("--batch", batch),
        say=lambda words: click.echo(words, err=True),
        **options,
    )
    try:
        first = next(rows, None)  # what goes wrong does so before the file is touched
    except harness.NotHere as error:
        raise click.UsageError(str(error)) from error
    if first is None:
        raise ValueError("nothing was measured, for all of it was left out; --prompt and --batch together choose tests")
    header = harness.header(command_line(), gpu=first["threads"] is None)  # with the clocks of a device at work
    with harness.lines_to(Path(out) if out else None, "model", header) as keep:

        def kept() -> Iterator[dict[str, Any]]:
            for row in chain([first], rows):
                keep(row)
                yield row

        for line in generation.FORMATS[form](kept()):
            click.echo(line)


@bench.command()
@click.option("--results", multiple=True, metavar="DIR", help="Where results lie; default: those of this repository.")
@click.option("--out", default="report.html", metavar="FILE", help="The page to write.")
@click.option("--pictures", is_flag=True, help="Also write each picture beside its results, light and dark.")
def report(results: tuple[str, ...], out: str, pictures: bool) -> None:
    """Make one page of HTML of all results: tables and pictures, with nothing to load from elsewhere.

    Prints the path of the page.
    """
    folders = [Path(name) for name in results]
    click.echo(benchmarks("report").write(folders, Path(out), pictures))


def benchmarks(module: str) -> Any:
    """A module of the benchmarks, which need more than the core."""
    try:
        return importlib.import_module(f"llama.benchmarks.{module}")
    except ModuleNotFoundError as error:
        raise ValueError(f'bench needs {error.name}: pip install "llama-triton[torch]" matplotlib') from error


def command_line() -> str:
    return " ".join(["llama", *sys.argv[1:]])


def names(text: str | None) -> list[str] | None:
    """The names of "a,b"."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def numbers(option: str, text: str | None) -> list[int] | None:
    """The numbers of "1,8,32"."""
    if text is None:
        return None
    parts = text.split(",")
    if not all(part.strip().isdecimal() and int(part) for part in parts):
        raise click.BadParameter(f"{text!r} is not a list of numbers like 1,8,32", param_hint=option)
    return [int(part) for part in parts]


def system_message(text: str | None) -> list[dict[str, str]]:
    return [] if text is None else [{"role": "system", "content": text}]


def open_session(model: str, backend: str, max_new_tokens: int, **sampling: Any) -> "Session":
    from .reference import Sampler
    from .session import Session

    if sampling["temperature"] == 0:
        idle = [n for n, neutral in (("top_k", None), ("top_p", 1.0), ("min_p", 0.0)) if sampling[n] != neutral]
        if idle:
            raise click.UsageError(f"--{idle[0].replace('_', '-')} needs --temperature above 0: 0 draws nothing")
    return Session(model, backend, max_new_tokens, Sampler(**sampling))


def main() -> None:
    """Run the command line; errors that a user can mend become a sentence and exit code 1 (usage: 2)."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character shows another
    warnings.showwarning = lambda message, *_: click.echo(f"llama: {message}", err=True)
    try:
        cli(prog_name="llama")
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        said = str(error) or type(error).__name__
        if isinstance(error, RuntimeError):  # PyTorch's, as of a GPU that is full, go on for many lines
            said = said.splitlines()[0]
        if isinstance(error, OSError) and error.strerror:  # without "[Errno 2]"
            said = ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
        click.echo(f"llama: {said}", err=True)
        sys.exit(1)
