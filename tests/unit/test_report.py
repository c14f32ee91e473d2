"""The report page: everything is on it, nothing on it comes from elsewhere, and missing data is named."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from report_data import HOSTILE, bare_run, make_run, talking_run

from rlsf_ray.report import read_run, render, write_report
from rlsf_ray.report_parts import marked, verdict
from rlsf_ray.report_signs import judges, thought
from rlsf_ray.timeline import chrome_trace, make_timeline, merge

SECTIONS = [
    "results",
    "reliability",
    "versions",
    "others",
    "guard",
    "thought",
    "turns",
    "judges",
    "mix",
    "training",
    "time",
    "swaps",
    "accounting",
    "examples",
]
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that tags nest; keeps tags, addresses and the text of each section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.text: dict[str, str] = {}
        self.section = "header"
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "data")]
        if tag == "section":
            self.section = dict(attrs)["id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text[self.section] = self.text.get(self.section, "") + data


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    return Path(write_report(make_run(str(tmp_path_factory.mktemp("run"))))).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_all_sections_are_there_in_order_with_pictures(page):
    assert list(page.text)[1:] == SECTIONS
    # reliability diagrams, by version, signs of collapse, along alpha, training
    assert page.tags.count("img") == 2 + 2 + 5 + 4 + 4


def test_nothing_comes_from_elsewhere_and_nothing_runs(html, page):
    assert page.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert "script" not in page.tags
    assert not re.search(r"https?://|@import|url\(", html)


def test_the_header_says_what_ran_and_how_it_ended(page):
    header = page.text["header"]
    for text in ("rlsf", "done", "smollm2", "2025-10-09 08:53 UTC", "7 min 11 s", "4.3 GB"):
        assert text in header
    assert "rose from 0.137 to 0.326, 95\xa0% interval of the difference +0.120 to +0.260" in header


def test_before_after_marks_better_and_worse_by_sign_word_and_colour(html, page):
    # sampled accuracy .326 - .137 = +.189 is better; ECE .326 - .235 = +.091 is worse, for less is better there
    assert '<span class="better">+0.189 better</span>' in html
    assert '<span class="worse">+0.091 worse</span>' in html
    assert '<span class="better">&minus;0.040 better</span>' in html  # cut off: .08 - .12
    assert "95 %: +0.120 to +0.260" in page.text["results"]
    assert "20 questions, 4 samples each." in page.text["results"]
    assert "AUROC, answer prob.0.710n/an/a" in page.text["results"]
    assert "AUROC, calibrated" not in page.text["results"], "neither side has it"


def test_versions_measured_on_fewer_questions_are_no_before_or_after(page):
    assert "10 of the 20 questions" in page.text["versions"]


def test_every_statistic_of_every_confidence_stands_before_and_after(page):
    assert "Answer probability, before0.2350.240" in page.text["reliability"]
    assert "Answer probability, after0.3260.240" in page.text["reliability"]
    assert "Disparity" not in page.text["reliability"], "this run did not measure it"


def test_a_run_stands_beside_others(tmp_path):
    ours, control = (make_run(str(tmp_path / name)) for name in ("ours", "control"))
    assert "--beside OTHER" in Page(render(read_run(ours))).text["others"]
    worse = control.read_json("eval/version-0002.json")
    for question in worse["questions"]:
        for sample in question["samples"]:
            sample["correct"] = False
    control.write_json("eval/version-0002.json", worse)
    text = Page(render(read_run(ours), [read_run(control)])).text["others"]
    # of our 20 questions 1, 7, 10, 13, 16, 19 are right in all four samples (4 was cut off), none of the other's
    assert "rlsf, seed 30.3600.3260.5120.326n/a+0.300" in text


def test_the_guard_says_what_it_saw_and_where_the_run_went_back_to(page):
    text = page.text["guard"]
    assert "1stoplength is 99, base model 40, expected at most 64" in text
    assert "The run went back: version 2 is the base model again" in text


def test_the_way_from_the_base_model_to_the_adapter_is_drawn(page):
    assert "Version 2 on 20 questions" in page.text["mix"]


def test_accounting_adds_up_and_names_reasons(page):
    assert "128 admitted = 90 trained + 37 filtered + 1 failed" in page.text["accounting"]
    assert "one_answer20" in page.text["accounting"]
    assert "do not add up" not in page.text["accounting"]


def test_a_gap_in_the_accounting_is_said(tmp_path):
    store = make_run(str(tmp_path))
    summary = store.read_json("summary.json")
    summary["accounting"]["trained"] = 80  # 128 - 80 - 37 - 1 = 10
    store.write_json("summary.json", summary)
    assert "10 prompts have no end" in render(read_run(store))


def test_idle_shares_stand_beside_the_timeline(page):
    # Trainer: 2 x 80 s of 320 s, so idle 50 %; its waiting does not count as work.
    assert "trainer12 min 40 s50 %0" in page.text["time"]
    # Scorer: 2 x 5 x 3 s = 30 s of 320 s, so idle 90.6 %; 10 x 900 tokens.
    assert "scorer130 s91 %9,000" in page.text["time"]


def test_ten_examples_are_escaped_with_the_answer_marked(html, page):
    assert html.count('<div class="example">') == 10
    assert HOSTILE in page.text["examples"]
    assert "<script" not in html
    assert "cut off at the token limit" in page.text["examples"]
    assert "<mark>14</mark>" in html
    assert "gold: 14" in page.text["examples"]


def test_a_run_that_has_only_begun_says_what_is_missing(tmp_path):
    page = Page(Path(write_report(bare_run(str(tmp_path)))).read_text(encoding="utf-8"))
    assert list(page.text)[1:] == SECTIONS
    assert "img" not in page.tags
    assert "no summary yet" in page.text["header"]
    assert "no probe set" in page.text["results"]
    assert "No training step" in page.text["training"]
    assert "No stage was timed" in page.text["time"]


def test_a_drained_run_shows_the_before_without_an_after(tmp_path):
    full, part = make_run(str(tmp_path / "full")), bare_run(str(tmp_path / "part"))
    part.write_json("eval/version-0000.json", full.read_json("eval/version-0000.json"))
    part.append_metrics("train", [{"time": 0.0, "step": 1, "round": 0, "num_examples": 8, "loss": 0.7, "margin": None}])
    page = Page(render(read_run(part)))
    assert "no measurement both before and after" in page.text["header"]
    assert "A version after training was not measured" in page.text["results"]
    assert "0.137" in page.text["results"]
    assert "Steps: 1; pairs over all passes: 8" in page.text["training"]
    assert page.tags.count("img") == 9


def test_a_step_that_was_run_again_after_a_resume_counts_once(tmp_path):
    store = make_run(str(tmp_path))
    store.append_metrics("train", [{"time": 0.0, "step": 60, "round": 1, "num_examples": 2, "loss": 0.1}])
    run = read_run(store)
    assert len(run.train) == 60
    assert run.train[-1]["num_examples"] == 2


def test_the_report_of_a_run_on_an_object_store():
    store = make_run("memory://report/run")
    assert write_report(store) == "memory://report/run/report.html"
    assert store.storage.read("report.html").startswith(b"<!DOCTYPE html>")


@pytest.mark.parametrize(
    ("text", "answer", "expected"),
    [
        ("3 or 3", "3", "3 or <mark>3</mark>"),  # the last one
        ("a<b", "<", "a<mark>&lt;</mark>b"),
        ("none", None, "none"),
        ("gone", "7", "gone"),
    ],
)
def test_the_last_place_of_the_answer_is_marked(text, answer, expected):
    assert marked(text, answer) == expected


def test_the_answer_is_marked_where_it_was_found_and_not_where_its_text_stands_last():
    # "  x = 3, so it is 3." is 20 characters; the first 3 is character 6. The space around the text is left out.
    assert marked("  x = 3, so it is 3.\n", "3", [6, 7]) == "x = <mark>3</mark>, so it is 3."


def test_a_change_too_small_to_print_is_neither_better_nor_worse():
    assert verdict(0.5, 0.5004, 1) == "<span>+0.000</span>"
    assert verdict(40.0, 42.5, 0) == "<span>+2.5</span>"
    assert verdict(None, 0.5, 1) == "n/a"


def stage(actor: str, start: float, end: float, role: str = "generator", name: str = "generate") -> dict:
    return {"role": role, "actor": actor, "stage": name, "start": start, "end": end, "tokens": 10}


def test_overlapping_spans_count_once():
    assert merge([(3.0, 4.0), (0.0, 2.0), (1.0, 2.5)]) == ((0.0, 2.5), (3.0, 4.0))
    assert merge([(0.0, 1.0), (1.5, 2.0)], gap_s=0.5) == ((0.0, 2.0),)


def test_idle_is_shared_over_the_actors_of_a_role():
    # Length 10 s. Generators: 10 s + 5 s of 20 s, idle .25. Trainer: 4 s of 10 s, idle .6.
    stages = [
        stage("g0", 5, 15),
        stage("g1", 5, 10),
        stage("t0", 11, 15, "trainer"),
        stage("t0", 5, 11, "trainer", "wait"),
    ]
    line = make_timeline(stages)
    assert line.length_s == 10
    assert [(s.role, s.num_actors, s.busy_s, s.tokens) for s in line.shares()] == [
        ("generator", 2, 15, 20),
        ("trainer", 1, 4, 10),
    ]
    assert [s.idle for s in line.shares()] == pytest.approx([0.25, 0.6])


def test_a_pause_between_two_sessions_is_cut_out():
    # Sessions [0, 10] and [1000, 1020]: 30 s of run, 990 s of pause.
    line = make_timeline([stage("g0", 0, 10), stage("g0", 1005, 1020), stage("t0", 1000, 1010, "trainer")])
    assert (line.length_s, line.pause_s) == (30, 990)
    assert line.lanes[0].spans == ((0, 10), (15, 30))
    assert line.lanes[1].spans == ((10, 20),)


def test_the_trace_shows_every_piece_of_work_on_a_track_of_its_actor():
    """In microseconds; what an actor does at the same time stands on a second track, which is used again."""
    stages = [stage("g0", 5, 8), stage("g0", 6, 9), stage("g0", 8.5, 9.5), stage("t0", 9, 10, "trainer", "train")]
    events = chrome_trace(stages)["traceEvents"]
    work = [(e["name"], e["pid"], e["tid"], e["ts"], e["dur"], e["args"]) for e in events if e["ph"] == "X"]
    assert work == [
        ("generate", 0, 0, 0, 3e6, {"stage": "generate", "tokens": 10}),
        ("generate", 0, 1, 1e6, 3e6, {"stage": "generate", "tokens": 10}),
        ("generate", 0, 0, 3.5e6, 1e6, {"stage": "generate", "tokens": 10}),
        ("train", 1, 2, 4e6, 1e6, {"stage": "train", "tokens": 10}),
    ]
    names = [(e["name"], e["pid"], e.get("tid"), e["args"]["name"]) for e in events if e["ph"] == "M"]
    assert names == [
        ("process_name", 0, None, "generator"),
        ("process_name", 1, None, "trainer"),
        ("thread_name", 0, 0, "g0"),
        ("thread_name", 0, 1, "g0 (2)"),
        ("thread_name", 1, 2, "t0"),
    ]


def test_the_trace_lies_beside_the_page(tmp_path):
    write_report(make_run(str(tmp_path)))
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) > 20


def test_the_way_it_reasons_and_two_judges_are_shown_where_they_are_known():
    metrics = {
        "anyhow_accuracy": 0.4,
        "sampled_accuracy": 0.3,
        "surprisal": 0.5,
        "transitions": 0.01,
        "mean_length": 30,
    }
    shown = Page(thought([{"version": v, "metrics": metrics} for v in (0, 1)]))
    assert shown.tags.count("img") == 4
    rows = judges([{"round": 1, "groups": 12, "rank_correlation": 0.75, "gap": -0.5}])
    assert ">12</td>" in rows
    assert "0.750" in rows
    assert "One judge" in judges([])
    assert "Not measured" in thought([{"version": 0, "metrics": {"sampled_accuracy": 0.3}}])


def test_what_a_token_counts_stands_on_it(tmp_path):
    """A turn of which only a part counts is cut where the sides of the pairs part; one of an older run is whole."""
    page = write_and_read(talking_run(str(tmp_path / "new")))
    assert (
        '<span class="idle" title="1 token, 0 each">No</span><span class="up" title="1 token, +2.00 each"> never'
        in page
    )
    assert (
        '<span class="idle" title="1 token, 0 each">No</span><span class="down" title="1 token, &minus;1.00 each"> way'
        in page
    )
    assert '<div class="turn attempt "><span class="small">attempt: 3 tokens, 0 each; ' in page
    assert HOSTILE not in page
    assert page.count('<div class="turn ') == 9


def test_a_group_that_was_left_out_for_surer_ones_is_not_called_learned_from(tmp_path):
    store = talking_run(str(tmp_path))
    store.write_json("state.json", {"ledger": {"0": [["filtered", "less_sure"]]}})
    page = write_and_read(store)
    assert "0 of 1 prompts are learned from, 1 shown" in page
    assert '<span class="note">less_sure</span>' in page
    assert 'class="turn retry up"' not in page


def write_and_read(store) -> str:
    return Path(write_report(store)).read_text()
