"""The command line: LightningCLI with the lab's keys, its run directory and one-line errors."""

from __future__ import annotations

import csv
import inspect
import json
import logging
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_only

from lightning_lab.configs_lookup import DEFAULTS, configs_dir, resolve_configs
from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.errors import LabError
from lightning_lab.experiments.points import Point, SweepSettings
from lightning_lab.experiments.sweep import BASE_CONFIG, Sweep
from lightning_lab.training.callbacks.checkpoints import Checkpoints, read_checkpoint
from lightning_lab.training.callbacks.predictions import PredictionWriter
from lightning_lab.training.callbacks.progress import RunProgress
from lightning_lab.training.callbacks.record import MetricsFile, RunRecord, StepClock, write_loss_table, write_text
from lightning_lab.training.callbacks.samples import Samples
from lightning_lab.training.module import QLoRAModule
from lightning_lab.training.rundir import BASE, RUNS, RunPaths, newest_run, resolve_run

# Trainer settings that something of the lab's replaces, and what to set instead.
REFUSED = {
    "precision": "model.compute_dtype alone decides the precision",
    "accumulate_grad_batches": "a batch is one optimizer step: set data.batch_size (and data.micro_batch_tokens)",
    "gradient_clip_val": "set model.max_grad_norm",
    "gradient_clip_algorithm": "set model.max_grad_norm",
    "val_check_interval": "set val_every_steps (optimizer steps)",
    "check_val_every_n_epoch": "set val_every_steps (optimizer steps)",
    "limit_train_batches": "set data.rows or data.split",
    "limit_val_batches": "set data.rows or data.split",
    "limit_test_batches": "set data.rows or data.split",
    "limit_predict_batches": "set data.rows or data.split",
    "overfit_batches": "set data.rows or data.split",
    "fast_dev_run": "set trainer.max_steps to 1",
    "min_epochs": "set trainer.max_epochs or early_stopping",
    "min_steps": "set trainer.max_steps or early_stopping",
    "use_distributed_sampler": "the data module shares out each step by itself",
    "reload_dataloaders_every_n_epochs": "the data module orders each epoch by itself",
    "enable_checkpointing": "set checkpoint_every_steps",
    "barebones": "set trainer.logger to false and samples to 0",
}
WITHOUT_TRAINER = ("plan", "preview", "sweep")  # they parse the same keys
STRATEGIES = ("auto", "ddp")
AUTO_KEYS = ("model.checkpointing", "data.micro_batch_tokens", "data.eval_micro_batch_tokens")
CHOSEN = "LIGHTNING_LAB_AUTO"  # environment variable in which the processes of a run find what `auto` stands for
OUT_OF_MEMORY = {
    "fit": "lower data.micro_batch_tokens, or set model.checkpointing to full or offload",
    "validate": "lower data.eval_micro_batch_tokens or data.micro_batch_tokens",
    "test": "lower data.eval_micro_batch_tokens or data.micro_batch_tokens",
    "predict": "lower model.max_new_tokens or data.max_length, or use a smaller model.base",
}
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")


