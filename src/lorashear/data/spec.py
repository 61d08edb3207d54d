"""The YAML file that names the sources, and what may be said of each."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, model_validator

from lorashear.config import Positive, Settings
from lorashear.errors import DataError, SettingsError

Kind = Literal["text", "instruct"]

STREAM_LIMIT = 20_000
"""Rows taken from a streamed dataset that names no limit."""


class SourceSpec(Settings):
    """One entry under `sources:`; a local file (`path`) or a Hugging Face dataset (`dataset`)."""

    path: str | None = None
    """JSONL, text (passages between blank lines) or parquet file, relative to the YAML file."""
    dataset: str | None = None
    """Hub id, or a folder relative to the YAML file: as `save_to_disk` writes it, or of data files."""
    name: str | None = None
    """Configuration of the dataset, where it has several."""
    split: str = "train"
    """Split of the dataset."""
    streaming: bool = False
    """Read the dataset row by row instead of fetching it whole."""
    limit: Positive | None = None
    """Rows read at most; None reads all, or 20,000 when streaming."""
    valid: str | None = None
    """Held-out text: another file or, for a dataset, another split."""
    kind: Kind = "text"
    text: str = "text"
    """Key of the passage."""
    instruction: str = "instruction"
    """Key of what is asked."""
    input: str = "input"
    """Key of what the question is about; rows may lack it."""
    output: str = "output"
    """Key of the answer."""

    @model_validator(mode="after")
    def _file_or_dataset(self) -> Self:
        if (self.path is None) == (self.dataset is None):
            raise ValueError("give either `path` (a local file) or `dataset` (a Hugging Face dataset)")
        idle = {"name", "split", "streaming"} & self.model_fields_set
        if self.path is not None and idle:
            raise ValueError(f"{', '.join(sorted(idle))} belong to `dataset`; a file at `path` has none")
        if self.valid is not None and self.valid == (self.path or self.split):
            raise ValueError(f"`valid` is {self.valid}, which is trained on; name other text, or leave it out")
        if self.kind == "text" and {"instruction", "input", "output"} & self.model_fields_set:
            raise ValueError("instruction, input and output belong to `kind: instruct`; a source of kind text has none")
        return self

    @property
    def max_rows(self) -> int | None:
        """Rows to read at most; None reads all."""
        return STREAM_LIMIT if self.streaming and self.limit is None else self.limit


class _Document(Settings):
    sources: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]


def read_specs(path: Path) -> dict[str, SourceSpec]:
    """Reads and checks the YAML file; source name -> spec, in file order.

    Raises:
        DataError: for a syntax error or a name used twice (with the line), an unknown key or a value that does not fit.
    """
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}{_place(error)}: not readable as YAML; correct the file") from None
    if not isinstance(document, Mapping):
        raise DataError(f"{path}: expected a mapping `sources:` of names to files or datasets; found {document!r:.80}")
    try:
        named = _Document.from_mapping(document, origin=str(path)).sources
        return {name: SourceSpec.from_mapping(spec, origin=f"{path}: {name}") for name, spec in named.items()}
    except SettingsError as error:
        raise DataError(str(error)) from None


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a later key replace an earlier one; two sources of one name are a mistake instead."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f'"{key.value}" is there twice', problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _place(error: yaml.YAMLError | UnicodeDecodeError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f", line {error.problem_mark.line + 1}: {error.problem}"
    return f": {error}"
