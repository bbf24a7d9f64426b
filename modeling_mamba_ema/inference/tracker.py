"""Emotion over a live conversation: one turn in, named values out, and a state of constant size between the turns."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..audio_files import read_audio
from ..conversation_encoder import UNKNOWN_SPEAKER, ConversationState
from ..data.atomic_write import atomic_write
from ..feature_extraction_mamba_ema import MambaEMAFeatureExtractor
from ..modeling_mamba_ema import MambaEMAForRegression
from ..publishing.checksums import weights_sha256
from ..speech_encoder import num_frames
from .loading import load_model
from .reading import TREND_TURNS, read_turn

STATE_FORMAT = "mamba-ema conversation state 2"
BASELINE_TURNS = 20  # that the slow average of a speaker's values goes back, about
_OF_INTERVALS = ("low", "high", "confidence")
_TURNS = "tracker.num_turns"


@dataclass(frozen=True)
class Speaker:
    """What a tracker keeps of a speaker whose name is known.

    Attributes:
        row: of their state in the conversation's.
        num_turns: that the baseline is of; near silence does not count.
        baseline: label -> average of the values of these turns: their mean, and after 20 of them the exponential moving
            average with a weight of 1/20. Empty before the first.
        recent: values of the last eight of these turns.
    """

    row: int
    num_turns: int = 0
    baseline: dict[str, float] = field(default_factory=dict)
    recent: list[dict[str, float]] = field(default_factory=list)

    def hear(self, values: dict[str, float]) -> Speaker:
        """The speaker after a turn with these values."""
        weight = 1 / min(self.num_turns + 1, BASELINE_TURNS)
        before = self.baseline or values
        baseline = {label: before[label] + weight * (value - before[label]) for label, value in values.items()}
        return Speaker(self.row, self.num_turns + 1, baseline, [*self.recent, values][-TREND_TURNS:])


@dataclass(frozen=True)
class TurnEmotion:
    """What the model heard in one turn.

    Attributes:
        turn: number of the turn in its conversation, from 1.
        speaker: as it was given, or None.
        values: label -> value on the unit scale, 0 to 1.
        label_values: label -> value on the label's own scale (`config.label_ranges`).
        differences: label -> value minus the speaker's baseline before this turn, the slow average of their own turns
            (see [`Speaker`]), so that a voice that is always loud does not read as excited; None for a speaker's first
            turn and for turns without a name.
        baseline_turns: turns behind that baseline.
        intervals: label -> lower and upper end of the interval that holds `config.interval_level` of all turns, on the
            unit scale; None for a model whose errors were not measured.
        spread: label -> predicted standard deviation of raters on the unit scale; None for a model that predicts none.
        label_spread: label -> the same on the label's own scale; None likewise.
        confidence: label -> level at which the value is on one side of 0.5, see `MambaEMAConfig.confidence`; None
            likewise.
        reading: in words what can be said of the turn, see `reading.py`; empty where nothing can.
        attention: (heads, frames) float32, 50 frames a second, each head sums to 1; uniform for poolings without
            attention.
        seconds: length of the turn.
        low_level: True below -70 dBFS RMS, where the values say nothing about a voice.
    """

    turn: int
    speaker: str | None
    values: dict[str, float]
    label_values: dict[str, float]
    differences: dict[str, float] | None
    baseline_turns: int
    intervals: dict[str, tuple[float, float]] | None
    confidence: dict[str, float] | None
    spread: dict[str, float] | None
    label_spread: dict[str, float] | None
    reading: str
    attention: np.ndarray
    seconds: float
    low_level: bool

    def only(self, labels: Sequence[str]) -> TurnEmotion:
        """The same with these labels alone; if some are left out, the reading says nothing of them, nor of trends."""
        if set(labels) == set(self.values):
            return self
        names = ("values", "label_values", "differences", "intervals", "confidence", "spread", "label_spread")
        kept: dict[str, Any] = {
            name: None if of_labels is None else {label: of_labels[label] for label in labels if label in of_labels}
            for name, of_labels in ((name, getattr(self, name)) for name in names)
        }
        reading = read_turn(kept["values"], kept["intervals"]) if self.reading else ""
        return replace(self, **kept, reading=reading)

    def without_attention(self) -> TurnEmotion:
        """The same, small enough to keep for every turn of a long call."""
        return replace(self, attention=np.empty((0, 0), dtype=np.float32))

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json.dumps` takes, without the attention."""
        return {name: value for name, value in vars(self).items() if name != "attention"}


