"""The small pieces of HTML that the report is put together from. Text from outside is escaped here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from rlsf_ray.records import Json


def section(name: str, title: str, body: str) -> str:
    """One titled box of the page."""
    return f'<section id="{name}"><h2>{escape(title)}</h2>{body}</section>'


def missing(text: str) -> str:
    """What stands in a section whose data is not there."""
    return f'<p class="missing">{escape(text)}</p>'


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table; n/a where it is absent."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def signed(value: float, digits: int = 3) -> str:
    """A number with its sign, always; a true minus."""
    text = f"{value:+.{digits}f}"
    return text.replace("-", "&minus;")


def verdict(before: float | None, after: float | None, direction: int) -> str:
    """The change with its sign, and better or worse in word and colour. `direction` -1: less is better."""
    if before is None or after is None:
        return "n/a"
    digits = 3 if direction else 1
    change = after - before
    text = signed(change, digits)
    if direction == 0 or abs(change) < 0.5 * 10**-digits:
        return f"<span>{text}</span>"
    word = "better" if change * direction > 0 else "worse"
    return f'<span class="{word}">{text} {word}</span>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, wide_last: bool = False) -> str:
    """Rows of finished HTML cells. All columns but the first hold numbers; `wide_last`: the last one holds bars."""

    def kind(column: int) -> str:
        if wide_last and column == len(head) - 1:
            return ' style="width:55%"'
        return ' class="num"' if column else ""

    top = "".join(f"<th{kind(i)}>{escape(name)}</th>" for i, name in enumerate(head))
    body = "".join(
        "<tr>" + "".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(rows: Mapping[str, Any]) -> str:
    """Names with their values."""
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>" for name, value in rows.items())
    return f"<dl>{items}</dl>"


def figure(title: str, source: str, alt: str) -> str:
    """A titled picture from a data URI."""
    return f'<figure><h3>{escape(title)}</h3><img src="{source}" alt="{escape(alt)}"></figure>'


def swaps(stages: Sequence[Json]) -> str:
    """What each version's swaps have proved, from the stage rows of a run."""
    found = [row for row in stages if row["stage"] == "swap"]
    if not found:
        return missing("No generator had to take a version in and prove it (a run of the loop does not record this).")
    rows = []
    for version in sorted({row["version"] for row in found}):
        of = [row for row in found if row["version"] == version]
        counts = Counter(row["verdict"] for row in of)
        verdicts = ", ".join(f"{count} {escape(verdict)}" for verdict, count in counts.items())
        worst = max(of, key=lambda row: abs(row["share"] - 1))
        slowest = max(row["end"] - row["start"] for row in of)
        values = (number(worst[name]) for name in ("share", "expected_move", "gap"))
        again = str(sum(row["loads"] - 1 for row in of))
        rows.append((str(version), verdicts, *values, f"{slowest:.1f}", again))
    head = ("version", "generators", "share of the move", "trainer's move", "gap", "seconds", "loaded again")
    note = (
        "Share: how much of the trainer's move in log-probs (nats a token) the generator has made, 1 if it holds the"
        " new version; gap: its distance to the trainer after the swap; both of the generator that is furthest from 1."
        " Unproven: the move was too small to be seen above the engine's rounding; checksum and loaded id agreed."
    )
    return table(head, rows) + f'<p class="note">{note}</p>'


def examples(before: Json | None, after: Json | None, count: int) -> str:
    """The first sample of `count` questions, spread evenly over the probe set whatever their result."""
    sides = [(name, {q["id"]: q for q in e["questions"]}) for name, e in (("before", before), ("after", after)) if e]
    ids = [name for name in sides[0][1] if all(name in questions for _, questions in sides)]
    count = min(count, len(ids))
    if not count:
        return missing("The evaluations keep no texts.")
    chosen = [ids[i * len(ids) // count] for i in range(count)]
    note = f'<p class="note">The first sample for {count} questions, spread evenly over the probe set.</p>'
    return note + "".join(_example([(name, questions[key]) for name, questions in sides]) for key in chosen)


def _example(sides: Sequence[tuple[str, Json]]) -> str:
    question = sides[0][1]
    columns = "".join(_sample(name, q["samples"][0]) for name, q in sides if q["samples"])
    return (
        f'<div class="example"><p class="question"><b>{escape(question["question"].strip())}</b>'
        f' <span class="note">gold: {escape(str(question["gold"]))}</span></p><div class="grid">{columns}</div></div>'
    )


def _sample(name: str, sample: Json) -> str:
    if sample["answer"] is None:
        result = "no answer found" if sample["finished"] else "cut off at the token limit"
    else:
        result = "right" if sample["correct"] else "not checked" if sample.get("unchecked") else "wrong"
    colour = "better" if sample["correct"] else "worse"
    confidence = ", ".join(
        f"{label} {number(sample.get(key), 2)}"
        for key, label in (
            ("answer_prob", "answer probability"),
            ("calibrated", "calibrated"),
            ("agreement", "agreement"),
        )
        if sample.get(key) is not None
    )
    text = marked(sample["text"], sample["answer"], sample.get("answer_chars"))
    return (
        f'<div><h3>{name}: <span class="{colour}">{result}</span></h3>'
        f'<pre>{text}</pre><span class="small">{confidence}</span></div>'
    )


def marked(text: str, answer: str | None, chars: Sequence[int] | None = None) -> str:
    """The escaped text, less white space around it, with the answer marked: at `chars`, else at its last place."""
    start = text.rfind(answer) if answer else -1
    start, end = chars or (start, start + len(answer or ""))
    if not answer or start < 0:
        return escape(text.strip())
    return f"{escape(text[:start])}<mark>{escape(text[start:end])}</mark>{escape(text[end:])}".strip()
