"""Pickles that write a file when they are unpickled: what a test can see of code that was run."""

import io
import pickle
import zipfile

import pytest
import torch


class Malicious:
    """Unpickling it writes a file."""

    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return (open, (str(self.witness), "w"))


def plain_pickle(path, witness):
    path.write_bytes(pickle.dumps({"head.dense.weight": Malicious(witness)}))


def torch_archive(path, witness):
    """The format of `torch.save`, with the pickle inside replaced."""
    buffer = io.BytesIO()
    torch.save({"head.dense.weight": torch.zeros(1)}, buffer)
    with zipfile.ZipFile(buffer) as good, zipfile.ZipFile(path, "w") as bad:
        for name in good.namelist():
            evil = pickle.dumps({"a": Malicious(witness)}, protocol=2)
            bad.writestr(name, evil if name.endswith("data.pkl") else good.read(name))


pickles = pytest.mark.parametrize("write_pickle", [plain_pickle, torch_archive])
