"""A good recipe and a run that has begun, to be spoilt by tests of bad input."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tiny import tiny_config

from rlsf_ray.config_loading import dump_config
from rlsf_ray.run_store import RunStore

Make = Callable[["Place"], list[str]]


class Place:
    """A folder with a good recipe and a run that has begun, to be spoilt."""

    def __init__(self, folder: Path, tiny: Path) -> None:
        self.folder, self.model = folder, folder / "model"
        shutil.copytree(tiny, self.model)
        self.recipe = folder / "good.yaml"
        self.recipe.write_text(dump_config(tiny_config(self.model)))
        self.run = folder / "runs" / "begun"

    def begun(self) -> Path:
        """A run directory as it is before the first round."""
        RunStore.create_or_resume(str(self.run), tiny_config(self.model))
        return self.run

    def file(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        return path

    def plan(self, *settings: str) -> list[str]:
        return ["plan", str(self.recipe), *(part for setting in settings for part in ("--set", setting))]

    def failures(self) -> list[str]:
        return ["failures", str(self.recipe), "--to", "hard.jsonl"]

    def data(self, name: str, text: str, more: str = "") -> list[str]:
        """`plan` on a training file of this content."""
        return self.plan(f"data.train=[{{kind: file, path: {self.file(name, text)}{more}}}]")

    def model_file(self, name: str, text: str | None) -> list[str]:
        """`plan` with a file of the model rewritten, or (None) removed."""
        if text is None:
            (self.model / name).unlink()
        else:
            (self.model / name).write_text(text)
        return self.plan()

    def of_run(self, name: str, text: str, *command: str) -> list[str]:
        """A command on a run one of whose files has another content."""
        path = self.begun() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return [*command, "--root", str(self.run.parent)]
