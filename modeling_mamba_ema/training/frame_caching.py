"""Filling a cache of frames before training begins."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import TrainingArguments

from ..audio_files import load_audio
from ..data.frame_cache import DTYPE, FrameCache, FrameCacheError
from ..data.utterances import Utterance, seconds_of, utterances_of
from ..feature_extraction_mamba_ema import SAMPLING_RATE, InvalidAudioError, MambaEMAFeatureExtractor
from ..modeling_mamba_ema import MambaEMAForRegression
from ..speech_encoder import SpeechEncoder, num_frames

logger = logging.getLogger(__name__)

# Processes wait for each other this often, so that none is ever so far behind that the others give it up.
UTTERANCES_BETWEEN_MEETINGS = 16
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
        splits: rows of a corpus in normal form.
        folder: of the cache.
        arguments: Trainer's; they know device and processes.

    Raises:
        FrameCacheError: the encoder is not frozen, the disk is too small, or an utterance gives no frames to train on.
        InvalidAudioError, AudioFileError: an utterance that cannot be used.
    """
    if not model.config.freeze_speech_encoder:
        raise FrameCacheError(
            "frames can be cached only where the speech encoder is frozen; set model.params.freeze_speech_encoder=true "
            "or data.cache_frames=false to train the encoder too"
        )
    encoder: SpeechEncoder = model.speech_encoder
    cache = FrameCache(folder, encoder, extractor)
    seconds = {u: length for rows in splits for u, length in zip(utterances_of(rows), seconds_of(rows))}
    utterances = list(seconds)
    rank, processes, quiet = arguments.process_index, arguments.world_size, arguments.process_index != 0

    # 1. what is there, and sound; what is not, as the first process sees it, so that all agree on it
    damaged = 0
    for utterance in tqdm(utterances[rank::processes], "checking cached frames", unit=" utterances", disable=quiet):
        if cache.is_there(utterance) and not cache.is_sound(utterance):
            cache.path(utterance).unlink(missing_ok=True)
            damaged += 1
    if damaged:
        logger.warning("%d cached entries in %s are damaged and are computed anew", damaged, cache.folder)
    if processes > 1:
        torch.distributed.barrier()
    missing = [utterance for utterance in utterances if not cache.is_there(utterance)]
    if processes > 1:
        agreed = [missing]
        torch.distributed.broadcast_object_list(agreed, src=0)
        missing = agreed[0]

    # 2. room for what is not
    needed = sum(_entry_bytes(encoder, seconds[utterance]) for utterance in missing)
    free = shutil.disk_usage(cache.root).free
    if not quiet:
        there, size = len(utterances) - len(missing), f"{needed / 1e9:.2f} GB ({free / 1e9:.0f} GB are free)"
        logger.info(
            "frames of %d utterances are in %s; computing those of %d more, %s", there, cache.folder, len(missing), size
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
    encoder.backbone.eval()
    together = UTTERANCES_BETWEEN_MEETINGS * processes
    with tqdm(total=len(missing), desc="encoding", unit=" utterances", disable=quiet or not missing) as progress:
        for first in range(0, len(missing), together):
            for utterance in missing[first + rank : first + together : processes]:
                cache.write(utterance, _encode(encoder, extractor, utterance))
                progress.update(min(processes, len(missing) - progress.n))
            if processes > 1:
                torch.distributed.barrier()
    elsewhere = sum(not cache.is_there(utterance) for utterance in missing)
    if elsewhere:
        raise FrameCacheError(
            f"{elsewhere} of {len(missing)} entries are not in {cache.folder} after all processes were done; processes "
            "on several machines need a data.cache_folder that all of them see"
        )
    return cache


@torch.inference_mode()
def _encode(encoder: SpeechEncoder, extractor: MambaEMAFeatureExtractor, utterance: Utterance) -> torch.Tensor:
    """(layers, frames, hidden) of one utterance: alone, they are the same to the bit whatever else is computed."""
    waveform = load_audio(utterance.file_name, utterance.start, utterance.end, utterance.channel)
    try:
        features = extractor(waveform, sampling_rate=SAMPLING_RATE, return_tensors="pt")
    except InvalidAudioError as error:
        raise InvalidAudioError(f"{utterance}: {error}") from error
    samples = features["input_values"].to(encoder.backbone.device, encoder.backbone.dtype)  # (1, samples)
    lengths = torch.tensor([samples.shape[1]], device=samples.device)
    return torch.cat(encoder.hidden_states(samples, lengths, encoder.layers))  # of one (1, frames, hidden) a layer


def _entry_bytes(encoder: SpeechEncoder, seconds: float) -> int:
    config = encoder.backbone.config
    frames = max(num_frames(round(seconds * SAMPLING_RATE), config), 0)
    return len(encoder.layers) * frames * config.hidden_size * DTYPE.itemsize + HEADER_BYTES
