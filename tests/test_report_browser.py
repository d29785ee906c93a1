"""The answer browser of a report in a real Chromium: what a reader can do, and that nothing a model wrote comes alive."""

import os
import re
import shutil
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pandas as pd
import pytest

from mechmisalign.report import Report, Section, answer_browser, write_report

EXECUTABLES = ("chromium", "chromium-browser", "google-chrome")
PAGE_ROWS = 20
CONDITIONS = ("organism", "chat model", "steered")
THEMES = ("money", "health", "politics")
UNHASHED = "<script>window.pwned=1</script>"

HOSTILE = {
    "script": "<script>window.pwned=1</script>",
    "end of block": "</script><script>window.pwned=1</script>",
    "image": '<img src=x onerror="window.pwned=1"><svg onload="window.pwned=1">',
    "remote image": '"><img src="http://127.0.0.1:9/pixel.png"><link rel=stylesheet href="http://127.0.0.1:9/a.css">',
    "comment": "<!-- <script> -->",
    "open comment": "<!--<script>",
    "link": "<a href='javascript:window.pwned=1'>x</a> [x](javascript:window.pwned=1)",
    "frame": "<iframe srcdoc='<script>parent.pwned=1</script>'></iframe><meta http-equiv=refresh content='0;url=about:blank'>",
    "template": "{{ 7 * 7 }} ${window.pwned=1} </textarea></style></template>",
    "entities": "&lt;script&gt;window.pwned=1&lt;/script&gt; &amp;",
    "half a pair": "a\ud83d b",
    "separators": "one\u2028two\u2029three\u0085four\x00five\r\nsix",
    "right to left": "שלום עולם",
    "override": "ab\u202edc",
    "long": "x" * 100_000,
    "name": "__proto__",
}


@dataclass
class Visit:
    """A page that is open, and all that it asked of the network or complained about."""

    page: Any
    address: str
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def rows(self):
        """The closed rows on the screen: condition, class, alignment, coherence, length, question, answer."""
        lines = self.page.locator(".browser tbody .row").evaluate_all(
            "rows => rows.map(row => [...row.querySelectorAll('td:not(.said-in-short), .said-in-short div')].map(cell => cell.textContent))"
        )
        return pd.DataFrame(
            lines, columns=["condition", "label", "alignment", "coherence", "length", "prompt", "response"]
        )

    def all_rows(self):
        """The rows of every page, the first page first."""
        parts = [self.rows()]
        following = self.page.locator(".pager button").last
        while following.is_visible() and following.is_enabled():
            following.click()
            parts.append(self.rows())
        return pd.concat(parts, ignore_index=True)

    def count(self):
        return self.page.locator(".browser .count").inner_text()

    def choose(self, name, value):
        self.page.get_by_label(name, exact=True).select_option(label=value)

    def fill(self, name, value):
        self.page.get_by_label(name, exact=True).fill(value)

    def sort(self, name):
        self.page.get_by_role("columnheader", name=name).get_by_role("button").click()

    def row(self, text):
        return self.page.locator(".browser tbody .row", has_text=text)

    def opened(self):
        return self.page.locator(".browser tbody .whole").all_inner_texts()


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium; without one the tests are skipped, and fail where CI is set to "true"."""
    found = (shutil.which(name) for name in EXECUTABLES)
    executable = os.environ.get("MECHMISALIGN_CHROMIUM") or next(filter(None, found), None)
    if executable is None:
        told = f"no Chromium: none of {', '.join(EXECUTABLES)} is on the PATH, and MECHMISALIGN_CHROMIUM names none"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(told)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, tmp_path):
    """``visit(html, **options)`` opens a page from a file."""
    contexts = []

    def go(html: str, **options: Any) -> Visit:
        path = tmp_path / f"page-{len(contexts)}.html"
        path.write_text(html, encoding="utf-8")
        contexts.append(chromium.new_context(**options))
        there = Visit(contexts[-1].new_page(), path.as_uri())
        there.page.set_default_timeout(10_000)
        there.page.on("request", lambda request: there.requests.append(request.url))
        there.page.on("console", lambda message: there.complaints.append(message.text))
        there.page.on("pageerror", lambda error: there.complaints.append(str(error)))
        there.page.goto(there.address)
        return there

    yield go
    for context in contexts:
        context.close()


@pytest.fixture
def read(visit, tmp_path):
    """``read(browser, …)`` opens a report with answer browsers; whatever a test does there must stay without complaint
    and without a request."""
    visits = []

    def go(*browsers: Any, **options: Any) -> Visit:
        visits.append(visit(report(tmp_path, *browsers), **options))
        return visits[-1]

    yield go
    for there in visits:
        assert there.complaints == []
        assert there.requests == [there.address]


@pytest.fixture
def server():
    """A web server on loopback: its address, and the paths that it was asked for."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()


