"""The command line: `llama fetch`, `generate`, `chat`, `verify`, `info`, `convert` and `bench`."""

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
    """A group whose commands exit with a short message on Ctrl-C."""

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
    """Download, run, check and convert LLaMA models.

    MODEL is always a folder in Hugging Face's or Meta's (consolidated.*.pth) layout, a .gguf file, the id of a model on
    the Hugging Face Hub (org/name, or org/name/file.gguf), or the alias smollm2, which downloads 93 MB of real weights
    (SmolLM2-135M-Instruct, Apache-2.0) on first use. Downloaded models are used without asking the network again.
    """


def model_options(command: Any) -> Any:
    """The options that `generate` and `chat` share."""
    for option in (
        # in reverse: each decorator puts its option before those already there
        click.option("--seed", type=click.IntRange(0), help="Sample the same tokens every time."),
        click.option("--repetition-penalty", default=1.0, help="Above 1 makes tokens of the text so far less likely."),
        click.option("--min-p", default=0.0, help="Drop tokens below this fraction of the highest probability."),
        click.option("--top-p", default=1.0, help="Sample from the fewest tokens with this total probability."),
        click.option("--top-k", type=click.IntRange(1), help="Sample from this many likeliest tokens."),
        click.option("--temperature", default=0.0, help="0 takes the likeliest token, above 0 samples."),
        click.option("--max-new-tokens", type=click.IntRange(1), default=256, help="Maximum length of the answer."),
        click.option("--backend", type=BACKENDS, default="auto", help="The backend; auto is torch if installed."),
        click.option("--model", "-m", default="smollm2", metavar="MODEL", help="The model to use."),
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("model", metavar="MODEL")
@click.option("--revision", metavar="NAME", help="A branch, tag or commit of a model on the Hub.")
@click.option("--update", is_flag=True, help="Ask the Hub for a newer commit, and download what changed.")
def fetch(model: str, revision: str | None, update: bool) -> None:
    """Download MODEL, a Hugging Face id or the alias smollm2, unless it is cached; print its path.

    For private and gated models log in with `hf auth login`, or set HF_TOKEN. HF_HOME replaces ~/.cache/huggingface.
    """
    from .checkpoints import find

    click.echo(find(model, revision=revision, update=update))


@cli.command()
@click.argument("prompt")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without the model's chat template.")
@click.option("--system", help="A system message before the prompt.")
@model_options
def generate(prompt: str, raw: bool, system: str | None, **options: Any) -> None:
    """Answer PROMPT ("-" reads standard input), printing the text as it is generated.

    If the model has a chat template, PROMPT is a user's message; otherwise the model continues the text.
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
    """Chat with a model. /exit or the end of input leaves, Ctrl-C stops an answer.

    If the input is not a terminal, exits with 1 if a line could not be answered.
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
        except ValueError as error:  # the conversation has grown too long, or the template rejects it
            click.echo(f"llama: {error}", err=True)
            failed = True
        if pieces:
            messages.append({"role": "assistant", "content": "".join(pieces)})
        else:
            messages.pop()  # forget a message without an answer
        click.echo()
    if sys.stdin.isatty():
        click.echo()
    elif failed:
        sys.exit(1)


@cli.command()
@click.argument("model", default="smollm2")
@click.option("--backend", type=click.Choice(["auto", "torch", "triton"]), default="auto", help="The backend to check.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "float16", "bfloat16"]),
    default="auto",
    help="The backend's dtype; auto is the file's.",
)
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="A text to run; may be repeated.")
@click.pass_context
def verify(context: click.Context, model: str, backend: str, dtype: str, prompts: tuple[str, ...]) -> None:
    """Compare a backend with the NumPy reference, layer by layer, on MODEL.

    Prints the largest error of each layer, and how many next tokens agree. Exits with 1 if an error exceeds the budget
    (relative to the layer's largest value: 1e-4 in float32, 3e-2 in float16, 0.25 in bfloat16), or if a next token
    differs without being a near tie.
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
@click.option("--tokens", type=click.IntRange(1), help="Length of the cache.  [default: 4096, or the context]")
@click.option("--batch", type=click.IntRange(1), default=1, help="Number of texts at once.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, with the whole configuration and exact bytes.")
def info(model: str, tokens: int | None, batch: int, as_json: bool) -> None:
    """Describe MODEL and the memory it needs to run, from its headers: no weights are read.

    Of a model on the Hub, safetensors weights are not downloaded either; other formats are.
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
    help="Mean-pool the key and value heads to K.",
)
@click.option("--max-shard-size", "--max_shard_size", default="5GB", metavar="SIZE", help="Maximum size of a file.")
@click.option("--verify", is_flag=True, help="Read everything back and compare it bit for bit with the source.")
@click.option("--force", is_flag=True, help="Replace another model in OUT, or one changed since.")
@click.option("--revision", metavar="NAME", help="A branch, tag or commit, if WHERE is on the Hub.")
@click.option("--input-dir", "--input_dir", metavar="DIR", help="WHERE, as transformers' script calls it.")
@click.option("--output-dir", "--output_dir", metavar="DIR", help="OUT, as transformers' script calls it.")
@click.option("--model-size", "--model_size", metavar="SIZE", help="7B, 70B ...: Meta's files are checked against it.")
@click.option(
    "--llama-version", "--llama_version", metavar="VERSION",
    help="1, 2, 3, 3.1, 3.2: checked too, and decides where the files are ambiguous.",
)  # fmt: skip
@click.option(
    "--num-shards",
    "--num_shards",
    type=click.IntRange(1),
    metavar="N",
    help="Expected number of consolidated.NN.pth; with --to meta, the number to write.",
)
@click.option(
    "--instruct", is_flag=True, help="Meta's files are an instruct Llama 3; by default, if their folder's name says so."
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
    """Write the model at WHERE (a MODEL) into the folder OUT.

    Only one tensor at a time is in memory, and dtypes are kept. Run again, an interrupted conversion resumes where it
    stopped, and a finished one is left alone, edits included. The arguments of transformers' script work too:

        llama convert --input_dir DIR --model_size 7B --output_dir OUT
    """
    from .checkpoints import find, open_checkpoint
    from .checkpoints.convert import convert
    from .checkpoints.meta import MetaFolder

    if safe_serialization is False:
        raise click.UsageError("only safetensors can be written; leave --safe-serialization out")
    places = [place for place in (input_dir, where, out, output_dir) if place is not None]
    if len(places) != 2:
        raise click.UsageError("give WHERE and OUT, or --input-dir and --output-dir: one path to read, one to write")
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
        click.echo("llama: interrupted; run the same command again to resume", err=True)
        sys.exit(130)


@cli.group()
def bench() -> None:
    """Measure kernels and whole models, and report the results on a page."""


@bench.command()
@click.option(
    "--target", "targets", multiple=True, metavar="GPU", help="sm_80, sm_89, sm_90, sm_100, gfx942; default: all."
)
@click.option("--kernel", metavar="NAME", help="Only this kernel, such as flash_attention.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line, with all facts.")
@click.pass_context
def static(context: click.Context, targets: tuple[str, ...], kernel: str | None, as_json: bool) -> None:
    """Compile every kernel in every configuration for GPUs that need not be present, and inspect the machine code.

    Prints registers, spills, shared memory and the matrix instruction of each. Exits with 1 if one has a problem: a
    spill, too much shared memory, double precision, or no matrix instruction or 128-bit load where one is possible.
    """
    try:
        from . import static
    except ImportError as error:
        raise ValueError('bench static needs PyTorch and Triton: pip install "llama-triton[torch]"') from error
    from .progress import progress

    names = [name for given in targets for name in given.split(",")] or list(static.TARGETS)
    for name in names:
        if name not in static.TARGETS:
            raise click.UsageError(f"unknown target {name!r}; choose from {', '.join(static.TARGETS)}")
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
    "--model", "models", metavar="NAMES", help="7b, 8b, 70b, 135m: whose shapes; default: 7b,8b,70b, CPU: 135m."
)
@click.option("--tokens", metavar="NUMBERS", help="Tokens per row; for decode attention, tokens in the cache.")
@click.option("--batch", metavar="NUMBERS", help="Rows.")
@click.option(
    "--peers", metavar="NAMES",
    help="eager, compile, fused, sdpa (or sdpa-flash ...), liger, flash-attn; default: those installed.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Few shapes: about a minute on a GPU.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto is a GPU if there is one.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON lines, the first of them the header.")
