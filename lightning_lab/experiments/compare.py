"""Is it real? Two runs on the same held-out conversations: their difference in loss, and how far chance goes.

Both runs are read on every conversation, so what makes a conversation hard for both drops out: a paired bootstrap
(Koehn 2004, "Statistical significance tests for machine translation evaluation") draws conversations with
replacement, each with both losses and its token count, and takes the token-weighted difference of each draw. The
interval is the bias-corrected and accelerated one (BCa; Efron 1987, "Better bootstrap confidence intervals"). Several
comparisons made together are corrected by Bonferroni's inequality (Dunn 1961, "Multiple comparisons among means").

What the interval covers: other conversations, drawn from the same population as the split, under these two trained
adapters. What it does not cover: another seed's run. Training again with the same settings gives other adapters, whose
losses differ as well; whether a *setting* is better takes several seeds. Nor does it cover a checkpoint or a reference
that was chosen on the same split: choose on validation, compare on test.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lightning_lab.errors import LabError
from lightning_lab.experiments.runs import Run, differing_settings

# A bootstrap of few is too narrow, and more so where lengths are skewed. Its 95 % intervals covered the truth of the
# tests' synthetic losses in 76 % of 3,000 draws of 5 conversations, 85 % of 10, 89 % of 20, 92 % of 50, 93 % of 150,
# 94 % of 500 and 95 % of 1,500. From 20 on they err at most about twice as often as they say.
MIN_CONVERSATIONS = 20
BEYOND_EACH_END = 50  # resamples, at least: the end is then known to a seventh of their number (1 / sqrt(50))
BATCH_VALUES = 2**16  # resampled conversations at a time: arrays of 0.5 MiB, whatever the split's size
TOGETHER = 16  # runs that share each draw, which is a third of the time of one run; more would need more memory


@dataclass(frozen=True)
class Interval:
    """A confidence interval, ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Run ``b`` against run ``a`` on one split; losses are token-weighted, nats a token.

    A perplexity and its interval are ``exp`` of a loss and its ends: BCa intervals respect such transformations.

    Attributes:
        a: Name of the reference.
        b: Name of the run that is held against it.
        split: The split.
        conversations: Held-out conversations, the same in both.
        tokens: Their supervised tokens.
        loss_a: Of the reference.
        loss_a_interval: Of one run alone, so wider than what pairing leaves of the difference.
        loss_b: Of the other run.
        loss_b_interval: Likewise.
        difference: ``loss_b - loss_a``; negative: ``b`` is better.
        interval: Of the difference.
        level: Of each interval, after correction, such as 0.9833.
        family_level: Of all comparisons together: with this probability every interval of the difference is right.
        comparisons: How many are made together.

    """

    a: str
    b: str
    split: str
    conversations: int
    tokens: int
    loss_a: float
    loss_a_interval: Interval
    loss_b: float
    loss_b_interval: Interval
    difference: float
    interval: Interval
    level: float
    family_level: float
    comparisons: int

    @property
    def is_real(self) -> bool:
        """Whether the interval of the difference in loss excludes 0."""
        return self.interval.low > 0 or self.interval.high < 0

    @property
    def sentence(self) -> str:
        """The finding in words, with the better run first if one is."""
        low, high, difference = self.interval.low, self.interval.high, self.difference
        decimals = _decimals(low, high)
        if not self.is_real:
            finding = f"no difference can be seen between {self.a} and {self.b}: {difference:z.{decimals}f}"
        else:
            better, worse = (self.b, self.a) if high < 0 else (self.a, self.b)
            if high < 0:
                low, high = -high, -low
            finding = f"{better} is better than {worse} by {abs(difference):.{decimals}f} nats a token"
        sentence = (
            f"{finding}, {100 * self.family_level:g} % interval {low:z.{decimals}f} to {high:z.{decimals}f}, "
            f"{self.conversations:,} conversations"
        )
        return sentence + (f", corrected for {self.comparisons} comparisons" if self.comparisons > 1 else "")

    def record(self) -> dict[str, Any]:
        """All fields, with the intervals as ``{"low": ..., "high": ...}``, and the finding, for JSON."""
        return {**asdict(self), "is_real": self.is_real, "sentence": self.sentence}


def compare(
    a: Run, b: Run, split: str = "test", *, level: float = 0.95, comparisons: int = 1, seed: int = 3407
) -> Comparison:
    """Compare two runs; arguments as `compare_to_first`.

    Raises:
        LabError: A run lacks the split; the two were evaluated on different data, conversations or masks; a run's files
            contradict each other; a loss is not finite; there are fewer than `MIN_CONVERSATIONS`.

    """
    found, refused = compare_to_first([a, b], split, level=level, comparisons=comparisons, seed=seed)
    if refused:
        raise LabError(refused[0])
    return found[0]


def compare_to_first(
    runs: Sequence[Run],
    split: str = "test",
    *,
    level: float = 0.95,
    comparisons: int | None = None,
    seed: int = 3407,
) -> tuple[list[Comparison], list[str]]:
    """Compare every other run with the first.

    Args:
        runs: The reference first. Choose it on validation: chosen on ``split``, its loss there would be too good.
        split: The split, ``test`` unless there is a reason.
        level: Of all comparisons together.
        comparisons: How many are made together, by default those found; each interval is at
            ``1 - (1 - level) / comparisons``.
        seed: Of the resampling.

    Returns:
        One comparison for each run after the first that can be compared, in their order, and why the others cannot.

    Raises:
        LabError: The level or the number of comparisons is none.

    """
    if not 0 < level < 1 or (comparisons is not None and comparisons < 1):
        raise LabError(f"level must lie between 0 and 1 and comparisons be at least 1, got {level} and {comparisons}")
    pairs: list[tuple[Run, np.ndarray, np.ndarray, np.ndarray]] = []
    refused = []
    for run in runs[1:]:
        try:
            pairs.append((run, *_comparable(runs[0], run, split)))
        except (LabError, OSError) as error:
            refused.append(str(error))
    comparisons = comparisons or max(1, len(pairs))
    each = 1 - (1 - level) / comparisons
    found = []
    for start in range(0, len(pairs), TOGETHER):
        part = pairs[start : start + TOGETHER]
        _, reference, _, tokens = part[0]
        first, *others = bootstrap([reference, *(loss for _, _, loss, _ in part)], tokens, level=each, seed=seed)
        losses, differences = others[: len(part)], others[len(part) :]
        for (run, *_), loss, difference in zip(part, losses, differences, strict=True):
            names = runs[0].name, run.name, split, len(tokens), int(tokens.sum())
            found.append(Comparison(*names, *first, *loss, *difference, each, level, comparisons))
    return found, refused


def bootstrap(
    losses: Sequence[np.ndarray], tokens: np.ndarray, *, level: float = 0.95, resamples: int = 9999, seed: int = 3407
) -> list[tuple[float, Interval]]:
    """Token-weighted losses and their differences to the first, with BCa intervals, all from the same resamples.

    Args:
        losses: ``[C]`` float64 of each run, each conversation's mean negative log-likelihood, nats.
        tokens: ``[C]``, its supervised tokens, positive.
        level: Of each interval.
        resamples: At least; more are drawn where the level leaves fewer than `BEYOND_EACH_END` beyond each end.
        seed: Of the resampling.

    Returns:
        Each run's loss, then the difference of each run after the first, nats a token.

    Raises:
        ValueError: There are fewer than two conversations.

    """
    from scipy import stats  # half a second to import

    def statistics(*data: np.ndarray, axis: int = -1) -> np.ndarray:
        *summed, count = [part.sum(axis) for part in data]
        means = [total / count for total in summed]
        return np.stack([*means, *(mean - means[0] for mean in means[1:])])

    # Beyond each end before BCa moves it. The 1e-6: rounding of 1 - level is not to cost a resample.
    resamples = max(resamples, math.ceil(2 * BEYOND_EACH_END / (1 - level) - 1e-6))
    data = (*(loss * tokens for loss in losses), tokens)
    # BCa of a statistic that no resample changes is 0 / 0, of which numpy and SciPy warn; it is dealt with below.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        result = stats.bootstrap(
            data,
            statistics,
            paired=True,
            vectorized=True,
            method="BCa",
            confidence_level=level,
            n_resamples=resamples,
            batch=max(1, BATCH_VALUES // len(tokens)),
            rng=np.random.default_rng(seed),
        )
        tail = (1 - level) / 2
        percentile = np.quantile(result.bootstrap_distribution, [tail, 1 - tail], axis=-1)
    bca = np.stack(result.confidence_interval)
    ends = np.where(np.isnan(bca).any(0), percentile, bca)
    values = statistics(*data).tolist()
    return [(value, Interval(*pair)) for value, pair in zip(values, ends.T.tolist(), strict=True)]


def _comparable(a: Run, b: Run, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses of both runs and tokens of the same conversations, each ``[C]``, by row.

    Raises:
        LabError: They cannot be compared.

    """
    both = f"{a.name} and {b.name} cannot be compared on {split}"
    of_a, of_b = a.examples(split), b.examples(split)
    for run in (a, b):
        if split not in run.evaluations:
            raise LabError(
                f"{run.path / split}.json: not there, but {split}_examples.csv is; evaluate {run.name} again"
            )
        if "data_fingerprint" not in run.evaluations[split]:
            raise LabError(f"{both}: {split}.json of {run.path} lacks data_fingerprint; evaluate it again")
    if a.evaluations[split]["data_fingerprint"] != b.evaluations[split]["data_fingerprint"]:
        settings = [key for key in differing_settings([a, b]) if key.startswith("data.") or key == "model.base"]
        because = f" (they differ in {', '.join(settings)})" if settings else ""
        raise LabError(f"{both}: their data_fingerprint differs, so the data or the tokens are not the same{because}")
    if alone := [
        (run, own.keys() - other) for run, own, other in ((a, of_a, of_b), (b, of_b, of_a)) if own.keys() - other
    ]:
        where = " and ".join(f"{len(rows):,} in {run.name} alone (first row {min(rows)})" for run, rows in alone)
        raise LabError(f"{both}: the conversations differ, {where}; give both the same data.split")
    if differ := [row for row in of_a if of_a[row].tokens != of_b[row].tokens]:
        counts = f"{of_a[differ[0]].tokens:,} supervised tokens in {a.name} and {of_b[differ[0]].tokens:,} in {b.name}"
        raise LabError(f"{both}: their masks differ in {len(differ):,} conversations; row {differ[0]} has {counts}")
    if len(of_a) < MIN_CONVERSATIONS:
        needs = f"a bootstrap over conversations needs at least {MIN_CONVERSATIONS}, the split has {len(of_a)}"
        raise LabError(f"{both}: {needs}")
    for run, examples in ((a, of_a), (b, of_b)):
        for row, example in examples.items():
            if not math.isfinite(example.loss):
                what = f"row {row} of {run.name} has a loss of {example.loss}"
                raise LabError(f"{both}: {what}; train or evaluate it again")
        tokens = sum(example.tokens for example in examples.values())
        loss = sum(example.loss * example.tokens for example in examples.values()) / tokens
        recorded = run.evaluations[split]
        recorded_loss, recorded_tokens = (
            recorded[f"{split.removesuffix('-base')}_loss"],
            recorded.get("supervised_tokens"),
        )
        # Both come from the same float64 sums, so that anything beyond rounding is another evaluation.
        if tokens != recorded_tokens or not math.isclose(loss, recorded_loss, rel_tol=1e-6):
            raise LabError(
                f"{both}: {split}_examples.csv of {run.path} has a loss of {loss:.6f} over {tokens} supervised tokens, "
                f"{split}.json says {recorded_loss:.6f} over {recorded_tokens}; evaluate {run.name} again"
            )
    (loss_a, tokens), (loss_b, _) = (np.array(list(examples.values())).T for examples in (of_a, of_b))
    return loss_a, loss_b, tokens


def _decimals(low: float, high: float) -> int:
    """Decimals, at least four, that show a digit of each end other than 0, and of the width unless it is rounding."""
    width = high - low
    shown = [abs(low), abs(high), width if width > 1e-6 * max(abs(low), abs(high)) else 0.0]
    return max([4, *(-math.floor(math.log10(size)) for size in shown if size > 0)])
