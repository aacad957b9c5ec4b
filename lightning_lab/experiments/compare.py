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

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lightning_lab.errors import LabError
from lightning_lab.experiments.runs import Run, differing_settings
from lightning_lab.rundir import WEIGHTED, is_weighted

# A bootstrap of few is too narrow, and more so where lengths are skewed. Its 95 % intervals covered the truth of the
# tests' synthetic losses in 76 % of 3,000 draws of 5 conversations, 85 % of 10, 89 % of 20, 92 % of 50, 93 % of 150,
# 94 % of 500 and 95 % of 1,500. From 20 on they err at most about twice as often as they say.
MIN_CONVERSATIONS = 20
BEYOND_EACH_END = 50  # resamples, at least: the end is then known to a seventh of their number (1 / sqrt(50))
TOGETHER = 16  # runs that share resamples, with 16 bytes each for every one of them
BATCH_VALUES = 2**16  # resampled conversations at a time: arrays of 0.5 MiB, whatever the split's size
RESAMPLING_SEED = 3407
LEVEL = 0.95  # of all comparisons together


@dataclass(frozen=True)
class Interval:
    """A confidence interval, ends included; a format is that of its ends."""

    low: float
    high: float

    def __format__(self, form: str) -> str:
        return f"{self.low:{form}} to {self.high:{form}}"


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
        interval = self.interval
        finding = f"no difference can be seen between {self.a} and {self.b}: {self.difference:z#.3g}"
        if self.is_real:
            better, worse = self.a, self.b
            if interval.high < 0:
                better, worse, interval = self.b, self.a, Interval(-interval.high, -interval.low)
            finding = f"{better} is better than {worse} by {abs(self.difference):#.3g} nats a token"
        level = f"{100 * self.family_level:g} % interval {interval:z#.3g}, {self.conversations:,} conversations"
        return f"{finding}, {level}" + f", corrected for {self.comparisons} comparisons" * (self.comparisons > 1)

    def record(self) -> dict[str, Any]:
        """All fields, with the intervals as ``{"low": ..., "high": ...}``, and the finding, for JSON."""
        return {**asdict(self), "is_real": self.is_real, "sentence": self.sentence}


def compare(
    runs: Sequence[Run], split: str = "test", *, comparisons: int | None = None
) -> tuple[list[Comparison], list[str]]:
    """Compare every other run with the first.

    Args:
        runs: The reference first. Choose it on validation: chosen on ``split``, its loss there would be too good.
        split: The split, ``test`` unless there is a reason.
        comparisons: How many are made together, by default those found; each interval is at
            ``1 - (1 - LEVEL) / comparisons``.

    Returns:
        One comparison for each run after the first that can be compared, in their order, and why the others cannot.

    Raises:
        LabError: The number of comparisons is none.

    """
    if comparisons is not None and comparisons < 1:
        raise LabError(f"comparisons must be at least 1, got {comparisons}")
    pairs, refused = [], []
    for run in runs[1:]:
        try:
            pairs.append((run.name, *_paired(runs[0], run, split)))
        except (LabError, OSError) as error:
            refused.append(str(error))
    comparisons = comparisons or max(1, len(pairs))
    level = 1 - (1 - LEVEL) / comparisons
    found = []
    for start in range(0, len(pairs), TOGETHER):
        names, (loss_a, *_), losses, (tokens, *_), (weight, *_) = zip(*pairs[start : start + TOGETHER], strict=True)
        a, *others = bootstrap([loss_a, *losses], weight, level=level)
        sizes = len(tokens), int(tokens.sum())
        for name, b, difference in zip(names, others[::2], others[1::2], strict=True):
            found.append(Comparison(runs[0].name, name, split, *sizes, *a, *b, *difference, level, LEVEL, comparisons))
    return found, list(dict.fromkeys(refused))  # what the reference lacks is said once


