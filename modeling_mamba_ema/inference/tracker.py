"""Emotion over a live conversation: one turn in, named values out, and a state of constant size between the turns."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ..audio_files import decoded_audio, is_audio_decoder, is_audio_file, load_audio
from ..conversation_encoder import ConversationState
from ..data.atomic_write import atomic_write
from ..feature_extraction_mamba_ema import SAMPLING_RATE, MambaEMAFeatureExtractor
from ..modeling_mamba_ema import MambaEMAForRegression
from ..publishing.checksums import weights_sha256
from ..speech_encoder import num_frames
from .loading import load_model

STATE_FORMAT = "mamba-ema conversation state 1"
_TURNS = "tracker.num_turns"


@dataclass(frozen=True)
class TurnEmotion:
    """What the model heard in one turn.

    Attributes:
        turn: number of the turn in its conversation, from 1.
        speaker: as it was given, or None.
        values: label -> value on the unit scale, 0 to 1.
        label_values: label -> value on the label's own scale (`config.label_ranges`).
        attention: (heads, frames) float32, 50 frames a second, each head sums to 1; uniform for poolings without
            attention.
        seconds: length of the turn.
        low_level: True below -70 dBFS RMS, where the values say nothing about a voice.
    """

    turn: int
    speaker: str | None
    values: dict[str, float]
    label_values: dict[str, float]
    attention: np.ndarray
    seconds: float
    low_level: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain values that `json.dumps` takes; attention as nested lists."""
        return {
            "turn": self.turn,
            "speaker": self.speaker,
            "values": dict(self.values),
            "label_values": dict(self.label_values),
            "attention": self.attention.tolist(),
            "seconds": self.seconds,
            "low_level": self.low_level,
        }


class EmotionTracker:
    """Follows one conversation, turn by turn, with the numbers that the whole conversation at once would give.

    The state is that of the conversation, not of a speaker: every turn continues it, whoever speaks, because the model
    was trained on turns in the order in which they were spoken. `speaker` is recorded with the result and changes no
    number. To follow each speaker alone, use one tracker a speaker.

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
        self._state: ConversationState | None = None
        self._num_turns = 0

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, revision: str = "main", device: str | torch.device = "cpu"
    ) -> EmotionTracker:
        """A tracker over a saved model. The code is this package's; none is loaded from the model's folder.

        Args:
            pretrained_model_name_or_path: a folder or a Hub name.
            revision: commit, tag or branch on the Hub.
            device: where the model runs.

        Raises:
            OSError: there is no such model, or its weights are damaged.
            ValueError: it is another kind of model, it lacks weights, which would leave random numbers in their
                places, or the device cannot be used.
        """
        return cls(*load_model(pretrained_model_name_or_path, revision, device))

    @property
    def labels(self) -> list[str]:
        """Names of the values, in the order of the model's outputs."""
        return self.model.config.labels

    @property
    def labels_with_own_scale(self) -> list[str]:
        """Those whose scale is not the unit scale, so that `label_values` says something beside `values`."""
        return [label for label in self.labels if self.model.config.label_range(label) != (0.0, 1.0)]

    @property
    def num_turns(self) -> int:
        """Turns heard so far."""
        return self._num_turns

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
            speaker: recorded with the result.
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
            sampling_rate: of waveforms, in Hz; always needed for them.
            channel: of files with several, as for `update`.

        Returns:
            One result a conversation, in the order given.

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
        self._state, self._num_turns = None, 0

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
        with atomic_write(path) as unfinished:
            unfinished.write_bytes(self.state_bytes())

    def restore(self, path: str | Path) -> None:
        """Continue the conversation that `save` wrote; what this tracker had heard is forgotten.

        Raises:
            ValueError: the file is no state, is damaged, or was written with another model; nothing has changed then.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{path.name} does not exist (looked in {path.parent})")
        self.restore_bytes(path.read_bytes(), path.name)

    def state_bytes(self) -> bytes:
        """Where the conversation stands: safetensors with JSON metadata, no pickle, of the model with this digest."""
        state = {} if self._state is None else self._state.state_dict()
        tensors = {name: tensor.cpu() for name, tensor in state.items()}
        tensors[_TURNS] = torch.tensor(self._num_turns)
        about = {"format": STATE_FORMAT, "labels": self.labels, "weights_sha256": self.weights_sha256}
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
        state = ConversationState.from_state_dict(tensors).to(self.model.device) if tensors else None
        self._state, self._num_turns = state, num_turns

    def _read(self, audio: Any, sampling_rate: Any, channel: int | None) -> tuple[Any, int | None]:
        """A waveform and its rate in Hz, from audio as `update` takes it."""
        extractor = self.feature_extractor
        if is_audio_file(audio):
            return load_audio(audio, channel=channel, max_seconds=extractor.max_seconds), SAMPLING_RATE
        if is_audio_decoder(audio):
            return decoded_audio(audio, channel, extractor.max_seconds)
        if channel is not None:
            raise ValueError("channel chooses a channel of a file; choose that of an array yourself: waveform[:, 0]")
        return audio, None if sampling_rate is None else extractor.checked_rate(sampling_rate, resample=True)


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
    outputs = model(
        **features.to(model.device),
        conversation_state=_stack_states(trackers),
        use_conversation_state=True,
    )
    values = outputs.logits.cpu()  # (batch, num_labels)
    if not torch.isfinite(values).all():
        raise ValueError("the model gave numbers that are not finite; its weights are damaged")
    label_values = model.to_label_ranges(values)
    samples = features["attention_mask"].sum(dim=-1)  # (batch,)
    frames = num_frames(samples, model.config.speech_encoder_config).tolist()
    attention = outputs.pooling_attentions.float().cpu()  # (batch, heads, frames)

    results = []
    for row, tracker in enumerate(trackers):
        state = outputs.conversation_state
        tracker._state = None if state is None else state.select(row)
        tracker._num_turns += 1
        results.append(
            TurnEmotion(
                turn=tracker._num_turns,
                speaker=speakers[row],
                values=dict(zip(tracker.labels, values[row].tolist())),
                label_values=dict(zip(tracker.labels, label_values[row].tolist())),
                attention=attention[row, :, : frames[row]].numpy(),
                seconds=int(samples[row]) / extractor.sampling_rate,
                low_level=low_level[row],
            )
        )
    return results


def _stack_states(trackers: Sequence[EmotionTracker]) -> ConversationState | None:
    """The states of the trackers as one batch; those that have heard nothing begin with the model's first state."""
    states = [tracker._state for tracker in trackers]
    encoder = trackers[0].model.mamba_ema.conversation_encoder
    if encoder is None or all(state is None for state in states):
        return None
    model = trackers[0].model
    return ConversationState.stack(
        [encoder.initial_state(1, model.device, model.dtype) if state is None else state for state in states]
    )


__all__ = ["EmotionTracker", "TurnEmotion"]
