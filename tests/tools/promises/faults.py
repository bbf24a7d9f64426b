"""What goes wrong while training, and what is left then."""

from .promise import promise

FAULT = "training/test_faults.py"

PROMISES = [
    promise(
        "C-01",
        "a run killed at 8 random moments, or while it saves, ends with the weights of one that was never killed",
        "bitwise",
        "training/test_checkpoints.py::test_eight_kills_at_random_moments_change_nothing",
        "training/test_checkpoints.py::test_old_checkpoints_go_only_when_the_new_one_is_complete",
    ),
    promise(
        "C-02",
        "each file of a checkpoint missing, truncated, empty or with a flipped bit: the one before is taken",
        "every damage",
        "training/test_checkpoints.py::test_a_damaged_checkpoint_is_set_aside_for_the_one_before",
    ),
    promise(
        "C-03",
        "a disk without room is told before the first step; one that fills up costs nothing before the last checkpoint",
        "as stated",
        f"{FAULT}::test_a_disk_without_room_for_the_checkpoints_is_told_before_the_first_step",
        f"{FAULT}::test_a_disk_that_fills_up_while_saving_costs_nothing_but_the_steps_since_the_last_checkpoint",
    ),
    promise(
        "C-04",
        "bad audio is listed before the first step; skipping it is recorded",
        "every file",
        "data/test_bad_audio.py::test_training_does_not_begin_and_all_bad_files_are_listed",
        "data/test_bad_audio.py::test_skipping_trains_on_the_rest_and_records_what_was_left_out",
    ),
    promise(
        "C-05",
        "a worker that dies, freezes or hangs in a file ends the run with the file's name",
        "as stated",
        f"{FAULT}::test_a_worker_that_dies_or_freezes_ends_the_run_with_the_name_of_its_file",
        f"{FAULT}::test_a_file_that_hangs_ends_the_run_with_its_name",
    ),
    promise(
        "C-06",
        "when one of two processes is killed or frozen, the other ends",
        "as stated",
        f"{FAULT}::test_when_one_of_two_processes_is_killed_or_frozen_the_other_ends",
    ),
    promise(
        "C-07",
        "NaN in weights, audio, labels or gradients stops the run at that step, and is never saved",
        "no step is taken",
        f"{FAULT}::test_weights_with_nan_are_not_saved",
        f"{FAULT}::test_audio_with_nan_stops_the_run_naming_the_file",
        "training/test_trainer.py::test_a_nan_label_stops_training_and_names_the_conversations",
        "training/test_trainer.py::test_nan_weights_stop_training",
        "training/test_trainer.py::test_a_gradient_that_is_not_finite_stops_before_the_step",
    ),
    promise(
        "C-08",
        "SIGTERM or Ctrl-C leaves one complete checkpoint and 143 or 130, and the run goes on to the same weights",
        "bitwise",
        "training/test_trainer.py::test_a_signal_within_an_epoch_saves_one_complete_checkpoint_and_evaluates_nothing",
        "training/test_checkpoints.py::test_a_run_that_is_stopped_ends_without_a_traceback_and_goes_on_to_the_same_weights",
    ),
    promise(
        "C-09",
        "resuming with other data, order, batch size or number of processes is refused, with other code warned of",
        "every case",
        f"{FAULT}::test_other_data_or_another_order_of_them_are_refused",
        f"{FAULT}::test_another_number_of_processes_is_refused_where_it_changes_the_batch_and_warned_of_elsewhere",
        f"{FAULT}::test_another_batch_size_is_refused_and_other_code_is_warned_of",
    ),
    promise(
        "C-10",
        "an evaluation without a number is never the best; a run of such ends with an error",
        "as stated",
        f"{FAULT}::test_an_evaluation_without_a_number_is_never_the_best",
        f"{FAULT}::test_a_run_whose_evaluations_gave_no_number_ends_with_an_error_and_no_model",
    ),
    promise(
        "C-11",
        "single turns, short utterances and constant labels in a batch train to finite weights and are counted",
        "as stated",
        f"{FAULT}::test_unusual_batches_train_to_finite_weights_and_are_counted",
        f"{FAULT}::test_labels_that_do_not_vary_are_refused_before_training",
    ),
    promise(
        "C-12",
        "layer drop with several processes, and SpecAugment with short utterances, are refused before training",
        "as stated",
        f"{FAULT}::test_layer_drop_with_several_processes_and_spec_augment_with_short_utterances_are_refused",
    ),
    promise(
        "C-13",
        "the same seed trains the same weights, in one process or with two that read; another seed others",
        "bitwise",
        "training/test_trainer.py::test_the_same_seed_trains_the_same_weights_and_another_seed_others",
    ),
]
