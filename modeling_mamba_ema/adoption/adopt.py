"""Adopting a model: every weight of the file is used, every weight of ours is filled, or nothing is written."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import PretrainedConfig

from ..configuration_mamba_ema import WAVLM_LARGE
from ..inference.loading import check_model_name
from ..modeling_mamba_ema import MambaEMAForRegression
from ..publishing import TrainingFacts, prepare_release
from . import audeering, odyssey
from .conversion import Conversion, Publication
from .weights import find_file, read_weights

FORMATS: tuple[ModuleType, ...] = (odyssey, audeering)
PUBLICATIONS: dict[str, Publication] = {
    name: publication for published in FORMATS for name, publication in published.PUBLICATIONS.items()
}
# Encoders whose configuration need not be looked for.
KNOWN_ENCODERS = {"microsoft/wavlm-large": {"model_type": "wavlm", **WAVLM_LARGE}}
SHOWN_NAMES = 5


@dataclass(frozen=True)
class Adoption:
    """What was adopted.

    Attributes:
        publication: what its publisher states; None: not known.
        weights_read, weights_filled: how many weights the file and the model have: all of them used, all of them
            filled.
        zeros: of the model's, the ones that the file does not hold and that are 0.
    """

    model: MambaEMAForRegression
    publication: Publication | None
    weights_read: int
    weights_filled: int
    zeros: tuple[str, ...]


def adopt(
    source: str,
    output: str | Path,
    revision: str = "main",
    encoder_config: str | None = None,
    published_as: str | None = None,
) -> Adoption:
    """Convert a published model and write it as a folder of this package, ready to use and to publish.

    Args:
        source: Hub name, or a folder with the files of one.
        output: folder to write; it must be empty or not exist.
        encoder_config: folder, config.json or Hub name with the speech encoder's configuration, where the model's own
            does not hold it and it is not that of WavLM-large.
        published_as: Hub name of the model, where `source` is a folder; its licence and corpus go into the card.

    Raises:
        OSError: files are missing or damaged, or the output holds something.
        ValueError: another kind of model, or weights that do not fit, each of them named.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OSError(f"{output} exists and is not empty; name another folder")
    name = source if published_as is None else published_as
    publication = PUBLICATIONS.get(name)
    if published_as is not None and publication is None:
        raise ValueError(f"{published_as} is no published model that is known; known are {', '.join(PUBLICATIONS)}")
    check_model_name(source, revision)
    config = _read_json(source, "config.json", revision)
    if config is None:
        raise OSError(f"{source} has no config.json, so it is no published model")
    published = _format(source, config)
    preprocessor = _read_json(source, "preprocessor_config.json", revision)
    conversion = published.convert(config, preprocessor, _encoder_config(config, encoder_config))
    if publication is not None and (
        name not in published.PUBLICATIONS or list(publication.labels) != conversion.config.labels
    ):
        raise ValueError(f"{source} is not {name}: that one has another form or predicts other labels")
    weights = read_weights(source, revision)
    model = _converted(conversion, weights)
    model.save_pretrained(output)
    prepare_release(output, _facts(name, _commit(source, revision), output, publication), model)
    filled = len(model.state_dict())
    return Adoption(model, publication, len(weights), filled, tuple(sorted(conversion.zeros)))


def _read_json(source: str, name: str, revision: str) -> dict[str, Any] | None:
    path = find_file(source, name, revision)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} of {source} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} of {source} holds a {type(content).__name__}; names and values are needed")
    return content


def _commit(source: str, revision: str) -> str | None:
    """The commit that a revision on the Hub stands for; None for a folder."""
    path = None if Path(source).is_dir() else find_file(source, "config.json", revision)
    return None if path is None else path.parent.name  # the Hub's cache has a folder a commit


def _format(source: str, config: Mapping[str, Any]) -> ModuleType:
    for published in FORMATS:
        if published.recognises(config):
            return published
    raise ValueError(
        f"{source} is a model of type {config.get('model_type')!r}, which cannot be adopted; those that can have the "
        f"form of {', '.join(PUBLICATIONS)}"
    )


def _encoder_config(config: Mapping[str, Any], given: str | None) -> dict[str, Any] | None:
    """The speech encoder's configuration where config.json only names it, or another one is given."""
    name = config.get("ssl_type") if given is None else given
    if name is None:
        return None
    if given is None and name in KNOWN_ENCODERS:
        return KNOWN_ENCODERS[name]
    path = Path(name)
    fields, _ = PretrainedConfig.get_config_dict(path.parent if path.is_file() else name)
    return fields


def _converted(conversion: Conversion, weights: Mapping[str, torch.Tensor]) -> MambaEMAForRegression:
    """The model with every weight of the file. Raises `ValueError`, with their names, where weights have no place, are
    missing, have another shape, or hold NaN."""
    model = MambaEMAForRegression(conversion.config).eval()
    places = model.state_dict()
    given = {name: torch.zeros_like(places[name]) for name in conversion.zeros if name in places}
    unused, misshapen = [], []
    for theirs, weight in weights.items():
        ours = _our_name(theirs, conversion.names)
        if ours is None or ours not in places or ours in given:
            unused.append(theirs)
            continue
        given[ours] = weight.t() if ours in conversion.transposed else weight
        if given[ours].shape != places[ours].shape:
            misshapen.append(f"{theirs} {tuple(weight.shape)}")
    missing = sorted(places.keys() - given.keys())
    problems = {
        "hold NaN or infinity": [
            name for name, weight in weights.items() if weight.is_floating_point() and not weight.isfinite().all()
        ],
        "have no place in the model": unused,
        "are missing, by our names": missing,
        "do not have the shape that the configuration says": misshapen,
    }
    text = "; ".join(f"{len(names)} {what}: {_shown(names)}" for what, names in problems.items() if names)
    if text:
        raise ValueError(f"the weights are not those of this configuration, and nothing is written: {text}")
    model.load_state_dict(given)
    return model


def _our_name(theirs: str, names: Mapping[str, str]) -> str | None:
    for prefix, ours in names.items():
        if theirs == prefix or theirs.startswith(f"{prefix}."):
            return ours + theirs[len(prefix) :]
    return None


def _shown(names: Sequence[str]) -> str:
    more = len(names) - SHOWN_NAMES
    return ", ".join(sorted(names)[:SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")


def _facts(name: str, commit: str | None, output: Path, publication: Publication | None) -> TrainingFacts | None:
    if publication is None:
        return None
    words = ["mamba-ema", "adopt", name, output.name, *([] if commit is None else ["--revision", commit])]
    return TrainingFacts(
        results={},
        source=publication.corpus,
        command=shlex.join(words),
        base_model=name,
        license=publication.license,
        languages=("en",),
        citation=publication.citation,
        published_results=publication.results,
    )
