"""The command line: each command parses its options, builds the settings, calls one public function, prints."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from lorashear.errors import LorashearError, first_line

if TYPE_CHECKING:
    from lorashear.pipeline import CompressResult

app = typer.Typer(
    name="lorashear",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Makes large language models smaller and keeps what they know. The commands follow the pipeline.",
)
out = Console()
err = Console(stderr=True)

EXIT_NOT_EQUAL = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id or GGUF file.", show_default=False)]
RunOrModel = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="Run folder, model folder, hub id or GGUF file.", show_default=False)
]
Data = Annotated[
    str | None,
    typer.Option("--data", help='YAML file, folder of JSONL files, one file, or "demo" for the built-in text.'),
]
Out = Annotated[Path, typer.Option("--out", help="Folder for the results; must be new or empty.", show_default=False)]
Config = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; options given here win.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any setting by its dotted name, e.g. prune.periods=10."),
]
Ratio = Annotated[float | None, typer.Option("--ratio", help="Share of the parameters to remove, between 0 and 1.")]
Tokens = Annotated[int | None, typer.Option("--tokens", help="Training tokens of pruning and recovery together.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of everything that is drawn.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped, in the same --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for machines instead of tables.")]
Remote = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the checkpoint's own Python code; off unless you ask for it.")
]


class ShapeOption(StrEnum):
    """Shape of the result."""

    UNIFORM = "uniform"
    PER_LAYER = "per-layer"


class RatioOfOption(StrEnum):
    """What the ratio is a share of."""

    MODEL = "model"
    DECODER = "decoder"


class TrainOption(StrEnum):
    """What learns."""

    AUTO = "auto"
    ADAPTERS = "adapters"
    ALL = "all"


class DtypeOption(StrEnum):
    """Autocast of training."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class MethodOption(StrEnum):
    """How structures are chosen and taken out."""

    LHSPG = "lhspg"
    HESSO = "hesso"
    GRASPRUNE = "grasprune"
    ONE_SHOT = "one-shot"
    TAYLOR = "taylor"
    TAYLOR_VECTOR = "taylor-vector"
    WANDA_SP = "wanda-sp"
    FLAP = "flap"
    SLICEGPT = "slicegpt"
    DEPTH = "depth"
    MAGNITUDE = "magnitude"
    RANDOM = "random"


Shape = Annotated[ShapeOption | None, typer.Option("--shape", help="Equal widths in all layers, or their own.")]
RatioOf = Annotated[RatioOfOption | None, typer.Option("--ratio-of", help="What --ratio is a share of.")]
Train = Annotated[TrainOption | None, typer.Option("--train", help="What learns in recovery; auto goes by memory.")]
DtypeChoice = Annotated[
    DtypeOption | None,
    typer.Option("--dtype", help="Number format; auto: bfloat16 where a GPU has it, timed on CPUs."),
]
Method = Annotated[MethodOption | None, typer.Option("--method", help="lhspg, or one to compare it with.")]
Reference = Annotated[
    bool | None, typer.Option("--reference/--no-reference", help="Also fine-tune the dense model, for the table.")
]


@app.callback(invoke_without_command=True)
def _main(version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False) -> None:
    if version:
        from lorashear import __version__

        out.print(f"lorashear {__version__}", highlight=False)
        raise typer.Exit


@app.command()
def demo(
    out_: Annotated[Path, typer.Option("--out", help="Folder for the results; must be new or empty.")] = Path(
        "runs/demo"
    ),
    ratio: Ratio = None,
    tokens: Tokens = None,
    seed: Seed = None,
    config: Config = None,
    set_: Set = None,
    resume: Resume = False,
) -> None:
    """The whole pipeline on a small built-in model: minutes on a laptop CPU, nothing is downloaded."""
    from lorashear.data.demo import demo_model_path
    from lorashear.pipeline import DEMO_QUESTIONS, DEMO_SETTINGS
    from lorashear.pipeline import compress as run

    settings = _given({"prune.ratio": ratio, "tokens": tokens, "seed": seed}, config, set_, base=DEMO_SETTINGS)
    result = run(
        demo_model_path(), data="demo", out=out_, settings=settings, resume=resume, chat=True, questions=DEMO_QUESTIONS
    )
    _show(result, chat=True)


@app.command()
def inspect(model: Model, as_json: AsJson = False, trust_remote_code: Remote = False) -> None:
    """Node groups: what can be removed together, what is pinned and why. Needs only a config."""
    from lorashear.graph.discover import discover
    from lorashear.models import load_config_model
    from lorashear.reporting.tables import groups_json, groups_table

    empty, _ = load_config_model(model, trust_remote_code=trust_remote_code)
    graph = discover(empty)
    if as_json:
        _print_json(groups_json(graph))
    else:
        out.print(groups_table(graph))


