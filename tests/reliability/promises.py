"""What is promised, how exactly, and by which tests: the list behind `make reliability` and docs/reliability.md."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Promise:
    """
    Attributes:
        id: its short name.
        what: the promise, in a few words.
        tolerance: largest difference of outputs on the unit scale, or what counts as kept.
        tests: `file::function`, below `tests/`.
    """

    id: str
    what: str
    tolerance: str
    tests: tuple[str, ...]


def _promise(id: str, what: str, tolerance: str, *tests: str) -> Promise:
    return Promise(id, what, tolerance, tests)


FAULT = "test_faults.py"
BOTH = "1e-12 float64, 2e-5 float32"
BAD_INPUT = "reliability/test_bad_input.py"
INVARIANCES = "reliability/test_invariances.py"
PROPERTIES = "reliability/test_properties.py"
OBJECT = "reliability/test_model_object.py"
ENCODER = "test_conversation_encoder.py"
HOSTILE = "reliability/test_hostile_files.py"
PUBLISHED = "reliability/test_published_code.py"
ALONE = "reliability/test_loading_alone.py"
DOCUMENTS = "reliability/test_documents.py"

BAD_INPUTS = [
    _promise(
        "A-01",
        "audio in any usual form gets the numbers of its samples, alone and as the third item",
        "2e-5; 2e-3 under another gain or offset",
        f"{BAD_INPUT}::test_audio_in_any_form_gets_the_numbers_of_its_samples",
    ),
    _promise(
        "A-02",
        "audio that cannot be used is refused in one sentence under 300 characters with its place and what is allowed",
        "every case, in 3 places",
        f"{BAD_INPUT}::test_audio_that_cannot_be_answered_for_is_one_sentence_with_its_place_and_what_is_allowed",
        f"{BAD_INPUT}::test_there_are_more_than_a_hundred_kinds_of_input",
    ),
    _promise(
        "A-03",
        "batches, sampling rates and options that make no sense are refused",
        "every case",
        f"{BAD_INPUT}::test_a_batch_that_is_none_is_refused",
        f"{BAD_INPUT}::test_the_sampling_rate_is_needed_and_checked_and_its_value_never_dumped",
        f"{BAD_INPUT}::test_options_that_would_answer_for_other_audio_than_was_given_are_refused",
    ),
    _promise(
        "A-04",
        "an utterance over 30 s is refused before memory is taken",
        "under 1 MB for an hour",
        f"{BAD_INPUT}::test_an_hour_is_refused_before_memory_is_taken",
    ),
    _promise(
        "A-05",
        "longer recordings are scored in windows with the conversation's state carried over",
        "as the conversation",
        "test_timeline.py::test_rows_are_the_numbers_of_the_conversation_with_its_state_carried_over_the_segments",
        "test_timeline.py::test_long_segments_are_split_and_short_ones_have_no_values_and_leave_the_state_alone",
    ),
    _promise(
        "A-06",
        "silence and offsets are flagged and not amplified; short turns can be skipped and leave no trace",
        "1e-12",
        f"{BAD_INPUT}::test_what_is_no_sound_is_flagged_and_not_amplified",
        f"{BAD_INPUT}::test_short_turns_can_be_skipped_and_leave_no_trace",
        f"{BAD_INPUT}::test_skipping_short_turns_answers_for_nothing_that_is_not_there",
    ),
    _promise(
        "A-07",
        "the model itself refuses masks, values, frames and labels that cannot be right",
        "every case",
        f"{BAD_INPUT}::test_a_model_refuses_input_values_that_are_no_normalised_speech",
        f"{BAD_INPUT}::test_a_model_refuses_cached_frames_that_are_not_its_own",
        "test_modeling.py::test_inputs_that_are_no_complete_utterances_are_refused",
        "test_modeling.py::test_labels_that_cannot_be_right_are_refused",
    ),
    _promise(
        "A-08",
        "2,000 random inputs end in finite numbers or in such a sentence",
        "0 others, under 60 s",
        "reliability/test_any_input.py::test_2000_random_inputs_end_in_finite_numbers_or_in_a_sentence",
    ),
    _promise(
        "A-09",
        "damaged and hostile audio files are refused from their header, or when they are scanned",
        "every case",
        "test_audio_files.py::test_a_file_that_is_damaged_or_hostile_is_refused_before_decoding",
        "test_audio_files.py::test_truncated_data_is_refused",
        "test_bad_audio.py::test_each_fault_is_found_with_its_reason",
        "test_bad_audio.py::test_what_the_scan_refuses_the_loader_refuses_too",
    ),
]

INVARIANT = [
    _promise(
        "B-01",
        "the same call, a reload and a save after a load change no bit",
        "bitwise",
        "test_publishing.py::test_it_loads_by_itself_in_another_process_with_bitwise_the_same_numbers",
        "test_publishing.py::test_saving_loading_and_saving_again_gives_the_same_file",
    ),
    _promise(
        "B-02",
        "an utterance gets its numbers whatever its batch pads it to, up to 20 times its length",
        BOTH,
        f"{INVARIANCES}::test_an_utterance_gets_its_numbers_whatever_its_batch_pads_it_to",
        f"{INVARIANCES}::test_the_plain_form_of_the_encoder_keeps_the_promise_too",
        "test_modeling.py::test_an_utterance_gets_the_same_numbers_alone_in_a_batch_and_in_any_conversation",
        f"{PROPERTIES}::test_any_lengths_in_any_order_get_the_numbers_they_get_alone",
    ),
    _promise(
        "B-03",
        "order of a batch, what mates say, and a mate that is refused change nothing",
        f"{BOTH}; content bitwise",
        f"{INVARIANCES}::test_the_order_of_a_batch_only_reorders_its_answers",
        f"{INVARIANCES}::test_what_a_batch_mate_says_changes_no_bit",
        f"{INVARIANCES}::test_a_bad_batch_mate_is_refused_and_the_others_answered_without_it_as_with_a_good_one",
    ),
    _promise(
        "B-04",
        "a conversation gets its numbers beside longer ones, with noise or NaN in the padding",
        BOTH,
        f"{INVARIANCES}::test_a_conversation_gets_its_numbers_beside_longer_ones_whatever_stands_in_the_padding",
    ),
    _promise(
        "B-05",
        "a later turn changes no bit of an earlier answer",
        "bitwise",
        f"{INVARIANCES}::test_later_turns_change_no_bit_of_earlier_answers",
        f"{ENCODER}::test_later_turns_do_not_change_earlier_contexts",
    ),
    _promise(
        "B-06",
        "turn by turn equals the whole conversation",
        BOTH,
        "test_modeling.py::test_streaming_turn_by_turn_equals_the_whole_conversation",
    ),
    _promise(
        "B-07",
        "pieces of any size equal the whole conversation",
        BOTH,
        f"{INVARIANCES}::test_a_conversation_in_pieces_equals_the_whole_and_continues_from_padded_rows",
        f"{PROPERTIES}::test_any_conversations_cut_anywhere_get_the_numbers_of_the_whole",
        f"{ENCODER}::test_split_at_every_turn_equals_the_whole",
    ),
    _promise(
        "B-08",
        "a state from a padded row continues as if its conversation had been alone",
        "1e-12 float64",
        "test_modeling.py::test_the_state_of_a_ragged_batch_continues_each_conversation_as_if_it_had_been_alone",
    ),
    _promise(
        "B-09",
        "states are values: interleaved, reused, copied, saved and restored",
        "bitwise",
        "test_modeling.py::test_a_state_is_a_value_that_no_call_changes",
        f"{ENCODER}::test_interleaved_streams_equal_their_own_runs_bitwise",
        f"{ENCODER}::test_copy_shares_no_memory",
        f"{ENCODER}::test_saved_and_loaded_state_continues_bitwise",
    ),
    _promise(
        "B-10",
        "a turn left out in the middle equals the shortened conversation",
        "1e-12; bitwise after the encoder",
        f"{INVARIANCES}::test_a_turn_that_is_left_out_in_the_middle_equals_the_shortened_conversation",
        f"{ENCODER}::test_a_hole_gives_the_same_bits_as_the_shortened_conversation",
    ),
    _promise(
        "B-11",
        "the EMA has its closed form, starts at the first value, keeps float32, and does not drift in 1e5 turns",
        "1e-12 float64, 1e-5 float32; 1e-4 in bfloat16",
        f"{ENCODER}::test_ema_has_its_closed_form",
        f"{ENCODER}::test_ema_equals_the_recurrence",
        f"{ENCODER}::test_ema_of_1e5_turns_does_not_drift",
        f"{ENCODER}::test_ema_in_bfloat16_keeps_a_float32_state_and_does_not_stall",
    ),
    _promise(
        "B-12",
        "number of threads and batch mates change an answer by rounding only; 8 threads may share a model",
        "2e-5; bitwise",
        f"{INVARIANCES}::test_the_number_of_threads_and_of_batch_mates_changes_an_answer_by_rounding_only",
        f"{OBJECT}::test_eight_threads_on_one_model_get_the_answers_of_one",
    ),
    _promise(
        "B-13",
        "autocast moves answers little, and the CCC less",
        "5e-2 bf16, 1e-2 fp16; CCC 0.01",
        f"{INVARIANCES}::test_autocast_moves_answers_little_and_the_ccc_less",
    ),
    _promise(
        "B-14",
        "gradient checkpointing changes no gradient; the re-entrant kind is refused",
        "bitwise",
        "test_publishing.py::test_gradient_checkpointing_changes_no_gradient_and_the_reentrant_kind_is_refused",
    ),
    _promise(
        "B-15",
        "two processes have the loss and gradient of one, and train its weights",
        "1e-12 loss, 1e-5 weights",
        "test_ccc_loss.py::test_two_processes_have_the_loss_and_gradient_of_one",
        "test_training.py::test_two_processes_train_the_weights_of_one",
    ),
    _promise(
        "B-16",
        "gradient accumulation scales neither the logged loss nor the gradient",
        "5 %, 10 %",
        f"{OBJECT}::test_accumulation_scales_neither_the_logged_loss_nor_the_gradient",
    ),
    _promise(
        "B-17",
        "the CCC metric equals audmetric's, in batches of any size",
        "1e-12",
        "test_ccc_metric.py::test_equals_audmetric",
        "test_ccc_metric.py::test_equals_audmetric_on_any_numbers",
        "test_ccc_metric.py::test_batches_give_the_whole_sets_value_not_a_mean_of_batches",
        "test_ccc_metric.py::test_differs_from_torchmetrics_only_by_sample_moments",
    ),
    _promise(
        "B-18",
        "the CCC loss has right gradients, finite ones for degenerate batches, and is right for any set of labels",
        "gradcheck; 1e-12",
        "test_ccc_loss.py::test_gradients_are_right",
        "test_ccc_loss.py::test_degenerate_batches_have_finite_losses_and_gradients",
        "test_ccc_loss.py::test_a_perfect_prediction_costs_nothing",
        f"{PROPERTIES}::test_the_loss_of_any_set_of_labels_is_one_minus_the_weighted_mean_of_their_cccs",
        f"{PROPERTIES}::test_neither_the_order_of_turns_nor_of_labels_changes_the_loss",
    ),
    _promise(
        "B-19",
        "pipeline, tracker, page and programs give the model's numbers",
        "1e-5",
        "test_pipeline.py::test_each_way_to_the_pipeline_gives_the_models_numbers_highest_first",
        "test_pipeline.py::test_every_form_of_the_same_audio_gives_the_same_numbers",
        "test_tracker.py::test_turn_by_turn_gives_the_numbers_and_attention_of_the_whole_conversation",
        "test_page.py::test_a_conversation_gets_the_numbers_of_the_python_api_and_is_drawn",
        "test_score_conversation.py::test_files_are_scored_turn_by_turn_with_the_numbers_of_the_whole_conversation",
    ),
    _promise(
        "B-20",
        "gain, leading silence and offset: how far they move an answer of a random tiny model",
        "reported only",
        f"{INVARIANCES}::test_how_far_gain_silence_and_offset_move_an_answer_is_reported",
    ),
    _promise(
        "B-21",
        "six deliberate mistakes are each caught by a named test",
        "6 of 6",
        "reliability/test_mutations.py::test_a_mutation_is_caught_by_the_test_that_names_it",
    ),
    _promise(
        "B-22",
        "copies and plain tuples give the same values",
        "bitwise",
        f"{OBJECT}::test_return_dict_false_gives_the_same_values_as_a_plain_tuple",
        f"{OBJECT}::test_the_bare_model_gives_a_plain_tuple_too",
        f"{OBJECT}::test_a_deep_copy_answers_the_same_and_shares_no_weight",
    ),
]

FAULTS = [
    _promise(
        "C-01",
        "a run killed at 8 random moments ends with the weights of one that was never killed",
        "bitwise",
        "test_checkpoints.py::test_eight_kills_at_random_moments_change_nothing",
    ),
    _promise(
        "C-02",
        "each file of a checkpoint missing, truncated, empty or with a flipped bit: the one before is taken",
        "24 of 24",
        "test_checkpoints.py::test_a_damaged_checkpoint_is_set_aside_for_the_one_before",
    ),
    _promise(
        "C-03",
        "a disk without room is told before the first step; one that fills up costs nothing before the last checkpoint",
        "as stated",
        f"{FAULT}::test_a_disk_without_room_for_the_checkpoints_is_told_before_the_first_step",
        f"{FAULT}::test_a_disk_that_fills_up_while_saving_costs_nothing_but_the_steps_since_the_last_checkpoint",
    ),
    _promise(
        "C-04",
        "bad audio is listed before the first step; skipping it is recorded",
        "every file",
        "test_bad_audio.py::test_training_does_not_begin_and_all_bad_files_are_listed",
        "test_bad_audio.py::test_skipping_trains_on_the_rest_and_records_what_was_left_out",
    ),
    _promise(
        "C-05",
        "a worker that dies, freezes or hangs in a file ends the run with the file's name",
        "30 s",
        f"{FAULT}::test_a_worker_that_dies_or_freezes_ends_the_run_with_the_name_of_its_file",
        f"{FAULT}::test_a_file_that_hangs_ends_the_run_with_its_name",
    ),
    _promise(
        "C-06",
        "when one of two processes is killed or frozen, the other ends",
        "as stated",
        f"{FAULT}::test_when_one_of_two_processes_is_killed_or_frozen_the_other_ends",
    ),
    _promise(
        "C-07",
        "NaN in weights, audio, labels or gradients stops the run at that step, and is never saved",
        "no step is taken",
        f"{FAULT}::test_weights_with_nan_are_not_saved",
        f"{FAULT}::test_audio_with_nan_stops_the_run_naming_the_file",
        "test_training.py::test_a_nan_label_stops_training_and_names_the_conversations",
        "test_training.py::test_nan_weights_stop_training",
        "test_training.py::test_a_gradient_that_is_not_finite_stops_before_the_step",
    ),
    _promise(
        "C-08",
        "SIGTERM leaves one complete checkpoint",
        "as stated",
        "test_training.py::test_sigterm_within_an_epoch_saves_one_complete_checkpoint_and_evaluates_nothing",
    ),
    _promise(
        "C-09",
        "resuming with other data, order, batch size or number of processes is refused, with other code warned of",
        "every case",
        f"{FAULT}::test_other_data_or_another_order_of_them_are_refused",
        f"{FAULT}::test_another_number_of_processes_is_refused_where_it_changes_the_batch_and_warned_of_elsewhere",
        f"{FAULT}::test_another_batch_size_is_refused_and_other_code_is_warned_of",
    ),
    _promise(
        "C-10",
        "an evaluation without a number is never the best; a run of such ends with an error",
        "as stated",
        f"{FAULT}::test_an_evaluation_without_a_number_is_never_the_best",
        f"{FAULT}::test_a_run_whose_evaluations_gave_no_number_ends_with_an_error_and_no_model",
    ),
    _promise(
        "C-11",
        "single turns, short utterances and constant labels in a batch train to finite weights and are counted",
        "as stated",
        f"{FAULT}::test_unusual_batches_train_to_finite_weights_and_are_counted",
        f"{FAULT}::test_labels_that_do_not_vary_are_refused_before_training",
    ),
    _promise(
        "C-12",
        "layer drop with several processes, and SpecAugment with short utterances, are refused before training",
        "as stated",
        f"{FAULT}::test_layer_drop_with_several_processes_and_spec_augment_with_short_utterances_are_refused",
    ),
    _promise(
        "C-13",
        "the same seed trains the same weights, another seed others",
        "bitwise",
        "test_training.py::test_the_same_seed_trains_the_same_weights_and_another_seed_others",
    ),
]

SERVED = [
    _promise(
        "D-01",
        "30 visitors at once get 30 answers of their own",
        "2e-5",
        "test_page_load.py::test_thirty_visitors_at_once_get_thirty_answers_of_their_own",
    ),
    _promise(
        "D-02",
        "two visitors interleaved for 50 turns hear their own conversations",
        "2e-5",
        "test_page_load.py::test_two_visitors_interleaved_for_fifty_turns_hear_their_own_conversations",
    ),
    _promise(
        "D-03",
        "a full queue is a 503 with text, and the page answers again",
        "within 2 s",
        "test_page.py::test_a_full_queue_is_a_503_and_the_page_answers_again",
    ),
    _promise(
        "D-04",
        "files over the limit, and small ones that unpack to gigabytes, are refused",
        "at once",
        "test_page.py::test_a_file_one_byte_over_the_limit_is_refused_at_once",
        "test_page.py::test_a_small_file_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked",
    ),
    _promise(
        "D-05",
        "a broken file is a sentence without paths",
        "every case",
        "test_page.py::test_a_broken_file_is_a_sentence_without_paths",
    ),
    _promise(
        "D-06",
        "no path or URL trick reads a file or opens a connection",
        "0 reads, 0 connections",
        "test_page.py::test_no_file_of_the_server_is_read_and_no_address_is_visited",
    ),
    _promise(
        "D-07",
        "500 requests fill neither memory nor disk",
        "0.1 MB a request",
        "test_page_load.py::test_five_hundred_requests_do_not_fill_memory_or_disk",
    ),
    _promise(
        "D-08",
        "a closed tab frees its conversation",
        "as stated",
        "test_page.py::test_a_closed_tab_frees_its_conversation",
    ),
    _promise(
        "D-09",
        "a missing or incomplete model is one line at the start",
        "as stated",
        "test_page.py::test_a_missing_model_is_one_line_at_the_start",
        "test_page.py::test_an_incomplete_model_is_refused_at_the_start",
    ),
    _promise(
        "D-10",
        "the pipeline takes paths only when told to, and never fetches",
        "every case",
        "test_pipeline.py::test_a_string_is_a_path_only_when_allowed",
        "test_pipeline.py::test_what_cannot_be_used_is_refused_in_a_sentence_and_nothing_is_fetched",
    ),
]

SECURE = [
    _promise(
        "E-01",
        "only safetensors, JSON, Python, text and two short samples are published",
        "as stated",
        f"{PUBLISHED}::test_only_weights_settings_code_text_and_two_short_samples_are_published",
    ),
    _promise(
        "E-02",
        "published code imports and calls only what is listed, is flat and short enough to be read",
        "0 others",
        f"{PUBLISHED}::test_published_code_imports_and_calls_only_what_is_listed_here",
        f"{PUBLISHED}::test_the_scan_sees",
        f"{PUBLISHED}::test_published_code_is_flat_and_short_enough_to_be_read",
    ),
    _promise(
        "E-03",
        "loading and running a model tries no connection",
        "0",
        f"{ALONE}::test_no_connection_and_no_process_is_tried",
    ),
    _promise(
        "E-04",
        "loading writes nothing; remote code is copied into transformers' module cache only",
        "0 other writes",
        f"{ALONE}::test_the_installed_package_writes_nothing",
        f"{ALONE}::test_remote_code_is_copied_into_transformers_module_cache_and_nothing_else_is_written",
    ),
    _promise(
        "E-05",
        "pickles in a model or a checkpoint run nothing",
        "0",
        f"{HOSTILE}::test_pickled_weights_are_neither_run_nor_read",
        f"{HOSTILE}::test_a_pickle_that_is_asked_for_or_is_a_wavlms_runs_nothing",
        f"{HOSTILE}::test_pickles_in_a_checkpoint_run_nothing_on_resume",
    ),
    _promise(
        "E-06",
        "a config.json cannot choose an attention kernel from a repository",
        "refused",
        "test_publishing.py::test_a_config_json_cannot_choose_an_attention_kernel",
        "test_configuration.py::test_a_configuration_cannot_choose_an_attention_kernel_from_a_repository",
    ),
    _promise(
        "E-07",
        "sizes in a config.json are bounded",
        "refused under 50 MB",
        f"{HOSTILE}::test_a_config_json_with_sizes_without_bounds_is_refused_before_memory_is_taken",
        "test_configuration.py::test_a_value_outside_its_range_is_named_with_what_is_allowed",
    ),
    _promise(
        "E-08",
        "hostile YAML is refused: objects, aliases, depth, size, unknown keys",
        "every case",
        f"{HOSTILE}::test_hostile_yaml_is_refused_in_a_short_sentence",
    ),
    _promise(
        "E-09",
        "no document or program trusts remote code without a revision",
        "0",
        f"{DOCUMENTS}::test_documents_never_trust_remote_code_without_a_revision",
        f"{DOCUMENTS}::test_the_model_card_never_trusts_remote_code_without_a_revision",
        f"{DOCUMENTS}::test_programs_never_trust_remote_code_without_a_revision",
    ),
    _promise(
        "E-10",
        "the oldest versions allowed are above the advisories that SECURITY.md names",
        "as stated",
        f"{DOCUMENTS}::test_floors_are_above_the_advisories",
    ),
    _promise(
        "E-11",
        "the installed package gives the numbers of remote code, without it",
        "bitwise",
        f"{ALONE}::test_both_ways_give_bitwise_the_same_numbers",
    ),
    _promise(
        "E-12",
        "a saved folder carries SHA256SUMS, by which damage is found",
        "every case",
        f"{PUBLISHED}::test_a_saved_folder_is_intact_after_the_feature_extractor_was_saved_into_it_again",
        f"{PUBLISHED}::test_damage_is_found_and_named",
    ),
    _promise(
        "E-13",
        "errors about audio carry no folder of the user and no samples",
        "every case",
        "reliability/test_messages.py::test_errors_about_files_name_them_without_their_folder",
        f"{BAD_INPUT}::test_audio_that_cannot_be_answered_for_is_one_sentence_with_its_place_and_what_is_allowed",
    ),
]

PROMISES = [*BAD_INPUTS, *INVARIANT, *FAULTS, *SERVED, *SECURE]
