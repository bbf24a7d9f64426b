"""Score a corpus of any size: turns as rows of Parquet files, by several processes, to be stopped and gone on with.

The corpus is cut into parts of whole conversations, always the same ones. A part is scored by one process and becomes
one file, which gets its name when it is complete, so that a row is neither lost nor doubled however a run ends. Corpus,
audio and output are on this machine, or where fsspec reaches them, such as `s3://bucket/folder`.
"""

import contextlib
import hashlib
import json
import multiprocessing
import signal
import tempfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
import torch
from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from tqdm import tqdm
from transformers.utils import logging

from ..audio_files import AudioFileError, load_audio
from ..data.atomic_write import atomic_write
from ..data.dataset import load_emotion_dataset
from ..feature_extraction_mamba_ema import SAMPLING_RATE
from .tracker import EmotionTracker

Task = tuple[list[dict[str, Any]], str]  # turns of a part, and its file

PLAN_FILE = "_plan.json"  # readers of Parquet folders leave out what begins so
MOST_LIVE = 256  # conversations whose states are in memory at once
_TABLES = ("metadata.*", "*/metadata.*", "data/*/metadata.*", "dataset*.json")  # of a corpus
AUDIO_FILES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aiff", ".aif", ".au", ".caf", ".w64")
# Of columns that are no numbers with a fraction, the same in all parts, whatever is missing in one of them.
_KINDS = {
    **dict.fromkeys(("turn", "channel", "baseline_turns"), "Int64"),
    **dict.fromkeys(("speaker", "reading", "error"), "string"),
    "low_level": "bool",
}
_OF_A_TURN = ["file_name", "conversation_id", "turn", "speaker", "start", "end", "channel"]


@dataclass(frozen=True)
class ScoringOptions:
    """What a run of scoring is asked for.

    Attributes:
        model, revision, int8: as for `EmotionTracker.from_pretrained`.
        rows_per_part: turns that a part holds, and some more until its last conversation ends.
        seconds_per_batch: of audio in one pass of the model.
    """

    model: str
    revision: str = "main"
    int8: bool = False
    rows_per_part: int = 2_000
    seconds_per_batch: float = 120.0

    def tracker(self, device: str) -> EmotionTracker:
        return EmotionTracker.from_pretrained(self.model, self.revision, device, self.int8)


def read_corpus(source: str, split: str | None = None) -> pd.DataFrame:
    """The turns of a corpus, with `file_name`, `conversation_id`, `turn` and, where there are such columns, `speaker`,
    `start`, `end` and `channel`. A folder without a table gives its audio files, each a conversation of its own. Raises
    `ValueError` where there is no corpus, no such split, or no audio file."""
    if "://" in source:
        return _read_corpus_in_store(source, split)
    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(table)) for table in _TABLES):
        return _single_files(source, [str(path.absolute()) for path in folder.rglob("*")])
    splits = load_emotion_dataset(source, ())
    if split is not None and split not in splits:
        raise ValueError(f"{source} has no split {split}; there are {', '.join(splits)}")
    chosen = splits if split is None else {split: splits[split]}
    tables = []
    for name, rows in chosen.items():
        own = rows.to_pandas()
        if len(chosen) > 1:  # each split may number its conversations anew
            own["conversation_id"] = f"{name}/" + own["conversation_id"].astype(str)
        tables.append(own)
    table = pd.concat(tables, ignore_index=True)
    return table[[column for column in _OF_A_TURN if column in table]]


def _single_files(source: str, names: Iterable[str]) -> pd.DataFrame:
    files = sorted(name for name in names if name.lower().endswith(AUDIO_FILES))
    if not files:
        raise ValueError(
            f"{source} holds neither audio files ({', '.join(AUDIO_FILES)}) nor a table that names them, such as "
            "metadata.csv with the column file_name"
        )
    return pd.DataFrame({"file_name": files, "conversation_id": files, "turn": 0})


def _read_corpus_in_store(source: str, split: str | None) -> pd.DataFrame:
    """As `read_corpus`; tables are copied, and all files of a folder that `datasets` wrote."""
    with tempfile.TemporaryDirectory() as copy:
        with _store(source) as (files, root):
            root = root.rstrip("/")
            single = files.isfile(root)
            folder = root.rpartition("/")[0] if single else root
            names = [root] if single else files.glob(f"{root}/metadata.*") or files.find(root)
            tables = names if single else [name for name in names if _is_table(PurePosixPath(name).relative_to(root))]
            if any(name.endswith(".json") and "/dataset" in name for name in tables):
                tables = names
            for table in tables:
                local = Path(copy, PurePosixPath(table).relative_to(folder))
                local.parent.mkdir(parents=True, exist_ok=True)
                files.get_file(table, str(local))
            original = files.unstrip_protocol(folder)
        if not tables:
            return _single_files(source, map(files.unstrip_protocol, names))
        try:
            corpus = read_corpus(str(local) if single else copy, split)
        except ValueError as error:
            raise ValueError(str(error).replace(copy, original)) from error
    return corpus.assign(file_name=corpus["file_name"].str.replace(copy, original, regex=False))


