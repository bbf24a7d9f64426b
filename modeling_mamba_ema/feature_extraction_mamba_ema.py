"""Feature extraction: waveforms as people have them -> padded, normalised input for Mamba-EMA."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import TensorType

SAMPLING_RATE = 16_000  # Hz, what WavLM was trained on
MIN_SAMPLES = 400  # 25 ms: the receptive field of one WavLM frame
DEFAULT_MAX_SECONDS = 30.0  # longest utterance
MAX_PEAK = 8.0  # floating-point audio is within [-1, 1]; far beyond that it is unscaled integers
LOW_LEVEL_DBFS = -70.0  # below this RMS an utterance counts as silence
# Lowest and highest statistics of a corpus whose samples are within [-1, 1]. By a smaller deviation a waveform at
# MAX_PEAK would become values that a speech encoder cannot take.
WAVEFORM_STATISTICS = {"waveform_mean": (-1.0, 1.0), "waveform_std": (1e-3, 10.0)}
NORMALIZATION = ("do_normalize", *WAVEFORM_STATISTICS)


class InvalidAudioError(ValueError):
    """An utterance that is no speech the model can answer for; the message names it and says what is allowed."""


class MambaEMAFeatureExtractor(SequenceFeatureExtractor):
    r"""
    Turns waveforms into `input_values` and masks for Mamba-EMA.

    Args:
        feature_size (`int`, defaults to 1): Values a sample; speech is mono.
        sampling_rate (`int`, defaults to 16000): Rate the model works at, in Hz.
        padding_value (`float`, defaults to 0.0): Value of padded samples.
        do_normalize (`bool`, defaults to `True`): Zero mean and unit variance for each utterance, as WavLM-large was
            trained. Utterances below -70 dBFS RMS are centred but not amplified: noise must not become speech.
        waveform_mean (`float`, *optional*), waveform_std (`float`, *optional*): Mean and standard deviation of all
            samples of a corpus, instead of `do_normalize`: a sample x becomes `(x - waveform_mean) / (waveform_std +
            1e-6)`, so that loud and quiet speech stay loud and quiet.
        max_seconds (`float`, defaults to 30.0): Longest utterance, checked before a sample is copied. WavLM's attention
            takes memory quadratic in it.

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_mamba_ema import MambaEMAFeatureExtractor
    >>> extractor = MambaEMAFeatureExtractor()
    >>> second = np.random.default_rng(0).normal(0, 0.1, 16_000)
    >>> extractor(second, sampling_rate=16_000, return_tensors="pt").input_values.shape
    torch.Size([1, 16000])
    >>> extractor([[second, second[:8_000]], [second]], sampling_rate=16_000, return_tensors="pt").input_values.shape
    torch.Size([2, 2, 16000])

    ```
    """

    model_input_names = ["input_values", "attention_mask"]
    _auto_class = "AutoFeatureExtractor"

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = SAMPLING_RATE,
        padding_value: float = 0.0,
        do_normalize: bool = True,
        max_seconds: float = DEFAULT_MAX_SECONDS,
        waveform_mean: float | None = None,
        waveform_std: float | None = None,
        **kwargs: Any,
    ):
        validate_normalization(do_normalize, waveform_mean, waveform_std)
        if sampling_rate != SAMPLING_RATE:
            raise ValueError(f"sampling_rate is {sampling_rate!r}; Mamba-EMA works at {SAMPLING_RATE} Hz")
        if not isinstance(max_seconds, (int, float)) or not max_seconds >= MIN_SAMPLES / SAMPLING_RATE:
            raise ValueError(
                f"max_seconds is {max_seconds!r}; allowed are numbers from {MIN_SAMPLES / SAMPLING_RATE:g} on"
            )
        kwargs.pop("return_attention_mask", None)  # a WavLM folder may say no; batches are right only with masks
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        self.return_attention_mask = True
        self.do_normalize = do_normalize
        self.max_seconds = max_seconds
        self.waveform_mean = waveform_mean
        self.waveform_std = waveform_std

    def __call__(
        self,
        raw_speech: Any,
        sampling_rate: int | None = None,
        resample: bool = False,
        padding: bool | str = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_low_level: bool = False,
        skip_short: bool = False,
        return_tensors: str | TensorType | None = None,
    ) -> BatchFeature:
        """
        Args:
            raw_speech: one waveform, a list of waveforms (a batch of utterances), or a list of lists of waveforms (a
                batch of conversations). A waveform is a 1-D array, tensor or list of mono samples; floats within
                [-1, 1], or integers of 8, 16 or 32 bits, which are scaled by the range of their type.
            sampling_rate: rate of `raw_speech` in Hz; always needed.
            resample: convert another rate to the model's; without it another rate is an error. Needs `soxr`.
            padding: `True` or `"longest"` (default), `"max_length"`, or `False` (lists, no padding; not for
                conversations).
            max_length: samples to pad to with `"max_length"`, and to cut to with `truncation`; at least 400.
            truncation: cut utterances to `max_length`.
            pad_to_multiple_of: round padded lengths up to a multiple of this.
            return_attention_mask: leave the mask out with `False`; an error where utterances differ in length.
            return_low_level: add `low_level`, True for each utterance below -70 dBFS RMS after its mean is taken off.
            skip_short: mask out turns of conversations that are shorter than 25 ms, as diarisation leaves them, instead
                of refusing them: they get NaN, and the conversation goes on as if they were not there.
            return_tensors: `"pt"`, `"np"` or None.

        Returns:
            `input_values` and `attention_mask`, (batch, samples) for utterances, (batch, turns, samples) for
            conversations, these with `turn_mask` (batch, turns).

        Raises:
            InvalidAudioError: an utterance that cannot be used, named by its place in the batch.
            TypeError: something that is not a waveform, such as a path.
            ValueError: no or a wrong sampling rate.
        """
        rate = self.checked_rate(sampling_rate, resample)
        _check_max_length(max_length)
        conversations, depth = as_conversations(raw_speech)
        waveforms: list[np.ndarray] = []
        low_level: list[bool] = []
        present: list[list[bool]] = []
        for row, turns in enumerate(conversations):
            present.append([])
            for turn, raw in enumerate(turns):
                name = f"utterance {turn} of conversation {row}" if depth == 2 else f"utterance {row}"
                waveform = self._as_checked_waveform(raw, rate, name)[: max_length if truncation else None]
                present[-1].append(is_long_enough(waveform, name, allow_short=skip_short and depth == 2))
                low_level.append(level(waveform) < 10 ** (LOW_LEVEL_DBFS / 20))
                if present[-1][-1]:
                    waveforms.append(self._normalize(waveform, low_level[-1]))
            if not any(present[-1]):
                raise InvalidAudioError(f"conversation {row} has no turn of {MIN_SAMPLES} samples; leave it out")
        features = self.pad(
            BatchFeature({"input_values": waveforms}),
            padding=padding,
            max_length=max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors="np" if depth == 2 else None,
        )
        padded = any(len(row) > waveform.size for row, waveform in zip(features["input_values"], waveforms))
        if padded and "attention_mask" not in features:
            raise ValueError(
                "return_attention_mask=False would make padding count as speech; leave the mask in, or give one "
                "utterance at a time"
            )
        if depth == 2:
            if padding is False:
                raise ValueError("padding=False gives rows of different length; conversations need padding")
            features = _stack_conversations(features, present, self.padding_value)
        else:
            features["input_values"] = [np.asarray(row, dtype=np.float32) for row in features["input_values"]]
            if "attention_mask" in features:
                features["attention_mask"] = [np.asarray(row, dtype=np.int32) for row in features["attention_mask"]]
        if return_low_level:
            features["low_level"] = np.array(low_level)
        return features.convert_to_tensors(return_tensors)

    @classmethod
    def for_model(cls, config: Any, **kwargs: Any) -> MambaEMAFeatureExtractor:
        """The feature extractor that normalises as a `MambaEMAConfig` says, with other arguments, such as
        `max_seconds`."""
        return cls(**{name: getattr(config, name) for name in NORMALIZATION}, **kwargs)

    @classmethod
    def in_folder(cls, folder: Path, config: Any) -> MambaEMAFeatureExtractor:
        """The feature extractor of a model's folder, or a new one where there is none.

        Raises:
            ValueError: it normalises otherwise than the model's configuration says: the numbers would be wrong without
                a sign.
        """
        if not (folder / "preprocessor_config.json").is_file():
            return cls.for_model(config)
        extractor = cls.from_pretrained(folder)
        for name in NORMALIZATION:
            if getattr(config, name) != getattr(extractor, name):
                raise ValueError(
                    f"{name} is {getattr(config, name)} in config.json and {getattr(extractor, name)} in "
                    "preprocessor_config.json; both must say what the speech encoder was trained with"
                )
        return extractor

    @classmethod
    def from_speech_encoder(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> MambaEMAFeatureExtractor:
        """The feature extractor for a pretrained encoder: its normalisation, or the default where it names none."""
        try:
            theirs, _ = cls.get_feature_extractor_dict(pretrained_model_name_or_path, **kwargs)
        except OSError:
            return cls()
        return cls(**{name: theirs[name] for name in NORMALIZATION if name in theirs})

    def checked_rate(self, sampling_rate: Any, resample: bool = False) -> int:
        """A sampling rate in Hz as an int; `ValueError` where it is missing, no rate, or another without `resample`."""
        if sampling_rate is None:
            raise ValueError(
                f"sampling_rate is missing; pass the rate of the audio in Hz, e.g. sampling_rate={self.sampling_rate}"
            )
        rate = whole_number(sampling_rate)
        if rate is None:
            raise ValueError(f"sampling_rate is {reprlib.repr(sampling_rate)}, but must be a whole number of Hz")
        if not 4_000 <= rate <= 192_000:
            raise ValueError(f"sampling_rate is {reprlib.repr(rate)} Hz; allowed are 4000 to 192000 Hz")
        if rate != self.sampling_rate and not resample:
            raise ValueError(
                f"sampling_rate is {rate} Hz, but the model works at {self.sampling_rate} Hz; pass resample=True to "
                "convert"
            )
        return rate

    def _as_checked_waveform(self, raw: Any, rate: int, name: str) -> np.ndarray:
        """One waveform as people have it -> (samples,) float32 within [-1, 1] at the model's rate."""
        samples = as_mono(raw, name)
        seconds = len(samples) / rate
        if seconds > self.max_seconds:
            raise InvalidAudioError(
                f"{name} is {seconds:.7g} s long; allowed are {self.max_seconds:g} s: cut it into turns, or raise "
                "max_seconds of the feature extractor (memory grows with the square of the length)"
            )
        waveform = as_float32(samples, name)
        # The peak is finite exactly when every sample is: one look finds NaN, infinity and unscaled integers.
        peak = float(np.abs(waveform).max(initial=0.0))
        if not np.isfinite(peak):
            bad = ~np.isfinite(waveform)
            raise InvalidAudioError(
                f"{name} has {int(bad.sum())} samples that are NaN or infinite, the first at {int(bad.argmax())}; "
                "allowed are finite numbers"
            )
        if peak > MAX_PEAK:
            raise InvalidAudioError(
                f"{name} has a peak of {peak:.4g}; floating-point audio is within [-1, 1]. This looks like unscaled "
                "integers: pass the integer array itself, or divide by its full scale"
            )
        return waveform if rate == self.sampling_rate else resampled(waveform, rate, self.sampling_rate)

    def _normalize(self, waveform: np.ndarray, low_level: bool) -> np.ndarray:
        if self.waveform_mean is not None and self.waveform_std is not None:
            return (waveform - float(self.waveform_mean)) / (float(self.waveform_std) + 1e-6)
        if not self.do_normalize:
            return waveform
        centred = waveform - waveform.mean(dtype=np.float64).astype(np.float32)
        if low_level:
            return centred
        variance = np.square(centred, dtype=np.float64).mean()
        return (centred / np.sqrt(variance + 1e-7)).astype(np.float32)


def validate_normalization(do_normalize: Any, waveform_mean: Any, waveform_std: Any) -> None:
    """Raise `ValueError` for a value outside its range, one of the two statistics without the other, or two ways to
    normalise."""
    if not isinstance(do_normalize, bool):
        raise ValueError(f"do_normalize is {do_normalize!r}; allowed are True and False")
    given = {"waveform_mean": waveform_mean, "waveform_std": waveform_std}
    if waveform_mean is None and waveform_std is None:
        return
    if None in given.values() or do_normalize:
        raise ValueError(
            f"do_normalize is {do_normalize}, waveform_mean {waveform_mean}, waveform_std {waveform_std}; allowed are "
            "either do_normalize alone, or both statistics with do_normalize=False"
        )
    for name, (low, high) in WAVEFORM_STATISTICS.items():
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}; allowed are numbers from {low} to {high}")


def whole_number(value: Any) -> int | None:
    """The int that a value stands for, such as 16000.0 or an array or tensor of one number; None where it is none."""
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value // 1:  # NaN, infinity are not
        return int(value)
    return None


def _check_max_length(max_length: Any) -> None:
    if max_length is None:
        return
    if isinstance(max_length, bool) or not isinstance(max_length, (int, np.integer)) or max_length < MIN_SAMPLES:
        raise ValueError(
            f"max_length is {reprlib.repr(max_length)}; allowed are whole numbers of samples from {MIN_SAMPLES}"
        )


def _stack_conversations(features: BatchFeature, present: list[list[bool]], padding_value: float) -> BatchFeature:
    """(utterances, samples) -> (batch, turns, samples), with turn_mask (batch, turns)."""
    batch, turns = len(present), max(map(len, present))
    turn_mask = np.array([row + [False] * (turns - len(row)) for row in present])
    samples = features["input_values"].shape[1]
    values = np.full((batch, turns, samples), padding_value, dtype=np.float32)
    values[turn_mask] = features["input_values"]
    stacked = {"input_values": values}
    if "attention_mask" in features:
        mask = np.zeros((batch, turns, samples), dtype=np.int32)
        mask[turn_mask] = features["attention_mask"]
        stacked["attention_mask"] = mask
    stacked["turn_mask"] = turn_mask.astype(np.int32)
    return BatchFeature(stacked)


def _is_sequence(item: Any) -> bool:
    return isinstance(item, Sequence) and not isinstance(item, (str, bytes, bytearray))


def as_conversations(raw_speech: Any) -> tuple[list[list[Any]], int]:
    """Sort the input into conversations of turns; depth is 0 for a waveform, 1 for utterances, 2 for conversations."""
    if _is_waveform(raw_speech, "raw_speech"):
        return [[raw_speech]], 0
    if len(raw_speech) == 0:
        raise InvalidAudioError("the batch is empty; at least one utterance is needed")
    kinds = [_is_waveform(item, f"utterance {index}") for index, item in enumerate(raw_speech)]
    if True in kinds:
        if False in kinds:
            raise InvalidAudioError(
                f"item {kinds.index(True)} of the batch is an utterance, item {kinds.index(False)} a conversation; "
                "give either waveforms or lists of waveforms"
            )
        return [[item] for item in raw_speech], 1
    for row, turns in enumerate(raw_speech):
        if len(turns) == 0:
            raise InvalidAudioError(f"conversation {row} has no turns; leave it out")
        for turn, raw in enumerate(turns):
            if _is_waveform(raw, f"utterance {turn} of conversation {row}") is False:
                raise InvalidAudioError(
                    f"utterance {turn} of conversation {row} holds waveforms; allowed are conversations of utterances, "
                    "nothing deeper"
                )
    return [list(turns) for turns in raw_speech], 2


def _is_waveform(item: Any, name: str) -> bool | None:
    """True for an array, tensor or list of numbers; False for a list of waveforms; None for a list without items."""
    if isinstance(item, np.ndarray) and item.dtype == object and item.ndim == 1:
        item = list(item)
    if isinstance(item, (np.ndarray, torch.Tensor)):
        # (1, samples) is one waveform, as readers that keep the channel axis return it; more rows are ambiguous
        # between stereo and a batch, which as_mono refuses.
        return True
    if not _is_sequence(item):
        raise TypeError(
            f"{name} is of type {type(item).__name__}; allowed are arrays, tensors and lists of samples. The feature "
            "extractor opens no files: read the audio first, e.g. with soundfile"
        )
    if len(item) == 0:
        return None
    return not (_is_sequence(item[0]) or isinstance(item[0], (np.ndarray, torch.Tensor)))


def as_mono(raw: Any, name: str) -> np.ndarray | Sequence[Any]:
    """The samples of one waveform along one axis, not yet copied or converted: their number is checked first."""
    if isinstance(raw, torch.Tensor):
        raw = raw.detach()
        try:
            raw = (raw.float() if raw.dtype == torch.bfloat16 else raw).cpu().numpy()
        except (TypeError, RuntimeError, NotImplementedError) as error:
            raise InvalidAudioError(
                f"{name} is a tensor of {raw.dtype}, {raw.layout}, on {raw.device}; allowed are dense tensors of "
                "floats, signed integers and uint8"
            ) from error
    elif not isinstance(raw, np.ndarray):
        return raw
    if isinstance(raw, np.ma.MaskedArray):
        raise InvalidAudioError(f"{name} is a masked array; allowed are plain ones: fill or cut out what is masked")
    if raw.ndim == 2 and raw.shape[0] == 1:
        raw = raw[0]
    if raw.ndim != 1:
        raise InvalidAudioError(
            f"{name} has shape {raw.shape}; mono is needed, (samples,). Average or choose a channel of stereo audio, "
            "and give a batch as a list of waveforms"
        )
    return raw


def as_float32(samples: np.ndarray | Sequence[Any], name: str) -> np.ndarray:
    """Samples of any type -> (samples,) float32, integers scaled by the range of their type."""
    if not isinstance(samples, np.ndarray):
        number = (int, float, np.integer, np.floating)
        if any(not isinstance(sample, number) or isinstance(sample, bool) for sample in samples):
            raise TypeError(f"{name} holds something that is not a number; allowed are lists of samples")
        # A list has no integer type whose range would scale it: Python numbers are taken as they stand.
        try:
            samples = np.asarray(samples, dtype=np.float64)
        except OverflowError as error:
            raise InvalidAudioError(f"{name} holds a number beyond the range of floats; allowed are [-1, 1]") from error
    if samples.dtype == np.uint8:
        return (samples.astype(np.float32) - 128.0) / 128.0
    if samples.dtype in (np.int8, np.int16, np.int32):
        return (samples.astype(np.float64) / -float(np.iinfo(samples.dtype).min)).astype(np.float32)
    if not np.issubdtype(samples.dtype, np.floating):
        # int64 is what arrays of int16 samples become unnoticed; by its own range they would be silence.
        raise InvalidAudioError(f"{name} has dtype {samples.dtype}; allowed are floats, int8, int16, int32 and uint8")
    with np.errstate(over="ignore"):  # beyond float32 becomes infinite, which the caller's check names
        return samples.astype(np.float32)


def is_long_enough(waveform: np.ndarray, name: str, allow_short: bool) -> bool:
    """Whether WavLM makes a frame of it; too short without `allow_short` is an error."""
    if waveform.size < MIN_SAMPLES and not allow_short:
        raise InvalidAudioError(
            f"{name} has {waveform.size} samples ({waveform.size / SAMPLING_RATE:.3f} s); at least {MIN_SAMPLES} "
            f"({MIN_SAMPLES / SAMPLING_RATE:.3f} s) are needed"
        )
    return waveform.size >= MIN_SAMPLES


def level(waveform: np.ndarray) -> float:
    """RMS without the mean: a microphone's offset is no sound."""
    return float(np.std(waveform, dtype=np.float64)) if waveform.size else 0.0


def resampled(waveform: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """The waveform at another rate, in Hz; needs `soxr`."""
    try:
        import soxr
    except ImportError as error:
        raise ImportError(f"converting {rate} Hz to {target_rate} Hz needs soxr: pip install soxr") from error
    return soxr.resample(waveform, rate, target_rate, quality="HQ").astype(np.float32)


__all__ = ["InvalidAudioError", "MambaEMAFeatureExtractor"]