class LabCLI(LightningCLI):
    """LightningCLI for one command.

    Args:
        command: The command to run.
        args: Its arguments, configs resolved.
        name: The run's name.

    """

    def __init__(self, command: str, args: list[str], name: str) -> None:
        self.command = command
        self.name = name
        self.arguments = args
        self.paths: RunPaths
        runs_trainer = command not in WITHOUT_TRAINER
        options: dict[str, Any] = {"default_config_files": [str(configs_dir() / DEFAULTS)], "exit_on_error": False}
        super().__init__(
            QLoRAModule,
            ChatDataModule,
            save_config_callback=None,
            seed_everything_default=3407,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"exit_on_error": False, command: options} if runs_trainer else options,
            args=[command, *args] if runs_trainer else args,
            run=runs_trainer,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the command that was asked for: each parser takes half a second to build."""
        every = LightningCLI.subcommands()
        return {self.command: every[self.command]} if self.command in every else {}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The lab's own keys, and the links between data and model."""
        parser.link_arguments("model.base", "data.tokenizer")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        if self.command == "plan":
            parser.add_argument("--json", action="store_true", help="One JSON object, sizes in bytes.")
        if self.command == "sweep":
            parser.add_class_arguments(SweepSettings, "sweep")
        if self.command == "preview":
            parser.add_argument("--json", action="store_true", help="One JSON object a conversation.")
            parser.add_argument("--limit", type=int, default=3, help="How many conversations to show.")
        parser.add_argument("--val_every_steps", type=int, default=250, help="Optimizer steps between validations.")
        parser.add_argument(
            "--checkpoint_every_steps",
            type=int | None,
            default=None,
            help="Also write last.ckpt every this many optimizer steps, not only at validations.",
        )
        parser.add_argument(
            "--early_stopping",
            type=int | None,
            default=None,
            help="Stop after this many validations in a row without a lower val_loss; null never stops early.",
        )
        parser.add_argument("--samples", type=int, default=3, help="Validation prompts answered at each validation.")
        parser.add_argument("--sample_tokens", type=int, default=64, help="Longest of these answers.")
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="The run's directory; null for runs/<first config's name>."
        )
        if self.command == "predict":
            parser.add_argument(
                "--output", type=str | None, default=None, help="File; null for one in the run directory."
            )

    def _parse_ckpt_path(self) -> None:
        """Leave the config as it was given: a checkpoint's hyper-parameters win over no flag here."""

    # -- between parsing and running -----------------------------------------------------------------------------

    @property
    def settings(self) -> Any:
        """The command's parsed config."""
        return self.config[self.subcommand] if self.subcommand else self.config

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot be honoured; decide run directory and checkpoint."""
        settings = self.settings
        refuse_trainer_settings(settings.trainer)
        for key in ("val_every_steps", "checkpoint_every_steps", "early_stopping"):
            if settings[key] is not None and settings[key] < 1:
                raise LabError(f"{key} is {settings[key]}; it must be at least 1")
        if self.command == "sweep":
            return
        if self.command in WITHOUT_TRAINER:
            self._resolve_auto(None)
            return
        self.paths = resolve_run(self.command, self.name, settings.run_dir, settings.ckpt_path)
        if settings.run_dir is None and settings.ckpt_path is not None:
            _say(f"run: {self.paths.run_dir}")
        if self.paths.checkpoint is not None:
            read_checkpoint(self.paths.checkpoint)  # a corrupt file is named before a model is loaded
        self._resolve_auto(self.paths.checkpoint)
        settings.run_dir = str(self.paths.run_dir)
        self.resolved_config = self._config_text()
        settings.ckpt_path = str(self.paths.checkpoint) if self.paths.checkpoint else None
        settings.weights_only = True
        self.evaluates_base = self.command != "fit" and self.paths.checkpoint is None

    def _resolve_auto(self, checkpoint: Path | None) -> None:
        """Put numbers in the place of ``auto``, before any weight is loaded.

        A continued run keeps the choice of the run that the checkpoint lies in, since with dropout the cut into
        micro-batches is a part of the result. The processes that Lightning starts are told what their parent chose:
        by then it holds memory itself, so that they would find less. Processes that something else started have nobody
        to ask, and are refused.

        Raises:
            LabError: Nothing fits, or the processes cannot agree.

        """
        settings = self.settings
        asked = [key for key in AUTO_KEYS if settings[key] == "auto"]
        if not asked:
            return
        if self.command == "fit" and checkpoint is not None:
            before = _config_of_checkpoint(checkpoint)
            for key in asked:
                if key in before:
                    settings[key] = before[key]
        elif "LOCAL_RANK" in os.environ and CHOSEN in os.environ:
            for key, value in json.loads(os.environ[CHOSEN]).items():
                settings[key] = value
            return
        asked = [key for key in asked if settings[key] == "auto"]
        if not asked:
            return
        if settings.trainer.num_nodes > 1 or int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise LabError(
                f"{asked[0]}: auto cannot be agreed on by processes that were not started from here; set it to a value "
                "that `plan` shows"
            )
        self._choose(asked)
        os.environ[CHOSEN] = json.dumps({key: settings[key] for key in asked})
        _say(f"auto: {', '.join(f'{key} {settings[key]}' for key in asked)}")

    def _choose(self, asked: list[str]) -> None:
        from lightning_lab.experiments.plan import available_memory, choose
        from lightning_lab.models.base import load_config

        settings, data = self.settings, self.settings.data
        device = _plan_device(settings.trainer)
        config = load_config(settings.model.base)
        shared = {
            "available": available_memory(device, _device_count(settings.trainer)),
            "max_length": data.max_length,
            "batch_size": data.batch_size,
        }
        training = self.command not in ("validate", "test", "predict")
        if asked != ["data.eval_micro_batch_tokens"]:
            given = None if data.micro_batch_tokens == "auto" else data.micro_batch_tokens
            mode, tokens = choose(
                config,
                _plan_settings(settings.model, device),
                device,
                **shared,
                micro_batch_tokens=given,
                training=training,
            )
            settings["model.checkpointing"] = mode
            settings["data.micro_batch_tokens"] = tokens
        if "data.eval_micro_batch_tokens" in asked:
            chosen = _plan_settings(settings.model, device)
            settings["data.eval_micro_batch_tokens"] = choose(config, chosen, device, **shared, training=False)[1]

    def _config_text(self) -> str:
        config = self.settings.clone()
        for key in ("ckpt_path", "weights_only", "config", "output", "sweep"):
            config.pop(key, None)
        # null is a setting too: left out, it would be read back as the default
        return self._parser(self.subcommand).dump(config, skip_link_targets=True, skip_none=False)

    def instantiate_classes(self) -> None:
        """A sweep has no run of its own."""
        if self.command != "sweep":
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer with the lab's callbacks; TensorBoard beside the run's record unless another logger is set."""
        settings = self.settings
        if self.command in WITHOUT_TRAINER:
            return super().instantiate_trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
        trainer = settings.trainer
        self.model.evaluate_base = self.evaluates_base
        callbacks: list[pl.Callback] = []
        clock = StepClock()
        logger: Any = False
        if self.command == "fit":
            run_dir = self.paths.run_dir
            command = ["python", "-m", "lightning_lab", self.command, *self.arguments]
            callbacks.append(RunRecord(run_dir, self.resolved_config, self.name, command, self.paths.checkpoint, clock))
            callbacks.append(Samples(run_dir / "samples.md", settings.samples, settings.sample_tokens))
            if settings.early_stopping:
                callbacks.append(
                    EarlyStopping(
                        "val_loss", patience=settings.early_stopping, mode="min", check_on_train_epoch_end=False
                    )
                )
            callbacks.append(
                Checkpoints(self.paths.checkpoints, settings.val_every_steps, settings.checkpoint_every_steps)
            )
            logger = TensorBoardLogger(run_dir, name="", version="tensorboard")
        elif self.command == "predict":
            output = Path(settings.output) if settings.output else self.paths.run_dir / self._predictions_name()
            callbacks.append(PredictionWriter(output))
        if trainer.enable_progress_bar is not False:
            callbacks.append(RunProgress())
        own = self._get(self.config_init, "trainer").callbacks or []
        own = own if isinstance(own, list) else [own]
        built = super().instantiate_trainer(
            callbacks=[*own, *callbacks, clock],
            logger=self._get(self.config_init, "trainer").logger if trainer.logger not in (None, True) else logger,
            precision="32-true",
            accelerator=_accelerator(trainer.accelerator),
            strategy=_strategy(trainer),
            val_check_interval=settings.val_every_steps,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=trainer.num_sanity_val_steps or 0,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=bool(trainer.enable_model_summary),
            use_distributed_sampler=False,
            log_every_n_steps=trainer.log_every_n_steps or 1,
            default_root_dir=str(self.paths.run_dir),
        )
        if self.command == "predict" and built.world_size > 1:
            raise LabError("predict runs on one device: set trainer.devices to 1")
        return built

    def _predictions_name(self) -> str:
        base = "-base" if self.evaluates_base else ""
        source = self.datamodule.predict_source
        return f"predictions-{Path(source).stem if source else self.datamodule.split_for('predict')}{base}.jsonl"

    # -- after running -------------------------------------------------------------------------------------------

    def after_fit(self) -> None:
        """Say where the run is."""
        _say(f"done: {self.paths.run_dir}/losses.md, loss_curve.png, samples.md, checkpoints/best/")

    def after_validate(self) -> None:
        """Write the split's results."""
        self._write_evaluation(self.datamodule.split_for("validate"))

    def after_test(self) -> None:
        """Write the split's results."""
        self._write_evaluation(self.datamodule.split_for("test"))

    @rank_zero_only
    def _write_evaluation(self, split: str) -> None:
        result = self.model.evaluation
        assert result is not None
        data = self.datamodule
        checkpoint = self.paths.checkpoint
        used = "base" if checkpoint is None else str(checkpoint)
        name = f"{split}-base" if checkpoint is None else split
        record = {
            f"{split}_loss": result.loss,
            f"{split}_loss_hf": result.loss_hf,
            f"{split}_perplexity": result.perplexity,
            f"{split}_token_accuracy": result.token_accuracy,
            "conversations": len(result.nll),
            "supervised_tokens": int(result.tokens.sum()),
            "dropped_conversations": len(data.splits[split].dropped),
            "checkpoint": used,
            "step": read_checkpoint(checkpoint)["lightning_lab"]["completed_steps"] if checkpoint else 0,
            "data_fingerprint": data.tokenized.fingerprint,
        }
        run_dir = self.paths.run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        write_text(run_dir / f"{name}.json", json.dumps(record, indent=2) + "\n")
        temporary = run_dir / f".{name}_examples.tmp"
        with temporary.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["row", "loss", "supervised_tokens"])
            for row, nll, tokens in zip(
                data.splits[split].rows.tolist(), result.nll.tolist(), result.tokens.tolist(), strict=True
            ):
                writer.writerow([row, repr(nll / tokens), tokens])
        os.replace(temporary, run_dir / f"{name}_examples.csv")
        if name == "validation-base" and (run_dir / "metrics.csv").exists():
            write_loss_table(run_dir)  # the base becomes its first row
        print(results_table(run_dir))
        _say(f"written: {run_dir / name}.json, {name}_examples.csv")


