"""A run as YAML: sections `model`, `data`, `training`, each field checked by name and type."""

from __future__ import annotations

import dataclasses
import difflib
import reprlib
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 1_000_000


@dataclass
class ModelSection:
    params: dict[str, Any] = field(default_factory=dict, metadata={"help": "arguments of MambaEMAConfig"})
    pretrained_speech_encoder: str | None = field(
        default=None,
        metadata={"help": "folder or Hub name of a WavLM to start from; tiny: the shipped one; null: random weights"},
    )
    pretrained_model: str | None = field(
        default=None, metadata={"help": "folder or Hub name of a Mamba-EMA to continue from; params must be empty then"}
    )
    revision: str = field(default="main", metadata={"help": "commit, tag or branch of what is pretrained"})


@dataclass
class DataSection:
    source: str = field(
        default="",
        metadata={
            "help": "folder with metadata.jsonl/.csv/.parquet, such a file, an audiofolder, or a name on the Hub"
        },
    )
    columns: dict[str, str] = field(
        default_factory=dict, metadata={"help": "what the corpus calls its columns, such as {valence: EmoVal}"}
    )
    train_split: str = field(default="train", metadata={"help": "split to learn from"})
    validation_split: str = field(default="validation", metadata={"help": "split that chooses the best checkpoint"})
    test_split: str | None = field(default="test", metadata={"help": "split measured once, at the end; null: none"})
    turns_per_item: int | None = field(
        default=None, metadata={"help": "cut training conversations into windows of this many turns; null: whole"}
    )
    context_turns: int = field(
        default=0,
        metadata={"help": "turns before a window that make the state it starts from, without gradient; 0: empty state"},
    )
    max_seconds_per_batch: float | None = field(
        default=None,
        metadata={"help": "fill batches by seconds of audio, all processes together; null: conversations_per_batch"},
    )
    noise_snr_db: list[float] | None = field(
        default=None, metadata={"help": "add white noise to training audio, [lowest, highest] ratio in dB; null: none"}
    )
    speed_factors: list[float] | None = field(
        default=None,
        metadata={"help": "play training audio faster or slower, one of these factors an item; null: as it is"},
    )
    max_seconds: float = field(default=30.0, metadata={"help": "longest utterance in seconds"})
    on_bad_audio: str = field(
        default="abort", metadata={"help": "files that cannot be used: abort before training, or skip and record them"}
    )
    cache_features: bool = field(
        default=False, metadata={"help": "compute the frames of a frozen encoder once and train from the disk"}
    )
    cache_folder: str = field(default=".cache/frames", metadata={"help": "where cached frames are kept"})

    def __post_init__(self) -> None:
        if self.on_bad_audio not in ("abort", "skip"):
            raise ValueError(f"data.on_bad_audio is {self.on_bad_audio!r}; allowed are abort and skip")


@dataclass
class TrainingSection:
    output_dir: str = field(default="outputs/run", metadata={"help": "folder for checkpoints and results"})
    epochs: float = field(default=10.0, metadata={"help": "passes over the training split"})
    mixup: float = field(
        default=0.0,
        metadata={"help": "alpha of mixup between conversations of a batch, such as 0.2; 0: none"},
    )
    gradient_accumulation: int = field(
        default=1, metadata={"help": "batches a step; the CCC is that of each batch, not of all of them together"}
    )
    conversations_per_batch: int = field(
        default=8, metadata={"help": "conversations (or windows) a process and step; of evaluation too"}
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "of pooling, updater and head"})
    encoder_learning_rate: float | None = field(default=None, metadata={"help": "of WavLM; null: the same"})
    weight_decay: float = field(default=0.01, metadata={"help": "AdamW's, on matrices only"})
    warmup_ratio: float = field(default=0.1, metadata={"help": "share of the steps with a rising learning rate"})
    scheduler: str = field(default="cosine", metadata={"help": "transformers' name of the learning rate schedule"})
    max_grad_norm: float = field(default=1.0, metadata={"help": "gradient clipping"})
    bf16: bool = field(default=False, metadata={"help": "bf16 autocast on a GPU that has it"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "less memory, a third more time"})
    patience: int | None = field(
        default=None, metadata={"help": "stop after this many evaluations without a better mean CCC; null: never"}
    )
    dataloader_workers: int = field(default=0, metadata={"help": "processes that read audio"})
    process_timeout: float = field(
        default=1800.0, metadata={"help": "seconds after which processes stop waiting for one that does not answer"}
    )
    report_to: str = field(default="none", metadata={"help": "trackers, as for transformers' TrainingArguments"})
    save_steps: int | None = field(
        default=None, metadata={"help": "evaluate and save after this many steps; null: after each epoch"}
    )
    resume: str = field(
        default="auto",
        metadata={"help": "auto: go on from the newest complete checkpoint; never: anew; or a checkpoint's folder"},
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "upload the model's folder at the end, to a private repository if it is new"}
    )
    hub_model_id: str | None = field(default=None, metadata={"help": "owner/name on the Hub"})
    seed: int = field(default=0, metadata={"help": "of weights, order and dropout"})


