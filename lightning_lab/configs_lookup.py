"""Where a config's bare name leads."""

from pathlib import Path

from lightning_lab.errors import LabError

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
    path = Path(name)
    packaged = configs_dir() / name
    if path.is_file():
        return _checked(path)
    if path.name == name and packaged.is_file():
        return packaged
    raise LabError(f"{name}: no such config here or among the packaged ones ({', '.join(packaged_configs())})")


def _checked(path: Path) -> Path:
    """Name the file and the line of broken YAML; the parser would name neither."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except UnicodeDecodeError:
        raise LabError(f"{path}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise LabError(f"{path}{line}: is not YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(content, dict):
        raise LabError(f"{path}: holds no settings; a config is `key: value` lines such as those of --print_config")
    return path


def resolve_configs(args: list[str]) -> tuple[list[str], list[Path]]:
    """Replace the value of every ``--config`` by the file it leads to.

    Returns:
        The arguments, and the files in order.

    """
    resolved: list[str] = []
    files: list[Path] = []
    expects_value = False
    for arg in args:
        option, separator, value = arg.partition("=")
        if expects_value:
            files.append(find_config(arg))
            resolved.append(str(files[-1]))
            expects_value = False
        elif option in ("--config", "-c") and separator:
            files.append(find_config(value))
            resolved.append(f"--config={files[-1]}")
        else:
            expects_value = arg in ("--config", "-c")
            resolved.append(arg)
    return resolved, files
