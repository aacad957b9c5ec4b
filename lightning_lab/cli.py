"""The command line: LightningCLI with this package's keys and run directories, and one line for every user error."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import ArgumentError
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

from lightning_lab.configs_lookup import DEFAULTS, config_of_run, configs_dir, find_config, resolve_configs
from lightning_lab.data.datamodule import ChatDataModule
from lightning_lab.errors import LabError, check_ranges
from lightning_lab.experiments.plan import plan_command
from lightning_lab.experiments.points import SweepSettings
from lightning_lab.files import check_sums
from lightning_lab.rundir import CHECKPOINTS, RunPaths, resolve_run
from lightning_lab.training import refusals, resume
from lightning_lab.training.auto import settle_auto
from lightning_lab.training.callbacks import progress, run_directory
from lightning_lab.training.callbacks.record import Curves
from lightning_lab.training.module import QLoRAModule

RANGES = {
    "seed_everything": (0, 2**32 - 1),
    "val_every_steps": (1, 10**9),
    "checkpoint_every_steps": (1, 10**9),
    "train_loss_window": (1, 10**9),
    "early_stopping": (1, 10**9),
    "samples": (0, 10_000),
    "sample_tokens": (1, 1_000_000),
}
# Trainer settings that this command line sets itself: see `refusals.REPLACED`.
REPLACED: refusals.Replaced = {
    "val_check_interval": ((None,), "set val_every_steps (optimizer steps)"),
    "check_val_every_n_epoch": ((None, 1), "set val_every_steps (optimizer steps)"),
    "fast_dev_run": ((None, False), "set trainer.max_steps to 1"),
    "use_distributed_sampler": ((None, True), "the data module shares out each step by itself"),
    "enable_checkpointing": ((None,), "set checkpoint_every_steps"),
    "barebones": ((None, False), "set trainer.logger to false and samples to 0"),
}
WITHOUT_TRAINER = ("plan", "preview", "sweep")  # they parse the same keys


@dataclass
class RunSettings:
    """The run.

    Args:
        val_every_steps: Optimizer steps between validations; there is always one after the last step.
        early_stopping: Stop after this many validations in a row without a lower val_loss; null never stops early.
        run_dir: The run's directory; null for runs/<first config's name>.

    """

    val_every_steps: int = 250
    early_stopping: int | None = None
    run_dir: str | None = None


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
        """Add the keys of this package, and the links between data and model."""
        parser.link_arguments("model.base", "data.tokenizer")
        parser.link_arguments("model.revision", "data.tokenizer_revision")
        parser.link_arguments("seed_everything", "data.seed")
        parser.link_arguments("seed_everything", "model.seed")
        if self.command == "plan":
            parser.add_argument("--json", action="store_true", help="One JSON object, sizes in bytes.")
        if self.command == "sweep":
            parser.add_class_arguments(SweepSettings, "sweep")
        if self.command == "preview":
            parser.add_argument("--json", action="store_true", help="One JSON object a conversation.")
            parser.add_argument("--check", action="store_true", help="Count instead those that repeat others.")
            parser.add_argument("--limit", type=NonNegativeInt, default=3, help="How many conversations to show.")
        parser.add_class_arguments(RunSettings)
        skip: set[str | int] = {"run_dir", "name", "config", "command", "predictions"}
        self.directory_keys = parser.add_function_arguments(run_directory, as_group=False, skip=skip)
        if self.command == "predict":
            parser.add_argument("--output", type=str | None, help="File; null for one in the run directory.")

    def _parse_ckpt_path(self) -> None:
        """Leave the config as it was given: a checkpoint's hyper-parameters win over no flag here."""

    # -- between parsing and running -----------------------------------------------------------------------------

    @property
    def settings(self) -> Any:
        """The command's parsed config."""
        return self.config[self.subcommand] if self.subcommand else self.config

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, and refuse numbers out of range before one of them seeds anything."""
        super().parse_arguments(parser, args)
        self.subcommand = self.config.get("subcommand")
        _refuse(self.settings)

    def before_instantiate_classes(self) -> None:
        """Decide run directory and checkpoint."""
        settings = self.settings
        if self.command in WITHOUT_TRAINER:
            return
        self.paths = resolve_run(self.command, self.name, settings.run_dir, settings.ckpt_path)
        if settings.run_dir is None and settings.ckpt_path is not None:
            _say(f"run: {self.paths.run_dir}")
        if self.paths.checkpoint is not None:  # what is damaged is named before a model is loaded
            checkpoint = resume.read_checkpoint(self.paths.checkpoint)
            for key, value in checkpoint[resume.KEY]["chosen"].items() if self.command == "fit" else ():
                if settings[key] == "auto":  # nothing may fit now
                    settings[key] = value
            if settings.ckpt_path == "best":
                check_sums(self.paths.run_dir / CHECKPOINTS / "best")
            if settings.model.revision is None and checkpoint["hyper_parameters"]["base"] == settings.model.base:
                settings.model.revision = settings.data.tokenizer_revision = checkpoint[resume.KEY]["revision"]
        settings.run_dir = str(self.paths.run_dir)
        settings.ckpt_path = str(self.paths.checkpoint) if self.paths.checkpoint else None
        settings.weights_only = True
        if self.command in ("validate", "test"):
            settings.verbose = False  # `Results` prints a table of all there are

    def config_text(self) -> str:
        """The resolved config as YAML, less what is of this command alone."""
        config = self.settings.clone()
        for key in ("ckpt_path", "weights_only", "config", "output", "sweep", "verbose"):
            config.pop(key, None)
        # null is a setting too: left out, it would be read back as the default
        return self._parser(self.subcommand).dump(config, skip_link_targets=True, skip_none=False)

    def check(self, arguments: list[str]) -> tuple[Any, ChatDataModule]:
        """Read arguments as `fit` does and let model and data check them; nothing is loaded.

        Returns:
            The config, and the data module that it describes.

        Raises:
            LabError: A setting that `fit` would refuse.

        """
        try:
            config = self.parser.parse_args(arguments)
        except ArgumentError as error:
            raise LabError(str(error)) from None
        _refuse(config)
        given = config.clone()
        given.trainer.logger, given.trainer.callbacks = False, None
        self._trainer(given.trainer)
        return config, self.parser.instantiate_classes(given).data

    def instantiate_classes(self) -> None:
        """A sweep has no run of its own."""
        if self.command == "sweep":
            return
        try:
            super().instantiate_classes()
        except ValueError as error:  # of the parser, around what a logger or callback raised, such as a missing package
            problem = re.search(r"Problem with given class_path.*\n.*", str(error))
            if problem is None:
                raise
            raise LabError(problem[0]) from error

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """The trainer with a run directory; TensorBoard beside it unless another logger is set."""
        settings, given = self.settings, self._get(self.config_init, "trainer")
        if self.command in WITHOUT_TRAINER:
            here = {"accelerator": "cpu", "devices": 1, "strategy": "auto"} if self.command == "preview" else {}
            return self._trainer(given, logger=False, callbacks=None, **here)
        run_dir = self.paths.run_dir
        self.model.continues = self.paths.checkpoint is not None
        self.model.checkpoint = settings.ckpt_path
        self.model.evaluate_base = self.command != "fit" and self.paths.checkpoint is None
        callbacks = given.callbacks or []
        callbacks = [*callbacks] if isinstance(callbacks, list) else [callbacks]
        callbacks += run_directory(
            run_dir,
            **{key: settings[key] for key in self.directory_keys},
            name=self.name,
            config=yaml.safe_load(self.config_text()),
            command=["python", "-m", "lightning_lab", self.command, *self.arguments],
            predictions=settings.get("output"),
        )
        if settings.early_stopping:
            patience = settings.early_stopping
            callbacks.append(EarlyStopping("val_loss", patience=patience, check_on_train_epoch_end=False))
        if given.enable_progress_bar is not False:
            callbacks.append(progress())
        default_logger = Curves(run_dir, name="", version="tensorboard") if self.command == "fit" else False
        trainer = self._trainer(
            given,
            callbacks=callbacks,
            logger=given.logger if given.logger not in (None, True) else default_logger,
            val_check_interval=settings.val_every_steps,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=given.num_sanity_val_steps or 0,
            enable_progress_bar=given.enable_progress_bar is not False,
            enable_model_summary=bool(given.enable_model_summary),
            log_every_n_steps=given.log_every_n_steps or 1,
            default_root_dir=str(run_dir),
        )
        if self.command == "predict" and trainer.world_size > 1:
            raise LabError("predict runs on one device: set trainer.devices to 1")
        return trainer

    def _trainer(self, given: Any, **settings: Any) -> pl.Trainer:
        settings = {**vars(given), "use_distributed_sampler": False, **settings}
        trainer = pl.Trainer(**{**settings, "accelerator": _accelerator(settings["accelerator"])})
        refusals.refuse_trainer(trainer, training=self.command in ("fit", *WITHOUT_TRAINER))
        return trainer

    def after_fit(self) -> None:
        """Say where the run is."""
        names = ("losses.md", "loss_curve.png", "samples.md", "checkpoints/best/", "checkpoints/last.ckpt")
        _say(f"done: {self.paths.run_dir}/: {', '.join(n for n in names if (self.paths.run_dir / n).exists())}")


def _accelerator(asked: Any) -> Any:
    """What ``auto`` stands for, else what is asked for; a GPU that cannot be used is no reason to take the CPU.

    Raises:
        LabError: There is such a GPU, or none though one is asked for.

    """
    if asked not in ("auto", "gpu", "cuda") or torch.cuda.is_available():
        return "cuda" if asked == "auto" else asked
    if why := refusals.unusable_gpu():
        raise LabError(f"{why}; to train on the CPU set trainer.accelerator to cpu")
    if asked != "auto":
        raise LabError(f"trainer.accelerator is {asked}, and PyTorch finds no GPU here; set it to cpu")
    return "cpu"


def _refuse(settings: Any) -> None:
    """Refuse a config's numbers out of range, and trainer settings that something else replaces."""
    check_ranges("", vars(settings), RANGES)
    refusals.refuse_replaced(settings.trainer, {**refusals.REPLACED, **REPLACED})
    for key, choices in (("strategy", ("auto", "ddp")), ("accelerator", ("auto", "cpu", "gpu", "cuda"))):
        if settings.trainer[key] not in choices:
            raise LabError(f"trainer.{key} {settings.trainer[key]!r} is not supported; use {', '.join(choices)}")


