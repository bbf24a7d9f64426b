"""The command mamba-ema: rows for people and programs, exit codes, interruption."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile as sf
import torch
from matplotlib.image import imread

from modeling_mamba_ema import MambaEMAFeatureExtractor
from modeling_mamba_ema.inference import EmotionTracker
from modeling_mamba_ema.inference.command_line import main
from modeling_mamba_ema.sample import FOLDER, load_sample_conversation
from tests.helpers import tiny_model
from tests.tiny_corpus import ROOT, environment

RATE = 16_000


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("model")
    tiny_model(label_ranges={"valence": (1, 7)}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def expected():
    """The sample conversation turn by turn, and each turn alone."""
    live, alone = (EmotionTracker(tiny_model(), MambaEMAFeatureExtractor()) for _ in range(2))
    turns = load_sample_conversation()
    whole = [live.update(turn["waveform"]).values for turn in turns]
    separate = []
    for turn in turns:
        alone.reset()
        separate.append(alone.update(turn["waveform"]).values)
    return whole, separate


def call(path, seconds=30):
    samples = np.concatenate([turn["waveform"] for turn in load_sample_conversation()] * 3)
    sf.write(path, samples[: seconds * RATE], RATE)
    return str(path)


def printed(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def assert_values(rows, wanted):
    assert len(rows) == len(wanted)
    for row, values in zip(rows, wanted):
        assert {label: row[label] for label in values} == pytest.approx(values, abs=1e-6)


def test_the_sample_is_one_line_to_a_first_result(model, expected, capsys):
    assert main(["predict", "--model", model, "--sample"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["file", "speaker", "seconds", "valence", "arousal", "low", "level"]
    assert len(lines) == 8
    assert lines[1].split()[:2] == ["turn0_anna.wav", "anna"]
    for line, values in zip(lines[1:], expected[0]):
        assert [float(cell) for cell in line.split()[3:5]] == pytest.approx(list(values.values()), abs=6e-4)


def test_files_are_separate_unless_they_are_a_conversation(model, expected, capsys):
    files = [turn["file_name"] for turn in load_sample_conversation()]
    assert main(["predict", "--model", model, "--json", *files]) == 0
    rows = printed(capsys)
    assert_values(rows, expected[1])
    assert rows[0]["file"] == files[0]
    assert rows[0]["valence_value"] == pytest.approx(1 + 6 * rows[0]["valence"], abs=1e-5)
    assert main(["predict", "--model", model, "--json", "--conversation", *files]) == 0
    assert_values(printed(capsys), expected[0])


def test_a_bad_file_is_one_line_and_the_others_are_answered_for(model, expected, capsys, tmp_path):
    (tmp_path / "broken.wav").write_text("no audio")
    sf.write(tmp_path / "short.wav", np.zeros(100), RATE)
    files = [str(tmp_path / "broken.wav"), str(FOLDER / "turn0_anna.wav"), str(tmp_path / "short.wav"), "absent.wav"]
    assert main(["predict", "--model", model, "--json", *files]) == 1
    captured = capsys.readouterr()
    assert_values([json.loads(line) for line in captured.out.splitlines()], expected[1][:1])
    complaints = captured.err.splitlines()
    assert len(complaints) == 3
    for complaint, name in zip(complaints, ("broken.wav", "short.wav", "absent.wav")):
        assert complaint.startswith(f"mamba-ema: {name}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["predict", "--model", "no-such-folder/no-such-model/at-all", "--sample"],
        ["predict", "--model", "{model}"],
        ["predict", "--model", "{model}", "--sample", "a.wav"],
        ["timeline", "--model", "{model}", "absent.wav"],
        ["timeline", "--model", "{model}", "{call}", "--segments", "absent.csv"],
        ["timeline", "--model", "{model}", "{call}", "--window", "50"],
        ["timeline", "--model", "{model}", "{call}", "--output", "{folder}/rows.xlsx"],
        ["timeline", "--model", "{model}", "{call}", "--plot", "{folder}/rows.gif"],
        ["timeline", "--model", "{empty}", "{call}"],
        ["demo", "--model", "{empty}"],
        ["export-onnx", "--model", "{empty}", "{folder}/onnx"],
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_with_code_1(model, tmp_path, capsys, arguments):
    (tmp_path / "empty").mkdir()
    places = {"model": model, "call": call(tmp_path / "call.wav"), "folder": tmp_path, "empty": tmp_path / "empty"}
    assert main([argument.format(**places) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert captured.err.startswith("mamba-ema: ")


@pytest.mark.parametrize("arguments", [[], ["predict"], ["timeline", "--model", "m"], ["unknown"]])
def test_wrong_usage_is_code_2(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


def test_a_timeline_is_printed_written_and_drawn(model, tmp_path, capsys):
    (tmp_path / "who.csv").write_text("start,end,speaker\n0.5,3,anna\n4,9.25,ben\n")
    recording = call(tmp_path / "call.wav")
    outputs = ["--output", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "out.png")]
    segments = ["--segments", str(tmp_path / "who.csv")]
    assert main(["timeline", "--model", model, recording, *segments, *outputs, "--json"]) == 0
    rows = printed(capsys)
    assert json.loads((tmp_path / "rows.json").read_text()) == rows
    assert [(row["start"], row["end"], row["speaker"]) for row in rows] == [(0.5, 3.0, "anna"), (4.0, 9.25, "ben")]
    assert imread(tmp_path / "out.png").std() > 0.05
    assert main(["timeline", "--model", model, recording]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["start", "end", "speaker", "valence", "arousal", "low", "level"]
    assert len(lines) == 4
    assert main(["timeline", "--model", model, recording, "--vad", "--json"]) == 0
    assert len(printed(capsys)) >= 3


def test_silence_has_no_speech_and_says_so(model, tmp_path, capsys):
    sf.write(tmp_path / "silence.wav", np.zeros(5 * RATE), RATE)
    assert main(["timeline", "--model", model, str(tmp_path / "silence.wav"), "--vad"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no speech was found in silence.wav" in captured.err


def test_ctrl_c_keeps_the_rows_that_were_finished(model, tmp_path):
    samples = np.random.default_rng(0).normal(0, 0.05, 1_200 * RATE).astype(np.float32)
    sf.write(tmp_path / "long.wav", samples, RATE)
    rows, picture = tmp_path / "rows.json", tmp_path / "out.svg"
    program = [sys.executable, "-m", "modeling_mamba_ema.inference.command_line", "timeline", "--model", model]
    options = ["--window", "1", "--output", str(rows), "--plot", str(picture)]
    process = subprocess.Popen(
        [*program, str(tmp_path / "long.wav"), *options],
        cwd=ROOT,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (rows.exists() and rows.stat().st_size > 2_000) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGINT)
        _, complaint = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, complaint
    assert "what was finished is kept" in complaint
    kept = json.loads(rows.read_text())
    assert 5 < len(kept) < 1_200
    assert [row["start"] for row in kept] == list(range(len(kept)))
    assert picture.stat().st_size > 5_000


def test_the_commands_of_the_readme_run(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("turn1.wav", "turn2.flac", "call.wav"):
        call(name, seconds=3)
    (tmp_path / "speakers.rttm").write_text("SPEAKER call 1 0.5 2 <NA> <NA> anna <NA> <NA>\n")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line for line in readme.splitlines() if line.startswith(("mamba-ema predict", "mamba-ema timeline"))]
    assert len(commands) >= 4
    for command in commands:
        assert main(shlex.split(command.replace("outputs/demo/model", model))[1:]) == 0, command
        assert capsys.readouterr().err == ""
    assert (tmp_path / "call.csv").read_text().startswith("start,end,speaker,valence,arousal,")


def test_the_command_is_installed():
    from importlib.metadata import entry_points

    targets = {entry.value for entry in entry_points(group="console_scripts", name="mamba-ema")}
    if not targets:
        pytest.skip("the package is not installed here, or was before it had the command")
    assert targets == {"modeling_mamba_ema.inference.command_line:main"}
