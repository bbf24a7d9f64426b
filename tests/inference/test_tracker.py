"""Live conversations: the numbers of the whole conversation, one turn at a time, kept apart from each other."""

import functools
import json

import numpy as np
import pytest
import soundfile as sf
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from modeling_mamba_ema import InvalidAudioError, MambaEMAFeatureExtractor
from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.sample import load_sample_conversation
from tests.support.models import pretrained_model, tiny_model
from tests.support.programs import in_threads

RATE = 16_000


def speech(seed: int, turns: int, low: int = 2_000, high: int = 9_000) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [random.normal(0, 0.1, random.integers(low, high)).astype(np.float32) for _ in range(turns)]


def tracker(seed: int = 0, **fields) -> EmotionTracker:
    return EmotionTracker(tiny_model(seed=seed, **fields), MambaEMAFeatureExtractor())


def numbers(results) -> np.ndarray:
    return np.array([list(result.values.values()) for result in results])


def followed(live: EmotionTracker, turns: list[np.ndarray]) -> np.ndarray:
    """The numbers of turns that one conversation hears after each other."""
    return numbers([live.update(turn, RATE) for turn in turns])


@pytest.mark.promise("B-19")
@pytest.mark.parametrize("context", ["none", "ema", "mamba", "mamba_ema"])
def test_turn_by_turn_gives_the_numbers_and_attention_of_the_whole_conversation(context):
    live = EmotionTracker(pretrained_model(context=context), MambaEMAFeatureExtractor())
    turns = [turn["waveform"] for turn in load_sample_conversation()][:6]
    results = [live.update(turn, RATE) for turn in turns]
    with torch.inference_mode():
        whole = live.model(**live.feature_extractor([turns], sampling_rate=16_000, return_tensors="pt"))
    np.testing.assert_allclose(numbers(results), whole.logits[0], atol=2e-5)
    assert [result.turn for result in results] == [1, 2, 3, 4, 5, 6]
    for number, result in enumerate(results):
        frames = result.attention.shape[1]
        np.testing.assert_allclose(result.attention, whole.pooling_attentions[0, number, :, :frames], atol=2e-5)
        np.testing.assert_allclose(result.attention.sum(axis=1), 1, atol=1e-5)
        assert result.seconds == turns[number].size / 16_000


def test_results_carry_both_scales_the_speaker_and_plain_values():
    live = tracker(label_ranges={"valence": (1, 7)})
    result = live.update(speech(0, 1)[0], RATE, speaker="anna")
    assert result.label_values["valence"] == pytest.approx(1 + 6 * result.values["valence"], abs=1e-5)
    assert result.label_values["arousal"] == pytest.approx(result.values["arousal"])
    read_back = json.loads(json.dumps(result.to_dict()))
    assert read_back["speaker"] == "anna"
    assert read_back["values"] == result.values


def test_the_speakers_name_changes_no_number():
    turns = speech(1, 4)
    named, unnamed = tracker(), tracker()
    first = [named.update(turn, RATE, speaker=name) for turn, name in zip(turns, "abab")]
    assert np.array_equal(numbers(first), followed(unnamed, turns))


NAMES = ["anna", "ben", None, "anna", "ben", "anna", ""]
IDS = [[0, 1, -1, 0, 1, 0, -1]]


@pytest.mark.parametrize("scope", ["speaker", "both"])
def test_each_speaker_has_the_state_of_their_name_as_in_the_whole_conversation(scope, tmp_path):
    live, turns = tracker(context_scope=scope), speech(0, len(NAMES))
    with torch.inference_mode():
        features = live.feature_extractor([turns], sampling_rate=RATE, return_tensors="pt")
        whole = live.model(**features, speaker_ids=torch.tensor(IDS)).logits[0]
    results = []
    for number, (turn, name) in enumerate(zip(turns, NAMES)):
        if number == 4:  # names are kept with the state
            live.save(tmp_path / "state.safetensors")
            live = tracker(context_scope=scope)
            live.restore(tmp_path / "state.safetensors")
        results.append(live.copy().update(turn, RATE, speaker=name))
        assert numbers([live.update(turn, RATE, speaker=name)]).tolist() == numbers(results[-1:]).tolist()
    np.testing.assert_allclose(numbers(results), whole, atol=2e-5)

    # Renamed and permuted speakers have the same numbers; one voice for all has others.
    for names, same in ((["x", "anna", None, "x", "anna", "x", None], True), (["anna"] * len(turns), False)):
        other = tracker(context_scope=scope)
        given = numbers([other.update(turn, RATE, speaker=name) for turn, name in zip(turns, names)])
        assert np.array_equal(given, numbers(results)) is same


