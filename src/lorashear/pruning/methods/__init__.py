"""How structures are picked: one short file a method. Budget, rounding, allocation, cut, recovery and evaluation are
shared, so that a comparison is fair by construction."""

from __future__ import annotations

from lorashear.config import CompressSettings, PrunableKind, PruneSettings, SaliencySettings
from lorashear.errors import SettingsError
from lorashear.pruning.methods.depth import DEPTH
from lorashear.pruning.methods.flap import FLAP
from lorashear.pruning.methods.gate_saliency import LHSPG, ONE_SHOT
from lorashear.pruning.methods.grasprune import GRASPRUNE
from lorashear.pruning.methods.hesso import HESSO
from lorashear.pruning.methods.method import IN_LAYERS, STAGE, Method, Scoring, TrainingRun
from lorashear.pruning.methods.simple import MAGNITUDE, RANDOM
from lorashear.pruning.methods.slicegpt import SLICEGPT
from lorashear.pruning.methods.taylor import TAYLOR, TAYLOR_VECTOR
from lorashear.pruning.methods.wanda import WANDA_SP

METHODS = {
    method.name: method
    for method in (
        LHSPG,
        HESSO,
        GRASPRUNE,
        ONE_SHOT,
        TAYLOR,
        TAYLOR_VECTOR,
        WANDA_SP,
        FLAP,
        SLICEGPT,
        DEPTH,
        MAGNITUDE,
        RANDOM,
    )
}

__all__ = [
    "METHODS",
    "STAGE",
    "Method",
    "Scoring",
    "TrainingRun",
    "method_kinds",
    "method_of",
    "probing_method",
    "wants_profile",
    "with_preset",
]


def method_of(settings: PruneSettings) -> Method:
    """The method that the settings name."""
    return METHODS[settings.method]


def probing_method(settings: PruneSettings) -> Method:
    """Whose scores the knowledge profile goes by: the method's, or where it knows nothing of what lies inside the layers,
    lorashear's own."""
    method = method_of(settings)
    return method if {*method.kinds} & {*IN_LAYERS} else ONE_SHOT


def wants_profile(settings: CompressSettings) -> bool:
    """Whether `compress` and `prune` measure the knowledge profile before they prune: where the settings leave that open,
    only if the planner spares groups by it."""
    if settings.analysis.in_compress is not None:
        return settings.analysis.in_compress
    inside = {*method_kinds(settings.prune)} & {*IN_LAYERS}
    return settings.prune.shape == "per-layer" and settings.analysis.unprunable > 0 and bool(inside)


def method_kinds(settings: PruneSettings) -> tuple[PrunableKind, ...]:
    """Kinds of structures that may go: those of the settings, else those that the method is made for.

    Raises:
        SettingsError: for a kind that the method has no score for, or experts together with the residual stream.
    """
    method = method_of(settings)
    if settings.kinds is None:
        return method.kinds
    able = (*method.kinds, *method.also)
    if unable := sorted(set(settings.kinds) - {*able}):
        raise SettingsError(
            f"prune.kinds: {method.name} cannot cut {', '.join(unable)}, only {', '.join(able)}; leave them out"
        )
    if {"experts", "residual"} <= {*settings.kinds}:
        raise SettingsError("prune.kinds: experts and residual cannot go in one run; name one of them")
    return settings.kinds


def with_preset(settings: CompressSettings) -> CompressSettings:
    """The settings with those of the method filled in; a setting that is not at its default is the user's and stays."""
    method, defaults = method_of(settings.prune), PruneSettings()
    wanted = {key: to for key, to in method.prune.items() if getattr(settings.prune, key) == getattr(defaults, key)}
    plain = method.saliency is None or settings.saliency != SaliencySettings()
    saliency = settings.saliency if plain else method.saliency
    return settings.model_copy(update={"prune": settings.prune.model_copy(update=wanted), "saliency": saliency})