@click.option("--out", metavar="FILE", help="Save the rows as JSON lines; in a folder, as <device>/kernels.jsonl.")
@click.pass_context
def kernels(context: click.Context, tokens: str | None, batch: str | None, quick: bool, device: str, as_json: bool,
            out: str | None, **lists: str | None) -> None:  # fmt: skip
    """Time every kernel at Llama's shapes, and compare it with its peers and with the device's limits.

    Norms, RoPE, SwiGLU, cross-entropy and decode attention are memory-bound: read GB/s. Prefill attention and linear
    cross-entropy are compute-bound: read TFLOP/s. "of limit" compares with a copy and a matrix product, measured at the
    start; "ratio" is a peer's time divided by ours; "error" is the error against float64, divided by the largest value.
    A provider whose results differ is reported but not timed, and the exit code is then 1.

    Without a GPU the Triton kernels do not run: our PyTorch path is timed instead, at a few small shapes.
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
@click.option("--backend", type=BACKENDS, default="auto", help="The backend on our side.")
@click.option(
    "--peers", metavar="NAMES",
    help="transformers, llama.cpp, transformers-generate, transformers-compiled; default: the first two, if installed.",
)  # fmt: skip
@click.option(
    "--decoding", metavar="NAMES", help="plain, static, graph: also time our generate with these decoding modes."
)
@click.option("--prompt", metavar="NUMBERS", help="Lengths of the prompts.  [default: 512,4096]")
@click.option("--new", type=click.IntRange(0), default=128, help="Number of tokens to generate; 0 skips generation.")
@click.option("--batch", metavar="NUMBERS", help="Number of texts at once.  [default: 1,8,32]")
@click.option(
    "--dtype", type=click.Choice(["auto", "float32", "float16", "bfloat16"]), default="auto", help="auto is the file's."
)
@click.option("--device", default="auto", help="cpu, cuda, cuda:1 ...; auto is a GPU if there is one.")
@click.option("--runs", type=click.IntRange(1), default=5, help="Number of timed runs of each provider.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default: PyTorch's choice.")
@click.option("--memory/--no-memory", default=True, help="Peak memory, on a CPU with a process for each row.")
@click.option("--format", "form", type=click.Choice(["md", "csv", "json"]), default="md", help="How rows are printed.")
@click.option("--out", metavar="FILE", help="Save the rows as JSON lines; in a folder, as <device>/model.jsonl.")
def model(where: str, peers: str | None, decoding: str | None, prompt: str | None, batch: str | None, form: str,
          out: str | None, **options: Any) -> None:  # fmt: skip
    """Time the whole model WHERE against transformers and llama.cpp, in alternating runs.

    As in llama-bench, pp512 reads a prompt of 512 tokens and tg128 generates 128 tokens. All providers are first
    checked to give the same results. "of floor" is how close each comes to the limit of this machine's memory or
    arithmetic, measured in the same runs; "theirs / ours" is a provider's time divided by ours.

    "llama" and "transformers" are bare loops over forward. --decoding, transformers-generate and transformers-compiled
    (its generate with a static cache, through torch.compile) call a complete generate.
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
        first = next(rows, None)  # so that errors come before the file is touched
    except harness.NotHere as error:
        raise click.UsageError(str(error)) from error
    if first is None:
        raise ValueError("nothing was measured: every test was left out; --prompt and --batch choose the tests")
    header = harness.header(command_line(), gpu=first["threads"] is None)  # with the clocks of a busy device
    with harness.lines_to(Path(out) if out else None, "model", header) as keep:

        def kept() -> Iterator[dict[str, Any]]:
            for row in chain([first], rows):
                keep(row)
                yield row

        for line in generation.FORMATS[form](kept()):
            click.echo(line)


