"""Look the pinned versions up in the public list of known weaknesses: `python -m tests.tools.audit`.

Installs pip-audit beside the package and runs it over constraints.txt. Ends with 0 if nothing is known, with 1 if
something is, and with 2 and one line if not every version could be looked up: without a network nothing was audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PINNED = Path(__file__).parents[2] / "constraints.txt"
# Held to the pinned versions, which the tests and the benchmarks in the same environment rely on.
INSTALL = ["pip", "install", "--quiet", "--disable-pip-version-check", "--constraint", str(PINNED), "pip-audit"]
AUDIT = ["pip_audit", "--strict", "--no-deps", "--disable-pip", "--format", "json", "--requirement", str(PINNED)]


def verdict(report: str, errors: str) -> tuple[int, str]:
    """What pip-audit found, in words.

    Args:
        report: what it wrote to its standard output: JSON, or nothing where it could not do its work.
        errors: what it wrote to its standard error.

    Returns:
        The exit code, and a line a weakness or one line.
    """
    try:
        packages = json.loads(report)["dependencies"]
    except ValueError:
        return 2, f"nothing was audited: {last_line(errors)}"
    if not packages:
        return 2, "nothing was audited: pip-audit reports no package"
    skipped = [package for package in packages if "vulns" not in package]
    if skipped:
        reasons = [f"{package['name']} ({package.get('skip_reason', 'no reason was given')})" for package in skipped]
        return 2, " ".join(f"not everything was audited: pip-audit skipped {', '.join(reasons)}".split())
    found = [(package, weakness) for package in packages for weakness in package["vulns"]]
    if not found:
        return 0, f"{len(packages)} pinned versions, no known weakness"
    lines = [f"{len(found)} known weaknesses in {len(packages)} pinned versions"]
    for package, weakness in found:
        mended = ", ".join(weakness["fix_versions"]) or "no version yet"
        lines.append(f"{package['name']} {package['version']}: {weakness['id']}, mended in {mended}")
    return 1, "\n".join(lines)


def last_line(text: str) -> str:
    """Where Python and pip say what went wrong, above it is how they came there."""
    return (text.strip().splitlines() or ["no reason was given"])[-1]


def run(module: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", *module], capture_output=True, text=True)


def main() -> int:
    installed = run(INSTALL)
    if installed.returncode:
        print(f"nothing was audited: pip-audit could not be installed: {last_line(installed.stderr)}", file=sys.stderr)
        return 2
    audited = run(AUDIT)
    code, words = verdict(audited.stdout, audited.stderr)
    print(words, file=sys.stderr if code == 2 else sys.stdout)
    return code


if __name__ == "__main__":
    sys.exit(main())