@dataclass
class RunConfiguration:
    model: ModelSection = field(default_factory=ModelSection)
    data: DataSection = field(default_factory=DataSection)
    training: TrainingSection = field(default_factory=TrainingSection)

    def __post_init__(self) -> None:
        starts = self.model.pretrained_model, self.model.pretrained_speech_encoder
        if all(starts) or (self.model.pretrained_model and self.model.params):
            raise ValueError(
                "model.pretrained_model brings its own sizes and encoder; leave out model.params and "
                "model.pretrained_speech_encoder"
            )
        if self.training.max_grad_norm <= 0:
            raise ValueError(
                "training.max_grad_norm must be positive: the norm is also what finds a gradient that is NaN; .inf "
                "clips nothing"
            )

        if self.data.context_turns and self.data.turns_per_item is None:
            raise ValueError("data.context_turns come before windows; set data.turns_per_item, the length of a window")
        if self.training.push_to_hub and self.training.hub_model_id is None:
            raise ValueError("training.push_to_hub needs training.hub_model_id, owner/name on the Hub")
        if self.training.mixup < 0 or self.training.gradient_accumulation < 1:
            raise ValueError("training.mixup must not be negative, and training.gradient_accumulation at least 1")

    def save(self, path: str | Path) -> None:
        """Write the resolved configuration, from which the run can be repeated."""
        Path(path).write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False), encoding="utf-8")


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe loader without aliases, by which a few lines can stand for more values than memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases are not allowed, found one in line {self.peek_event().start_mark.line + 1}")
        return super().compose_node(parent, index)


def load_run_configuration(path: str | Path, overrides: Sequence[str] = ()) -> RunConfiguration:
    """Read a YAML file and apply overrides from the command line.

    Args:
        path: the file, under 1 MB; read with YAML's safe loader, which builds plain values only, and without aliases.
        overrides: `section.field=value`, e.g. `training.learning_rate=1e-5`; dots go on into `model.params`.

    Raises:
        ValueError: an unknown key (named with the nearest known one), a value of the wrong type, a malformed override.
    """
    path = Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES} bytes; that is no run configuration")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_PlainLoader) or {}
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no plain YAML: {error}") from error
    for override in overrides:
        name, separator, value = override.partition("=")
        if not separator or not name:
            raise ValueError(f"{override!r} is no override; write section.field=value")
        _set(content, name.split("."), _scalar(value))
    return _build(RunConfiguration, content, "")


def _scalar(text: str) -> Any:
    value = yaml.safe_load(text)
    if isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-5, without a dot, as text
        except ValueError:
            return value
    return value


def _set(content: dict[str, Any], names: list[str], value: Any) -> None:
    for name in names[:-1]:
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise ValueError(f"{'.'.join(names)} goes into {name}, which is a value, not a section")
    content[names[-1]] = value


def _build(section: type, content: Any, prefix: str) -> Any:
    if not isinstance(content, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the configuration'} must be a section, got {reprlib.repr(content)}")
    kinds = typing.get_type_hints(section)
    values = {}
    for name, value in content.items():
        if name not in kinds:
            close = difflib.get_close_matches(str(name), kinds, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"known are {', '.join(kinds)}"
            raise ValueError(f"unknown key {prefix}{name}; {hint}")
        if dataclasses.is_dataclass(kinds[name]):
            values[name] = _build(typing.cast(type, kinds[name]), value, f"{prefix}{name}.")
        else:
            values[name] = _checked(value, kinds[name], f"{prefix}{name}")
    return section(**values)


def _checked(value: Any, kind: Any, name: str) -> Any:
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    allowed = tuple(typing.get_origin(option) or option for option in allowed)
    if isinstance(value, str) and float in allowed:
        value = _scalar(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in allowed and int not in allowed:
        value = float(value)
    if (isinstance(value, bool) and bool not in allowed) or not isinstance(value, allowed):
        names = " or ".join("null" if option is type(None) else option.__name__ for option in allowed)
        raise ValueError(f"{name} is {reprlib.repr(value)}, but must be {names}")
    return value
