"""What a published format becomes: a configuration, names of weights, and what its publisher states."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..configuration_mamba_ema import MambaEMAConfig

LABELS = ("arousal", "dominance", "valence")
# MSP-Podcast's raters marked self-assessment manikins from 1 to 7; the models give (rating - 1) / 6.
MSP_RANGE = (1.0, 7.0)
ENCODER = "mamba_ema.speech_encoder"


@dataclass(frozen=True)
class Publication:
    """What the publisher of a model states.

    Attributes:
        labels: of the outputs, in their order.
        license: of the weights, as the Hub spells it.
        corpus: that the model was trained on, with its version.
        results: CCC by split and label, as published.
    """

    labels: tuple[str, ...]
    license: str
    corpus: str
    citation: str
    results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Conversion:
    """How a published model becomes one of this package.

    Attributes:
        config: of the converted model.
        names: the publisher's name of a weight, or of a module with weights, to ours.
        transposed: our names of weights that the publisher stores the other way round.
        zeros: our weights that the publisher's model does not have, and whose value 0 gives its numbers.
    """

    config: MambaEMAConfig
    names: Mapping[str, str]
    transposed: frozenset[str] = frozenset()
    zeros: frozenset[str] = frozenset()


def required(config: Mapping[str, Any], name: str) -> Any:
    """A value of a published config.json; `ValueError` where it is not there."""
    if config.get(name) is None:
        raise ValueError(f"config.json has no {name}, which every model of this kind has")
    return config[name]


def check_value(config: Mapping[str, Any], name: str, allowed: Any) -> None:
    """Raise `ValueError` where a published config.json has another value than this conversion knows."""
    if config.get(name, allowed) != allowed:
        raise ValueError(f"config.json has {name} {config[name]!r}; such models can be adopted with {allowed!r} only")


def dimensional_labels(config: Mapping[str, Any]) -> list[str]:
    """The labels of a published config.json in the order of the outputs; `ValueError` where they are not dimensions."""
    names = {int(number): str(name).lower() for number, name in required(config, "id2label").items()}
    labels = [names[number] for number in sorted(names)]
    if not labels or not set(labels) <= set(LABELS) or len(set(labels)) < len(labels):
        raise ValueError(f"the model predicts {', '.join(labels)}; models of {', '.join(LABELS)} can be adopted")
    return labels