def _is_table(path: PurePosixPath) -> bool:
    return any(len(path.parts) == table.count("/") + 1 and path.match(table) for table in _TABLES)


@contextlib.contextmanager
def _store(place: str) -> Iterator[tuple[AbstractFileSystem, str]]:
    """The file system of a place and the path there. Whatever goes wrong inside becomes an `OSError` with the place's
    name: each store has errors of its own."""
    try:
        yield url_to_fs(place)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{place} cannot be found: {error}") from error
    except ImportError as error:
        raise ImportError(f"{place}: {error}; s3:// needs `pip install s3fs`, gs:// `pip install gcsfs`") from error
    except Exception as error:
        raise OSError(f"{place} cannot be used: {error or type(error).__name__}") from error


def score_corpus(
    corpus: pd.DataFrame,
    output: str | Path,
    options: ScoringOptions,
    devices: Sequence[str] = ("cpu",),
    ray: str | None = None,
) -> tuple[int, int]:
    """Score what is not scored yet.

    Args:
        corpus: of [`read_corpus`].
        output: folder of the parts, `part-00000.parquet` and so on: the columns of the corpus and of the tracker,
            `seconds`, `error` (why a turn has no values), `model` and `revision`.
        options: must be those of the run that is gone on with.
        devices: a process each, such as `["cuda:0", "cuda:1"]`, or `["cpu"] * 4`.
        ray: address of a Ray cluster that scores instead, an actor for each of its GPUs, or of its cores where it has
            none; see `ray.init`. The model, the corpus and `output` must be there for each of its machines.

    Returns:
        Rows in the folder, and how many of them have no values.

    Raises:
        ValueError: the folder holds scores of another corpus, of other weights or by other options.
        OSError: a process ended; the same call goes on.
    """
    parts = list(_parts(corpus, options.rows_per_part))
    tracker = options.tracker(devices[0])
    _check_plan(str(output), corpus, options, len(parts), tracker.weights_sha256)
    with _store(str(output)) as (files, folder):
        paths = [f"{folder}/part-{number:05d}.parquet" for number in range(len(parts))]
        complete = set(files.glob(f"{folder}/part-*.parquet"))
    todo = [(part, path) for part, path in zip(parts, paths) if path not in complete]
    tasks = ((_turns(corpus, part), files.unstrip_protocol(path)) for part, path in todo)
    if ray is not None:
        from ..integrations.ray_data import score_on_ray

        finished = score_on_ray(tasks, options, tracker.weights_sha256, ray)
    elif len(devices) > 1:
        finished = _in_processes(tasks, options, devices)
    else:
        finished = (score_to_file(tracker, options, *task) for task in tasks)
    with tqdm(total=len(corpus), initial=len(corpus) - sum(len(part) for part, _ in todo), unit=" turns") as bar:
        for turns in finished:
            bar.update(turns)
    errors = 0
    for path in paths:
        with _store(files.unstrip_protocol(path)), files.open(path) as part:
            errors += int(pd.read_parquet(part, columns=["error"])["error"].notna().sum())
    return len(corpus), errors


def score_part(tracker: EmotionTracker, turns: Sequence[dict[str, Any]], seconds_per_batch: float) -> list[dict]:
    """Score whole conversations, their next turns together in one pass of the model: a row a turn, in the same order.

    Args:
        turns: rows of the corpus, those of a conversation one after the other.
        seconds_per_batch: of audio in one pass; a single turn may be longer.
    """
    rows: list[dict] = [{} for _ in turns]
    of_conversation: dict[str, list[int]] = {}
    for index, turn in enumerate(turns):
        of_conversation.setdefault(str(turn["conversation_id"]), []).append(index)
    fresh, longest = tracker.copy(), tracker.feature_extractor.max_seconds
    fresh.reset()
    queue: deque[tuple[EmotionTracker | None, list[int]]] = deque((None, own) for own in of_conversation.values())
    while queue:
        batch: list[tuple[EmotionTracker, Any, int]] = []
        seconds, going_on = 0.0, []
        for _ in range(min(len(queue), MOST_LIVE)):
            if seconds >= seconds_per_batch:
                break
            begun, (index, *later) = queue.popleft()
            conversation, turn = begun or fresh.copy(), turns[index]
            place = turn.get("start"), turn.get("end"), turn.get("channel")
            try:
                waveform = load_audio(_local_or_content(turn["file_name"]), *place, longest)
            except AudioFileError as error:
                rows[index] = {**tracker.row(None), "seconds": None, "error": str(error)}
            else:
                batch.append((conversation, waveform, index))
                seconds += len(waveform) / SAMPLING_RATE
            if later:
                going_on.append((conversation, later))
        queue.extendleft(reversed(going_on))  # before those that have not begun: few states are in memory
        if batch:
            named = [(conversation, waveform, turns[index].get("speaker")) for conversation, waveform, index in batch]
            for (_, _, index), heard in zip(batch, EmotionTracker.update_batch(named, SAMPLING_RATE)):
                rows[index] = {**tracker.row(heard), "seconds": round(heard.seconds, 3), "error": None}
    return [{**turn, **row} for turn, row in zip(turns, rows)]


