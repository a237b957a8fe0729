"""The page in a real browser: Debian's Chromium without a window, driven by playwright.

With DYVTE_SCREENSHOTS=docs/serving the screenshots of the document are written there.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from dyvte.gates import GateConfig, GateStack
from dyvte.serving.answerer import Answerer
from tests.helpers.models import random_image
from tests.helpers.served import serving

pytestmark = pytest.mark.full
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUESTION = "what color is the circle ?"


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture
def page(browser):
    """A page that lets nothing pass: no error in its scripts, no request to anywhere else."""
    context = browser.new_context(viewport={"width": 1100, "height": 900}, accept_downloads=True)
    opened = context.new_page()
    opened.set_default_timeout(60_000)
    problems, asked = [], []
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    opened.on("request", lambda request: asked.append(request.url))
    opened.problems = problems
    yield opened
    context.close()
    elsewhere = [url for url in asked if not re.match(r"(http://127\.0\.0\.1:|data:|blob:|file:)", url)]
    assert not elsewhere
    assert not problems


def ask(page, url, picture, question=QUESTION, *, expect_trace=True):
    if not page.url.startswith("http"):
        page.goto(url)
        page.locator("#ask:not([disabled])").wait_for()
    if picture is not None:
        page.set_input_files("#file", picture)
        page.wait_for_selector("#images img")
    page.fill("#question", question)
    count = page.locator(".turn").count()
    page.keyboard.press("Enter")
    page.locator(".turn").nth(count).wait_for()
    turn = page.locator(".turn").first
    if expect_trace:
        turn.locator(".strip").wait_for()
    page.locator("#ask:not([disabled])").wait_for()
    return turn


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    random_image(1, 64).save(path)
    return path


def texts(turn):
    return {name: turn.locator(f".card.{name} .text").inner_text() for name in ("full", "fixed", "own")}


def test_drop_ask_compare_and_go_on(page, served, answerer, picture):
    from dyvte.serving.asking import ask as answer
    from dyvte.serving.jobs import Conversation
    from dyvte.serving.schedules import ScheduleWish

    page.goto(served.url)
    page.locator("#ask:not([disabled])").wait_for()
    # A file dropped on the page, as a browser hands it over.
    content = list(picture.read_bytes())
    dropped = page.evaluate_handle(
        """(content) => {
            const data = new DataTransfer();
            data.items.add(new File([new Uint8Array(content)], "scene.png", { type: "image/png" }));
            return data;
        }""",
        content,
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": dropped})
    page.wait_for_selector("#images img")
    assert page.evaluate("document.activeElement.id") == "question"
    turn = ask(page, served.url, None)
    image = random_image(1, 64)
    for name, policy in (("full", "never"), ("fixed", "fixed:2"), ("own", "gates")):
        known = answer(
            answerer,
            Conversation(QUESTION, [[image]]),
            schedule=answerer.menu.choose(ScheduleWish(policy=policy)),
        )
        assert texts(turn)[name] == known.texts[0]
        card = turn.locator(f".card.{name}")
        bar = card.locator(".depth")
        assert bar.locator("span").count() == 4
        assert bar.locator(".updated").count() == known.report.exit_layer
        assert "Visual tokens updated in" in bar.get_attribute("aria-label")
        assert re.search(r"first token\s*\d+ ms", card.inner_text())
        assert re.search(r"KV\s*[\d.]+ KiB", card.inner_text())
    own = texts(turn)["own"]
    second = ask(page, served.url, None, "how many ?")
    known = answer(answerer, Conversation("how many ?", [[image], []], [(QUESTION, own)]))
    assert texts(second)["own"] == known.texts[0], "the conversation goes on from the third column's answer"
    assert page.locator(".turn").count() == 2


def test_the_threshold_can_be_dragged_and_the_answer_changes_at_once(page, served, answerer, picture):
    from dyvte.serving.explore import trace_schedules
    from dyvte.serving.jobs import Conversation

    turn = ask(page, served.url, picture)
    traced = trace_schedules(answerer, Conversation(QUESTION, [[random_image(1, 64)]]))
    answers = {one.exit_layer: one.answer for one in traced.schedules}
    page.route("**/v1/**", lambda route: route.abort())  # from here on the server is not asked
    chart = turn.locator("svg.gates")
    box = chart.bounding_box()
    seen = set()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 12)
    page.mouse.down()
    for share in [step / 40 for step in range(2, 38)]:
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + share * box["height"])
        facts = turn.locator(".card.own dl").inner_text()
        left = re.search(r"left after layer (\d)", facts)
        k = int(left[1]) if left else 4
        assert texts(turn)["own"] == answers[k]
        assert turn.locator(".card.own .depth .updated").count() == k
        seen.add(k)
    page.mouse.up()
    assert seen == {traced.schedules[step.schedule].exit_layer for step in traced.path}
    assert len(seen) > 1
    # The same by keyboard.
    slider = turn.locator("[data-control=threshold]")
    slider.focus()
    before = slider.input_value()
    page.keyboard.press("ArrowRight")
    assert float(turn.locator("[data-control=threshold]").input_value()) == pytest.approx(
        float(before) + 0.05
    )
    assert page.evaluate("document.activeElement.dataset.control") == "threshold"


def test_the_strip_shows_every_exit_and_the_dial_every_bound(page, served, picture):
    turn = ask(page, served.url, picture)
    buttons = turn.locator(".strip button")
    assert buttons.count() == 5
    assert turn.locator(".strip li.stable").count() <= 1
    for k in (1, 0, 4):
        buttons.nth(k).click()
        shown = buttons.nth(k).locator(".answer").inner_text()
        assert texts(turn)["own"] in (shown, "(nothing)")
        assert f"fixed:{k}" in turn.locator(".card.own h3").inner_text()
    buttons.nth(4).focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.dataset.layer") == "3"
    assert "after layer 3:" in buttons.nth(3).get_attribute("aria-label")
    dial = turn.locator("[data-control=risk]")
    dial.fill("1")
    assert "at most 5 % of answers differ" in turn.locator(".slider").last.inner_text()
    assert "certified" in turn.locator(".card.own").inner_text()
    turn.locator("[data-control=risk]").fill("0")
    assert "never leaves" in turn.locator(".slider").last.inner_text()
    assert texts(turn)["own"] == texts(turn)["full"]


def test_errors_are_shown_and_can_be_mended(page, served, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    turn = ask(page, served.url, broken, expect_trace=False)
    error = turn.locator("[role=alert]")
    assert "no image can be read" in error.inner_text()
    page.click("#images button")
    good = tmp_path / "good.png"
    random_image(2, 32).save(good)
    page.problems.clear()  # the browser notes the reply's status
    turn = ask(page, served.url, good)
    assert turn.locator("[role=alert]").count() == 0
    assert texts(turn)["own"] != ""


def test_a_question_without_an_image(page, served):
    turn = ask(page, served.url, None, expect_trace=False)
    assert len(set(texts(turn).values())) == 1
    assert turn.locator(".strip").count() == 0


def test_markup_in_questions_is_text(page, served, picture):
    turn = ask(page, served.url, picture, "<img src=x onerror=alert(1)> ?")
    assert turn.locator("h2").inner_text() == "<img src=x onerror=alert(1)> ?"
    assert turn.locator("h2 img").count() == 0


def test_light_dark_phone_and_alternative_texts(page, served, picture):
    turn = ask(page, served.url, picture)
    ground = "getComputedStyle(document.body).backgroundColor"
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(ground) != light
    page.click("#theme")
    assert page.evaluate(ground) == light
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth <= 360")
    tops = [turn.locator(f".card.{name}").bounding_box()["y"] for name in ("full", "fixed", "own")]
    assert tops == sorted(set(tops)), "one below the other"
    assert page.evaluate("[...document.images].every((one) => one.alt.length > 0)")
    unnamed = """[...document.querySelectorAll("button, input")].filter(
        (one) => one.type !== "file" && !one.labels?.length && !one.getAttribute("aria-label")
            && !one.textContent.trim())"""
    assert page.evaluate(f"{unnamed}.length") == 0


def test_a_saved_page_is_one_file_that_needs_no_server(page, served, picture, tmp_path):
    turn = ask(page, served.url, picture, "what </script> color ?")
    shown, facts = texts(turn), turn.locator(".card.own dl").inner_text()
    with page.expect_download() as download:
        page.click("#save")
    saved = tmp_path / "saved.html"
    download.value.save_as(saved)
    assert not re.search(
        r"""(?:src|href)=["'](?!data:)[^"'$]""",
        re.sub(r"<script.*?</script>", "", saved.read_text(), flags=re.S),
    )
    page.context.set_offline(True)
    page.goto(saved.as_uri())
    turn = page.locator(".turn").first
    assert turn.locator("h2").inner_text() == "what </script> color ?"
    assert texts(turn) == shown
    assert turn.locator(".card.own dl").inner_text() == facts
    assert turn.locator(".shown img").evaluate("(one) => one.naturalWidth") == 64
    turn.locator(".strip button").nth(0).click()
    assert "fixed:0" in turn.locator(".card.own h3").inner_text()
    turn.locator("[data-control=risk]").fill("0")
    assert texts(turn)["own"] == shown["full"]
    assert page.locator("#form").count() == 0


