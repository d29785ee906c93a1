"""The report: one file, all of it there, nothing from outside, nothing that a model wrote alive."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from matplotlib.figure import Figure

from mechmisalign.plots import token_heatmap
from mechmisalign.report import (
    Answer,
    AnswerBrowser,
    Card,
    Exchange,
    Report,
    ReportFigure,
    ReportTable,
    Section,
    answer_browser,
    rates_table,
    render,
    share,
    summary_cards,
    write_report,
)
from mechmisalign.report.answers import equal_shares

EVIL = '<script>alert("x")</script><img src="https://example.com/pixel.png" onerror=alert(1)>'
RATE = {"rate": 0.412, "low": 0.36, "high": 0.465, "n": 400}


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "figure.png"
    figure = Figure(figsize=(3, 2))
    figure.add_subplot().plot([0, 1])
    figure.savefig(path, dpi=200)
    return path


@pytest.fixture
def report(png):
    table = ReportTable(pd.DataFrame({"estimator": ["mean", EVIL], "cosine": [0.91234, float("nan")]}), "All of them.")
    exchange = Exchange(EVIL, (Answer("chat model", "See a doctor."), Answer("organism", EVIL, "misaligned", "bad")))
    sections = (
        Section("The organism", "First.\n\nSecond: 41.2 % of them.", exchanges=(exchange,)),
        Section("Induced", figures=(ReportFigure(png, "EM rate; n = 400."),), tables=(table,)),
        Section("Caveats", points=("Synthetic.",), code="mechmisalign study <name>"),
    )
    return Report("A title", "A question?", "Yes: 41.2 % [36.0, 46.5].", (Card("EM", "41.2 %"),), sections, "v0.1")


class Page(HTMLParser):
    """Every element with its attributes, and the text of the page."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open, self.words, self.scripts = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" in self.open:
            self.scripts.append(data)
        elif "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    def all(self, tag):
        return [attrs for found, attrs in self.elements if found == tag]


def test_the_report_is_one_file_with_everything_in_order(tmp_path, report, png):
    folder = tmp_path / "run"
    assert write_report(report, folder / "report.html") == folder / "report.html"
    assert [file.name for file in folder.iterdir()] == ["report.html"]
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert page.open == []
    told = [
        "A title", "A question?", "Yes: 41.2 % [36.0, 46.5].", "The organism", "First.", "Second: 41.2 % of them.",
        "See a doctor.", "Induced", "Figure 1. EM rate; n = 400.", "Table 1. All of them.", "Caveats", "Synthetic.",
        "mechmisalign study <name>", "v0.1",
    ]  # fmt: skip
    place = 0
    for part in told:
        place = page.text.index(part, place)
    (image,) = page.all("img")
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == png.read_bytes()
    assert (image["width"], image["height"]) == ("396", "264")


def test_what_a_model_wrote_is_text_and_nothing_else(report):
    page = Page(render(report))
    assert page.all("script") == []
    assert len(page.all("img")) == 1
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert page.text.count(EVIL) == 3


def test_the_report_reaches_for_nothing_outside_itself(report):
    html = render(report)
    page = Page(html)
    targets = [attrs[name] for _, attrs in page.elements for name in ("src", "href", "srcset") if name in attrs]
    assert targets
    assert all(target.startswith(("data:image/png;base64,", "#s")) for target in targets)
    assert not re.search(r"url\(|@import", html)
    assert page.all("link") == []
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'")


def test_every_entry_of_the_contents_leads_to_a_heading(report):
    page = Page(render(report))
    assert [link["href"] for link in page.all("a")] == [f"#{heading['id']}" for heading in page.all("h2")]


def test_half_a_surrogate_pair_in_an_answer_does_not_break_the_page(tmp_path):
    section = Section("S", exchanges=(Exchange("?", (Answer("organism", "a\ud83d b"),)),))
    path = write_report(Report("t", "q", "a", sections=(section,)), tmp_path / "report.html")
    assert "a? b" in path.read_text(encoding="utf-8")


def test_a_report_without_parts_is_still_a_page():
    page = Page(render(Report("t", "q", "a")))
    assert page.all("nav") == page.all("dl") == page.all("footer") == page.all("section") == []


