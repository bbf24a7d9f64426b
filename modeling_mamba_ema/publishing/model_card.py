"""The model card of a release: what a reader of the Hub page must know, and metadata that the Hub reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from ..configuration_mamba_ema import MambaEMAConfig
from ..data.markdown_table import markdown_table

# What 0 and 1 mean on the unit scale.
ENDS_OF_SCALE = {
    "valence": ("unpleasant", "pleasant"),
    "arousal": ("calm", "excited"),
    "dominance": ("submissive", "dominant"),
}
CONFIDENCE = "95 %"


def describe_ends(labels: Sequence[str]) -> str:
    """What 0 and 1 mean: "valence: 0 unpleasant, 1 pleasant; arousal: 0 calm, 1 excited"."""
    ends = {label: ENDS_OF_SCALE.get(label, ("lowest", "highest")) for label in labels}
    return "; ".join(f"{label}: 0 {low}, 1 {high}" for label, (low, high) in ends.items())


def listed(names: Sequence[str]) -> str:
    """ "valence", "valence and arousal", "valence, arousal and dominance"."""
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


@dataclass(frozen=True)
class TrainingFacts:
    """What a card says of the training behind a model.

    Attributes:
        results: metrics by split as the `ccc` metric gives them, with intervals or without; empty: not measured.
        source: the corpus, as the configuration names it; of a path the card shows the folder's name. Several names on
            the Hub stand with commas between them. None: not known.
        command: what a reader runs to get this model, overrides included; None: not known.
        base_model: Hub name of the model that was fine-tuned or adopted; None: trained from random weights.
        license: of the weights, as the Hub spells it; None: not known.
        languages: of the speech, as ISO 639-1 codes.
        citation: of the paper that describes the model, where somebody else trained it.
        published_results: CCC by split and label as that paper gives them.
    """

    results: Mapping[str, Mapping[str, float]]
    source: str | None
    command: str | None
    base_model: str | None = None
    license: str | None = None
    languages: Sequence[str] = ()
    citation: str | None = None
    published_results: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def corpus(self) -> str | None:
        path = None if self.source is None else Path(self.source)
        if path is not None and path.is_file():
            return path.absolute().parent.name
        return path.name if path is not None and (path.is_absolute() or path.exists()) else self.source


def model_card(
    config: MambaEMAConfig,
    training: TrainingFacts | None = None,
    widget: Sequence[Mapping[str, Any]] = (),
) -> str:
    """README.md of a model repository: YAML front matter and Markdown.

    Args:
        training: what the model was trained on and how well it does; None: not known.
        widget: what the Hub's widget offers to try: `example_title`, `src`, and `output` as the pipeline gives it.
    """
    return f"---\n{_metadata(config, training, widget).to_yaml()}\n---\n{_body(config, training)}"


def _metadata(
    config: MambaEMAConfig, training: TrainingFacts | None, widget: Sequence[Mapping[str, Any]]
) -> ModelCardData:
    facts: dict[str, Any] = {}
    if training is not None:
        facts = {
            "base_model": training.base_model,
            "license": training.license,
            "language": list(training.languages) or None,
            "datasets": None if training.corpus is None else training.corpus.split(", "),
            "model_name": "Mamba-EMA",
            "eval_results": _eval_results(config, training) or None,
        }
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="audio-classification",
        metrics=["ccc"],
        tags=["speech-emotion-recognition", "dimensional-emotion", *config.labels, "mamba", "audio"],
        widget=[dict(example) for example in widget] or None,
        **facts,
    )


def _eval_results(config: MambaEMAConfig, training: TrainingFacts) -> list[EvalResult]:
    """One result a split and label, and the mean over labels, each with its interval where it has one."""
    if training.corpus is None:  # the Hub takes no result without a dataset
        return []
    result = partial(
        EvalResult,
        task_type="audio-classification",
        task_name="Dimensional speech emotion recognition",
        dataset_type=training.corpus,
        dataset_name=training.corpus,
        metric_type="ccc",
    )
    return [
        result(
            dataset_split=split,
            metric_name=title,
            metric_value=round(metrics[name], 4),
            metric_args={
                end: round(metrics[f"{name}_{end}"], 4) for end in ("low", "high") if f"{name}_{end}" in metrics
            }
            or None,
        )
        for split, metrics in training.results.items()
        for name, title in _metric_names(config)
        if name in metrics
    ] + [
        result(
            dataset_split=split,
            metric_name=f"CCC {label}",
            metric_value=value,
            source_name=f"published with {training.base_model}",
            source_url=f"https://huggingface.co/{training.base_model}",
        )
        for split, values in training.published_results.items()
        for label, value in values.items()
    ]


def _metric_names(config: MambaEMAConfig) -> list[tuple[str, str]]:
    return [*((f"ccc_{label}", f"CCC {label}") for label in config.labels), ("ccc", "mean CCC")]


def _body(config: MambaEMAConfig, training: TrainingFacts | None) -> str:
    encoder = config.speech_encoder_config
    labels = listed(config.labels)
    return f"""
