"""Making a release of a saved model, and uploading it to the Hub: all of the folder, and nothing else."""

import shutil
import tempfile
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard

from ..feature_extraction_mamba_ema import MambaEMAFeatureExtractor
from ..modeling_mamba_ema import MambaEMAForRegression, has_adapters
from ..pipeline_mamba_ema import MambaEMAPipeline
from ..sample import FOLDER as SAMPLE_FOLDER
from .checksums import SUMS, damaged_files, sha256, write_checksums
from .model_card import TrainingFacts, model_card

# What the Hub's widget offers to try: title, file of the package's sample, name beside the card.
WIDGET_SAMPLES = (
    ("A quarrel begins (synthetic voice)", "turn0_anna.wav", "sample_quarrel.wav"),
    ("Good news (synthetic voice)", "turn6_anna.wav", "sample_good_news.wav"),
)
# Inference Endpoints install this before they import handler.py.
HANDLER_REQUIREMENTS = "soundfile\nsoxr\n"
# What save_pretrained and prepare_release write. Pickles (training_args.bin and optimizers among them) run code where
# they are loaded; anything else in the folder got there by accident.
ALLOWED = (
    "config.json",
    "preprocessor_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "*.py",
    "requirements.txt",
    "README.md",
    "sample*.wav",
    SUMS,
)
NEEDED = ("config.json", "preprocessor_config.json", "model*.safetensors", "README.md", SUMS)


@dataclass(frozen=True)
class PublishedFile:
    """A file as it will be on the Hub."""

    name: str
    size: int
    sha256: str


def prepare_release(
    folder: str | Path, training: TrainingFacts | None = None, model: MambaEMAForRegression | None = None
) -> None:
    """Add to a folder of `save_pretrained` what a repository on the Hub needs: model card, samples for the widget,
    `handler.py` for Inference Endpoints with its requirements, and `SHA256SUMS`.

    Args:
        training: what the card says of the training. None: a card that is there is kept, else it says nothing of it.
        model: the model in the folder, if it is at hand; else it is loaded.
    """
    folder = Path(folder)
    for _, source, name in WIDGET_SAMPLES:
        shutil.copyfile(SAMPLE_FOLDER / source, folder / name)
    shutil.copyfile(Path(__file__).with_name("handler.py"), folder / "handler.py")
    (folder / "requirements.txt").write_text(HANDLER_REQUIREMENTS, encoding="utf-8")
    card = folder / "README.md"
    if training is not None or not card.exists():
        if model is None:
            model = MambaEMAForRegression.from_pretrained(folder)
        card.write_text(model_card(model.config, training, _widget(model, folder)), encoding="utf-8")
    write_checksums(folder)


def _widget(model: MambaEMAForRegression, folder: Path) -> list[dict[str, Any]]:
    """The samples with what the model says of them."""
    training = model.training
    model.eval()
    emotion = MambaEMAPipeline(model=model, feature_extractor=MambaEMAFeatureExtractor.from_pretrained(folder))
    examples = [
        {
            "example_title": title,
            "src": name,
            "output": [{**row, "score": round(row["score"], 3)} for row in emotion((folder / name).read_bytes())],
        }
        for title, _, name in WIDGET_SAMPLES
    ]
    model.train(training)
    return examples


def files_to_publish(folder: str | Path) -> list[PublishedFile]:
    """What publishing a folder of [`prepare_release`] would upload; nothing is sent. Raises `ValueError` for files that
    do not belong there, are missing, or are not as they were saved; all are named."""
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of a saved model, such as outputs/run/model")
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    links = [name for name in names if (folder / name).is_symlink()]
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in ALLOWED)]
    problems = [f"{name} is a link" for name in links]
    problems += [f"{name} does not belong to a published model; remove it" for name in foreign]
    problems += [f"there is no {needed}" for needed in NEEDED if not any(fnmatch(name, needed) for name in names)]
    if not problems:
        problems = [
            f"{problem} (save_pretrained and prepare_release write it anew)" for problem in damaged_files(folder)
        ]
    if problems:
        raise ValueError(f"{folder} is not published: {'; '.join(problems)}")
    return [PublishedFile(name, (folder / name).stat().st_size, sha256(folder / name)) for name in names]


def publish(folder: str | Path, repository: str, private: bool = True, message: str = "Upload Mamba-EMA") -> str:
    """Upload a model's folder as one commit, whose address is returned; the repository is made if it is not there.

    Args:
        repository: `owner/name` on the Hub.
        private: of a repository that is made now; one that is there stays as it is.

    Raises:
        ValueError: see [`files_to_publish`].
        huggingface_hub.errors.HfHubHTTPError: the Hub refuses, most often for want of `hf auth login`.
    """
    names = [file.name for file in files_to_publish(folder)]
    hub = HfApi()
    hub.create_repo(repository, private=private, exist_ok=True)
    commit = hub.upload_folder(folder_path=folder, repo_id=repository, allow_patterns=names, commit_message=message)
    return commit.commit_url


def push_model(
    model: MambaEMAForRegression,
    repository: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
    training: TrainingFacts | None = None,
) -> str:
    """Upload a model in memory as one commit, whose address is returned; behind `model.push_to_hub`, whose arguments
    these are, and what the card says of the training. Raises `ValueError` for a model with adapters that are not
    merged, or in 8 bits."""
    if has_adapters(model):
        raise ValueError("the model has adapters; merge them first (modeling_mamba_ema.training.merge_lora)")
    model.refuse_8_bits("push the model")
    hub = HfApi(token=token)
    repository = hub.create_repo(repository, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        hub.create_branch(repository, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        prepare_release(folder, training, model)
        names = [file.name for file in files_to_publish(folder)]
        if hub.file_exists(repository, "README.md", revision=revision):
            names.remove("README.md")
        elif tags:
            card = ModelCard.load(Path(folder) / "README.md")
            card.data.tags = [*(card.data.tags or []), *tags]
            card.save(Path(folder) / "README.md")
        commit = hub.upload_folder(
            folder_path=folder,
            repo_id=repository,
            allow_patterns=names,
            commit_message=commit_message or "Upload Mamba-EMA",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )
    return commit.commit_url