@app.command()
def verify(
    model: Model,
    plans: Annotated[int, typer.Option("--plans", min=1, help="Random plans a kind of group.")] = 3,
    seed: Seed = 0,
    as_json: AsJson = False,
    trust_remote_code: Remote = False,
) -> None:
    """Proves zeroed == cut on this very model, kind by kind; exit code 1 where it is not so."""
    from lorashear.models import load_model
    from lorashear.reporting.tables import verification_json, verification_table
    from lorashear.verify import verify as run

    loaded = load_model(model, trust_remote_code=trust_remote_code, with_tokenizer=False).model
    with err.status("finding groups") as status:
        result = run(loaded, plans=plans, seed=seed or 0, progress=lambda kind: status.update(f"comparing {kind}"))
    if as_json:
        _print_json(verification_json(result))
    else:
        out.print(verification_table(result))
        for kind, why in result.not_checked.items():
            out.print(f"[dim]{kind}: not run on the model itself: {escape(why)}[/]")
        for note in result.notes:
            out.print(f"[dim]{escape(note)}[/]")
        out.print(f"Prunable: {result.prunable_share:.1%} of the parameters.")
    if not result.equal:
        raise typer.Exit(EXIT_NOT_EQUAL)


@app.command()
def plan(
    model: Model,
    ratio: Ratio = None,
    ratio_of: RatioOf = None,
    shape: Shape = None,
    config: Config = None,
    set_: Set = None,
    as_json: AsJson = False,
    trust_remote_code: Remote = False,
) -> None:
    """Sizes that a ratio leads to, every structure counting alike. Needs only a config."""
    from lorashear.preview import preview

    settings = _given({"prune.ratio": ratio, "prune.ratio_of": ratio_of, "prune.shape": shape}, config, set_)
    found = preview(model, settings=settings, trust_remote_code=trust_remote_code)
    if as_json:
        _print_json(found.to_dict())
    else:
        out.print(found.table())


@app.command()
def analyze(
    model: Model,
    out_: Out,
    data: Data = None,
    config: Config = None,
    set_: Set = None,
    trust_remote_code: Remote = False,
) -> None:
    """Knowledge distribution: how much each node group holds, per source, as JSON and as a picture."""
    from lorashear.pipeline import analyze_run
    from lorashear.reporting.tables import profile_table

    profile = analyze_run(
        model, data=_data(data), out=out_, settings=_given({}, config, set_), trust_remote_code=trust_remote_code
    )
    out.print(profile_table(profile))
    _say(f"Written: {out_ / 'profile.json'} and {out_ / 'profile.png'}")


@app.command()
def prune(
    model: Model,
    out_: Out,
    data: Data = None,
    ratio: Ratio = None,
    ratio_of: RatioOf = None,
    shape: Shape = None,
    method: Method = None,
    tokens: Tokens = None,
    dtype: DtypeChoice = None,
    seed: Seed = None,
    config: Config = None,
    set_: Set = None,
    resume: Resume = False,
    trust_remote_code: Remote = False,
) -> None:
    """Walks the redundant structures to zero and cuts them out; ends with the cut model in OUT/model."""
    from lorashear.pipeline import prune as run

    settings = _given(
        {
            "prune.ratio": ratio, "prune.ratio_of": ratio_of, "prune.shape": shape, "prune.method": method,
            "tokens": tokens, "dtype": dtype, "seed": seed,
        },
        config,
        set_,
    )  # fmt: skip
    result = run(
        model, data=_data(data), out=out_, settings=settings, resume=resume, trust_remote_code=trust_remote_code
    )
    _show(result)


@app.command()
def recover(
    model: RunOrModel,
    out_: Out,
    data: Data = None,
    train: Train = None,
    tokens: Tokens = None,
    dtype: DtypeChoice = None,
    seed: Seed = None,
    config: Config = None,
    set_: Set = None,
    resume: Resume = False,
    trust_remote_code: Remote = False,
) -> None:
    """Fine-tunes back what was lost: general text first, then instructions, most where most is missing."""
    from lorashear.pipeline import recover as run

    settings = _given({"recover.train": train, "tokens": tokens, "dtype": dtype, "seed": seed}, config, set_)
    result = run(
        model, data=_data(data), out=out_, settings=settings, resume=resume, trust_remote_code=trust_remote_code
    )
    _show(result)