def results_table(run_dir: Path) -> str:
    """All evaluations that a run directory holds, as one table: the base beside the checkpoint, split by split."""
    lines = [
        "| split | model | loss | perplexity | token accuracy | conversations | tokens |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for split in ("train", "validation", "test"):
        for path in (run_dir / f"{split}-base.json", run_dir / f"{split}.json"):
            if path.exists():
                record = json.loads(path.read_text())
                model = (
                    "base"
                    if record["checkpoint"] == BASE
                    else f"{Path(record['checkpoint']).stem}, step {record['step']}"
                )
                lines.append(
                    f"| {split} | {model} | {record[f'{split}_loss']:.4f} | {record[f'{split}_perplexity']:.2f} | "
                    f"{record[f'{split}_token_accuracy']:.4f} | {record['conversations']:,} | "
                    f"{record['supervised_tokens']:,} |"
                )
    return "\n".join(lines)


def refuse_trainer_settings(trainer: Any) -> None:
    """Refuse Trainer settings that would be ignored or would break a definition.

    Raises:
        LabError: Names the setting and what to set instead.

    """
    defaults = {p: v.default for p, v in inspect.signature(pl.Trainer).parameters.items()}
    for key, instead in REFUSED.items():
        if trainer[key] not in (None, defaults[key]):
            raise LabError(f"trainer.{key} is not used here: {instead}")
    strategy = trainer.strategy
    if not isinstance(strategy, str) or strategy not in STRATEGIES:
        raise LabError(f"trainer.strategy {strategy!r} is not supported; use one of {', '.join(STRATEGIES)}")
    if not isinstance(trainer.accelerator, str) or trainer.accelerator not in ACCELERATORS:
        raise LabError(f"trainer.accelerator {trainer.accelerator!r} is not supported; use {', '.join(ACCELERATORS)}")
    steps, epochs = trainer.max_steps, trainer.max_epochs
    if steps < 0 and (epochs is None or epochs < 0):
        raise LabError("the run has no end: set trainer.max_epochs or trainer.max_steps")
    if steps == 0 or epochs == 0:
        raise LabError("trainer.max_steps and trainer.max_epochs must be at least 1")


def _config_of_checkpoint(checkpoint: Path) -> dict[str, Any]:
    """What the run that a checkpoint lies in had for `AUTO_KEYS`; empty where it lies in none."""
    path = checkpoint.resolve().parent.parent / "config.yaml"
    if not path.is_file():
        return {}
    config = yaml.safe_load(path.read_text())
    return {key: config[key.partition(".")[0]].get(key.partition(".")[2]) for key in AUTO_KEYS}


def _plan_device(trainer: Any) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and trainer.accelerator != "cpu" else "cpu")


