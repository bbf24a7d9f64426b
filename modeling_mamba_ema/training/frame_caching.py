"""Filling a cache of frames before training begins."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import TrainingArguments

from ..data.audio import audio_seconds, load_audio
from ..data.frame_cache import DTYPE, FrameCache, FrameCacheError, Utterance, utterances_of
from ..feature_extraction_mamba_ema import SAMPLING_RATE, InvalidAudioError, MambaEMAFeatureExtractor
from ..modeling_mamba_ema import MambaEMAForRegression
from ..speech_encoder import SpeechEncoder, num_frames

logger = logging.getLogger(__name__)

HEADER_BYTES = 256  # of an entry, beside its values
# A disk that is filled to the last byte breaks other people's programs too.
SPARE_BYTES = 500_000_000


def cache_frames(
    model: MambaEMAForRegression,
    extractor: MambaEMAFeatureExtractor,
    splits: Iterable[Dataset],
    folder: str | Path,
    arguments: TrainingArguments,
) -> FrameCache:
    """Compute the frames that a folder lacks; entries that are there are checked, and damaged ones are made anew.

    Every process of a run calls it, each computes its share, and all return when everything is there.

    Args:
        model: its speech encoder must be frozen; moved to the run's device.
        extractor: the run's.
        splits: rows with `file_name` and, if need be, `start` and `end`.
        folder: of the cache.
        arguments: Trainer's; they know device and processes.

    Raises:
        FrameCacheError: the encoder is not frozen, the disk is too small, or an utterance gives no frames to train on.
        InvalidAudioError, AudioFileError: an utterance that cannot be used.
    """
    check_frozen(model)
    encoder: SpeechEncoder = model.speech_encoder
    cache = FrameCache(folder, encoder, extractor)
    utterances = list(dict.fromkeys(utterance for rows in splits for utterance in utterances_of(rows)))
    seconds = {utterance: _seconds(utterance) for utterance in utterances}
    rank, processes, main_process = arguments.process_index, arguments.world_size, arguments.process_index == 0

    # 1. what is there, and sound
    missing, damaged = [], 0
    for place, utterance in enumerate(
        tqdm(utterances, "checking cached frames", unit=" utterances", disable=not main_process)
    ):
        if not cache.is_there(utterance):
            missing.append(utterance)
        elif place % processes == rank and not cache.is_sound(utterance):
            damaged += 1
            missing.append(utterance)
    if damaged:
        logger.warning("%d cached entries in %s are damaged and are computed anew", damaged, cache.folder)

    # 2. room for what is not
    needed = sum(_entry_bytes(encoder, seconds[utterance]) for utterance in missing)
    free = shutil.disk_usage(cache.root).free
    if main_process:
        logger.info(
            "frames of %d utterances are in %s; computing those of %d more, %.2f GB (%.0f GB are free)",
            len(utterances) - len(missing),
            cache.folder,
            len(missing),
            needed / 1e9,
            free / 1e9,
        )
    if needed > max(free - SPARE_BYTES, 0):
        raise FrameCacheError(
            f"cached frames need {needed / 1e9:.2f} GB, but the disk of {cache.root} has {free / 1e9:.2f} GB free "
            f"({SPARE_BYTES / 1e9:g} GB of it are left alone); name another folder (data.cache_folder), remove caches "
            "of encoders that are no longer used, read fewer layers, or train without the cache"
        )

    # 3. each process its share of every length, the longest first: memory that is too small shows at once
    missing.sort(key=lambda utterance: -seconds[utterance])
    encoder.to(arguments.device)
    _encode(encoder, extractor, cache, missing[rank::processes], main_process)
    if processes > 1:
        torch.distributed.barrier()
        # On machines that do not share the folder, the others' shares are still missing here.
        rest = [utterance for utterance in missing if not cache.is_there(utterance)]
        _encode(encoder, extractor, cache, rest, main_process)
    return cache


def check_frozen(model: MambaEMAForRegression) -> None:
    """Frames of an encoder that is trained change with every step.

    Raises:
        FrameCacheError: the encoder is not frozen.
    """
    if not model.config.freeze_speech_encoder:
        raise FrameCacheError(
            "frames can be cached only where the speech encoder is frozen; set model.params.freeze_speech_encoder=true "
            "or data.cache_features=false to train the encoder too"
        )


@torch.inference_mode()
def _encode(
    encoder: SpeechEncoder,
    extractor: MambaEMAFeatureExtractor,
    cache: FrameCache,
    utterances: Sequence[Utterance],
    show_progress: bool,
) -> None:
    """One utterance at a time: its frames are the same to the bit, whatever else the cache lacks."""
    encoder.wavlm.eval()
    for utterance in tqdm(utterances, "encoding", unit=" utterances", disable=not utterances or not show_progress):
        waveform = load_audio(utterance.file_name, utterance.start, utterance.end, downmix=True)
        try:
            features = extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt")
        except InvalidAudioError as error:
            raise InvalidAudioError(f"{utterance}: {error}") from error
        samples = features["input_values"].to(encoder.wavlm.device, encoder.wavlm.dtype)  # (1, samples)
        lengths = torch.tensor([samples.shape[1]], device=samples.device)
        frames = encoder.hidden_states(samples, lengths, encoder.layers)  # one (1, frames, hidden) a layer
        cache.write(utterance, torch.cat(frames))


def _seconds(utterance: Utterance) -> float:
    end = audio_seconds(utterance.file_name) if utterance.end is None else utterance.end
    return end - (utterance.start or 0.0)


def _entry_bytes(encoder: SpeechEncoder, seconds: float) -> int:
    config = encoder.wavlm.config
    frames = max(num_frames(round(seconds * SAMPLING_RATE), config), 0)
    return len(encoder.layers) * frames * config.hidden_size * DTYPE.itemsize + HEADER_BYTES
