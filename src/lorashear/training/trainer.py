"""One training run: a model, a dataset, an optimizer and a schedule, driven by transformers' Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from lorashear.errors import DataError, SettingsError
from lorashear.evaluation.inference import autocast
from lorashear.reporting.runfolder import disk_full_explained
from lorashear.training.callbacks import MetricsFile, NanGuard, NoLastCheckpoint, ProgressBar
from lorashear.training.checkpoints import (
    checkpoints_folder,
    discard_checkpoints,
    last_checkpoint,
    load_changing,
    save_changing,
)
from lorashear.training.distill import Teacher, distillation_loss


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """What a run is, apart from model, data and optimizer."""

    name: str
    """Stage: names its checkpoints, its lines in the metrics and its bar."""
    steps: int
    """Optimizer steps in all, those before a resume included."""
    batch: int
    """Windows in an optimizer step."""
    micro_batch: int
    """Windows in a forward pass; divides `batch`."""
    seed: int
    out: Path
    """Run folder; gets `metrics.jsonl`, `tensorboard/NAME/` and, until `discard_checkpoints`, `checkpoints/NAME/`."""
    dtype: torch.dtype | None = None
    """Autocast format, None for none (`resolve_dtype`)."""
    checkpoint_every: int | None = None
    """Optimizer steps between checkpoints; None writes none."""
    checkpoint_frozen: bool = False
    """Frozen parameters go into checkpoints too: for an optimizer that writes to them."""
    resume: bool = False
    """Go on from the newest checkpoint; starts afresh where there is none yet."""
    max_grad_norm: float = 1.0
    log_every: int = 1
    """Optimizer steps between metrics."""
    progress: bool = True


@dataclass(frozen=True)
class TrainResult:
    """What a run came to."""

    steps: int
    """Optimizer steps taken, those before a resume included; fewer than asked where a callback stopped the run."""
    tokens: int
    """steps x batch x window."""
    loss: float
    """Mean training loss of this call's steps, nats per token."""
    seconds: float


class _Trainer(Trainer):  # type: ignore[misc]
    """Trainer with our weights files, our autocast and a teacher."""

    def __init__(self, *, job: TrainJob, teacher: Teacher | None, **options: Any) -> None:
        super().__init__(**options)
        self.job, self.teacher = job, teacher
        if teacher is not None:
            self.loss_is_scaled_for_ga = False  # the mean over a micro batch, which Trainer divides by their number

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """The model's own loss, or with a teacher the mix of both."""
        if self.teacher is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        input_ids = inputs["input_ids"]
        wanted = self.teacher.logits(input_ids)
        logits = model(input_ids=input_ids, use_cache=False).logits
        return distillation_loss(logits, wanted, input_ids, self.teacher.weight)

    def autocast_smart_context_manager(self, _: bool | None = True) -> AbstractContextManager[None]:
        """Autocast around the forward pass only; accelerate's would stay wrapped around the model after training."""
        return autocast(self.args.device.type, self.job.dtype)

    def floating_point_ops(self, _: dict[str, Any]) -> int:
        """Not counted: Trainer walks the whole model for it at each forward pass."""
        return 0

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:  # noqa: ARG002
        save_changing(self.model, Path(output_dir or self.args.output_dir), frozen_too=self.job.checkpoint_frozen)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:  # noqa: ARG002
        load_changing(self.model, Path(resume_from_checkpoint), frozen_too=self.job.checkpoint_frozen)