class EmotionTracker:
    """Follows one conversation, turn by turn, with the numbers that the whole conversation at once would give.

    A model whose `config.context_scope` is "speaker" or "both" has a state for each speaker, which belongs to the name
    that `update` is given. A tracker knows at most `config.max_speakers` names. When one more speaks, the one who has
    been silent longest is forgotten, and begins anew should they speak again. Turns without a name share a state.
    Beside each value stands its difference to the speaker's own baseline; the model does not read it.

    Time and memory of a turn do not depend on how many turns went before. Any number of trackers may share a model:
    the model keeps nothing of a conversation. One tracker must not be updated from two threads at once.

    Args:
        model: in evaluation mode, on any device.
        feature_extractor: of the model.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_mamba_ema import MambaEMAConfig, MambaEMAFeatureExtractor, MambaEMAForRegression
    >>> tiny = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
    ...             conv_dim=[16] * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2)
    >>> model = MambaEMAForRegression(MambaEMAConfig(speech_encoder_config=tiny, hidden_size=32, head_dim=16)).eval()
    >>> tracker = EmotionTracker(model, MambaEMAFeatureExtractor())
    >>> turn = tracker.update(np.random.default_rng(0).normal(0, 0.1, 16_000), sampling_rate=16_000, speaker="anna")
    >>> turn.turn, turn.speaker, sorted(turn.values), turn.attention.shape
    (1, 'anna', ['arousal', 'valence'], (1, 49))

    ```
    """

    def __init__(self, model: MambaEMAForRegression, feature_extractor: MambaEMAFeatureExtractor):
        self.model = model
        self.feature_extractor = feature_extractor
        self.reset()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        revision: str = "main",
        device: str | torch.device = "cpu",
        int8: bool = False,
    ) -> EmotionTracker:
        """A tracker over a saved model. The code is this package's; none is loaded from the model's folder.

        Args:
            pretrained_model_name_or_path: a folder or a Hub name.
            revision: commit, tag or branch on the Hub.
            device: where the model runs.
            int8: the speech encoder in 8 bits, on a CPU; see `MambaEMAForRegression.quantize_speech_encoder`.

        Raises:
            OSError: there is no such model, or its weights are damaged.
            ValueError: it is another kind of model, it lacks weights, which would leave random numbers in their
                places, or the device cannot be used.
        """
        model, extractor = load_model(pretrained_model_name_or_path, revision, device)
        return cls(model.quantize_speech_encoder() if int8 else model, extractor)

    @property
    def labels(self) -> list[str]:
        """Names of the values, in the order of the model's outputs."""
        return self.model.config.labels

    @property
    def labels_with_own_scale(self) -> list[str]:
        """Those whose scale is not the unit scale, so that `label_values` says something beside `values`."""
        return [label for label in self.labels if self.model.config.label_range(label) != (0.0, 1.0)]

    @property
    def columns(self) -> list[str]:
        """Of a row in a file, see `row`."""
        return [
            *self.labels,
            *(f"{label}_value" for label in self.labels_with_own_scale),
            *(f"{label}_difference" for label in self.labels),
            "baseline_turns",
            *(f"{label}_{name}" for label in self.labels for name in _OF_INTERVALS if self._has_intervals),
            *(f"{label}_spread" for label in self.labels if self.model.config.predict_spread),
            *(f"{label}_value_spread" for label in self.labels_with_own_scale if self.model.config.predict_spread),
            *("low_level", "reading"),
        ]

    @property
    def _has_intervals(self) -> bool:
        return self.model.config.interval_radii is not None

    def row(self, heard: TurnEmotion | None) -> dict[str, Any]:
        """A turn as a row of a file, rounded to 4 digits: `valence` on the unit scale, `valence_value` on the label's
        own scale where that is another, `valence_difference` to the speaker's baseline; `valence_low`, `valence_high`
        and `valence_confidence` of a model with intervals; `valence_spread` and, on the label's own scale,
        `valence_value_spread` of one that predicts the raters' spread. None for a turn too short to answer for."""
        if heard is None:
            return {**dict.fromkeys(self.columns), "low_level": False, "reading": ""}
        values = {
            **heard.values,
            **{f"{label}_value": value for label, value in heard.label_values.items()},
            **{f"{label}_difference": value for label, value in (heard.differences or {}).items()},
            **{f"{label}_low": ends[0] for label, ends in (heard.intervals or {}).items()},
            **{f"{label}_high": ends[1] for label, ends in (heard.intervals or {}).items()},
            **{f"{label}_confidence": value for label, value in (heard.confidence or {}).items()},
            **{f"{label}_spread": value for label, value in (heard.spread or {}).items()},
            **{f"{label}_value_spread": value for label, value in (heard.label_spread or {}).items()},
        }
        rounded = {name: round(value, 4) for name, value in values.items()}
        others = {"baseline_turns": heard.baseline_turns, "low_level": heard.low_level, "reading": heard.reading}
        return {name: {**rounded, **others}.get(name) for name in self.columns}

    def update(
        self, audio: Any, sampling_rate: int | None = None, speaker: str | None = None, channel: int | None = None
    ) -> TurnEmotion:
        """Hear the next turn of the conversation.

        Args:
            audio: mono waveform, (samples,) floats within [-1, 1] or integers, 25 ms to 30 s long; or the path, the
                bytes or a binary file object of an audio file (formats other than PCM WAV need `soundfile`); or an
                audio decoder of `datasets`. URLs are refused.
            sampling_rate: of a waveform, in Hz, always needed for one; other rates than 16 kHz are resampled (needs
                `soxr`). A file brings its own.
            speaker: a name, which means the state and the baseline; None or blank for unknown.
            channel: of a file with several, counted from 1; None for their average.

        Raises:
            InvalidAudioError, TypeError, ValueError: audio that cannot be used, or a model in training mode. The state
                is then as it was: the turn can be left out or given again.
        """
        return _update([self], [self._read(audio, sampling_rate, channel)], [speaker])[0]

    @staticmethod
    def update_batch(
        turns: Sequence[tuple[EmotionTracker, Any, str | None]],
        sampling_rate: int | None = None,
        channel: int | None = None,
    ) -> list[TurnEmotion]:
        """Hear the next turn of several conversations in one pass of the model.

        Each conversation gets the numbers that `update` would have given it alone, within 2e-5.

        Args:
            turns: (tracker, audio, speaker) for each conversation; all trackers share one model, none comes twice.
            sampling_rate, channel: of all waveforms, of all files, as for `update`.

        Raises:
            ValueError: no turns, a tracker twice, or trackers of different models.
            InvalidAudioError, TypeError: as `update`, naming a waveform by its place, from 0; then no conversation has
                advanced.
        """
        if not turns:
            raise ValueError("update_batch got no turns; give at least one (tracker, audio, speaker)")
        trackers = [tracker for tracker, _, _ in turns]
        if len({id(tracker) for tracker in trackers}) < len(trackers):
            raise ValueError("a tracker comes twice in the batch; the turns of one conversation follow each other")
        if any(tracker.model is not trackers[0].model for tracker in trackers):
            raise ValueError("the trackers of a batch must share one model object")
        read = [tracker._read(audio, sampling_rate, channel) for tracker, audio, _ in turns]
        return _update(trackers, read, [speaker for _, _, speaker in turns])

    def reset(self) -> None:
        """Begin a new conversation."""
        self._state: ConversationState | None = None
        self.num_turns = 0  # heard so far
        self._speakers: dict[str, Speaker] = {}  # by name; the one silent longest comes first

    def copy(self) -> EmotionTracker:
        """A tracker at the same point of the conversation that goes its own way from here; the model is shared."""
        other = copy.copy(self)
        other._state = None if self._state is None else self._state.copy()
        return other

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of every weight after the speech encoder, which two trained models do not share; computed once."""
        weights = self.model.state_dict().items()
        return weights_sha256(item for item in weights if ".speech_encoder." not in item[0])

    def save(self, path: str | Path) -> None:
        """Write where the conversation stands, as `state_bytes` gives it, to a small file, in one piece."""
        atomic_write(path, self.state_bytes())

    def restore(self, path: str | Path) -> None:
        """Continue the conversation that `save` wrote; what this tracker had heard is forgotten. Raises `ValueError`
        where the file is no state, is damaged, or was written with another model; nothing has changed then."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path.name} does not exist (looked in {path.parent})")
        self.restore_bytes(path.read_bytes(), path.name)

    def state_bytes(self) -> bytes:
        """Where the conversation stands: safetensors with JSON metadata, no pickle, of the model with this digest."""
        state = {} if self._state is None else self._state.state_dict()
        tensors = {name: tensor.cpu() for name, tensor in state.items()}
        tensors[_TURNS] = torch.tensor(self.num_turns)
        about = {
            "format": STATE_FORMAT,
            "labels": self.labels,
            "speakers": {name: asdict(speaker) for name, speaker in self._speakers.items()},
            "weights_sha256": self.weights_sha256,
        }
        return save(tensors, metadata={"mamba_ema": json.dumps(about)})

    def restore_bytes(self, content: bytes, name: str = "the state") -> None:
        """As `restore`, from what `state_bytes` gave; `name` is for messages."""
        try:
            tensors = load(content)
            (header,) = struct.unpack_from("<Q", content)  # https://huggingface.co/docs/safetensors: format
            about = json.loads(json.loads(content[8 : 8 + header]).get("__metadata__", {}).get("mamba_ema", "null"))
        except (SafetensorError, json.JSONDecodeError) as error:
            raise ValueError(f"{name} is no conversation state, or is damaged: {error}") from error
        if not isinstance(about, dict) or about.get("format") != STATE_FORMAT or _TURNS not in tensors:
            raise ValueError(f"{name} is no conversation state; give one that EmotionTracker wrote")
        if about.get("weights_sha256") != self.weights_sha256:
            raise ValueError(
                f"{name} was written with another model (its labels: {about.get('labels')}); a state is valid for "
                "the weights that made it: load the model it was saved with"
            )
        num_turns = int(tensors.pop(_TURNS))
        if any(not torch.isfinite(tensor).all() for tensor in tensors.values()):
            raise ValueError(f"{name} holds values that are not finite; it is damaged")
        try:
            speakers = {speaker: Speaker(**known) for speaker, known in about["speakers"].items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} has no list of speakers; it is damaged") from error
        state = ConversationState.from_state_dict(tensors).to(self.model.device) if tensors else None
        self._state, self.num_turns, self._speakers = state, num_turns, speakers

    def _read(self, audio: Any, sampling_rate: Any, channel: int | None) -> tuple[Any, int | None]:
        """A waveform and its rate in Hz, from audio as `update` takes it."""
        extractor = self.feature_extractor
        waveform, rate = read_audio(audio, sampling_rate, channel, extractor.max_seconds)
        return waveform, None if rate is None else extractor.checked_rate(rate, resample=True)


