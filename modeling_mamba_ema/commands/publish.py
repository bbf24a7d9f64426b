"""Publish a model's folder on the Hugging Face Hub: exactly the files that belong to it, as one commit.

Model card, samples and checksums are added to a folder that has none. With --dry-run nothing is sent: the files are
shown with their sizes and hashes. A folder with anything else in it (a pickle, training_args.bin, a checkpoint) is
refused. Log in first: hf auth login.
"""

import argparse
from pathlib import Path

HELP = "publish a model's folder on the Hub"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="of a trained model, e.g. outputs/demo/model")
    parser.add_argument("repository", help="owner/name on the Hub")
    parser.add_argument("--dry-run", action="store_true", help="show what would be uploaded, send nothing")
    parser.add_argument("--public", action="store_true", help="a repository that is made now is private without this")
    parser.add_argument("--message", default="Upload Mamba-EMA", help="of the commit; default: %(default)s")


def run(options: argparse.Namespace) -> int:
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import validate_repo_id

    from ..publishing import files_to_publish, prepare_release, publish
    from ..publishing.checksums import SUMS

    validate_repo_id(options.repository)
    if (options.folder / "config.json").is_file() and not (options.folder / SUMS).exists():
        prepare_release(options.folder)
    files = files_to_publish(options.folder)
    for file in files:
        print(f"{file.sha256}  {file.size:>13,}  {file.name}")
    what = f"{len(files)} files, {sum(file.size for file in files):,} bytes"
    if options.dry_run:
        print(f"{what} would be uploaded to {options.repository}; nothing was sent")
        return 0
    try:
        address = publish(options.folder, options.repository, not options.public, options.message)
    except HfHubHTTPError as error:
        raise OSError(f"the Hub refused: {error}; log in with `hf auth login`, by a token that may write") from error
    print(f"{what} uploaded: {address}")
    return 0
