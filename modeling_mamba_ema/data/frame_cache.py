"""WavLM's frames on disk, for encoders that do not change while the rest is trained.

An entry's key is a hash of everything the frames depend on: the encoder's weights and settings, the layers, the
preprocessing, the bytes of the audio file and the stretch that is read. When any of them changes, the key changes and
the frames are computed anew; file names and dates do not count.

Frames are kept, not pooled vectors, because pooling is trained from them.
"""

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..feature_extraction_mamba_ema import NORMALIZATION, MambaEMAFeatureExtractor
from ..publishing.checksums import sha256, tensor_bytes, weights_sha256
from ..speech_encoder import SpeechEncoder
from .atomic_write import atomic_write
from .known_files import known_or_found
from .utterances import Utterance

# Raise it when reading audio or the layout of an entry changes: old entries are then no longer found.
VERSION = 2
# Half of float16's 2^-10 between neighbours is 8 times less than bfloat16's 2^-7. bfloat16's wider range is not needed:
# hidden states lie far below 65504, and where one does not, its utterance is kept in float32.
DTYPE = torch.float16
_TENSOR, _CHECKSUM = "frames", "crc32"
# Not what frames are computed from: names, versions, and a vector that only SpecAugment uses (never on a frozen
# encoder), which checkpoints without it get at random.
_IRRELEVANT_FIELDS = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype"}
_IRRELEVANT_WEIGHTS = {"masked_spec_embed"}


class FrameCacheError(ValueError):
    """Frames that cannot be cached or read; the message names the utterance or file and says what to do."""


class FrameCache:
    """Frames of utterances, one safetensors file each, read through a memory map.

    Several processes may fill and read the same folder, which may hold the caches of several encoders: an entry gets
    its name by one rename when it is complete. Encoder and extractor only make the key.
    """

    def __init__(self, folder: str | Path, encoder: SpeechEncoder, extractor: MambaEMAFeatureExtractor):
        self.encoder_key = encoder_key(encoder, extractor)
        self.root = Path(folder)
        self.folder = self.root / self.encoder_key[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.root / ".gitignore").write_text("*\n", encoding="utf-8")
        self._entries = self.folder / "entries.parquet"
        self._keys: dict[Utterance, str] = {}
        self._file_hashes: dict[str, str] = {}

    def key(self, utterance: Utterance) -> str:
        """The utterance's key; its file is read the first time. Raises `FrameCacheError` where it cannot be read."""
        if utterance not in self._keys:
            content = self._file_hash(utterance.file_name)
            parts = [self.encoder_key, content, utterance.start, utterance.end, utterance.channel]
            self._keys[utterance] = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
        return self._keys[utterance]

    def path(self, utterance: Utterance) -> Path:
        """Where the utterance's entry is or would be."""
        key = self.key(utterance)
        return self.folder / key[:2] / f"{key}.safetensors"

    def write(self, utterance: Utterance, frames: torch.Tensor) -> None:
        """Keep the frames (layers, frames, hidden) of an utterance, without padding.

        Raises:
            FrameCacheError: frames that are NaN or infinite.
        """
        frames = frames.detach().cpu().contiguous()
        if not bool(torch.isfinite(frames).all()):
            raise FrameCacheError(f"the encoder makes NaN or infinite frames of {utterance}; it cannot be trained from")
        kept = frames.to(DTYPE)
        if not bool(torch.isfinite(kept).all()):
            kept = frames.float()
        checksum = f"{_checksum(self.key(utterance), kept):08x}"
        atomic_write(self.path(utterance), save({_TENSOR: kept}, metadata={_CHECKSUM: checksum}))

    def read(self, utterance: Utterance) -> torch.Tensor:
        """(layers, frames, hidden) of an utterance, checked against damage.

        Raises:
            FrameCacheError: no such entry, or a damaged one.
        """
        path = self.path(utterance)
        try:
            with safe_open(path, framework="pt") as entry:
                frames, checksum = entry.get_tensor(_TENSOR), entry.metadata()[_CHECKSUM]
                if int(checksum, 16) == _checksum(self.key(utterance), frames):
                    return frames
            problem = "its checksum is wrong"
        except FileNotFoundError:
            problem = "it is not there"
        except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
            problem = str(error)
        with contextlib.suppress(OSError):
            os.utime(path)  # it has changed: the next start reads it again
        raise FrameCacheError(
            f"the cached frames of {utterance} cannot be used ({path}: {problem}); start the program again, and they "
            "are computed anew"
        )

    def is_there(self, utterance: Utterance) -> bool:
        """Whether there is an entry, sound or damaged."""
        return self.path(utterance).exists()

    def hash_files(self, utterances: Iterable[Utterance]) -> None:
        """Hash the files of utterances, but for those that an earlier call hashed and that have not changed since.
        Raises `FrameCacheError` where a file cannot be read."""
        names = list(dict.fromkeys(utterance.file_name for utterance in utterances))
        found = known_or_found(
            self.root / "files.parquet",
            [Utterance(name) for name in names],
            lambda files: (self._file_hash(file.file_name) for file in files),
        )
        self._file_hashes.update({name: digest for name, digest in zip(names, found) if digest is not None})

    def remove_damaged(self, utterances: Iterable[Utterance]) -> int:
        """Remove damaged entries; returns how many. An entry that was sound is read again only when it has changed."""
        damaged = 0

        def check(entry: Utterance) -> float | None:
            nonlocal damaged
            if self.is_sound(entries[entry.file_name]):
                return 1.0
            Path(entry.file_name).unlink(missing_ok=True)
            damaged += 1
            return None

        entries = {str(self.path(utterance)): utterance for utterance in utterances if self.is_there(utterance)}
        known_or_found(self._entries, [Utterance(name) for name in entries], lambda unknown: map(check, unknown))
        return damaged

    def count_as_sound(self, utterances: Iterable[Utterance]) -> None:
        """Note entries that were just written, so that the next start need not read them."""
        entries = [Utterance(str(self.path(utterance))) for utterance in utterances]
        known_or_found(self._entries, entries, lambda written: [1.0] * len(written))

    def is_sound(self, utterance: Utterance) -> bool:
        """Whether there is an entry that can be used; all of it is read."""
        try:
            self.read(utterance)
        except FrameCacheError:
            return False
        return True

    def _file_hash(self, name: str) -> str:
        if name not in self._file_hashes:
            try:
                self._file_hashes[name] = sha256(Path(name))
            except OSError as error:
                raise FrameCacheError(f"{Path(name).name} cannot be read: {error}") from error
        return self._file_hashes[name]


def encoder_key(encoder: SpeechEncoder, extractor: MambaEMAFeatureExtractor) -> str:
    """Hash of what frames depend on besides the audio: weights, settings, layers, preprocessing."""
    settings = {
        "version": VERSION,
        "backbone": {
            name: value for name, value in encoder.backbone.config.to_dict().items() if name not in _IRRELEVANT_FIELDS
        },
        "layers": encoder.layers,
        "sampling_rate": extractor.sampling_rate,
        **{name: getattr(extractor, name) for name in NORMALIZATION},
    }
    weights = [item for item in encoder.backbone.state_dict().items() if item[0] not in _IRRELEVANT_WEIGHTS]
    return weights_sha256(weights, start=json.dumps(settings, sort_keys=True, default=str))


def _checksum(key: str, frames: torch.Tensor) -> int:
    """Of the values, of how they are to be read, and of whose they are."""
    return zlib.crc32(tensor_bytes(frames), zlib.crc32(f"{key} {frames.dtype} {tuple(frames.shape)}".encode()))
