"""A run as YAML: sections `model`, `data`, `training`, each name and value checked."""

import dataclasses
import difflib
import enum
import inspect
import re
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import WavLMConfig

from ..configuration_mamba_ema import SPEECH_ENCODERS, MambaEMAConfig
from ..data.atomic_write import atomic_write
from ..feature_extraction_mamba_ema import DEFAULT_MAX_SECONDS
from .arguments import MambaEMATrainingArguments
from .lora import lora_fields

MAX_BYTES = 1_000_000
# Beside the arguments of MambaEMAConfig, `model.params` takes these of transformers' PretrainedConfig.
_PRETRAINED_CONFIG = {"id2label": dict, "num_labels": int, "attn_implementation": str}


@dataclass
class ModelSection:
    """What a run starts from."""

    # Of MambaEMAConfig; speech_encoder_config: of WavLMConfig, or what its model_type says. With pretrained_model: what
    # is to be changed in it.
    params: dict[str, Any] = field(default_factory=dict)
    pretrained_speech_encoder: str | None = None  # folder or Hub name of a WavLM; tiny: the shipped one; None: random
    pretrained_model: str | None = None  # folder or Hub name of a Mamba-EMA to continue from
    revision: str = "main"  # commit, tag or branch of what is pretrained
    freeze_feature_encoder: bool = False  # keep the convolutions of the speech encoder, train its transformer

    def __post_init__(self) -> None:
        if self.pretrained_model and self.pretrained_speech_encoder:
            raise ValueError("model.pretrained_model brings its own encoder; leave out model.pretrained_speech_encoder")
        if self.freeze_feature_encoder and not (self.pretrained_model or self.pretrained_speech_encoder):
            raise ValueError(
                "model.freeze_feature_encoder would keep random convolutions; name model.pretrained_speech_encoder or "
                "model.pretrained_model"
            )
        self.params = _checked_values(self.params, _names_of_params(), "model.params.")
        name = "speech_encoder_config"
        if self.params.get(name) is not None:
            fields = self.params[name]
            kind = fields.get("model_type") if isinstance(fields, dict) else None
            config = SPEECH_ENCODERS.get(str(kind), WavLMConfig)
            known = {field.name: field.type for field in dataclasses.fields(config)} | {"model_type": str}
            self.params[name] = _checked_values(fields, known, f"model.params.{name}.")


@dataclass
class DataSection:
    """What a run learns from and is measured on."""

    source: str = ""  # folder with metadata.jsonl, .csv or .parquet, such a file, an audiofolder, or a name on the Hub
    columns: dict[str, str] = field(default_factory=dict)  # what the corpus calls them, such as {valence: EmoVal}
    train_split: str = "train"  # several together: train+validation
    # Chooses the best checkpoint and makes the intervals; None: the last checkpoint counts, and there are no intervals.
    validation_split: str | None = "validation"
    test_split: str | None = "test"  # measured once, at the end; None: no test
    # A column such as speaker: each split that the corpus lacks gets 20 % of the turns of train_split; no speaker is in
    # two of them.
    split_by: str | None = None
    turns_per_item: int | None = None  # cut training conversations into windows of this many turns; None: whole
    context_turns: int = 0  # turns before a window that make the state it starts from, without gradient
    noise_snr_db: list[float] | None = None  # add white noise to training audio, [lowest, highest] ratio in dB
    speed_factors: list[float] | None = None  # play training audio faster or slower, one of these factors an item
    max_seconds: float = DEFAULT_MAX_SECONDS  # longest utterance
    on_bad_audio: str = "abort"  # files that cannot be used: abort before training, or skip and record them
    cache_frames: bool = False  # compute the frames of a frozen encoder once and train from the disk
    cache_folder: str = ".cache/frames"

    def __post_init__(self) -> None:
        if self.on_bad_audio not in ("abort", "skip"):
            raise ValueError(f"data.on_bad_audio is {self.on_bad_audio!r}; allowed are abort and skip")
        for name in ("train_split", "validation_split", "test_split"):
            parts = (getattr(self, name) or "none").split("+")
            if "" in parts or len(set(parts)) < len(parts):
                raise ValueError(
                    f"data.{name} is {getattr(self, name)!r}; allowed are a split, or several such as train+validation"
                )
        if (self.turns_per_item is not None and self.turns_per_item < 1) or self.context_turns < 0:
            raise ValueError("data.turns_per_item must be at least 1, and data.context_turns at least 0")
        if self.context_turns and self.turns_per_item is None:
            raise ValueError("data.context_turns come before windows; set data.turns_per_item, the length of a window")
        if self.cache_frames and self.changes_audio:
            raise ValueError(
                "data.noise_snr_db and data.speed_factors change waveforms, but data.cache_frames trains from frames; "
                "leave out one"
            )

    @property
    def changes_audio(self) -> bool:
        """Whether training audio is another one in each epoch."""
        return self.noise_snr_db is not None or self.speed_factors is not None


