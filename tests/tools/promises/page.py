"""The page in the browser and the pipeline, with many and with hostile visitors."""

from .promise import promise

PROMISES = [
    promise(
        "D-01",
        "30 visitors at once get 30 answers of their own",
        "2e-5; memory grows by less than 200 MB",
        "page/test_load.py::test_thirty_visitors_at_once_get_thirty_answers_of_their_own",
    ),
    promise(
        "D-02",
        "two visitors interleaved for 50 turns hear their own conversations",
        "2e-5",
        "page/test_load.py::test_two_visitors_interleaved_for_fifty_turns_hear_their_own_conversations",
    ),
    promise(
        "D-03",
        "a full queue is a 503 with text, and the page answers again",
        "within 2 s",
        "page/test_page.py::test_a_full_queue_is_a_503_and_the_page_answers_again",
    ),
    promise(
        "D-04",
        "files over the limit, and small ones that unpack to gigabytes, are refused",
        "under 1 s and 100 MB",
        "page/test_page.py::test_a_file_one_byte_over_the_limit_is_refused_at_once",
        "page/test_page.py::test_a_small_file_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked",
    ),
    promise(
        "D-05",
        "a broken file is a sentence without paths",
        "every case",
        "page/test_page.py::test_a_broken_file_is_a_sentence_without_paths",
    ),
    promise(
        "D-06",
        "no path or URL trick reads a file or opens a connection",
        "0 reads, 0 connections",
        "page/test_page.py::test_no_file_of_the_server_is_read_and_no_address_is_visited",
    ),
    promise(
        "D-07",
        "500 requests fill neither memory nor disk",
        "0.1 MB a request",
        "page/test_load.py::test_five_hundred_requests_do_not_fill_memory_or_disk",
    ),
    promise(
        "D-08",
        "a closed tab frees its conversation",
        "within 60 s",
        "page/test_page.py::test_a_closed_tab_frees_its_conversation",
    ),
    promise(
        "D-09",
        "a missing or incomplete model is one line at the start",
        "as stated",
        "page/test_page.py::test_a_missing_or_incomplete_model_is_one_line_at_the_start",
    ),
    promise(
        "D-10",
        "the pipeline takes paths only when told to, and never fetches",
        "every case",
        "test_pipeline.py::test_a_string_is_a_path_only_when_allowed",
        "test_pipeline.py::test_what_cannot_be_used_is_refused_in_a_sentence_and_nothing_is_fetched",
    ),
]
