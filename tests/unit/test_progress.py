"""A run on the terminal: lines at a measured pace, a panel that fits, a table that fits."""

import io

from rich.console import Console

from rlsf_ray.progress import Progress, line, panel, print_before_after, print_metrics
from rlsf_ray.wording import duration

STATUS = {
    "run": "demo",
    "state": "running",
    "round": 0,
    "rounds": 2,
    "version": 1,
    "prompts_done": 112,
    "prompts_total": 200,
    "traces": 896,
    "traces_per_s": 8.31,
    "pairs": 240,
    "steps": 60,
    "eta_s": 190.0,
    "accounting": {
        "admitted": 112,
        "trained": 60,
        "filtered": 40,
        "failed": 0,
        "in_flight": 12,
        "reasons": {"tie": 40},
    },
    "message": "",
}
BEFORE = {
    "greedy_accuracy": 0.2,
    "sampled_accuracy": 0.137,
    "sampled_accuracy_low": 0.09,
    "sampled_accuracy_high": 0.19,
}
AFTER = {
    "greedy_accuracy": 0.35,
    "sampled_accuracy": 0.326,
    "sampled_accuracy_low": 0.24,
    "sampled_accuracy_high": 0.42,
}


def written(width: int = 80, terminal: bool = False) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, width=width, force_terminal=terminal, color_system=None), out


def test_plain_lines_come_every_ten_seconds_and_at_a_change_of_state() -> None:
    """Calls at 0, 4, 9.9, 10, 12 (new state), 21.9, 22 s: lines at 0, 10, 12 and 22."""
    now = [0.0]
    console, out = written()
    with Progress(console, clock=lambda: now[0]) as progress:
        for second, state in [(0, "a"), (4, "a"), (9.9, "a"), (10, "a"), (12, "b"), (21.9, "b"), (22, "b")]:
            now[0] = second
            progress(STATUS | {"state": state, "steps": second})
    lines = out.getvalue().splitlines()
    assert [text.split("steps ")[1].split(" |")[0] for text in lines] == ["0", "10", "12", "22"]


def test_the_line_holds_all_numbers_and_leaves_out_what_is_unknown() -> None:
    assert line(STATUS) == (
        "running | round 1/2 | prompts 112/200 | traces 896 (8.3/s) | pairs 240 | steps 60 | version 1 | ETA 3 min 10 s"
    )
    assert line({"state": "starting", "eta_s": None}) == "starting | traces 0 (0.0/s) | pairs 0 | steps 0 | version 0"


def test_the_newest_version_in_the_generators_is_shown_with_what_they_proved() -> None:
    swaps = [("g0", 2, "proved"), ("g1", 2, "unproven"), ("g2", 1, "proved"), ("g3", 2, "proved")]
    status = STATUS | {"swaps": {name: {"version": v, "verdict": verdict} for name, v, verdict in swaps}}
    assert "| version 2 in generators: 2 proved, 1 unproven |" in line(status)
    console, out = written()
    console.print(panel(status))
    assert "version 2 in generators: 2 proved, 1 unproven" in out.getvalue()


def test_the_panel_is_compact_and_counts_rounds_from_one() -> None:
    console, out = written()
    console.print(panel(STATUS))
    lines = out.getvalue().splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) == 80
    assert "round 1/2   version 1   ETA 3 min 10 s" in lines[2]
    assert "admitted 112   trained 60   filtered 40   failed 0   in flight 12" in lines[4]


def test_a_terminal_gets_the_panel_and_no_lines() -> None:
    console, out = written(terminal=True)
    with Progress(console) as progress:
        progress(STATUS)
    assert "demo: running" in out.getvalue()
    assert "running | round" not in out.getvalue()


def test_the_table_shows_before_after_change_and_interval_in_80_columns() -> None:
    console, out = written()
    print_before_after(
        console, {"before": BEFORE, "after": AFTER, "difference": {"sampled_accuracy": [0.189, 0.11, 0.27]}}
    )
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    assert "0.137 [0.09, 0.19]" in text
    assert "0.326 [0.24, 0.42]" in text
    assert "+0.189" in text  # 0.326 - 0.137
    assert "+0.150" in text  # 0.35 - 0.2
    assert "sampled accuracy, same questions: +0.189, 95 % interval [+0.110, +0.270]" in text


def test_an_absent_or_undefined_metric_is_a_dash() -> None:
    console, out = written()
    print_before_after(
        console, {"before": BEFORE | {"auroc_calibrated": 0.7}, "after": AFTER | {"auroc_calibrated": float("nan")}}
    )
    (row,) = [text for text in out.getvalue().splitlines() if "AUROC, calibrated" in text]
    assert [cell.strip() for cell in row.split("│")[2:5]] == ["0.700", "-", "-"]
    assert "CoT-decoding" not in out.getvalue(), "it was not measured"


def test_a_run_without_probe_set_says_so() -> None:
    console, out = written()
    print_before_after(console, {"before": None, "after": None})
    assert "no before/after table" in out.getvalue()


def test_one_version_alone_can_be_shown() -> None:
    console, out = written()
    print_metrics(
        console, "version 0", BEFORE | {"ece_disparity": 0.25, "brier_disparity": 0.125, "aurc_disparity": 0.75}
    )
    assert "0.137 [0.09, 0.19]" in out.getvalue()
    last = out.getvalue().rpartition("Of the confidence")[2]
    rows = [" ".join(text.split()) for text in last.splitlines()]
    assert {"ECE 0.250", "Brier 0.125", "AUROC -", "risk-coverage 0.750"} <= set(rows)


def test_durations_name_their_units() -> None:
    assert [duration(s) for s in (0, 9.6, 75, 3675)] == ["0 s", "10 s", "1 min 15 s", "1 h 01 min"]


def test_generators_are_told_by_state_and_those_in_trouble_by_name() -> None:
    fleet = {"generator-0": "healthy", "generator-1": "suspect", "generator-2": "healthy", "generator-3": "restarting"}
    told = "generators: 2 healthy, 1 suspect (generator-1), 1 restarting (generator-3)"
    assert told in line(STATUS | {"fleet": fleet})
    assert "generators" not in line(STATUS)


def test_idle_roles_the_cost_of_a_pair_and_staleness_are_told() -> None:
    swaps = {"generator-0": {"version": 2, "verdict": "proved"}}
    spent = {"idle": {"generator": 0.123, "trainer": 0.5}, "device_s_per_example": 3.24, "swaps": swaps, "staleness": 1}
    told = line(STATUS | spent)
    assert "idle: generator 12%, trainer 50% | 3.2 device-seconds a pair" in told
    assert "version 2 in generators: 1 proved; staleness 1" in told
    learns_from_traces = {name: value for name, value in STATUS.items() if name != "pairs"} | {"credited traces": 7}
    assert "3.2 device-seconds a credited trace" in line(learns_from_traces | spent)
