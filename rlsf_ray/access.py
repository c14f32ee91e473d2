"""The token without which nobody may speak to a Ray of our own."""

from __future__ import annotations

import logging
import os
import secrets
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from rlsf_ray.errors import InputError

logger = logging.getLogger(__name__)

OPEN_TO_OTHERS = 0o077


def token_path(environment: Mapping[str, str] = os.environ) -> Path:
    """Where Ray looks for a user's token; `~` may stand in it."""
    home = environment.get("HOME") or "~"
    return Path(environment.get("RAY_AUTH_TOKEN_PATH") or Path(home, ".ray", "auth_token"))


def own_token() -> None:
    """Have a token that this user alone can read, before Ray would make one that everybody can.

    Ray finds it by itself. Raises InputError where token authentication is switched off, because a Ray listens on every
    interface of its machine and runs whatever it is sent.
    """
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        raise InputError(
            "a Ray of our own would listen on every interface and run what anybody sends: expected token"
            f" authentication, got RAY_AUTH_MODE={os.environ['RAY_AUTH_MODE']}; unset it, or give --address"
        )
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = token_path()
    try:
        path = path.expanduser()
        if not path.exists():
            _make(path)
        if path.stat().st_mode & OPEN_TO_OTHERS:
            path.chmod(0o600)
            logger.warning("%s was readable by others until now; `ray get-auth-token --generate` makes a new one", path)
    except (OSError, RuntimeError) as error:  # a user without a home has none
        raise InputError(
            f"no token for Ray in {path}: {error}; expected a file that only you can read and write; mend that, or set"
            " RAY_AUTH_TOKEN_PATH to another"
        ) from error


def _make(path: Path) -> None:
    """Put a new token at `path` as a whole; one that somebody else has made meanwhile stays."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent)  # which only this user can read
    try:
        with open(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
        with suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.unlink(name)
