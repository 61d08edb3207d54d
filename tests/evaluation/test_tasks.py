from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from lorashear.errors import DataError
from lorashear.evaluation.tasks import TaskResult, evaluate_task, task_names

pytestmark = pytest.mark.slow  # importing the harness takes seconds

ITEMS = [
    {"question": "The quick brown", "choices": ["fox jumps over", "lazy dog", "head"], "label": 0},
    {"question": "A head of attention", "choices": ["walked to zero", "reads the keys and writes"], "label": 1},
    {"question": "Channels that carry", "choices": ["little are", "dog", "over the lazy dog"], "label": 0},
    {"question": "What stays", "choices": ["has learnt, step by step", "to do without them"], "label": 1},
]
YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: items.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: question
doc_to_target: label
doc_to_choice: choices
metric_list: [{metrics}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
    (tasks / "a.yaml").write_text(YAML.format(name="plain", metrics="{metric: acc}"))
    (tasks / "b.yaml").write_text(YAML.format(name="both", metrics="{metric: acc}, {metric: acc_norm}"))
    return tasks


def log_likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, context: str, choice: str) -> float:
    given, whole = tokenizer(context)["input_ids"], tokenizer(f"{context} {choice}")["input_ids"]
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logs[at - 1, whole[at]].item() for at in range(len(given), len(whole)))


def test_items_are_those_of_a_plain_reckoning(
    folder: Path, pico_llama: Callable[..., PreTrainedModel], pico_tokenizer: PreTrainedTokenizerFast
) -> None:
    model = pico_llama().train()
    wanted: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    model.eval()
    for item in ITEMS:
        likely = [log_likelihood(model, pico_tokenizer, item["question"], choice) for choice in item["choices"]]  # type: ignore
        by_length = [value / len(choice) for value, choice in zip(likely, item["choices"], strict=True)]  # type: ignore
        wanted["acc"].append(float(likely.index(max(likely)) == item["label"]))
        wanted["acc_norm"].append(float(by_length.index(max(by_length)) == item["label"]))
    assert wanted["acc"] != wanted["acc_norm"]
    model.train()
    before = Path.cwd()
    found = evaluate_task(model, pico_tokenizer, folder, "both", batch_size=3)
    assert found.items == wanted
    assert found.metric == "acc_norm"
    assert found.accuracy == sum(wanted["acc_norm"]) / len(ITEMS)
    assert evaluate_task(model, pico_tokenizer, folder, "plain", limit=2).quoted == wanted["acc"][:2]
    assert model.training
    assert Path.cwd() == before


def test_names(folder: Path, tmp_path: Path) -> None:
    assert task_names(folder) == ("both", "plain")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no task of lm-evaluation-harness in this folder"):
        task_names(tmp_path / "empty")
    with pytest.raises(DataError, match="no such folder"):
        task_names(tmp_path / "nowhere")


def test_unknown_task(
    folder: Path, pico_llama: Callable[..., PreTrainedModel], pico_tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(DataError, match="no task boolq; there are both, plain"):
        evaluate_task(pico_llama(), pico_tokenizer, folder, "boolq")


def test_the_metric_to_quote() -> None:
    assert TaskResult({"acc": [1.0, 0.0]}, 0.0).metric == "acc"
    assert TaskResult({"acc": [1.0, 0.0], "acc_norm": [0.0, 0.0]}, 0.0).accuracy == 0
