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
from rlsf_ray.tasks.sources import PromptSets, rows_of

LARGEST = 64 * 2**20  # bytes of a file: it passes through the coordinator
_COLUMNED = ("file", "gsm8k", "commonsenseqa", "bfcl")


class Feed(NamedTuple):
    """Prompts of one file, without those that the run knew."""

    first_round: int
    prompts: list[Prompt]
    known: int  # left out: of the training, probe or calibration prompts, of an earlier feed, or twice in the file


def read_feeds(store: RunStore, known: Sequence[Prompt]) -> list[Feed]:
    """What earlier lives of the run were fed, oldest first; `known`: every prompt of its own sets."""
    feeds, seen = list[Feed](), _keys(known)
    for record in sorted(name for name in store.names("feeds") if name.endswith(".json")):
        found = store.read_json(f"feeds/{record}")
        data = store.storage.read(f"feeds/{found['file']}") or b""
        feeds.append(_feed(store.config, found["file"], found["file"], data, found["first_round"], seen))
    return feeds


def all_known(sets: PromptSets) -> list[Prompt]:
    """Every prompt of a run's own sets."""
    return [*sets.train, *(item.prompt for item in sets.probe), *sets.calibration]


def take_feed(
    store: RunStore, known: Sequence[Prompt], feeds: Sequence[Feed], name: str, data: bytes, first_round: int
) -> Feed:
    """Keep the file `name` with its prompts for `first_round` on.

    Raises InputError for a file that no source of prompts could be, and where the run knows every prompt of it.
    """
    seen = _keys([*known, *(prompt for feed in feeds for prompt in feed.prompts)])
    number = f"{len(feeds) + 1:04d}"
    file = number + PurePosixPath(name).suffix.lower()
    feed = _feed(store.config, name, file, data, first_round, seen)
    if not feed.prompts:
        raise InputError(f"{name}: the run knows all of its {feed.known} prompts; expected at least one new one")
    store.storage.write(f"feeds/{file}", data)
    store.write_json(f"feeds/{number}.json", {"file": file, "first_round": first_round})
    return feed


def _feed(config: RunConfig, name: str, file: str, data: bytes, first_round: int, seen: set[str]) -> Feed:
    """The prompts of a file whose keys are not in `seen`; theirs are added to it. Errors speak of `name`."""
    feed = Feed(first_round, [], 0)
    plain = SourceConfig(kind="file", path=file)
    like = next((source for source in config.data.train if source.kind in _COLUMNED), plain)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / f"feed-{file}")
        Path(path).write_bytes(data)
        try:
            questions = rows_of(like.model_copy(update={"path": path, "count": None, "id": None}), labelled=False)
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
