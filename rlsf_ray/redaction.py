"""Text without secrets, for archives, logs and messages."""

from __future__ import annotations

import re
from collections.abc import Collection

HIDDEN = "(hidden)"
SECRET_NAME = r"[\w.-]*(?:token(?!iz)|secret|passw|api_?-?key|private_?-?key|credential|webhook|authorization)[\w.-]*"
PLAIN_VALUE = r"(?:[-+]?[\d.]+(?:e[-+]?\d+)?|null|true|false|none)"
_SECRETS = [  # each with what stays of it, in groups
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"(?<=://)[^/\s\"']+(?=@)"),  # a URL's user and password
    re.compile(r"(?i)(?<=[?&])([\w-]*(?:token|key|secret|signature|sig|password)=)[^&\s\"']+"),
    re.compile(r"(https://[^/\s\"']*hooks?\.[^/\s\"']+/|https://[^\s\"']*/webhooks?/)[^\s\"']+"),
    re.compile(r"(?i)\b((?:bearer|basic)\s+)[A-Za-z0-9._~+/=-]{6,}"),
    re.compile(r"\b(hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abps]-|AKIA|ASIA|eyJ)[A-Za-z0-9_./+=-]{12,}"),
    # name: value, or name=value; a whole number is none
    re.compile(
        rf"(?i)(\b{SECRET_NAME}[\"']?\s*[:=]\s*)(?!{PLAIN_VALUE}(?![\w.]))(\"(?:[^\"\\]|\\.)*\"|'[^']*'|[^\s,}}\]\"'\[{{(]+)"
    ),
]


def has_user(url: str) -> bool:
    """Does a URL bring a user's name or password along?"""
    return re.search(r"://[^/\s]*@", url) is not None


def redact(text: str, secrets: Collection[str] = ()) -> str:
    """`text` without `secrets`, and without what looks like one: known forms and named values."""
    for value in secrets:
        text = text.replace(value, HIDDEN)
    for pattern in _SECRETS:
        text = pattern.sub(rf"\1{HIDDEN}" if pattern.groups else HIDDEN, text)
    return text
