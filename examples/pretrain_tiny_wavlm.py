"""Pretrain the tiny WavLM that ships with the package (`modeling_mamba_ema/tiny_wavlm`).

    pip install '.[train,demo,baseline]'
    OMP_NUM_THREADS=1 python examples/pretrain_tiny_wavlm.py --output outputs/tiny_wavlm

On a GPU, `--device cuda --workers 16 --batch-size 128`: as many workers as there are cores.

WavLM's recipe in small (Chen et al. 2022, "WavLM: Large-Scale Self-Supervised Pre-Training for Full Stack Speech
Processing"): the model hears speech in noise and rooms or with somebody else talking over it, spans of frames are
masked, and it predicts to which cluster each frame of the clean speech belongs. There are clusters of MFCCs, of pitch,
and of voice quality (periodicity, roughness, spectral tilt, energy); WavLM's are of MFCCs and of hidden states.

All speech is made by eSpeak NG in many languages, with voices, rates, melodies and vocal tracts drawn at random. The
voices that the demo validates and tests on are left out.
"""

import argparse
import itertools
import logging
import math
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch
import transformers
from sklearn.cluster import MiniBatchKMeans
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import WavLMConfig, WavLMModel
from transformers.audio_utils import mel_filter_bank
from transformers.models.wavlm.modeling_wavlm import _compute_mask_indices

from modeling_mamba_ema.data.recording_conditions import draw_conditions, level_of_speech, record
from modeling_mamba_ema.data.synthetic_corpus import SPEAKERS, Expression, Speaker, draw_words, say
from modeling_mamba_ema.data.synthetic_speech import SAMPLING_RATE, Synthesizer

logger = logging.getLogger("pretrain_tiny_wavlm")

HOP, WINDOW = 320, 400  # samples between WavLM's frames, and that one frame sees
CONFIG = {
    "hidden_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 576,
    "conv_dim": [32, 48, 64, 96, 96, 128, 128],
    "num_conv_pos_embeddings": 32,
    "num_conv_pos_embedding_groups": 16,
    "feat_extract_norm": "layer",  # as WavLM-large
    "do_stable_layer_norm": True,
    "layerdrop": 0.0,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "feat_proj_dropout": 0.0,
}
LANGUAGES = (
    "af an ca cs cy da de el en en-us en-gb-scotland en-gb-x-rp eo es es-419 et eu fi fr fr-be ga hr hu id is it ku la "
    "lt lv ms nb nl pl pt pt-br ro sk sl sq sv sw tr"
)
# Variants whose output eSpeak NG repeats exactly, without robots, and without near copies of the demo's voices, such as
# steph2; some are training voices of the demo.
VARIANTS = (
    "Alex Andrea Andy Annie Denis Diogo Henrique Hugo Jacky Lee Marco Mario Michael Mike adam antonio belinda boris "
    "caleb david ed f1 f4 gustave ian iven iven2 iven3 iven4 john kaukovalta klatt klatt2 klatt3 linda m1 m3 m4 "
    "m5 m7 m8 marcelo max michel miguel mike2 norbert pablo paul pedro quincy rob robert shelby travis zac"
)
ONSETS = "b d f g h k l m n p r s t v z st tr bl gr sh"
ENDS = ("", "", "", "n", "s", "r", "l", "t")
CLUSTERS = {"mfcc": 100, "pitch": 64, "quality": 64}


# Speech


