"""Reading with a time limit."""

import threading

import pytest

from modeling_mamba_ema.data.watched_reading import within_seconds


def test_after_a_call_that_hangs_the_next_one_is_answered_by_another_thread():
    first = within_seconds(60, threading.get_ident)
    assert within_seconds(60, threading.get_ident) == first != threading.get_ident()
    release = threading.Event()
    try:
        with pytest.raises(TimeoutError, match=r"no answer within 0.1 s"):
            within_seconds(0.1, release.wait)
        assert within_seconds(60, threading.get_ident) != first
    finally:
        release.set()


def test_what_the_function_raises_is_raised():
    with pytest.raises(ZeroDivisionError):
        within_seconds(60, lambda: 1 / 0)
