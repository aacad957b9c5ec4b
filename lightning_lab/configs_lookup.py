"""Where a config's bare name leads."""

from collections.abc import Iterator
from pathlib import Path

from lightning_lab.errors import LabError
from lightning_lab.files import read_yaml
from lightning_lab.rundir import CONFIG

DEFAULTS = "defaults.yaml"


def configs_dir() -> Path:
    """The packaged configs: inside an installed package, or beside it in a checkout."""
    here = Path(__file__).parent
    return next((d for d in (here / "configs", here.parent / "configs") if (d / DEFAULTS).exists()), here / "configs")


def packaged_configs() -> list[str]:
    """Names of the packaged configs, less the shared defaults."""
    return sorted(path.name for path in configs_dir().glob("*.yaml") if path.name != DEFAULTS)


def find_config(name: str) -> Path:
    """Find a config: as a path first, then, for a bare name, among the packaged ones.

    Raises:
        LabError: There is no such file (names the packaged ones), or it is not YAML.

    """
    path, packaged = Path(name).expanduser(), configs_dir() / name
    if path.is_file():
        read_yaml(path)  # names the file and the line of what is broken; the parser would name neither
        return path
    if path.name == name and packaged.is_file():
        return packaged
    raise LabError(f"{name}: no such config here or among the packaged ones ({', '.join(packaged_configs())})")


def resolve_configs(args: list[str]) -> tuple[list[str], list[Path]]:
    """Replace the value of every ``--config`` by the file it leads to.

    Returns:
        The arguments, and the files in order.

    """
    resolved = [*args]
    files: list[Path] = []
    for place, option, value in _options(args):
        if option in ("--config", "-c"):
            files.append(find_config(value))
            if "=" in args[place]:
                resolved[place] = f"--config={files[-1]}"
            else:
                resolved[place + 1] = str(files[-1])
        elif option in ("--model", "--data", "--trainer", "--sweep") and Path(value).suffix in (".yaml", ".yml"):
            read_yaml(Path(value))  # of a key that is given twice the parser would take the last
    return resolved, files


def config_of_run(args: list[str]) -> Path | None:
    """The config that the run of ``--run_dir`` was trained with, if the arguments name one."""
    configs = [Path(value).expanduser() / CONFIG for _, option, value in _options(args) if option == "--run_dir"]
    return configs[0] if configs and configs[0].is_file() else None


def _options(args: list[str]) -> Iterator[tuple[int, str, str]]:
    """The place, name and value of each option that has one, joined to it by ``=`` or following it."""
    for place, arg in enumerate(args):
        option, separator, value = arg.partition("=")
        if separator:
            yield place, option, value
        elif place + 1 < len(args):
            yield place, option, args[place + 1]