def test_in_a_batch_of_conversations_each_has_its_own_speakers():
    model, extractor = tiny_model(context_scope="both"), MambaEMAFeatureExtractor()
    names, conversations = ["abab", "bbaa"], [speech(seed, 4) for seed in range(2)]
    batched, alone = ([EmotionTracker(model, extractor) for _ in names] for _ in range(2))
    for step in range(4):
        turns = [(conversation[step], spoken[step]) for conversation, spoken in zip(conversations, names)]
        got = EmotionTracker.update_batch([(mine, *turn) for mine, turn in zip(batched, turns)], RATE)
        wanted = [other.update(audio, RATE, speaker=name) for other, (audio, name) in zip(alone, turns)]
        np.testing.assert_allclose(numbers(got), numbers(wanted), atol=2e-5)


def test_the_speaker_silent_longest_gives_way_and_begins_anew():
    spoken = ["anna", "ben", "anna", "cleo", "anna", "ben", "cleo"]
    meant = ["anna", "ben", "anna", "cleo", "anna", "ben again", "cleo again"]
    few, many = (tracker(context_scope="speaker", max_speakers=count) for count in (2, 8))
    for turn, name, whose in zip(speech(4, 7), spoken, meant):
        heard, wanted = few.update(turn, RATE, speaker=name), many.update(turn, RATE, speaker=whose)
        np.testing.assert_allclose(numbers([heard]), numbers([wanted]), atol=1e-6)
        assert heard.baseline_turns == wanted.baseline_turns


def test_values_stand_beside_their_difference_to_the_speakers_own_slow_average(tmp_path):
    live, turns = tracker(), speech(7, 60, 400, 900)
    names = ["anna" if number % 3 else "ben" for number in range(60)]
    heard = [live.update(turn, RATE, speaker=name) for turn, name in zip(turns, names)]
    for name in ("anna", "ben"):
        average, own = None, [result for result in heard if result.speaker == name]
        for count, result in enumerate(own):
            value = result.values["arousal"]
            assert result.baseline_turns == count
            if average is None:
                assert result.differences is None
                average = value
                continue
            assert result.differences["arousal"] == pytest.approx(value - average, abs=1e-9)
            # The mean of the turns so far, and after 20 of them a moving average.
            if count < 20:
                average = np.mean([other.values["arousal"] for other in own[: count + 1]])
            else:
                average += (value - average) / 20
    live.save(tmp_path / "state.safetensors")
    restored = tracker()
    restored.restore(tmp_path / "state.safetensors")
    quiet = np.full(800, 1e-5, dtype=np.float32)
    quiet[::2] *= -1
    for other in (live, restored):
        assert other.update(quiet, RATE, speaker="anna").baseline_turns == 40
        after = other.update(turns[0], RATE, speaker="anna")
        assert after.baseline_turns == 40  # near silence says nothing of a voice
    assert live.update(turns[0], RATE).differences is None


def test_conversations_interleaved_on_one_model_do_not_touch_each_other():
    turns = [speech(seed, 50, 400, 2_000) for seed in (1, 2)]
    model, extractor = tiny_model(), MambaEMAFeatureExtractor()
    pair = [EmotionTracker(model, extractor) for _ in turns]
    together = [[], []]
    for step in range(50):
        for index in (0, 1):
            together[index].append(pair[index].update(turns[index][step], RATE))
    for heard, conversation in zip(together, turns):
        assert np.array_equal(numbers(heard), followed(EmotionTracker(model, extractor), conversation))


def test_conversations_in_threads_on_one_model_do_not_touch_each_other():
    model, extractor = tiny_model(), MambaEMAFeatureExtractor()
    jobs = [
        functools.partial(followed, EmotionTracker(model, extractor), speech(seed, 20, 400, 2_000)) for seed in range(4)
    ]
    for seed, heard in enumerate(in_threads(jobs)):
        assert np.array_equal(heard, followed(EmotionTracker(model, extractor), speech(seed, 20, 400, 2_000)))


@pytest.mark.parametrize("context", ["none", "mamba_ema"])
def test_a_batch_over_conversations_gives_each_its_own_numbers_at_whatever_turn_it_stands(context):
    model, extractor = tiny_model(context=context), MambaEMAFeatureExtractor()
    conversations = [speech(seed, 5) for seed in range(3)]
    batched = [EmotionTracker(model, extractor) for _ in conversations]
    alone = [EmotionTracker(model, extractor) for _ in conversations]
    for step in range(5):
        # Conversation 2 joins late and conversation 0 leaves early: their states are at different turns.
        active = [index for index in range(3) if (index != 2 or step >= 2) and (index != 0 or step < 4)]
        got = EmotionTracker.update_batch([(batched[i], conversations[i][step], f"s{i}") for i in active], RATE)
        wanted = [alone[i].update(conversations[i][step], RATE, speaker=f"s{i}") for i in active]
        np.testing.assert_allclose(numbers(got), numbers(wanted), atol=2e-5)
        for mine, other in zip(got, wanted):
            assert (mine.turn, mine.speaker, mine.seconds) == (other.turn, other.speaker, other.seconds)
            np.testing.assert_allclose(mine.attention, other.attention, atol=2e-5)


