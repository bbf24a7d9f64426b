"""A pytest plugin (`-p tests.tools.watcher`) that measures how far apart the compared tensors of each test were.

The largest difference that `torch.testing.assert_close` saw becomes a property of the test, ("difference", [precision,
value]), beside the figures that tests report on their own by `record_property("figure", ...)`.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    differences: dict[str, float] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.testing, "assert_close", _measured(torch.testing.assert_close, differences))
        result = yield
    item.user_properties += [("difference", pair) for pair in differences.items()]
    return result


def _measured(compare: Any, differences: dict[str, float]) -> Any:
    def measured(actual: Any, expected: Any, *args: Any, **options: Any) -> None:
        compare(actual, expected, *args, **options)
        # With a relative tolerance the difference itself says little.
        if not options.get("rtol") and isinstance(actual, torch.Tensor) and actual.is_floating_point():
            gap = torch.as_tensor(actual).double() - torch.as_tensor(expected).double()
            precision = str(actual.dtype).removeprefix("torch.")
            differences[precision] = max(differences.get(precision, 0.0), float(gap.nan_to_num(0.0).abs().max()))

    return measured
