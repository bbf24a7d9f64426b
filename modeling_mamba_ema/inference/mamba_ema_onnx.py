"""Run an exported Mamba-EMA with numpy and onnxruntime alone; neither torch nor transformers is needed.

from mamba_ema_onnx import OnnxEmotionTracker   # this file lies beside the exported model

tracker = OnnxEmotionTracker(folder)
for waveform, speaker in turns:                 # (samples,) float within [-1, 1], 16 kHz; a name or None
    heard = tracker.update(waveform, speaker)
    print(heard["values"])                      # {"valence": 0.43, "arousal": 0.61}
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

SPEAKERS = "speakers."  # before the names of a speaker's state


class OnnxEmotionTracker:
    """Follows one conversation, turn by turn, as `modeling_mamba_ema.inference.EmotionTracker` does.

    Args:
        folder: of the export.
        providers: of onnxruntime, e.g. `["CUDAExecutionProvider"]`; the CPU by default.

    Attributes:
        config: what `onnx_config.json` says: labels, their scales, limits.
        encoder: the session of `encoder.onnx`; anything with its `run`, such as another runtime's, can take its place.
        state: the conversation's state, name -> array; constant in size.
        speakers: the same by the speakers' names, the one silent longest first, of a model with contexts of speakers.
    """

    def __init__(self, folder: str | Path, providers: list[str] | None = None):
        folder = Path(folder)
        self.config: dict[str, Any] = json.loads((folder / "onnx_config.json").read_text(encoding="utf-8"))
        self.encoder, self._step = (
            onnxruntime.InferenceSession(folder / name, providers=providers or ["CPUExecutionProvider"])
            for name in ("encoder.onnx", "conversation_step.onnx")
        )
        self.reset()

    def reset(self) -> None:
        """Begin a new conversation."""
        self.state = self._zeros(of_speaker=False)
        self.speakers: dict[str, dict[str, np.ndarray]] = {}

    def _zeros(self, of_speaker: bool) -> dict[str, np.ndarray]:
        return {
            name: np.zeros((1, *shape), dtype=np.int64 if name.endswith("num_turns") else np.float32)
            for name, shape in self.config["state"].items()
            if name.startswith(SPEAKERS) == of_speaker
        }

    def update(self, waveform: Any, speaker: str | None = None) -> dict[str, Any]:
        """Hear the next turn.

        Args:
            waveform: (samples,) mono, 16 kHz, floats within [-1, 1], 25 ms to 30 s.
            speaker: a name, which means the state; None or blank for unknown.

        Returns:
            `values` (unit scale) and `label_values` (labels' own scale) by label, `intervals` (lower and upper end by
            label, unit scale; None for a model without), `spread` (predicted standard deviation of raters by label,
            unit scale; None likewise), `attention` (heads, frames), and `low_level`, True below -70 dBFS RMS.

        Raises:
            ValueError: a waveform that cannot be used; the state is then as it was.
        """
        samples, low_level = self._prepare(waveform)
        pooled, attention = self.encoder.run(["pooled", "attention"], {"input_values": samples[None]})
        name = (speaker or "").strip()
        own = self.speakers.get(name) or self._zeros(of_speaker=True)
        outputs = [output.name for output in self._step.get_outputs()]
        answer = dict(zip(outputs, self._step.run(outputs, {"pooled": pooled, **self.state, **own})))
        state = {key: answer[f"next.{key}"] for key in self.config["state"]}
        self.state = {key: state[key] for key in self.state}
        self.speakers.pop(name, None)
        known = [other for other in self.speakers if other]
        if name and len(known) == self.config["max_speakers"]:
            del self.speakers[known[0]]
        self.speakers[name] = {key: state[key] for key in own}
        values = dict(zip(self.config["labels"], map(float, answer["logits"][0])))
        spread = dict(zip(values, map(float, answer["spread"][0]))) if "spread" in answer else None
        label_values = {}
        for name, value in values.items():
            low, high = self.config["label_ranges"][name]
            label_values[name] = low + value * (high - low)
        return {
            "values": values,
            "label_values": label_values,
            "intervals": self._intervals(values, spread),
            "spread": spread,
            "attention": attention[0],
            "low_level": low_level,
        }

    def _intervals(
        self, values: dict[str, float], spread: dict[str, float] | None
    ) -> dict[str, tuple[float, float]] | None:
        radii, least = self.config["interval_radii"], self.config["min_spread"]
        if None in radii.values():
            return None
        if spread is not None and least is not None:  # they are multiples of the spread
            radii = {name: radius * max(spread[name], least) for name, radius in radii.items()}
        lowest, highest = (0.0, 1.0) if self.config["bounded_predictions"] else (-np.inf, np.inf)
        return {
            name: (max(value - radii[name], lowest), min(value + radii[name], highest))
            for name, value in values.items()
        }

    def _prepare(self, waveform: Any) -> tuple[np.ndarray, bool]:
        """Checked and normalised as by `MambaEMAFeatureExtractor`, (samples,) float32, and whether near silence."""
        samples = np.asarray(waveform)
        if samples.ndim != 1 or not np.issubdtype(samples.dtype, np.floating):
            raise ValueError(f"the waveform is {samples.dtype} of shape {samples.shape}; (samples,) floats are needed")
        shortest, rate = self.config["min_samples"], self.config["sampling_rate"]
        longest = int(self.config["max_seconds"] * rate)
        if not shortest <= samples.size <= longest:
            raise ValueError(
                f"the waveform has {samples.size} samples; allowed are {shortest} to {longest} at {rate} Hz"
            )
        samples = samples.astype(np.float32)
        peak = float(np.abs(samples).max())
        if not peak <= self.config["max_peak"]:
            raise ValueError(f"the waveform has a peak of {peak:g}; finite samples within [-1, 1] are needed")
        low_level = float(np.std(samples, dtype=np.float64)) < 10 ** (self.config["low_level_dbfs"] / 20)
        mean, deviation = self.config["waveform_mean"], self.config["waveform_std"]
        if mean is not None and deviation is not None:
            samples = (samples - mean) / (deviation + 1e-6)
        elif self.config["do_normalize"]:
            samples = samples - samples.mean(dtype=np.float64).astype(np.float32)
            if not low_level:
                samples = samples / np.sqrt(np.square(samples, dtype=np.float64).mean() + 1e-7)
        return samples.astype(np.float32), low_level
