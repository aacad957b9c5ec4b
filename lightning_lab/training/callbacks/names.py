"""Names of results and predictions: of the run's own conversations, and of others, which stand beside them."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path

from lightning_lab import rundir
from lightning_lab.files import cut
from lightning_lab.training import held_out
from lightning_lab.training.module import QLoRAModule


def standing_to_run(run_dir: Path, module: QLoRAModule, split: str) -> held_out.Standing | None:
    """How a split stands to a directory's run, or where that says nothing to the module's; None where neither does."""
    known = held_out.read_rows(run_dir / rundir.CHECKPOINTS / rundir.ROWS)
    known = module.dealt if known is None else known
    return held_out.standing(known, module.chat_data, split) if module.chat_data and known is not None else None


def result_name(name: str, source: object, is_own: bool | None, is_free: Callable[[str], bool]) -> str:
    """A name, without its ending, under which nothing of other conversations stands.

    Args:
        name: What the run's own have.
        source: What others are called after.
        is_own: None where that is not known: the name is then whose it was first.
        is_free: Whether nothing stands under a name, or something of the same conversations.

    """
    if is_own:
        return name
    stem = re.sub(r"[^\w-]+", "-", Path(str(source)).stem).strip("-")
    other = f"{name}@{cut(stem)}"
    names = chain([name] * (is_own is None), [other], (f"{other}-{number}" for number in count(2)))
    return next(filter(is_free, names))