@dataclass
class RunConfiguration:
    """The sections of a run; `training` are names and values of [`MambaEMATrainingArguments`], as they were given."""

    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    training: dict[str, Any] = field(default_factory=dict)

    def training_arguments(self, **changes: Any) -> MambaEMATrainingArguments:
        """The arguments of the run, with other values in the place of some; `ValueError` where they are not allowed, or
        do not go together."""
        no_evaluation = (
            {"eval_strategy": "no", "load_best_model_at_end": False} if self.data.validation_split is None else {}
        )
        return MambaEMATrainingArguments(**{**no_evaluation, **self.training, **changes})

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Everything this package decides and everything that was given; the rest are transformers' defaults."""
        own = MambaEMATrainingArguments.__annotations__
        defaults = {f.name: f.default for f in dataclasses.fields(MambaEMATrainingArguments) if f.name in own}
        return {
            "model": dataclasses.asdict(self.model),
            "data": dataclasses.asdict(self.data),
            "training": {**defaults, **self.training},
        }

    def save(self, path: str | Path) -> None:
        """Write the configuration, from which the run can be repeated."""
        atomic_write(path, yaml.safe_dump(self.to_dict(), sort_keys=False))


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader without aliases, by which a few lines can stand for more values than memory holds, and without
    names that are given twice, of which YAML would keep the last. As in YAML 1.2, 1e-5 is a number."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not allowed, found one in line {self.peek_event().start_mark.line + 1}")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        values, names = super().construct_mapping(node, deep), []
        for key, _ in node.value:
            names.append(self.construct_object(key))
            if names.count(names[-1]) > 1:
                raise yaml.YAMLError(f"{names[-1]!r} is given twice, the second time in line {key.start_mark.line + 1}")
        return values


_PlainLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+"), list("-+0123456789"))


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file under 1 MB, read by the safe loader, which builds plain values only; `ValueError`
    where it is larger, no YAML, or has aliases or tags."""
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES} bytes; that is no run configuration")
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader) or {}
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no plain YAML: {error}") from error


def load_run_configuration(path: str | Path, overrides: Sequence[str] = ()) -> RunConfiguration:
    """Read a YAML file, see [`read_yaml`], and apply overrides from the command line.

    Args:
        overrides: `section.name=value`, e.g. `training.learning_rate=1e-5`; dots go on into `model.params`.

    Raises:
        ValueError: an unknown name (with the nearest known one), a value of the wrong type, a malformed override, or
            values that are not allowed.
    """
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must have the sections model, data and training, got {reprlib.repr(content)}")
    for override in overrides:
        name, separator, value = override.partition("=")
        if not separator or not name:
            raise ValueError(f"{override!r} is no override; write section.name=value")
        try:
            _set(content, name.split("."), yaml.load(value, Loader=_PlainLoader))
        except yaml.YAMLError as error:
            raise ValueError(f"{override!r} is no plain YAML: {error}") from error
    sections = _checked_values(content, dict.fromkeys(("model", "data", "training"), Any), "")
    model, data, training = (
        _checked_values({} if sections.get(name) is None else sections[name], _known_names(section), f"{name}.")
        for name, section in (("model", ModelSection), ("data", DataSection), ("training", MambaEMATrainingArguments))
    )
    if training.get("lora") is not None:
        training["lora"] = _checked_values(training["lora"], lora_fields(), "training.lora.")
    for what in ("eval", "save", "logging"):
        if f"{what}_steps" in training and training.get(f"{what}_strategy", "epoch") == "epoch":
            raise ValueError(f"training.{what}_steps needs training.{what}_strategy=steps; without it, epochs count")
    run = RunConfiguration(ModelSection(**model), DataSection(**data), training)
    try:
        run.training_arguments()
    except (TypeError, ValueError) as error:
        raise ValueError(f"training: {' '.join(str(error).split())}") from error
    return run


def _names_of_params() -> dict[str, Any]:
    """The annotations of what `model.params` takes."""
    hints = typing.get_type_hints(MambaEMAConfig.__init__)
    names = set(inspect.signature(MambaEMAConfig.__init__).parameters) - {"self", "kwargs"}
    return {**{name: hints[name] for name in names}, **_PRETRAINED_CONFIG}


def _known_names(section: type) -> dict[str, Any]:
    """The annotations of a dataclass's arguments."""
    hints = typing.get_type_hints(section)
    return {field.name: hints[field.name] for field in dataclasses.fields(section) if field.init}


def _set(content: dict[str, Any], names: list[str], value: Any) -> None:
    for name in names[:-1]:
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise ValueError(f"{'.'.join(names)} goes into {name}, which is a value, not a section")
    content[names[-1]] = value


def _checked_values(values: Any, known: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """A section's values, each of a known name and of a type that its annotation allows."""
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the configuration'} must be a section, got {reprlib.repr(values)}")
    for name in values:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known are {reprlib.repr(sorted(known))}"
            raise ValueError(f"unknown key {prefix}{reprlib.repr(name).strip(chr(39))}; {hint}")
    return {name: _checked(value, known[name], f"{prefix}{name}") for name, value in values.items()}


def _checked(value: Any, annotation: Any, name: str) -> Any:
    is_union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    options = typing.get_args(annotation) if is_union else (annotation,)
    enums: list[Any] = [option for option in options if isinstance(option, enum.EnumMeta)]
    choices = [str(member.value) for kind in enums for member in kind]
    if value is False and "no" in choices:  # YAML 1.1 reads no as false
        return "no"
    if value in choices if choices else _fits(value, annotation):
        return value
    names = choices or ["null" if option is type(None) else _name(option) for option in options]
    close = difflib.get_close_matches(str(value), choices, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"{name} is {reprlib.repr(value)}, but must be {' or '.join(names)}{hint}")


def _fits(value: Any, annotation: Any) -> bool:
    if annotation is Any or isinstance(annotation, str):  # not resolved: the class that is built checks the value
        return True
    kind, inner = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if kind in (types.UnionType, typing.Union):
        return any(_fits(value, option) for option in inner)
    if kind is typing.Literal:
        return value in inner
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind in (list, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(item, inner[0]) for item in value if inner)
    if kind is dict:
        return isinstance(value, dict) and all(_fits(item, inner[1]) for item in value.values() if inner)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
