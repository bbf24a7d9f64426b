"""The limit on memory is there, so that a test that runs away ends as a failure."""

import sys

import numpy as np
import pytest
import torch


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="no limit is set there")
def test_a_test_cannot_take_all_memory():
    with pytest.raises(MemoryError):
        np.zeros(9 * 2**30, np.uint8)
