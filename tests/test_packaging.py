import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_holds_every_package() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "lightning_lab").rglob("__init__.py")}
    assert listed - {"lightning_lab.configs"} == there