BAD = {
    "empty": np.zeros(0, dtype=np.float32),
    "short": np.zeros(399, dtype=np.float32),
    "nan": np.array([0.1] * 500 + [np.nan] * 5),
    "long": np.zeros(16_000 * 31, dtype=np.float32),
    "stereo": np.zeros((2, 8_000), dtype=np.float32),
    "text": "https://example.org/a.wav",
    "missing": "no-such-file.wav",
    "none": None,
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_a_bad_turn_is_refused_and_leaves_the_conversation_as_it_was(bad):
    turns = speech(3, 3)
    live, undisturbed = tracker(), tracker()
    for turn in turns:
        with pytest.raises((InvalidAudioError, TypeError)) as caught:
            live.update(bad, RATE)
        assert len(str(caught.value)) < 300
        assert np.array_equal(followed(live, [turn]), followed(undisturbed, [turn]))
    assert live.num_turns == 3


def test_a_url_is_refused_as_one():
    for address in ("https://example.org/a.wav", "file:///a.wav"):
        with pytest.raises(InvalidAudioError, match="URL; only local files are opened"):
            tracker().update(address)


def test_a_bad_turn_in_a_batch_is_named_and_no_conversation_advances():
    model, extractor = tiny_model(), MambaEMAFeatureExtractor()
    pair = [EmotionTracker(model, extractor) for _ in range(2)]
    turns = speech(4, 2)
    with pytest.raises(InvalidAudioError, match="utterance 1 has 399 samples"):
        EmotionTracker.update_batch([(pair[0], turns[0], None), (pair[1], np.full(399, 0.1), None)], RATE)
    assert [live.num_turns for live in pair] == [0, 0]
    assert np.array_equal(*(followed(live, turns[:1]) for live in pair))


def test_a_batch_that_makes_no_sense_is_refused():
    one, other = tracker(), tracker(seed=1)
    turn = speech(5, 1)[0]
    with pytest.raises(ValueError, match="no turns"):
        EmotionTracker.update_batch([])
    with pytest.raises(ValueError, match="twice"):
        EmotionTracker.update_batch([(one, turn, None), (one, turn, None)])
    with pytest.raises(ValueError, match="share one model"):
        EmotionTracker.update_batch([(one, turn, None), (other, turn, None)])


def test_a_model_in_training_mode_is_refused():
    live = tracker()
    live.model.train()
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        live.update(speech(0, 1)[0], RATE)


def test_reset_begins_anew_and_a_copy_goes_its_own_way():
    turns = speech(6, 4)
    live = tracker()
    first = followed(live, turns[:2])
    branch = live.copy()
    assert np.array_equal(followed(branch, turns[2:]), followed(live, turns[2:]))
    branch.reset()
    assert branch.num_turns == 0
    assert np.array_equal(followed(branch, turns[:2]), first)
    assert live.num_turns == 4


@pytest.mark.parametrize("context", ["none", "mamba_ema"])
@pytest.mark.parametrize("heard", [0, 3])
def test_a_saved_conversation_continues_with_bitwise_the_same_numbers(tmp_path, context, heard):
    turns = speech(7, 5)
    live = tracker(context=context)
    followed(live, turns[:heard])
    live.save(tmp_path / "state.safetensors")
    later = tracker(context=context)
    later.update(turns[4], RATE)
    later.restore(tmp_path / "state.safetensors")
    assert later.num_turns == heard
    assert np.array_equal(followed(later, turns[heard:]), followed(live, turns[heard:]))
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_a_state_of_another_model_or_a_damaged_one_is_refused_and_changes_nothing(tmp_path):
    turns = speech(8, 2)
    live, other = tracker(), tracker(seed=1)
    live.update(turns[0], RATE)
    path = tmp_path / "state.safetensors"
    live.save(path)
    with pytest.raises(ValueError, match="another model"):
        other.restore(path)

    content = path.read_bytes()
    (tmp_path / "half").write_bytes(content[: len(content) // 2])
    (tmp_path / "text").write_text("no state")
    save_file({"a": torch.zeros(1)}, tmp_path / "weights")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file({**tensors, "ema": tensors["ema"] * torch.nan}, tmp_path / "nan", file.metadata())
        save_file({**tensors, "extra": torch.zeros(1)}, tmp_path / "extra", file.metadata())
        about = {**json.loads(file.metadata()["mamba_ema"]), "speakers": {"anna": {"place": 0}}}
        save_file(tensors, tmp_path / "speakers", {"mamba_ema": json.dumps(about)})
    for name in ("half", "text", "weights", "nan", "extra", "speakers", "absent"):
        with pytest.raises(ValueError, match=r"state|does not exist|damaged"):
            live.restore(tmp_path / name)
    assert np.array_equal(followed(live, turns[1:]), followed(tracker(), turns)[1:])


def test_the_state_does_not_grow_with_the_conversation(tmp_path):
    live = tracker()
    sizes = set()
    for turn in speech(9, 30, 400, 800):
        live.update(turn, RATE)
        live.save(tmp_path / "state.safetensors")
        sizes.add((tmp_path / "state.safetensors").stat().st_size)
    assert len(sizes) == 1


def test_files_and_other_rates_are_read(tmp_path):
    path = tmp_path / "turn.wav"
    turn, other = speech(10, 2, 8_000, 8_001)
    sf.write(path, turn, 16_000, subtype="FLOAT")
    wanted = followed(tracker(), [turn])
    for file in (path, str(path), path.read_bytes()):
        assert np.array_equal(numbers([tracker().update(file)]), wanted)
    sf.write(path, np.stack([other, turn], axis=1), 16_000, subtype="FLOAT")
    assert np.array_equal(numbers([tracker().update(path, channel=2)]), wanted)
    with pytest.raises(ValueError, match="channel of a file"):
        tracker().update(turn, RATE, channel=1)
    slow = np.sin(np.arange(8_000) * 0.3)
    result = tracker().update(slow, sampling_rate=8_000)
    assert result.seconds == 1.0


def test_a_waveform_without_its_rate_is_refused():
    with pytest.raises(ValueError, match="sampling_rate is missing"):
        tracker().update(speech(0, 1)[0])
    with pytest.raises(ValueError, match="sampling_rate is missing"):
        EmotionTracker.update_batch([(tracker(), speech(0, 1)[0], None)])


def test_silence_is_flagged():
    live = tracker()
    assert live.update(np.full(8_000, 1e-5), RATE).low_level is True
    assert live.update(speech(0, 1)[0], RATE).low_level is False


def test_a_saved_model_is_followed_by_name_and_an_incomplete_one_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    turn = speech(11, 1)[0]
    live = EmotionTracker.from_pretrained(tmp_path)
    assert live.labels == ["valence", "arousal"]
    assert np.array_equal(followed(live, [turn]), followed(tracker(), [turn]))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["head.out_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*head.out_proj.weight"):
        EmotionTracker.from_pretrained(tmp_path)


def test_what_is_no_model_or_no_device_is_refused_with_a_reason(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    with pytest.raises(ValueError, match="has no device 'toaster' that torch can use; it has cpu"):
        EmotionTracker.from_pretrained(tmp_path / "model", device="toaster")
    weights.write_bytes(weights.read_bytes()[:1_000])
    with pytest.raises(OSError, match="weights of .* are damaged"):
        EmotionTracker.from_pretrained(tmp_path / "model")
    with pytest.raises(OSError, match="neither an existing folder nor a name on the Hub"):
        EmotionTracker.from_pretrained(tmp_path / "absent")
    tiny_model().speech_encoder.backbone.save_pretrained(tmp_path / "wavlm")
    with pytest.raises(ValueError, match="type 'wavlm'; a 'mamba_ema' is needed"):
        EmotionTracker.from_pretrained(tmp_path / "wavlm")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("config.json", {"dtype": "float33"}, "holds a value that cannot be used"),
        ("config.json", {"speech_encoder_config": None}, "has another shape than its config.json asks for"),
        ("config.json", [], "holds a value that cannot be used"),
        ("preprocessor_config.json", [], "holds a value that cannot be used"),
        ("preprocessor_config.json", {"max_seconds": "30"}, "max_seconds is '30'; allowed are"),
    ],
)
def test_a_settings_file_that_does_not_belong_to_the_weights_is_refused_with_a_reason(tmp_path, name, text, says):
    tiny_model().save_pretrained(tmp_path)
    MambaEMAFeatureExtractor().save_pretrained(tmp_path)
    path = tmp_path / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **text} if isinstance(text, dict) else text))
    with pytest.raises(ValueError, match=says):
        EmotionTracker.from_pretrained(tmp_path)
