"""Every command and example that a document shows is parsed; those that need no minutes are run, on local stand-ins."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import typer.main
import yaml
from transformers import PreTrainedModel
from typer.testing import CliRunner

import lorashear as ls
from lorashear.cli import app
from lorashear.config import CompressSettings
from lorashear.data.demo import demo_model_path
from lorashear.data.spec import SourceSpec

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
FAST = {"inspect", "plan", "verify"}


def blocks(language: str) -> list[str]:
    found = []
    for document in DOCUMENTS:
        found += re.findall(
            rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
    return found


def commands(program: str) -> list[list[str]]:
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith(program + " ")]


def makefile_commands() -> list[list[str]]:
    text = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ").replace("$$(", "$(")
    text = re.sub(r"\$\(find [^)]*\)", "MODEL", text)
    return [shlex.split(line) for line in re.findall(r"\$\(BIN\)/lorashear (.*)", text)]


@pytest.mark.parametrize("arguments", [*commands("lorashear"), *makefile_commands()], ids=" ".join)
def test_commands_parse(arguments: list[str]) -> None:
    group = typer.main.get_command(app)
    command = group.commands[arguments[0]]  # type: ignore[attr-defined]
    command.make_context(arguments[0], list(arguments[1:]))


@pytest.mark.parametrize("arguments", [c for c in commands("lorashear") if c[0] in FAST], ids=" ".join)
def test_fast_commands_run_on_the_demo_model(arguments: list[str]) -> None:
    stand_in = [str(demo_model_path()) if word == "MODEL" else word for word in arguments]
    result = CliRunner().invoke(app, stand_in, catch_exceptions=False)
    assert result.exit_code == 0
    assert "ffn-channels" in result.output


def test_pictures_are_there_and_small() -> None:
    shown = [
        (document, picture)
        for document in DOCUMENTS
        for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", document.read_text(encoding="utf-8"))
    ]
    assert shown
    for document, picture in shown:
        assert (document.parent / picture).stat().st_size < 100_000, picture


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    shown = [arguments[0] for arguments in commands("make")]
    assert {"demo", "test"} <= set(shown)
    for target in shown:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


def test_yaml_examples_are_valid() -> None:
    for block in blocks("yaml"):
        values = yaml.safe_load(block)
        if "sources" in values:
            for name, spec in values["sources"].items():
                SourceSpec.from_mapping(spec, origin=name)
        else:
            CompressSettings.from_mapping(values)


def test_python_examples_compile_and_use_public_names() -> None:
    for block in blocks("python"):
        compile(block, "example", "exec")
        for name in re.findall(r"\bls\.(\w+)", block):
            assert name in ls.__all__, name


def test_the_parts_from_python_run(
    pico_llama: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pico_llama().save_pretrained("path/to/model")
    (example,) = [block for block in blocks("python") if "cut_" in block]
    exec(compile(example, "example", "exec"), {})
    assert ls.load("smaller").num_parameters() < ls.load("path/to/model").num_parameters()


def test_the_metric_of_ones_own_runs(
    pico_llama: Callable[..., PreTrainedModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = pico_llama()
    model.save_pretrained("path/to/model")
    (example,) = [block for block in blocks("python") if "metric=" in block]
    exec(compile(example, "example", "exec"), {})
    profile = ls.Profile.read("profile.json")
    assert profile.unit == "metric"
    assert {entry.group for entry in profile.entries} == {group.name for group in ls.discover(model).gated}


def test_settings_named_in_the_docs_exist() -> None:
    text = (ROOT / "docs" / "using.md").read_text(encoding="utf-8")
    for group, name in re.findall(r"`(prune|recover|data|analysis|saliency|lora)\.(\w+)`", text):
        assert name in type(getattr(CompressSettings(), group)).model_fields, f"{group}.{name}"


def test_the_page_of_settings_is_that_of_the_code() -> None:
    """`python scripts/write_settings.py` writes it anew; every setting is described."""
    module = runpy.run_path(str(ROOT / "scripts" / "write_settings.py"))
    page = module["settings_page"]()
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page
    assert "|  |" not in page
