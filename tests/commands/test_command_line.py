"""The command mamba-ema: rows for people and programs, exit codes, interruption."""

import json
import os
import re
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
from modeling_mamba_ema.__main__ import COMMANDS, main
from modeling_mamba_ema.inference import EmotionTracker, TimelineWriter
from modeling_mamba_ema.sample import FOLDER, load_sample_conversation
from tests.support.models import tiny_model
from tests.support.programs import ROOT, run_program

RATE = 16_000


@pytest.fixture(scope="module")
def model(saved_model):
    return str(saved_model)


@pytest.fixture(scope="module")
def expected():
    """The sample conversation turn by turn, and each turn alone."""
    live, alone = (EmotionTracker(tiny_model(), MambaEMAFeatureExtractor()) for _ in range(2))
    turns = load_sample_conversation()
    whole = [live.update(turn["waveform"], RATE).values for turn in turns]
    separate = []
    for turn in turns:
        alone.reset()
        separate.append(alone.update(turn["waveform"], RATE).values)
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
        assert {label: row[label] for label in values} == pytest.approx(values, abs=6e-5)


# the command itself


@pytest.mark.parametrize("command", [None, *(name for names in COMMANDS.values() for name in names)])
def test_help_needs_no_heavy_import_and_names_every_command(command):
    program = (
        "import sys, types\n"
        "package = types.ModuleType('modeling_mamba_ema')\n"  # without its __init__
        f"package.__path__ = [{str(ROOT / 'modeling_mamba_ema')!r}]\n"
        "sys.modules['modeling_mamba_ema'] = package\n"
        "from modeling_mamba_ema.__main__ import main\n"
        "try:\n"
        f"    main({[*filter(None, [command]), '--help']!r})\n"
        "finally:\n"
        "    print({'numpy', 'torch', 'transformers', 'pandas', 'datasets'} & set(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "set()\n")
    if command is None:
        for name in (name for names in COMMANDS.values() for name in names):
            assert f"  {name} " in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [[], ["predict"], ["predict", "--model", "m"], ["predict", "--model", "m", "--sample", "a.wav"], ["unknown"]],
)
def test_wrong_usage_is_code_2(arguments):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("predict --model no-such-folder/no-such-model/at-all --sample", "neither an existing folder"),
        ("predict --model {model} --split test {call}", "--split .* a corpus"),
        ("predict --model {model} --plots {folder} {call} {call}", "--plots draws one conversation"),
        ("predict --model {model} --conversation-id x {sample}", "no conversation x; there are sample"),
        ("predict --model {model} --split x {sample}", "no split x; there are train"),
        ("timeline --model {model} absent.wav", "absent.wav does not exist"),
        ("timeline --model {model} {call} --channel 2", "call.wav has 1 channel, no channel 2"),
        ("timeline --model {model} {call} --segments absent.csv", "absent.csv does not exist"),
        ("timeline --model {model} {call} --window 50", "allowed are 1 to 30 s"),
        ("timeline --model {model} {call} --output {folder}/rows.xlsx", "rows.xlsx ends in"),
        ("timeline --model {model} {call} --plot {folder}/rows.gif", "rows.gif ends in"),
        ("timeline --model {model} {call} --output {call}", "call.wav exists; --overwrite"),
        ("timeline --model {model} {call} --segments {empty}", "empty is a folder; segments come from"),
        ("timeline --model {empty} {call}", "empty holds no config.json"),
        ("timeline --model {call} {call}", "call.wav is a file; name the folder of a model"),
        ("adopt {folder}/absent.pt {folder}/out", "absent.pt is no file"),
        ("page --model {folder}", "holds no config.json.*; did you mean .*/inside"),
        ("export --model {empty} {folder}/onnx", "no config.json"),
        ("publish {empty} me/emotions", "there is no config.json"),
        ("publish {empty} 'me/emo tions'", "me/emo tions"),
        ("prepare iemocap {empty} --output {folder}/out", "not all of IEMOCAP"),
        ("prepare iemocap {empty} --output {folder}/out --fold 6", "has 5 folds; there is no fold 6"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence_with_code_1(model, tmp_path, capsys, words, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "config.json").write_text("{}")
    places = {"call": call(tmp_path / "call.wav"), "folder": tmp_path, "empty": tmp_path / "empty", "sample": FOLDER}
    assert main([word.format(model=model, **places) for word in shlex.split(words)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("mamba-ema: ")
    assert len([line for line in captured.err.splitlines() if not line.startswith("  ")]) == 1
    assert re.search(message, captured.err), captured.err


def test_a_mistyped_folder_is_not_looked_for_on_the_hub(tmp_path, monkeypatch, capsys):
    def refuse(*_, **__):
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr("huggingface_hub.file_download._get_metadata_or_catch_error", refuse)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs" / "demo" / "model").mkdir(parents=True)
    (tmp_path / "outputs" / "demo" / "model" / "config.json").write_text("{}")
    for name in ("outputs/nothing", "outputs", "outputs/demo"):
        assert main(["predict", "--model", name, "--sample"]) == 1
        assert "did you mean outputs/demo/model?" in capsys.readouterr().err
    assert main(["predict", "--model", "nothing", "--sample"]) == 1
    assert "neither an existing folder nor a name on the Hub" in capsys.readouterr().err


def test_the_command_is_installed():
    from importlib.metadata import entry_points

    targets = {entry.value for entry in entry_points(group="console_scripts", name="mamba-ema")}
    if not targets:
        pytest.skip("the package is not installed here, or was before it had the command")
    assert targets == {"modeling_mamba_ema.__main__:main"}


# predict


def test_the_sample_is_one_line_to_a_first_result(model, expected, capsys):
    assert main(["predict", "--model", model, "--sample"]) == 0
    lines = capsys.readouterr().out.splitlines()
    columns = ["file", "speaker", "seconds", "valence", "arousal", "valence value", "valence value label"]
    columns += ["arousal label"]
    assert lines[0].split() == " ".join([*columns, "reading"]).split()
    assert len(lines) == 10
    assert lines[-2].startswith("anna (4 turns, ")
    assert lines[-1] == "valence: 0 unpleasant, 1 pleasant; arousal: 0 calm, 1 excited"
    assert lines[1].split()[:2] == ["turn0_anna.wav", "anna"]
    assert "1.900 0.700" in " ".join(lines[1].split())
    for line, values in zip(lines[1:-2], expected[0], strict=True):
        assert [float(cell) for cell in line.split()[3:5]] == pytest.approx(list(values.values()), abs=6e-4)


@pytest.mark.promise("B-19")
def test_files_are_separate_unless_they_are_a_conversation(model, expected, capsys):
    files = [turn["file_name"] for turn in load_sample_conversation()]
    assert main(["predict", "--model", model, "--json", *files]) == 0
    rows = printed(capsys)
    assert_values(rows, expected[1])
    assert rows[0]["file"] == files[0]
    assert rows[0]["valence_value"] == pytest.approx(1 + 6 * rows[0]["valence"], abs=1e-3)
    assert "arousal_value" not in rows[0]  # its scale is the unit scale
    assert main(["predict", "--model", model, "--json", "--conversation", *files]) == 0
    assert_values(printed(capsys), expected[0])


def test_a_corpus_is_predicted_beside_its_labels_and_drawn(model, expected, tmp_path, capsys):
    chosen = ["--split", "train", "--conversation-id", "sample"]
    assert main(["predict", "--model", model, str(FOLDER), "--json", *chosen]) == 0
    rows = printed(capsys)
    assert_values(rows, expected[0])
    assert [row["turn"] for row in rows] == list(range(7))
    assert (rows[0]["conversation"], rows[0]["speaker"], rows[0]["arousal_label"]) == ("sample", "anna", 0.7)
    command = ["predict", "--model", model, str(FOLDER / "metadata.jsonl"), "--plots", str(tmp_path)]
    assert main(command) == 0
    assert "trajectory.png" in capsys.readouterr().out.splitlines()[-1]
    for name in ("trajectory.png", "attention.png"):
        assert imread(tmp_path / name).std() > 0.05
    assert main(command) == 1
    assert "trajectory.png exists" in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0


def test_a_corpus_without_labels_and_with_turns_of_any_length_is_predicted(model, tmp_path, capsys):
    lengths = {"a.wav": 320, "b.wav": 8_000, "c.wav": 31 * RATE}
    for name, length in lengths.items():
        sf.write(tmp_path / name, np.random.default_rng(0).normal(0, 0.1, length), RATE)
    rows = [{"file_name": name, "conversation_id": 7, "turn": turn} for turn, name in enumerate(lengths)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert main(["predict", "--model", model, "--json", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    (row,) = map(json.loads, captured.out.splitlines())
    assert (row["conversation"], row["turn"]) == ("7", 1)
    assert "valence_label" not in row
    short, long = captured.err.splitlines()
    assert short == "mamba-ema: a.wav lasts 0.02 s; an utterance lasts 0.025 to 30 s"
    assert long.startswith("mamba-ema: c.wav lasts 31 s; an utterance lasts 0.025 to 30 s: cut it into turns")
    assert "`mamba-ema timeline`" in long


@pytest.mark.parametrize("scale", [None, (1, 7)])
def test_labels_on_another_scale_and_unrated_turns_do_not_stop_predictions(model, tmp_path, capsys, scale):
    rows = []
    for turn, label in enumerate([1, 7, None]):
        sf.write(tmp_path / f"{turn}.wav", np.random.default_rng(turn).normal(0, 0.1, RATE), RATE)
        row = {"file_name": f"{turn}.wav", "conversation_id": "c", "turn": str(turn), "valence": 4, "arousal": label}
        rows.append(json.dumps(row))
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    if scale is not None:
        (tmp_path / "corpus.json").write_text(json.dumps({"label_ranges": {"valence": scale, "arousal": scale}}))
    assert main(["predict", "--model", model, "--json", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert [row["turn"] for row in found] == [0, 1, 2]
    if scale is None:
        assert "note: the labels of the corpus are left out: arousal of turn 1 " in captured.err
        assert "arousal_label" not in found[0]
    else:
        assert captured.err == ""
        # On the scale of the value beside it: the model's valence is from 1 to 7, its arousal from 0 to 1.
        labels = [(row["valence_value_label"], row["arousal_label"]) for row in found]
        assert labels == [(4.0, 0.0), (4.0, 1.0), (4.0, None)]
        assert main(["predict", "--model", model, str(tmp_path)]) == 0
        assert "-100" not in capsys.readouterr().out


def test_a_console_that_lacks_a_character_loses_no_row(model, tmp_path):
    names = ["żółć.wav", "plain.wav"]
    for name in names:
        call(tmp_path / name, seconds=1)
    command = ["-m", "modeling_mamba_ema", "predict", "--model", model]
    done = run_program(
        *command, *(tmp_path / name for name in [*names, "ź.wav"]), check=False, PYTHONIOENCODING="ascii"
    )
    assert done.returncode == 1
    first, second, *_ = done.stdout.splitlines()[1:]
    assert first.startswith(r"\u017c\xf3\u0142\u0107.wav")
    assert second.startswith("plain.wav")
    assert done.stderr.splitlines()[-1].startswith(r"mamba-ema: \u017a.wav does not exist")


def test_threads_that_wait_give_up_their_core(model, tmp_path):
    name = call(tmp_path / "turn.wav", seconds=1)
    done = run_program("-m", "modeling_mamba_ema", "predict", "--model", model, name, OMP_DISPLAY_ENV="VERBOSE")
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch has another OpenMP than GNU's")
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr


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


def test_names_of_files_are_not_cut_and_near_silence_is_named(model, tmp_path, capsys):
    name = "a_recording_of_the_third_of_may_in_the_afternoon.wav"
    sf.write(tmp_path / name, np.zeros(RATE), RATE)
    assert main(["predict", "--model", model, str(tmp_path / name)]) == 0
    header, row, _ = capsys.readouterr().out.splitlines()
    assert row.startswith(name)
    assert row.endswith("near silence")
    assert header.index("speaker") == row.index("-")


def test_channels_are_averaged_or_chosen_and_different_sound_is_noted_once(model, expected, tmp_path, capsys):
    turns = [turn["waveform"][:20_000] for turn in load_sample_conversation()[:2]]
    sf.write(tmp_path / "two.wav", np.stack(turns, axis=1), RATE, subtype="FLOAT")
    rows, notes = [], []
    for options in (["--channel", "1"], ["--channel", "2"], []):
        assert main(["predict", "--model", model, "--json", str(tmp_path / "two.wav"), *options]) == 0
        captured = capsys.readouterr()
        rows.append(json.loads(captured.out))
        notes.append(captured.err)
    for row, waveform in zip(rows, [*turns, (turns[0] + turns[1]) / 2]):
        live = EmotionTracker(tiny_model(), MambaEMAFeatureExtractor())
        assert_values([row], [live.update(waveform, RATE).values])
    assert notes[:2] == ["", ""]
    assert notes[2].startswith("mamba-ema: note: two.wav: its 2 channels hold different sound")
    assert "--channel 1" in notes[2]


def test_channels_are_split_into_the_turns_of_one_conversation_in_every_command(model, tmp_path, capsys):
    sides = [turn["waveform"][:20_000] for turn in load_sample_conversation()[:2]]
    sf.write(tmp_path / "call.wav", np.stack(sides, axis=1), RATE, subtype="FLOAT")
    live = EmotionTracker(tiny_model(), MambaEMAFeatureExtractor())
    wanted = [live.update(side, RATE).values for side in sides]
    for command in ("predict", "timeline"):
        assert main([command, "--model", model, str(tmp_path / "call.wav"), "--split-channels", "--json"]) == 0
        captured = capsys.readouterr()
        rows = [json.loads(line) for line in captured.out.splitlines()]
        assert [row["speaker"] for row in rows] == ["channel 1", "channel 2"]
        assert_values(rows, wanted)
        assert captured.err == ""
        sf.write(tmp_path / "mono.wav", sides[0], RATE)
        assert main([command, "--model", model, str(tmp_path / "mono.wav"), "--split-channels"]) == 1
        assert "mono.wav has 1 channel; there is nothing to split" in capsys.readouterr().err
    lines = "SPEAKER call 1 0 1 <NA> <NA> anna <NA> <NA>\nSPEAKER call 2 0.2 1 <NA> <NA> ben <NA> <NA>\n"
    (tmp_path / "call.rttm").write_text(lines + "SPEAKER call 2 1.2 0 <NA> <NA> ben <NA> <NA>\n")
    options = ["--segments", str(tmp_path / "call.rttm"), "--json"]
    assert main(["timeline", "--model", model, str(tmp_path / "call.wav"), *options]) == 0
    rows = printed(capsys)
    live.reset()
    assert_values(rows[:2], [live.update(part, RATE).values for part in (sides[0][:RATE], sides[1][3_200:19_200])])
    assert (rows[2]["speaker"], rows[2]["valence"]) == ("ben", None)


# timeline


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
    assert main(["timeline", "--model", model, recording, *segments, *outputs, "--overwrite"]) == 0
    summary, ends, written = capsys.readouterr().out.splitlines()[:3]
    assert ends == "valence: 0 unpleasant, 1 pleasant; arousal: 0 calm, 1 excited"
    assert summary.startswith("anna (1 turn, 2 s): valence 0.")
    assert written.endswith("rows.json: 2 scored segments, to 9.2 of 30.0 s")
    assert main(["timeline", "--model", model, recording]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["start", "end", "speaker", "valence", "arousal", "valence", "value", "reading"]
    assert len(lines) == 6
    assert main(["timeline", "--model", model, recording, "--vad", "--json"]) == 0
    assert len(printed(capsys)) >= 3


def test_silence_has_no_speech_and_says_so(model, tmp_path, capsys):
    sf.write(tmp_path / "silence.wav", np.zeros(5 * RATE), RATE)
    assert main(["timeline", "--model", model, str(tmp_path / "silence.wav"), "--vad"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "no speech was found in silence.wav" in captured.err


def test_segments_that_are_silent_are_scored_and_said_to_be_silent(model, tmp_path, capsys):
    sf.write(tmp_path / "silence.wav", np.zeros(5 * RATE), RATE)
    assert main(["timeline", "--model", model, str(tmp_path / "silence.wav")]) == 0
    _, row, summary, _ = capsys.readouterr().out.splitlines()
    assert row.endswith("near silence")
    assert summary == "All of it is near silence, where the values say nothing about a voice."


@pytest.mark.parametrize("command", ["predict", "report", "serve"])
def test_a_device_that_is_not_there_is_one_line_before_anything_is_done(model, command, tmp_path, capsys):
    others = {"predict": ["--sample"], "report": [str(FOLDER), "--output", str(tmp_path / "out")], "serve": []}
    assert main([command, "--model", model, "--device", "gpu", *others[command]]) == 1
    message = capsys.readouterr().err
    assert message.startswith("mamba-ema: this machine has no device 'gpu' that torch can use; it has cpu")
    assert len(message.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_corpus_that_is_too_small_to_measure_names_no_settings_of_training(model, tmp_path, capsys, caplog):
    sf.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, RATE), RATE)
    row = {"file_name": "a.wav", "conversation_id": "c", "turn": 0, "split": "test", "valence": 4, "arousal": 0.5}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    command = ["--model", model, str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(["evaluate", *command]) == 0
    assert "test: no label has two turns to measure on; predictions only" in capsys.readouterr().out
    assert "(1 labelled turns): a CCC needs two turns or more with labels that vary" in caplog.text
    assert main(["report", *command]) == 1
    assert "model.params" not in caplog.text + capsys.readouterr().err


def test_ctrl_c_keeps_the_rows_that_were_finished_and_says_where_it_stopped(model, tmp_path, monkeypatch, capsys):
    write = TimelineWriter.write

    def interrupt(writer, row):
        write(writer, row)
        if row["start"] == 4.0:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TimelineWriter, "write", interrupt)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    rows, picture = tmp_path / "rows.json", tmp_path / "out.svg"
    options = ["--window", "1", "--output", str(rows), "--plot", str(picture)]
    try:
        assert main(["timeline", "--model", model, call(tmp_path / "call.wav"), *options]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "stopped at 5.0 of 30.0 s; what was finished is kept" in capsys.readouterr().err
    assert [row["start"] for row in json.loads(rows.read_text())] == [0, 1, 2, 3, 4]
    assert picture.stat().st_size > 5_000


@pytest.mark.parametrize(
    ("program", "error"),
    [
        (["-m", "modeling_mamba_ema", "predict", "--model", "m", "a.wav"], "mamba-ema: stopped\n"),
        (["examples/run_finetune.py", "configuration/demo.yaml"], ""),
    ],
    ids=["mamba-ema", "run_finetune"],
)
def test_ctrl_c_while_libraries_are_imported_ends_without_a_traceback(tmp_path, program, error):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")  # as Ctrl-C does in whatever line is run
    result = run_program(*program, check=False, PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    assert (result.returncode, result.stderr) == (130, error)


# listen


def test_a_microphone_that_cannot_be_used_is_said_before_the_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    assert main(["listen", "--model", "nothing"]) == 1
    assert capsys.readouterr() == ("", "mamba-ema: the microphone needs sounddevice: pip install sounddevice\n")


@pytest.fixture(scope="module")
def pauses(tmp_path_factory):
    """A recording of three turns with a second of silence before each."""
    silence = np.zeros(RATE, dtype=np.float32)
    turns = [turn["waveform"] for turn in load_sample_conversation()[2:5]]
    path = tmp_path_factory.mktemp("listen") / "call.wav"
    sf.write(path, np.concatenate([part for turn in turns for part in (silence, turn)]), RATE)
    return path


def test_turns_that_are_heard_are_printed_with_their_begin_no_earlier_than_they_were_spoken(model, pauses, capsys):
    begin = time.monotonic()
    assert main(["listen", "--model", model, "--file", str(pauses), "--speed", "10"]) == 0
    assert time.monotonic() - begin > sf.info(pauses).duration / 10
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["begin", "seconds", "valence", "arousal"]
    rows = [[float(cell) for cell in line.split()[:4]] for line in lines[1:]]
    assert 3 <= len(rows) <= 4
    assert rows[0][0] == pytest.approx(1.0, abs=0.15)
    assert all(0 <= value <= 1 for row in rows for value in row[2:])


@pytest.mark.parametrize("name", ["absent.wav", "README.md"])
def test_what_cannot_be_heard_is_one_line(model, name, capsys):
    assert main(["listen", "--model", model, "--file", name]) == 1
    assert capsys.readouterr().err.startswith(f"mamba-ema: {name} ")


# the README


def test_the_commands_of_the_readme_and_the_guide_run(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("speech.wav", "turn1.wav", "turn2.flac", "call.wav"):
        call(name, seconds=3)
    (tmp_path / "speakers.rttm").write_text("SPEAKER call 1 0.5 2 <NA> <NA> anna <NA> <NA>\n")
    text = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/streaming.md"))
    commands = [line for line in text.splitlines() if line.startswith(("mamba-ema predict", "mamba-ema timeline"))]
    assert len(commands) >= 4
    for command in commands:
        assert main(shlex.split(re.sub("outputs/demo/model|models/odyssey", model, command), comments=True)[1:]) == 0, (
            command
        )
        assert capsys.readouterr().err == ""
    assert (tmp_path / "call.csv").read_text().startswith("start,end,speaker,valence,arousal,")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("predict --model m --min-confidence 2", "--min-confidence: 2 is not allowed; numbers from 0 to 1 are"),
        ("predict --model m --max-width nan", "nan is not allowed; numbers from 0 to 1 are"),
        ("predict --model m --channel 0", "--channel: 0 is not allowed; whole numbers from 1 to 256 are"),
        ("listen --model m --speed 0", "0 is not allowed; numbers from 0.01 to 1000 are"),
        ("evaluate --model m --batch-size 1.5", "1.5 is not allowed; whole numbers from 1 to 10000 are"),
        ("score --model m --workers 0", "0 is not allowed; whole numbers from 1 to 10000 are"),
        ("score --model m --seconds-per-batch nan", "nan is not allowed; numbers from 1 to 100000 are"),
        ("page --model m --port 99999", "--port: 99999 is not allowed; whole numbers from 0 to 65535 are"),
        ("serve --model m --max-sessions 0", "--max-sessions: 0 is not allowed; whole numbers from 1 to"),
        ("serve --model m --session-seconds nan", "--session-seconds: nan is not allowed"),
        ("serve --model m --max-wait -1", "--max-wait: -1 is not allowed"),
        ("serve --model m --grace -1", "--grace: -1 is not allowed"),
        ("prepare synthetic --output o --conversations 2", "2 is not allowed; whole numbers from 3 to"),
        ("prepare synthetic --output o --seed x", "--seed: x is not allowed"),
        ("compare run.yaml --seeds 0", "--seeds: 0 is not allowed"),
    ],
)
def test_numbers_that_make_no_sense_are_wrong_usage(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(words.split())
    assert end.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["predict", "--sample", "--plots", "{output}"],
        ["timeline", "{call}", "--plot", "{output}/call.png"],
        ["timeline", "{call}", "--output", "{output}/call.csv"],
        ["evaluate", "{corpus}", "--split", "train", "--output", "{output}"],
        ["report", "{corpus}", "--split", "train", "--output", "{output}"],
        ["export", "{output}"],
    ],
    ids=" ".join,
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_is_computed(
    model, tmp_path, capsys, monkeypatch, words
):
    def compute(*_, **__):
        raise AssertionError("the model was run")

    monkeypatch.setattr(torch.nn.Module, "__call__", compute)
    (tmp_path / "file").write_text("")
    places = {"output": tmp_path / "file", "corpus": FOLDER, "call": call(tmp_path / "call.wav", seconds=1)}
    assert main([words[0], "--model", model, *(word.format(**places) for word in words[1:])]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.fullmatch(r"mamba-ema: the folder \S+/file cannot be made: .*\n", captured.err), captured.err


def test_a_comparison_that_trained_nothing_leaves_no_settings_to_keep_to(tmp_path, capsys):
    run = ["compare", str(ROOT / "configuration" / "demo.yaml"), "model.params.hidden_size=16"]
    for source in ("absent1", "absent2"):
        assert main([*run, f"data.source={tmp_path / source}", "--output", str(tmp_path / "out")]) == 1
        assert f"{source} is neither a file or folder here" in capsys.readouterr().err
