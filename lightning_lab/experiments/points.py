"""Which runs a sweep consists of: a grid, settings one by one, or ranges to search become points, one a run."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_lab.errors import LabError, check_ranges
from lightning_lab.files import LONGEST_NAME, cut, flatten

if TYPE_CHECKING:
    import optuna

NAME = re.compile(r"\w[\w.+-]*")
RESERVED = ("run_dir", "ckpt_path", "config", "trainer.default_root_dir")
RANGES = {"trials": (1, math.inf), "seed": (0, 2**32 - 1)}
LARGEST = 2**53  # bounds beyond it are not exact in Optuna's database


@dataclass(frozen=True)
class SweepSettings:
    """Which runs a sweep consists of, and where it keeps what it has done.

    Args:
        grid: Values by config key, such as ``{model.lr: [1e-4, 2e-4], model.r: [16, 32]}``; every combination is run.
        settings: Combinations given one by one, such as ``[{model.lr: 3e-4, model.r: 32}]``; ``name`` in one names its
            run. With a grid as well, each of them at each point of the grid.
        search: In place of both, a range by config key: ``{low: 1e-5, high: 1e-3, log: true}`` (or with ``step``; whole
            bounds draw whole numbers) or ``{choices: [8, 16, 32]}``.
        trials: How many runs a search makes; failed and pruned ones count.
        sampler: Of a search: ``tpe`` (Bergstra et al. 2011, by Optuna; random for the first ten runs) or ``random``.
        prune: Stop a run of a search at a validation where its best loss so far is above the median of the earlier
            runs' at that step; once five runs are complete.
        tie: Keys that follow another: ``{model.alpha: model.r}``, or ``{model.alpha: 2 * model.r}``.
        seed: Of the search.
        test: Evaluate the held-out test split with the best checkpoint of ``all`` runs (the default of a grid), of the
            ``best`` one (the default of a search) or of ``none``.
        retry_failed: Run failed trials again, from their checkpoint if they have one.
        storage: SQLAlchemy's URL of a database, such as ``postgresql://user@host/sweeps``, through which workers on
            several machines share the runs; null for a SQLite file in the sweep's directory.

    """

    grid: dict[str, Any] | None = None
    settings: list[dict[str, Any]] | None = None
    search: dict[str, Any] | None = None
    trials: int = 20
    sampler: Literal["tpe", "random"] = "tpe"
    prune: bool = False
    tie: dict[str, str] | None = None
    seed: int = 3407
    test: Literal["all", "best", "none"] | None = None
    retry_failed: bool = False
    storage: str | None = None


class Point(NamedTuple):
    """One run of a sweep: the name of its directory, and what it changes in the config, by dotted key."""

    name: str
    settings: Mapping[str, Any]


def flags(settings: Mapping[str, Any]) -> list[str]:
    """Settings as flags of `fit`."""
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in settings.items()]


def sweep_points(sweep: SweepSettings, space: Mapping[str, Any]) -> list[Point]:
    """All runs of a grid; of a search the ends of each range and each choice, which are checked before it begins.

    Raises:
        LabError: Numbers out of range, or settings that exclude each other or cannot be combined.

    """
    check_ranges("sweep", vars(sweep), RANGES)
    if not space and sweep.prune:
        raise LabError("sweep.prune is for a search: a grid runs each of its settings to the end")
    if not space:
        return grid_points(sweep)
    if sweep.grid or sweep.settings:
        raise LabError("the sweep is a search and a grid; keep sweep.search, or sweep.grid and sweep.settings")
    ends = {key: range_.get("choices") or [range_["low"], range_["high"]] for key, range_ in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    varied = [first | {key: value} for key, values in ends.items() for value in values[1:]]
    return [Point("search", tied(settings, sweep.tie)) for settings in [first, *varied]]


# -- grids -----------------------------------------------------------------------------------------------------------


def grid_points(sweep: SweepSettings) -> list[Point]:
    """Every combination that a grid and single settings make, in the order in which they are written.

    Raises:
        LabError: Nothing to combine, a key that a sweep sets itself, or a bad name.

    """
    grid = flatten(sweep.grid or {})
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise LabError(f"sweep.grid: {key} needs a list of values, such as [1e-4, 2e-4]")
    if not grid and not sweep.settings:
        raise LabError(
            "the sweep has no settings: give sweep.grid, sweep.settings or sweep.search, e.g. "
            "--sweep.grid '{model.lr: [1e-4, 2e-4, 3e-4]}', or --config lab_grid.yaml"
        )
    points = []
    for setting, *values in itertools.product(sweep.settings or [{}], *grid.values()):
        fixed, varied = flatten(setting), dict(zip(grid, values, strict=True))
        given = fixed.pop("name", None)
        if both := fixed.keys() & varied.keys():
            raise LabError(f"sweep: {min(both)} is in sweep.grid and in sweep.settings; leave it in one of them")
        name = run_name(fixed | varied) if given is None else run_name(varied, [str(given)])
        if not NAME.fullmatch(name) or cut(name) != name:
            of = f"letters, digits and _ . + -, at most {LONGEST_NAME} bytes"
            raise LabError(f"sweep.settings: {name!r} cannot be a run's name; use {of}")
        points.append(Point(name, tied(fixed | varied, sweep.tie)))
    return points


def all_runs(points: Iterable[Point], begun: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Settings by name of what a sweep has begun, and then of the points that are none of these runs.

    Args:
        points: With their settings as the config has them.
        begun: Settings of the sweep's runs by name.

    Raises:
        LabError: Two points have one name or the same settings, or one has another run's name.

    """
    runs = dict(begun)
    for name, settings in points:
        if settings in begun.values():
            continue
        for other, known in runs.items():
            if other.casefold() == name.casefold() or known == settings:  # file systems may ignore case
                raise LabError(
                    f"sweep: a run {other} with {known} is there already; give {settings} (as {name}) another name in "
                    "sweep.settings, or leave it out"
                )
        runs[name] = settings
    return runs


