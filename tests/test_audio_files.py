"""Reading audio files: formats, stretches, rates, and files that cannot be right."""

import struct
import sys

import numpy as np
import pytest
import soundfile as sf

from modeling_mamba_ema.audio_files import AudioFileError, Recording, audio_seconds, check_audio, load_audio
from tests.support.programs import allocating_below

RATE = 16_000


def tone(seconds=1.0, rate=RATE, hertz=440):
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def noise(seed, seconds=1.0):
    return np.random.default_rng(seed).normal(0, 0.1, int(seconds * RATE)).clip(-0.9, 0.9).astype(np.float32)


@pytest.mark.parametrize(("name", "tolerance"), [("a.wav", 1e-4), ("a.flac", 1e-4), ("a.ogg", 0.05), ("a.mp3", 0.05)])
def test_the_usual_formats_are_read(tmp_path, name, tolerance):
    sf.write(tmp_path / name, tone(), RATE)
    read = load_audio(tmp_path / name)
    assert read.dtype == np.float32
    np.testing.assert_allclose(read[2_000:14_000], tone()[2_000:14_000], atol=tolerance)
    assert audio_seconds(tmp_path / name) == pytest.approx(1.0, abs=0.1)


def test_a_stretch_is_cut_out(tmp_path):
    sf.write(tmp_path / "a.wav", tone(2.0), RATE, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", 0.5, 1.25), tone(2.0)[8_000:20_000])
    np.testing.assert_array_equal(load_audio(tmp_path / "a.wav", start=1.5), tone(2.0)[24_000:])


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_other_rates_are_resampled(tmp_path, rate):
    sf.write(tmp_path / "a.wav", tone(rate=rate), rate, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav")[1_000:15_000], tone()[1_000:15_000], atol=5e-3)


def test_channels_are_averaged_or_one_is_chosen(tmp_path):
    path = tmp_path / "a.wav"
    channels = np.stack([tone(), noise(1)], axis=1)
    sf.write(path, channels, RATE, subtype="FLOAT")
    np.testing.assert_array_equal(load_audio(path, channel=1), channels[:, 0])
    np.testing.assert_array_equal(load_audio(path, 0.25, 0.5, channel=2), channels[4_000:8_000, 1])
    with Recording(path, channel=2) as recording:
        np.testing.assert_array_equal(np.concatenate(list(recording.blocks(512))), channels[:, 1])
    with pytest.warns(UserWarning, match="different sound"):
        np.testing.assert_allclose(load_audio(path), channels.mean(axis=1), atol=1e-6)
    for channel in (0, 3, -1, True, 1.5, "1"):
        with pytest.raises(AudioFileError, match=f"a.wav has the channels 1 to 2, no channel {channel}"):
            load_audio(path, channel=channel)


@pytest.mark.parametrize(
    ("other", "differs"),
    [
        (lambda sound: sound, False),
        (lambda sound: 0.3 * sound + 0.1 * noise(2), False),
        (lambda sound: 0 * sound, False),
        (lambda sound: 0.01 * noise(2), False),  # -30 dB: the noise of a channel nobody speaks on
        (lambda sound: noise(2), True),
        (lambda sound: -sound, True),
    ],
    ids=["the same", "an echo", "silent", "nearly silent", "somebody else", "turned round"],
)
def test_channels_that_hold_different_sound_are_warned_of_once_a_file(tmp_path, recwarn, other, differs):
    path = tmp_path / "call.wav"
    sf.write(path, np.stack([noise(1), other(noise(1))], axis=1), RATE, subtype="FLOAT")
    with Recording(path) as recording:
        for start in (0.0, 0.5):
            recording.read(start, start + 0.5)
        list(recording.blocks(512))
    load_audio(path, channel=2)
    told = [str(warning.message) for warning in recwarn if "call.wav" in str(warning.message)]
    assert len(told) == differs
    assert all("channel=1" in text and "--channel 1" in text for text in told)


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.mp3"])
def test_paths_bytes_and_file_objects_give_the_same_samples_whole_and_in_part(tmp_path, name):
    path = tmp_path / name
    sf.write(path, noise(1), 44_100)
    wanted = load_audio(path)
    with path.open("rb") as file:
        for source in (path, str(path), path.read_bytes(), bytearray(path.read_bytes()), file):
            np.testing.assert_array_equal(load_audio(source), wanted)
    for source in (path, path.read_bytes()):
        with Recording(source) as recording:
            assert (recording.channels, recording.sampling_rate) == (1, 44_100)
            part = recording.read(0.1, 0.2)
            blocks = recording.blocks(512)
            first = next(blocks)
            np.testing.assert_allclose(recording.read(0.1, 0.2), part, atol=1e-6)  # between two blocks
            np.testing.assert_allclose(np.concatenate([first, *blocks]), wanted, atol=1e-3)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32"])
@pytest.mark.parametrize("channels", [1, 2])
def test_without_soundfile_pcm_wav_gives_the_same_samples_and_the_same_sentences(
    tmp_path, monkeypatch, subtype, channels
):
    path = tmp_path / "a.wav"
    sf.write(path, np.stack([noise(1)] * channels, axis=1), RATE, subtype=subtype)
    content, piped = path.read_bytes(), bytearray(path.read_bytes())
    piped[40:44] = b"\xff" * 4  # a length that the writer could not know
    cases = [
        lambda: load_audio(path),
        lambda: load_audio(bytes(piped)),
        lambda: load_audio(path, 0.25, 0.5, channel=1),
        lambda: load_audio(content[:-100]),
        lambda: load_audio(path, max_seconds=0.5),
        lambda: load_audio(path, channel=3),
        lambda: load_audio(content, 2.0, 3.0),
        lambda: load_audio(tmp_path),
    ]

    def answers():
        for case in cases:
            try:
                yield case().tolist()
            except AudioFileError as error:
                yield str(error)

    wanted = list(answers())
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert list(answers()) == wanted
    for other in (b"", b"RIFF" + content[8:], b"x" * 1_000, b"fLaC" + content):
        with pytest.raises(AudioFileError, match="no PCM WAV.*pip install soundfile soxr .the extra `tools`."):
            load_audio(other)


def test_what_is_no_audio_is_refused_by_its_kind(tmp_path):
    with pytest.raises(AudioFileError, match="is a folder, no audio file"):
        load_audio(tmp_path)
    for address in ("https://example.org/a.wav", "file:///a.wav"):
        with pytest.raises(AudioFileError, match="URL; only local files are opened"):
            load_audio(address)
    with pytest.raises(TypeError, match="given as int; a path, bytes or a binary file object is needed"):
        load_audio(3)
    name = "x" * 80 + ".wav"
    (tmp_path / name).write_text("no audio")
    with pytest.raises(AudioFileError, match="^x{40}…\\.wav is no audio file"):
        load_audio(tmp_path / name)


def wav_header(rate=RATE, channels=1, data_bytes=0):
    return (
        b"RIFF" + struct.pack("<I", 36 + data_bytes) + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * channels * 2, channels * 2, 16)
        + b"data" + struct.pack("<I", data_bytes)
    )  # fmt: skip


@pytest.mark.promise(
    "A-09",
    "damaged and hostile audio files are refused from their header, or when they are scanned",
    "every case; hostile ones under 10 MB of Python's and numpy's memory",
)
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no audio file|no samples"),
        (b"this is a text", "no audio file"),
        (b"RIFF\x00\x00", "no audio file"),
        (wav_header(), "no samples"),
        (wav_header(rate=1, data_bytes=64_000) + bytes(64_000), "claims 1 Hz; allowed are 4000 to 192000"),
        (wav_header(channels=1_000, data_bytes=64_000) + bytes(64_000), "1000 channels; allowed are up to 8"),
    ],
)
def test_a_file_that_is_damaged_or_hostile_is_refused_before_decoding(tmp_path, content, message):
    (tmp_path / "bad.wav").write_bytes(content)
    with allocating_below(10e6), pytest.raises(AudioFileError, match=f"^bad.wav .*({message})"):
        load_audio(tmp_path / "bad.wav")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(AudioFileError, match=r"none.wav does not exist"):
        load_audio(tmp_path / "none.wav")


