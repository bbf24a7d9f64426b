"""`mamba-ema prepare` on the folders of real corpora in miniature."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest
import soundfile as sf

from modeling_mamba_ema.__main__ import main
from modeling_mamba_ema.data import corpora
from modeling_mamba_ema.data.corpora import CorpusError, corpus_names, iemocap, msp_improv, msp_podcast, read_corpus
from modeling_mamba_ema.data.dataset import ConversationDataset, load_emotion_dataset
from modeling_mamba_ema.data.prepared_corpus import Corpus, describe_corpus, write_corpus
from tests.support.miniature_corpora import (
    HIDDEN,
    IMPROVISED,
    STEREO,
    write_crema_d,
    write_iemocap,
    write_msp_improv,
    write_msp_podcast,
)
from tests.support.programs import call_program
from tests.support.runs import FINETUNE
from tests.support.tiny_corpus import write_run

LABELS = ["valence", "arousal", "dominance"]
CORPORA = {"iemocap": write_iemocap, "msp-podcast": write_msp_podcast, "msp-improv": write_msp_improv}


@pytest.fixture
def prepare(capsys):
    """Run the command in this process: starting one takes longer than the command."""

    def run(name, folder, output):
        code = main(["prepare", name, str(folder), "--output", str(output)])
        return code, *capsys.readouterr()

    return run


def table(corpus):
    """Rows by the name of their file."""
    return corpus.rows.set_index(corpus.rows["file_name"].str.extract(r"([^/]+)\.wav$")[0])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write(tmp_path_factory.mktemp(name) / "corpus") for name, write in CORPORA.items()}


@pytest.fixture(scope="module")
def prepared_iemocap(folders, tmp_path_factory):
    corpus = iemocap.read(folders["iemocap"])
    write_corpus(corpus, tmp_path_factory.mktemp("iemocap_output"))
    return corpus


@pytest.fixture(scope="module")
def podcast(folders, tmp_path_factory):
    corpus = msp_podcast.read(folders["msp-podcast"])
    write_corpus(corpus, tmp_path_factory.mktemp("podcast_output"))
    return corpus


@pytest.fixture(scope="module")
def improv(folders, tmp_path_factory):
    corpus = msp_improv.read(folders["msp-improv"])
    write_corpus(corpus, tmp_path_factory.mktemp("improv_output"))
    return corpus


# --- IEMOCAP -----------------------------------------------------------------------------------------------------


def test_iemocap_the_header_s_mean_is_read_in_its_order_and_not_single_raters(prepared_iemocap):
    rows = table(prepared_iemocap)
    for session in range(1, 6):
        for _, _, turn, emotion, (valence, arousal, dominance) in IMPROVISED:
            row = rows.loc[f"Ses{session:02d}F_impro01_{turn}"]
            assert (row["valence"], row["arousal"], row["dominance"]) == (valence, arousal, dominance)
            assert row["emotion"] == emotion
    assert len(rows) == 25  # xxx and oth are there, the sub-folders of EmoEvaluation and ._* files are not


def test_iemocap_the_speaker_is_the_last_letter_not_who_wore_the_markers(prepared_iemocap):
    rows = table(prepared_iemocap)
    assert rows.loc["Ses01F_impro01_M000", "speaker"] == "Ses01_M"
    assert rows.loc["Ses01F_impro01_F001", "speaker"] == "Ses01_F"
    assert rows.loc["Ses03M_script01_1b_F000", "speaker"] == "Ses03_F"
    assert rows["speaker"].nunique() == 10


def test_iemocap_turns_are_in_the_order_of_their_start(prepared_iemocap):
    rows = prepared_iemocap.rows
    dialog = rows[rows["conversation_id"] == "Ses02F_impro01"].sort_values("turn")
    assert list(dialog["turn"]) == [0, 1, 2]
    assert [name[-8:-4] for name in dialog["file_name"]] == ["F000", "M000", "F001"]
    assert list(dialog["conversation_start"]) == [6.2901, 7.0, 10.01]


def test_iemocap_times_are_those_of_the_sentence_s_own_file(prepared_iemocap):
    for row in prepared_iemocap.rows.itertuples():
        assert row.start == 0.0
        assert row.end == sf.info(row.file_name).duration


def test_iemocap_turns_without_a_label_are_listed_and_left_out(prepared_iemocap):
    skipped = {name for name, _ in prepared_iemocap.skipped}
    assert {"Ses01F_impro01_MXX0", "Ses05M_script01_1b_MXX0", "Ses04F_impro01_FXX0"} <= skipped
    assert len(skipped) == 20
    assert not any("XX0" in name for name in prepared_iemocap.rows["file_name"])


def test_iemocap_a_fold_tests_on_its_session_and_no_speaker_is_in_two_of_its_splits(prepared_iemocap):
    rows = prepared_iemocap.rows
    for fold in range(1, 6):
        splits = rows.groupby(f"split_fold{fold}")
        assert splits["session"].unique()["test"].tolist() == [fold]
        assert splits["session"].unique()["validation"].tolist() == [fold % 5 + 1]
        assert splits["session"].nunique()["train"] == 3
        assert rows.groupby("speaker")[f"split_fold{fold}"].nunique().max() == 1
    assert rows["split"].equals(rows["split_fold1"])


def test_iemocap_a_session_that_is_not_there_is_an_error_that_names_it(prepare, folders, tmp_path):
    shutil.copytree(folders["iemocap"], tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "Session4")
    code, _, message = prepare("iemocap", tmp_path / "part", tmp_path / "out")
    assert code == 1
    assert "Session4/dialog/EmoEvaluation" in message
    assert not (tmp_path / "out").exists()


def test_iemocap_missing_and_damaged_wavs_are_all_listed_and_nothing_is_written(prepare, folders, tmp_path):
    shutil.copytree(folders["iemocap"], tmp_path / "part")
    wavs = tmp_path / "part" / "Session2" / "sentences" / "wav" / "Ses02F_impro01"
    (wavs / "Ses02F_impro01_F000.wav").unlink()
    (wavs / "Ses02F_impro01_M000.wav").write_bytes((wavs / "Ses02F_impro01_M000.wav").read_bytes()[:-999])
    code, _, message = prepare("iemocap", tmp_path / "part", tmp_path / "out")
    assert code == 1
    assert "missing or damaged (2):" in message
    assert "Ses02F_impro01_F000.wav does not exist" in message
    assert "Ses02F_impro01_M000.wav is truncated" in message
    assert not (tmp_path / "out").exists()


def test_iemocap_labels_slightly_off_the_scale_are_clipped_with_a_warning(folders, tmp_path):
    shutil.copytree(folders["iemocap"], tmp_path / "odd")
    labels = tmp_path / "odd" / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt"
    text = labels.read_text()
    labels.write_text(text.replace("[2.5000, 2.0000, 3.0000]", "[0.5000, 5.5000, 3.0000]"))
    corpus = iemocap.read(tmp_path / "odd")
    write_corpus(corpus, tmp_path / "out")
    row = table(corpus).loc["Ses01F_impro01_F000"]
    assert (row["valence"], row["arousal"]) == (1.0, 5.0)
    assert "valence lay slightly outside 1 to 5 and was clipped (1):\n  Ses01F_impro01_F000: 0.5" in describe_corpus(
        corpus
    )
    labels.write_text(text.replace("[2.5000, 2.0000, 3.0000]", "[2.5000, 17.0000, 3.0000]"))
    with pytest.raises(CorpusError, match=r"arousal lies outside the scale 1 to 5 .*\n  Ses01F_impro01_F000: 17"):
        write_corpus(iemocap.read(tmp_path / "odd"), tmp_path / "out")


def test_iemocap_turns_longer_than_training_takes_are_told(folders, tmp_path, monkeypatch):
    corpus = iemocap.read(folders["iemocap"])
    monkeypatch.setattr("modeling_mamba_ema.data.prepared_corpus.DEFAULT_MAX_SECONDS", 0.42)
    write_corpus(corpus, tmp_path)
    assert any("are longer than 0.42 s" in remark and "data.max_seconds" in remark for remark in corpus.remarks)


# --- MSP-Podcast -------------------------------------------------------------------------------------------------


def test_podcast_columns_are_taken_by_name_because_arousal_comes_first(podcast):
    row = table(podcast).loc["MSP-PODCAST_0001_0019"]
    assert (row["arousal"], row["valence"], row["dominance"]) == (5.8, 1.6, 6.0)


def test_podcast_turns_stand_alone(podcast):
    assert podcast.rows["conversation_id"].is_unique
    assert set(podcast.rows["turn"]) == {0}


def test_podcast_an_unknown_speaker_is_none_and_counted(podcast):
    rows = table(podcast)
    assert rows.loc["MSP-PODCAST_0001_0008", "speaker"] == "30"
    assert pd.isna(rows.loc["MSP-PODCAST_0002_0039", "speaker"])
    assert rows["speaker"].nunique() == 5
    assert "1 turns have an unknown speaker." in podcast.remarks


def test_podcast_old_and_new_releases_give_the_same(podcast, tmp_path):
    old = msp_podcast.read(write_msp_podcast(tmp_path / "old", old=True))
    write_corpus(old, tmp_path / "out")
    kept = ["conversation_id", "turn", "speaker", "split", "start", "end", *LABELS]
    pd.testing.assert_frame_equal(old.rows[kept], podcast.rows[kept])
    assert list(dict.fromkeys(old.rows["split"])) == ["train", "validation", "test1", "test2"]


def test_single_ratings_become_deviations_and_counts(podcast, prepared_iemocap, improv, tmp_path):
    old = msp_podcast.read(write_msp_podcast(tmp_path / "old", old=True))
    names = ["valence_sd", "arousal_sd", "dominance_sd", "raters"]
    for corpus in (old, podcast):  # in one column, and in several
        first, second, third = table(corpus)[names].to_numpy(float)[:3]
        assert first.tolist() == [2, 1, 0, 3]
        assert np.isnan(second[:3]).all()  # one rater says nothing of a spread
        assert np.isnan(third[:3]).all()
        assert (second[3], third[3]) == (1, 0)
    # Evaluators count, self reports do not.
    deviation = np.std([5, 1], ddof=1)
    for _, row in table(prepared_iemocap).iterrows():
        assert row[names].tolist() == [deviation, 0, 0, 2]
    rows = table(improv)[names]
    assert (rows[["valence_sd", "arousal_sd"]] == deviation).all(axis=None)
    assert rows["dominance_sd"].isna().all()


def test_podcast_hidden_labels_are_skipped_and_listed(podcast):
    assert [name for name, _ in podcast.skipped] == [HIDDEN, "MSP-PODCAST_9001_0002.wav"]
    assert "test3" not in set(podcast.rows["split"])


def test_podcast_stereo_at_another_rate_is_told_and_read_as_mono_at_16_khz(podcast, tmp_path):
    assert any(remark.endswith(f"averaged and resampled when they are read: {STEREO}") for remark in podcast.remarks)
    write_corpus(podcast, tmp_path)
    rows = load_emotion_dataset(tmp_path, LABELS)["train"]
    item = next(item for item in ConversationDataset(rows, LABELS) if item["conversation_id"] == STEREO[:-4])
    assert item["waveforms"][0].shape == (6_400,)


def test_podcast_what_is_missing_or_not_known_is_named(tmp_path, folders):
    folder = tmp_path / "part"
    shutil.copytree(folders["msp-podcast"], folder)
    labels = folder / "Labels" / "labels_consensus.csv"
    text = labels.read_text()
    labels.write_text(text.replace(",Test2", ",Test9"))
    with pytest.raises(CorpusError, match="names splits that are not known: 'test9'"):
        msp_podcast.read(folder)
    labels.write_text(text.replace("EmoDom", "Dom"))
    with pytest.raises(CorpusError, match="has no column EmoDom; there are"):
        msp_podcast.read(folder)
    labels.write_text("FileName,EmoClass,Split_Set\na.wav,N,Train\n")
    with pytest.raises(CorpusError, match=r"emotion categories only \(EmoClass\)"):
        msp_podcast.read(folder)
    shutil.rmtree(folder / "Audios")
    with pytest.raises(CorpusError, match="Audios or Audio"):
        msp_podcast.read(folder)


# --- MSP-Improv --------------------------------------------------------------------------------------------------


def test_improv_the_consensus_line_is_read_and_not_naturalness_or_single_raters(improv):
    row = table(improv).loc["MSP-IMPROV-S01A-F02-P-FM10"]
    assert (row["valence"], row["dominance"], row["emotion"]) == (3.0, 2.8, "N")
    assert len(improv.rows) == 30


@pytest.mark.parametrize("excited_is_low", [True, False])
def test_improv_arousal_rises_with_excitement_however_it_was_rated(tmp_path, excited_is_low):
    corpus = msp_improv.read(write_msp_improv(tmp_path, excited_is_low))
    row = table(corpus).loc["MSP-IMPROV-S01A-F02-P-FM02"]
    assert row["arousal"] == pytest.approx(4.2)
    told = "Arousal is 6 - A, because a low A means excited" if excited_is_low else "Arousal is A as it is"
    assert any(remark.startswith(told) for remark in corpus.remarks)


def test_improv_dominance_may_be_missing(improv, tmp_path):
    assert improv.rows["dominance"].isna().sum() == 6
    write_corpus(improv, tmp_path)
    rows = load_emotion_dataset(tmp_path, LABELS)["test"]
    assert sorted(rows["dominance"])[0] == -100.0
    assert min(rows["valence"]) >= 0


def test_improv_a_conversation_is_one_speaker_s_part_of_a_recording_in_the_order_of_its_numbers(improv):
    rows = improv.rows[improv.rows["conversation_id"] == "S01A-F03-P-FM"].sort_values("turn")
    assert [name[-8:-4] for name in rows["file_name"]] == ["FM02", "FM10"]
    assert improv.rows.groupby("conversation_id")["speaker"].nunique().max() == 1
    assert improv.rows["speaker"].nunique() == 12


def test_improv_six_folds_share_no_speaker(improv):
    for fold in range(1, 7):
        assert improv.rows.groupby("speaker")[f"split_fold{fold}"].nunique().max() == 1
        assert set(improv.rows[improv.rows[f"split_fold{fold}"] == "test"]["session"]) == {fold}


def test_improv_the_other_spelling_and_a_folder_of_audio_are_accepted(tmp_path):
    write_msp_improv(tmp_path / "Audio", spelling="Evalution.txt")
    shutil.move(tmp_path / "Audio" / "Evalution.txt", tmp_path / "Evalution.txt")
    assert len(msp_improv.read(tmp_path, fold=6).rows) == 30


def test_improv_a_wav_without_ratings_is_skipped_and_a_missing_session_named(improv, tmp_path):
    assert improv.skipped == [("MSP-IMPROV-S01A-F01-P-FM77", "it has no label")]
    write_msp_improv(tmp_path)
    text = (tmp_path / "Evaluation.txt").read_text()
    (tmp_path / "Evaluation.txt").write_text("\n".join(line for line in text.splitlines() if "05-" not in line))
    with pytest.raises(CorpusError, match=r"no ratings of \(1\):\n  session 5"):
        msp_improv.read(tmp_path)


# --- all ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORPORA)
def test_the_program_writes_the_normal_form_and_prints_a_table_over_the_splits(prepare, folders, tmp_path, name):
    code, printed, message = prepare(name, folders[name], tmp_path / "out")
    assert code == 0, message
    rows = pd.read_json(tmp_path / "out" / "metadata.jsonl", lines=True)
    assert list(rows.columns[:10]) == [
        *("file_name", "start", "end", "conversation_id", "turn", "speaker", "split"), *LABELS
    ]  # fmt: skip
    facts = json.loads((tmp_path / "out" / "corpus.json").read_text())
    assert facts["label_ranges"]["dominance"] == ([1, 7] if name == "msp-podcast" else [1, 5])
    skipped = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert all(json.loads(line)["reason"] for line in skipped)
    assert f"{len(skipped)} utterances were skipped" in printed
    lines = {line.split()[0]: line.split() for line in printed.splitlines()[2:] if line.strip()}
    for split, part in rows.groupby("split"):
        turns, hours, longest, speakers, conversations, *means = lines[split][1:]
        assert (int(turns), int(speakers)) == (len(part), part["speaker"].nunique())
        assert int(conversations) == part["conversation_id"].nunique()
        seconds = part["end"] - part["start"]
        assert (hours, longest) == (f"{seconds.sum() / 3600:.2f}", f"{seconds.max():.1f}s")
        np.testing.assert_allclose([float(mean) for mean in means], part[LABELS].mean(), atol=6e-4)
    assert int(lines["all"][1]) == len(rows)


@pytest.mark.parametrize("name", CORPORA)
def test_crema_d_has_no_regression_target(prepare, tmp_path, name):
    code, _, message = prepare(name, write_crema_d(tmp_path / "crema"), tmp_path / "out")
    assert code == 1
    assert "CREMA-D: emotion categories" in message
    assert "no regression target" in message


@pytest.mark.parametrize("name", CORPORA)
def test_another_folder_is_refused_with_what_is_missing(prepare, tmp_path, name):
    code, _, message = prepare(name, tmp_path, tmp_path / "out")
    assert code == 1
    assert " is not " in message


def test_a_corpus_without_any_label_or_with_a_turn_twice_is_refused(prepared_iemocap, tmp_path):
    rows = prepared_iemocap.rows
    with pytest.raises(CorpusError, match="no labelled utterance"):
        write_corpus(Corpus("C", (1, 5), rows.assign(valence=np.nan, arousal=np.nan, dominance=np.nan)), tmp_path)
    with pytest.raises(CorpusError, match=r"utterances twice \(1\)"):
        write_corpus(Corpus("C", (1, 5), pd.concat([rows, rows[:1]], ignore_index=True)), tmp_path)


def test_a_module_in_the_folder_of_corpora_is_a_corpus(tmp_path, monkeypatch):
    (tmp_path / "my_corpus.py").write_text("FOLDS = 2\ndef read(folder, fold):\n    return folder, fold\n")
    monkeypatch.setattr(corpora, "__path__", [*corpora.__path__, str(tmp_path)])
    assert corpus_names() == ["emodb", "iemocap", "msp-improv", "msp-podcast", "my-corpus"]
    assert read_corpus("my-corpus", tmp_path, 2) == (tmp_path, 2)
    with pytest.raises(CorpusError, match="my-corpus has 2 folds; there is no fold 3"):
        read_corpus("my-corpus", tmp_path, 3)
    with pytest.raises(CorpusError, match="no corpus 'mine'; there are emodb, iemocap"):
        read_corpus("mine", tmp_path)


def test_iemocap_trains_from_its_prepared_folder_on_its_own_scale_and_on_any_fold(folders, prepare, tmp_path):
    assert prepare("iemocap", folders["iemocap"], tmp_path / "data")[0] == 0
    run = write_run(tmp_path / "run.yaml", tmp_path / "data", tmp_path / "run")
    arguments = ["training.num_train_epochs=1", "data.columns.split=split_fold3"]
    arguments.append("model.params.id2label={0: valence, 1: arousal, 2: dominance}")
    assert call_program(FINETUNE, run, *arguments) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["test"]["num_turns"] == 5
    assert "ccc_dominance" in results["test"]
    predictions = pd.read_csv(tmp_path / "run" / "predictions_test.csv")
    assert set(predictions["conversation_id"]) == {"Ses03F_impro01", "Ses03M_script01_1b"}
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["label_ranges"] == {"valence": [1, 5], "arousal": [1, 5], "dominance": [1, 5]}


def test_a_folder_with_another_corpus_is_refused_and_kept_as_it_is(prepare, folders, tmp_path):
    assert prepare("iemocap", folders["iemocap"], tmp_path)[0] == 0
    assert prepare("iemocap", folders["iemocap"], tmp_path)[0] == 0  # the same one again
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, _, message = prepare("msp-podcast", folders["msp-podcast"], tmp_path)
    assert code == 1
    assert "holds a metadata.jsonl of another corpus; name another folder" in message
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
