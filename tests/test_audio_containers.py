"""What sound a file holds, whatever its header says: all of it, as ffmpeg decodes it, or a sentence."""

import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest

from modeling_mamba_ema.audio_files import AudioFileError, Recording, check_audio, load_audio
from tests.support.audio_formats import EVERY_SUBTYPE, FORMATS, RATE, changed, saved, written

pytest.importorskip("imageio_ffmpeg")
MP3 = ("-q:a", "6", "-ar", "44100", "-f", "mp3")


def from_pipe(path, content):
    """A pipe that gives this content to whoever opens it."""
    os.mkfifo(path)
    threading.Thread(target=path.write_bytes, args=(content,), daemon=True).start()
    return path


@pytest.mark.parametrize("name", [*FORMATS, *EVERY_SUBTYPE])
def test_all_sound_of_a_file_is_read_from_path_bytes_and_pipe_as_ffmpeg_decodes_it(tmp_path, name):
    case = {**FORMATS, **EVERY_SUBTYPE}[name]
    path = tmp_path / "speech.bin"
    path.write_bytes(case.content)
    with Recording(path) as recording:
        decoded = recording.decode()
        wanted = case.samples(recording.sampling_rate)
        cut = recording.decode(0.5, 0.9)
    assert abs(len(decoded) - len(wanted)) <= (0 if case.by_ffmpeg and case.tolerance < 0.02 else RATE * 0.02)
    length = min(len(decoded), len(wanted))
    error = np.sqrt(np.square(decoded[:length] - wanted[:length]).mean() / np.square(wanted).mean())
    assert error <= case.tolerance
    first = round(0.5 * recording.sampling_rate)
    np.testing.assert_allclose(cut, decoded[first : first + len(cut)], atol=1e-6)
    waveform = load_audio(path)
    np.testing.assert_array_equal(load_audio(case.content), waveform)
    np.testing.assert_array_equal(load_audio(from_pipe(tmp_path / "pipe", case.content)), waveform)
    check_audio(path)


# The others do not say how long they are, and may end after any frame.
CUT = [*EVERY_SUBTYPE, "mp3 vbr", "mp3 cbr", "mp3 joined", "mp3 in wav", "flac from a pipe", "ogg", "opus"]


@pytest.mark.parametrize("name", CUT)
def test_a_file_that_is_cut_off_is_refused(name):
    content = {**FORMATS, **EVERY_SUBTYPE}[name].content
    for length in (len(content) * 2 // 3, len(content) - 300):
        with pytest.raises(AudioFileError, match="the audio (is truncated|cannot be decoded|is no audio file)"):
            load_audio(content[:length])


DAMAGED = {
    "3 GiB of which little is left": (
        lambda: changed(written("W64"), written("W64").index(b"data") + 16, (3 << 30).to_bytes(8, "little")),
        "is truncated: 38400 of 3221225448 bytes of sound were found",
    ),
    "sound of nobody behind": (lambda: written("WAV") + b"\1" * 9_000, "is damaged: 9000 bytes after byte"),
    "mp3 with a hole": (lambda: changed(saved(*MP3), 5_000, bytes(2_000)), "is damaged at byte"),
    "two rates": (lambda: saved(*MP3) + saved("-f", "mp3"), "recordings of different kinds one after the other"),
    "sound in two chunks": (lambda: written("WAV") + written("WAV")[36:], "has its sound in several chunks"),
    "no sound": (lambda: written("WAV")[:36], "its header is cut off or damaged"),
    "video": (lambda: b"RIFF\0\0\0\0AVI " + bytes(100), "its header is cut off or damaged"),
    "shorten": (lambda: b"NIST_1A\n   1024\nsample_coding -s26 pcm,embedded-shorten-v2.00", "convert it by sph2pipe"),
    "mp3 in mp4": (lambda: saved("-c:a", "libmp3lame", "-f", "mp4"), r"is no audio file .*ffmpeg -i IN out\.wav"),
    "mp3 in mov": (lambda: saved("-c:a", "libmp3lame", "-f", "mov"), r"is no audio file .*ffmpeg -i IN out\.wav"),
    "aac": (lambda: saved("-c:a", "aac", "-f", "adts"), "is no audio file that can be read .WAV.*ffmpeg -i IN out.wav"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_or_of_another_kind_is_refused_with_the_way_out(name):
    make, message = DAMAGED[name]
    with pytest.raises(AudioFileError, match=message):
        load_audio(make())


SAME = {  # files of one waveform, and how far 8 bits, mu-law or MP3 may be from it, relative RMS
    "headers/pluck-pcm*": 0.04,
    "headers/pluck-?law.*": 0.02,
    "headers/test-44100Hz-?e-1ch-4bytes*": 1e-6,
    "speech/bit_depths/tests/audio-*bit-44100Hz.*": 0.07,
    "speech/codecs/whatstheweatherlike*": 0.04,
}


@pytest.mark.parametrize("pattern", SAME)
def test_real_files_of_one_waveform_give_the_same_samples_or_a_sentence(pattern):
    if "MAMBA_EMA_TEST_DATA" not in os.environ:
        pytest.skip("MAMBA_EMA_TEST_DATA names no folder with odd_audio/")
    waveforms = []
    for path in sorted((Path(os.environ["MAMBA_EMA_TEST_DATA"]) / "odd_audio").glob(pattern)):
        if re.search("early-eof|incomplete", path.name):
            with pytest.raises(AudioFileError, match="is truncated|is cut off or damaged"):
                load_audio(path)
            continue
        waveforms.append(load_audio(path))
    assert len(waveforms) >= 3
    for waveform in waveforms:
        error = np.sqrt(np.square(waveform - waveforms[0]).mean() / np.square(waveforms[0]).mean())
        assert error <= SAME[pattern]
