"""Promises are marks on tests, and docs/reliability.md shows them as the tests word them."""

import pytest

from tests.tools.promises import read_promises
from tests.tools.report import BEGIN, DOCUMENT, END, Seen, table


def test_every_promise_stands_in_the_document_as_its_tests_word_it():
    document = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]
    hint = "`make reliability` prints the promises; `python -m tests.tools.report --write` writes them"
    assert without_what_was_seen(document) == without_what_was_seen(table(read_promises(), Seen())), hint


def without_what_was_seen(rows):
    """Id, promise, tolerance and tests of each row, all as the document words them."""
    cells = [row.strip("| ").split(" | ") for row in rows.splitlines()]
    return [[*row[:3], row[-1]] for row in cells]


def test_the_marks_are_those_that_pytest_sees(request):
    """The promises are read from the source; an alias or a mark on a class would be overlooked."""
    marked = {
        (mark.args[0], item.nodeid.split("[")[0].removeprefix("tests/"))
        for item in request.session.items
        for mark in item.iter_markers("promise")
    }
    assert marked <= {(promise.id, test) for promise in read_promises() for test in promise.tests}


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        (["'X-01'", "'X-01'"], r"X-01 is worded by none of its tests: test_a.py::test_0, test_a.py::test_1"),
        (["'X-01', 'a', '1'", "'X-01', 'b', '2'"], r"X-01 is worded twice, the second time by test_a.py::test_1"),
    ],
)
def test_a_promise_is_worded_by_exactly_one_of_its_tests(tmp_path, marks, message):
    tests = [f"@pytest.mark.promise({mark})\ndef test_{place}(): ...\n" for place, mark in enumerate(marks)]
    (tmp_path / "test_a.py").write_text("\n".join(tests))
    with pytest.raises(ValueError, match=message):
        read_promises(tmp_path)
