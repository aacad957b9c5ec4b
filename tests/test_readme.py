"""README and docs say what the program has: commands parse; configs, keys, files and links exist; code is the same."""

import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import lightning_lab
from lightning_lab.__main__ import COMMANDS, main
from lightning_lab.configs_lookup import find_config, resolve_configs
from lightning_lab.experiments.points import SweepSettings

ROOT = Path(__file__).parents[1]
SECTIONS = {"model": lightning_lab.QLoRAModule, "data": lightning_lab.ChatDataModule, "sweep": SweepSettings}
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "benchmarks").glob("*.md")),
]
COMMAND = re.compile(rf"^(?:\S*python -m lightning_lab )?((?:{'|'.join(COMMANDS)}) .+)$")
ONLY_NAMED = (["report", "--compare"], ["fit", "--help"])  # in running text, without what would follow


def blocks(page: Path) -> list[str]:
    """The page's fenced code."""
    return re.findall(r"(?ms)^```\w*\n(.*?)^```$", page.read_text())


def lab_commands() -> list[list[str]]:
    """Arguments of every command of this program, in code (continued lines joined) and in running text."""
    written: list[str] = []
    for page in PAGES:
        text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text())
        written += [line for block in blocks(page) for line in re.sub(r"\\\n\s*", "", block).splitlines()]
        written += [" ".join(code.split()) for code in re.findall(r"`([^`]*)`", text)]
    written += [f"{'sweep' if '--sweep.' in code else 'fit'} {code}" for code in written if re.match(r"--\S+ ", code)]
    split = [shlex.split(match[1], comments=True) for code in written if (match := COMMAND.match(code))]
    return [arguments for i, arguments in enumerate(split) if arguments not in (*ONLY_NAMED, *split[:i])]


@pytest.fixture(autouse=True)
def _a_folder_as_the_readme_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("benchmarks", "configs"):
        Path(name).symlink_to(ROOT / name)
    Path("runs/X").mkdir(parents=True)
    Path("runs/X/config.yaml").write_text("model:\n  r: 8\n")


def test_there_is_something_to_test() -> None:
    commands = {arguments[0] for arguments in lab_commands()}
    assert {"fit", "test", "preview", "sweep", "report"} <= commands
    assert any("lab_grid.yaml" in arguments for arguments in lab_commands())


@pytest.mark.parametrize("arguments", lab_commands(), ids=" ".join)
def test_the_commands_parse(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    command, *rest = arguments
    if command == "report":
        from lightning_lab.experiments.report import _parser

        _parser().parse_args(rest)
        return
    resolve_configs(rest)  # every config that is named exists
    with pytest.raises(SystemExit, match="^0$"):
        main([command, *rest, "--print_config"])
    assert "model:" in capsys.readouterr().out


def test_named_files_exist() -> None:
    for page in PAGES:
        text = page.read_text()
        for name in set(re.findall(r"`([\w.-]+\.yaml)`", text)) - {"config.yaml", "base.yaml"}:
            assert (page.parent / name).is_file() or find_config(name), name
        for name in set(re.findall(r"(?:benchmarks|tests|examples|lightning_lab|docs|configs)/[\w/.-]*\.\w+", text)):
            assert (ROOT / name.rstrip(".")).exists(), (page.name, name)


def test_named_keys_exist() -> None:
    for page in PAGES:
        for section, key in set(re.findall(r"`(model|data|sweep)\.([a-z_]+)(?=[`:. ])", page.read_text())):
            assert key in inspect.signature(SECTIONS[section]).parameters, f"{page.name}: {section}.{key}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith(("http:", "https:")):
            continue
        name, _, heading = link.partition("#")
        target = page.parent / name if name else page
        assert target.exists(), link
        headings = re.findall(r"(?m)^#+ (.*)$", target.read_text()) if heading else []
        assert not heading or heading in [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings], link


def test_the_tree_is_the_package() -> None:
    """Every module that the README names is one; every folder of the package is named."""
    (tree,) = (block for block in blocks(ROOT / "README.md") if block.startswith("lightning_lab/"))
    named: dict[str, Any] = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in tree.splitlines())
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "lightning_lab").rglob("__init__.py")}
    assert {f"{f}/" for f in folders if f.name != "callbacks"} == {name for name in named if name.endswith("/")}
    for folder, described in named.items():
        if not folder.endswith("/"):
            assert (ROOT / folder).is_file()
            continue
        modules = re.sub(r"\([^)]*\)|->", " ", described)
        for module in re.findall(r"[\w/]+", modules):
            assert (ROOT / folder / f"{module}.py").is_file() or (ROOT / folder / module).is_dir(), (folder, module)


def test_the_code_from_python_is_the_packages_own() -> None:
    """Which `test_examples` runs."""
    docstring = [line.removeprefix("    ") for line in (lightning_lab.__doc__ or "").splitlines()]
    code = "\n".join(docstring[docstring.index("import lightning.pytorch as pl") :]).partition("\n\nImporting")[0]
    assert code in "".join(blocks(ROOT / "README.md"))
    uncommented = "\n".join(re.sub(r"  # .*", "", block) for block in blocks(ROOT / "docs" / "python.md"))
    assert code in uncommented
