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


@dataclass(frozen=True)
class Interval:
    """A confidence interval, ends included."""

    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Run ``b`` against run ``a`` on one split.

    Attributes:
        a: Name of the reference.
        b: Name of the run that is held against it.
        split: The split.
        conversations: Held-out conversations, the same in both.
        tokens: Their supervised tokens.
        loss_a: Token-weighted, nats a token.
        loss_b: Likewise.
        difference: ``loss_b - loss_a``; negative: ``b`` is better.
        interval: Of the difference.
        perplexity_a: ``exp(loss_a)``, infinite above 709 nats.
        perplexity_b: Likewise.
        perplexity_a_interval: Of one run alone, so wider than what pairing leaves of the difference.
        perplexity_b_interval: Likewise.
        perplexity_difference: ``perplexity_b - perplexity_a``.
        perplexity_difference_interval: Of the paired difference; `is_real` goes by the loss alone. Not a number where
            a perplexity is infinite.
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
    loss_b: float
    difference: float
    interval: Interval
    perplexity_a: float
    perplexity_b: float
    perplexity_a_interval: Interval
    perplexity_b_interval: Interval
    perplexity_difference: float
    perplexity_difference_interval: Interval
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
    a: Run,
    b: Run,
    split: str = "test",
    *,
    level: float = 0.95,
    comparisons: int = 1,
    resamples: int = 9999,
    seed: int = 3407,
) -> Comparison:
    """Compare two runs that were evaluated on the same split.

    Args:
        a: The reference.
        b: The run that is held against it.
        split: The split, ``test`` unless there is a reason.
        level: Of all comparisons together.
        comparisons: How many are made together; each interval is at ``1 - (1 - level) / comparisons``.
        resamples: Of the bootstrap, at least; more are drawn where the level leaves fewer than `BEYOND_EACH_END`
            beyond each end of the interval.
        seed: Of the resampling.

    Raises:
        LabError: A run lacks the split; the two were evaluated on different data, conversations or masks; a run's files
            contradict each other; a loss is not finite; there are fewer than `MIN_CONVERSATIONS`.

    """
    if not 0 < level < 1 or comparisons < 1:
        raise LabError(f"level must lie between 0 and 1 and comparisons be at least 1, got {level} and {comparisons}")
    rows, loss_a, tokens = _sorted_examples(a, split)
    rows_b, loss_b, tokens_b = _sorted_examples(b, split)
    both = f"{a.name} and {b.name} cannot be compared on {split}"

    fingerprints = [run.evaluations[split].get("data_fingerprint") for run in (a, b)]
    if None in fingerprints:
        raise LabError(
            f"{both}: {split}.json of {(a, b)[fingerprints.index(None)].path} lacks data_fingerprint; evaluate it again"
        )
    if fingerprints[0] != fingerprints[1]:
        settings = [key for key in differing_settings([a, b]) if key.startswith("data.") or key == "model.base"]
        because = f" (they differ in {', '.join(settings)})" if settings else ""
        raise LabError(f"{both}: their data_fingerprint differs, so the data or the tokens are not the same{because}")
    if not np.array_equal(rows, rows_b):
        only_a, only_b = np.setdiff1d(rows, rows_b), np.setdiff1d(rows_b, rows)
        alone = [
            f"{len(only):,} in {run.name} alone (first row {only[0]})"
            for run, only in ((a, only_a), (b, only_b))
            if len(only)
        ]
        raise LabError(f"{both}: the conversations differ, {' and '.join(alone)}; give both the same data.split")
    if (differ := np.flatnonzero(tokens != tokens_b)).size:
        i = differ[0]
        raise LabError(
            f"{both}: their masks differ in {len(differ):,} conversations; row {rows[i]} has {tokens[i]:,} supervised "
            f"tokens in {a.name} and {tokens_b[i]:,} in {b.name}"
        )
    for run, loss in ((a, loss_a), (b, loss_b)):
        if (bad := np.flatnonzero(~np.isfinite(loss))).size:
            raise LabError(
                f"{both}: row {rows[bad[0]]} of {run.name} has a loss of {loss[bad[0]]}; train or evaluate it again"
            )
        _check_totals(run, split, loss, tokens, both)
    if len(rows) < MIN_CONVERSATIONS:
        raise LabError(
            f"{both}: a bootstrap over conversations needs at least {MIN_CONVERSATIONS}, the split has {len(rows)}"
        )

    each = 1 - (1 - level) / comparisons
    estimates, intervals = _bootstrap(loss_a * tokens, loss_b * tokens, tokens, each, resamples, seed)
    # BCa respects transformations (Efron 1987), so a perplexity's interval is that of the loss through exp.
    with np.errstate(over="ignore"):
        perplexities = [float(np.exp(loss)) for loss in estimates[1:3]]
        perplexity_intervals = [Interval(*np.exp([ends.low, ends.high]).tolist()) for ends in intervals[1:3]]
    return Comparison(
        a=a.name,
        b=b.name,
        split=split,
        conversations=len(rows),
        tokens=int(tokens.sum()),
        loss_a=estimates[1],
        loss_b=estimates[2],
        difference=estimates[0],
        interval=intervals[0],
        perplexity_a=perplexities[0],
        perplexity_b=perplexities[1],
        perplexity_a_interval=perplexity_intervals[0],
        perplexity_b_interval=perplexity_intervals[1],
        perplexity_difference=estimates[3],
        perplexity_difference_interval=intervals[3],
        level=each,
        family_level=level,
        comparisons=comparisons,
    )


