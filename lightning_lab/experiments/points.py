"""Which runs a sweep consists of: a grid, settings one by one, or ranges to search become points, one a run."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_lab.errors import LabError, check_ranges
from lightning_lab.files import flatten

if TYPE_CHECKING:
    import optuna

NAME = re.compile(r"\w[\w.+-]*")
NAME_LENGTH = 120  # file names have at most 255 bytes, and temporary ones add to it
RESERVED = ("run_dir", "ckpt_path", "config", "trainer.default_root_dir")
RANGE = ("low", "high", "log", "step")
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


@dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
        name: Of its directory.
        settings: What it changes in the config, by dotted key.

    """

    name: str
    settings: Mapping[str, Any]

    @property
    def flags(self) -> list[str]:
        """The same as flags of `fit`."""
        return [
            f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in self.settings.items()
        ]


def sweep_points(sweep: SweepSettings, space: Mapping[str, Mapping[str, Any]]) -> list[Point]:
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
    return [point("search", settings, sweep) for settings in [first, *varied]]


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
    points: list[Point] = []
    for setting in sweep.settings or [{}]:
        fixed = flatten(setting)
        name = fixed.pop("name", None)
        if both := [key for key in fixed if key in grid]:
            raise LabError(f"sweep: {both[0]} is in sweep.grid and in sweep.settings; leave it in one of them")
        for values in itertools.product(*grid.values()):
            varied = dict(zip(grid, values, strict=True))
            parts = [run_name(fixed) if name is None else str(name), run_name(varied)]
            shown = "_".join(part for part in parts if part) or "base"
            if name is not None and not (NAME.fullmatch(shown) and len(shown) <= NAME_LENGTH):
                raise LabError(f"sweep.settings: {shown!r} cannot be a run's name; use letters, digits and _ . + -")
            points.append(point(shown, fixed | varied, sweep))
    return points


def new_points(points: Sequence[Point], taken: Mapping[str, Mapping[str, Any]]) -> list[Point]:
    """The points that are no run of the sweep yet.

    Args:
        points: With their settings as the config has them.
        taken: Settings of the sweep's runs by name.

    Raises:
        LabError: Two points have one name or the same settings, or one has another run's name.

    """
    known = dict(taken)
    for wanted in points:
        if wanted.settings in taken.values():
            continue
        for name, settings in known.items():
            if name.casefold() == wanted.name.casefold() or settings == wanted.settings:  # file systems may ignore case
                raise LabError(
                    f"sweep: a run {name} with {settings} is there already; give {dict(wanted.settings)} (as "
                    f"{wanted.name}) another name in sweep.settings, or leave it out"
                )
        known[wanted.name] = dict(wanted.settings)
    return [Point(name, settings) for name, settings in known.items() if name not in taken]


def point(name: str, settings: Mapping[str, Any], sweep: SweepSettings) -> Point:
    """A run with these settings and the keys that are tied to them.

    Raises:
        LabError: A key that a sweep sets itself, or a tie that cannot be followed.

    """
    for key in settings:
        if key in RESERVED or key.startswith("sweep."):
            raise LabError(f"sweep: {key} cannot be varied; a sweep sets it itself")
    return Point(name, tied(settings, sweep.tie or {}))


def tied(settings: Mapping[str, Any], ties: Mapping[str, str]) -> dict[str, Any]:
    """Add the keys that follow others.

    Raises:
        LabError: A tie to a key that the sweep does not vary, or that is not a number; or a tied key that is set too.

    """
    result = dict(settings)
    for key, rule in flatten(ties).items():
        factor, _, source = str(rule).rpartition("*")
        value = settings.get(source.strip())
        if value is None:
            raise LabError(
                f"sweep.tie: {key}: {rule} follows no key of the sweep ({', '.join(settings)}); write a key, or a "
                "number times a key, such as 2 * model.r"
            )
        if key in settings:
            raise LabError(f"sweep.tie: {key} is tied and set; leave it out of the settings")
        if factor:
            try:
                value = float(factor) * value
            except (TypeError, ValueError):
                raise LabError(f"sweep.tie: {key}: {rule}: {factor.strip()} or {value!r} is not a number") from None
            value = int(value) if value.is_integer() else value
        result[key] = value
    return result


def run_name(settings: Mapping[str, Any]) -> str:
    """A directory name from settings, such as ``lr3e-4_r32``."""
    parts = []
    for key, value in settings.items():
        last = {"seed_everything": "seed"}.get(key, key.rpartition(".")[2])
        parts.append(last + re.sub(r"[^\w.+-]+", "-", _short(value)).strip("-"))
    return "_".join(parts)[:NAME_LENGTH]


def _short(value: Any) -> str:
    if isinstance(value, float) and value != 0 and not 0.01 <= abs(value) < 1000:
        mantissa, _, exponent = f"{value:.3e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}" if exponent else mantissa
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# -- searches --------------------------------------------------------------------------------------------------------


def search_space(search: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Ranges by dotted key; keys may be written nested.

    Raises:
        LabError: A range that is neither ``low``/``high`` nor ``choices``, or an empty or impossible one.

    """
    space: dict[str, dict[str, Any]] = {}
    for path, value in flatten(search).items():
        key, _, part = path.rpartition(".")
        if part not in (*RANGE, "choices"):
            raise LabError(f"sweep.search: {path} is no range; write {{low: ..., high: ...}} or {{choices: [...]}}")
        space.setdefault(key, {})[part] = value
    return {key: _range(key, given) for key, given in space.items()}


def _range(key: str, given: dict[str, Any]) -> dict[str, Any]:
    from optuna.distributions import FloatDistribution, IntDistribution

    if given.keys() == {"choices"} and isinstance(given["choices"], list) and given["choices"]:
        return given
    if not {"low", "high"} <= given.keys() <= set(RANGE):
        raise LabError(f"sweep.search: {key} needs {{low: ..., high: ...}} (with log or step) or {{choices: [...]}}")
    try:
        for bound in given.keys() - {"log"}:
            if not isinstance(given[bound], int):
                given[bound] = float(given[bound])  # YAML reads 1e-5 as text
            if not abs(given[bound]) <= LARGEST:
                raise ValueError(f"{bound} is {given[bound]}; it must be a number of at most {LARGEST:.0e}")
        if not given["low"] < given["high"]:
            raise ValueError("low must be below high")
        (IntDistribution if _is_whole(given) else FloatDistribution)(**given)
    except (TypeError, ValueError) as error:
        raise LabError(f"sweep.search: {key}: {error}") from None
    return given


def _is_whole(range_: Mapping[str, Any]) -> bool:
    return all(isinstance(range_[part], int) for part in range_.keys() - {"log"})


def draw(trial: optuna.Trial, key: str, range_: Mapping[str, Any]) -> Any:
    """A value for one key, by the study's sampler."""
    if "choices" in range_:  # lists and the like as text: Optuna's choices are single values
        plain = (bool, int, float, str, type(None))
        choices = [c if isinstance(c, plain) else json.dumps(c) for c in range_["choices"]]
        return range_["choices"][choices.index(trial.suggest_categorical(key, choices))]
    return (trial.suggest_int if _is_whole(range_) else trial.suggest_float)(key, **range_)