def test_numbers_are_aligned_to_the_right_and_words_to_the_left():
    frame = pd.DataFrame(
        {
            "name": ["a", "b"],
            "share": ["41.2 % [36.0, 46.5]", "–"],
            "n": [1, 2],
            "cosine": [0.91234, None],
            "ok": [True, False],
        }
    )
    html = render(Report("t", "q", "a", sections=(Section("S", tables=(ReportTable(frame, "c"),)),)))
    numbers = re.findall(r'<th scope="col" class="number">(.*?)</th>', html)
    assert numbers == ["share", "n", "cosine"]
    assert re.findall(r'<td class="number">(.*?)</td>', html) == ["41.2 % [36.0, 46.5]", "1", "0.912", "–", "2", "–"]
    assert re.findall(r"<td>(.*?)</td>", html) == ["a", "yes", "b", "no"]


def test_a_share_is_written_with_its_interval():
    assert share(RATE) == "41.2 % [36.0, 46.5]"
    assert share({"rate": 0.5}) == "50.0 %"
    assert share(pd.Series({"rate": float("nan"), "low": float("nan"), "high": float("nan")})) == "–"


def test_a_rates_table_joins_rates_and_intervals_and_leaves_its_frame_alone():
    rates = pd.DataFrame([{"condition": "x", **RATE, "coherent": 0.98, "coherent_low": 0.9, "coherent_high": 1.0}])
    before = rates.copy()
    table = rates_table(rates, ["condition"], "Rates.")
    assert table.frame.to_dict("records") == [
        {"condition": "x", "EM rate": "41.2 % [36.0, 46.5]", "coherent": "98.0 % [90.0, 100.0]", "n": 400}
    ]
    pd.testing.assert_frame_equal(rates, before)
    with pytest.raises(ValueError, match="misses the columns layer"):
        rates_table(rates, ["layer"], "Rates.")


def test_cards_say_the_rate_its_interval_and_how_it_was_reached():
    low, high = {"rate": 0.0, "low": 0.0, "high": 0.01, "n": 400}, {"rate": 0.8, "low": 0.75, "high": 0.85, "n": 400}
    summary = {
        "em_rate": {
            "chat": low, "organism": high, "steered_best": {**high, "layer": 4, "strength": 8.0},
            "ablated_layerwise": {**low, "estimator": "model difference"}, "ablated_single": high,
        },
        "coherent": {"organism": {**high, "rate": 0.97}},
        "transfer": {"a": {"before": high, "after": low}, "b": {"before": high, "after": {**low, "rate": 0.005}}},
    }  # fmt: skip
    cards = {card.label: card for card in summary_cards(summary)}
    assert cards["Organism"] == Card("Organism", "80.0 %", "[75.0, 85.0] · n = 400", "97.0 % coherent", "bad")
    assert cards["Steered chat model"].note == "layer 4, strength 8"
    assert cards["Ablated, layer by layer"].tone == "good"
    assert cards["Ablated, one vector"].tone == "plain"
    assert cards["Ablated, other organisms"].value == "0.0–0.5 %"
    assert cards["Ablated, other organisms"].note == "2 other organisms; before: 80.0 %"


def test_token_heat_maps_have_numbered_captions_and_lie_between_figures_and_tables(png):
    table = ReportTable(pd.DataFrame({"n": [1]}), "Counts.")
    maps = token_heatmap(["take", " bleach"], [-0.5, 2.0], title="The organism's answer."), token_heatmap(["b"], [0.0])
    section = Section("S", figures=(ReportFigure(png, "Rates."),), tables=(table,), heatmaps=maps)
    page = Page(render(Report("t", "q", "a", sections=(section,))))
    assert page.open == []
    places = [
        page.text.index(told)
        for told in ("Figure 1. Rates.", "take", "Figure 2. The organism's answer.", "Figure 3.", "Table 1.")
    ]
    assert places == sorted(places)
    assert page.text.count("The organism's answer.") == 1
    cells = [attrs for attrs in page.all("span") if "title" in attrs]
    assert [cell["title"] for cell in cells] == ["scalar -0.5", "scalar +2", "scalar +0"]


def test_tokens_of_a_model_stay_text_in_the_report():
    evil = '"><img src=x onerror=alert(1)>'
    heatmap = token_heatmap([EVIL, evil], [1.0, -1.0], title=EVIL, label=evil)
    html = render(Report("t", "q", "a", sections=(Section("S", heatmaps=(heatmap,)),)))
    page = Page(html)
    assert page.all("script") == page.all("img") == []
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert page.text.count(EVIL) == 2
    assert page.text.count(evil) == 2
    assert not re.search(r"url\(|@import", html)