def compare_to_best(
    runs: Sequence[Run], split: str = "test", *, level: float = 0.95, resamples: int = 9999, seed: int = 3407
) -> list[Comparison]:
    """Compare every other run with the first, all intervals together at ``level``.

    Args:
        runs: The reference first. Choose it on validation: chosen on ``split``, its loss there would be too good.
        split: The split.
        level: Of all comparisons together.
        resamples: Of each bootstrap, at least.
        seed: Of the resampling.

    Returns:
        One comparison for each run after the first, in their order.

    Raises:
        LabError: As `compare`.

    """
    return [
        compare(runs[0], run, split, level=level, comparisons=len(runs) - 1, resamples=resamples, seed=seed)
        for run in runs[1:]
    ]


def bootstrap_difference(
    nll_a: np.ndarray, nll_b: np.ndarray, tokens: np.ndarray, *, level: float, resamples: int, seed: int
) -> tuple[float, Interval]:
    """Token-weighted difference in loss and its paired BCa interval.

    Args:
        nll_a: ``[C]`` float64, each conversation's summed negative log-likelihood under ``a``, nats.
        nll_b: ``[C]`` float64, likewise under ``b``.
        tokens: ``[C]``, its supervised tokens, positive.
        level: Of the interval.
        resamples: Drawn, at least; see `compare`.
        seed: Of the resampling.

    Returns:
        ``(sum(nll_b) - sum(nll_a)) / sum(tokens)``, nats a token, and its interval.

    Raises:
        ValueError: There are fewer than two conversations.

    """
    estimates, intervals = _bootstrap(nll_a, nll_b, tokens, level, resamples, seed)
    return estimates[0], intervals[0]


def _bootstrap(
    nll_a: np.ndarray, nll_b: np.ndarray, tokens: np.ndarray, level: float, resamples: int, seed: int
) -> tuple[list[float], list[Interval]]:
    """Difference in loss, loss of ``a``, loss of ``b``, difference in perplexity, all from the same resamples."""
    from scipy.stats import bootstrap  # half a second to import

    def statistics(nll_a: np.ndarray, nll_b: np.ndarray, tokens: np.ndarray, axis: int = -1) -> np.ndarray:
        total = tokens.sum(axis)
        a, b = nll_a.sum(axis) / total, nll_b.sum(axis) / total
        return np.stack([b - a, a, b, np.exp(b) - np.exp(a)])

    # Beyond each end before BCa moves it. The 1e-6: rounding of 1 - level is not to cost a resample.
    resamples = max(resamples, math.ceil(2 * BEYOND_EACH_END / (1 - level) - 1e-6))
    data = (nll_a, nll_b, tokens)
    # BCa of a statistic that no resample changes is 0 / 0, of which numpy and SciPy warn; it is dealt with below.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        estimates = statistics(*data)
        result = bootstrap(
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
    return estimates.tolist(), [Interval(low, high) for low, high in ends.T.tolist()]


def _sorted_examples(run: Run, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, mean losses and supervised tokens of a split's conversations, each ``[C]``, by row."""
    examples = run.examples(split)
    if split not in run.evaluations:
        raise LabError(f"{run.path / split}.json: not there, but {split}_examples.csv is; evaluate {run.name} again")
    order = np.argsort(examples.rows, kind="stable")
    rows, tokens = examples.rows[order], examples.tokens[order]
    file = run.path / f"{split}_examples.csv"
    if (twice := rows[1:][rows[1:] == rows[:-1]]).size:
        raise LabError(f"{file}: row {twice[0]} comes twice; evaluate {run.name} again")
    if (empty := rows[tokens < 1]).size:
        raise LabError(f"{file}: row {empty[0]} has no supervised tokens; evaluate {run.name} again")
    return rows, examples.loss[order], tokens


def _check_totals(run: Run, split: str, loss: np.ndarray, tokens: np.ndarray, both: str) -> None:
    """Refuse a CSV and a JSON of different evaluations, as an interrupted one leaves them."""
    evaluation = run.evaluations[split]
    counted, recorded = int(tokens.sum()), evaluation.get("supervised_tokens")
    if counted != recorded:
        raise LabError(
            f"{both}: {split}_examples.csv of {run.path} holds {counted:,} supervised tokens, {split}.json says "
            f"{recorded}; evaluate {run.name} again"
        )
    mean, recorded_loss = float((loss * tokens).sum()) / counted, evaluation[f"{split.removesuffix('-base')}_loss"]
    # Both come from the same float64 sums, so that anything beyond rounding is another evaluation.
    if not math.isclose(mean, recorded_loss, rel_tol=1e-6):
        raise LabError(
            f"{both}: {split}_examples.csv of {run.path} has a loss of {mean:.6f}, {split}.json says "
            f"{recorded_loss:.6f}; evaluate {run.name} again"
        )


def _decimals(low: float, high: float) -> int:
    """Decimals, at least four, that show a digit of each end other than 0, and of the width unless it is rounding."""
    width = high - low
    shown = [abs(low), abs(high), width if width > 1e-6 * max(abs(low), abs(high)) else 0.0]
    return max([4, *(-math.floor(math.log10(size)) for size in shown if size > 0)])