def bootstrap(
    losses: Sequence[np.ndarray], tokens: np.ndarray, *, level: float = LEVEL, resamples: int = 9999
) -> list[tuple[float, Interval]]:
    """Token-weighted losses of runs and their differences, with BCa intervals, all from the same resamples.

    Args:
        losses: ``[C]`` float64 of the reference and of each other run, each conversation's mean negative
            log-likelihood, nats.
        tokens: ``[C]``, its supervised tokens or the sum of their weights, positive.
        level: Of each interval.
        resamples: At least; more are drawn where the level leaves fewer than `BEYOND_EACH_END` beyond each end.

    Returns:
        The reference's loss; then of each other run its loss, and that less the reference's, nats a token.

    Raises:
        ValueError: There are fewer than two conversations.

    """
    from scipy import stats  # half a second to import

    def statistics(conversations: np.ndarray, axis: int = -1) -> np.ndarray:
        count = tokens.take(conversations).sum(axis)
        reference, *others = (nll.take(conversations).sum(axis) / count for nll in sums)
        return np.stack([reference, *(figure for mean in others for figure in (mean, mean - reference))])

    # Beyond each end before BCa moves it. The 1e-6: rounding of 1 - level is not to cost a resample.
    resamples = max(resamples, math.ceil(2 * BEYOND_EACH_END / (1 - level) - 1e-6))
    sums = [loss * tokens for loss in losses]
    conversations = np.arange(len(tokens))
    # BCa of a statistic that no resample changes is 0 / 0, of which numpy and SciPy warn; it is dealt with below.
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        result = stats.bootstrap(
            (conversations,),
            statistics,
            method="BCa",
            confidence_level=level,
            n_resamples=resamples,
            batch=max(1, BATCH_VALUES // len(tokens)),
            rng=np.random.default_rng(RESAMPLING_SEED),
        )
        tail = (1 - level) / 2
        percentile = np.quantile(result.bootstrap_distribution, [tail, 1 - tail], axis=-1)
    bca = np.stack(result.confidence_interval)
    ends = np.where(np.isnan(bca).any(0), percentile, bca)
    values = statistics(conversations).tolist()
    return [(value, Interval(*pair)) for value, pair in zip(values, ends.T.tolist(), strict=True)]


def _paired(a: Run, b: Run, split: str) -> tuple[np.ndarray, ...]:
    """Losses of both runs, tokens and weights of the same conversations, each ``[C]``, by row.

    Raises:
        LabError: They cannot be compared.

    """
    both = f"{a.name} and {b.name} cannot be compared on {split}"
    examples = ([example[:4] for example in run.examples(split)] for run in (a, b))
    (rows_a, loss_a, *own_a), (rows_b, loss_b, *own_b) = (np.reshape(own, (-1, 4)).T for own in examples)
    prints = [run.evaluations.get(split, {}).get("data_fingerprint") for run in (a, b)]
    if None in prints or prints[0] != prints[1]:
        settings = [key for key in differing_settings([a, b]) if key.startswith("data.") or key == "model.base"]
        because = f" (they differ in {', '.join(settings)})" if settings else ""
        what = "their data_fingerprint is missing or differs, so the data or the tokens are not the same"
        raise LabError(f"{both}: {what}{because}; evaluate both on the same data")
    if len({is_weighted(run.evaluations.get(split, {})) for run in (a, b)}) > 1:
        raise LabError(f"{both}: the loss of one is weighted; evaluate both under the same model.{WEIGHTED}")
    if differ := set(zip(rows_a, *own_a, strict=True)) ^ set(zip(rows_b, *own_b, strict=True)):
        what = f"their conversations or masks differ, first in row {min(differ)[0]:.0f}"
        raise LabError(f"{both}: {what}; give both the same data.split and data.mask")
    if len(rows_a) < MIN_CONVERSATIONS:
        needs = f"a bootstrap over conversations needs at least {MIN_CONVERSATIONS}, the split has {len(rows_a)}"
        raise LabError(f"{both}: {needs}")
    return loss_a, loss_b, *own_a
