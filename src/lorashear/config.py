"""The settings of every stage, and the only home of their defaults.

Each stage has one frozen object; unknown keys and values outside their range raise `SettingsError` (see
`from_mapping`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from lorashear.errors import SettingsError, did_you_mean

Share = Annotated[float, Field(ge=0.0, le=1.0)]
OpenShare = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[int, Field(ge=1)]

Shape = Literal["uniform", "per-layer"]
RatioOf = Literal["model", "decoder"]
Method = Literal[
    "lhspg",
    "hesso",
    "grasprune",
    "one-shot",
    "taylor",
    "taylor-vector",
    "wanda-sp",
    "flap",
    "slicegpt",
    "depth",
    "magnitude",
    "random",
]
PrunableKind = Literal["heads", "query-slots", "ffn-channels", "residual", "experts", "layers"]
Train = Literal["auto", "adapters", "all"]
Dtype = Literal["auto", "float32", "bfloat16"]


class Settings(BaseModel):
    """Base of all settings: frozen, typed, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], *, origin: str = "settings") -> Self:
        """Validates `values`; every error names the key as `origin: a.b` and says what was expected.

        Raises:
            SettingsError: for an unknown key (with the nearest known one) or a value outside its range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise SettingsError("; ".join(_explain(cls, item, origin) for item in error.errors())) from None


def _explain(cls: type[BaseModel], item: Any, origin: str) -> str:
    path = ".".join(str(part) for part in item["loc"]) or "(whole)"
    if item["type"] == "value_error" and not item["loc"]:  # of several keys together: the message names them
        return f"{origin}: {item['ctx']['error']}"
    if item["type"] != "extra_forbidden":
        return f"{origin}: {path} = {item['input']!r}: {item['msg']}"
    model: Any = cls
    for part in item["loc"][:-1]:
        model = model.model_fields[part].annotation if hasattr(model, "model_fields") else model
    known = model.model_fields if hasattr(model, "model_fields") else cls.model_fields
    return f'{origin}: unknown key "{path}"; {did_you_mean(str(item["loc"][-1]), known)}'


class DataSettings(Settings):
    """How text becomes windows of tokens."""

    window: Annotated[int, Field(ge=2)] = 256
    """Tokens in a window; every window makes window - 1 predictions in evaluation."""
    separator: str | None = None
    """Token put before every passage; None takes `<|endoftext|>` where the vocabulary has it, else the EOS, else the
    BOS token."""
    render: Literal["auto", "chat", "plain", "text"] = "auto"
    """Instruction rows: the tokenizer's chat template, a plain layout, or the rows' own `text` field; auto takes chat
    where there is a template."""
    held_out: OpenShare = 0.05
    """Share of a source's passages held out where it names no `valid` file (at least 20 passages)."""
    eval_windows: Positive = 60
    """Non-overlapping held-out windows evaluated per source."""
    max_train_tokens: Positive = 8_000_000
    """Training tokens read per source; what comes after them in the source is left out."""
    calibration_windows: Positive = 128
    """Training windows used for statistics (saliency, directions, compensation): the sources take turns, as often as they
    weigh."""
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    """Source -> what it counts, 1 where it is not named: in the draw of calibration and training windows, in the profile's
    macro, in what the full model learns first and in the recovery mixture. What perplexity is reported does not depend on it."""


class LoraSettings(Settings):
    """Adapters on all linear layers of the decoder (stock peft)."""

    rank: Positive = 8
    """Inner size of the adapters' two factors."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The adapters' product is scaled by alpha / rank."""


