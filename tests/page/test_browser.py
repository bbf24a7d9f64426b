"""The page in a real headless Chromium: what a person does, and what they see."""

import os
import re
import shutil

import numpy as np
import pytest
import soundfile as sf

from modeling_mamba_ema.sample import load_sample_conversation

pytest.importorskip("gradio", reason="the page needs gradio: pip install '.[page]'")
pytest.importorskip("playwright", reason="needs playwright: pip install playwright")

from playwright import sync_api

from tests.support.page_client import serve, tracker

pytestmark = pytest.mark.slow

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PICTURES = "img[src^='data:image/png']"
SECONDS_30 = 30_000  # milliseconds


def chromium() -> str | None:
    """Its path: $CHROMIUM, an installed one, or the one `playwright install chromium` fetched."""
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        with sync_api.sync_playwright() as playwright:
            path = playwright.chromium.executable_path
        found = path if os.path.exists(path) else None
    return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    path = chromium()
    if path is None:
        pytest.skip(f"no Chromium: install one of {', '.join(NAMES)} (apt), or name it in $CHROMIUM")
    spoken = tmp_path_factory.mktemp("microphone") / "spoken.wav"
    sf.write(spoken, load_sample_conversation()[0]["waveform"], 16_000)
    flags = ["--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream"]
    flags += [f"--use-file-for-fake-audio-capture={spoken}"]
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        flags.append("--no-sandbox")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=flags)
        yield started
        started.close()


@pytest.fixture(scope="module")
def served():
    with serve() as visitor:
        yield visitor


@pytest.fixture
def page(browser, served):
    context = browser.new_context(viewport={"width": 1280, "height": 1000}, permissions=["microphone"])
    page = context.new_page()
    page.set_default_timeout(SECONDS_30)
    page.addresses, page.complaints = [], []
    page.on("request", lambda request: page.addresses.append(request.url))
    page.on("pageerror", lambda error: page.complaints.append(str(error)))
    page.goto(served.url)
    page.get_by_role("button", name="Add this turn").wait_for()
    yield page
    assert page.complaints == []
    assert [a for a in page.addresses if not a.startswith((served.url, "data:", "blob:"))] == []
    context.close()


def upload(page, name, content):
    page.set_input_files("#turn input[type=file]", {"name": name, "mimeType": "audio/wav", "buffer": content})
    page.locator("#turn").get_by_text(re.compile(r"0:0\d")).first.wait_for()


def rows(page, count):
    page.locator("table tbody tr").nth(count - 1).wait_for()
    return [row.split("\t") for row in page.locator("table tbody").inner_text().splitlines()]


def shown(turn):
    return [f"{value:.3f}" for value in turn.values.values()] + [f"{turn.label_values['valence']:.2f}"]


def test_an_upload_shows_the_numbers_of_the_python_api_and_the_picture(page):
    spoken = load_sample_conversation()[0]
    with open(spoken["file_name"], "rb") as file:
        upload(page, "anna.wav", file.read())
    page.get_by_role("button", name="Add this turn").click()
    (row,) = rows(page, 1)
    assert row[1] == "speaker A"
    assert row[3:] == shown(tracker().update(spoken["waveform"], 16_000))
    for picture in page.locator(PICTURES).all():
        assert picture.evaluate("image => image.complete && image.naturalWidth") >= 500
    assert page.locator(PICTURES).count() == 3


def test_the_line_on_the_picture_follows_the_player_and_a_click_moves_it(page):
    page.get_by_role("button", name="Hear the shipped conversation").click()
    rows(page, 7)
    seconds = len(load_sample_conversation()[6]["waveform"]) / 16_000
    heard = page.locator("audio[aria-label='turn 7']").evaluate("audio => audio.duration")
    assert heard == pytest.approx(seconds, abs=0.01)
    left, right = (float(page.locator(".cursor").get_attribute(f"data-{side}")) for side in ("left", "right"))
    box = page.locator(".listen img").bounding_box()
    middle = box["width"] * (left + right) / 200
    page.locator(".listen img").click(position={"x": middle, "y": box["height"] / 3})
    page.wait_for_function("parseFloat(document.querySelector('.cursor').style.left) > 30")
    assert page.locator("audio").last.evaluate("audio => audio.currentTime") == pytest.approx(seconds / 2, abs=0.03)
    line = page.locator(".cursor").evaluate("line => parseFloat(line.style.left)")
    assert line == pytest.approx((left + right) / 2, abs=1)


def test_the_shipped_conversation_is_heard_with_its_numbers(page):
    page.get_by_role("button", name="Hear the shipped conversation").click()
    own = tracker()
    for row, turn in zip(rows(page, 7), load_sample_conversation()):
        heard = own.update(turn["waveform"], 16_000, speaker=turn["speaker"])
        assert row[1] == turn["speaker"]
        assert row[3:] == [*shown(heard), f"{turn['valence']:.2f}", f"{turn['arousal']:.2f}"]  # and its labels


def test_a_recording_from_the_microphone_is_scored(page):
    page.get_by_role("button", name="Record audio").click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(1500)
    page.locator("#turn").get_by_text("Stop", exact=True).locator("visible=true").click()
    page.get_by_role("button", name="Trim audio to selection").wait_for()
    page.get_by_role("button", name="Add this turn").click()
    (row,) = rows(page, 1)
    assert 0.5 < float(row[2]) < 6
    assert all(np.isfinite(float(value)) for value in row[3:])


def test_a_broken_file_and_no_file_are_sentences_a_person_reads(page):
    page.get_by_role("button", name="Add this turn").click()
    page.get_by_text("Record or upload a turn first.").wait_for()
    page.set_input_files(
        "#turn input[type=file]", {"name": "broken.wav", "mimeType": "audio/wav", "buffer": b"no audio at all"}
    )
    page.wait_for_function("!document.querySelector('#turn').innerText.includes('Drop Audio')")
    page.get_by_role("button", name="Add this turn").click()
    page.get_by_text("broken.wav is no audio file that can be read").wait_for()


def test_two_tabs_hold_two_conversations(page, browser, served):
    other = browser.new_page()
    other.goto(served.url)
    page.get_by_role("button", name="Hear the shipped conversation").click()
    rows(page, 7)
    assert other.locator("table").count() == 0
    with open(load_sample_conversation()[1]["file_name"], "rb") as file:
        upload(other, "ben.wav", file.read())
    other.get_by_role("button", name="Add this turn").click()
    assert rows(other, 1)[0][3:] == shown(tracker().update(load_sample_conversation()[1]["waveform"], 16_000))
    assert len(rows(page, 7)) == 7
    other.close()


def test_starting_over_empties_the_page(page):
    page.get_by_role("button", name="Hear the shipped conversation").click()
    rows(page, 7)
    page.get_by_role("button", name="Start over").click()
    page.get_by_text("Nothing heard yet").wait_for()
    assert page.locator("table").count() == 0
    assert page.locator("audio").count() == 0
