"""`pipeline("audio-classification", ...)` for Mamba-EMA: named values of one utterance, from audio as people have it.

Transformers' own audio-classification pipeline needs ffmpeg for files and torchaudio for other sampling rates, fetches
every string that looks like a URL and opens every other one as a file. This one does none of that.
"""

import itertools
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import Pipeline

from .audio_files import MAX_SECONDS, MIN_SECONDS, Recording, is_audio_file, read_audio
from .conversation_encoder import UNKNOWN_SPEAKER, number_speakers
from .feature_extraction_mamba_ema import SAMPLING_RATE, InvalidAudioError, as_mono

if TYPE_CHECKING:
    # For a model in a local folder, transformers before 5.9 copies only the files that an entry file itself names.
    from .audio_containers import Part  # noqa: F401
    from .mamba2 import Mamba2  # noqa: F401
    from .pooling import Pooling  # noqa: F401

# What config.json says, so that transformers finds the class beside the weights.
CUSTOM_PIPELINES = {
    "audio-classification": {
        "impl": "pipeline_mamba_ema.MambaEMAPipeline",
        "pt": ["AutoModelForAudioClassification"],
    }
}


class MambaEMAPipeline(Pipeline):
    """Valence, arousal and the model's other labels for utterances, highest first.

    Takes a waveform ((samples,) array or tensor at the model's rate, or at `sampling_rate`); a dict with `"array"` or
    `"raw"` and `"sampling_rate"`; audio of `datasets`, decoded or undecoded (a dict with `"bytes"`); the bytes or a
    binary file object of an audio file; with `allow_paths=True` the path of a local file, or a dict with `"path"`.
    Lists, tuples and `datasets` columns of these give a list, generators give an iterator. Each utterance is answered
    for alone, without context, unless `speakers`, `chunk_length_s` or `split_channels` makes it a conversation.

    Files are read by `soundfile` where it is installed (WAV, FLAC, OGG, MP3), else PCM WAV only. Rates other than the
    model's are resampled by `soxr`. No URL is ever opened.

    Call arguments, which may also be given to `pipeline(...)`:
        speakers: the inputs are the turns of one conversation, in their order; a name a turn, None where unknown.
        top_k: the highest values only; None for all.
        return_label_values: add `"value"`, on the label's own scale (`config.label_ranges`).
        return_intervals: add `"interval"`, lower and upper end on the unit scale (`outputs.intervals`), and
            `"confidence"` (`config.confidence`), of a model with intervals.
        return_spread: add `"spread"`, the predicted standard deviation of raters on the unit scale (`outputs.spread`),
            and with return_label_values `"value_spread"`, of a model that predicts it.
        sampling_rate: of bare waveforms, in Hz.
        channel: of files with several, counted from 1; None for their average.
        chunk_length_s: seconds, from 1 to the longest utterance; longer audio is cut into chunks of this length, which
            are the turns of one conversation: the state is carried from each to the next, as `mamba-ema timeline` does.
        split_channels: the channels of a file are the speakers of one conversation; each is a turn, or with
            `chunk_length_s` each chunk of each, in the order of time.
        allow_paths: take strings, paths and `{"path": ...}` as local files. Leave it off where strings come from users.
        batch_size: utterances in one pass of the model; changes no value beyond 2e-5.

    Returns:
        For each utterance `[{"label": "arousal", "score": 0.61}, {"label": "valence", "score": 0.43}]`, the score on
        the unit scale: a regression, so scores do not sum to 1. With `chunk_length_s` or `split_channels`, for each of
        its turns a dict with `"timestamp"` (start and end in seconds), `"channel"` (None for the average or a
        waveform) and such a list as `"scores"`. With `speakers`, for each turn a dict with `"speaker"` and `"scores"`.

    Raises:
        InvalidAudioError, TypeError, ValueError: an input that cannot be used; the message says why and what can.
        ImportError: `soxr` or `soundfile` is needed and not installed.
    """

    model: Any
    _load_processor: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = True
    _load_tokenizer: Any = False

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # `pipeline(...)` puts classes into the configuration it was given, which then could not be written as JSON.
        self.model.config.custom_pipelines = {task: dict(info) for task, info in CUSTOM_PIPELINES.items()}

    def __call__(self, inputs: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        given = {**self._preprocess_params, **kwargs}
        if given.get("chunk_length_s") or given.get("split_channels"):
            # Their turns are read one after the other, while the model runs.
            kwargs = {**kwargs, "batch_size": 1, "num_workers": 0}
        if kwargs.get("speakers") is not None:
            self._check_speakers(inputs, kwargs["speakers"])
            return super().__call__({"turns": inputs}, **kwargs)
        if isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes, bytearray)):
            if len(inputs) == 0:
                return []
            # Through a generator, so that a column of a dataset is read row by row.
            return list(super().__call__((item for item in inputs), **kwargs))
        return super().__call__(inputs, **kwargs)

    def _check_speakers(self, turns: Any, speakers: Sequence[str | None]) -> None:
        if isinstance(speakers, str):
            raise ValueError(f"speakers is {speakers!r}; a list of names, one a turn, is needed")
        if not isinstance(turns, (list, tuple)) or len(turns) != len(speakers):
            count = len(turns) if isinstance(turns, (list, tuple)) else type(turns).__name__
            raise ValueError(f"speakers has {len(speakers)} names; a list of as many turns is needed, not {count}")
        count, most = max(number_speakers(speakers), default=UNKNOWN_SPEAKER) + 1, self.model.config.max_speakers
        if count > most and "speaker" in self.model.mamba_ema.contexts:
            raise ValueError(f"the conversation has {count} speakers; the model keeps a context for {most}")

    def _sanitize_parameters(  # type: ignore[override]
        self,
        top_k: int | None = None,
        return_label_values: bool | None = None,
        return_intervals: bool | None = None,
        return_spread: bool | None = None,
        function_to_apply: str | None = None,
        speakers: Sequence[str | None] | None = None,
        sampling_rate: int | None = None,
        channel: int | None = None,
        allow_paths: bool | None = None,
        chunk_length_s: float | None = None,
        split_channels: bool | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if function_to_apply not in (None, "none"):
            raise ValueError(
                f"function_to_apply is {function_to_apply!r}, but the values are a regression; only 'none' is allowed"
            )
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k is {top_k!r}; a whole number from 1, or None for all labels, is needed")
        longest = getattr(self.feature_extractor, "max_seconds", 0.0)
        is_number = isinstance(chunk_length_s, (int, float)) and not isinstance(chunk_length_s, bool)
        if chunk_length_s and not (is_number and 1 <= chunk_length_s <= longest):
            raise ValueError(f"chunk_length_s is {chunk_length_s!r}; allowed are 1 to {longest:g} s")
        if split_channels and channel is not None:
            raise ValueError("channel takes one channel, split_channels takes all; give one of them")
        if speakers is not None and (chunk_length_s or split_channels):
            raise ValueError("speakers name turns that are given; chunk_length_s and split_channels make them")
        if return_intervals and self.model.config.interval_radii is None:
            raise ValueError("the model has no intervals (interval_radii in its config.json); see docs/confidence.md")
        if return_spread and not self.model.config.predict_spread:
            raise ValueError("the model predicts no spread of its raters (predict_spread); see docs/confidence.md")
        preprocess: dict[str, Any] = {"speakers": speakers, "sampling_rate": sampling_rate, "channel": channel}
        preprocess |= {"allow_paths": allow_paths, "chunk_length_s": chunk_length_s, "split_channels": split_channels}
        postprocess = {"top_k": top_k, "return_label_values": return_label_values}
        postprocess |= {"return_intervals": return_intervals, "return_spread": return_spread}
        before, after = (
            {name: value for name, value in given.items() if value is not None} for given in (preprocess, postprocess)
        )
        return before, {}, after

    def preprocess(  # type: ignore[override]
        self,
        input_: Any,
        speakers: Sequence[str | None] | None = None,
        sampling_rate: int | None = None,
        channel: int | None = None,
        allow_paths: bool = False,
        chunk_length_s: float | None = None,
        split_channels: bool = False,
    ) -> dict[str, Any]:
        extractor: Any = self.feature_extractor
        if speakers is not None:
            return {"turns": self._spoken(input_["turns"], speakers, sampling_rate, channel, allow_paths)}
        source, rate = _unpacked(input_, sampling_rate, allow_paths)
        if chunk_length_s or split_channels:
            return {"turns": self._turns(source, rate, channel, chunk_length_s, split_channels)}
        waveform, rate = read_audio(source, rate, channel, extractor.max_seconds)
        rate = extractor.sampling_rate if rate is None else rate
        return dict(extractor(waveform, sampling_rate=rate, resample=True, return_tensors="pt"))

    def _spoken(self, turns: Any, speakers: Any, *how: Any) -> Iterator[tuple[dict[str, Any], int, Any]]:
        """What is said of each turn, the speaker's id, and features, as it is asked for."""
        for number, (turn, name, speaker) in enumerate(zip(turns, speakers, number_speakers(speakers))):
            try:
                yield {"speaker": name}, speaker, self.preprocess(turn, None, *how)
            except InvalidAudioError as error:
                raise InvalidAudioError(f"turn {number}: {error}") from error

    def _turns(
        self, source: Any, rate: Any, channel: int | None, chunk_length_s: float | None, split_channels: bool
    ) -> Iterator[tuple[dict[str, Any], int, Any]]:
        """As `_spoken`, of chunks or channels."""
        if not is_audio_file(source):
            if split_channels:
                raise ValueError("split_channels is for files; give the audio of a dataset as Audio(decode=False) does")
            extractor: Any = self.feature_extractor
            waveform, rate = read_audio(source, rate, channel, MAX_SECONDS)
            rate = extractor.checked_rate(extractor.sampling_rate if rate is None else rate, resample=True)
            samples = as_mono(waveform, "the audio")
            for first, last in _chunks(len(samples), rate, chunk_length_s):
                place: dict[str, Any] = {"timestamp": (first / rate, last / rate), "channel": None}
                yield place, UNKNOWN_SPEAKER, self._features(samples[first:last], rate, first / rate)
            return
        with Recording(source, channel) as recording:
            rate = recording.sampling_rate
            channels = recording.several_channels() if split_channels else [channel]
            for first, last in _chunks(recording.frames, rate, chunk_length_s):
                start, end = first / rate, last / rate
                recording.check_length(start, end, cast(Any, self.feature_extractor).max_seconds)
                for chosen in channels:
                    waveform = recording.read(start, end, chosen)
                    speaker = chosen - 1 if split_channels and chosen else UNKNOWN_SPEAKER
                    place = {"timestamp": (start, end), "channel": chosen}
                    yield place, speaker, self._features(waveform, SAMPLING_RATE, start)

    def _features(self, waveform: Any, rate: int, start: float) -> Any:
        extractor: Any = self.feature_extractor
        try:
            return extractor(waveform, sampling_rate=rate, resample=True, return_tensors="pt")
        except InvalidAudioError as error:
            raise InvalidAudioError(f"from {start:g} s on: {error}") from error

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters: Any) -> Any:
        if "turns" not in input_tensors:
            outputs = self.model(**input_tensors)
            return {"logits": outputs.logits, "spread": outputs.spread}  # (batch, num_labels) each
        state, places = None, []
        predicted: dict[str, list[Any]] = {"logits": [], "spread": []}
        for place, speaker, features in input_tensors["turns"]:
            given = {**features, "speaker_ids": torch.tensor([speaker])}
            inputs = self._ensure_tensor_on_device(given, device=self.device)
            outputs = self.model(**inputs, conversation_state=state, use_conversation_state=True)
            state = outputs.conversation_state
            places.append(place)
            for name, parts in predicted.items():
                parts.append(outputs.get(name))
        # (turns, num_labels) each
        return {name: None if None in parts else torch.cat(parts) for name, parts in predicted.items()} | {
            "places": places
        }

    def postprocess(self, model_outputs: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
        places, logits, spreads = (model_outputs.get(name) for name in ("places", "logits", "spread"))
        rows = [
            self._rows(scores, None if spreads is None else spreads[turn], **wanted)
            for turn, scores in enumerate(cast(Any, logits))
        ]
        return rows[0] if places is None else [{**place, "scores": row} for place, row in zip(places, rows)]

    def _rows(
        self,
        scores: torch.Tensor,
        spread: torch.Tensor | None,
        top_k: int | None = None,
        return_label_values: bool = False,
        return_intervals: bool = False,
        return_spread: bool = False,
    ) -> list[dict[str, Any]]:
        """The labels of (num_labels,) scores and spreads, highest first."""
        labels = self.model.config.labels
        rows: list[dict[str, Any]] = [{"label": label, "score": score} for label, score in zip(labels, scores.tolist())]
        if return_label_values:
            for row, value in zip(rows, self.model.to_label_ranges(scores).tolist()):
                row["value"] = value
        if return_intervals:
            spreads = [None] * len(rows) if spread is None else spread.tolist()
            for row, ends, own in zip(rows, self.model.intervals(scores, spread).tolist(), spreads):
                row.update(interval=ends, confidence=self.model.config.confidence(row["label"], row["score"], own))
        if return_spread:
            assert spread is not None  # refused before, for other models
            on_own_scale = self.model.to_label_ranges(spread, differences=True).tolist()
            for row, value, value_spread in zip(rows, spread.tolist(), on_own_scale):
                row.update(spread=value, **({"value_spread": value_spread} if return_label_values else {}))
        return sorted(rows, key=lambda row: row["score"], reverse=True)[:top_k]


def _unpacked(item: Any, sampling_rate: Any, allow_paths: bool) -> tuple[Any, Any]:
    """What a dict holds, and its rate in Hz, None where nothing says it; anything else as it is."""
    if isinstance(item, dict):
        for name in ("array", "raw"):
            if item.get(name) is not None:
                rate = sampling_rate if item.get("sampling_rate") is None else item["sampling_rate"]
                if rate is None:
                    raise ValueError("a dict of samples needs 'sampling_rate', in Hz")
                return item[name], rate
        if item.get("bytes") is None and item.get("path") is None:
            raise TypeError(
                f"a dict with {sorted(map(str, item))} is no audio; allowed are 'array' or 'raw' with "
                "'sampling_rate', 'bytes', or 'path'"
            )
        item = item["path"] if item.get("bytes") is None else item["bytes"]
    if isinstance(item, (str, os.PathLike)) and not allow_paths and "://" not in str(item):
        raise ValueError("the input is a string; pass allow_paths=True to open strings as local files")
    return item, sampling_rate


def _chunks(samples: int, rate: int, chunk_length_s: float | None) -> list[tuple[int, int]]:
    """(first, behind the last) sample of each chunk; one that were shorter than 25 ms shares with the one before."""
    if not chunk_length_s:
        return [(0, samples)]
    bounds = [*range(0, samples, round(chunk_length_s * rate)), samples]
    if len(bounds) > 2 and bounds[-1] - bounds[-2] < MIN_SECONDS * rate:
        bounds[-2] = (bounds[-3] + samples) // 2
    return list(itertools.pairwise(bounds))


__all__ = ["MambaEMAPipeline"]
