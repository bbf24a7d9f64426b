"""Errors may end in logs and on pages: what they say of a file does not tell where the user keeps it."""

import numpy as np
import pytest
import soundfile as sf

from modeling_mamba_ema.audio_files import AudioFileError, Recording, audio_seconds, check_audio, load_audio

RATE = 16_000


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
