"""What the benchmark scripts remember of a model: a JSON file each, found again by the content of the weights.

So a stopped run goes on, a model is never measured twice, and one that was overwritten is not taken for the old one.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch


def model_arguments(parser: argparse.ArgumentParser, *, batch_size: int, out: str) -> None:
    """What every script takes that measures a dense model and small ones beside it."""
    parser.add_argument("dense")
    parser.add_argument("small", nargs="*")
    parser.add_argument("--batch-size", type=int, default=batch_size)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="float32")
    parser.add_argument("--out", default=out)


def record_path(out: Path, model: str, *settings: object) -> Path:
    """File in `out` for what is measured of a model under these settings."""
    digest = hashlib.sha256(repr([fingerprint([model]), *settings]).encode()).hexdigest()
    return out / f"{label(model)}-{digest[:10]}.json"


def fingerprint(paths: Iterable[str | Path]) -> str:
    """SHA-256 over files and over the weights, configuration, tokenizer and tasks in folders; of a hub id, its name."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        if not path.exists():
            digest.update(str(path).encode())
        inside = (item for item in path.glob("*") if item.suffix in (".safetensors", ".json", ".jsonl", ".yaml"))
        for file in [path] if path.is_file() else sorted(inside):
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def label(model: str) -> str:
    """A short name for tables: that of the run for RUN/model, of the file for a GGUF."""
    path = Path(model)
    return path.stem if path.suffix == ".gguf" else path.parent.name if path.name == "model" else path.name


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a record as JSON, whole or not at all: a script may be stopped at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record) + "\n", encoding="utf-8")
    partial.replace(path)


def markdown(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