def tied(settings: Mapping[str, Any], ties: Mapping[str, str] | None) -> dict[str, Any]:
    """Add the keys that follow others.

    Raises:
        LabError: A key that a sweep sets itself, one that is tied and set, or a tie to what the sweep does not vary or
            what is not a number.

    """
    result = dict(settings)
    for key, rule in flatten(ties or {}).items():
        if key in settings:
            raise LabError(f"sweep.tie: {key} is tied and set; leave it out of the settings")
        factor, _, source = str(rule).rpartition("*")
        try:
            value = settings[source.strip()]
            if factor:
                value = float(factor) * value
                value = int(value) if value.is_integer() else value
        except (KeyError, TypeError, ValueError):
            raise LabError(
                f"sweep.tie: {key}: {rule} follows no key of the sweep ({', '.join(settings)}) that has a number; "
                "write a key, or a number times a key, such as 2 * model.r"
            ) from None
        result[key] = value
    for key in result:
        if key in RESERVED or key.startswith("sweep."):
            raise LabError(f"sweep: {key} cannot be varied; a sweep sets it itself")
    return result


def run_name(settings: Mapping[str, Any], given: Sequence[str] = ()) -> str:
    """A directory name from what is given and settings, such as ``lr3e-4_r32``; with a hash where it would be long."""
    parts = [*given]
    for key, value in settings.items():
        if isinstance(value, float):
            plain, short = value == 0 or 0.01 <= abs(value) < 1000, f"{value:.4g}"
            value = short if plain else f"{Decimal(short).normalize():e}".replace("+", "")
        last = {"seed_everything": "seed"}.get(key, key.rpartition(".")[2])
        parts.append(last + re.sub(r"[^\w.+-]+", "-", str(value)).strip("-"))
    name = "_".join(parts) if parts else "base"
    if settings and cut(name) != name:
        digest = hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()[:12]
        name = f"{cut(name, LONGEST_NAME - 1 - len(digest))}-{digest}"
    return name


# -- searches --------------------------------------------------------------------------------------------------------


def search_space(search: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Ranges by dotted key, all of their bounds whole or none; keys may be written nested.

    Raises:
        LabError: A range that is neither ``low``/``high`` nor ``choices``, or an empty or impossible one.

    """
    from optuna.distributions import FloatDistribution, IntDistribution

    space: dict[str, dict[str, Any]] = {}
    for path, value in flatten(search).items():
        key, _, part = path.rpartition(".")
        space.setdefault(key, {})[part] = value
    for key, range_ in space.items():
        if range_.keys() == {"choices"} and isinstance(range_["choices"], list) and range_["choices"]:
            continue
        try:
            bounds = [part for part in range_ if part != "log"]
            whole = all(isinstance(range_[part], int) for part in bounds)
            range_ |= {part: range_[part] if whole else float(range_[part]) for part in bounds}  # 1e-5 is text in YAML
            if not (range_["low"] < range_["high"] and all(abs(range_[part]) <= LARGEST for part in bounds)):
                raise ValueError(f"low must be below high, and no number beyond {LARGEST:.0e}")
            (IntDistribution if whole else FloatDistribution)(**range_)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            right = "{low: ..., high: ...} (with log or step) or {choices: [...]}"
            raise LabError(f"sweep.search: {key}: {range_} is no range ({error}); write {right}") from None
    return space


def draw(trial: optuna.Trial, key: str, range_: Mapping[str, Any]) -> Any:
    """A value for one key, by the study's sampler."""
    if "choices" in range_:  # as text: Optuna's choices are single values, never lists
        return json.loads(trial.suggest_categorical(key, [json.dumps(choice) for choice in range_["choices"]]))
    return (trial.suggest_int if isinstance(range_["low"], int) else trial.suggest_float)(key, **range_)
