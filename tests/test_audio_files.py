"""Reading audio files: formats, stretches, rates, and files that cannot be right."""

import struct
import time
import tracemalloc

import numpy as np
import pytest
import soundfile as sf

from modeling_mamba_ema.data.audio import AudioFileError, audio_seconds, load_audio

RATE = 16_000


def tone(seconds=1.0, rate=RATE, hertz=440):
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


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


def test_stereo_is_averaged_only_when_asked(tmp_path):
    sf.write(tmp_path / "a.wav", np.stack([tone(), 0 * tone()], axis=1), RATE, subtype="FLOAT")
    with pytest.raises(AudioFileError, match="2 channels; mono is needed, or downmix=True"):
        load_audio(tmp_path / "a.wav")
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav", downmix=True), tone() / 2, atol=1e-6)


def wav_header(rate=RATE, channels=1, data_bytes=0):
    return (
        b"RIFF" + struct.pack("<I", 36 + data_bytes) + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, channels, rate, rate * channels * 2, channels * 2, 16)
        + b"data" + struct.pack("<I", data_bytes)
    )  # fmt: skip


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
    tracemalloc.start()
    began = time.perf_counter()
    try:
        with pytest.raises(AudioFileError, match=f"^bad.wav .*({message})"):
            load_audio(tmp_path / "bad.wav", downmix=True)
        assert time.perf_counter() - began < 1
        assert tracemalloc.get_traced_memory()[1] < 10_000_000  # of Python's and numpy's memory, not libsndfile's
    finally:
        tracemalloc.stop()


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(AudioFileError, match=r"none.wav is not there"):
        load_audio(tmp_path / "none.wav")


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
