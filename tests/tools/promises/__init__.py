"""What is promised, how exactly, and by which tests: the list behind `make reliability` and docs/reliability.md."""

from . import bad_input, faults, invariances, page, security
from .promise import Promise

SECTIONS = (bad_input, invariances, faults, page, security)
PROMISES = [promise for section in SECTIONS for promise in section.PROMISES]

__all__ = ["PROMISES", "Promise"]