def _plan_settings(model: Any, device: torch.device) -> Any:
    """`Settings` of a parsed config's model."""
    from lightning_lab.experiments.plan import Settings
    from lightning_lab.models.base import resolve_compute_dtype

    return Settings(
        bits=model.bits,
        dtype_bytes=resolve_compute_dtype(model.compute_dtype, device).itemsize,
        r=model.r,
        target_modules=model.target_modules,
        optimizer=model.optimizer,
        checkpointing=model.checkpointing,
        fused_linear=model.fused_linear and model.bits != 8 and not model.dora and not model.dropout,
        dora=model.dora,
        compiled=model.compile,
        cached=model.cache_dequantised,
    )


def _accelerator(name: str) -> str:
    """``auto`` is CUDA or the CPU: bitsandbytes and the paths here have been tried on nothing else."""
    return name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"


def _device_count(trainer: Any) -> int:
    devices = trainer.devices
    if devices in ("auto", -1, "-1"):
        gpus = torch.cuda.device_count() if trainer.accelerator in ("auto", "gpu", "cuda") else 1
        return max(1, gpus)
    if str(devices).isdigit():
        return int(devices)
    # a list such as [0, 1], or the same as text
    return len(devices) if isinstance(devices, list) else len(str(devices).split(","))


def _strategy(trainer: Any) -> Any:
    """DDP for several devices, without its broadcast of buffers at each forward pass.

    Nothing changes the base's buffers, and processes run unequal numbers of micro-batches, so a broadcast would hang.
    """
    several = _device_count(trainer) > 1 or trainer.num_nodes > 1 or trainer.strategy == "ddp"
    return DDPStrategy(forward_sync_buffers=False) if several else trainer.strategy