# Mamba-EMA: {labels} from speech

A Transformers model that reads {labels} from speech, one utterance at a time or turn by turn over a conversation. The
speech encoder ({encoder.model_type}, {encoder.num_hidden_layers} layers, {encoder.hidden_size} wide) turns a waveform
into frames, `{config.speech_encoder_pooling}` pooling makes one vector of them, and context `{config.context}` carries
emotion over the turns.

## Use

```bash
pip install torch transformers soundfile soxr
```

```python
from transformers import pipeline

repo = "path/or/name-of-this-model"
revision = "main"  # better: the commit hash you have read, because its code runs on your machine
emotion = pipeline("audio-classification", model=repo, trust_remote_code=True, revision=revision)
with open("speech.wav", "rb") as file:  # WAV, FLAC, OGG or MP3 of up to 30 s
    print(emotion(file.read()))
```

The scores are values on the unit scale, not probabilities{_outside(config)}. The model itself gives more:

```python
import soundfile
from transformers import AutoFeatureExtractor, AutoModel

model = AutoModel.from_pretrained(repo, trust_remote_code=True, revision=revision).eval()
extractor = AutoFeatureExtractor.from_pretrained(repo, trust_remote_code=True, revision=revision)
waveform, rate = soundfile.read("speech.wav")  # mono

outputs = model(**extractor(waveform, sampling_rate=rate, resample=True, return_tensors="pt"))
outputs.logits  # (1, {config.num_labels}) on the unit scale, columns as below
outputs.pooling_attentions  # weights over time: where the model listened{_further_outputs(config)}
```

With the package `modeling-mamba-ema` installed and imported, the same lines work without `trust_remote_code`.

| column | label | 0 means | 1 means | label's own scale |
| --- | --- | --- | --- | --- |
{_scales(config)}

## Training data and results

{_results(config, training)}

## Intended use and limits

For research on speech emotion, and for tools whose users know that their emotion is being estimated. The numbers
estimate how listeners would rate a voice, not what a person feels. They shift with language, culture, age, recording
and microphone, and are least reliable on speakers and situations unlike the training data. Do not use them to judge,
hire, grade, police or diagnose anybody, or on people who have not agreed to it. Some of these uses are prohibited by
law, for example at work and in education in the European Union.

## Licence