@bench.command()
@click.option("--results", multiple=True, metavar="DIR", help="A folder of results; default: those of this repository.")
@click.option("--out", default="report.html", metavar="FILE", help="The page to write.")
@click.option("--pictures", is_flag=True, help="Also write each picture next to its results, light and dark.")
def report(results: tuple[str, ...], out: str, pictures: bool) -> None:
    """Make one self-contained HTML page of all results, with tables and pictures.

    Prints the path of the page.
    """
    folders = [Path(name) for name in results]
    click.echo(benchmarks("report").write(folders, Path(out), pictures))


def benchmarks(module: str) -> Any:
    """Import a module of the benchmarks, which have more dependencies than the core."""
    try:
        return importlib.import_module(f"llama.benchmarks.{module}")
    except ModuleNotFoundError as error:
        raise ValueError(f'bench needs {error.name}: pip install "llama-triton[torch]" matplotlib') from error


def command_line() -> str:
    return " ".join(["llama", *sys.argv[1:]])


def names(text: str | None) -> list[str] | None:
    """Parse names like "a,b"."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def numbers(option: str, text: str | None) -> list[int] | None:
    """Parse numbers like "1,8,32"."""
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
            raise click.UsageError(f"--{idle[0].replace('_', '-')} needs --temperature above 0: 0 does not sample")
    return Session(model, backend, max_new_tokens, Sampler(**sampling))


def main() -> None:
    """Run the command line; errors that a user can fix become a one-line message and exit code 1 (usage errors: 2)."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the parent process
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # for characters that the terminal cannot encode
    warnings.showwarning = lambda message, *_: click.echo(f"llama: {message}", err=True)
    try:
        cli(prog_name="llama")
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        said = str(error) or type(error).__name__
        if isinstance(error, RuntimeError):  # PyTorch's, such as CUDA out of memory, have many lines
            said = said.splitlines()[0]
        if isinstance(error, OSError) and error.strerror:  # without "[Errno 2]"
            said = ": ".join(str(part) for part in (error.filename, error.strerror) if part is not None)
        click.echo(f"llama: {said}", err=True)
        sys.exit(1)