def run(command: str, argv: list[str]) -> int:
    """Run one command; return the exit status: 2 for anything the user can put right, with one line that says how."""
    _quieten()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    try:
        args, files = resolve_configs(argv)
        args, files = _use_config_of_run(command, args, files)
        cli = LabCLI(command, args, _run_name(files))
        if command == "preview":
            _preview(cli)
        if command == "plan":
            _plan(cli)
        if command == "sweep":
            return _sweep(cli)
    except LabError as error:
        return _fail(str(error))
    except ArgumentError as error:
        return _fail(_parser_message(error))
    except (MisconfigurationException, OSError) as error:
        return _fail(" ".join(str(error).split()))
    except torch.cuda.OutOfMemoryError:
        return _fail(f"the GPU is out of memory; {OUT_OF_MEMORY[command]}")
    return 0


def _preview(cli: LabCLI) -> None:
    from lightning_lab.data.preview import preview

    data, settings = cli.datamodule, cli.settings
    data.prepare(progress=not settings.json)
    split = data.eval_split
    preview(
        data.tokenized,
        data.rows,
        data.tokenizer,
        data.renderer,
        limit=settings.limit,
        indices=data.splits[split].all_rows if split else None,
        as_json=settings.json,
        packing=data.packing_statistics(),
    )


