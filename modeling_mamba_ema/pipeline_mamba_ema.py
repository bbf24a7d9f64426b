"""`pipeline("audio-classification", ...)` for Mamba-EMA: named values of one utterance, from audio as people have it.

Transformers' own audio-classification pipeline needs ffmpeg for files and torchaudio for other sampling rates, fetches
every string that looks like a URL and opens every other one as a file. This one does none of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import Pipeline

from .audio_files import load_audio
from .conversation_encoder import number_speakers
from .feature_extraction_mamba_ema import SAMPLING_RATE

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
    `"raw"` and `"sampling_rate"`; a dict with `"bytes"`, as `datasets` gives undecoded audio; the bytes of an audio
    file; with `allow_paths=True` the path of a local file, or a dict with `"path"`. Lists, tuples and `datasets`
    columns of these give a list, generators give an iterator. Each utterance is answered for alone, without context.

    Files are read by `soundfile` where it is installed (WAV, FLAC, OGG, MP3), else PCM WAV only. Rates other than the
    model's are resampled by `soxr`. No URL is ever opened.

    Call arguments, which may also be given to `pipeline(...)`:
        top_k: the highest values only; None for all.
        return_label_values: add `"value"`, on the label's own scale (`config.label_ranges`).
        sampling_rate: of bare waveforms, in Hz.
        channel: of files with several, counted from 1; None for their average.
        allow_paths: take strings, paths and `{"path": ...}` as local files. Leave it off where strings come from users.
        batch_size: utterances in one pass of the model; changes no value beyond 2e-5.

    Returns:
        For each utterance `[{"label": "arousal", "score": 0.61}, {"label": "valence", "score": 0.43}]`, the score on
        the unit scale: a regression, so scores do not sum to 1.

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
        if isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes, bytearray)):
            if len(inputs) == 0:
                return []
            # Through a generator, so that a column of a dataset is read row by row.
            return list(super().__call__((item for item in inputs), **kwargs))
        return super().__call__(inputs, **kwargs)

    @torch.inference_mode()
    def conversation(
        self, turns: Sequence[Any], speakers: Sequence[str | None] | None = None, **parameters: Any
    ) -> list[list[dict[str, Any]]]:
        """The turns of one conversation, each with the context of the turns before it.

        Args:
            turns: in their order, each as the pipeline takes an utterance.
            speakers: a name a turn, None where unknown; they matter where `config.context_scope` is not
                `"conversation"`.
            parameters: call arguments of the pipeline.

        Returns:
            For each turn what the pipeline gives for an utterance.

        Raises:
            InvalidAudioError, TypeError, ValueError: as the pipeline; not one name a turn, or more than
                `config.max_speakers`.
        """
        preprocess, _, postprocess = self._sanitize_parameters(**parameters)
        names = [None] * len(turns) if speakers is None else list(speakers)
        ids, most = number_speakers(names), self.model.config.max_speakers
        if len(names) != len(turns):
            raise ValueError(f"speakers has {len(names)} names for {len(turns)} turns; give one a turn")
        if self.model.mamba_ema.speaker_encoder is not None and max(ids, default=0) >= most:
            raise ValueError(f"the conversation has {max(ids) + 1} speakers; the model keeps a context for {most}")
        state, rows = None, []
        for turn, speaker in zip(turns, ids):
            features = self.preprocess(turn, **{**self._preprocess_params, **preprocess})
            inputs = self._ensure_tensor_on_device({**features, "speaker_ids": torch.tensor([speaker])}, self.device)
            outputs = self.model(**inputs, conversation_state=state, use_conversation_state=True)
            state = outputs.conversation_state
            rows.append(self.postprocess({"logits": outputs.logits.cpu()}, **{**self._postprocess_params, **postprocess}))
        return rows

    def _sanitize_parameters(  # type: ignore[override]
        self,
        top_k: int | None = None,
        return_label_values: bool | None = None,
        function_to_apply: str | None = None,
        sampling_rate: int | None = None,
        channel: int | None = None,
        allow_paths: bool | None = None,
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if function_to_apply not in (None, "none"):
            raise ValueError(
                f"function_to_apply is {function_to_apply!r}, but the values are a regression; only 'none' is allowed"
            )
        if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
            raise ValueError(f"top_k is {top_k!r}; a whole number from 1, or None for all labels, is needed")
        preprocess = {"sampling_rate": sampling_rate, "channel": channel, "allow_paths": allow_paths}
        postprocess = {"top_k": top_k, "return_label_values": return_label_values}
        return (
            {name: value for name, value in preprocess.items() if value is not None},
            {},
            {name: value for name, value in postprocess.items() if value is not None},
        )

    def preprocess(  # type: ignore[override]
        self, input_: Any, sampling_rate: int | None = None, channel: int | None = None, allow_paths: bool = False
    ) -> dict[str, Any]:
        extractor: Any = self.feature_extractor
        waveform, rate = self._read(input_, sampling_rate, channel, allow_paths)
        rate = extractor.sampling_rate if rate is None else rate
        return dict(extractor(waveform, sampling_rate=rate, resample=True, return_tensors="pt"))

    def _forward(self, input_tensors: dict[str, Any], **forward_parameters: Any) -> Any:
        return {"logits": self.model(**input_tensors).logits}  # (batch, num_labels)

    def postprocess(  # type: ignore[override]
        self, model_outputs: dict[str, torch.Tensor], top_k: int | None = None, return_label_values: bool = False
    ) -> list[dict[str, Any]]:
        scores = model_outputs["logits"][0]  # (num_labels,)
        values = self.model.to_label_ranges(scores).tolist()
        rows: list[dict[str, Any]] = [
            {"label": label, "score": score, **({"value": value} if return_label_values else {})}
            for label, score, value in zip(self.model.config.labels, scores.tolist(), values)
        ]
        return sorted(rows, key=lambda row: row["score"], reverse=True)[:top_k]

    def _read(
        self, item: Any, sampling_rate: int | None, channel: int | None, allow_paths: bool
    ) -> tuple[Any, int | None]:
        """The waveform of one input and its rate in Hz, None where nothing says it."""
        if isinstance(item, dict):
            for name in ("array", "raw"):
                if item.get(name) is not None:
                    rate = item.get("sampling_rate") or sampling_rate
                    if rate is None:
                        raise ValueError("a dict of samples needs 'sampling_rate', in Hz")
                    return item[name], rate
            if item.get("bytes") is None and item.get("path") is None:
                raise TypeError(
                    f"a dict with {sorted(map(str, item))} is no audio; allowed are 'array' or 'raw' with "
                    "'sampling_rate', 'bytes', or 'path'"
                )
            item = item["path"] if item.get("bytes") is None else item["bytes"]
        if isinstance(item, (bytes, bytearray, str, Path)):
            if isinstance(item, (str, Path)) and not allow_paths and "://" not in str(item):
                raise ValueError("the input is a string; pass allow_paths=True to open strings as local files")
            extractor: Any = self.feature_extractor
            return load_audio(item, channel=channel, max_seconds=extractor.max_seconds), SAMPLING_RATE
        if hasattr(item, "get_all_samples"):
            raise TypeError(
                "the input is a torchcodec decoder; give the column undecoded: "
                "dataset.cast_column('audio', datasets.Audio(decode=False))"
            )
        return item, sampling_rate


__all__ = ["MambaEMAPipeline"]