def train(
    model: nn.Module,
    dataset: Dataset[dict[str, Tensor]],
    *,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    job: TrainJob,
    callbacks: Sequence[TrainerCallback] = (),
    teacher: Teacher | None = None,
) -> TrainResult:
    """Trains the model in place, on the device it is on, with the loss of every token of a window but the first.

    The dataset is read in order. Item n is `{"input_ids": (window,)}`, int64, and there are at least
    `job.steps * job.batch` of them, all of one length. Each optimizer step is followed by a step of the scheduler.
    A run that was killed and is resumed ends as one that was never killed, bit for bit on a CPU; its model, dataset and
    optimizer have to be made as they were. The newest checkpoint stays after the last step, too: `discard_checkpoints` once
    the result has been saved. Items are fetched ahead: after step s, up to item `(s + 1) * job.batch`.

    Raises:
        SettingsError: where `micro_batch` does not divide `batch`, or the steps are none.
        DataError: where the dataset is too short.
        TrainingError: where loss or gradient is no longer finite.
        OutputError: where a checkpoint is of another run, or the disk is full.
    """
    window = _check(dataset, job)
    if not job.resume:
        discard_checkpoints(job.out, job.name)
    start = last_checkpoint(job.out, job.name)
    began = perf_counter()
    with _as_it_was(model), _watchers(job, job.batch * window, first_step=start[1] if start else 0) as watchers:
        trainer = _Trainer(
            job=job,
            teacher=teacher,
            model=model,
            args=_arguments(job, next(model.parameters()).device),
            train_dataset=dataset,
            data_collator=_collate,
            optimizers=(optimizer, scheduler),
            callbacks=[*callbacks, *watchers],
        )
        trainer.remove_callback(PrinterCallback)
        with disk_full_explained(checkpoints_folder(job.out, job.name)):
            output = trainer.train(resume_from_checkpoint=str(start[0]) if start else None)
    if job.checkpoint_every is None:
        discard_checkpoints(job.out, job.name)  # Trainer makes the folder all the same
    steps = int(output.global_step)
    return TrainResult(steps, steps * job.batch * window, float(output.training_loss), perf_counter() - began)


def _check(dataset: Any, job: TrainJob) -> int:
    """Tokens in a window."""
    if job.steps < 1:
        raise SettingsError(f"{job.name}: {job.steps} optimizer steps; expected at least 1: give it more tokens")
    if job.batch % job.micro_batch:
        raise SettingsError(
            f"{job.name}: batch = {job.batch} is not divisible by micro_batch = {job.micro_batch}; set a micro_batch that "
            "divides it"
        )
    if len(dataset) < job.steps * job.batch:
        raise DataError(
            f"{job.name}: {len(dataset)} windows for {job.steps} steps of {job.batch}; expected at least "
            f"{job.steps * job.batch}"
        )
    return int(dataset[0]["input_ids"].shape[0])


def _collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """`(micro_batch, window)` token ids, which are their own labels: the model shifts them."""
    input_ids = torch.stack([item["input_ids"] for item in items])
    return {"input_ids": input_ids, "labels": input_ids}


def _arguments(job: TrainJob, device: torch.device) -> TrainingArguments:
    arguments = TrainingArguments(
        output_dir=str(checkpoints_folder(job.out, job.name)),
        max_steps=job.steps,
        per_device_train_batch_size=job.micro_batch,
        gradient_accumulation_steps=job.batch // job.micro_batch,
        max_grad_norm=job.max_grad_norm,
        seed=job.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type == "cuda",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        logging_steps=job.log_every,
        logging_nan_inf_filter=False,  # Trainer would hide them from the guard
        save_strategy="no" if job.checkpoint_every is None else "steps",
        save_steps=job.checkpoint_every or 1,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
    )
    if arguments.n_gpu > 1:
        # one process trains on one GPU: Trainer would split batches with nn.DataParallel, and our token counts too
        arguments._n_gpu = 1
    return arguments


@contextmanager
def _as_it_was(model: Any) -> Iterator[None]:
    """Gives back the mode and the cache setting, which Trainer changes."""
    training, config = model.training, getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        model.train(training)
        model.zero_grad(set_to_none=True)
        if config is not None and use_cache is not None:
            config.use_cache = use_cache


@contextmanager
def _watchers(job: TrainJob, tokens_per_step: int, *, first_step: int) -> Iterator[list[TrainerCallback]]:
    """Callbacks of a run, with what they hold open; the guard comes first, so that no NaN is written down."""
    job.out.mkdir(parents=True, exist_ok=True)
    watchers = [
        NanGuard(job.name),
        NoLastCheckpoint(),
        MetricsFile(job.out / "metrics.jsonl", job.name, tokens_per_step),
    ]
    # steps that are trained again after a resume replace what was drawn of them
    with SummaryWriter(str(job.out / "tensorboard" / job.name), purge_step=first_step + 1) as board:
        watchers.append(TensorBoardCallback(board))
        if not job.progress:
            yield watchers
            return
        with ProgressBar.columns() as bar:
            yield [*watchers, ProgressBar(bar, job.name, job.steps, tokens_per_step)]
