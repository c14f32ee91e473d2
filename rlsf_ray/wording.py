"""How numbers are named and written for people, on the terminal and in the report alike."""

from __future__ import annotations

from rlsf_ray.records import Json

# metric of eval/version-NNNN.json, its name, +1 where more is better and -1 where less is, digits
METRICS = (
    ("greedy_accuracy", "Greedy accuracy", 1, 3),
    ("sampled_accuracy", "Sampled accuracy", 1, 3),
    ("majority_accuracy", "Majority accuracy", 1, 3),
    ("borda_accuracy", "Borda accuracy", 1, 3),
    ("cot_max_accuracy", "CoT-decoding, max", 1, 3),
    ("cot_aggregated_accuracy", "CoT-decoding, sum", 1, 3),
    ("accuracy_given_parsed", "Right if parsed", 1, 3),
    ("ece_answer_prob", "ECE, answer prob.", -1, 3),
    ("ece_calibrated", "ECE, calibrated", -1, 3),
    ("ece_agreement", "ECE, agreement", -1, 3),
    ("brier_skill_answer_prob", "Skill, answer prob.", 1, 3),
    ("brier_skill_calibrated", "Skill, calibrated", 1, 3),
    ("auroc_answer_prob", "AUROC, answer prob.", 1, 3),
    ("auroc_calibrated", "AUROC, calibrated", 1, 3),
    ("parsed", "Share parsed", 1, 3),
    ("cut_off", "Share cut off", -1, 3),
    ("unchecked", "Check not made", -1, 3),
    ("mean_length", "Mean length (tokens)", 0, 1),
)
# the same of episodes of several turns
TRIES = (
    ("first_try", "First try", 1, 3),
    ("last_try", "Last try", 1, 3),
    ("voted_tries", "Vote of last tries", 1, 3),
    ("unchecked_tries", "Tries not checked", -1, 3),
    ("wrong_to_right", "Wrong to right", 1, 3),
    ("right_to_wrong", "Right to wrong", -1, 3),
    ("thought_length", "Length of a thought", 0, 1),
    ("thought_repetition", "Repetition in it", -1, 3),
)
CONFIDENCES = {
    "answer_prob": "Answer probability",
    "disparity": "Disparity",
    "calibrated": "Calibrated, from one trace",
    "agreement": "Agreement with the other traces",
    "voted": "Calibrated, from the vote of all samples",
    "vote_share": "Share of the commonest answer",
}
# statistic of each confidence, its name, +1 where more is better, -1 where less is, 0 where nearer to 0 is
STATISTICS = (
    ("ece", "ECE", -1),
    ("ece_mass", "ECE, equal counts", -1),
    ("brier", "Brier", -1),
    ("brier_skill", "Brier skill", 1),
    ("nll", "NLL", -1),
    ("auroc", "AUROC", 1),
    ("aurc", "risk-coverage", -1),
    ("overconfidence", "over-confidence", 0),
)


def duration(seconds: float) -> str:
    """9 -> 9 s, 75 -> 1 min 15 s, 3675 -> 1 h 01 min."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def way_back(back: Json) -> str:
    """Where a run went back to, as in "version 3 is ..."; `back`: "rolled_back" of its state."""
    there = f"version {back['to']}" if back["to"] else "the base model"
    if not back.get("share"):
        return f"{there} again"
    return f"{there} and {back['share']:g} of the step to version {back['past']}"
