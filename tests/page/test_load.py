"""The page under many visitors and many requests."""

import io
import time

import pytest
import soundfile as sf

pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[page]'")

from tests.support.page_client import clip, serve, serve_elsewhere, tracker, wav
from tests.support.programs import in_threads, resident_memory

pytestmark = pytest.mark.slow


def heard_alone(seeds):
    own = tracker()
    return [own.update(sf.read(io.BytesIO(wav(clip(seed))), dtype="float32")[0], 16_000).values for seed in seeds]


@pytest.mark.promise(
    "D-01", "30 visitors at once get 30 answers of their own", "2e-5; memory grows by less than 200 MB"
)
def test_thirty_visitors_at_once_get_thirty_answers_of_their_own(tmp_path, record_property):
    serial = [heard_alone([seed])[0] for seed in range(30)]
    with serve_elsewhere(tmp_path) as (visitor, process):
        visitor.another().turns(wav(clip(99)))  # what the first turn loads is no growth
        crowd, before = [visitor.another() for _ in range(30)], resident_memory(process)

        def ask(seed, who):
            begin = time.perf_counter()
            turns = who.turns(wav(clip(seed)))
            return turns[0]["values"], time.perf_counter() - begin

        answers = in_threads([lambda seed=seed, who=who: ask(seed, who) for seed, who in enumerate(crowd)])
        growth = resident_memory(process) - before
    waits = sorted(wait for _, wait in answers)
    figures = f"median {waits[15]:.1f} s, p95 {waits[28]:.1f} s, memory grew by {growth:.0f} MB"
    record_property("figure", figures)
    for (values, _), alone in zip(answers, serial):
        assert values == pytest.approx(alone, abs=2e-5)
    assert growth < 200


@pytest.mark.promise("D-02", "two visitors interleaved for 50 turns hear their own conversations", "2e-5")
def test_two_visitors_interleaved_for_fifty_turns_hear_their_own_conversations():
    seeds = [range(50), range(100, 150)]
    alone = [heard_alone(own) for own in seeds]
    with serve() as visitor:
        both = [visitor.another(), visitor.another()]

        def talk(who, own):
            for seed in own:
                turns = who.turns(wav(clip(seed)))
            return [turn["values"] for turn in turns]

        heard = in_threads([lambda who=who, own=own: talk(who, own) for who, own in zip(both, seeds)])
    for one, other in zip(heard, alone):
        assert len(one) == 50
        for values, expected in zip(one, other):
            assert values == pytest.approx(expected, abs=2e-5)


@pytest.mark.promise("D-07", "500 requests fill neither memory nor disk", "0.1 MB a request")
@pytest.mark.timeout(1800)
def test_five_hundred_requests_do_not_fill_memory_or_disk(tmp_path, record_property):
    uploads = tmp_path / "uploads"
    with serve_elsewhere(tmp_path) as (visitor, process):
        memory = []
        for request in range(500):
            who = visitor if request % 5 else visitor.another()
            if request % 50 == 0:
                visitor.join("start_over", []).raise_for_status()
                list(visitor.results())
            who.turns(wav(clip(request % 7)))
            memory.append(resident_memory(process))
        files = [path for path in uploads.rglob("*") if path.is_file()]
        assert len(files) <= 7, "the same upload is kept once, and none for long"
    # The first half fills the sessions that the page keeps.
    slope = (memory[-1] - memory[250]) / 250
    figures = f"{memory[0]:.0f}, {memory[250]:.0f}, {memory[-1]:.0f} MB, {slope:.3f} MB a request at the end"
    record_property("figure", figures)
    assert slope < 0.1
    assert not [path for path in uploads.rglob("*") if path.is_file()]