def _plan(cli: LabCLI) -> None:
    from lightning_lab.experiments.plan import known_speed, plan, show, work_of
    from lightning_lab.models.base import load_config

    data, settings = cli.datamodule, cli.settings
    config = load_config(settings.model.base)
    device = _plan_device(settings.trainer)
    data.prepare(progress=not settings.json)
    earlier = newest_run(cli.name)
    planned = plan(
        config,
        _plan_settings(settings.model, device),
        work_of(data, settings.trainer.max_epochs, settings.trainer.max_steps),
        device,
        known_speed(MetricsFile(earlier / "metrics.csv").read()) if earlier else None,
    )
    print(json.dumps(planned, indent=2) if settings.json else show(planned))


def _sweep(cli: LabCLI) -> int:
    from lightning_lab.models.base import fetch

    directory = Path(cli.settings.run_dir or RUNS / cli.name)
    cli.settings.run_dir = None

    def parse(point: Point) -> Any:
        begun = directory / BASE_CONFIG  # from then on the files that it was given may change
        arguments = [f"--config={begun}"] if begun.is_file() else cli.arguments
        try:
            settings = cli.parser.parse_args([*arguments, *point.flags])
        except ArgumentError as error:
            raise LabError(f"sweep, run {point.name}: {_parser_message(error)}") from None
        refuse_trainer_settings(settings.trainer)
        return settings

    def instantiate(settings: Any) -> Any:
        """Model and data check their settings; nothing is loaded."""
        settings = settings.clone()
        for key in AUTO_KEYS:  # each run chooses for itself
            if settings[key] == "auto":
                settings[key] = "none" if key == "model.checkpointing" else settings.data.max_length
        settings.trainer.logger = settings.trainer.callbacks = None
        return cli.parser.instantiate_classes(settings)

    def resolve(point: Point) -> Point:
        settings = parse(point)
        instantiate(settings)
        typed = {key: json.loads(json.dumps(settings[key], default=str)) for key in point.settings}
        return Point(point.name, typed, point.named)

    def prepare(points: Sequence[Point]) -> None:
        done = set()
        for point in points:
            settings = parse(point)
            key = json.dumps([settings.data.as_dict(), settings.model.base], default=str)
            if key not in done:
                fetch(settings.model.base)
                instantiate(settings).data.prepare(progress=True)
            done.add(key)

    sweep = Sweep(directory, SweepSettings(**vars(cli.settings.sweep)), cli._config_text(), resolve, prepare)
    status = sweep.run()
    from lightning_lab.experiments.report import write_report

    report = write_report([directory], directory)
    for line in report.damaged:
        _say(f"error: {line}")
    print(report.ranking)
    _say(f"written: {directory}/report.md, report.html")
    return status


def _use_config_of_run(command: str, args: list[str], files: list[Path]) -> tuple[list[str], list[Path]]:
    """Without a --config, evaluate a run under the config it was trained with."""
    if command in ("validate", "test", "predict") and not files:
        for i, arg in enumerate(args):
            option, separator, value = arg.partition("=")
            if option == "--run_dir":
                config = Path(value if separator else " ".join(args[i + 1 : i + 2])) / "config.yaml"
                if config.is_file():
                    return [f"--config={config}", *args], [config]
    return args, files


def _run_name(files: list[Path]) -> str:
    return files[0].stem if files else "run"


def _parser_message(error: ArgumentError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:600]


def _fail(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


@rank_zero_only
def _say(message: str) -> None:
    print(message, file=sys.stderr)


def _quieten() -> None:
    """Keep library chatter that says nothing about this run away from the screen; warnings about it stay."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    # on CPUs with AVX512-BF16 its import warns that the optional package `kernels` is absent
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    for pattern in (
        ".*does not have many workers.*",
        ".*LightningCLI's args parameter.*",
        ".*GPU available but not used.*",
        ".*Checkpoint directory .* exists.*",
        ".*smaller than the logging interval.*",
        ".*recommended to use `self.log.*sync_dist.*",  # what is logged has been added up over the processes already
        ".*callbacks used to create the checkpoint need to be provided.*",  # evaluation needs no Checkpoints callback
        ".*isinstance\\(treespec, LeafSpec\\).*",
    ):
        warnings.filterwarnings("ignore", pattern)
