"""What happens to audio that is unusual or cannot be used."""

from .promise import promise

BAD_INPUT = "test_bad_input.py"

PROMISES = [
    promise(
        "A-01",
        "audio in any usual form gets the numbers of its samples, alone and as the third item",
        "2e-5; 2e-3 under another gain or offset",
        f"{BAD_INPUT}::test_audio_in_any_form_gets_the_numbers_of_its_samples",
    ),
    promise(
        "A-02",
        "audio that cannot be used is refused in one sentence under 300 characters with its place and what is allowed",
        "every case, in 3 places",
        f"{BAD_INPUT}::test_audio_that_cannot_be_answered_for_is_one_sentence_with_its_place_and_what_is_allowed",
        f"{BAD_INPUT}::test_there_are_more_than_a_hundred_kinds_of_input",
    ),
    promise(
        "A-03",
        "batches, sampling rates and options that make no sense are refused",
        "every case",
        f"{BAD_INPUT}::test_a_batch_that_is_none_is_refused",
        f"{BAD_INPUT}::test_the_sampling_rate_is_needed_and_checked_and_its_value_never_dumped",
        f"{BAD_INPUT}::test_options_that_would_answer_for_other_audio_than_was_given_are_refused",
    ),
    promise(
        "A-04",
        "an utterance over 30 s is refused before memory is taken",
        "under 1 MB for an hour",
        f"{BAD_INPUT}::test_an_hour_is_refused_before_memory_is_taken",
    ),
    promise(
        "A-05",
        "longer recordings are scored in windows with the conversation's state carried over",
        "as the conversation",
        "inference/test_timeline.py::test_rows_are_the_numbers_of_the_conversation_with_its_state_carried_over_the_segments",
        "inference/test_timeline.py::test_long_segments_are_split_and_short_ones_have_no_values_and_leave_the_state_alone",
    ),
    promise(
        "A-06",
        "silence and offsets are flagged and not amplified; short turns can be skipped and leave no trace",
        "1e-12",
        f"{BAD_INPUT}::test_what_is_no_sound_is_flagged_and_not_amplified",
        f"{BAD_INPUT}::test_short_turns_can_be_skipped_and_leave_no_trace",
        f"{BAD_INPUT}::test_skipping_short_turns_answers_for_nothing_that_is_not_there",
    ),
    promise(
        "A-07",
        "the model itself refuses masks, values, frames and labels that cannot be right",
        "every case",
        f"{BAD_INPUT}::test_a_model_refuses_input_values_that_are_no_normalised_speech",
        f"{BAD_INPUT}::test_a_model_refuses_cached_frames_that_are_not_its_own",
        "test_modeling.py::test_inputs_that_are_no_complete_utterances_are_refused",
        "test_modeling.py::test_labels_that_cannot_be_right_are_refused",
    ),
    promise(
        "A-08",
        "2,000 random inputs end in finite numbers or in such a sentence",
        "0 others, under 60 s",
        "test_any_input.py::test_2000_random_inputs_end_in_finite_numbers_or_in_a_sentence",
    ),
    promise(
        "A-09",
        "damaged and hostile audio files are refused from their header, or when they are scanned",
        "every case; hostile ones under 1 s and 10 MB of Python's and numpy's memory",
        "test_audio_files.py::test_a_file_that_is_damaged_or_hostile_is_refused_before_decoding",
        "test_audio_files.py::test_truncated_data_is_refused",
        "data/test_bad_audio.py::test_each_fault_is_found_with_its_reason",
        "data/test_bad_audio.py::test_what_the_scan_refuses_the_loader_refuses_too",
    ),
    promise(
        "A-10",
        "all checks of an input together cost next to nothing",
        "under 1 % of a forward pass of WavLM-base",
        "test_cost_of_checks.py::test_all_checks_cost_under_a_hundredth_of_a_forward_pass",
    ),
]