def test_a_server_without_gates(page, pipeline, picture):
    with serving(Answerer.of(pipeline, "freeze:1:3")) as running:
        turn = ask(page, running.url, picture)
        assert turn.locator(".card.own .depth .read").count() == 2
        assert turn.locator("svg.gates").count() == 0
        assert turn.locator(".strip button").count() == 5
    page.goto("about:blank")


def test_gates_that_also_freeze_are_drawn_inside_the_chart(page, pipeline, picture, tmp_path):
    """A circle in its own column for each layer that may freeze, 0 among them; none for the others."""
    offsets = (-0.5, -1e30, 0.0, 0.5)
    config = GateConfig(
        num_layers=4, hidden_size=32, architecture="compact", freeze_head=True, freeze_offsets=offsets
    )
    gates = GateStack.init(config, 0)
    generator = torch.Generator().manual_seed(3)
    for parameter in gates.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    gates.save_pretrained(tmp_path / "gates")
    with serving(Answerer.of(pipeline, f"gates:{tmp_path / 'gates'}")) as running:
        turn = ask(page, running.url, picture)
        chart = turn.locator("svg.gates")
        left = chart.locator("line.grid").first.get_attribute("x1")
        places = [float(one.get_attribute("cx")) for one in chart.locator("circle.freeze").all()]
        bars = [
            float(one.get_attribute("x")) + float(one.get_attribute("width")) / 2
            for one in chart.locator("rect").all()
        ]
        assert len(places) == 3
        assert places[0] > float(left)
        assert places[1:] == pytest.approx(bars[1:]), "above the bars of layers 2 and 3"
        assert chart.locator("text.axis", has_text=re.compile("^0$")).count() == 1
        assert "freezes" in chart.get_attribute("aria-label")
        assert "Circles: it freezes" in turn.inner_text()
    page.goto("about:blank")


