"""Noise, rooms, bands and levels of synthetic recordings."""

import numpy as np
import pytest

from modeling_mamba_ema.data.recording_conditions import (
    BANDS,
    NOISES,
    RecordingConditions,
    band_pass,
    draw_conditions,
    level_of_speech,
    make_noise,
    record,
    reverberate,
)

RATE = 16_000


@pytest.fixture
def generator():
    return np.random.default_rng(0)


@pytest.fixture
def speech(generator):
    """Three bursts of coloured noise with pauses between them."""
    bursts = [np.convolve(generator.normal(size=12_000), np.ones(4) / 4, "same"), np.zeros(6_000)]
    return 0.1 * np.concatenate([*bursts, *bursts, *bursts])


def decibels(power):
    return 10 * np.log10(power)


@pytest.mark.parametrize("kind", NOISES)
@pytest.mark.parametrize("snr_db", [0.0, 15.0])
def test_noise_has_the_ratio_that_was_asked_for(speech, generator, kind, snr_db):
    heard = record(speech, RATE, RecordingConditions(noise=kind, snr_db=snr_db, level_db=-40), generator)
    gain = heard @ speech / (speech @ speech)
    noise = heard / gain - speech
    assert decibels(level_of_speech(speech, RATE) ** 2 / np.mean(noise**2)) == pytest.approx(snr_db, abs=0.5)
    assert np.mean(noise[speech == 0] ** 2) > 0.5 * np.mean(noise**2)  # in the pauses too


@pytest.mark.parametrize(("kind", "slope"), [("white", 0.0), ("pink", -3.0)])
def test_white_noise_is_flat_and_pink_noise_falls_by_3_db_an_octave(generator, kind, slope):
    power = np.abs(np.fft.rfft(make_noise(kind, np.zeros(2**18), generator))) ** 2
    octaves = [power[2**k : 2 ** (k + 1)].mean() for k in range(10, 16)]
    assert np.diff(decibels(np.array(octaves))) == pytest.approx(slope, abs=0.5)


def test_speech_shaped_noise_has_the_spectrum_of_the_speech(speech, generator):
    sounds = speech, make_noise("speech-shaped", speech, generator)
    power = [np.mean(np.abs(np.fft.rfft(sound.reshape(-1, 1000))) ** 2, axis=0)[1:] for sound in sounds]
    spectra = [decibels(values.reshape(20, -1).mean(axis=1)) for values in power]
    assert np.corrcoef(*spectra)[0, 1] > 0.95


def test_an_unknown_noise_is_refused_with_those_that_are_known(speech, generator):
    with pytest.raises(ValueError, match="noise is 'brown'; allowed are white, pink"):
        make_noise("brown", speech, generator)


@pytest.mark.parametrize("seconds", [0.2, 0.5])
def test_the_sound_of_a_room_falls_by_60_db_in_its_time(generator, seconds):
    click = np.zeros(RATE)
    click[0] = 1.0
    tail = reverberate(click, RATE, seconds, generator)[1:]
    early, late = (np.mean(tail[int(s * RATE) : int((s + 0.03) * RATE)] ** 2) for s in (0.05, 0.05 + seconds / 3))
    assert decibels(late / early) == pytest.approx(-20, abs=4)
    assert reverberate(click, RATE, seconds, generator)[0] == pytest.approx(1.0)


@pytest.mark.parametrize("band", [name for name, limits in BANDS.items() if limits])
def test_a_band_keeps_what_lies_inside_and_nothing_else(generator, band):
    low, high = BANDS[band]
    kept = band_pass(generator.normal(size=2**16), RATE, low, high)
    power, frequencies = np.abs(np.fft.rfft(kept)) ** 2, np.fft.rfftfreq(2**16, 1 / RATE)
    inside = power[(frequencies > 1.05 * low) & (frequencies < 0.95 * high)].mean()
    outside = power[(frequencies < 0.8 * low) | (frequencies > 1.2 * high)].mean()
    assert decibels(outside / inside) < -40


def test_a_recording_has_its_level_and_length_whatever_the_speech(speech, generator):
    for level_db in (-36.0, -20.0):
        conditions = RecordingConditions("pink", 10.0, 0.3, "telephone", level_db)
        for gain in (0.01, 1.0):
            heard = record(gain * speech, RATE, conditions, generator)
            assert heard.shape == speech.shape
            assert heard.dtype == np.float32
            assert decibels(np.mean(heard.astype(float) ** 2)) == pytest.approx(level_db, abs=0.1)


def test_clean_and_silent_recordings_are_possible(generator):
    assert not record(np.zeros(RATE), RATE, RecordingConditions("white", 10.0), generator).any()
    drawn = [draw_conditions(generator) for _ in range(200)]
    assert {conditions.noise for conditions in drawn} == {None, *NOISES}
    assert {conditions.band for conditions in drawn} == set(BANDS)
    assert all((conditions.noise is None) == (conditions.snr_db is None) for conditions in drawn)
    assert 0.3 < np.mean([conditions.reverberation == 0 for conditions in drawn]) < 0.7
