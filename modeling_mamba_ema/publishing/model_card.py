"""The model card that `save_pretrained` writes: what a reader of the Hub page must know before any training ran."""

from __future__ import annotations

import os
from pathlib import Path

from ..configuration_mamba_ema import MambaEMAConfig

# Of the card that `save_pretrained` writes; training replaces the placeholder by what it measured.
RESULTS_PLACEHOLDER = "No evaluation has been recorded in this card yet.\n"


# What the Hub's widget offers to try: title, file of the package's sample, name beside the card.
WIDGET_SAMPLES = (
    ("A quarrel begins (synthetic voice)", "turn0_anna.wav", "sample_quarrel.wav"),
    ("Good news (synthetic voice)", "turn6_anna.wav", "sample_good_news.wav"),
)


def copy_widget_samples(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Put the audio that the widget offers beside the card; nothing where the package's sample is not installed.

    Returns:
        Title -> file name, of those that are there now.
    """
    written = {}
    for title, source, name in WIDGET_SAMPLES:
        sample = Path(__file__).parents[1] / "sample" / source
        if sample.is_file():
            (Path(folder) / name).write_bytes(sample.read_bytes())
            written[title] = name
    return written


def model_card(config: MambaEMAConfig, widget: dict[str, str] | None = None) -> str:
    """README.md of a model repository, with metadata the Hub reads.

    Args:
        config: the model's configuration; labels, scales, encoder and pooling are read from it.
        widget: title -> audio file beside the card, which the Hub's widget offers to try.

    Returns:
        The card's text: YAML front matter and Markdown.
    """
    encoder = config.speech_encoder_config
    scales = "\n".join(
        f"| {index} | {name} | 0 to 1 | {low:g} to {high:g} |"
        for index, name in enumerate(config.labels)
        for low, high in [config.label_range(name)]
    )
    examples = "".join(f"- example_title: {title}\n  src: {name}\n" for title, name in (widget or {}).items())
    examples = f"widget:\n{examples}" if examples else ""
    return f"""---
library_name: transformers
pipeline_tag: audio-classification
license: apache-2.0
metrics:
- ccc
tags:
- speech-emotion-recognition
- dimensional-emotion
- valence-arousal
- wavlm
- mamba
- audio
{examples}---

# Mamba-EMA: {", ".join(config.labels)} from speech

A Transformers model that reads {", ".join(config.labels)} from speech, one utterance at a time or turn by turn over a
conversation. WavLM ({encoder.num_hidden_layers} layers, {encoder.hidden_size} wide) turns a waveform into frames,
`{config.speech_encoder_pooling}` pooling makes one vector of them, and context `{config.context}` carries emotion over
the turns.

## Use

```python
from transformers import AutoFeatureExtractor, AutoModel

repo = "path/or/name-of-this-model"
revision = "main"  # better: the commit hash you have read, for the code is run on your machine
model = AutoModel.from_pretrained(repo, trust_remote_code=True, revision=revision).eval()
extractor = AutoFeatureExtractor.from_pretrained(repo, trust_remote_code=True, revision=revision)

inputs = extractor(waveform, sampling_rate=16_000, return_tensors="pt")
outputs = model(**inputs)
outputs.logits              # (batch, {config.num_labels}) on the unit scale, columns as below
outputs.pooling_attentions  # where in time the model listened
```

With the package `modeling_mamba_ema` installed and imported, the same lines work without `trust_remote_code`.

| column | label | output | label's own scale |
| --- | --- | --- | --- |
{scales}

## Results

{RESULTS_PLACEHOLDER}
## Intended use and limits

For research on speech emotion and for tools whose users know that their emotion is being estimated. The numbers are
estimates of how listeners would rate a voice, not of what a person feels. They shift with language, culture, age,
recording and microphone, and are least reliable on speakers and situations unlike the training data. Do not use them
to judge, hire, grade, police or diagnose anybody, or on people who have not agreed to it; some of these uses are
prohibited by law, for example at work and in education in the European Union.
"""