@app.command()
def compress(
    model: Model,
    out_: Out,
    data: Data = None,
    ratio: Ratio = None,
    ratio_of: RatioOf = None,
    shape: Shape = None,
    method: Method = None,
    train: Train = None,
    tokens: Tokens = None,
    dtype: DtypeChoice = None,
    seed: Seed = None,
    reference: Reference = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="End with a few fixed questions, answered by both models.")
    ] = False,
    config: Config = None,
    set_: Set = None,
    resume: Resume = False,
    trust_remote_code: Remote = False,
) -> None:
    """All of it: score, prune, cut, recover, evaluate; ends with one table and the small model in OUT/model."""
    from lorashear.pipeline import compress as run

    settings = _given(
        {
            "prune.ratio": ratio, "prune.ratio_of": ratio_of, "prune.shape": shape, "prune.method": method,
            "recover.train": train, "tokens": tokens, "dtype": dtype, "seed": seed, "reference": reference,
        },
        config,
        set_,
    )  # fmt: skip
    result = run(
        model, data=_data(data), out=out_, settings=settings, resume=resume, chat=chat,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip
    _show(result, chat=chat)


@app.command()
def evaluate(
    model: RunOrModel,
    data: Data = None,
    config: Config = None,
    set_: Set = None,
    as_json: AsJson = False,
    trust_remote_code: Remote = False,
) -> None:
    """Token-weighted perplexity per source, their macro mean, and tokens per second."""
    from lorashear.pipeline import evaluate as run
    from lorashear.reporting.tables import result_table

    row = run(model, data=_data(data), settings=_given({}, config, set_), trust_remote_code=trust_remote_code)
    if as_json:
        _print_json(row.to_dict())
    else:
        out.print(result_table([row]))


def _show(result: CompressResult, *, chat: bool = False) -> None:
    out.print(result.table())
    if chat:
        out.print(result.answers())
    _say(f"Model: {result.model_folder}   run: {result.out}   training tokens: {result.tokens:,}")


def _say(line: str) -> None:
    """A line as it is: paths are neither broken nor read as markup."""
    out.print(line, highlight=False, markup=False, soft_wrap=True)


def _data(data: str | None) -> str:
    from lorashear.errors import DataError

    if data is None:
        raise DataError(
            "no data was named; give --data a YAML file with `sources:`, a folder of JSONL files, or `demo` for the "
            "built-in text"
        )
    return data


def _given(
    options: dict[str, Any], config: Path | None, assignments: list[str] | None, *, base: dict[str, Any] | None = None
) -> Any:
    from lorashear.settings_file import read_settings

    return read_settings(
        base=base or {},
        file=config,
        assignments=assignments or [],
        options={key: value for key, value in options.items() if value is not None},
    )


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def main() -> None:
    """Entry point: a user's mistake ends in one paragraph and exit code 2, never in a traceback."""
    _quieten()
    try:
        app()
    except LorashearError as error:
        err.print(f"[bold red]error:[/] {escape(_paragraph(str(error)))}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_BAD_INPUT)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        message = _OUT_OF_MEMORY.format(first_line(error))
        err.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
        sys.exit(EXIT_BAD_INPUT)
    except SystemExit as stop:
        if stop.code == EXIT_INTERRUPTED:  # typer has caught the interrupt by itself
            err.print("stopped; a run with an --out folder goes on from its last checkpoint with --resume")
        raise


_OUT_OF_MEMORY = (
    "out of memory ({}); where something else took it, go on with --resume; else start again in a new folder with "
    "--set micro_batch=1, then also --set distill.teacher=off, --set prune.train=adapters --set recover.train=adapters, "
    "--set weight_dtype=bfloat16, or a smaller data.window"
)


def _is_out_of_memory(error: Exception) -> bool:
    """torch has a class for a GPU's, and for a CPU's nothing but words."""
    import torch

    words = ("not enough memory", "can't allocate memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(each in str(error) for each in words)


def _quieten() -> None:
    """Our own words on standard error; of the libraries below, only what is wrong."""
    import logging
    import warnings

    from rich.logging import RichHandler
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|torch)\.")
    handler = RichHandler(console=err, show_path=False, show_level=False, show_time=False)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], format="%(message)s")
    logging.getLogger("lorashear").setLevel(logging.INFO)
    logging.captureWarnings(True)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # every retry of an unreachable hub is a warning


def _paragraph(text: str) -> str:
    """Messages of other libraries that ours quote may have lines, and empty ones between them."""
    return " ".join(line.strip() for line in text.splitlines() if line.strip())
