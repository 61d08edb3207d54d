from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

import lorashear as ls
from lorashear import cli

SMALL = [
    "--set", "data.window=16", "--set", "data.eval_windows=4", "--set", "data.calibration_windows=4",
    "--set", "batch=4", "--set", "micro_batch=4", "--dtype", "float32",
]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


Call = Callable[..., Outcome]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Call]:
    """Runs the command line in this process."""
    monkeypatch.setattr(cli, "_quieten", disable_progress_bar)  # all that it does would change what other tests see
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lorashear", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        printed = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), printed.out, printed.err)

    yield run
    enable_progress_bar()


@pytest.fixture
def copy(pico_folder: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, to be broken."""
    return Path(shutil.copytree(pico_folder, tmp_path / "copy"))


def refused(outcome: Outcome, *patterns: str) -> None:
    """Exit code 2, one paragraph that begins with `error:` and says all that is expected, nothing on stdout."""
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert outcome.err.endswith("\n")
    assert "\n\n" not in outcome.err.strip("\n")
    assert "Traceback" not in outcome.err
    for pattern in patterns:
        assert re.search(pattern, outcome.err), f"{pattern} is not in: {outcome.err}"


def test_help_lists_the_commands_in_the_order_of_the_pipeline(call: Call) -> None:
    shown = call("--help")
    assert shown.code == 0
    commands = re.findall(r"^\W*(\w+) {2,}\S", shown.out.split("Commands")[1], flags=re.MULTILINE)
    order = ["demo", "inspect", "plan", "analyze", "prune", "recover", "compress", "evaluate"]
    assert [name for name in commands if name in order] == order


def test_no_arguments_show_the_help(call: Call) -> None:
    outcome = call()
    assert "compress" in outcome.out + outcome.err


def test_the_version(call: Call) -> None:
    assert call("--version") == Outcome(0, f"lorashear {ls.__version__}\n", "")


def test_the_package_runs_as_a_module(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "lorashear", "--version"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, f"lorashear {ls.__version__}\n", "")


def test_inspect_needs_only_a_config(call: Call, pico_folder: Path, tmp_path: Path) -> None:
    shutil.copy(pico_folder / "config.json", tmp_path)
    table = call("inspect", tmp_path)
    assert table.code == 0
    assert table.err == ""
    assert "model.layers.{0-1}" in table.out
    described = json.loads(call("inspect", tmp_path, "--json").out)
    assert described["layers"] == 2
    assert {group["kind"] for group in described["groups"] if group["prunable"]} == {
        "heads",
        "query-slots",
        "ffn-channels",
        "residual",
        "layers",
    }
    assert described == json.loads(call("inspect", pico_folder, "--json").out)


def test_plan_needs_only_a_config(call: Call, pico_folder: Path, tmp_path: Path) -> None:
    shutil.copy(pico_folder / "config.json", tmp_path)
    shown = call("plan", tmp_path, "--ratio", 0.3)
    assert shown.code == 0
    assert "97,272 ->" in shown.out
    found = json.loads(call("plan", tmp_path, "--ratio", 0.3, "--json").out)
    assert found["parameters"] == 97_272
    assert 1 - found["kept"] / found["parameters"] == pytest.approx(0.3, abs=0.02)
    of_decoder = json.loads(call("plan", tmp_path, "--ratio", 0.3, "--ratio-of", "decoder", "--json").out)
    assert of_decoder["kept"] > found["kept"]
    assert all(left <= most <= size for size, left, most in found["widths"].values())


def test_options_win_over_the_file_and_assignments_over_options(call: Call, pico_folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("prune: {ratio: 0.1, ratio_of: decoder}\n")

    def kept(*arguments: object) -> int:
        return int(json.loads(call("plan", pico_folder, "--json", *arguments).out)["kept"])

    plain = {ratio: kept("--ratio", ratio, "--ratio-of", "decoder") for ratio in (0.1, 0.2, 0.3)}
    assert plain[0.1] > plain[0.2] > plain[0.3]
    assert kept("--config", file) == plain[0.1]
    assert kept("--config", file, "--ratio", 0.2) == plain[0.2]
    assert kept("--config", file, "--ratio", 0.2, "--set", "prune.ratio=0.3") == plain[0.3]


def test_compress_evaluate_recover_and_analyze(call: Call, pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run [1]"
    given = ["--data", pico_data, *SMALL]
    done = call("compress", pico_folder, *given, "--ratio", 0.2, "--tokens", 16 * 4 * 14, "--out", out, "--chat")
    assert done.code == 0, done.err
    assert "pruned + recovered" in done.out
    assert done.out.endswith(f"Model: {out / 'model'}   run: {out}   training tokens: 896\n")
    assert done.out.lstrip(" ").startswith("Result")
    assert "What is the capital of France?" in done.out
    assert (out / "model" / "config.json").is_file()
    again = call("compress", pico_folder, *given, "--ratio", 0.2, "--tokens", 896, "--out", out, "--chat")
    refused(again, "is not empty", "--resume")
    resumed = call("compress", pico_folder, *given, "--ratio", 0.2, "--tokens", 896, "--out", out, "--chat", "--resume")
    assert resumed.out == done.out

    options = [argument for argument in given if argument not in ("--dtype", "float32")]
    row = json.loads(call("evaluate", out, *options, "--json").out)
    last = json.loads((out / "results.json").read_text())[-1]
    assert row["perplexity"] == pytest.approx(last["perplexity"])
    assert row["parameters"] == last["parameters"]
    table = call("evaluate", pico_folder, *options)
    assert "perplexity, macro" in table.out

    recovered = call("recover", out, *given, "--tokens", 64 * 3, "--out", tmp_path / "recovered")
    assert recovered.code == 0, recovered.err
    assert (tmp_path / "recovered" / "model" / "model.safetensors").is_file()
    analyzed = call("analyze", pico_folder, *options, "--out", tmp_path / "analyzed")
    assert analyzed.code == 0, analyzed.err
    assert (tmp_path / "analyzed" / "profile.png").is_file()
    assert "Written: " in analyzed.out


@pytest.mark.parametrize("method", ["magnitude", "grasprune", "hesso"])
def test_prune_with_another_method(call: Call, pico_folder: Path, pico_data: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "run"
    done = call(
        "prune", pico_folder, "--data", pico_data, *SMALL, "--method", method, "--shape", "per-layer", "--out", out
    )
    assert done.code == 0, done.err
    assert ls.load(out / "model").num_parameters() < 97_272


def test_depth_leaves_fewer_layers(call: Call, pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    given = [pico_folder, "--data", pico_data, *SMALL, "--method", "depth", "--ratio-of", "decoder"]
    done = call("prune", *given, "--ratio", 0.4, "--out", tmp_path / "run")
    assert done.code == 0, done.err
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model").config.num_hidden_layers == 1
    refused(call("prune", *given, "--ratio", 0.9, "--out", tmp_path / "too-small"), "cannot be reached", "ask for less")
    assert not (tmp_path / "too-small").exists()


Break = Callable[[Path, Path, Path], list[Any]]


def no_config(_: Path, __: Path, scratch: Path) -> list[Any]:
    (scratch / "empty").mkdir()
    return [scratch / "empty"]


def nan_weights(folder: Path, data: Path, _: Path) -> list[Any]:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return [folder, "--data", data]


def foreign_tokenizer(folder: Path, data: Path, _: Path) -> list[Any]:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.add_tokens(["lorashear"])
    tokenizer.save_pretrained(folder)
    return [folder, "--data", data]


def written(name: str, text: str) -> Break:
    def write(folder: Path, _: Path, scratch: Path) -> list[Any]:
        (scratch / name).write_text(text)
        return [folder, "--data", scratch / name]

    return write


MISTAKES: dict[str, tuple[Break, list[str]]] = {
    "missing model": (lambda _, data, scratch: [scratch / "none", "--data", data], ["none: no such folder or file"]),
    "no model": (lambda *given: [*no_config(*given), "--data", given[1]], ["empty: no config.json in this folder"]),
    "missing data": (lambda folder, _, scratch: [folder, "--data", scratch / "no.yaml"], ["no.yaml: no such file"]),
    "empty data": (written("empty.jsonl", "\n"), ["empty.jsonl: holds no text"]),
    "broken line": (
        written("wiki.jsonl", '{"text": "one"}\n{"text": two}\n'), [r"wiki\.jsonl, line 2: not readable as JSON"],
    ),
    "a line without text": (
        written("wiki.jsonl", '{"text": "one"}\n\n{"txt": "[b]two[/b]"}\n'), [r"wiki\.jsonl, line 3", 'no key "text"'],
    ),
    "no data": (lambda folder, *_: [folder], ["--data", "`demo`"]),
    "ratio": (lambda folder, data, _: [folder, "--data", data, "--ratio", 1.5], ["ratio = 1.5", "less than 1"]),
    "ratio out of reach": (
        lambda folder, data, _: [folder, "--data", data, "--ratio", 0.9],
        [r"90\.0% cannot be reached", r"at most \d\d\.\d%"],
    ),
    "too few tokens": (lambda folder, data, _: [folder, "--data", data, "--tokens", 64 * 3], ["tokens pay for 3"]),
    "NaN": (nan_weights, [r"model\.norm\.weight holds nan"]),
    "tokenizer": (foreign_tokenizer, ["ids up to 97", "has 97 rows"]),
    "unknown setting": (
        lambda folder, data, _: [folder, "--data", data, "--set", "prune.ratoi=1"],
        ['unknown key "prune.ratoi"', 'did you mean "ratio"'],
    ),
    "assignment": (
        lambda folder, data, _: [folder, "--data", data, "--set", "prune.ratio={1"], ["prune.ratio={1", "YAML"],
    ),
    "nothing to resume": (lambda folder, data, _: [folder, "--data", data, "--resume"], ["no run to resume"]),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_paragraph(call: Call, copy: Path, pico_data: Path, tmp_path: Path, mistake: str) -> None:
    build, patterns = MISTAKES[mistake]
    arguments = build(copy, pico_data, tmp_path)
    out = tmp_path / "out"
    refused(call("compress", *arguments, *SMALL, "--out", out), *patterns)
    assert not out.exists()


def test_an_unknown_key_in_the_file(call: Call, pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("recover: {round: 4}\n")
    outcome = call("recover", pico_folder, "--data", pico_data, "--config", file, "--out", tmp_path / "out")
    refused(outcome, rf'{file}: unknown key "recover\.round"; did you mean "rounds"\?')
    assert not (tmp_path / "out").exists()


def test_results_are_never_written_over_others(call: Call, pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for command in ("analyze", "prune", "recover", "compress"):
        refused(call(command, pico_folder, "--data", pico_data, "--out", tmp_path), "is not empty", "name a new folder")
    refused(call("demo", "--out", tmp_path), "is not empty")
    assert [item.name for item in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("command", ["analyze", "prune", "recover", "compress", "evaluate"])
def test_every_command_that_reads_text_asks_for_it(call: Call, pico_folder: Path, tmp_path: Path, command: str) -> None:
    out = [] if command == "evaluate" else ["--out", tmp_path / "out"]
    refused(call(command, pico_folder, *out), "no data was named; give --data", "`demo`")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_a_model_that_is_none(call: Call, tmp_path: Path, command: str) -> None:
    refused(call(command, tmp_path / "none"), "no such folder or file")
    (tmp_path / "config.json").write_text('{"model_type": "[bold]bert"}')
    refused(call(command, tmp_path), "configuration cannot be read", r"\[bold\]bert")  # no markup to rich


def test_an_interrupt_says_how_to_go_on(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lorashear.pipeline.compress", interrupted)
    outcome = call("compress", "some/model", "--data", "demo", "--out", tmp_path / "out")
    assert outcome.code == 130
    assert "--resume" in outcome.err
    assert "Traceback" not in outcome.err


def test_no_code_of_a_checkpoint_is_run_unasked(call: Call, copy: Path, pico_data: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "own.Own", "AutoConfig": "own.Config"}
    config["model_type"] = "own"
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    refused(call("evaluate", copy, "--data", pico_data), "configuration cannot be read")
    assert not (tmp_path / "ran").exists()


def test_verify_needs_no_tokenizer(call: Call, copy: Path) -> None:
    for file in copy.glob("*token*"):
        file.unlink()
    ran = call("verify", copy, "--plans", 1)
    assert ran.code == 0
    assert "zeroed and cut models are equal" in ran.out
    assert all(kind in ran.out for kind in ("heads", "ffn-channels", "residual", "layers", "all kinds"))


@pytest.mark.parametrize("command", ["inspect", "verify", "plan"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "zorkformer"}, "zorkformer"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "BertModel is no causal language model"),
        ({"num_attention_heads": 0}, "configuration cannot be read"),
    ],
)
def test_a_config_that_cannot_be_taken(
    call: Call, copy: Path, command: str, change: dict[str, Any], message: str
) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | change))
    refused(call(command, copy), message)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_is_said_in_a_paragraph(call: Call, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def run() -> None:
        raise error

    monkeypatch.setattr(cli, "app", run)
    refused(call(), "out of memory", "--resume", "--set micro_batch=1")
