"""A made-up run directory, shaped like a real one, for the tests of the report."""

import numpy as np

from rlsf_ray.config import RunConfig
from rlsf_ray.run_store import RunStore

START = 1_760_000_000.0  # 2025-10-09 08:53 UTC
HOSTILE = "<script>alert('x')</script> & so"
METRICS = {
    0: {"greedy_accuracy": 0.16, "sampled_accuracy": 0.137, "majority_accuracy": 0.233, "ece_answer_prob": 0.235},
    1: {"greedy_accuracy": 0.28, "sampled_accuracy": 0.241, "majority_accuracy": 0.419, "ece_answer_prob": 0.301},
    2: {"greedy_accuracy": 0.36, "sampled_accuracy": 0.326, "majority_accuracy": 0.512, "ece_answer_prob": 0.326},
}

VITALS = {"agreement": 0.2, "answer_prob": 0.6, "commonest": 0.1, "distinct": 4.0, "surprisal": 0.5, "length": 40.0}
VITALS |= {"repetition": 0.1, "parsed": 0.9, "votes": {}}
REASON = "length is 99, base model 40, expected at most 64"


def make_run(root: str, *, num_questions: int = 20) -> RunStore:
    """A finished run of two rounds with three evaluated versions."""
    store = bare_run(root)
    for version, questions in ((0, num_questions), (1, num_questions // 2), (2, num_questions)):
        store.write_json(f"eval/version-{version:04d}.json", evaluation(version, questions))
    store.append_metrics("train", train_rows())
    store.append_metrics("stages", stage_rows())
    points = [{"alpha": a, "metrics": METRICS[2], "vitals": VITALS} for a in (0, 0.5, 1)]
    store.write_json("mix.json", {"version": 2, "num_questions": num_questions, "points": points})
    store.write_json("summary.json", summary())
    return store


def bare_run(root: str) -> RunStore:
    """A run that has only begun."""
    source = {"kind": "reasoning_gym", "name": "products", "count": 4}
    return RunStore.create_or_resume(root, RunConfig.model_validate({"seed": 3, "data": {"train": [source]}}))


def talking_run(root: str) -> RunStore:
    """A run of several turns: two pairs of one group, whose sides share the attempt and the verdict's first token."""
    source = {"kind": "file", "path": "sums.jsonl", "check": "check"}
    settings = {"data": {"train": [source]}, "signal": "passed", "rollout": {"name": "verify_revise"}}
    store = RunStore.create_or_resume(root, RunConfig.model_validate(settings))
    words = ["It", " is", " 5", "No", " way", "It", " is", " 7"]
    rows = []
    for k, last in enumerate((" 7", " 8", " 9")):
        turns, text = [], [*words[:4], " way" if k else " never" * 30, *words[5:7], last]
        for role, (begin, end) in (("attempt", (0, 3)), ("verdict", (4, 6)), ("retry", (7, 10))):
            at = begin - (begin > 3) - (begin > 6)
            said = text[at : at + end - begin]
            turns.append({"role": role, "tokens": [begin, end], "text": "".join(said), "said": HOSTILE if at else ""})
            turns[-1]["passed"] = None if role == "verdict" else float(role == "retry" and not k)
        ends = [int(n) for turn in ((2, 5, 7), (0,), (2, 2 + len(text[4])), (0,), (2, 5, 7)) for n in turn]
        row = {"group_id": "g", "prompt_id": HOSTILE, "trace_id": str(k), "index": k, "turns": turns, "char_ends": ends}
        rows.append(
            row | {"sequence": 0, "score": float(not k), "token_ids": [1, 2, 3, 9, 4, 5 + (k > 0), 9, 1, 2, 7 + k]}
        )
    store.write_table("traces", 0, 0, rows)
    pairs = [{"group_id": "g", "chosen_trace_id": "0", "rejected_trace_id": str(k), "weight": 1.0} for k in (1, 2)]
    store.write_table("pairs", 0, 0, pairs)
    return store


def evaluation(version: int, num_questions: int) -> dict:
    rng = np.random.default_rng(version)
    metrics = dict(METRICS[version])
    metrics["sampled_accuracy_low"] = metrics["sampled_accuracy"] - 0.06
    metrics["sampled_accuracy_high"] = metrics["sampled_accuracy"] + 0.07
    metrics |= {"ece_agreement": 0.073 + 0.03 * version, "brier_answer_prob": 0.228, "brier_agreement": 0.088}
    metrics |= {
        "ece_mass_answer_prob": 0.24,
        "auroc_answer_prob": 0.71 if version == 0 else None,
        "parsed": 0.9,
        "cut_off": 0.12 - 0.02 * version,
    }
    metrics["mean_length"] = 41.25 + version
    bins = [
        [None, None, 0] if i == 1 else [0.05 + 0.1 * i, 0.04 + (0.05 + 0.01 * version) * i, int(rng.integers(1, 90))]
        for i in range(10)
    ]
    return {
        "version": version,
        "num_questions": num_questions,
        "num_samples": 4,
        "metrics": metrics,
        "reliability": {"answer_prob": bins, "agreement": [*bins[:7], *[[None, None, 0]] * 2, [0.95, 0.7, 12]]},
        "calibration": None,
        "vitals": VITALS | {"length": 40.0 - version},
        "questions": [question(i, version) for i in range(num_questions)],
    }


def question(index: int, version: int) -> dict:
    product, right = 7 * (index + 2), (index + version) % 3 == 0
    answer = str(product if right else product + 3)
    text = f"To multiply 7 by {index + 2}, I add 7 that many times. So the answer is {answer}."
    sample = {"text": text, "answer": answer, "correct": right, "answer_prob": 0.52, "agreement": 1 / 3}
    sample |= {"length": 31, "finished": True, "label": 0, "disparity": 0.5}
    sample |= {"anyhow": right, "transitions": 0.0, "surprisal": 0.4}
    if index == 4:
        sample |= {
            "text": "First " * 60,
            "answer": None,
            "correct": False,
            "finished": False,
            "answer_prob": 0.0,
            "label": -1,
        }
    if index == 2:
        sample["text"] = f"{HOSTILE} {answer}"
    name = f"What is 7 times {index + 2}? Show your reasoning in one or two short sentences."
    base = {"id": f"q{index}", "question": name, "gold": str(product), "task": "products"}
    return {**base, "samples": [sample] * 4, "greedy": sample}


def train_rows() -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, 61):
        progress = step / 60
        row = {"time": START + 90 + 4 * step, "round": int(step > 30), "step": step, "pass": (step - 1) % 30 // 10}
        row |= {"num_examples": 8, "loss": 0.69 - 0.3 * progress + 0.06 * rng.normal()}
        row |= {"margin": 1.2 * progress + 0.1 * rng.normal(), "accuracy": min(1.0, 0.5 + 0.4 * progress)}
        row |= {"logprob_gap": 0.055 + 0.004 * ((step - 1) % 30)}
        rows.append({**row, "nll": 0.4, "grad_norm": 1.1, "learning_rate": 5e-5})
    return rows


def stage_rows() -> list[dict]:
    """Two rounds of 100 s after a baseline of 60 s: two generators, a scorer, a trainer."""

    def row(role: str, actor: str, stage: str, start: float, end: float, tokens: int = 0) -> dict:
        return {
            "role": role,
            "actor": actor,
            "stage": stage,
            "start": START + start,
            "end": START + end,
            "tokens": tokens,
        }

    rows = [row("evaluator", "generator-0", "evaluate", 0, 60, 20_000)]
    for round in range(2):
        at = 60 + 100 * round
        rows += [
            row("generator", f"generator-{g}", "generate", at + 9 * i + g, at + 9 * i + 9)
            for g in (0, 1)
            for i in range(5)
        ]
        rows += [
            row("generator", f"generator-{g}", "swap", at + 95, at + 96.2)
            | {"version": round + 1, "verdict": "proved" if round else "unproven", "loads": 1 + round * g}
            | {"share": 0.97 - 0.06 * g, "expected_move": 0.096, "gap": 0.055, "noise": 0.06}
            for g in (0, 1)
        ]
        rows += [row("scorer", "scorer-0", "score", at + 9 * i + 9, at + 9 * i + 12, 900) for i in range(5)]
        rows += [
            row("trainer", "trainer-0", "wait", at, at + 15),
            row("trainer", "trainer-0", "train", at + 15, at + 95),
        ]
    return [*rows, row("evaluator", "generator-0", "evaluate", 260, 320, 20_000)]


def summary() -> dict:
    return {
        "recipe": "rlsf",
        "seed": 3,
        "model": "smollm2",
        "status": "done",
        "difference": {"sampled_accuracy": [0.189, 0.12, 0.26]},
        "accounting": {
            "admitted": 128,
            "trained": 90,
            "filtered": 37,
            "failed": 1,
            "reasons": {"one_answer": 20, "all_cut_off": 12, "tie": 5},
        },
        "guard": {
            "verdicts": [{"version": 1, "action": "stop", "reasons": [REASON]}],
            "rolled_back": {"from": 1, "to": 0, "version": 2},
            "training_vitals": {"1": {"kl": 0.09, "logprob_gap": 0.05}},
        },
        "seconds": {"total": 431.0, "by_stage": {"generate": 90.0}},
        "peak_memory_gb": 4.27,
    }