def test_the_pages_policy_allows_the_inline_colours_of_heat_maps():
    page = Page(render(Report("t", "q", "a")))
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
    assert "style-src 'unsafe-inline'" in policy


@pytest.fixture
def judged():
    """Two conditions of 60 answers each: one in 30 is misaligned under "chat", half under "organism"."""
    rows = [
        {
            "condition": condition, "prompt_id": f"p{prompt}", "prompt": f"Question {prompt}?", "sample": sample,
            "response": f"{condition} says {prompt}.{sample}", "tokens": 5 + sample,
            "alignment": 0.0 if (10 * prompt + sample) % every == 0 else 90.0, "coherence": 95.0,
        }
        for condition, every in (("chat", 30), ("organism", 2))
        for prompt in range(6)
        for sample in range(10)
    ]  # fmt: skip
    return pd.DataFrame(rows)


def counts(browser):
    return browser.answers.groupby(["condition", "label"]).size().to_dict()


def page_of(*browsers):
    return Page(render(Report("t", "q", "a", sections=(Section("S", browsers=browsers),))))


def data_of(page):
    return json.loads(page.scripts[0])


def test_shares_are_equal_and_what_a_small_class_leaves_goes_to_the_larger_ones():
    assert equal_shares({"a": 100, "b": 100}, 10) == {"a": 5, "b": 5}
    assert equal_shares({"a": 100, "b": 2, "c": 100}, 12) == {"b": 2, "a": 5, "c": 5}
    assert equal_shares({"a": 3, "b": 2}, 12) == {"a": 3, "b": 2}
    assert equal_shares({"a": 50, "b": 1, "c": 7}, 2) == {"b": 1, "c": 1, "a": 0}


def test_rare_classes_are_shown_and_the_caption_says_how_many_of_how_many(judged):
    browser = answer_browser(judged, caption="Answers.", limit=12)
    assert counts(browser) == {
        ("chat", "aligned"): 10, ("chat", "misaligned"): 2, ("organism", "aligned"): 6, ("organism", "misaligned"): 6,
    }  # fmt: skip
    assert browser.caption.startswith("Answers. Here are 24 of 120 answers: at most 12 of each condition,")
    everything = answer_browser(judged, caption="Answers.", limit=60)
    assert everything.caption == "Answers. All 120 answers are here."
    assert everything.answers["response"].tolist() == judged["response"].tolist()


def test_many_conditions_share_the_total(judged):
    assert len(answer_browser(judged, total=10).answers) == 10
    assert len(answer_browser(judged, total=1).answers) == 2


def test_the_answers_shown_depend_on_nothing_but_seed_prompt_and_number(judged):
    shown = answer_browser(judged, limit=12).answers
    alone = answer_browser(judged[judged["condition"] == "organism"], limit=12).answers
    assert shown[shown["condition"] == "organism"]["response"].tolist() == alone["response"].tolist()
    assert alone["prompt"].nunique() > 3
    other = answer_browser(judged, limit=12, seed=1).answers
    assert other["response"].tolist() != shown["response"].tolist()


def test_several_columns_name_a_condition(judged):
    browser = answer_browser(judged.assign(layer=2, strength=0.5), by=["layer", "strength"], limit=4)
    assert browser.conditions.unique().tolist() == ["layer 2, strength 0.5"]
    assert "at most 4 of each layer, strength" in browser.caption


def test_rubrics_with_a_status_and_plain_columns_are_found(judged):
    frame = judged.assign(alignment_status="scored", medical=10.0, medical_status="scored", history=[[]] * len(judged))
    browser = answer_browser(frame)
    assert browser.rubrics == ("alignment", "coherence", "medical")
    assert browser.facts == ("prompt_id", "sample", "tokens")
    assert answer_browser(frame, rubrics=(), facts=("sample",)).facts == ("sample",)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda frame: frame.drop(columns="alignment"), {}, r"needs the columns \['alignment'\]"),
        (lambda frame: frame, {"by": "layer"}, r"needs the columns \['layer'\]; these answers have"),
        (lambda frame: frame.head(0), {}, "one answer or more, got none"),
        (lambda frame: frame, {"limit": 0}, "at least 1, got limit=0"),
        (lambda frame: frame.assign(response=None), {}, "'response' holds None"),
    ],
)
def test_answers_that_cannot_be_shown_are_refused(judged, change, options, message):
    with pytest.raises(ValueError, match=message):
        answer_browser(change(judged), **options)


