"""Break the code in six places, one at a time, and see that a named test fails.

Run as `python -m tests.tools.mutations`.

A test that has never failed proves little. Each mutation is one that a later change could make unnoticed, because the
code runs on and gives plausible numbers.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "modeling_mamba_ema"


@dataclass
class Mutation:
    """A line of the package, what it becomes, and the test that must see it."""

    name: str
    file: str
    line: str
    becomes: str
    test: str


MUTATIONS = [
    Mutation(
        "mask dropped in pooling",
        "speech_encoder.py",
        "        weights = pooling_weights(scores, frame_mask)",
        "        weights = pooling_weights(scores, torch.ones_like(frame_mask))",
        "tests/test_invariances.py::test_an_utterance_gets_the_same_numbers_alone_in_a_batch_and_in_any_conversation",
    ),
    Mutation(
        "mask dropped in the padded encoder",
        "speech_encoder.py",
        "        frame_mask = length_mask(frame_lengths, hidden.shape[1])",
        "        frame_mask = None",
        "tests/test_invariances.py::test_the_padded_form_of_the_encoder_keeps_the_promise_too",
    ),
    Mutation(
        "world size factor dropped",
        "ccc_loss.py",
        "loss.detach() + world_size * (loss - loss.detach())",
        "loss.detach() + (loss - loss.detach())",
        "tests/test_ccc_loss.py::test_two_processes_have_the_loss_and_gradient_of_one[4+4]",
    ),
    Mutation(
        "accepts_loss_kwargs dropped",
        "modeling_mamba_ema.py",
        "    accepts_loss_kwargs = False",
        "    accepts_loss_kwargs = True",
        "tests/training/test_trackers_and_precision.py::test_accumulation_scales_neither_the_logged_loss_nor_the_gradient",
    ),
    Mutation(
        "state freeze dropped",
        "mamba2.py",
        "dt = torch.where(valid[..., None], F.softplus(dt + self.dt_bias.to(dtype)), 0.0)",
        "dt = F.softplus(dt + self.dt_bias.to(dtype))",
        "tests/test_invariances.py::test_the_state_of_a_ragged_batch_continues_each_conversation_as_if_it_had_been_alone",
    ),
    Mutation(
        "float32 EMA dropped",
        "conversation_encoder.py",
        "        dtype = state_dtype(values.dtype)\n        _, turns",
        "        dtype = values.dtype\n        _, turns",
        "tests/test_conversation_encoder.py::test_ema_in_bfloat16_keeps_a_float32_state_and_does_not_stall",
    ),
]


def passes(tests: list[str], tree: Path) -> bool:
    """Whether tests pass with the package of a tree.

    Raises:
        RuntimeError: they did not run at all, which proves nothing.
    """
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    if done.returncode not in (0, 1) or "Failed: Timeout" in done.stdout:
        raise RuntimeError(f"{tests} did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 0


@contextlib.contextmanager
def copy_of_the_code() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("modeling_mamba_ema", "tests"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        yield tree


def all_pass_as_the_code_is() -> bool:
    """Whether every named test passes without a mutation; in a copy, too, for that the copy works has to be seen."""
    with copy_of_the_code() as tree:
        return passes([mutation.test for mutation in MUTATIONS], tree)


def is_caught(mutation: Mutation) -> bool:
    """Whether the named test fails with the mutation in a copy of the code."""
    with copy_of_the_code() as tree:
        file = tree / "modeling_mamba_ema" / mutation.file
        text = file.read_text(encoding="utf-8")
        if text.count(mutation.line) != 1:
            raise RuntimeError(f"{mutation.file} does not hold once: {mutation.line.strip()}")
        file.write_text(text.replace(mutation.line, mutation.becomes), encoding="utf-8")
        return not passes([mutation.test], tree)


def main() -> int:
    if not all_pass_as_the_code_is():
        print("one of the tests fails without a mutation: python -m pytest " + " ".join(m.test for m in MUTATIONS))
        return 1
    caught = 0
    for mutation in MUTATIONS:
        seen = is_caught(mutation)
        caught += seen
        print(f"{'caught' if seen else 'MISSED'}  {mutation.name:<28} {mutation.test}", flush=True)
    print(f"{caught} of {len(MUTATIONS)} mutations caught")
    return int(caught != len(MUTATIONS))


if __name__ == "__main__":
    sys.exit(main())
