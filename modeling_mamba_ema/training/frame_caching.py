"""Filling a cache of frames before training begins."""

import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from tqdm import tqdm
from transformers import TrainingArguments

from ..audio_files import load_audio
from ..data.frame_cache import DTYPE, FrameCache, FrameCacheError
from ..data.utterances import Utterance, seconds_of, utterances_of
from ..feature_extraction_mamba_ema import SAMPLING_RATE, InvalidAudioError, MambaEMAFeatureExtractor
from ..modeling_mamba_ema import MambaEMAForRegression
from ..speech_encoder import SpeechEncoder, num_frames
from .processes import first_on_each_machine

logger = logging.getLogger(__name__)

# Of audio that goes through the encoder at once: enough that short utterances cost what their computing costs.
SECONDS_TOGETHER = 16.0
# Processes wait for each other this often, so that none is ever so far behind that the others give it up.
BATCHES_BETWEEN_MEETINGS = 4
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

    Every process of a run calls it, each computes its share, and all return when everything is there. The model, whose
    speech encoder must be frozen, is moved to the run's device.

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
    with first_on_each_machine():
        cache.hash_files(utterances)
        damaged = cache.remove_damaged(utterances)
    if damaged:
        logger.warning("%d cached entries in %s are damaged and are computed anew", damaged, cache.folder)
    wait_for_everyone = PartialState().wait_for_everyone
    wait_for_everyone()
    (missing,) = broadcast_object_list([[utterance for utterance in utterances if not cache.is_there(utterance)]])

    # 2. room for what is not
    needed = sum(_entry_bytes(encoder, seconds[utterance]) for utterance in missing)
    free = shutil.disk_usage(cache.root).free
    if not quiet:
        size = f"; computing the others, {needed / 1e9:.2f} GB ({free / 1e9:.0f} GB are free)" if missing else ""
        there = len(utterances) - len(missing)
        logger.info("frames of %d of %d utterances are in %s%s", there, len(utterances), cache.folder, size)
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
    batches = _batches(missing, seconds)
    together = BATCHES_BETWEEN_MEETINGS * processes
    with tqdm(total=len(missing), desc="encoding", unit=" utterances", disable=quiet or not missing) as progress:
        for first in range(0, len(batches), together):
            for batch in batches[first + rank : first + together : processes]:
                for utterance, frames in zip(batch, _encode(encoder, extractor, batch)):
                    if not cache.is_there(utterance):  # another run may fill the folder at the same time
                        cache.write(utterance, frames)
            progress.update(sum(map(len, batches[first : first + together])))
            wait_for_everyone()
    elsewhere = sum(not cache.is_there(utterance) for utterance in missing)
    if elsewhere:
        raise FrameCacheError(
            f"{elsewhere} of {len(missing)} entries are not in {cache.folder} after all processes were done; processes "
            "on several machines need a data.cache_folder that all of them see"
        )
    with first_on_each_machine():
        cache.count_as_sound(missing)
    return cache


def _batches(utterances: Sequence[Utterance], seconds: Mapping[Utterance, float]) -> list[list[Utterance]]:
    """Neighbours, of `SECONDS_TOGETHER` at most or single: the same, however many processes share them."""
    batches: list[list[Utterance]] = []
    filled = 0.0
    for utterance in utterances:
        filled += seconds[utterance]
        if not batches or filled > SECONDS_TOGETHER:
            batches.append([])
            filled = seconds[utterance]
        batches[-1].append(utterance)
    return batches


@torch.inference_mode()
def _encode(
    encoder: SpeechEncoder, extractor: MambaEMAFeatureExtractor, utterances: Sequence[Utterance]
) -> list[torch.Tensor]:
    """(layers, frames, hidden) of each utterance, as it would be alone but for rounding."""
    waveforms = [load_audio(u.file_name, u.start, u.end, u.channel) for u in utterances]
    try:
        features = extractor(waveforms, sampling_rate=SAMPLING_RATE, return_tensors="pt")
    except InvalidAudioError as error:
        raise InvalidAudioError(f"{', '.join(map(str, utterances))}: {error}") from error
    samples = features["input_values"].to(encoder.backbone.device, encoder.backbone.dtype)  # (batch, samples)
    lengths = torch.tensor([waveform.size for waveform in waveforms], device=samples.device)
    states = torch.stack(
        encoder.hidden_states(samples, lengths, encoder.layers), dim=1
    )  # (batch, layers, frames, hidden)
    return [state[:, : encoder.num_frames(waveform.size)] for state, waveform in zip(states, waveforms)]


def _entry_bytes(encoder: SpeechEncoder, seconds: float) -> int:
    config = encoder.backbone.config
    frames = max(num_frames(round(seconds * SAMPLING_RATE), config), 0)
    return len(encoder.layers) * frames * config.hidden_size * DTYPE.itemsize + HEADER_BYTES