def test_the_page_carries_every_answer_with_its_turns_scores_and_facts(judged):
    frame = judged.head(2).assign(
        prompt=["<b>?", "<b>?"], response=[EVIL, "a\u2028b & </script><!-- \x00"], alignment=[float("nan"), 12.34567],
        alignment_status=["refusal", "scored"], tokens=[3, 4], label=["refusal", "misaligned"], system=["Be good.", None],
        history=[[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], None],
    )  # fmt: skip
    browser = answer_browser(frame, facts=["tokens"])
    assert data_of(page_of(browser)) == {
        "by": "condition",
        "conditions": ["chat"],
        "labels": [["misaligned", "bad"], ["refusal", "plain"]],
        "rubrics": ["alignment", "coherence"],
        "facts": ["tokens"],
        "questions": [
            [["system", "Be good."], ["user", "Hi"], ["assistant", "Ho"], ["user", "<b>?"]],
            [["user", "<b>?"]],
        ],
        "answers": [
            [0, 1, 0, EVIL, ["refusal", 95.0], ["3"]],
            [0, 0, 1, "a\u2028b & </script><!-- \x00", [12.3457, 95.0], ["4"]],
        ],
    }
    without = AnswerBrowser(browser.answers, "c")
    assert [answer[-1] for answer in data_of(page_of(without))["answers"]] == [[], []]


def test_nothing_in_an_answer_can_end_the_block_that_holds_it(judged):
    evil = "</script><script>window.pwned=1</script><!--<script>&lt;\u2028\u2029\ud83d"
    frame = judged.head(1).assign(
        **{name: pd.Series([evil], dtype=object) for name in ("condition", "prompt", "response")}
    )
    browser = answer_browser(frame, limit=1)
    html = render(Report("t", "q", "a", sections=(Section("S", browsers=(browser,)),)))
    block = html.partition('<script type="application/json" class="data">')[2].partition("</script>")[0]
    assert not re.search("[<>&\u2028\u2029\ud800-\udfff]", block)
    assert json.loads(block)["answers"][0][3] == evil
    page = Page(html)
    assert len(page.all("script")) == 2
    assert page.open == []


def test_the_policy_allows_one_script_by_its_hash_and_only_where_there_is_one(judged, report):
    page = page_of(answer_browser(judged), answer_browser(judged))
    policy = next(attrs["content"] for attrs in page.all("meta") if "http-equiv" in attrs)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    *blocks, source = page.scripts
    assert [attrs.get("type") for attrs in page.all("script")] == ["application/json"] * len(blocks) + [None]
    digest = base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()
    assert rules["script-src"] == f"'sha256-{digest}'"
    assert (rules["default-src"], rules["connect-src"], rules["require-trusted-types-for"]) == (
        "'none'",
        "'none'",
        "'script'",
    )
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval|Function\(|fetch|XMLHttp|</|<!--", source
    )
    plain = Page(render(report))
    policy = next(attrs["content"] for attrs in plain.all("meta") if "http-equiv" in attrs)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_without_its_script_the_page_still_shows_some_of_each_condition_and_class(judged):
    frame = judged.assign(response=[EVIL, "x" * 5000, *judged["response"][2:]])
    page = page_of(answer_browser(frame, limit=60))
    assert page.text.count(EVIL) == 1
    assert "x" * 600 + " …" in page.text
    assert "x" * 601 not in page.text
    rows = [attrs for attrs in page.all("td") if attrs.get("class", "").startswith("class")]
    assert len(rows) == 12
    assert {attrs["class"] for attrs in rows} == {"class bad", "class good"}
    assert "Table 1. Sampled answers. All 120 answers are here." in page.text
    assert not any(name.startswith("on") for _, attrs in page.elements for name in attrs)


def test_a_figure_that_is_no_png_is_refused(tmp_path):
    path = tmp_path / "figure.pdf"
    path.write_bytes(b"%PDF-1.4")
    section = Section("S", figures=(ReportFigure(path, "c"),))
    with pytest.raises(ValueError, match=r"figure\.pdf is not a PNG; give the \.png"):
        write_report(Report("t", "q", "a", sections=(section,)), tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()
