"""The page: what stands where, and what a button does."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from typing import Any

import gradio as gr
import numpy as np

from ..feature_extraction_mamba_ema import MambaEMAFeatureExtractor
from ..inference import EmotionTracker, TurnEmotion
from ..modeling_mamba_ema import MambaEMAForRegression
from ..publishing.model_card import describe_ends, listed
from ..sample import load_sample_conversation
from . import views
from .conversation import AVERAGE, CHANNELS, EACH, ONE_OF, SPEAKERS, Conversation, TurnError, read_channels, read_turn

logger = logging.getLogger(__name__)

QUEUE_SIZE = 48  # requests that may wait; the next one is answered 503
CONCURRENCY = 2  # turns in the model at once
DELETE_CACHE = (60, 300)  # every minute, uploads older than five minutes are deleted

INTRODUCTION = """
# Mamba-EMA: how does it sound?

{labels} from speech, turn by turn: record or upload the turns of a conversation in order, each with its speaker. A turn
may last {seconds:g} s, a file may have 10 MB.

Values run from 0 to 1 ({ends}). They estimate how listeners would rate a voice. They are not what a person feels, and
must not be used to judge anybody. Uploads are deleted after a few minutes and nothing is sent anywhere.
"""


def build_page(
    model: MambaEMAForRegression, feature_extractor: MambaEMAFeatureExtractor, queue_size: int = QUEUE_SIZE
) -> gr.Blocks:
    """The page over a model in evaluation mode, not started yet; `launch` starts one, with the limits of its server.

    Visitors share the model and nothing else: each one's conversation lies in their session. `queue_size` requests may
    wait; the next one is answered 503.
    """
    start = Conversation(EmotionTracker(model, feature_extractor))
    scales = {name: model.config.label_range(name) for name in model.config.labels}
    max_seconds = feature_extractor.max_seconds

    def show(
        conversation: Conversation,
        waveform: np.ndarray,
        turn: TurnEmotion,
        references: Sequence[Mapping[str, float]] = (),
    ) -> tuple[Any, ...]:
        return (
            conversation,
            views.numbers(conversation.turns, scales, references),
            views.attention(waveform, turn),
            views.trajectory(conversation.turns),
            [turn.to_dict() for turn in conversation.turns],
        )

    def add_turn(path: str | None, speaker: str, conversation: Conversation | None) -> tuple[Any, ...]:
        conversation = conversation or start
        if conversation.channels == EACH:
            heard = read_channels(path, max_seconds)
        else:
            heard = [(read_turn(path, max_seconds, ONE_OF.get(conversation.channels)), speaker)]
        for waveform, its_speaker in heard:
            conversation, turn = conversation.add(waveform, its_speaker)
        return (None, *show(conversation, waveform, turn))

    def choose_channels(channels: str, conversation: Conversation | None) -> Conversation:
        return replace(conversation or start, channels=channels)

    def play_sample() -> Iterator[tuple[Any, ...]]:
        conversation, sample_turns = start, load_sample_conversation()
        for spoken in sample_turns:
            conversation, turn = conversation.add(spoken["waveform"], spoken["speaker"])
            yield show(conversation, spoken["waveform"], turn, sample_turns)

    def start_over() -> tuple[Any, ...]:
        return None, None, views.NOTHING_YET, "", "", [], AVERAGE

    with gr.Blocks(title="Mamba-EMA", analytics_enabled=False, delete_cache=DELETE_CACHE) as page:
        labels = escape(listed(list(scales))).capitalize()
        ends = escape(describe_ends(model.config.labels))
        gr.Markdown(INTRODUCTION.format(labels=labels, seconds=max_seconds, ends=ends))
        state = gr.State(None)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                audio = gr.Audio(
                    sources=["upload", "microphone"], type="filepath", label="A turn", elem_id="turn", buttons=[]
                )
                speaker = gr.Dropdown(
                    list(SPEAKERS), value=SPEAKERS[0], allow_custom_value=True, label="Speaker (or type a name)"
                )
                channels = gr.Dropdown(list(CHANNELS), value=AVERAGE, label="Of a file with several channels")
                add = gr.Button("Add this turn", variant="primary")
                sample = gr.Button("Hear the shipped conversation")
                reset = gr.Button("Start over")
                with gr.Accordion("The numbers as JSON", open=False):
                    plain = gr.JSON([], show_label=False)
            with gr.Column(scale=3, min_width=420):
                numbers = gr.HTML(
                    views.NOTHING_YET, css_template=views.CSS, max_height=320, autoscroll=True, padding=False
                )
                attention = gr.HTML("", css_template=views.CSS, js_on_load=views.JAVASCRIPT)
                trajectory = gr.HTML("", css_template=views.CSS)
        outputs = [state, numbers, attention, trajectory, plain]
        adding = add.click(_in_words(add_turn), [audio, speaker, state], [audio, *outputs], api_name="add_turn")
        playing = sample.click(play_sample, None, outputs, api_name="play_sample")
        channels.input(choose_channels, [channels, state], state, api_name="choose_channels")
        reset.click(start_over, None, [audio, *outputs, channels], api_name="start_over", cancels=[adding, playing])

        def forget(request: gr.Request) -> None:
            # gradio itself keeps a closed session for an hour.
            page.state_holder.session_data.pop(request.session_hash, None)

        page.unload(forget)
    return page.queue(max_size=queue_size, default_concurrency_limit=CONCURRENCY)


def _in_words(handler: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Errors as sentences for the visitor; one that is not the visitor's fault is logged for the operator."""

    def answer(path: str | None, speaker: str, conversation: Conversation | None) -> tuple[Any, ...]:
        try:
            return handler(path, speaker, conversation)
        except TurnError as error:
            raise gr.Error(escape(str(error), quote=False), print_exception=False, title="No numbers") from error
        except Exception as error:
            logger.exception("a turn could not be scored")
            sentence = "This turn could not be scored, for a reason that is not in the file. Try again."
            raise gr.Error(sentence, print_exception=False, title="No numbers") from error

    return answer