{_license(training)}
"""


def _further_outputs(config: MambaEMAConfig) -> str:
    covered = f"about {100 * config.interval_level:.0f} % of the labels lie between them"
    intervals = "" if config.interval_radii is None else f"\noutputs.intervals  # low and high; {covered}"
    spread = "\noutputs.spread  # how far raters would differ, a standard deviation" if config.predict_spread else ""
    return intervals + spread


def _outside(config: MambaEMAConfig) -> str:
    return "" if config.bounded_predictions else "; single ones may lie a little outside of it"


def _scales(config: MambaEMAConfig) -> str:
    rows = []
    for index, name in enumerate(config.labels):
        low_end, high_end = ENDS_OF_SCALE.get(name, ("lowest", "highest"))
        low, high = config.label_range(name)
        rows.append(f"| {index} | {name} | {low_end} | {high_end} | {low:g} to {high:g} |")
    return "\n".join(rows)


def _results(config: MambaEMAConfig, training: TrainingFacts | None) -> str:
    if training is None:
        return "This card records neither training data nor an evaluation."
    if training.citation is not None:
        return _published_results(training)
    names = _metric_names(config)
    lines = [] if training.corpus is None else [f"Trained on `{training.corpus}`."]
    if training.command is not None:
        lines += ["The model and the numbers come from", "", f"```bash\n{training.command}\n```", ""]
    if not training.results:
        return "\n".join([*lines, "This card records no evaluation."])
    lines += [
        f"CCC, with {CONFIDENCE} intervals by bootstrap over conversations where they are given; the validation split",
        "chose the checkpoint.",
        "",
    ]
    rows: list[list[str]] = []
    coverage: list[str] = []
    spread: list[str] = []
    for split, metrics in training.results.items():
        if "ccc" not in metrics:  # the split has no labels
            continue
        cells = [
            f"{metrics[name]:.3f}{_interval(metrics, name)}" if name in metrics else "no labels" for name, _ in names
        ]
        counts = [f"{metrics[n]:.0f}" if n in metrics else "" for n in ("num_turns", "num_conversations")]
        rows.append([split, *counts, *cells])
        shares = [
            f"{name} {100 * metrics[f'coverage_{name}']:.1f} %"
            for name in config.labels
            if f"coverage_{name}" in metrics
        ]
        coverage += [f"`{split}`: {', '.join(shares)}"] if shares else []
        found = [
            f"{label} {metrics[name]:.3f}{_interval(metrics, name)}"
            for label in config.labels
            if (name := f"spread_ccc_{label}") in metrics
        ]
        spread += [f"`{split}`: {', '.join(found)}"] if found else []
    lines.append(markdown_table(["split", "turns", "conversations", *(title for _, title in names)], rows))
    if coverage:
        intervals = f"{100 * config.interval_level:.0f} % intervals (split-conformal, from the validation split)"
        lines += ["", f"Coverage of the {intervals}, each conversation counting as one: {'; '.join(coverage)}."]
    if spread:
        lines += ["", f"CCC of the predicted spread of the raters with theirs: {'; '.join(spread)}."]
    return "\n".join(lines)


def _interval(metrics: Mapping[str, float], name: str) -> str:
    return f" ({metrics[f'{name}_low']:.3f} to {metrics[f'{name}_high']:.3f})" if f"{name}_low" in metrics else ""


def _published_results(training: TrainingFacts) -> str:
    lines = [
        f"Trained by the publisher of [`{training.base_model}`](https://huggingface.co/{training.base_model}) on",
        f"`{training.corpus}`, and converted without further training by",
        "",
        f"```bash\n{training.command}\n```",
        "",
        f"If you use it, cite {training.citation}.",
    ]
    if training.published_results:
        lines += ["", "CCC as published there; they were not measured again with this folder.", ""]
        lines += ["| split | label | CCC |", "| --- | --- | --- |"]
    for split, values in training.published_results.items():
        lines += [f"| {split} | {label} | {value:g} |" for label, value in values.items()]
    return "\n".join(lines)


def _license(training: TrainingFacts | None) -> str:
    code = "The code is licensed under Apache-2.0."
    if training is None or training.license is None:
        return (
            f"{code} The licence of the weights depends on the training data and on the speech encoder they start from."
        )
    return f"{code} The weights are licensed under {training.license}."
