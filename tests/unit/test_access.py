"""The token of a Ray of our own: made once, readable by its user only, and never done without."""

from __future__ import annotations

import socket
import stat
from pathlib import Path

import pytest
from ray.exceptions import AuthenticationError

from rlsf_ray import operate
from rlsf_ray.access import own_token
from rlsf_ray.errors import DeadlineError, InputError
from rlsf_ray.operate import connected


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_token_is_made_once_for_this_user_alone(home: Path) -> None:
    own_token()
    path = home / ".ray/auth_token"
    token = path.read_text()
    assert len(token) == 64
    assert mode(path) == 0o600
    path.chmod(0o644)  # as Ray itself leaves it
    own_token()
    assert path.read_text() == token
    assert mode(path) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["auth_token"]


def test_ray_takes_the_token_for_its_own(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._raylet import AuthenticationTokenLoader

    own_token()
    loader = AuthenticationTokenLoader.instance()
    loader.reset_cache()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    try:
        assert loader.has_token(ignore_auth_mode=True)
    finally:
        loader.reset_cache()


def test_a_path_of_the_user_s_own_is_kept_to(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / "elsewhere/token"))
    own_token()
    assert mode(home / "elsewhere/token") == 0o600
    assert not (home / ".ray").exists()


def test_a_ray_without_a_token_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(InputError, match=r"expected token authentication, got RAY_AUTH_MODE=disabled; unset it"):
        own_token()


def test_a_token_that_cannot_be_made_is_named(home: Path) -> None:
    (home / ".ray").write_text("a file where the folder should be")
    with pytest.raises(InputError, match=r"no token for Ray in .*auth_token: .*RAY_AUTH_TOKEN_PATH"):
        own_token()


def test_a_connection_says_what_is_wrong_with_the_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(InputError, match=r"^a Ray of our own would listen"), connected(None):
        pass

    def refuse(**options: object) -> None:
        raise AuthenticationError("no token was found")

    monkeypatch.setattr(operate.ray, "init", refuse)  # as Ray does where it has none to send
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(InputError, match=r"asks for a token, .*copy the cluster's"), connected(address):
            pass


def test_a_ray_that_takes_too_long_to_start_is_a_deadline(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*args: object, **options: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(operate.ray, "init", late)
    with (
        pytest.raises(DeadlineError, match=r"has not started .* timed out during startup.*the same command"),
        connected(None),
    ):
        pass