class SaliencySettings(Settings):
    """Weights of the criteria in the mix; each criterion is first divided by its mean over the model."""

    magnitude: Annotated[float, Field(ge=0)] = 0.0
    """Norm of a structure's weights, adapters included."""
    mean_magnitude: Annotated[float, Field(ge=0)] = 0.0
    """Root of the mean square of its weights: that norm whatever the structure's size."""
    cosine: Annotated[float, Field(ge=0)] = 0.0
    """1 - cosine between a structure's composed weight and its update, that of the adapters during warm-up or, where all
    weights train, the step down the gradient: what moves is still learning."""
    taylor: Annotated[float, Field(ge=0)] = 0.0
    """|mean over samples of d loss / d gate|."""
    taylor2: Annotated[float, Field(ge=0)] = 1.0
    """Mean over samples of (d loss / d gate) squared: the diagonal of the Fisher information of the gates."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not any(getattr(self, name) for name in type(self).model_fields):
            raise ValueError("all weights are 0: give at least one criterion a positive weight")
        return self


class AnalysisSettings(Settings):
    """Knowledge distribution."""

    probe: OpenShare = 0.25
    """Share of a group's structures, the least salient, that a probe removes."""
    windows: Positive = 1
    """Held-out windows per source that a probe is measured on."""
    in_compress: bool | None = None
    """Whether `compress` and `prune` analyse too. None: where the profile decides something, which is in the per-layer
    shape with `unprunable` above 0, for what lies inside the layers."""
    unprunable: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """gamma: share of the groups, those of largest deviation, that pruning leaves alone (per-layer shape only). 0: saliency
    by itself was seen to leave them alone (benchmarks/RESULTS.md)."""


class PruneSettings(Settings):
    """LHSPG and its budget."""

    method: Method = "lhspg"
    """How structures are picked and taken out (docs/how-it-works.md)."""
    ratio: OpenShare = 0.2
    """Share of parameters to remove."""
    ratio_of: RatioOf = "model"
    """What the ratio is a share of: all parameters, or those of the decoder layers."""
    shape: Shape = "uniform"
    """uniform: equal widths in all layers, loads in stock tools; per-layer: widths as saliency wants them."""
    kinds: tuple[PrunableKind, ...] | None = None
    """Which kinds of structures may go; None for all that the method can cut. The residual stream is first turned into the
    basis of its principal directions, and how much of it goes is measured (nothing where all of it is used). Experts go only
    where they are named, whole and as many in every layer (uniform shape); a token still gets as many as before."""
    round_to: Positive = 8
    """FFN widths and the width of the residual stream left are multiples of this: 64 or 128 suit GPUs, 256 GGUF k-quants."""
    share: OpenShare = 0.1
    """Share of the token budget spent on warm-up and walk, or on learning gates; one-shot methods spend none."""
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.2
    """Share of the pruning steps that only train and gather saliency."""
    periods: Positive = 5
    """Rounds of the walk; each picks the structures that go in it, judged given what is gone already."""
    memory: Share = 0.5
    """What gate statistics from before the last period count, against those from it, when structures are judged
    anew."""
    shrink: Literal["slices", "gates"] = "gates"
    """What shrinks to zero over a period: the slices of the weights (the paper's words) or the structure's
    contribution."""
    epsilon: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Half-space test: a structure is zeroed early once <W_trial, W_start> < epsilon |W_start|^2; 0 never does."""
    compensate: bool | None = None
    """Whether what stays takes over, by least squares and layer by layer, what the full model wrote. In a walk it happens at the
    start of every period, whose structures are zero at once then (`shrink` and `epsilon` have no say), and its steps heal. None:
    at a cut in one shot, and in a walk of all weights that leaves `shrink` and `epsilon` alone."""
    train: Train = "auto"
    """What learns during the walk: the adapters (the paper) or all weights."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak rate of AdamW. None: for adapters 1e-3 up to 50 M parameters, falling with the cube root of the size (1.8e-4 at 8 B);
    for all weights 5e-4 up to 100 M, falling with the square root (5.6e-5 at 8 B), and in proportion below 8 windows a step;
    3e-2 for the gates of `grasprune`."""


class DistillSettings(Settings):
    """Learning from the full model beside the text, in pruning and recovery; its forward passes cost time, no tokens."""

    teacher: Literal["auto", "on", "off"] = "auto"
    """Whether a frozen copy of the full model is kept for it; auto: where memory allows."""
    weight: Share = 0.5
    """Share of the loss that is the cross-entropy against the full model's distribution, as long as the full model is
    the better one on a batch; none where the small one is ahead by 0.1 nats per token."""

    @field_validator("teacher", mode="before")
    @classmethod
    def _as_yaml_reads_it(cls, value: Any) -> Any:
        """YAML takes a bare `on` and `off` for true and false."""
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class AdaptSettings(Settings):
    """Teaching the full model the text before it is cut: it is what the small one is made of and learns from."""

    share: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
    """Share of the token budget; 0 for none. None: 0.3 where the text is new to the model, which a trial of 2.5 % of the
    budget tells (0.02 nats per token or more are gained), else nothing more than the trial. `prune` alone does it only where a
    share is set."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Of the adapters that learn; None: 1e-3, less for models above 50 M parameters; decays to 5 % of it on a cosine."""