@pytest.mark.promise("A-09")
def test_truncated_data_is_refused(tmp_path):
    sf.write(tmp_path / "whole.flac", np.random.default_rng(0).normal(0, 0.1, RATE), RATE)
    content = (tmp_path / "whole.flac").read_bytes()
    (tmp_path / "cut.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioFileError, match="cut.flac (is truncated|cannot be decoded)"):
        load_audio(tmp_path / "cut.flac")


@pytest.mark.parametrize("value", [np.nan, np.inf, 200.0])
def test_samples_that_cannot_be_audio_are_refused(tmp_path, value):
    waveform = tone()
    waveform[100] = value
    sf.write(tmp_path / "a.wav", waveform, RATE, subtype="FLOAT")
    with pytest.raises(AudioFileError, match=r"a.wav has a peak of .*; samples must be finite"):
        load_audio(tmp_path / "a.wav")


def test_a_stretch_outside_the_file_is_refused(tmp_path):
    sf.write(tmp_path / "a.wav", tone(), RATE)
    for start, end in ((1.5, 2.0), (0.5, 0.5), (-1.0, 0.5)):
        with pytest.raises(AudioFileError, match="there is nothing between"):
            load_audio(tmp_path / "a.wav", start, end)


def truncated(path):
    sf.write(path, np.zeros(RATE, np.float32), RATE)
    path.write_bytes(path.read_bytes()[:8_000])


def header_with(offset, value):
    def write(path):
        sf.write(path, np.zeros(RATE, np.float32), RATE)
        content = bytearray(path.read_bytes())
        content[offset : offset + len(value)] = value
        path.write_bytes(content)

    return write


BROKEN = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("no audio"),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(5_000)),
    "truncated": truncated,
    "no samples": lambda path: sf.write(path, np.zeros(0, np.float32), RATE),
    "1 Hz": header_with(24, (1).to_bytes(4, "little")),
    "NaN": lambda path: sf.write(path, np.full(RATE, np.nan, np.float32), RATE, subtype="FLOAT"),
    "20 channels": lambda path: sf.write(path, np.zeros((RATE, 20), np.float32), RATE),
    "stereo": lambda path: sf.write(path, np.zeros((RATE, 2), np.float32), RATE),
}


@pytest.mark.promise("E-13", "errors about audio carry no folder of the user and no samples", "every case")
@pytest.mark.parametrize("write", BROKEN.values(), ids=BROKEN.keys())
def test_errors_about_files_name_them_without_their_folder(tmp_path, write):
    path = tmp_path / "home-of-anna" / "call.wav"
    path.parent.mkdir()
    write(path)
    messages = []
    for read in (load_audio, audio_seconds, check_audio, Recording, lambda path: load_audio(path, channel=3)):
        try:
            read(path)
        except AudioFileError as error:
            messages.append(str(error))
    assert messages
    for message in messages:
        assert "call.wav" in message
        assert "home-of-anna" not in message
        assert str(tmp_path) not in message
        assert len(message) < 300
