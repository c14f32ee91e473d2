"""How a text reasons, told from its words alone."""

from __future__ import annotations

import re

# RLIF 2506.17219 counts such words and finds fewer as a model grows too sure; its own list is not published.
TRANSITIONS = (
    "but", "wait", "however", "suppose", "actually", "alternatively", "instead", "hmm", "maybe", "perhaps", "although",
    "let me check", "let's check", "on the other hand", "check again",
)  # fmt: skip
_TRANSITION = re.compile(rf"(?<![\w'])(?:{'|'.join(TRANSITIONS)})(?![\w'])", re.IGNORECASE)
_WORD = re.compile(r"[^\W\d_][\w']*")


def transition_rate(text: str) -> float:
    """Turns of thought ("but", "wait", "let me check") for each word of the text; 0 without words."""
    words = len(_WORD.findall(text))
    return len(_TRANSITION.findall(text)) / words if words else 0.0
