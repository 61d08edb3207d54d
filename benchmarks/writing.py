"""What small models write, beside the dense one: do they get stuck, and how probable does the dense model find it?

    python benchmarks/writing.py DATA DENSE SMALL [SMALL ...] --count 32 --dtype bfloat16 --batch-size 16

DATA is a data.yaml (or whatever else `--data` of lorashear takes). Of each of its instruction sources the first COUNT
held-out instructions are answered greedily, through the chat template. The table tells per source

- repeated: share of the 4-grams of an answer's tokens that occurred before in it, mean over answers;
- perplexity: of the answers, to the dense model, token-weighted, given the prompt, the end of an answer included;
- tokens: mean length of an answer without its end; ended: share of answers that came to an end by themselves.

BATCH-SIZE answers are written at a time; above 1 only attention models answer as they do alone.
The answers and figures are kept as JSON in OUT, a file a model; what is there already is not written again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from records import fingerprint, label, markdown, model_arguments, record_path, write_record
from transformers import PreTrainedModel

from lorashear.config import DataSettings
from lorashear.data.sources import question, read_sources
from lorashear.evaluation.samples import Answer, answers_perplexity, repeated_ngrams, write_answers
from lorashear.models import LoadedModel, load_model


@dataclass(frozen=True)
class Writing:
    """What was measured of one model's answers to one source."""

    repeated: float
    perplexity: float
    tokens: float
    ended: float


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    questions = read_questions(arguments.data, arguments.sources, arguments.count)
    models = [arguments.dense, *arguments.small]
    figures = [_figures(model, questions, arguments) for model in models]
    table = render([label(model) for model in models], figures)
    (Path(arguments.out) / "table.md").write_text(table, encoding="utf-8")
    print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data")
    model_arguments(parser, batch_size=1, out="runs/writing")
    parser.add_argument("--sources", nargs="+", help="instruction sources; all of them by default")
    parser.add_argument("--count", type=int, default=32, help="instructions a source")
    parser.add_argument("--new-tokens", type=int, default=128)
    return parser.parse_args()


def read_questions(data: str, names: Sequence[str] | None, count: int) -> dict[str, list[str]]:
    """Source -> the first `count` of its held-out instructions, each with its input."""
    sources = [source for source in read_sources(data, DataSettings()) if source.kind == "instruct"]
    unknown = set(names or ()) - {source.name for source in sources}
    if unknown or not sources:
        raise SystemExit(
            f"{data}: no instruction source {', '.join(sorted(unknown))}; "
            f"it has {', '.join(source.name for source in sources) or 'none'}"
        )
    chosen = [source for source in sources if not names or source.name in names]
    return {source.name: [question(row, source) for row in source.valid[:count]] for source in chosen}


def _figures(model: str, questions: Mapping[str, Sequence[str]], arguments: argparse.Namespace) -> dict[str, Writing]:
    """What is on record for a model, or what it writes now."""
    settings = (fingerprint([arguments.dense]), questions, arguments.new_tokens, arguments.dtype)
    path = record_path(Path(arguments.out), model, *settings)
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))["sources"]
        return {name: Writing(**values["figures"]) for name, values in stored.items()}
    dtype = getattr(torch, arguments.dtype)
    writer = load_model(model, dtype=dtype)
    dense = writer if model == arguments.dense else load_model(arguments.dense, dtype=dtype)
    if writer.tokenizer.get_vocab() != dense.tokenizer.get_vocab():
        raise SystemExit(f"{model}: its tokenizer is not the dense model's, so their tokens cannot be compared")
    sources: dict[str, Any] = {}
    figures = {}
    for name, asked in questions.items():
        answers = write_answers(
            writer.model,
            writer.tokenizer,
            asked,
            max_new_tokens=arguments.new_tokens,
            batch_size=arguments.batch_size,
        )
        figures[name] = measure(dense.model, answers)
        sources[name] = {"figures": asdict(figures[name]), "answers": _plain(writer, asked, answers)}
        print(f"{label(model)}: {name} {figures[name]}", flush=True)
    record = {"model": model, "dense": arguments.dense, "dtype": arguments.dtype, "sources": sources}
    write_record(path, record)
    return figures


def measure(dense: PreTrainedModel, answers: Sequence[Answer]) -> Writing:
    """The figures of a model's answers; `dense` judges how probable they are."""
    return Writing(
        repeated=mean(repeated_ngrams(answer.content) for answer in answers),
        perplexity=answers_perplexity(dense, answers),
        tokens=mean(len(answer.content) for answer in answers),
        ended=mean(answer.ended for answer in answers),
    )


def _plain(writer: LoadedModel, asked: Sequence[str], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [
        {
            "question": text,
            "answer": writer.tokenizer.decode(list(answer.content)),
            "repeated": repeated_ngrams(answer.content),
            "ended": answer.ended,
            "written": list(answer.written),
        }
        for text, answer in zip(asked, answers, strict=True)
    ]


def render(labels: Sequence[str], figures: Sequence[Mapping[str, Writing]]) -> str:
    """Markdown: a line a source and model, the dense model first."""
    rows = []
    for source in figures[0]:
        for name, each in zip(labels, figures, strict=True):
            it = each[source]
            shares = f"{it.repeated:.1%}", f"{it.perplexity:.2f}", f"{it.tokens:.0f}", f"{it.ended:.0%}"
            rows.append([source, name, *shares])
    return markdown(["source", "model", "repeated 4-grams", "perplexity to dense", "tokens", "ended"], rows)


if __name__ == "__main__":
    main()
