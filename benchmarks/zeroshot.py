"""Zero-shot accuracy of small models beside that of the dense one, item by item.

    python benchmarks/zeroshot.py TASKS DENSE SMALL [SMALL ...] --dtype bfloat16 --batch-size 16

TASKS is a folder with multiple-choice tasks of lm-evaluation-harness (YAML and the JSONL files that it names); DENSE and
SMALL are folders, GGUF files or hub ids. Every item's result is kept as JSON in OUT, a file a model, so that the script
can be stopped and started again, and a model that was evaluated before is not evaluated again.

The table gives the accuracy per task (acc_norm where the task has it, else acc) and the mean over tasks, and what each
small model lost of that mean, in points and in per cent of the dense model's, with 95 % intervals of a paired bootstrap:
items are drawn with replacement within each task, the same ones for both models.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import torch
from records import fingerprint, label, markdown, model_arguments, record_path, write_record
from torch import Tensor

from lorashear.evaluation.tasks import TaskResult, evaluate_task, task_names
from lorashear.models import load_model

Results = Mapping[str, TaskResult]
"""Task -> result of one model."""

_DRAWS_AT_ONCE = 500


@dataclass(frozen=True)
class Drop:
    """What a small model lost of the dense one's mean accuracy over tasks; negative where it gained."""

    points: float
    """Dense minus small, in points (per cent of the items)."""
    points_interval: tuple[float, float]
    """Lower and upper end of the 95 % interval."""
    percent: float
    """The same as a share of the dense model's mean accuracy, in per cent."""
    percent_interval: tuple[float, float]


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    models = [arguments.dense, *arguments.small]
    results = [_results(model, arguments) for model in models]
    table = render([label(model) for model in models], results)
    (Path(arguments.out) / "table.md").write_text(table, encoding="utf-8")
    print(table)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks")
    model_arguments(parser, batch_size=16, out="runs/zeroshot")
    parser.add_argument("--limit", type=int, help="only the first so many items of each task")
    return parser.parse_args()


def _results(model: str, arguments: argparse.Namespace) -> Results:
    """What is on record for a model, completed by what is not."""
    settings = (fingerprint([arguments.tasks]), arguments.dtype, arguments.limit)
    path = record_path(Path(arguments.out), model, *settings)
    stored = json.loads(path.read_text(encoding="utf-8"))["tasks"] if path.is_file() else {}
    results = {name: TaskResult(**values) for name, values in stored.items()}
    names = task_names(arguments.tasks)
    missing = [name for name in names if name not in results]
    loaded = load_model(model, dtype=getattr(torch, arguments.dtype)) if missing else None
    for name in missing:
        assert loaded is not None
        results[name] = evaluate_task(
            loaded.model,
            loaded.tokenizer,
            arguments.tasks,
            name,
            limit=arguments.limit,
            batch_size=arguments.batch_size,
        )
        print(f"{label(model)}: {name} {results[name].accuracy:.1%}, {results[name].seconds:.0f} s", flush=True)
        record = {"model": model, "dtype": arguments.dtype, "limit": arguments.limit}
        record["tasks"] = {task: asdict(result) for task, result in results.items()}
        write_record(path, record)
    return {name: results[name] for name in names}


def paired_bootstrap(dense: Results, small: Results, *, draws: int = 10_000, seed: int = 0) -> Drop:
    """The drop of the mean over tasks, and between which values 95 % of its resampled values lie.

    Args:
        dense: results of the same items in the same order as in `small`.
        small: of the model that is compared with it.
        draws: how often all items are resampled.
        seed: of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    pairs = [torch.tensor([list(dense[task].quoted), list(small[task].quoted)]).double() for task in dense]
    means = torch.stack([pair.mean(1) for pair in pairs]).mean(0)
    drawn = torch.stack([_resampled_means(pair, draws, generator) for pair in pairs]).mean(0)
    ends = torch.tensor([0.025, 0.975]).double()

    def interval(values: Tensor) -> tuple[float, float]:
        low, high = values.quantile(ends).tolist()
        return low, high

    lost, lost_drawn = means[0] - means[1], drawn[0] - drawn[1]
    return Drop(
        points=100 * lost.item(),
        points_interval=interval(100 * lost_drawn),
        percent=100 * (lost / means[0]).item(),
        percent_interval=interval(100 * lost_drawn / drawn[0]),
    )


def _resampled_means(pair: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Mean of a task's items in each draw, `(2, draws)`, from `pair` `(2, items)`; both rows get the same items."""
    items = pair.shape[1]
    parts = []
    for start in range(0, draws, _DRAWS_AT_ONCE):
        count = min(_DRAWS_AT_ONCE, draws - start)
        parts.append(pair[:, torch.randint(items, (count, items), generator=generator)].mean(-1))
    return torch.cat(parts, dim=1)


def render(labels: Sequence[str], results: Sequence[Results]) -> str:
    """Markdown: a line a task, a column a model, the dense one first; below the means what was lost."""
    dense, *small = results
    tasks = list(dense)
    rows = [
        [task, dense[task].metric, str(len(dense[task].quoted)), *(f"{each[task].accuracy:.1%}" for each in results)]
        for task in tasks
    ]
    means = [mean(each[task].accuracy for task in tasks) for each in results]
    items = sum(len(dense[task].quoted) for task in tasks)
    rows.append([f"**mean of {len(tasks)}**", "", str(items), *(f"**{value:.1%}**" for value in means)])
    if small:
        drops = [paired_bootstrap(dense, each) for each in small]
        rows.append(["drop in points", "", "", "", *(_show(d.points, d.points_interval) for d in drops)])
        rows.append(["drop in % of dense", "", "", "", *(_show(d.percent, d.percent_interval) for d in drops)])
    return markdown(["task", "metric", "items", *labels], rows)


def _show(value: float, interval: tuple[float, float]) -> str:
    return f"{value:.2f} ({interval[0]:.2f} to {interval[1]:.2f})"


if __name__ == "__main__":
    main()