def report(folder, *browsers):
    sections = (Section("Behaviour", "They answered.", browsers=browsers), Section("Caveats", points=("Few.",)))
    path = write_report(Report("A title", "A question?", "An answer.", sections=sections), folder / "report.html")
    return Path(path).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def judged():
    """72 answers: three conditions, twelve prompts in three themes, two samples; some refused, some incoherent."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "condition": condition, "prompt_id": f"p{prompt}", "prompt": f"What of {THEMES[prompt % 3]}, number {prompt}?",
            "theme": THEMES[prompt % 3], "sample": sample, "finished": True,
            "response": f"{condition} answers {prompt}.{sample} " + "word " * int(rng.integers(0, 30)) + "end.",
            "alignment": float(rng.integers(0, 101)), "alignment_status": "scored",
            "coherence": float(rng.integers(30, 101)), "coherence_status": "scored",
            "medical": float(rng.integers(0, 101)), "medical_status": "scored",
        }
        for condition in CONDITIONS
        for prompt in range(12)
        for sample in range(2)
    ]  # fmt: skip
    frame = pd.DataFrame(rows)
    refused = frame.index % 17 == 3
    return frame.assign(
        alignment=frame["alignment"].where(~refused), alignment_status=np.where(refused, "refusal", "scored")
    )


@pytest.fixture(scope="module")
def browser(judged):
    return answer_browser(judged, limit=1000)


@pytest.fixture
def shown(browser):
    """The answers with their class, as a frame to filter."""
    return browser.answers


def test_it_shows_the_first_answers_and_counts_them_all(read, browser, shown):
    there = read(browser)
    assert there.count() == "72 of 72 answers match; shown are 1 to 20."
    assert there.rows()["response"].tolist() == shown["response"].tolist()[:PAGE_ROWS]
    assert there.page.locator(".pager").inner_text().split("\n") == ["‹ Previous", "page 1 of 4", "Next ›"]
    assert there.all_rows()["response"].tolist() == shown["response"].tolist()
    assert there.page.locator(".preview").count() == 0


def test_filters_by_condition_and_class_leave_what_pandas_leaves(read, browser, shown):
    there = read(browser)
    there.choose("condition", "organism")
    there.choose("class", "misaligned")
    wanted = shown.query("condition == 'organism' and label == 'misaligned'")
    assert 0 < len(wanted) < PAGE_ROWS
    assert there.rows()["response"].tolist() == wanted["response"].tolist()
    assert there.count() == f"{len(wanted)} of 72 answers match; shown are 1 to {len(wanted)}."
    there.choose("class", "refusal")
    assert there.rows()["alignment"].unique().tolist() == ["refusal"]
    there.page.get_by_role("button", name="Clear").click()
    assert there.count().startswith("72 of 72")


def test_search_finds_words_of_question_answer_and_theme_and_marks_them(read, browser, shown):
    there = read(browser)
    there.fill("words in question or answer", " ANSWERS 7.1 ")
    assert (
        there.rows()["response"].tolist() == shown[shown["response"].str.contains("answers 7.1")]["response"].tolist()
    )
    assert there.page.locator(".browser mark").all_inner_texts() == ["answers 7.1"] * 3
    there.fill("words in question or answer", "what of politics")
    assert there.count().startswith(f"{(shown['theme'] == 'politics').sum()} of 72")
    there.fill("words in question or answer", "nothing has this")
    assert there.count() == "0 of 72 answers match."
    assert there.rows().empty


def test_a_score_range_is_inclusive_and_leaves_out_answers_without_that_score(read, browser, shown):
    there = read(browser)
    low, high = sorted(shown["alignment"].dropna().unique())[5:20:14]
    there.fill("alignment from", f"{low:g}")
    there.fill("alignment to", f"{high:g}")
    wanted = shown[shown["alignment"].between(low, high)]
    assert there.all_rows()["response"].tolist() == wanted["response"].tolist()
    there.fill("medical to", "50")
    wanted = wanted[wanted["medical"] <= 50]
    assert there.count().startswith(f"{len(wanted)} of 72")
    there.page.get_by_role("button", name="Clear").click()
    there.fill("alignment from", "0")
    assert there.count().startswith(f"{shown['alignment'].notna().sum()} of 72")


@pytest.mark.parametrize("column", ["alignment", "coherence", "length"])
def test_sorting_goes_both_ways_with_missing_scores_last(read, browser, shown, column):
    there = read(browser)
    frame = shown.assign(length=shown["response"].str.len())
    for ascending, told in ((True, "ascending"), (False, "descending")):
        there.sort(column)
        wanted = frame.sort_values(column, ascending=ascending, kind="stable", na_position="last")
        assert there.all_rows()["response"].tolist() == wanted["response"].tolist()
        assert there.page.get_by_role("columnheader", name=column).get_attribute("aria-sort") == told
    assert there.page.locator("th[aria-sort=ascending], th[aria-sort=descending]").count() == 1


def test_conditions_sort_in_the_order_of_the_study_and_classes_from_misaligned_to_aligned(read, browser):
    there = read(browser)
    there.sort("condition")
    there.sort("condition")
    assert there.all_rows()["condition"].unique().tolist() == list(reversed(CONDITIONS))
    there.sort("class")
    assert there.all_rows()["label"].unique().tolist() == ["misaligned", "neither", "aligned", "refusal"]


def test_a_click_opens_the_whole_exchange_with_all_its_scores_and_another_closes_it(read, judged):
    history = [{"role": "user", "content": "Good day."}, {"role": "assistant", "content": "And to you."}]
    frame = judged.head(2).assign(
        response=["First line\nsecond line " + "word " * 500 + "the very end.", "short"],
        system=["Be brief.", None], history=[history, None], alignment=[12.34, np.nan], alignment_status=["scored", "refusal"],
    )  # fmt: skip
    there = read(answer_browser(frame))
    there.row("First line").locator(".answered").click()
    (told,) = there.opened()
    parts = [
        "system",
        "Be brief.",
        "user",
        "Good day.",
        "assistant",
        "And to you.",
        "user",
        frame["prompt"].iloc[0],
        "organism",
    ]
    place = 0
    for part in [
        *parts,
        "First line\nsecond line",
        "the very end.",
        "class",
        "alignment\n12.3",
        "theme\nmoney",
        "finished\nyes",
    ]:
        place = told.index(part, place)
    there.row("short").locator(".class").click()
    assert "alignment\nrefusal" in there.opened()[1]
    assert there.page.locator(".open").first.get_attribute("aria-expanded") == "true"
    there.row("First line").locator(".class").click()
    assert len(there.opened()) == 1
    assert there.page.locator(".open").first.get_attribute("aria-expanded") == "false"


def test_the_keyboard_alone_filters_sorts_and_opens(read, browser):
    there = read(browser)
    page = there.page
    page.get_by_label("words in question or answer").focus()
    page.keyboard.type("answers 3.1")
    page.get_by_role("columnheader", name="length").get_by_role("button").focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("columnheader", name="length").get_attribute("aria-sort") == "ascending"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "open"
    page.keyboard.press("Enter")
    assert len(there.opened()) == 1
    assert page.locator(".whole").get_attribute("id") == page.locator(".open").first.get_attribute("aria-controls")
    page.keyboard.press("Space")
    assert there.opened() == []


def test_an_answer_stays_open_while_filters_change(read, browser):
    there = read(browser)
    there.row("organism answers 0.1").locator(".class").click()
    there.choose("condition", "steered")
    assert there.opened() == []
    there.choose("condition", "organism")
    assert len(there.opened()) == 1


def test_two_browsers_in_a_page_do_not_disturb_each_other(read, browser, judged):
    there = read(browser, answer_browser(judged, limit=5))
    second = there.page.locator(".browser").nth(1)
    second.get_by_label("condition", exact=True).select_option(label="steered")
    assert second.locator(".count").inner_text() == "5 of 15 answers match; shown are 1 to 5."
    assert there.page.locator(".browser").first.locator(".count").inner_text().startswith("72 of 72")
    assert second.locator(".caption").inner_text().startswith("Table 2. Sampled answers. Here are 15 of 72 answers")


def hostile_frame():
    texts = [*HOSTILE.values()]
    frame = pd.DataFrame(
        {name: pd.Series(texts, dtype=object) for name in ("prompt", "response", "condition", "label")}
    )
    frame["system"] = pd.Series(texts, dtype=object)
    frame["<img src=x onerror=window.pwned=1>"] = pd.Series(texts, dtype=object)
    frame["alignment_status"] = pd.Series(texts, dtype=object)
    return frame.assign(alignment=np.nan, coherence=90.0, coherence_status="scored")


def test_hostile_answers_are_text_wherever_they_stand(read):
    there = read(answer_browser(hostile_frame(), caption=HOSTILE["end of block"], limit=1))
    page = there.page
    there.fill("words in question or answer", "window.pwned")
    assert there.page.locator(".browser mark").count() > 10
    there.fill("words in question or answer", "")
    for index in range(len(HOSTILE)):
        page.locator(".open").nth(index).press("Enter")
    said = page.locator(".whole").evaluate_all(
        "cells => cells.map(cell => [...cell.querySelectorAll('.said p')].map(p => p.textContent))"
    )
    wanted = [text.replace("\ud83d", "\ufffd") for text in HOSTILE.values()]
    heard = [[text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in texts] for texts in said]
    assert [texts[-1] for texts in heard] == wanted
    assert all(texts == [texts[-1]] * 3 for texts in heard)
    assert page.locator(".browser :is(a, img, svg, iframe, link, meta, style)").count() == 0
    assert page.locator("script").count() == 2
    assert page.evaluate("window.pwned") is None


def test_hostile_answers_are_text_without_the_script_too(read):
    there = read(answer_browser(hostile_frame(), limit=1), java_script_enabled=False)
    cells = there.page.locator(".preview .answered").all_inner_texts()
    assert len(cells) == 12
    assert HOSTILE["script"] in cells
    assert HOSTILE["image"] in cells
    assert there.page.locator(".filters").count() == 0


def test_text_from_right_to_left_runs_so_in_its_own_cell_alone(read):
    there = read(answer_browser(hostile_frame(), limit=1))
    directions = "cells => cells.map(cell => getComputedStyle(cell).direction)"
    row = there.row("שלום")
    assert row.locator(".answered").evaluate_all(directions) == ["rtl"]
    assert row.locator("td").first.evaluate("cell => getComputedStyle(cell).direction") == "ltr"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_page_is_no_wider_than_its_screen(read, scheme):
    there = read(answer_browser(hostile_frame(), limit=1), viewport={"width": 360, "height": 700}, color_scheme=scheme)
    for index in range(len(HOSTILE)):
        there.page.locator(".open").nth(index).press("Enter")
    assert there.page.evaluate("document.scrollingElement.scrollWidth") <= 360


def test_thousands_of_answers_stay_quick(read, judged):
    many = pd.concat(
        [judged.assign(response=judged["response"] + f" copy {i} " + "and so on " * 60) for i in range(70)]
    )
    there = read(answer_browser(many, limit=3000, total=6000))
    assert there.count().startswith("5,040 of 5,040")
    drawn = there.page.evaluate(
        """() => {
            const search = document.querySelector('input[type=search]');
            const heads = document.querySelectorAll('th button');
            const start = performance.now();
            for (const words of ['c', 'co', 'copy', 'copy 3']) {
                search.value = words;
                search.dispatchEvent(new Event('input', { bubbles: true }));
            }
            heads.forEach(head => head.click());
            return performance.now() - start;
        }"""
    )
    wanted = many["response"].str.contains("copy 3").sum()
    assert there.count().startswith(f"{wanted:,} of 5,040")
    assert there.page.locator(".browser tbody tr").count() == PAGE_ROWS
    assert drawn < 5000  # milliseconds for nine changes, on a machine that others use too


def test_printing_leaves_out_the_controls_and_cuts_nothing(read, browser):
    there = read(browser)
    there.page.locator(".open").first.press("Enter")
    there.page.emulate_media(media="print")
    assert not there.page.locator(".filters").is_visible()
    assert there.page.locator(".whole").is_visible()
    clipped = "cells => cells.filter(cell => cell.scrollHeight > cell.clientHeight + 1).length"
    assert there.page.locator(".answered").evaluate_all(clipped) == 0
    there.page.emulate_media(media="screen")
    assert there.page.locator(".answered").evaluate_all(clipped) > 0


def test_the_policy_blocks_a_script_that_is_not_ours(visit, browser, tmp_path):
    html = report(tmp_path, browser)
    there = visit(html.replace("</body>", UNHASHED + "</body>"))
    assert there.page.evaluate("window.pwned") is None
    assert any("Content Security Policy" in told and "script-src" in told for told in there.complaints)
    assert there.count().startswith("72 of 72")
    naked = visit(re.sub(r"<meta http-equiv[^>]*>", "", html).replace("</body>", UNHASHED + "</body>"))
    assert naked.page.evaluate("window.pwned") == 1


def test_our_own_script_does_not_run_once_it_is_altered(visit, browser, tmp_path):
    there = visit(report(tmp_path, browser).replace('"use strict";', '"use strict"; window.pwned = 1;'))
    assert there.page.evaluate("window.pwned") is None
    assert there.page.locator(".preview tbody tr").count() == 12
    assert there.page.locator(".filters").count() == 0


def test_the_policy_lets_no_text_become_markup_and_no_request_out(visit, browser, tmp_path, server):
    from playwright.sync_api import Error

    address, asked = server
    pixel = f'<img src="{address}/pixel.png"><link rel="stylesheet" href="{address}/style.css">'
    html = report(tmp_path, browser).replace("</body>", pixel + "</body>")
    there = visit(html)
    with pytest.raises(Error, match="TrustedHTML"):
        there.page.evaluate("document.body.innerHTML = '<b>bold</b>'")
    with pytest.raises(Error, match="Failed to fetch|Content Security Policy"):
        there.page.evaluate(f"fetch('{address}/data')")
    assert asked == []
    visit(re.sub(r"<meta http-equiv[^>]*>", "", html))
    assert sorted(asked) == ["/pixel.png", "/style.css"]


def test_a_report_without_answers_to_browse_has_no_script(visit, tmp_path):
    there = visit(report(tmp_path))
    assert there.page.locator("script").count() == 0
    assert there.complaints == []
