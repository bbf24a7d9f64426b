"""What is published, and what loading it may do."""

from .promise import promise

BAD_INPUT = "test_bad_input.py"
HOSTILE = "test_hostile_files.py"
PUBLISHED = "publishing/test_published_code.py"
ALONE = "test_loading_alone.py"
DOCUMENTS = "repository/test_documents.py"

PROMISES = [
    promise(
        "E-01",
        "only safetensors, JSON, Python, text and two short samples are published",
        "as stated",
        f"{PUBLISHED}::test_only_weights_settings_code_text_and_two_short_samples_are_published",
    ),
    promise(
        "E-02",
        "published code imports and calls only what is listed, is flat and short enough to be read",
        "0 others",
        f"{PUBLISHED}::test_published_code_imports_and_calls_only_what_is_listed_here",
        f"{PUBLISHED}::test_the_scan_sees",
        f"{PUBLISHED}::test_published_code_is_flat_and_short_enough_to_be_read",
    ),
    promise(
        "E-03",
        "loading and running a model tries no connection",
        "0",
        f"{ALONE}::test_no_connection_and_no_process_is_tried",
    ),
    promise(
        "E-04",
        "loading writes nothing; remote code is copied into transformers' module cache only",
        "0 other writes",
        f"{ALONE}::test_the_installed_package_writes_nothing",
        f"{ALONE}::test_remote_code_is_copied_into_transformers_module_cache_and_nothing_else_is_written",
    ),
    promise(
        "E-05",
        "pickles in a model or a checkpoint run nothing",
        "0",
        f"{HOSTILE}::test_pickled_weights_are_neither_run_nor_read",
        f"{HOSTILE}::test_a_pickle_that_is_asked_for_or_is_a_wavlms_runs_nothing",
        f"{HOSTILE}::test_pickles_in_a_checkpoint_run_nothing_on_resume",
    ),
    promise(
        "E-06",
        "a config.json cannot choose an attention kernel from a repository",
        "refused",
        "test_saving.py::test_a_config_json_cannot_choose_an_attention_kernel",
        "test_configuration.py::test_a_configuration_cannot_choose_an_attention_kernel_from_a_repository",
    ),
    promise(
        "E-07",
        "sizes in a config.json are bounded",
        "refused under 50 MB",
        f"{HOSTILE}::test_a_config_json_with_sizes_without_bounds_is_refused_before_memory_is_taken",
        "test_configuration.py::test_a_value_outside_its_range_is_named_with_what_is_allowed",
    ),
    promise(
        "E-08",
        "hostile YAML is refused: objects, aliases, depth, size, unknown keys",
        "every case",
        f"{HOSTILE}::test_hostile_yaml_is_refused_in_a_short_sentence",
    ),
    promise(
        "E-09",
        "no document or program trusts remote code without a revision",
        "0",
        f"{DOCUMENTS}::test_documents_never_trust_remote_code_without_a_revision",
        f"{DOCUMENTS}::test_the_model_card_never_trusts_remote_code_without_a_revision",
        f"{DOCUMENTS}::test_programs_never_trust_remote_code_without_a_revision",
    ),
    promise(
        "E-10",
        "the oldest versions allowed are above the advisories that SECURITY.md names",
        "as stated",
        f"{DOCUMENTS}::test_floors_are_above_the_advisories",
    ),
    promise(
        "E-11",
        "the installed package gives the numbers of remote code, without it",
        "bitwise",
        f"{ALONE}::test_both_ways_give_bitwise_the_same_numbers",
    ),
    promise(
        "E-12",
        "a saved folder carries SHA256SUMS, by which damage is found",
        "every case",
        f"{PUBLISHED}::test_a_saved_folder_is_intact_after_the_feature_extractor_was_saved_into_it_again",
        f"{PUBLISHED}::test_damage_is_found_and_named",
    ),
    promise(
        "E-13",
        "errors about audio carry no folder of the user and no samples",
        "every case",
        "test_messages.py::test_errors_about_files_name_them_without_their_folder",
        f"{BAD_INPUT}::test_audio_that_cannot_be_answered_for_is_one_sentence_with_its_place_and_what_is_allowed",
    ),
]