@torch.inference_mode()
def _update(
    trackers: Sequence[EmotionTracker], audio: Sequence[tuple[Any, int | None]], speakers: Sequence[str | None]
) -> list[TurnEmotion]:
    """One turn, a waveform and its rate, for each tracker; states are replaced last, when nothing can fail any more."""
    model, extractor = trackers[0].model, trackers[0].feature_extractor
    if model.training:
        raise ValueError("the model is in training mode, where dropout changes the numbers; call model.eval() first")
    for speaker in speakers:
        if speaker is not None and not isinstance(speaker, str):
            raise TypeError(f"speaker is {type(speaker).__name__}; a name or None is needed")
    rates = list({rate: None for _, rate in audio})
    if len(rates) > 1 and None not in rates:
        raise ValueError(f"a batch mixes waveforms of {rates[0]} Hz and of {rates[1]} Hz; resample them first")
    features = extractor(
        [waveform for waveform, _ in audio],
        sampling_rate=None if None in rates else rates[0],
        resample=True,
        return_low_level=True,
        return_tensors="pt",
    )
    low_level = features.pop("low_level").tolist()
    names = [(speaker or "").strip() for speaker in speakers]
    known, states = [], []  # after this turn began: the speakers, and the states with a new speaker's row empty
    for tracker, name in zip(trackers, names):
        among, leaves = with_speaker(tracker._speakers, name, model.config.max_speakers)
        known.append(among)
        state = tracker._state if tracker.num_turns else model.mamba_ema.initial_state(1)
        if state is not None:  # the model keeps context
            states.append(state.forget_speaker(among[name].row) if leaves else state)
    rows = [among[name].row if name else UNKNOWN_SPEAKER for among, name in zip(known, names)]
    outputs = model(
        **features.to(model.device),
        speaker_ids=torch.tensor(rows, device=model.device),
        conversation_state=ConversationState.stack(states) if states else None,
        use_conversation_state=True,
    )
    values = outputs.logits.cpu()  # (batch, num_labels)
    spread = None if outputs.spread is None else outputs.spread.cpu()  # (batch, num_labels)
    if not torch.isfinite(values).all():
        raise ValueError("the model gave numbers that are not finite; its weights are damaged")
    label_values = model.to_label_ranges(values)
    intervals = model.intervals(values, spread)  # (batch, num_labels, 2)
    samples = features["attention_mask"].sum(dim=-1)  # (batch,)
    frames = num_frames(samples, model.config.speech_encoder_config).tolist()
    attention = outputs.pooling_attentions.float().cpu()  # (batch, heads, frames)

    results = []
    for row, tracker in enumerate(trackers):
        state = outputs.conversation_state
        tracker._state = None if state is None else state.select(row)
        tracker.num_turns += 1
        own = dict(zip(tracker.labels, values[row].tolist()))
        before = known[row].get(names[row], Speaker(UNKNOWN_SPEAKER))
        if names[row] and not low_level[row]:
            known[row][names[row]] = before.hear(own)
        tracker._speakers = known[row]
        ends, confidence, spreads, label_spreads = None, None, None, None
        if spread is not None:
            spreads = dict(zip(own, spread[row].tolist()))
            label_spreads = dict(zip(own, model.to_label_ranges(spread[row], differences=True).tolist()))
        if intervals is not None:
            confidence = {
                label: model.config.confidence(label, value, (spreads or {}).get(label)) for label, value in own.items()
            }
            ends = {label: (low, high) for label, (low, high) in zip(own, intervals[row].tolist())}
        recent = known[row][names[row]].recent if names[row] else ()
        results.append(
            TurnEmotion(
                turn=tracker.num_turns,
                speaker=speakers[row],
                values=own,
                label_values=dict(zip(tracker.labels, label_values[row].tolist())),
                differences={label: own[label] - value for label, value in before.baseline.items()} or None,
                baseline_turns=before.num_turns,
                intervals=ends,
                confidence=confidence,
                spread=spreads,
                label_spread=label_spreads,
                reading="" if low_level[row] else read_turn(own, ends, recent),
                attention=attention[row, :, : frames[row]].numpy(),
                seconds=int(samples[row]) / extractor.sampling_rate,
                low_level=low_level[row],
            )
        )
    return results


def with_speaker(speakers: dict[str, Speaker], name: str, max_speakers: int) -> tuple[dict[str, Speaker], bool]:
    """The speakers, the one silent longest first, with the one of this name, who speaks now, last; and whether they
    have the row of another, who is forgotten because there are `max_speakers`. A blank name is of somebody unknown."""
    leaves = bool(name) and name not in speakers and len(speakers) == max_speakers
    leaving = next(iter(speakers)) if leaves else name
    others = {other: speaker for other, speaker in speakers.items() if other != leaving}
    if not name:
        return others, False
    row = speakers[leaving].row if leaves else len(speakers)
    return {**others, name: speakers.get(name, Speaker(row))}, leaves
