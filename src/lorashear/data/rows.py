"""Rows of one source, read from a file or a dataset and checked as they come in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import datasets

from lorashear.errors import DataError

Row = Mapping[str, str]

SUFFIXES = (".jsonl", ".txt", ".parquet")


@dataclass(frozen=True)
class Keys:
    """Which keys of a row are read."""

    required: tuple[str, ...]
    """The row must have them; one whose required values are all blank is skipped."""
    optional: tuple[str, ...] = ()


def read_file(path: Path, keys: Keys, *, limit: int | None = None) -> list[Row]:
    """Reads the rows of a .jsonl, .txt (passages between blank lines, as key `text`) or .parquet file.

    Raises:
        DataError: for a file that is missing or of another kind, a line that cannot be read, a row without a required
            key (file, line, key and the keys there are named), or a file without rows.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; correct the path (paths in a YAML file are relative to that file)")
    if path.suffix == ".jsonl":
        places = _json_lines(path)
    elif path.suffix == ".txt":
        places = _passages(path)
    elif path.suffix == ".parquet":
        # streaming, because the other way leaves a copy of the file in the user's cache
        places = _dataset_rows(str(path), "parquet", data_files=str(path), split="train", streaming=True)
    else:
        raise DataError(f"{path}: files of kind {path.suffix!r} are not read; expected {', '.join(SUFFIXES)}")
    return _checked(places, keys, origin=str(path), limit=limit)


def read_dataset(
    dataset: str, keys: Keys, *, folder: Path, name: str | None, split: str, streaming: bool, limit: int | None
) -> list[Row]:
    """Reads a split of a Hugging Face dataset: a hub id, or a path relative to `folder`.

    Raises:
        DataError: where the dataset or the split cannot be loaded, or a row lacks a required key.
    """
    local = folder / Path(dataset).expanduser()
    origin = f"{local if local.exists() else dataset}, split {split}"
    if (local / "state.json").is_file() or (local / "dataset_dict.json").is_file():
        places = _saved_rows(local, origin, split)
    else:
        where = str(local) if local.exists() else dataset
        places = _dataset_rows(origin, where, name, split=split, streaming=streaming)
    return _checked(places, keys, origin=origin, limit=limit)


def _opened(path: Path, mode: str = "r", encoding: str | None = None) -> Any:
    try:
        return path.open(mode, encoding=encoding)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); mend its permissions or give another file"
        ) from None


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with _opened(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                raise DataError(f"{place}: not readable as JSON ({error}); expected one object a line") from None
            if not isinstance(row, dict):
                raise DataError(f"{place}: found {type(row).__name__}, expected one JSON object a line")
            yield place, row


def _passages(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    passage: list[str] = []
    try:
        with _opened(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    passage.append(line)
                elif passage:
                    yield f"{path}, line {number}", {"text": "".join(passage).strip()}
                    passage = []
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); convert the file") from None
    if passage:
        yield f"{path}, last line", {"text": "".join(passage).strip()}


def _dataset_rows(origin: str, *where: str | None, **options: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        yield from _numbered(datasets.load_dataset(*where, **options), origin)
    except DataError:
        raise
    except Exception as error:  # builders, file systems and the hub's client each raise classes of their own
        raise DataError(
            f"{origin}: cannot be loaded ({type(error).__name__}: {error}); give a local folder, "
            "or an id, name and split that the hub has (offline only what was fetched before)"
        ) from error


def _saved_rows(folder: Path, origin: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged file raises whatever Arrow's readers do
        raise DataError(
            f"{origin}: cannot be loaded ({type(error).__name__}: {error}); save the dataset again"
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"{origin}: no such split in the folder; it holds {', '.join(sorted(saved))}")
        saved = saved[split]
    return _numbered(saved, origin)


def _numbered(rows: Iterable[Mapping[str, Any]], origin: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in enumerate(rows, start=1):
        yield f"{origin}, row {number}", row


def _checked(
    places: Iterable[tuple[str, Mapping[str, Any]]], keys: Keys, *, origin: str, limit: int | None
) -> list[Row]:
    rows: list[Row] = []
    for place, row in islice(places, limit):
        read = {key: _string(row, key, place) for key in keys.required}
        if not any(value.strip() for value in read.values()):
            continue
        read |= {key: _string(row, key, place) for key in keys.optional if row.get(key) is not None}
        rows.append(read)
    if not rows:
        raise DataError(f"{origin}: holds no text; expected at least one row with {' and '.join(keys.required)}")
    return rows


def _string(row: Mapping[str, Any], key: str, place: str) -> str:
    if key not in row:
        raise DataError(
            f'{place}: no key "{key}" in the row, which has {", ".join(row) or "none"}; '
            "name this source's keys in the YAML file (`text:`, or `kind: instruct` with `instruction:` and `output:`)"
        )
    value = row[key]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f'{place}: "{key}" is {type(value).__name__} ({value!r:.60}), expected text')
    return value