@pytest.mark.skipif("DYVTE_SCREENSHOTS" not in os.environ, reason="DYVTE_SCREENSHOTS names no folder")
def test_screenshots(browser):
    """Of the embedded backbone, with the gates and the image that the environment names."""
    from dyvte.backbones import get_template, load_backbone
    from dyvte.evaluation.generation import Pipeline
    from dyvte.runtime.image_store import ImageStore

    folder = Path(os.environ["DYVTE_SCREENSHOTS"])
    folder.mkdir(parents=True, exist_ok=True)
    root = Path(__file__).resolve().parents[2]
    model, processor = load_backbone(root / "checkpoints" / "tiny-llava")
    made = Pipeline(model, processor, get_template("auto", processor), 16)
    answerer = Answerer.of(made, f"gates:{os.environ['DYVTE_GATES']}", images=ImageStore())
    picture, question = os.environ["DYVTE_IMAGE"], os.environ["DYVTE_QUESTION"]
    with serving(answerer, served_name="checkpoints/tiny-llava") as running:
        for name, width, scheme in (("page", 1100, "light"), ("phone", 390, "dark")):
            context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page = context.new_page()
            turn = ask(page, running.url, picture, question)
            turn.locator("[data-control=threshold]").focus()
            page.evaluate("document.activeElement.blur()")
            page.screenshot(path=folder / f"{name}.png", full_page=True)
            context.close()
