"""How right is the voted answer, by the weight it got? What `pairs.min_chosen` should be, judged after a run.

    python benchmarks/vote_precision.py RUN...

The answers of each prompt are weighed by the run's own signal, as `pairs.rule: voted` does. Gold answers are read here
and nowhere in training. `lead` is the weight less that of the next answer.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby

from rlsf_ray.algorithms import voting
from rlsf_ray.config import RunConfig
from rlsf_ray.records import Json
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.equality import AnswerChecker
from rlsf_ray.tasks.sources import load_prompts, load_sets

WEIGHTS = (0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0)
LEADS = (0.5, 1.0, 1.5, 2.0)
Vote = tuple[float, float, bool]  # weight, lead, is it right?


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", help="run directories; their votes are thrown together by round")
    rounds: dict[int, list[Vote]] = defaultdict(list)
    with AnswerChecker() as checker:
        for root in parser.parse_args().runs:
            store = RunStore.open(root)
            gold = gold_answers(store.config)
            for round in store.rounds("traces"):
                rounds[round] += votes_of(store.read_table("traces", round).to_pylist(), gold, checker)
    for round, votes in sorted(rounds.items()):
        print(f"\nround {round}: {len(votes)} prompts with an answer, {_share(votes)} of the votes right")
        for name, index, limits in (("weight", 0, WEIGHTS), ("lead", 1, LEADS)):
            for limit in limits:
                kept = [vote for vote in votes if vote[index] >= limit]
                print(f"  {name} >= {limit:.1f}: {len(kept):4d} prompts, {_share(kept)} right")


def votes_of(rows: Sequence[Json], gold: Mapping[str, str], checker: AnswerChecker) -> list[Vote]:
    """The vote of each prompt that has an answer; `rows` are the traces of a round."""
    groups = (list(group) for _, group in groupby(rows, key=lambda row: row["prompt_id"]))
    votes = (_vote(group, gold[group[0]["prompt_id"]], checker) for group in groups)
    return [vote for vote in votes if vote is not None]


def gold_answers(config: RunConfig) -> dict[str, str]:
    """Gold answers of the training prompts by id; those that were held out from training make room for later ones."""
    sets = load_sets(config)
    held_out = len(sets.probe) + len(sets.calibration)
    sources = (one.model_copy(update={"count": one.count and one.count + held_out}) for one in config.data.train)
    found = (load_prompts(s, seed=config.seed, suffix="", answer_format=config.data.answer) for s in sources)
    return {item.prompt.id: item.gold for items in found for item in items}


def _vote(traces: Sequence[Json], gold: str, checker: AnswerChecker) -> Vote | None:
    labels = [trace["label"] for trace in traces]
    sums = sorted(voting.tally(labels, [trace["score"] or 0.0 for trace in traces]).items(), key=lambda one: -one[1])
    if not sums:
        return None
    winner, weight = sums[0]
    lead = weight - (sums[1][1] if len(sums) > 1 else 0.0)
    return weight, lead, checker.equal(traces[labels.index(winner)]["answer"], gold)


def _share(votes: Sequence[Vote]) -> str:
    return f"{sum(right for *_, right in votes) / len(votes):.3f}" if votes else "-"


if __name__ == "__main__":
    main()
