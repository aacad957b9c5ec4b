"""Entry: ``python -m lightning_lab COMMAND ...``."""

import sys

COMMANDS = {
    "fit": "train: lightning_lab fit --config lr3e-4_r32.yaml",
    "validate": "evaluate the validation split of a run: --ckpt_path best, last, base or a file",
    "test": "evaluate the held-out test split of a run: --ckpt_path best, last, base or a file",
    "predict": "write answers for a split or a file to JSONL",
    "plan": "before any weight is loaded: steps, tokens, trainable parameters, predicted peak memory by part",
    "sweep": "run a grid or a search of settings, resumable: sweep --config lab_grid.yaml",
    "report": "the lab's tables, a ranking, curves and comparisons of runs, finished or not: report RUN...",
    "preview": "show conversations as the model sees them, trained tokens marked",
}

USAGE = """\
usage: python -m lightning_lab COMMAND [--config FILE ...] [--KEY VALUE ...]

Fine-tune a Llama on chat data: 4-bit QLoRA in plain PyTorch Lightning.

commands:
{commands}

A config's bare name is looked up in the working directory, then among the packaged ones:
  {configs}
Several --config merge left to right, then flags. `COMMAND --help` lists every key, and
`COMMAND --config FILE --print_config` shows the merged result without loading anything.
"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "--version"):
        from lightning_lab import __version__
        from lightning_lab.configs_lookup import packaged_configs

        if argv and argv[0] == "--version":
            print(__version__)
            return 0
        commands = "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())
        print(USAGE.format(commands=commands, configs="  ".join(packaged_configs())), end="")
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        print(f"error: unknown command {argv[0]!r}; choose from {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    if argv[0] == "report":  # it reads files alone: no torch, which takes seconds to import
        from lightning_lab.experiments.report import main as report

        return report(argv[1:])
    from lightning_lab.cli import run

    return run(argv[0], argv[1:])


if __name__ == "__main__":
    sys.exit(main())
