"""The run folder: prepared before work begins, filled piece by piece, each piece moved into place whole.

It describes itself: settings, versions, seed and fingerprints lie beside every result (`run.json`).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from lorashear.config import CompressSettings
from lorashear.errors import OutputError, SettingsError

RUN_FILE = "run.json"
SAMPLED_ENTRIES = 64
"""Of every parameter, in a model's fingerprint."""
PACKAGES = ("lorashear", "torch", "transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers")


def check_output(out: Path, *, resume: bool) -> None:
    """Raises `OutputError` where results cannot go to `out`; creates nothing.

    A folder that holds something is refused, except by a resume, which needs the run that it goes on with.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file; expected a new or empty folder for the results: name another --out")
    holds = out.is_dir() and any(out.iterdir())
    if holds and not resume:
        raise OutputError(
            f"{out} is not empty; results are never written over others: name a new folder, or go on with the run in "
            "it with --resume"
        )
    if resume and not (out / RUN_FILE).is_file():
        raise OutputError(f"{out} holds no run to resume ({RUN_FILE} is missing); start it without --resume")
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{out} cannot be created: {parent} is not writable; name another --out")


def check_space(out: Path, needed: int) -> None:
    """Raises `OutputError` where fewer than `needed` bytes are free on the disk of `out`."""
    parent = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OutputError(
            f"{parent}: {free / 2**20:,.0f} MiB are free on its disk, about {needed / 2**20:,.0f} MiB are needed for "
            "models and checkpoints; free some space or name another --out"
        )


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """A new folder beside `target`, which takes its place when the block ends well and vanishes when it does not.

    What an earlier writer that was killed left there is removed too, so `target` may have one writer at a time.

    Raises:
        OutputError: where the disk is full.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{target.name}.partial-*"):
        shutil.rmtree(left)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    try:
        with disk_full_explained(target):
            yield partial
            partial.chmod(0o755)  # mkdtemp makes it private
            if target.is_dir():
                shutil.rmtree(target)
            partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def disk_full_explained(target: Path) -> Iterator[None]:
    """A full disk inside, whoever writes, is raised as an `OutputError` that names `target`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if _disk_is_full(error):
            raise _full(target) from error
        raise


def write_json(path: Path, value: Any) -> None:
    """Writes JSON beside `path` and moves it into place.

    Raises:
        OutputError: where the disk is full.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with disk_full_explained(path):
            partial.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _disk_is_full(error: OSError | SafetensorError | RuntimeError) -> bool:
    """safetensors' own exception has the operating system's message, but no number; torch's says only who failed."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOSPC
    return "No space left" in str(error) or "PytorchStreamWriter failed" in str(error)


def _full(path: Path) -> OutputError:
    return OutputError(f"{path}: the disk is full; what was being written was removed: free some space and --resume")


def start_run(
    out: Path,
    *,
    settings: CompressSettings,
    command: str,
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    resume: bool,
) -> dict[str, Any]:
    """Creates the folder with its `run.json`, or checks that a resumed run is the same; returns its content.

    Raises:
        SettingsError: when a resumed run was started with another command, model, data or settings; names the first.
    """
    now = {
        "command": command,
        "settings": settings.model_dump(mode="json"),
        "model": dict(model),
        "data": dict(data),
    }
    if resume:
        before = json.loads((out / RUN_FILE).read_text(encoding="utf-8"))
        difference = _first_difference({key: before.get(key) for key in now}, json.loads(json.dumps(now)))
        if difference:
            key, was, is_ = difference
            raise SettingsError(
                f"{out}: the run was started with {key} = {was!r}, now it is {is_!r}; resume with the same settings, "
                "or start a new run in another folder"
            )
        return dict(before)
    out.mkdir(parents=True, exist_ok=True)
    info = {
        **now,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": sys.argv[1:],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in PACKAGES},
        "stages": {},
    }
    write_json(out / RUN_FILE, info)
    return info


def _first_difference(was: Any, is_: Any, path: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(was, Mapping) and isinstance(is_, Mapping):
        for key in sorted({*was, *is_}):
            below = _first_difference(was.get(key), is_.get(key), f"{path}.{key}" if path else str(key))
            if below:
                return below
        return None
    return None if was == is_ else (path, was, is_)


def note_stage(out: Path, info: dict[str, Any], stage: str, result: Mapping[str, Any]) -> None:
    """Notes in `run.json` that a stage is done, and what came of it."""
    info["stages"][stage] = {**result, "finished": datetime.now(UTC).isoformat(timespec="seconds")}
    write_json(out / RUN_FILE, info)


def model_fingerprint(source: str, model: PreTrainedModel) -> dict[str, Any]:
    """What tells one model from another cheaply: its name, hashes of its configuration and of a sample of its
    weights."""
    text = json.dumps(model.config.to_dict(), sort_keys=True, default=str)
    sample = torch.cat([p.detach().flatten()[:SAMPLED_ENTRIES].float().cpu() for p in model.parameters()])
    return {
        "source": source,
        "config": hashlib.sha256(text.encode()).hexdigest()[:16],
        "weights": hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16],
        "parameters": model.num_parameters(),
    }