class RecoverSettings(Settings):
    """Dynamic knowledge recovery."""

    train: Train = "auto"
    """adapters, all weights, or what memory allows (all where weights, gradients and AdamW's state fit)."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Peak rate of AdamW, decays to 5 % of it on a cosine. None: as `prune.learning_rate`."""
    instruct_share: Share = 0.25
    """Share of the recovery tokens given to the second stage (instruction sources); 0 where there are none."""
    rounds: Positive = 3
    """Rounds a stage; the mixture is re-weighted by measured deviation before each."""
    floor: Share = 0.3
    """Share of every round drawn in proportion to the sources' sizes, whatever their deviation."""
    patience: Annotated[int, Field(ge=0)] = 0
    """Rounds without improvement after which a stage stops; 0 never stops early."""


STEPS = 600
"""Optimizer steps that a budget should pay for: many small steps recover more than few large ones (RESULTS.md)."""


class CompressSettings(Settings):
    """All stages of `compress`."""

    tokens: Positive = 1_200_000
    """Training tokens of pruning and recovery together; a token counts each time a gradient taken from it changes
    anything."""
    batch: Positive = 8
    """Windows in an optimizer step. Left open it follows the budget: the most of 2, 4, 8 and 16 that leave 450 steps or more."""
    micro_batch: Positive | None = None
    """Windows in one forward pass; None chooses by memory."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Of everything that is drawn: adapters, windows, the scores of `random`."""
    device: str = "auto"
    """Where models run: "cpu" or "cuda"; auto takes a GPU that torch finds, else the CPU. Of several GPUs the first that is
    seen (CUDA_VISIBLE_DEVICES)."""
    dtype: Dtype = "auto"
    """Autocast of training. auto: bfloat16 on a GPU that has it and where weights are held in it; on a CPU where a short timing
    finds it faster; else float32."""
    weight_dtype: Dtype = "auto"
    """What weights are held in; those that train are float32 while they do. auto takes float32, or bfloat16 where that does not
    fit the memory, on a GPU together with a teacher."""
    reference: bool = False
    """Also train the dense model with the same recovery over the whole budget, for the table."""
    data: DataSettings = DataSettings()
    lora: LoraSettings = LoraSettings()
    saliency: SaliencySettings = SaliencySettings()
    analysis: AnalysisSettings = AnalysisSettings()
    adapt: AdaptSettings = AdaptSettings()
    prune: PruneSettings = PruneSettings()
    recover: RecoverSettings = RecoverSettings()
    distill: DistillSettings = DistillSettings()

    @model_validator(mode="after")
    def _formats_agree(self) -> Self:
        if self.dtype == "float32" and self.weight_dtype == "bfloat16":
            raise ValueError(
                'dtype = "float32" asks for more digits than weight_dtype = "bfloat16" holds; change one of them'
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _batch_by_budget(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or "batch" in values:
            return values
        tokens = values.get("tokens", cls.model_fields["tokens"].default)
        data = values.get("data", {})
        default = DataSettings().window
        window = data.get("window", default) if isinstance(data, Mapping) else getattr(data, "window", default)
        if not (isinstance(tokens, int) and isinstance(window, int) and window > 0):
            return values  # what is wrong with them is said of them
        batch = next((size for size in (16, 8, 4) if tokens >= 0.75 * size * window * STEPS), 2)
        micro_batch = values.get("micro_batch")
        if isinstance(micro_batch, int) and micro_batch > 0:
            batch = -(-batch // micro_batch) * micro_batch
        return {**values, "batch": batch}
