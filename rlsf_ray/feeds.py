"""Prompts that are fed into a run while it goes on (`rlsf feed`). They stay in the run directory as they came.

feeds/0001.jsonl (the file)  feeds/0001.json (the first round that takes them; written last)
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from rlsf_ray.config import RunConfig
from rlsf_ray.config_sections import SourceConfig
from rlsf_ray.errors import InputError
from rlsf_ray.records import Prompt
from rlsf_ray.run_store import RunStore
from rlsf_ray.tasks.questions import key_of_messages, to_prompt
from rlsf_ray.tasks.rows import row_questions
from rlsf_ray.tasks.sources import PromptSets

LARGEST = 64 * 2**20  # bytes of a file: it passes through the coordinator
WITH_COLUMNS = ("file", "gsm8k", "commonsenseqa")  # kinds of sources whose columns a feed can have


class Feed(NamedTuple):
    """Prompts of one file, without those that the run knew."""

    first_round: int
    prompts: list[Prompt]
    known: int  # left out: of the training, probe or calibration prompts, of an earlier feed, or twice in the file


def read_feeds(store: RunStore, sets: PromptSets) -> list[Feed]:
    """What the run was fed so far, oldest first; `sets`: its own prompts."""
    return _read_feeds(store, _own_keys(sets))


def _read_feeds(store: RunStore, seen: set[str]) -> list[Feed]:
    """See `read_feeds`. The keys of what was fed are added to `seen`."""
    feeds = list[Feed]()
    for record in _records(store):
        found = store.read_json(f"feeds/{record}")
        data = store.storage.read(f"feeds/{found['file']}") or b""
        feeds.append(_feed(store.config, found["file"], found["file"], data, found["first_round"], seen))
    return feeds


def new_feed(store: RunStore, sets: PromptSets, name: str, data: bytes, first_round: int) -> Feed:
    """The prompts of the file `name` that are new to the run, for `first_round` on; nothing is kept yet.

    Raises InputError for a file that no source of prompts could be, one of whose prompts lacks the check that the run's
    own have, and where the run knows every prompt of it.
    """
    seen = _own_keys(sets)
    _read_feeds(store, seen)
    feed = _feed(store.config, name, _next_file(store, name), data, first_round, seen)
    if not feed.prompts:
        raise InputError(f"{name}: the run knows all of its {feed.known} prompts; expected at least one new one")
    unchecked = [prompt.id for prompt in feed.prompts if prompt.check is None]
    if unchecked and sets.train and all(prompt.check for prompt in sets.train):
        raise InputError(
            f"{name}: {len(unchecked)} prompts have no check, such as {unchecked[0]}, and all that the run was begun"
            " with have one; expected the columns of the run's own data file"
        )
    return feed


def keep_feed(store: RunStore, name: str, data: bytes, first_round: int) -> None:
    """Put a file that `new_feed` has read into the run directory."""
    file = _next_file(store, name)
    store.storage.write(f"feeds/{file}", data)
    store.write_json(f"feeds/{PurePosixPath(file).stem}.json", {"file": file, "first_round": first_round})


def _records(store: RunStore) -> list[str]:
    return [name for name in store.names("feeds") if name.endswith(".json")]


def _next_file(store: RunStore, name: str) -> str:
    ending = PurePosixPath(name).suffix.lower()  # .json is the records' own; such files hold JSON Lines, too
    return f"{len(_records(store)) + 1:04d}{'.jsonl' if ending == '.json' else ending}"


def _own_keys(sets: PromptSets) -> set[str]:
    return _keys([*sets.train, *(item.prompt for item in sets.probe), *sets.calibration])


def _feed(config: RunConfig, name: str, file: str, data: bytes, first_round: int, seen: set[str]) -> Feed:
    """The prompts of a file whose keys are not in `seen`; theirs are added to it. Errors speak of `name`."""
    feed = Feed(first_round, [], 0)
    plain = SourceConfig(kind="file", path=file)
    like = next((source for source in config.data.train if source.kind in WITH_COLUMNS), plain)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / f"feed-{file}")
        Path(path).write_bytes(data)
        try:
            questions = row_questions(like.model_copy(update={"path": path, "count": None, "id": None}), labelled=False)
        except InputError as error:
            raise InputError(str(error).replace(path, name)) from error
    for question in questions:
        prompt = to_prompt(question, suffix=config.data.suffix, answer_format=config.data.answer)
        keys = _keys([prompt])
        if not keys & seen:
            feed.prompts.append(prompt)
        seen |= keys
    return feed._replace(known=len(questions) - len(feed.prompts))


def _keys(prompts: Sequence[Prompt]) -> set[str]:
    """Their own keys and those of their words: a generated question has a key that a row with its words has not."""
    return {key for prompt in prompts for key in (prompt.key, key_of_messages(prompt.messages))}
