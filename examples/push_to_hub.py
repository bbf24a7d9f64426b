"""Publish a model's folder on the Hugging Face Hub.

    python examples/push_to_hub.py outputs/demo/model you/your-model --dry-run

With --dry-run nothing is sent: it shows the files, their sizes and hashes, as they would be uploaded. Only what
`save_pretrained` writes is published; a folder with anything else (a pickle, training_args.bin, a checkpoint) is
refused. Log in first: hf auth login.
"""

import argparse
import sys
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import validate_repo_id

from modeling_mamba_ema.publishing.publish import files_to_publish, publish


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="as training or save_pretrained wrote it, e.g. outputs/demo/model")
    parser.add_argument("repository", help="owner/name on the Hub")
    parser.add_argument("--dry-run", action="store_true", help="show what would be uploaded, send nothing")
    parser.add_argument("--public", action="store_true", help="a repository that is made now is private without this")
    parser.add_argument("--message", default="Upload Mamba-EMA", help="of the commit; default: %(default)s")
    arguments = parser.parse_args()
    try:
        validate_repo_id(arguments.repository)
        files = files_to_publish(arguments.folder)
    except ValueError as error:
        sys.exit(str(error))
    for file in files:
        print(f"{file.sha256}  {file.size:>13,}  {file.name}")
    what = f"{len(files)} files, {sum(file.size for file in files):,} bytes"
    if arguments.dry_run:
        print(f"{what} would be uploaded to {arguments.repository}; nothing was sent")
        return
    try:
        address = publish(arguments.folder, arguments.repository, not arguments.public, arguments.message)
    except HfHubHTTPError as error:
        sys.exit(f"the Hub refused: {error}\nLog in with `hf auth login`; the token needs the right to write")
    print(f"{what} uploaded: {address}")


if __name__ == "__main__":
    main()
