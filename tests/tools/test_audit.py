"""The audit says in words what it found, and that it found nothing only where it could look."""

import json

import pytest

from tests.tools import audit

REFUSED = "Traceback (most recent call last):\n  File ...\nConnectionError: Failed to resolve 'service.invalid'\n"


def report(*weaknesses):
    torch = {"name": "torch", "version": "2.5.1", "vulns": list(weaknesses)}
    return json.dumps({"dependencies": [torch, {"name": "numpy", "version": "2.4", "vulns": []}], "fixes": []})


def test_a_known_weakness_is_named_with_the_version_that_mends_it():
    code, words = audit.verdict(report({"id": "CVE-2025-32434", "fix_versions": ["2.6.0"]}), "")
    assert code == 1
    assert words.splitlines()[1] == "torch 2.5.1: CVE-2025-32434, mended in 2.6.0"


def test_versions_without_a_known_weakness_are_counted():
    assert audit.verdict(report(), "WARNING: not hashed") == (0, "2 pinned versions, no known weakness")


@pytest.mark.parametrize("errors", [REFUSED, ""])
def test_an_audit_that_could_not_look_is_one_line_and_no_all_clear(errors):
    code, words = audit.verdict("", errors)
    assert code == 2
    assert words.startswith("nothing was audited: ")
    assert len(words.splitlines()) == 1


def test_a_report_without_packages_is_no_all_clear():
    code, words = audit.verdict('{"dependencies": [], "fixes": []}', "")
    assert (code, words) == (2, "nothing was audited: pip-audit reports no package")


def test_a_package_that_was_skipped_is_named_and_there_is_no_all_clear():
    packages = json.loads(report())["dependencies"] + [{"name": "gone", "skip_reason": "not found\non PyPI"}]
    code, words = audit.verdict(json.dumps({"dependencies": packages}), "")
    assert code == 2
    assert words == "not everything was audited: pip-audit skipped gone (not found on PyPI)"


def test_installing_the_audit_moves_no_pinned_version():
    assert audit.INSTALL[audit.INSTALL.index("--constraint") + 1] == str(audit.PINNED)
    assert audit.PINNED.is_file()


def test_without_an_index_of_packages_it_is_one_line_too(monkeypatch, capsys):
    monkeypatch.setattr(audit, "INSTALL", ["pip", "install", "--quiet", "--no-index", "no-such-package-as-this"])
    assert audit.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nothing was audited: pip-audit could not be installed: ")