def _preview(cli: LabCLI) -> None:
    from lightning_lab.data.preview import check, preview
    from lightning_lab.data.summary import print_summary

    data, settings = cli.datamodule, cli.settings
    if settings.check:
        data.prepare(progress=True)
        print_summary(data)
        return check(data, as_json=settings.json)
    settle_auto(cli.trainer, cli.model, data, training=True)
    data.prepare(progress=not settings.json)
    if settings.json:
        print_summary(data)
    preview(data, limit=settings.limit, as_json=settings.json)


def run(command: str, argv: list[str]) -> int:
    """Run one command; return the exit status.

    Raises:
        LabError, ArgumentError, MisconfigurationException: Anything the user can put right; and see `__main__`.

    """
    args, files = resolve_configs(argv)
    if command in ("validate", "test", "predict") and not files and (config := config_of_run(args)):
        args, files = [f"--config={find_config(str(config))}", *args], [config]
    cli = LabCLI(command, args, files[0].stem if files else "run")
    if command == "preview":
        _preview(cli)
    if command == "plan":
        plan_command(cli)
    if command == "sweep":
        from lightning_lab.experiments.sweep import sweep_command

        return sweep_command(cli)
    return 0


@rank_zero_only
def _say(message: str) -> None:
    print(message, file=sys.stderr)