def _local_or_content(file_name: str) -> str | bytes:
    if "://" not in file_name:
        return file_name
    try:
        with _store(file_name) as (files, path):
            return files.cat_file(path)
    except FileNotFoundError as error:
        raise AudioFileError(f"{file_name} does not exist") from error


def _parts(corpus: pd.DataFrame, rows_per_part: int) -> Iterator[range]:
    """Ranges of rows that hold whole conversations."""
    conversations = corpus["conversation_id"].to_numpy()
    begin, count = 0, len(conversations)
    while begin < count:
        end = min(begin + rows_per_part, count)
        while end < count and conversations[end] == conversations[end - 1]:
            end += 1
        yield range(begin, end)
        begin = end


def _check_plan(output: str, corpus: pd.DataFrame, options: ScoringOptions, parts: int, weights: str) -> None:
    """Write down what is scored and how, or find that a run before did the same."""
    rows = hashlib.sha256(pd.util.hash_pandas_object(corpus, index=False).to_numpy().tobytes()).hexdigest()
    plan = {**asdict(options), "turns": len(corpus), "parts": parts, "corpus": rows, "weights": weights}
    with _store(output) as (files, folder):
        if isinstance(files, LocalFileSystem):
            files.makedirs(folder, exist_ok=True)
        else:
            with contextlib.suppress(FileExistsError):
                files.mkdir(folder, create_parents=False)  # with them, a misspelt bucket would be made
        path = f"{folder}/{PLAN_FILE}"
        before = json.loads(files.cat_file(path)) if files.exists(path) else None
        has_parts = before is None and files.glob(f"{folder}/part-*.parquet")
    if has_parts:
        raise ValueError(f"{output} holds parts without {PLAN_FILE}; take another folder")
    if before is None:
        _write(files.unstrip_protocol(path), json.dumps(plan, indent=2).encode())
        return
    changes = [
        f"{name} {before.get(name)} then, {value} now"
        for name, value in asdict(options).items()
        if before.get(name) != value
    ]
    if before.get("corpus") != rows:
        changes.append(f"another corpus or other rows of it, {before.get('turns')} turns then, {len(corpus)} now")
    if before.get("weights") != weights:
        changes.append("other weights of the model")
    if changes:
        raise ValueError(
            f"{output} holds the scores of another run ({'; '.join(changes)}). Name another folder, or repeat "
            "the command of that run to go on with it"
        )


def _write(place: str, content: bytes) -> None:
    """Write a file in one piece."""
    with _store(place) as (files, path):
        if isinstance(files, LocalFileSystem):
            atomic_write(path, content)
        else:
            files.pipe_file(path, content)  # stores have no object before it is complete


def _in_processes(tasks: Iterator[Task], options: ScoringOptions, devices: Sequence[str]) -> Iterator[int]:
    """Score parts, a process a device; yields how many turns each finished part has."""
    context = multiprocessing.get_context("spawn")  # a forked process could not use a GPU
    free = context.Queue()
    for device in devices:
        free.put(device)
    pool = ProcessPoolExecutor(len(devices), context, _start, (options, free, len(devices)))
    try:
        running: set[Future[int]] = set()
        while True:
            for task in islice(tasks, 2 * len(devices) - len(running)):  # rows of few parts in memory
                running.add(pool.submit(_score, *task))
            if not running:
                return
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool as error:
        why = "killed, or out of memory"
        raise OSError(f"a process that scores ended ({why}); the same command goes on where it was") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_state: tuple[EmotionTracker, ScoringOptions]  # of a process that scores


def _start(options: ScoringOptions, devices: Any, processes: int) -> None:
    global _state
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches them all; the first process ends the others
    logging.disable_progress_bar()
    torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    _state = options.tracker(devices.get()), options


def _score(turns: list[dict[str, Any]], path: str) -> int:
    return score_to_file(*_state, turns, path)


def _turns(corpus: pd.DataFrame, part: range) -> list[dict[str, Any]]:
    turns = corpus.iloc[part.start : part.stop].to_dict("records")
    return [{name: None if value != value else value for name, value in turn.items()} for turn in turns]


def score_to_file(tracker: EmotionTracker, options: ScoringOptions, turns: list[dict[str, Any]], path: str) -> int:
    """Score a part; returns how many turns it has."""
    rows = pd.DataFrame(score_part(tracker, turns, options.seconds_per_batch))
    kinds = {**dict.fromkeys([*tracker.columns, "start", "end", "seconds"], "float64"), **_KINDS}
    rows = rows.astype({name: kind for name, kind in kinds.items() if name in rows})
    _write(path, rows.assign(model=options.model, revision=options.revision).to_parquet(index=False))
    return len(rows)
