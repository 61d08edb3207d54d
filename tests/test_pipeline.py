from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, TrainerCallback

import lorashear as ls
from lorashear import open_run, pipeline
from lorashear.config import CompressSettings
from lorashear.evaluation import result
from lorashear.evaluation.speed import Speed
from lorashear.pruning import prune as pruning
from lorashear.recovery import recover as recovery

INPUT_IDS = torch.arange(1, 13).view(1, 12)
WINDOW, BATCH, STEPS = 16, 4, 20


def settings(**changes: Any) -> CompressSettings:
    """Small enough for a second or two; `changes` by dotted name with `__` for the dot."""
    values: dict[str, Any] = {
        "tokens": STEPS * WINDOW * BATCH + 40, "batch": BATCH, "micro_batch": 2, "dtype": "float32",
        "data": {"window": WINDOW, "eval_windows": 6, "calibration_windows": 8},
        "lora": {"rank": 2}, "analysis": {"in_compress": True},
        "prune": {"ratio": 0.25, "share": 0.4, "periods": 3, "round_to": 8, "train": "adapters"},
        "recover": {"train": "all", "rounds": 2},
    }  # fmt: skip
    for key, value in changes.items():
        *parents, last = key.split("__")
        place = values
        for parent in parents:
            place = place[parent]
        place[last] = value
    return CompressSettings.from_mapping(values)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    """Speed is measured elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(result, "tokens_per_second", lambda _: Speed(100.0, 10.0))
        yield


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=INPUT_IDS).logits


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return ls.load(folder).state_dict()


def same(one: Path, other: Path) -> bool:
    theirs = weights(other)
    return all(torch.equal(value, theirs[name]) for name, value in weights(one).items())


def stamp(folder: Path) -> dict[str, tuple[int, int]]:
    return {item.name: (item.stat().st_mtime_ns, item.stat().st_size) for item in folder.iterdir()}


@pytest.fixture(scope="module")
def uniform(pico_folder: Path, pico_data: Path, tmp_path_factory: pytest.TempPathFactory) -> ls.CompressResult:
    """A run that was never stopped."""
    out = tmp_path_factory.mktemp("uniform") / "run"
    return ls.compress(pico_folder, data=pico_data, out=out, settings=settings(), progress=False)


def test_a_uniform_result_loads_in_stock_tools(uniform: ls.CompressResult, pico_folder: Path) -> None:
    folder = uniform.model_folder
    assert folder == uniform.out / "model"
    stock = AutoModelForCausalLM.from_pretrained(folder)
    torch.testing.assert_close(logits(stock), logits(ls.load(folder)), rtol=0, atol=0)
    assert AutoTokenizer.from_pretrained(folder)("fox")["input_ids"]
    dense = AutoModelForCausalLM.from_pretrained(pico_folder)
    assert 1 - stock.num_parameters() / dense.num_parameters() == pytest.approx(0.25, abs=0.02)
    widths = {layer.mlp.down_proj.in_features for layer in stock.model.layers}
    assert len(widths) == 1
    assert widths.pop() % 8 == 0


def test_the_table_tells_before_and_after(uniform: ls.CompressResult) -> None:
    dense, pruned, recovered = uniform.rows
    assert [row.label for row in uniform.rows] == ["dense", "pruned", "pruned + recovered"]
    assert dense.perplexity.keys() == {"foxes", "heads", "asked"}
    assert pruned.parameters == recovered.parameters < dense.parameters
    assert recovered.bytes_on_disk == 4 * recovered.parameters
    assert recovered.macro_perplexity < pruned.macro_perplexity
    assert recovered.prefill_tokens_per_second == 100.0
    assert uniform.table().row_count > 5


def test_the_budget_is_kept_to_the_token(uniform: ls.CompressResult) -> None:
    assert uniform.tokens == STEPS * WINDOW * BATCH
    lines = [json.loads(line) for line in (uniform.out / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["stage"] == "prune" for line in lines) == 8
    assert sum(line["stage"] == "recover" for line in lines) == 12
    assert lines[-1]["tokens"] == 12 * WINDOW * BATCH


def test_the_run_folder_describes_itself(uniform: ls.CompressResult, pico_folder: Path, pico_data: Path) -> None:
    names = {item.name for item in uniform.out.iterdir()}
    assert names == {
        "run.json", "plan.json", "profile.json", "profile.png", "results.json", "metrics.jsonl", "tensorboard", "model",
    }  # fmt: skip
    run = read(uniform.out / "run.json")
    assert CompressSettings.from_mapping(run["settings"]) == settings()
    assert run["model"]["source"] == str(pico_folder)
    assert run["data"]["given"] == str(pico_data)
    assert run["data"]["sources"].keys() == {"foxes", "heads", "asked"}
    assert {"dense", "target", "profile", "prune", "pruned", "recover", "pruned + recovered"} <= run["stages"].keys()
    assert run["stages"]["prune"]["net"] == pytest.approx(0.25, abs=0.02)
    assert [each["stage"] for each in run["stages"]["recover"]["rounds"]] == ["pretraining"] * 2 + ["instruction"] * 2
    assert ls.Plan.read(uniform.out / "plan.json") == uniform.plan
    assert ls.Profile.read(uniform.out / "profile.json").entries
    assert read(uniform.out / "results.json") == [row.to_dict() for row in uniform.rows]
    assert (uniform.out / "profile.png").read_bytes().startswith(b"\x89PNG")


def test_the_plan_is_what_was_cut(uniform: ls.CompressResult, pico_folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(pico_folder)
    assert uniform.plan is not None
    ls.cut_(model, ls.discover(model), uniform.plan)
    small = weights(uniform.model_folder)
    assert {name: value.shape for name, value in model.state_dict().items()} == {n: v.shape for n, v in small.items()}


def test_the_input_is_left_alone(pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    before = stamp(pico_folder), stamp(pico_data.parent)
    ls.prune(
        pico_folder, data=pico_data, out=tmp_path / "run", settings=settings(prune__method="magnitude"), progress=False
    )
    assert (stamp(pico_folder), stamp(pico_data.parent)) == before


def test_widths_of_their_own(pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    chosen = settings(
        prune__shape="per-layer", prune__train="all", prune__method="taylor", recover__train="adapters",
        analysis={"unprunable": 0.2},
    )  # fmt: skip
    done = ls.compress(pico_folder, data=pico_data, out=tmp_path / "run", settings=chosen, ratio=0.3, progress=False)
    model = ls.load(done.model_folder)
    assert read(done.model_folder / "config.json")["lorashear"]["shape"] == "per-layer"
    assert model.num_parameters() == done.rows[-1].parameters
    assert done.plan is not None
    assert done.plan.shape == "per-layer"
    profile = ls.Profile.read(done.out / "profile.json")
    assert profile.unprunable
    assert not done.plan.removed.keys() & set(profile.unprunable)
    assert read(done.out / "run.json")["settings"]["prune"]["ratio"] == 0.3
    assert done.tokens == STEPS * WINDOW * BATCH  # one-shot methods leave all of it to recovery
    row = ls.evaluate(done.out, data=pico_data, settings=chosen, progress=False)
    assert row.macro_perplexity == pytest.approx(done.rows[-1].macro_perplexity)
    assert row.perplexity == pytest.approx(done.rows[-1].perplexity)


def stop_training(patch: pytest.MonkeyPatch, module: Any, after: int) -> None:
    """The next training run of a stage ends after so many steps, as by a kill."""

    class Kill(TrainerCallback):
        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            if state.global_step == after:
                raise KeyboardInterrupt

    original = module.train

    def train(*args: Any, callbacks: Any = (), **kwargs: Any) -> Any:
        return original(*args, callbacks=[*callbacks, Kill()], **kwargs)

    patch.setattr(module, "train", train)


def stop_at(name: str, *, call: int = 1, module: Any = pipeline) -> Callable[[pytest.MonkeyPatch], None]:
    """Before a function that a module calls does its work for the `call`-th time."""

    def stop(patch: pytest.MonkeyPatch) -> None:
        original, calls = getattr(module, name), 0

        def stopped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == call:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        patch.setattr(module, name, stopped)

    return stop


STOPS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "before the profile": stop_at("calibration_scores"),
    "in the walk": lambda patch: stop_training(patch, pruning, 5),
    "while the cut model is saved": stop_at("save", module=open_run),
    "before the pruned model is measured": stop_at("measure", module=open_run, call=2),
    "in recovery": lambda patch: stop_training(patch, recovery, 7),
    "while the recovered model is saved": stop_at("save", module=open_run, call=2),
    "before the table": stop_at("measure", module=open_run, call=3),
    "at the very end": stop_at("write_json"),
}


FEW = ("in the walk", "in recovery")


@pytest.mark.parametrize("stop", [pytest.param(stop, marks=() if stop in FEW else pytest.mark.slow) for stop in STOPS])
def test_stopped_and_resumed_is_never_stopped(
    uniform: ls.CompressResult, pico_folder: Path, pico_data: Path, tmp_path: Path, stop: str
) -> None:
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        STOPS[stop](patch)
        with pytest.raises(KeyboardInterrupt):
            ls.compress(pico_folder, data=pico_data, out=out, settings=settings(), progress=False)
    assert not (out / "results.json").exists()
    done = ls.compress(pico_folder, data=pico_data, out=out, settings=settings(), resume=True, progress=False)
    assert same(done.model_folder, uniform.model_folder)
    assert done.plan == uniform.plan
    assert done.tokens == uniform.tokens
    assert [row.to_dict() for row in done.rows] == [row.to_dict() for row in uniform.rows]
    assert {item.name for item in out.iterdir()} == {item.name for item in uniform.out.iterdir()}
    rounds = [read(each / "run.json")["stages"]["recover"]["rounds"] for each in (out, uniform.out)]
    assert rounds[0] == rounds[1]


@pytest.mark.slow
def test_what_memory_decided_holds_for_the_resumed_run(
    pico_folder: Path, pico_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = settings(prune__train="auto", recover__train="auto", micro_batch=None)
    whole = ls.compress(pico_folder, data=pico_data, out=tmp_path / "whole", settings=chosen, progress=False)
    out = tmp_path / "parts"
    with pytest.MonkeyPatch.context() as patch:
        stop_training(patch, recovery, 7)
        with pytest.raises(KeyboardInterrupt):
            ls.compress(pico_folder, data=pico_data, out=out, settings=chosen, progress=False)
    # another process has taken nearly all memory since
    for module in (open_run, pruning, recovery):
        monkeypatch.setattr(module, "available_bytes", lambda _: 2**20, raising=False)
    done = ls.compress(pico_folder, data=pico_data, out=out, settings=chosen, resume=True, progress=False)
    assert same(done.model_folder, whole.model_folder)


def test_a_finished_run_resumes_to_its_result(uniform: ls.CompressResult, pico_folder: Path, pico_data: Path) -> None:
    before = stamp(uniform.model_folder)
    again = ls.compress(pico_folder, data=pico_data, out=uniform.out, settings=settings(), resume=True, progress=False)
    assert again.rows == uniform.rows
    assert again.tokens == uniform.tokens
    assert stamp(uniform.model_folder) == before


def test_a_resume_with_other_settings_is_refused(
    uniform: ls.CompressResult, pico_folder: Path, pico_data: Path
) -> None:
    with pytest.raises(ls.SettingsError, match=r"started with settings\.prune\.ratio = 0\.25, now it is 0\.4"):
        ls.compress(pico_folder, data=pico_data, out=uniform.out, settings=settings(), ratio=0.4, resume=True)
    with pytest.raises(ls.SettingsError, match="started with command = 'compress', now it is 'prune'"):
        ls.prune(pico_folder, data=pico_data, out=uniform.out, settings=settings(), resume=True)


def test_prune_and_recover_one_after_the_other(pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    pruned = ls.prune(pico_folder, data=pico_data, out=tmp_path / "pruned", settings=settings(), progress=False)
    assert [row.label for row in pruned.rows] == ["dense", "pruned"]
    assert pruned.tokens == 8 * WINDOW * BATCH
    assert {item.name for item in pruned.out.iterdir()} >= {"model", "plan.json", "run.json", "results.json"}
    before = stamp(pruned.model_folder)
    done = ls.recover(pruned.out, data=pico_data, out=tmp_path / "recovered", settings=settings(), progress=False)
    assert [row.label for row in done.rows] == ["pruned", "pruned + recovered"]
    assert done.rows[0].perplexity == pytest.approx(pruned.rows[1].perplexity)
    assert done.rows[1].macro_perplexity < done.rows[0].macro_perplexity
    assert done.tokens == STEPS * WINDOW * BATCH
    assert stamp(pruned.model_folder) == before
    AutoModelForCausalLM.from_pretrained(done.model_folder)
    # how far each source is behind is measured against the dense model
    target = read(pruned.out / "run.json")["stages"]["target"]["losses"]
    first = read(done.out / "run.json")["stages"]["recover"]["rounds"][0]
    losses = recovery.deviation_losses(ls.load(pruned.model_folder), tokens(pico_folder, pico_data))
    assert first["deviation"] == pytest.approx({name: losses[name] - target[name] for name in losses}, abs=1e-5)


def adapting() -> CompressSettings:
    return settings(adapt={"share": 0.2, "learning_rate": 1e-2})


def test_the_full_model_learns_first_where_it_is_to(pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    whole = ls.compress(pico_folder, data=pico_data, out=tmp_path / "whole", settings=adapting(), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        stop_training(patch, pruning, 5)
        with pytest.raises(KeyboardInterrupt):
            ls.compress(pico_folder, data=pico_data, out=out, settings=adapting(), progress=False)
    done = ls.compress(pico_folder, data=pico_data, out=out, settings=adapting(), resume=True, progress=False)
    assert same(done.model_folder, whole.model_folder)
    assert done.tokens == STEPS * WINDOW * BATCH
    assert [row.label for row in done.rows] == ["dense", "dense, adapted", "pruned", "pruned + recovered"]
    dense, adapted, *_ = done.rows
    assert adapted.macro_perplexity < 0.95 * dense.macro_perplexity
    assert adapted.parameters == dense.parameters
    assert not (out / "adapted").exists()


def test_recover_learns_from_the_adapted_model(
    pico_folder: Path, pico_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ls.prune(pico_folder, data=pico_data, out=tmp_path / "first", settings=adapting(), progress=False)
    assert given.tokens == (4 + 8) * WINDOW * BATCH
    pruned = tmp_path / "moved"
    given.out.rename(pruned)
    teachers = []
    real = recovery.train
    monkeypatch.setattr(recovery, "train", lambda *a, **o: (teachers.append(o["teacher"]), real(*a, **o))[1])
    done = ls.recover(pruned, data=pico_data, out=tmp_path / "recovered", settings=adapting(), progress=False)
    wanted = weights(pruned / "adapted")
    found = teachers[0].model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    target = read(pruned / "run.json")["stages"]["adapt"]["losses"]
    first = read(done.out / "run.json")["stages"]["recover"]["rounds"][0]
    losses = recovery.deviation_losses(ls.load(pruned / "model"), tokens(pico_folder, pico_data))
    assert first["deviation"] == pytest.approx({name: losses[name] - target[name] for name in losses}, abs=1e-5)


def tokens(folder: Path, data: Path) -> Any:
    given = settings().data
    return pipeline.tokenize(pipeline.read_sources(data, given), AutoTokenizer.from_pretrained(folder), given)


def test_losses_on_other_text_are_no_yardstick(uniform: ls.CompressResult, pico_data: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(pico_data.parent, tmp_path / "data"))
    lines = (other / "foxes.jsonl").read_text().splitlines(keepends=True)
    (other / "foxes.jsonl").write_text("".join(reversed(lines)))
    done = ls.recover(
        uniform.out,
        data=other / "data.yaml",
        out=tmp_path / "run",
        settings=settings(recover__rounds=1),
        progress=False,
    )
    first = read(done.out / "run.json")["stages"]["recover"]["rounds"][0]
    assert all(deviation > 2.0 for deviation in first["deviation"].values())  # the losses themselves


def test_recover_takes_a_plain_model(pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    done = ls.recover(pico_folder, data=pico_data, out=tmp_path / "run", settings=settings(), progress=False)
    assert done.rows[1].macro_perplexity < done.rows[0].macro_perplexity
    assert done.plan is None


def test_the_reference_and_the_questions(pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    def run(**options: Any) -> ls.CompressResult:
        chosen = settings(reference=True, prune__method="magnitude", analysis={})
        return ls.compress(
            pico_folder, data=pico_data, out=tmp_path / "run", settings=chosen, chat=True, questions=("The fox?",),
            progress=False, **options,
        )  # fmt: skip

    with pytest.MonkeyPatch.context() as patch:
        stop_at("measure", module=open_run, call=4)(patch)
        with pytest.raises(KeyboardInterrupt):
            run()
    done = run(resume=True)
    dense, tuned, pruned, recovered = done.rows
    assert tuned.label == "dense + same fine-tuning"
    assert tuned.parameters == dense.parameters > pruned.parameters
    assert tuned.macro_perplexity < dense.macro_perplexity
    assert recovered.parameters == ls.load(done.model_folder).num_parameters()
    ((question, full, small),) = done.chat
    assert question == "The fox?"
    assert {type(full), type(small)} == {str}
    assert done.answers().row_count == 1
    assert not (done.out / "profile.json").exists()  # the uniform shape has no use for it


def test_the_ratio_is_reached_where_periods_do_not_fit(pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    chosen = settings(prune__periods=50, analysis={})
    done = ls.prune(pico_folder, data=pico_data, out=tmp_path / "run", settings=chosen, progress=False)
    dense, pruned = done.rows
    assert 1 - pruned.parameters / dense.parameters == pytest.approx(0.25, abs=0.02)


def test_half_precision_stays_on_disk(pico_llama: Any, pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    half = Path(shutil.copytree(pico_folder, tmp_path / "half"))
    pico_llama().bfloat16().save_pretrained(half)
    done = ls.compress(half, data=pico_data, out=tmp_path / "run", settings=settings(), progress=False)
    model: PreTrainedModel = ls.load(done.model_folder)
    assert model.dtype == torch.bfloat16
    assert done.rows[-1].bytes_on_disk == 2 * model.num_parameters()
    row = ls.evaluate(done.out, data=pico_data, settings=settings(), progress=False)
    assert row.macro_perplexity == pytest.approx(done.rows[-1].macro_perplexity)


def test_analysis_by_itself(pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    found = pipeline.analyze_run(pico_folder, data=pico_data, out=tmp_path / "run", settings=settings(), progress=False)
    assert {entry.group for entry in found.entries} == {g.name for g in ls.discover(ls.load(pico_folder)).gated}
    assert {item.name for item in (tmp_path / "run").iterdir()} == {"run.json", "profile.json", "profile.png"}


@pytest.mark.parametrize(
    "method", ["lhspg", *(pytest.param(m, marks=pytest.mark.slow) for m in ("taylor", "slicegpt"))]
)
def test_weights_may_be_held_in_bfloat16(method: str, pico_folder: Path, pico_data: Path, tmp_path: Path) -> None:
    rows = {}
    for name in ("float32", "bfloat16"):
        chosen = settings(
            dtype="auto", weight_dtype=name, prune__method=method, prune__ratio=0.2, recover__train="adapters",
            distill={"teacher": "on"}, analysis__in_compress=False,
        )  # fmt: skip
        done = ls.compress(pico_folder, data=pico_data, out=tmp_path / name, settings=chosen, progress=False)
        assert read(done.out / "run.json")["stages"]["weights"]["dtype"] == name
        rows[name] = {row.label: row.macro_perplexity for row in done.rows}
    assert rows["bfloat16"] == pytest.approx(rows["float32"], rel=0.03)


def test_the_full_model_is_found_again_by_hub_id_or_whole_path(tmp_path: Path) -> None:
    def info(source: str) -> dict[str, Any]:
        return {"command": "prune", "model": {"source": source}}

    assert pipeline._full_model(tmp_path, info("org/model")) == "org/model"
    assert pipeline._full_model(tmp_path, info(str(tmp_path))) == str(tmp_path)
    assert pipeline._full_model(tmp_path, info(str(tmp_path / "gone"))) is None
