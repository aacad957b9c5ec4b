"""Whether a difference between two runs is real, against losses whose difference is known."""

import csv
import json
import re
import subprocess
import sys
import tracemalloc
import warnings
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_lab.errors import LabError
from lightning_lab.experiments import compare as module
from lightning_lab.experiments.compare import BEYOND_EACH_END, MIN_CONVERSATIONS, Comparison, Interval, bootstrap
from lightning_lab.experiments.runs import Run

# -- losses whose difference is known ------------------------------------------------------------------------------

MU, SIGMA = 5.0, 0.6  # of the log of the lengths: median 148 tokens, mean 178
AT_MEDIAN, PER_LOG_LENGTH, NOISE = -0.02, 0.02, 0.03  # nats a token: longer conversations gain less


def draw(rng: np.random.Generator, conversations: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Summed NLL under a and b, and tokens: lengths lognormal and rounded up, differences skewed and tied to them."""
    tokens = np.ceil(rng.lognormal(MU, SIGMA, conversations))
    loss_a = rng.gamma(4.0, 0.3, conversations)  # hard and easy ones: sd 0.6, of which pairing is to be rid
    noise = NOISE * (rng.gamma(2.0, 1.0, conversations) - 2.0) / np.sqrt(2.0)
    difference = AT_MEDIAN + PER_LOG_LENGTH * (np.log(tokens) - MU) + noise
    return loss_a * tokens, (loss_a + difference) * tokens, tokens


def bootstrap_difference(
    nll_a: np.ndarray, nll_b: np.ndarray, tokens: np.ndarray, **options: Any
) -> tuple[float, Interval]:
    """The difference of two runs alone."""
    return bootstrap([nll_a / tokens, nll_b / tokens], tokens, **options)[-1]


def true_differences() -> tuple[float, float]:
    """The population's token-weighted difference, and the unweighted one, by summing over every length."""
    normal = NormalDist(MU, SIGMA)
    length = np.arange(1, 100_000)  # beyond it lies 2e-16 of the conversations
    cdf = np.array([0.0, *map(normal.cdf, np.log(length))])
    share = np.diff(cdf)
    difference = AT_MEDIAN + PER_LOG_LENGTH * (np.log(length) - MU)
    weighted = (share * length * difference).sum() / (share * length).sum()
    return float(weighted), float((share * difference).sum())


def coverage(draws: int, conversations: int, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """Share of draws whose interval holds the true token-weighted difference, and share that hold the unweighted."""
    rng = np.random.default_rng(seed)
    truths = true_differences()
    covered = np.zeros(2)
    for _ in range(draws):
        _, interval = bootstrap_difference(*draw(rng, conversations), level=level, resamples=999)
        covered += [interval.low <= truth <= interval.high for truth in truths]
    weighted, unweighted = covered / draws
    return weighted, unweighted


def test_the_known_difference_is_that_of_an_enormous_sample() -> None:
    nll_a, nll_b, tokens = draw(np.random.default_rng(1), 4_000_000)
    weighted, unweighted = true_differences()
    # sd of the mean of 4 million differences of sd 0.034, weighted by lengths: 3e-5
    assert (nll_b - nll_a).sum() / tokens.sum() == pytest.approx(weighted, abs=1.5e-4)
    assert ((nll_b - nll_a) / tokens).mean() == pytest.approx(unweighted, abs=1e-4)
    assert weighted - unweighted == pytest.approx(PER_LOG_LENGTH * SIGMA**2, rel=0.02)  # what continuous lengths give


def test_95_percent_intervals_cover_the_known_difference_in_95_percent_of_draws() -> None:
    weighted, unweighted = coverage(1000, 300)
    assert 0.92 <= weighted <= 0.98, weighted
    assert unweighted < 0.15, unweighted  # the test tells a token-weighted difference from a mean over conversations


def test_80_percent_intervals_cover_less() -> None:
    weighted, _ = coverage(300, 300, level=0.8)
    assert 0.72 <= weighted <= 0.87, weighted  # binomial sd of 300 draws: 0.023


# -- the bootstrap -----------------------------------------------------------------------------------------------------


def numpy_percentile(nll_a: np.ndarray, nll_b: np.ndarray, tokens: np.ndarray, level: float) -> np.ndarray:
    """Ends of the plain percentile interval, from 10,000 resamples drawn as how often each conversation comes."""
    size = len(tokens)
    times = np.random.default_rng(99).multinomial(size, np.full(size, 1 / size), 10_000)
    return np.quantile((times @ (nll_b - nll_a)) / (times @ tokens), [(1 - level) / 2, (1 + level) / 2])


def numpy_bca(nll_a: np.ndarray, nll_b: np.ndarray, tokens: np.ndarray, level: float) -> np.ndarray:
    """Ends of the BCa interval as Efron and Tibshirani (1993) give it in equations 14.9 to 14.15."""
    drawn = np.random.default_rng(98).integers(0, len(tokens), (40_000, len(tokens)))
    d = nll_b - nll_a
    theta = d.sum() / tokens.sum()
    resampled = d[drawn].sum(1) / tokens[drawn].sum(1)
    without_one = (d.sum() - d) / (tokens.sum() - tokens)
    influence = without_one.mean() - without_one
    acceleration = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    normal = NormalDist()
    bias = normal.inv_cdf((resampled < theta).mean())
    points = []
    for z in (normal.inv_cdf((1 - level) / 2), normal.inv_cdf((1 + level) / 2)):
        points.append(normal.cdf(bias + (bias + z) / (1 - acceleration * (bias + z))))
    return np.quantile(resampled, points)


@pytest.mark.parametrize("level", [0.8, 0.95])
def test_a_plain_percentile_bootstrap_agrees(level: float) -> None:
    data = draw(np.random.default_rng(5), 2000)  # enough for BCa to correct little
    difference, interval = bootstrap_difference(*data, level=level, resamples=20_000)
    low, high = numpy_percentile(*data, level)
    # Monte Carlo sd of an end: 0.007 of the width at 95 %, 0.006 at 80 %
    assert [interval.low, interval.high] == pytest.approx([low, high], abs=0.05 * (high - low))
    assert difference == pytest.approx((data[1] - data[0]).sum() / data[2].sum(), abs=1e-12)


def test_the_interval_is_bias_corrected_and_accelerated() -> None:
    rng = np.random.default_rng(6)
    tokens = np.ceil(rng.lognormal(5, 0.3, 60))
    loss = rng.gamma(4.0, 0.3, 60)
    data = loss * tokens, (loss + rng.lognormal(-4, 1.2, 60)) * tokens, tokens
    _, interval = bootstrap_difference(*data, level=0.95, resamples=40_000)
    low, high = numpy_bca(*data, 0.95)
    assert [interval.low, interval.high] == pytest.approx([low, high], abs=0.02 * (high - low))
    plain = numpy_percentile(*data, 0.95)
    assert interval.high - plain[1] > 0.04 * (high - low)  # skewed to the right: the percentile interval stops short


def test_pairing_sees_what_two_intervals_would_not() -> None:
    nll_a, nll_b, tokens = draw(np.random.default_rng(7), 300)
    _, paired = bootstrap_difference(nll_a, nll_b, tokens, level=0.95, resamples=2000)
    _, unpaired = bootstrap_difference(nll_a[::-1], nll_b, tokens, level=0.95, resamples=2000)
    assert paired.high - paired.low < 0.2 * (unpaired.high - unpaired.low)


@pytest.mark.parametrize(("level", "asked"), [(0.95, 100), (0.95, 9999), (1 - 0.05 / 3, 999), (1 - 0.05 / 40, 9999)])
def test_fifty_resamples_lie_beyond_each_end(monkeypatch: pytest.MonkeyPatch, level: float, asked: int) -> None:
    import scipy.stats

    seen: dict[str, Any] = {}
    original = scipy.stats.bootstrap
    monkeypatch.setattr(
        scipy.stats, "bootstrap", lambda *args, **kwargs: seen.update(kwargs) or original(*args, **kwargs)
    )
    bootstrap_difference(*draw(np.random.default_rng(8), 30), level=level, resamples=asked)
    assert seen["n_resamples"] >= asked
    assert seen["n_resamples"] * (1 - level) / 2 == pytest.approx(50, abs=0.03) or seen["n_resamples"] == asked
    assert seen["n_resamples"] * (1 - level) / 2 > 49.999
    assert BEYOND_EACH_END == 50


def test_memory_does_not_grow_with_the_split() -> None:
    data = draw(np.random.default_rng(9), 4000)
    bootstrap_difference(*(part[:50] for part in data), level=0.95, resamples=2000)  # what imports take
    tracemalloc.start()
    bootstrap_difference(*data, level=0.95, resamples=2000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * 2**20  # 2,000 resamples at once would be 61 MiB an array, the jackknife's indices 122 MiB


def test_the_batch_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    data = draw(np.random.default_rng(10), 200)
    results = []
    for values in (1, 1000, 10**7):
        monkeypatch.setattr(module, "BATCH_VALUES", values)
        results.append(bootstrap_difference(*data, level=0.95, resamples=2000))
    assert results[0] == results[1] == results[2]


def test_importing_it_is_light() -> None:
    code = "import sys, lightning_lab.experiments.compare; assert not {'scipy', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), conversations=st.integers(20, 80), level=st.floats(0.5, 0.99))
def test_swapping_mirrors_the_interval(seed: int, conversations: int, level: float) -> None:
    nll_a, nll_b, tokens = draw(np.random.default_rng(seed), conversations)
    difference, interval = bootstrap_difference(nll_a, nll_b, tokens, level=level, resamples=500)
    swapped, mirrored = bootstrap_difference(nll_b, nll_a, tokens, level=level, resamples=500)
    # at a tie with the estimate, rounding may move one resample in at least 500 across it
    width = interval.high - interval.low
    assert swapped == -difference
    assert [-mirrored.high, -mirrored.low] == pytest.approx([interval.low, interval.high], abs=0.02 * width)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32), factor=st.integers(2, 50))
def test_only_the_proportions_of_the_token_counts_matter(seed: int, factor: int) -> None:
    nll_a, nll_b, tokens = draw(np.random.default_rng(seed), 40)
    once = bootstrap_difference(nll_a, nll_b, tokens, level=0.9, resamples=500)
    many = bootstrap_difference(factor * nll_a, factor * nll_b, factor * tokens, level=0.9, resamples=500)
    width = once[1].high - once[1].low
    assert many[0] == pytest.approx(once[0], abs=1e-12)
    assert [many[1].low, many[1].high] == pytest.approx([once[1].low, once[1].high], abs=0.02 * width)


# -- run directories ---------------------------------------------------------------------------------------------------

ROWS = np.arange(100, 400)


def losses(seed: int = 0, better_by: float = 0.0, conversations: int = 300) -> tuple[np.ndarray, np.ndarray]:
    """Mean losses and tokens; the same conversations for every seed, which is that of how the run scatters on them."""
    shared = np.random.default_rng(12)
    tokens = np.ceil(shared.lognormal(MU, SIGMA, conversations)).astype(int)
    loss = shared.gamma(4.0, 0.3, conversations) + 0.1
    scatter = np.random.default_rng(seed).normal(0.0, 0.02, conversations) if seed else 0.0
    return loss + scatter - better_by, tokens


def write_run(
    path: Path,
    loss: np.ndarray,
    tokens: np.ndarray,
    rows: np.ndarray | None = None,
    split: str = "test",
    config: dict[str, Any] | None = None,
    **changes: Any,
) -> Run:
    """A run directory as `fit` and `test` leave it, as far as a comparison reads it; ``changes`` go into its JSON."""
    path.mkdir(parents=True)
    config = config or {"model": {"base": "tiny", "lr": 2e-4}, "data": {"template": "llama-3.1", "max_length": 2048}}
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    mean = float((loss * tokens).sum() / tokens.sum())
    record = {
        f"{split}_loss": mean,
        f"{split}_perplexity": float(np.exp(min(mean, 700))),
        f"{split}_token_accuracy": 0.5,
        "conversations": len(loss),
        "supervised_tokens": int(tokens.sum()),
        "data_fingerprint": "4d1f",
    } | changes
    record = {key: value for key, value in record.items() if value is not None}
    (path / f"{split}.json").write_text(json.dumps(record))
    rows = ROWS[: len(loss)] if rows is None else rows
    with (path / f"{split}_examples.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "loss", "supervised_tokens"])
        writer.writerows(zip(rows.tolist(), map(repr, loss.tolist()), tokens.tolist(), strict=True))
    return Run(path)


def compare(a: Run, b: Run, split: str = "test", **options: Any) -> Comparison:
    """One pair, which is not refused."""
    (found,), refused = module.compare([a, b], split, **options)
    assert not refused
    return found


def refusal(a: Run, b: Run) -> str:
    """Why two runs cannot be compared."""
    found, (line,) = module.compare([a, b])
    assert not found
    assert "\n" not in line
    return line


def test_the_difference_is_token_weighted(tmp_path: Path) -> None:
    tokens = np.array([1] * 10 + [3] * 10)
    b = np.array([0.9] * 10 + [1.2] * 10)
    comparison = compare(write_run(tmp_path / "a", np.ones(20), tokens), write_run(tmp_path / "b", b, tokens))
    # 10 tokens better by 0.1 and 30 worse by 0.2, of 40
    assert comparison.difference == pytest.approx(0.125)
    assert comparison.loss_a == pytest.approx(1.0)
    assert comparison.loss_b == pytest.approx(1.125)
    assert comparison.loss_a_interval == Interval(pytest.approx(1.0), pytest.approx(1.0))
    # a resample that has k of the long ones: (-0.1 (20 - k) + 0.6 k) / (20 + 2 k); k is binomial(20, 1/2), whose
    # middle 95 % are 6 to 14
    assert comparison.interval.low == pytest.approx((0.7 * 6 - 2) / (20 + 2 * 6), abs=0.02)
    assert comparison.interval.high == pytest.approx((0.7 * 14 - 2) / (20 + 2 * 14), abs=0.02)
    assert (comparison.conversations, comparison.tokens, comparison.a, comparison.b) == (20, 40, "a", "b")
    assert (comparison.level, comparison.family_level, comparison.comparisons) == (0.95, 0.95, 1)


def test_all_intervals_agree_with_numpy(tmp_path: Path) -> None:
    (loss_a, tokens), (loss_b, _) = losses(1), losses(2, better_by=0.01)
    comparison = compare(write_run(tmp_path / "a", loss_a, tokens), write_run(tmp_path / "b", loss_b, tokens))
    drawn = np.random.default_rng(97).integers(0, 300, (20_000, 300))
    a, b = ((loss * tokens)[drawn].sum(1) / tokens[drawn].sum(1) for loss in (loss_a, loss_b))
    for interval, resampled in (
        (comparison.interval, b - a),
        (comparison.loss_a_interval, a),
        (comparison.loss_b_interval, b),
    ):
        low, high = np.quantile(resampled, [0.025, 0.975])
        assert [interval.low, interval.high] == pytest.approx([low, high], abs=0.1 * (high - low))  # BCa and chance
    core = bootstrap([loss_a, loss_b], tokens)
    assert core == [
        (comparison.loss_a, comparison.loss_a_interval),
        (comparison.loss_b, comparison.loss_b_interval),
        (comparison.difference, comparison.interval),
    ]


def test_a_real_difference_is_found_and_said(tmp_path: Path) -> None:
    a = write_run(tmp_path / "lr3e-4_r16", *losses(1))
    b = write_run(tmp_path / "lr3e-4_r32", *losses(2, better_by=0.02))
    comparison, swapped = compare(a, b), compare(b, a)
    assert comparison.is_real
    assert swapped.is_real
    assert comparison.difference < 0 < swapped.difference
    assert swapped.interval.low > 0
    number = r"(0\.0\d{3,4})"
    sentence = (
        rf"lr3e-4_r32 is better than lr3e-4_r16 by {number} nats a token, "
        rf"95 % interval {number} to {number}, 300 conversations"
    )
    for found in (comparison, swapped):
        numbers = re.fullmatch(sentence, found.sentence)
        assert numbers, found.sentence
        by, low, high = map(float, numbers.groups())
        assert by == pytest.approx(abs(found.difference), rel=6e-3)
        assert [low, high] == pytest.approx(sorted([abs(found.interval.low), abs(found.interval.high)]), rel=6e-3)
        assert low < by < high


def test_no_difference_is_found_where_there_is_none(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "X", *losses(1)), write_run(tmp_path / "Y", *losses(3))
    comparison = compare(a, b)
    assert not comparison.is_real
    assert comparison.interval.low < 0 < comparison.interval.high
    number = r"0\.\d{4,6}"
    sentence = (
        rf"no difference can be seen between X and Y: -?{number}, 95 % interval -{number} to {number}, 300 conv.*"
    )
    assert re.fullmatch(sentence, comparison.sentence)


def test_sentences() -> None:
    base = made(-0.0003, -0.0012, 0.0007)
    assert base.sentence == (
        "no difference can be seen between X and Y: -0.000300, 95 % interval -0.00120 to 0.000700, 1,500 conversations"
    )
    assert made(-0.008, -0.01, -0.006).sentence == (
        "Y is better than X by 0.00800 nats a token, 95 % interval 0.00600 to 0.0100, 1,500 conversations"
    )
    assert made(0.008, 0.006, 0.01, comparisons=3, level=1 - 0.05 / 3).sentence == (
        "X is better than Y by 0.00800 nats a token, 95 % interval 0.00600 to 0.0100, 1,500 conversations, "
        "corrected for 3 comparisons"
    )
    assert "99.9 % interval" in made(0.1, -0.1, 0.2, family_level=0.999).sentence


def made(difference: float, low: float, high: float, **changes: Any) -> Comparison:
    nothing = Interval(0.0, 0.0)
    comparison = Comparison(
        "X", "Y", "test", 1500, 10**6, 1.0, nothing, 1.0 + difference, nothing, difference, Interval(low, high),
        0.95, 0.95, 1,
    )  # fmt: skip
    return replace(comparison, **changes)


@given(st.floats(-1, 1), st.floats(1e-9, 1), st.floats(0.01, 0.99))
def test_the_sentence_never_prints_an_end_as_zero(low: float, width: float, at: float) -> None:
    comparison = made(low + at * width, low, low + width)
    printed = [float(x) for x in re.search(r"interval (\S+) to (\S+),", comparison.sentence).groups()]  # type: ignore[union-attr]
    ends = [comparison.interval.low, comparison.interval.high]
    if comparison.is_real and ends[0] < 0:
        ends = [-ends[1], -ends[0]]
    for end, shown in zip(ends, printed, strict=True):
        assert (end > 0) == (shown > 0)
        assert (end < 0) == (shown < 0)
        assert shown == pytest.approx(end, rel=5.1e-3)


def test_equal_runs_differ_by_nothing_and_nobody_is_warned(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", *losses(1)), write_run(tmp_path / "b", *losses(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison = compare(a, b)
    assert comparison.difference == 0
    assert comparison.interval == Interval(0.0, 0.0)
    assert not comparison.is_real
    assert comparison.sentence == (
        "no difference can be seen between a and b: 0.00, 95 % interval 0.00 to 0.00, 300 conversations"
    )
    assert comparison.loss_a_interval.low < comparison.loss_a < comparison.loss_a_interval.high


def test_a_constant_difference_is_real(tmp_path: Path) -> None:
    tokens = np.full(32, 8)  # powers of two and quarters: every resample gives exactly a quarter
    a, b = (write_run(tmp_path / name, np.full(32, loss), tokens) for name, loss in (("a", 2.0), ("b", 1.75)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison = compare(a, b)
    assert comparison.interval == Interval(-0.25, -0.25)
    assert comparison.is_real


def test_a_constant_difference_that_rounds_is_printed_without_the_rounding(tmp_path: Path) -> None:
    loss, tokens = losses(1)
    a, b = write_run(tmp_path / "a", loss, tokens), write_run(tmp_path / "b", loss + 0.1, tokens)
    assert compare(a, b).sentence == (
        "a is better than b by 0.100 nats a token, 95 % interval 0.100 to 0.100, 300 conversations"
    )


def test_a_ruined_run_is_worse_without_warnings(tmp_path: Path) -> None:
    loss, tokens = losses(1)
    a, b = write_run(tmp_path / "a", loss, tokens), write_run(tmp_path / "b", 900 + loss, tokens)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        comparison = compare(a, b)
    assert comparison.sentence.startswith("a is better than b by 9")
    assert comparison.loss_b_interval.low > 900 > 10 > comparison.loss_a_interval.high


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    (loss_a, tokens), (loss_b, _) = losses(1), losses(2)
    a, b = write_run(tmp_path / "a", loss_a, tokens), write_run(tmp_path / "b", loss_b, tokens)
    order = np.random.default_rng(1).permutation(300)
    shuffled = write_run(tmp_path / "other" / "b", loss_b[order], tokens[order], ROWS[order])
    assert compare(a, shuffled) == compare(a, b)
    assert compare(shuffled, a) == compare(b, a)


def test_another_split(tmp_path: Path) -> None:
    a, b = (
        write_run(tmp_path / name, *losses(seed), split="validation-base", validation_loss=mean_of(*losses(seed)),
                  validation_perplexity=1.0, validation_token_accuracy=0.5)
        for name, seed in (("a", 1), ("b", 2))
    )  # fmt: skip
    assert compare(a, b, "validation-base").split == "validation-base"


def mean_of(loss: np.ndarray, tokens: np.ndarray) -> float:
    return float((loss * tokens).sum() / tokens.sum())


def test_bonferroni(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TOGETHER", 2)
    runs = [write_run(tmp_path / f"run{i}", *losses(i + 1, better_by=-0.004 * i)) for i in range(4)]
    found, refused = module.compare(runs)
    assert refused == []
    assert [(c.a, c.b) for c in found] == [("run0", "run1"), ("run0", "run2"), ("run0", "run3")]
    for comparison, run in zip(found, runs[1:], strict=True):
        assert comparison.comparisons == 3
        assert comparison.family_level == 0.95
        assert comparison.level == pytest.approx(0.98333333333)
        assert comparison == compare(runs[0], run, comparisons=3)
        assert " 95 % interval " in comparison.sentence
        assert comparison.sentence.endswith("300 conversations, corrected for 3 comparisons")
        alone = compare(runs[0], run)
        assert alone.interval.low > comparison.interval.low
        assert alone.interval.high < comparison.interval.high
        # two-sided 1.667 % against 5 % of a normal: 2.394 / 1.960 as wide
        ratio = (comparison.interval.high - comparison.interval.low) / (alone.interval.high - alone.interval.low)
        assert ratio == pytest.approx(1.2215, rel=0.06)
    assert module.compare(runs[:1]) == module.compare([]) == ([], [])


def test_refusing_draws_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loss, tokens = losses(1)
    runs = [write_run(tmp_path / f"run{i}", loss, tokens, data_fingerprint=f"{i}") for i in range(4)]
    monkeypatch.setattr(module, "bootstrap", lambda *args, **kwargs: pytest.fail("drew resamples"))
    found, refused = module.compare(runs)
    assert found == []
    assert len(refused) == 3


def test_the_record_is_json(tmp_path: Path) -> None:
    comparison = compare(write_run(tmp_path / "a", *losses(1)), write_run(tmp_path / "b", *losses(2)))
    record = json.loads(json.dumps(comparison.record()))
    assert record["interval"] == {"low": comparison.interval.low, "high": comparison.interval.high}
    assert record["sentence"] == comparison.sentence
    assert record["is_real"] is comparison.is_real
    for name in ("a", "b", "split", "conversations", "tokens", "loss_a", "difference", "level"):
        assert record[name] == getattr(comparison, name)


# -- refusals ----------------------------------------------------------------------------------------------------------

OTHER_DATA = {"model": {"base": "tiny", "lr": 1e-4}, "data": {"template": "chatml", "max_length": 1024}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": ROWS + 1}, "their conversations or masks differ, first in row 100; give both the same data.split"),
        ({"shorter": 2}, "their conversations or masks differ, first in row 398;"),
        ({"token": 1}, "their conversations or masks differ, first in row 107;"),
        ({"data_fingerprint": "77aa"}, "data_fingerprint is missing or differs, so the data or the tokens are not the"),
        (
            {"data_fingerprint": "77aa", "config": OTHER_DATA},
            "not the same (they differ in data.max_length, data.template)",
        ),
        ({"data_fingerprint": None}, "their data_fingerprint is missing or differs"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    loss, tokens = losses(2)
    change = dict(change)
    said = re.sub(r"{(\d+)", lambda row: f"{{tokens[{int(row[1]) - 100}]", said).format(
        tokens=tokens, new=tokens[7] + 1
    )
    tokens[7] += change.pop("token", 0)
    cut = 300 - change.pop("shorter", 0)
    two = write_run(tmp_path / "two", loss[:cut], tokens[:cut], **change)
    one = write_run(tmp_path / "one", *losses(1))
    line = refusal(one, two)
    assert line.startswith("one and two cannot be compared on test: ")
    assert said in line
    assert refusal(two, one).startswith("two and one cannot be compared on test: ")
    found, refused = module.compare([one, one, two])
    assert found == [compare(one, one)]  # one that is refused does not count
    assert refused == [line]


@pytest.mark.parametrize("conversations", [1, MIN_CONVERSATIONS - 1])
def test_too_few_conversations_are_refused(tmp_path: Path, conversations: int) -> None:
    a, b = (write_run(tmp_path / name, *losses(seed, 0.0, conversations)) for name, seed in (("a", 1), ("b", 2)))
    assert refusal(a, b).endswith(f"needs at least 20, the split has {conversations}")
    enough = [write_run(tmp_path / "enough" / name, *losses(1, 0.0, MIN_CONVERSATIONS)) for name in ("a", "b")]
    assert compare(*enough).conversations == 20


def test_a_split_that_was_not_evaluated_is_refused(tmp_path: Path) -> None:
    a, b = write_run(tmp_path / "a", *losses(1)), write_run(tmp_path / "b", *losses(2), split="validation")
    assert "b/test_examples.csv: not there" in refusal(a, b)
    assert module.compare([b, a, a])[1] == [refusal(b, a)]  # what the reference lacks is said once


def test_an_evaluation_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    loss, tokens = losses(1)
    a = write_run(tmp_path / "a", loss, tokens)
    for number, change in enumerate(({"supervised_tokens": 12}, {"test_loss": 1.5})):
        line = refusal(a, write_run(tmp_path / str(number), loss, tokens, **change))
        assert line.startswith(f"{tmp_path}/{number}/test_examples.csv: has a loss of ")
    rows = ROWS.copy()
    rows[5] = rows[4]
    assert "twice/test_examples.csv: has a loss of" in refusal(a, write_run(tmp_path / "twice", loss, tokens, rows))
    loss[3] = np.nan
    assert "nan/test_examples.csv: has a loss of nan" in refusal(a, write_run(tmp_path / "nan", loss, tokens))


@pytest.mark.parametrize("comparisons", [0, -1])
def test_a_number_of_comparisons_that_is_none_is_refused(tmp_path: Path, comparisons: int) -> None:
    a = write_run(tmp_path / "a", *losses(1))
    with pytest.raises(LabError, match=f"comparisons must be at least 1, got {comparisons}"):
        compare(a, a, comparisons=comparisons)
