"""What holds for every test: a limit on memory, and no more threads than a small machine has."""

import pytest
import torch

from tests.support.tiny_corpus import write_corpus

MEMORY_LIMIT = 8 * 2**30  # bytes of data for a process; a test that runs away fails instead of taking the machine along
THREADS = 2

collect_ignore = ["tools/common_tests_of_transformers.py"]  # runs among the tests of transformers, see there


def pytest_configure(config):
    torch.set_num_threads(min(THREADS, torch.get_num_threads()))
    if not torch.cuda.is_available():  # CUDA maps more than it uses
        limit_memory()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """The corpus of `tests.support.tiny_corpus`; tests that change it write one of their own."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


def limit_memory():
    try:
        import resource
    except ImportError:  # Windows
        return
    _, highest = resource.getrlimit(resource.RLIMIT_DATA)
    limit = MEMORY_LIMIT if highest == resource.RLIM_INFINITY else min(MEMORY_LIMIT, highest)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, highest))
