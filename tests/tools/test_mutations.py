"""The tests that guard the most costly mistakes do fail when the mistake is made."""

import pytest

from tests.tools.mutations import MUTATIONS, PACKAGE, all_pass_as_the_code_is, is_caught


@pytest.fixture(scope="module")
def passing():
    """A test that fails anyway catches nothing."""
    assert all_pass_as_the_code_is()


@pytest.mark.promise("B-21", "six deliberate mistakes are each caught by a named test", "6 of 6")
@pytest.mark.slow
@pytest.mark.usefixtures("passing")
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_is_caught_by_the_test_that_names_it(mutation):
    assert is_caught(mutation)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_line_to_mutate_is_there_once(mutation):
    assert (PACKAGE / mutation.file).read_text(encoding="utf-8").count(mutation.line) == 1