def make_clips(count: int, seconds: float, seed: int, workers: int) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Clean clips of at least `seconds`, int16, each of one speaker who changes expression, with their features.

    eSpeak NG damages its memory in long runs, so every 50 clips are made in a process of their own; those of a process
    that crashes are left out.
    """
    held_out = {speaker.voice.split("+")[1] for split in ("validation", "test") for speaker in SPEAKERS[split]}
    if held_out & set(VARIANTS.split()):
        raise ValueError(f"{held_out & set(VARIANTS.split())} are voices that the demo validates or tests on")
    clips: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []
    context = multiprocessing.get_context("fork")
    ranges = (range(first, min(first + 50, count)) for first in range(0, count, 50))
    while some := list(itertools.islice(ranges, workers)):
        pools = [ProcessPoolExecutor(1, mp_context=context) for _ in some]
        futures = [pool.submit(_clips, indices, seconds, seed) for pool, indices in zip(pools, some)]
        for indices, pool, future in zip(some, pools, futures):
            try:
                clips += future.result()
            except BrokenProcessPool:
                logger.warning("eSpeak NG crashed in the clips from %d on, which are left out", indices[0])
            pool.shutdown()
    return clips


def _clips(indices: range, seconds: float, seed: int) -> list[tuple[np.ndarray, dict[str, np.ndarray]]]:
    torch.set_num_threads(1)
    synthesizer, clips = Synthesizer(), []
    for index in indices:
        generator = np.random.default_rng([seed, index])
        language, variant = str(generator.choice(LANGUAGES.split())), str(generator.choice(VARIANTS.split()))
        speaker = Speaker(
            name="",
            voice=f"{language}+{variant}",
            pitch=generator.uniform(25, 70),
            rate=generator.uniform(140, 190),
            formants=generator.uniform(0.85, 1.18),
        )
        pieces: list[np.ndarray] = []
        while sum(piece.size for piece in pieces) < seconds * SAMPLING_RATE:
            text = draw_text(language, generator)
            pieces.append(say(synthesizer, text, speaker, draw_expression(generator), generator))
            pieces.append(np.zeros(int(generator.uniform(0.05, 0.4) * SAMPLING_RATE), dtype=np.float32))
        speech = np.concatenate(pieces)
        clip = np.round(speech / np.abs(speech).max() * 32_000).astype(np.int16)
        clips.append((clip, clip_features(clip)))
    return clips


def draw_text(language: str, generator: np.random.Generator) -> str:
    """Numbers, which eSpeak NG reads in every language; made-up words; and English sentences."""
    kind = generator.random()
    if language.startswith("en") and kind < 0.6:
        return draw_words(generator.uniform(3, 9), False, generator)
    if kind < 0.5:
        numbers = [generator.integers(10 ** generator.integers(1, 5)) for _ in range(generator.integers(1, 4))]
        return " ".join(map(str, numbers))
    words = []
    for _ in range(generator.integers(2, 6)):
        parts = [ONSETS.split(), list("aeiou"), ENDS] * int(generator.integers(1, 4))
        words.append("".join(str(generator.choice(letters)) for letters in parts))
    return " ".join(words)


def draw_expression(generator: np.random.Generator) -> Expression:
    rough, lilting = generator.random(2) < 0.4
    return Expression(
        pitch=generator.uniform(-28, 28),
        pitch_range=generator.uniform(5, 95),
        rate=generator.uniform(0.65, 1.35),
        effort=generator.uniform(-0.5, 0.5),
        roughness=generator.uniform(0, 0.9) if rough else 0.0,
        lilt=generator.uniform(0, 0.9) if lilting else 0.0,
        gain_db=generator.uniform(-5, 5),
    )


def disturb(clip: np.ndarray, other: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The clip as the model hears it: with a stretch of somebody else's speech (one in five), and recorded anew."""
    if generator.random() < 0.2:
        length = int(generator.uniform(0.1, 0.5) * clip.size)
        start, source = generator.integers(clip.size - length), generator.integers(other.size - length)
        ratio = 10 ** (-generator.uniform(-5, 10) / 20) * level_of_speech(clip, SAMPLING_RATE)
        clip = clip.copy()
        clip[start : start + length] += (
            other[source : source + length] * ratio / max(level_of_speech(other, SAMPLING_RATE), 1e-6)
        )
    return record(clip, SAMPLING_RATE, draw_conditions(generator), generator)


# Targets, from clean speech


