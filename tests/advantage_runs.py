"""Settings of small runs that learn from advantages."""

from __future__ import annotations

from typing import Any

CERTAINTY: dict[str, Any] = {
    "signal": "self_certainty",
    "judges": ["live", "frozen"],
    "advantages": {"traces_per_step": 16, "kl": 0.01},
}
REWARD: dict[str, Any] = {
    "rounds": 3,
    "signal": "disparity",
    "advantages": {"traces_per_step": 16},
    "pairs": {"rule": "best_worst", "max_pairs": 1, "same_answer": True, "surest": 0.1},
    "reward_model": {"rounds": 1, "epochs": 2, "learning_rate": 1e-2},
}
