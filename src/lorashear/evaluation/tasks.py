"""Accuracy on multiple-choice tasks, measured by EleutherAI's lm-evaluation-harness (extra `eval`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from transformers import PreTrainedModel

from lorashear.errors import DataError
from lorashear.evaluation.inference import inference

QUOTED = ("acc_norm", "acc")
"""The metric that papers on pruning quote of a task is the first of these that the task has."""


@dataclass(frozen=True)
class TaskResult:
    """Every item's result, so that two models can be compared item by item."""

    items: Mapping[str, Sequence[float]]
    """Metric -> 1 or 0 an item, in the order of the task's items."""
    seconds: float

    @property
    def metric(self) -> str:
        """The one to quote."""
        return next(name for name in QUOTED if name in self.items)

    @property
    def quoted(self) -> Sequence[float]:
        """Every item's result by the metric to quote."""
        return self.items[self.metric]

    @property
    def accuracy(self) -> float:
        """Share of items answered rightly, by the metric to quote."""
        return mean(self.quoted)


def task_names(folder: str | Path) -> tuple[str, ...]:
    """Names of the tasks that the YAML files of a folder define, in alphabetical order.

    Raises:
        DataError: where there is none, or the harness is not installed.
    """
    names = tuple(sorted(_manager(folder).all_subtasks))
    if not names:
        raise DataError(f"{folder}: no task of lm-evaluation-harness in this folder; expected YAML files with `task:`")
    return names


def evaluate_task(
    model: PreTrainedModel,
    tokenizer: Any,
    folder: str | Path,
    name: str,
    *,
    limit: int | None = None,
    batch_size: int = 16,
) -> TaskResult:
    """Lets a model choose in every item of one task, by log-likelihood, without examples in the prompt.

    Args:
        model: as it is, in the dtype and on the device it has; losses are summed in float32 whatever the dtype, because
            in bfloat16 the log-likelihoods of an item's choices often come out equal.
        tokenizer: gets a padding token where it has none.
        folder: of the task's YAML file, and where its relative `data_files` start.
        name: one of `task_names(folder)`.
        limit: only the first so many items.
        batch_size: sequences in a forward pass; it does not change the result beyond rounding.

    Raises:
        DataError: for a task that the folder does not have, one that reports neither `acc` nor `acc_norm`, or where the
            harness is not installed.
    """
    begin = time.perf_counter()
    manager = _manager(folder)
    if name not in manager.all_subtasks:
        raise DataError(f"{folder}: no task {name}; there are {', '.join(sorted(manager.all_subtasks)) or 'none'}")
    with contextlib.chdir(folder), inference(model):
        loaded = manager.load([name])
        for task in loaded["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
        harness = _harness().models.huggingface.HFLM(
            pretrained=model, tokenizer=tokenizer, batch_size=batch_size, softmax_dtype=torch.float32
        )
        found = _harness().evaluate(harness, task_dict=loaded, limit=limit, bootstrap_iters=0, log_samples=True)
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    items = {metric: [float(sample[metric]) for sample in samples] for metric in QUOTED if metric in samples[0]}
    if not items:
        raise DataError(f"task {name} reports {', '.join(samples[0]['metrics'])}; expected {' or '.join(QUOTED)}")
    return TaskResult(items, time.perf_counter() - begin)


def _manager(folder: str | Path) -> Any:
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"{folder}: no such folder; expected one with tasks of lm-evaluation-harness as YAML files")
    return _harness().tasks.TaskManager(include_path=str(path.resolve()), include_defaults=False)


def _harness() -> Any:
    """Imported only here: it takes seconds, and is no part of a plain installation."""
    try:
        import lm_eval
        import lm_eval.models.huggingface
        import lm_eval.tasks
    except ImportError as error:
        raise DataError(
            f"tasks are run by lm-evaluation-harness, which cannot be imported ({error}); "
            'install it with `pip install "lorashear[eval]"`'
        ) from error
    return lm_eval
