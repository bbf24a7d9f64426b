"""Score a conversation turn by turn with a saved model, and draw what it heard.

    python examples/score_conversation.py outputs/demo/model data/demo --output outputs/demo
    python examples/score_conversation.py MODEL turn1.wav turn2.flac turn3.wav --output outputs/call

The model is loaded through the Auto classes from its folder alone. Give a corpus folder (a conversation of its test
split is scored, beside its labels) or audio files in the order of their turns.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoFeatureExtractor, AutoModel

from modeling_mamba_ema.data.audio import AudioFileError, load_audio
from modeling_mamba_ema.data.dataset import load_emotion_dataset
from modeling_mamba_ema.plots import plot_attention, plot_trajectory


def turns_of_corpus(folder: Path, labels: list[str]) -> list[dict]:
    """The longest conversation of the test split: rows in the normal form."""
    splits = load_emotion_dataset(folder, labels)
    rows = splits["test" if "test" in splits else next(iter(splits))]
    names = rows["conversation_id"]
    longest = max(dict.fromkeys(names), key=list(names).count)
    return [row for row in rows if row["conversation_id"] == longest]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder (or Hub name) of a saved Mamba-EMA model; its code is run")
    parser.add_argument("--revision", default="main", help="commit of a Hub model whose code you have read")
    parser.add_argument("turns", nargs="+", type=Path, help="a corpus folder, or audio files in order")
    parser.add_argument("--output", type=Path, required=True, help="folder for the pictures")
    arguments = parser.parse_args()

    model = AutoModel.from_pretrained(arguments.model, trust_remote_code=True, revision=arguments.revision).eval()
    extractor = AutoFeatureExtractor.from_pretrained(
        arguments.model, trust_remote_code=True, revision=arguments.revision
    )
    labels = model.config.labels
    if arguments.turns[0].is_dir():
        turns = turns_of_corpus(arguments.turns[0], labels)
    else:
        turns = [{"file_name": str(path)} for path in arguments.turns]

    # One turn at a time: the state is all that is kept of the conversation.
    state, scores, sharpest = None, [], None
    known = labels[0] in turns[0]
    header = [f"{name:>9}" for name in labels] + ([f"{name + ' label':>14}" for name in labels] if known else [])
    print(f"{'turn':>4}  {'speaker':<16} {'seconds':>7}  {'  '.join(header)}")
    for number, turn in enumerate(turns, start=1):
        try:
            waveform = load_audio(turn["file_name"], turn.get("start"), turn.get("end"), downmix=True)
        except AudioFileError as error:
            print(f"score_conversation: {error}", file=sys.stderr)
            return 1
        with torch.inference_mode():
            outputs = model(
                **extractor(waveform, sampling_rate=16_000, return_tensors="pt"),
                conversation_state=state,
                use_conversation_state=True,
            )
        state = outputs.conversation_state
        scores.append(outputs.logits[0].tolist())
        columns = [f"{score:>9.3f}" for score in scores[-1]] + (
            [f"{turn[name]:>14.3f}" for name in labels] if known else []
        )
        speaker = str(turn.get("speaker", ""))
        print(f"{number:>4}  {speaker:<16} {waveform.size / 16_000:>7.2f}  {'  '.join(columns)}")
        # The attention to draw: that of a turn whose emotional stretch is known, else the one farthest from mean
        # pooling, by the largest weight over the mean weight.
        attention = outputs.pooling_attentions[0]
        sharpness = (turn.get("salient_start") is not None, float(attention.max() * attention.shape[-1]))
        if sharpest is None or sharpness > sharpest[0]:
            sharpest = (sharpness, number, waveform, attention, turn)

    arguments.output.mkdir(parents=True, exist_ok=True)
    trajectory = plot_trajectory(
        {name: [row[index] for row in scores] for index, name in enumerate(labels)},
        speakers=[str(turn.get("speaker", "speaker")) for turn in turns],
        references={name: [turn[name] for turn in turns] for name in labels} if known else None,
        title="Emotion over the conversation",
    )
    trajectory.savefig(arguments.output / "trajectory.png", dpi=90)
    _, number, waveform, attention, turn = sharpest
    salient = (turn["salient_start"], turn["salient_end"]) if turn.get("salient_start") is not None else None
    picture = plot_attention(waveform, attention, salient=salient, title=f"Where the model listened: turn {number}")
    picture.savefig(arguments.output / "attention.png", dpi=90)
    print(f"pictures: {arguments.output / 'trajectory.png'}, {arguments.output / 'attention.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
