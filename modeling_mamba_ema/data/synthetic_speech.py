"""Speech from eSpeak NG, which the wheel `espeakng-loader` holds: no system package, and nothing is downloaded."""

import ctypes
from html import escape

import numpy as np
import soxr

SAMPLING_RATE = 16_000  # Hz, of what `Synthesizer.speak` returns

# From eSpeak NG's speak_lib.h
_AUDIO_OUTPUT_SYNCHRONOUS = 2  # samples go to a callback before the call returns, not to a sound card
_CHARS_UTF8 = 1
_SSML = 0x10
_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # words a minute; 0..200; 0..100; 0..100

_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Synthesizer:
    """One eSpeak NG engine; the library holds its state in globals, so make one a process.

    Raises:
        ImportError: `espeakng-loader` is not installed.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise ImportError(
                "synthetic speech needs espeakng-loader (the extra `demo`): pip install espeakng-loader"
            ) from error
        self._library = ctypes.CDLL(str(espeakng_loader.get_library_path()))
        self._data = str(espeakng_loader.get_data_path()).encode()
        # eSpeak NG seeds C's random numbers, which it uses for breath and jitter, from the clock.
        self._seed_random = ctypes.CDLL(None).srand
        self._chunks: list[np.ndarray] = []
        self._callback = _Callback(self._receive)  # kept: ctypes frees a callback nobody holds

    def _restart(self) -> int:
        """Start afresh, for one phrase leaves traces in the next; returns the engine's sampling rate in Hz."""
        self._library.espeak_Terminate()
        rate = self._library.espeak_Initialize(_AUDIO_OUTPUT_SYNCHRONOUS, 0, self._data, 0)
        if rate <= 0:
            raise RuntimeError(f"eSpeak NG did not start (code {rate}) with the data of espeakng-loader")
        self._library.espeak_SetSynthCallback(self._callback)
        self._chunks.clear()
        self._seed_random(0)
        return rate

    def _receive(self, samples, count: int, _events) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def speak(
        self, text: str, voice: str, rate: float, pitch: float, pitch_range: float, formants: float = 1.0
    ) -> np.ndarray:
        """Say plain text: (samples,) float32 within [-1, 1] at 16 kHz, without leading and trailing silence.

        Args:
            voice: language and variant, such as `"en-us+f2"`.
            rate: words a minute, 80 to 450.
            pitch: base pitch, 0 to 100.
            pitch_range: how far intonation moves the pitch, 0 to 100.
            formants: factor of all frequencies, of the pitch too; the rate stays as it is.

        Raises:
            RuntimeError: the engine does not start.
            ValueError: there is no such voice.
        """
        rate_of_engine = self._restart()
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"eSpeak NG has no voice {voice!r}")
        for parameter, value in ((_RATE, rate / formants), (_PITCH, pitch), (_RANGE, pitch_range), (_VOLUME, 100)):
            self._library.espeak_SetParameter(parameter, round(value), 0)
        markup = f"<speak>{escape(text)}</speak>".encode()
        self._library.espeak_Synth(markup, len(markup) + 1, 0, 1, 0, _CHARS_UTF8 | _SSML, None, None)
        speech = np.concatenate(self._chunks).astype(np.float32) / 2**15
        loud = np.flatnonzero(np.abs(speech) > 1e-3)
        return soxr.resample(speech[loud[0] : loud[-1] + 1], rate_of_engine * formants, SAMPLING_RATE)
