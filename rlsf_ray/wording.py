"""How numbers are named and written for people, on the terminal and in the report alike."""

from __future__ import annotations

# metric of eval/version-NNNN.json, its name, +1 where more is better and -1 where less is, digits
METRICS = (
    ("greedy_accuracy", "Greedy accuracy", 1, 3),
    ("sampled_accuracy", "Sampled accuracy [95 %]", 1, 3),
    ("majority_accuracy", "Majority accuracy", 1, 3),
    ("ece_answer_prob", "ECE, answer probability", -1, 3),
    ("ece_agreement", "ECE, agreement", -1, 3),
    ("brier_answer_prob", "Brier, answer probability", -1, 3),
    ("brier_agreement", "Brier, agreement", -1, 3),
    ("auroc_answer_prob", "AUROC, answer probability", 1, 3),
    ("auroc_agreement", "AUROC, agreement", 1, 3),
    ("parsed", "Share parsed", 1, 3),
    ("cut_off", "Share cut off", -1, 3),
    ("mean_length", "Mean length (tokens)", 0, 1),
)


def duration(seconds: float) -> str:
    """9 -> 9 s, 75 -> 1 min 15 s, 3675 -> 1 h 01 min."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
