"""Thin glue around transformers' Trainer: one run, its callbacks, schedules, adapters, and what the machine allows."""

from __future__ import annotations

from lorashear.training.adapters import adapter_targets, attach_lora, drop_lora, merge_lora
from lorashear.training.checkpoints import discard_checkpoints
from lorashear.training.distill import Teacher
from lorashear.training.memory import (
    TrainChoice,
    resolve_micro_batch,
    resolve_teacher,
    resolve_train,
    state_bytes,
)
from lorashear.training.precision import full_precision_weights, resolve_dtype
from lorashear.training.schedules import constant_with_warmup, cosine_to, default_learning_rate
from lorashear.training.trainer import TrainJob, TrainResult, train

__all__ = [
    "Teacher",
    "TrainChoice",
    "TrainJob",
    "TrainResult",
    "adapter_targets",
    "attach_lora",
    "constant_with_warmup",
    "cosine_to",
    "default_learning_rate",
    "discard_checkpoints",
    "drop_lora",
    "full_precision_weights",
    "merge_lora",
    "resolve_dtype",
    "resolve_micro_batch",
    "resolve_teacher",
    "resolve_train",
    "state_bytes",
    "train",
]
