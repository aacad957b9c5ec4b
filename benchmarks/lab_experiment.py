"""The lab's two findings, a higher lr helps and a higher r helps, asked of the runs of ``lab_experiment.yaml``.

python -m lightning_lab sweep --config benchmarks/lab_experiment.yaml --run_dir runs/lab_experiment
python benchmarks/lab_experiment.py runs/lab_experiment
"""

import argparse
import statistics
from pathlib import Path

from scipy.stats import t

from lightning_lab.experiments.compare import Comparison, compare
from lightning_lab.experiments.runs import TRIALS, Run

LR = (("lr1e-4_r16", "baseline"), ("baseline", "lr3e-4_r16"))
R = tuple((f"lr3e-4_r16{seed}", f"lr3e-4_r32{seed}") for seed in ("", "_seed1", "_seed2"))


def over_seeds(comparisons: list[Comparison]) -> str:
    """Mean of the seeds' differences with a 95 % t interval (each seed's pair shares split and order of examples)."""
    differences = [comparison.difference for comparison in comparisons]
    mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
    half = t.ppf(0.975, len(differences) - 1) * deviation / len(differences) ** 0.5
    return (
        f"r 32 - r 16 over {len(differences)} seeds: mean {mean:+.4f}, standard deviation {deviation:.4f}, 95 % t "
        f"interval {mean - half:+.4f} to {mean + half:+.4f}"
    )


def main(sweep: Path) -> None:
    """Print the comparisons as Markdown."""
    pairs = LR + R
    found = [
        compare([Run(sweep / TRIALS / name) for name in pair], comparisons=len(pairs))[0][0]  # each at 99 %
        for pair in pairs
    ]
    print("| from | to | test loss | | difference | 99 % interval |")
    print("|---|---|---:|---:|---:|---:|")
    for c in found:
        interval = f"{c.interval.low:+.4f} to {c.interval.high:+.4f}"
        print(f"| {c.a} | {c.b} | {c.loss_a:.4f} | {c.loss_b:.4f} | {c.difference:+.4f} | {interval} |")
    print(f"\n{over_seeds(found[len(LR) :])}")
    for r in (16, 32):
        losses = [
            Run(sweep / TRIALS / f"lr3e-4_r{r}{seed}").evaluations["test"]["test_loss"]
            for seed in ("", "_seed1", "_seed2")
        ]
        print(f"r {r}: test loss {', '.join(f'{loss:.4f}' for loss in losses)}; sd {statistics.stdev(losses):.4f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    main(parser.parse_args().sweep)
