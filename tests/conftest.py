"""What holds for every test: limits on memory and threads, caches of its own, and what many tests share."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Copies of remote code and of data sets go neither to the user's folders nor to those of a process that runs other
# tests at the same time. Transformers and datasets read this when they are imported, which therefore comes later.
CACHE = tempfile.mkdtemp(prefix="mamba-ema-tests-")
os.environ.update(HF_MODULES_CACHE=f"{CACHE}/modules", HF_DATASETS_CACHE=f"{CACHE}/datasets")

MEMORY_LIMIT = 8 * 2**30  # bytes of data for a process; a test that runs away fails instead of taking the machine along

collect_ignore = ["tools/common_tests_of_transformers.py"]  # runs among the tests of transformers, see there


def pytest_configure(config):
    import torch

    torch.set_num_threads(1)  # the models are tiny, and other tests run beside
    if not torch.cuda.is_available():  # CUDA maps more than it uses
        limit_memory()


def pytest_unconfigure(config):
    shutil.rmtree(CACHE, ignore_errors=True)


def limit_memory():
    try:
        import resource
    except ImportError:  # Windows
        return
    _, highest = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MEMORY_LIMIT if highest == resource.RLIM_INFINITY else min(MEMORY_LIMIT, highest)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, highest))


# The fixtures below are for reading only; a test that changes a file does so in a copy.


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The folder of the corpus that `tests.support.tiny_corpus` describes."""
    from tests.support.tiny_corpus import write_corpus  # needs what training needs

    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def emodb():
    """The folder with EmoDB, of the data that no test fetches."""
    if "MAMBA_EMA_TEST_DATA" not in os.environ:
        pytest.skip("MAMBA_EMA_TEST_DATA names no folder with emodb/")
    return Path(os.environ["MAMBA_EMA_TEST_DATA"]) / "emodb"


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    """The folder of a tiny model whose valence is on a scale from 1 to 7."""
    from tests.support.models import tiny_model

    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model(label_ranges={"valence": (1, 7)}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def release(saved_model, tmp_path_factory):
    """The saved model with what is published beside it."""
    from modeling_mamba_ema.publishing import prepare_release

    folder = tmp_path_factory.mktemp("release") / "model"
    shutil.copytree(saved_model, folder)
    prepare_release(folder)
    return folder