def clip_features(clip: np.ndarray) -> dict[str, np.ndarray]:
    """What is clustered: "mfcc" (frames, 39), "pitch" (frames, 3) and "quality" (frames, 4) of a clean clip.

    A row for each frame that WavLM makes of the clip; longer windows are centred on it.
    """
    waveform = torch.from_numpy(clip.astype(np.float32))
    waveform = waveform / max(level_of_speech(clip.astype(np.float64), SAMPLING_RATE), 1e-6)
    # MFCCs: 13 coefficients with first and second differences
    filters = torch.from_numpy(mel_filter_bank(257, 40, 20.0, 7600.0, SAMPLING_RATE, mel_scale="htk")).float()
    frames = waveform.unfold(0, WINDOW, HOP)  # (frames, 400)
    power = torch.fft.rfft(frames * torch.hann_window(WINDOW), 512).abs().square()
    mel = (power @ filters + 1e-4).log()
    cosines = (torch.arange(13).unsqueeze(1) * (torch.arange(40) + 0.5) * math.pi / 40).cos()
    cepstra = mel @ cosines.T
    first = torch.gradient(cepstra, dim=0)[0]
    second = torch.gradient(first, dim=0)[0]
    # pitch: highest autocorrelation in 50 ms, divided by that of the window (Boersma 1993)
    wide = _centred(waveform, 800, HOP, WINDOW)[: len(frames)]
    window = torch.hann_window(800)
    own = torch.fft.irfft(torch.fft.rfft((wide - wide.mean(1, keepdim=True)) * window, 2048).abs().square())
    ours = torch.fft.irfft(torch.fft.rfft(window, 2048).abs().square())
    lags = torch.arange(36, 280)  # 444 to 57 Hz
    periodicity = (own / (own[:, :1] + 1e-2) / (ours / ours[0]))[:, lags]
    strength, best = (periodicity - 0.03 * (lags / 36.0).log2()).max(dim=1)  # of equal peaks the shortest period
    voiced = strength > 0.45
    pitch = -lags[best].float().log2()
    pitch = torch.where(voiced, pitch, pitch[voiced].median() if bool(voiced.any()) else pitch.new_tensor(-7.0))
    # voice quality: spectral tilt, and how loudness is modulated at 55 to 85 Hz within 100 ms
    total = power.sum(1).add(1e-4).log()
    tilt = mel[:, 22:].exp().sum(1).log() - mel[:, :14].exp().sum(1).log()  # over 2 kHz, under 1 kHz
    envelope = waveform.abs().unfold(0, 16, 16).mean(1)  # at 1 kHz
    slow = _centred(envelope, 100, HOP // 16, WINDOW // 16)[: len(frames)]
    slow = (slow / (slow.mean(1, keepdim=True) + 1e-2) - 1) * torch.hann_window(100)
    roughness = torch.fft.rfft(slow, 256).abs()[:, 14:22].square().mean(1).add(0.1).log()
    return {
        "mfcc": torch.cat([cepstra, first, second], dim=1).numpy(),
        "pitch": torch.stack([pitch, voiced.float(), torch.gradient(pitch, dim=0)[0]], dim=1).numpy(),
        "quality": torch.stack([strength, roughness, tilt, total], dim=1).numpy(),
    }


def _centred(signal: torch.Tensor, window: int, hop: int, frame: int) -> torch.Tensor:
    """(samples,) -> (frames, window), windows around the middle of WavLM's frames."""
    side = (window - frame) // 2
    return F.pad(signal, (side, side + hop)).unfold(0, window, hop)


def cluster(features: list[np.ndarray], clusters: int, seed: int) -> list[np.ndarray]:
    """The cluster of every frame, by k-means on standardised features."""
    every = np.concatenate(features)
    sample = every[np.random.default_rng(seed).permutation(len(every))[:200_000]]
    kmeans = MiniBatchKMeans(clusters, batch_size=4096, n_init=1, max_iter=30, random_state=seed)
    model = make_pipeline(StandardScaler(), kmeans).fit(sample)
    return [model.predict(part).astype(np.int16) for part in features]


# Training


class Heads(nn.Module):
    """Scores of the clusters of each target: cosine to a learned vector, as in HuBERT, equation 3."""

    def __init__(self, hidden_size: int, targets: dict[str, int], size: int = 128):
        super().__init__()
        self.projections = nn.ModuleDict({name: nn.Linear(hidden_size, size) for name in targets})
        self.codes = nn.ParameterDict({name: nn.Parameter(torch.randn(count, size)) for name, count in targets.items()})

    def forward(self, name: str, frames: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.projections[name](frames), dim=-1) @ F.normalize(self.codes[name], dim=-1).T / 0.1


def normalise(waveform: np.ndarray) -> torch.Tensor:
    return torch.from_numpy((waveform - waveform.mean()) / np.sqrt(waveform.var() + 1e-7)).float()


class Batches(Dataset):
    """For each step the crops as they are heard, the clusters of the clean ones, and which frames are masked."""

    def __init__(self, clips: list[np.ndarray], targets: dict[str, list[np.ndarray]], options: argparse.Namespace):
        self.clips, self.targets, self.options = clips, targets, options
        self.frames = int(options.seconds * SAMPLING_RATE) // HOP
        self.samples = (self.frames - 1) * HOP + WINDOW

    def __len__(self) -> int:
        return self.options.steps

    def __getitem__(self, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """(batch, samples), clusters (batch, frames) by target, and (batch, frames) of bool"""
        generator = np.random.default_rng([self.options.seed, step])
        heard, wanted = [], {name: [] for name in self.targets}
        for index in generator.integers(len(self.clips), size=self.options.batch_size):
            first = int(generator.integers((len(self.clips[index]) - self.samples) // HOP))
            clip = self.clips[index][first * HOP : first * HOP + self.samples] / 32_768
            other = self.clips[generator.integers(len(self.clips))] / 32_768
            heard.append(normalise(disturb(clip, other, generator)))
            for name in self.targets:
                wanted[name].append(self.targets[name][index][first : first + self.frames])
        np.random.seed(generator.integers(2**32))  # of the next line
        mask = _compute_mask_indices((len(heard), self.frames), self.options.mask_prob, 10)
        truth = {name: torch.from_numpy(np.stack(rows).astype(np.int64)) for name, rows in wanted.items()}
        return torch.stack(heard), truth, torch.from_numpy(mask)


def train(model: WavLMModel, batches: Batches, options: argparse.Namespace) -> None:
    """Teach the model to predict the clusters of clean speech from what it hears."""
    heads = Heads(model.config.hidden_size, {name: CLUSTERS[name] for name in batches.targets}).to(options.device)
    parameters = [*model.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=options.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, options.steps // 12, options.steps)
    workers = options.workers if options.workers > 1 else 0  # without others, this process makes the batches
    loader = DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=options.device == "cuda")
    model.train()
    losses: dict[str, list[torch.Tensor]] = {}
    for step, (heard, truth, mask) in enumerate(loader):
        heard, mask = heard.to(options.device), mask.to(options.device)
        with torch.autocast(torch.device(options.device).type, dtype=torch.bfloat16):
            hidden = model(heard, mask_time_indices=mask).last_hidden_state
        # Frames that are masked, and frames that are heard, count alike.
        loss = torch.zeros((), device=options.device)
        for name, clusters in truth.items():
            scores = heads(name, hidden.float())
            each = F.cross_entropy(scores.flatten(0, 1), clusters.to(options.device).flatten(), reduction="none")
            for kind, chosen in (("masked", mask.flatten()), ("heard", ~mask.flatten())):
                value = (each * chosen).sum() / chosen.sum()
                loss = loss + 0.5 * value
                losses.setdefault(f"{name} {kind}", []).append(value.detach())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 2.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            means = ", ".join(f"{name} {torch.stack(values).mean():.3f}" for name, values in losses.items())
            logger.info("step %d: %s", step + 1, means)
            losses = {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--clips", type=int, default=3000)
    parser.add_argument("--clip-seconds", type=float, default=4.5)
    parser.add_argument("--seconds", type=float, default=2.4, help="of a crop")
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--mask-prob", type=float, default=0.5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that make speech, as many as there are cores")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.utils.logging.set_verbosity_error()
    torch.manual_seed(options.seed)
    started = time.monotonic()
    clips, features = zip(*make_clips(options.clips, options.clip_seconds, options.seed, options.workers))
    hours = sum(map(len, clips)) / SAMPLING_RATE / 3600
    logger.info("%d clips, %.1f h (%.0f s)", len(clips), hours, time.monotonic() - started)
    targets = {name: cluster([f[name] for f in features], CLUSTERS[name], options.seed) for name in CLUSTERS}
    model = WavLMModel(WavLMConfig(**CONFIG)).to(options.device)
    logger.info("targets made, %d weights (%.0f s)", model.num_parameters(), time.monotonic() - started)
    train(model, Batches(list(clips), targets, options), options)
    logger.info("trained (%.0f s)", time.monotonic() - started)
    model.to("cpu").half().save_pretrained(options.output)


if __name__ == "__main__":
    main()
