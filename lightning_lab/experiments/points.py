"""Which runs a sweep consists of: a grid, settings one by one, or ranges to search become points, one a run."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lightning_lab.errors import LabError
from lightning_lab.experiments.runs import flatten

if TYPE_CHECKING:
    import optuna

TIE = re.compile(r"(?:(?P<before>[\d.]+)\s*\*\s*)?(?P<key>[A-Za-z_][\w.]*)(?:\s*\*\s*(?P<after>[\d.]+))?")
NAME = re.compile(r"\w[\w.+-]*")
NAME_LENGTH = 120  # file names have at most 255 bytes, and temporary ones add to it
RESERVED = ("run_dir", "ckpt_path", "config", "trainer.default_root_dir")


@dataclass(frozen=True)
class SweepSettings:
    """Which runs a sweep consists of.

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


@dataclass(frozen=True)
class Point:
    """One trial's settings by dotted config key, and the name of its run.

    Attributes:
        name: Of its directory.
        settings: What it changes in the config.
        named: Whether the user chose the name.

    """

    name: str
    settings: Mapping[str, Any]
    named: bool = False

    @property
    def flags(self) -> list[str]:
        """The same as flags of `fit`."""
        return [
            f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in self.settings.items()
        ]


def grid_points(sweep: SweepSettings) -> list[Point]:
    """Every combination that a grid and single settings make, in the order in which they are written.

    Raises:
        LabError: Nothing to combine, a key that a sweep sets itself, a bad name, or one combination twice.

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
        both = [key for key in fixed if key in grid]
        if both:
            raise LabError(f"sweep: {both[0]} is in sweep.grid and in sweep.settings; leave it in one of them")
        for values in itertools.product(*grid.values()):
            varied = dict(zip(grid, values, strict=True))
            parts = [run_name(fixed) if name is None else str(name), run_name(varied)]
            shown = "_".join(part for part in parts if part) or "base"
            if name is not None and not (NAME.fullmatch(shown) and len(shown) <= NAME_LENGTH):
                raise LabError(f"sweep.settings: {shown!r} cannot be a run's name; use letters, digits and _ . + -")
            points.append(_point(shown, fixed | varied, sweep, named=name is not None))
    return points


def distinct(points: Sequence[Point], taken: Mapping[str, Mapping[str, Any]]) -> list[Point]:
    """Give each point a name that no other run of the sweep has.

    Args:
        points: With their settings as the config has them.
        taken: Settings of the runs that there are already, by name.

    Raises:
        LabError: Two points have the same settings, or a name that the user chose is another run's.

    """
    result: list[Point] = []
    names = {name.casefold(): settings for name, settings in taken.items()}  # file systems may ignore case
    for i, point in enumerate(points):
        for other in points[:i]:
            if point.settings == other.settings:
                raise LabError(f"sweep: the settings of {point.name} come twice (as {other.name}); leave one out")
        name, number = point.name, 1
        while names.get(name.casefold(), point.settings) != point.settings:
            if point.named:
                raise LabError(
                    f"sweep: there is a run {name} already, with {dict(names[name.casefold()])}; give "
                    f"{dict(point.settings)} another name"
                )
            number += 1
            name = f"{point.name}.{number}"  # not -2, which would be the second run of that name
        names[name.casefold()] = point.settings
        result.append(Point(name, point.settings, point.named))
    return result


def tied(settings: Mapping[str, Any], ties: Mapping[str, str]) -> dict[str, Any]:
    """Add the keys that follow others.

    Raises:
        LabError: A tie to a key that the sweep does not vary, or that is not a number; or a tied key that is set too.

    """
    result = dict(settings)
    for key, rule in flatten(ties).items():
        match = TIE.fullmatch(str(rule).strip())
        source = match["key"] if match else ""
        if source not in settings:
            raise LabError(
                f"sweep.tie: {key}: {rule} follows no key of the sweep ({', '.join(settings)}); write a key, or a "
                "number times a key, such as 2 * model.r"
            )
        if key in settings:
            raise LabError(f"sweep.tie: {key} is tied and set; leave it out of the settings")
        value = settings[source]
        factors = [float(match[side]) for side in ("before", "after") if match and match[side]]
        if factors:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise LabError(f"sweep.tie: {key}: {rule}: {value!r} is not a number")
            value = math.prod([*factors, value])
            value = int(value) if value == int(value) else value
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
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _point(name: str, settings: Mapping[str, Any], sweep: SweepSettings, named: bool = False) -> Point:
    for key in settings:
        if key in RESERVED or key.startswith("sweep."):
            raise LabError(f"sweep: {key} cannot be varied; a sweep sets it itself")
    return Point(name, tied(settings, sweep.tie or {}), named)


# -- searches --------------------------------------------------------------------------------------------------------


def search_space(search: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Ranges by dotted key; keys may be written nested.

    Raises:
        LabError: A range that is neither ``low``/``high`` nor ``choices``, or an empty or impossible one.

    """
    space: dict[str, dict[str, Any]] = {}

    def visit(prefix: str, node: Any) -> None:
        if isinstance(node, Mapping) and node.keys() & {"low", "high", "choices"}:
            space[prefix] = _range(prefix, dict(node))
        elif isinstance(node, Mapping) and node:
            for key, inner in node.items():
                visit(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            raise LabError(f"sweep.search: {prefix} needs {{low: ..., high: ...}} or {{choices: [...]}}")

    if search:
        visit("", search)
    return space


def _range(key: str, given: dict[str, Any]) -> dict[str, Any]:
    wrong = LabError(f"sweep.search: {key} needs {{low: ..., high: ...}} (with log or step) or {{choices: [...]}}")
    if "choices" in given:
        if set(given) != {"choices"} or not isinstance(given["choices"], list) or not given["choices"]:
            raise wrong
        return given
    if not {"low", "high"} <= set(given) <= {"low", "high", "log", "step"}:
        raise wrong
    for bound in given.keys() - {"log"}:
        if isinstance(given[bound], bool) or not isinstance(given[bound], int):  # YAML reads 1e-5 as text
            try:
                given[bound] = float(given[bound])
            except (TypeError, ValueError):
                raise wrong from None
        if not math.isfinite(given[bound]):
            raise wrong
    if not given["low"] < given["high"] or (given.get("log") and given["low"] <= 0):
        raise LabError(f"sweep.search: {key}: low must be below high, and above 0 with log")
    if "step" in given and (given.get("log") or given["step"] <= 0):
        raise LabError(f"sweep.search: {key}: step must be above 0, and excludes log")
    return given


def search_corners(sweep: SweepSettings, space: Mapping[str, Mapping[str, Any]]) -> list[Point]:
    """Points at the ends of each range and at each choice, to be checked before a search begins."""
    ends = {key: range_.get("choices") or [range_["low"], range_["high"]] for key, range_ in space.items()}
    first = {key: values[0] for key, values in ends.items()}
    varied = [first | {key: value} for key, values in ends.items() for value in values[1:]]
    return [_point("search", settings, sweep) for settings in [first, *varied]]


def draw(trial: optuna.Trial, key: str, range_: Mapping[str, Any]) -> Any:
    """A value for one key, by the study's sampler."""
    if "choices" in range_:  # lists and the like as text: Optuna's choices are single values
        plain = (bool, int, float, str, type(None))
        choices = [c if isinstance(c, plain) else json.dumps(c) for c in range_["choices"]]
        return range_["choices"][choices.index(trial.suggest_categorical(key, choices))]
    low, high, step, log = range_["low"], range_["high"], range_.get("step"), bool(range_.get("log"))
    if isinstance(low, int) and isinstance(high, int) and isinstance(step, int | None):
        return trial.suggest_int(key, low, high, step=step or 1, log=log)
    return trial.suggest_float(key, low, high, step=step, log=log)


def drawn_point(number: int, values: Mapping[str, Any], sweep: SweepSettings) -> Point:
    """The point of a search's trial."""
    return _point(f"trial-{number:03d}", values, sweep)
