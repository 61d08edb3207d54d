"""What watches a run: the guard against numbers that are not finite, the metrics file, the progress bar."""

# ruff: noqa: ARG002 -- callbacks take what Trainer hands them
from __future__ import annotations

import json
import math
from pathlib import Path
from time import perf_counter
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lorashear.errors import TrainingError


class NanGuard(TrainerCallback):  # type: ignore[misc]
    """Stops the run at a loss or gradient that is not finite, before such weights reach a checkpoint."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A step that saves also logs, so that what is saved has been looked at."""
        control.should_log = control.should_log or control.should_save

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Raises `TrainingError` where the logged loss or gradient norm is not finite."""
        for name, what in (("loss", "loss"), ("grad_norm", "norm of the gradient")):
            value = logs.get(name, 0.0)
            if not math.isfinite(value):
                raise TrainingError(
                    f"the {what} is {value} at step {state.global_step} of {self.stage} (learning rate "
                    f"{logs.get('learning_rate', math.nan):.2g}); expected a finite number: lower the learning rate, "
                    'or set dtype: "float32"'
                )


class NoLastCheckpoint(TrainerCallback):  # type: ignore[misc]
    """Leaves out the checkpoint of the last step, which Trainer always writes: the result is saved right after it, and where
    that fails a resume has the one before."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Comes after Trainer's own decision and takes it back."""
        if control.should_training_stop:
            control.should_save = False


class MetricsFile(TrainerCallback):  # type: ignore[misc]
    """Appends one JSON object a logging step: stage, step, tokens, loss (nats/token), lr, seconds.

    `seconds` counts from the start of this process' part of the stage. Lines of the same stage past the step a run is
    resumed from are dropped first, so that the file is that of a run which was never killed.
    """

    def __init__(self, path: Path, stage: str, tokens_per_step: int) -> None:
        self.path, self.stage, self.tokens_per_step = path, stage, tokens_per_step
        self.start = perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Drops what is going to be trained again."""
        self.start = perf_counter()
        if not state.is_world_process_zero or not self.path.is_file():
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and not self._repeated(line, state.global_step)]
        if len(kept) < len(lines):
            self.path.write_text("".join(kept), encoding="utf-8")

    def _repeated(self, line: str, step: int) -> bool:
        record = json.loads(line)
        return bool(record["stage"] == self.stage and record["step"] > step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """One line; Trainer's summary at the end has no loss and is left out."""
        if "loss" not in logs or not state.is_world_process_zero:
            return
        record = {
            "stage": self.stage,
            "step": state.global_step,
            "tokens": state.global_step * self.tokens_per_step,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "seconds": round(perf_counter() - self.start, 3),
        }
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


class ProgressBar(TrainerCallback):  # type: ignore[misc]
    """One line on the terminal: step, loss, tokens/s, time left. It is gone when the run ends."""

    def __init__(self, progress: Progress, stage: str, steps: int, tokens_per_step: int) -> None:
        self.progress, self.tokens_per_step = progress, tokens_per_step
        self.task = progress.add_task(stage, total=steps, loss=math.nan, rate=0.0)
        self.start, self.first_step = perf_counter(), 0

    @staticmethod
    def columns() -> Progress:
        """The bar's layout, not yet shown. It goes to stderr, and nowhere where that is no terminal."""
        console = Console(stderr=True)
        return Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
            refresh_per_second=2,  # the bar shares its processor with the training
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run starts part of the way along the bar."""
        self.start, self.first_step = perf_counter(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Moves the bar; the rate is the mean since this process began."""
        done = (state.global_step - self.first_step) * self.tokens_per_step
        self.progress.update(self.task, completed=state.global_step, rate=done / (perf_counter() - self.start))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float],
        **kwargs: Any,
    ) -> None:
        """Shows the loss."""
        if "loss" in logs:
            self.progress.update(self.task, loss=logs["loss"])
