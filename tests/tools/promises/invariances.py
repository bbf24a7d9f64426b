"""What may not change an answer, and by how much it may."""

from .promise import promise

BOTH = "1e-12 float64, 2e-5 float32"
IN_PIECES = "1e-12 float64, 1e-5 float32"
INVARIANCES = "test_invariances.py"
PROPERTIES = "test_properties.py"
OBJECT = "test_model_object.py"
ENCODER = "test_conversation_encoder.py"

PROMISES = [
    promise(
        "B-01",
        "the same call, a reload and a save after a load change no bit",
        "bitwise",
        "test_saving.py::test_it_loads_by_itself_in_another_process_with_bitwise_the_same_numbers",
        "test_saving.py::test_saving_loading_and_saving_again_gives_the_same_file",
    ),
    promise(
        "B-02",
        "an utterance gets its numbers whatever its batch pads it to, up to 20 times its length",
        BOTH,
        f"{INVARIANCES}::test_an_utterance_gets_its_numbers_whatever_its_batch_pads_it_to",
        f"{INVARIANCES}::test_the_plain_form_of_the_encoder_keeps_the_promise_too",
        "test_modeling.py::test_an_utterance_gets_the_same_numbers_alone_in_a_batch_and_in_any_conversation",
        f"{PROPERTIES}::test_any_lengths_in_any_order_get_the_numbers_they_get_alone",
    ),
    promise(
        "B-03",
        "order of a batch, what mates say, and a mate that is refused change nothing",
        f"{BOTH}; content bitwise",
        f"{INVARIANCES}::test_the_order_of_a_batch_only_reorders_its_answers",
        f"{INVARIANCES}::test_what_a_batch_mate_says_changes_no_bit",
        f"{INVARIANCES}::test_a_bad_batch_mate_is_refused_and_the_others_answered_without_it_as_with_a_good_one",
    ),
    promise(
        "B-04",
        "a conversation gets its numbers beside longer ones, with noise or NaN in the padding",
        BOTH,
        f"{INVARIANCES}::test_a_conversation_gets_its_numbers_beside_longer_ones_whatever_stands_in_the_padding",
    ),
    promise(
        "B-05",
        "a later turn changes no bit of an earlier answer",
        "bitwise",
        f"{INVARIANCES}::test_later_turns_change_no_bit_of_earlier_answers",
        f"{ENCODER}::test_later_turns_do_not_change_earlier_contexts",
    ),
    promise(
        "B-06",
        "turn by turn equals the whole conversation",
        IN_PIECES,
        "test_modeling.py::test_streaming_turn_by_turn_equals_the_whole_conversation",
    ),
    promise(
        "B-07",
        "pieces of any size equal the whole conversation",
        IN_PIECES,
        f"{INVARIANCES}::test_a_conversation_in_pieces_equals_the_whole_and_continues_from_padded_rows",
        f"{PROPERTIES}::test_any_conversations_cut_anywhere_get_the_numbers_of_the_whole",
        f"{ENCODER}::test_split_at_every_turn_equals_the_whole",
    ),
    promise(
        "B-08",
        "a state from a padded row continues as if its conversation had been alone",
        IN_PIECES,
        "test_modeling.py::test_the_state_of_a_ragged_batch_continues_each_conversation_as_if_it_had_been_alone",
    ),
    promise(
        "B-09",
        "states are values: interleaved, reused, copied, saved and restored",
        "bitwise",
        "test_modeling.py::test_a_state_is_a_value_that_no_call_changes",
        f"{ENCODER}::test_interleaved_streams_equal_their_own_runs_bitwise",
        f"{ENCODER}::test_copy_shares_no_memory",
        f"{ENCODER}::test_saved_and_loaded_state_continues_bitwise",
    ),
    promise(
        "B-10",
        "a turn left out in the middle equals the shortened conversation",
        "1e-12; bitwise after the encoder",
        f"{INVARIANCES}::test_a_turn_that_is_left_out_in_the_middle_equals_the_shortened_conversation",
        f"{ENCODER}::test_a_hole_gives_the_same_bits_as_the_shortened_conversation",
    ),
    promise(
        "B-11",
        "the EMA has its closed form, starts at the first value, keeps float32, and does not drift in 1e5 turns",
        "1e-12 float64, 1e-5 float32; 1e-4 in bfloat16 and 1e-7 from an end of its range",
        f"{ENCODER}::test_ema_has_its_closed_form",
        f"{ENCODER}::test_ema_equals_the_recurrence",
        f"{ENCODER}::test_ema_at_the_ends_of_its_range",
        f"{ENCODER}::test_ema_of_1e5_turns_does_not_drift",
        f"{ENCODER}::test_ema_in_bfloat16_keeps_a_float32_state_and_does_not_stall",
    ),
    promise(
        "B-12",
        "number of threads and batch mates change an answer by rounding only; 8 threads may share a model",
        "2e-5; bitwise",
        f"{INVARIANCES}::test_the_number_of_threads_and_of_batch_mates_changes_an_answer_by_rounding_only",
        f"{OBJECT}::test_eight_threads_on_one_model_get_the_answers_of_one",
    ),
    promise(
        "B-13",
        "autocast moves answers little, and the CCC less",
        "5e-2 bf16, 1e-2 fp16; CCC 0.01",
        f"{INVARIANCES}::test_autocast_moves_answers_little_and_the_ccc_less",
    ),
    promise(
        "B-14",
        "gradient checkpointing changes no gradient; the re-entrant kind is refused",
        "bitwise",
        "test_saving.py::test_gradient_checkpointing_changes_no_gradient_and_the_reentrant_kind_is_refused",
    ),
    promise(
        "B-15",
        "two processes have the loss and gradient of one, and train its weights",
        "1e-12 loss, 1e-5 weights",
        "test_ccc_loss.py::test_two_processes_have_the_loss_and_gradient_of_one",
        "training/test_trainer.py::test_two_processes_train_the_weights_of_one",
    ),
    promise(
        "B-16",
        "gradient accumulation scales neither the logged loss nor the gradient",
        "5 %, 10 %",
        f"{OBJECT}::test_accumulation_scales_neither_the_logged_loss_nor_the_gradient",
    ),
    promise(
        "B-17",
        "the CCC metric equals audmetric's, in batches of any size",
        "1e-12",
        "metrics/test_ccc.py::test_equals_audmetric",
        "metrics/test_ccc.py::test_equals_audmetric_on_any_numbers",
        "metrics/test_ccc.py::test_batches_give_the_whole_sets_value_not_a_mean_of_batches",
        "metrics/test_ccc.py::test_differs_from_torchmetrics_only_by_sample_moments",
        "metrics/test_ccc.py::test_reports_every_label_and_plain_means",
    ),
    promise(
        "B-18",
        "the CCC loss has right gradients, finite ones for degenerate batches, and is right for any set of labels",
        "gradcheck; 1e-12",
        "test_ccc_loss.py::test_gradients_are_right",
        "test_ccc_loss.py::test_degenerate_batches_have_finite_losses_and_gradients",
        "test_ccc_loss.py::test_a_perfect_prediction_costs_nothing",
        f"{PROPERTIES}::test_the_loss_of_any_set_of_labels_is_one_minus_the_weighted_mean_of_their_cccs",
        f"{PROPERTIES}::test_neither_the_order_of_turns_nor_of_labels_changes_the_loss",
    ),
    promise(
        "B-19",
        "pipeline, tracker, page and programs give the model's numbers",
        "1e-5",
        "test_pipeline.py::test_each_way_to_the_pipeline_gives_the_models_numbers_highest_first",
        "test_pipeline.py::test_every_form_of_the_same_audio_gives_the_same_numbers",
        "inference/test_tracker.py::test_turn_by_turn_gives_the_numbers_and_attention_of_the_whole_conversation",
        "page/test_page.py::test_a_conversation_gets_the_numbers_of_the_python_api_and_is_drawn",
        "commands/test_command_line.py::test_files_are_separate_unless_they_are_a_conversation",
    ),
    promise(
        "B-20",
        "gain, leading silence and offset: how far they move an answer of a random tiny model",
        "reported only",
        f"{INVARIANCES}::test_how_far_gain_silence_and_offset_move_an_answer_is_reported",
    ),
    promise(
        "B-21",
        "six deliberate mistakes are each caught by a named test",
        "6 of 6",
        "tools/test_mutations.py::test_a_mutation_is_caught_by_the_test_that_names_it",
    ),
    promise(
        "B-22",
        "copies and plain tuples give the same values",
        "bitwise",
        f"{OBJECT}::test_return_dict_false_gives_the_same_values_as_a_plain_tuple",
        f"{OBJECT}::test_the_bare_model_gives_a_plain_tuple_too",
        f"{OBJECT}::test_a_deep_copy_answers_the_same_and_shares_no_weight",
    ),
]
