from pathlib import Path

import pytest

from lightning_lab.configs_lookup import DEFAULTS, configs_dir, find_config, packaged_configs, resolve_configs
from lightning_lab.errors import LabError


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, text: str = "val_every_steps: 3\n") -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_the_packaged_configs_are_those_of_the_design() -> None:
    named = {"baseline", "lr1e-4_r16", "lr3e-4_r16", "lr3e-4_r32", "llama-3.2-3b", "embedded", "chitchat"}
    assert {f"{name}.yaml" for name in named} <= set(packaged_configs())
    assert DEFAULTS not in packaged_configs()
    assert (configs_dir() / DEFAULTS).is_file()


class TestFindConfig:
    def test_a_packaged_name_from_any_directory(self) -> None:
        found = find_config("embedded.yaml")
        assert found == configs_dir() / "embedded.yaml"
        assert found.is_absolute()  # so that it can be opened from here
        assert "SmolLM2" in found.read_text()

    def test_the_working_directory_comes_first(self) -> None:
        write("embedded.yaml")
        assert find_config("embedded.yaml") == Path("embedded.yaml")

    def test_a_path(self, tmp_path: Path) -> None:
        write("some/own.yaml")
        assert find_config("some/own.yaml") == Path("some/own.yaml")
        assert find_config(str(tmp_path / "some" / "own.yaml")) == tmp_path / "some" / "own.yaml"

    @pytest.mark.parametrize("name", ["some/embedded.yaml", "./some/embedded.yaml", "embedded", "own.yaml", ""])
    def test_what_is_not_there_names_the_choices(self, name: str) -> None:
        with pytest.raises(LabError) as error:
            find_config(name)
        assert str(error.value).startswith(f"{name}: no such config here or among the packaged ones (")
        assert "baseline.yaml, " in str(error.value)
        assert "embedded.yaml" in str(error.value)

    def test_only_a_bare_name_leads_to_the_packaged_ones(self) -> None:
        with pytest.raises(LabError, match="no such config"):
            find_config(f"../{configs_dir().name}/embedded.yaml")  # of the packaged folder it would be there

    def test_a_folder_is_no_config(self) -> None:
        Path("folder.yaml").mkdir()
        with pytest.raises(LabError, match=r"^folder\.yaml: no such config"):
            find_config("folder.yaml")

    @pytest.mark.parametrize(
        ("text", "line"),
        [
            ("model: [4, 5\ndata: 1\n", 2),
            ("model:\n  lr: 1\n bits: 4\n", 3),
            ("model:\n\tlr: 1\n", 2),
            ("a: 1\nb: 'open\n", 3),
        ],
    )
    def test_broken_yaml_is_named_with_its_line(self, text: str, line: int) -> None:
        write("own.yaml", text)
        with pytest.raises(LabError, match=rf"^own\.yaml line {line}: is not YAML \(.+\)$"):
            find_config("own.yaml")

    @pytest.mark.parametrize("text", ["", "# only a comment\n", "- a\n- b\n", "a sentence\n", "42\n"])
    def test_what_holds_no_settings(self, text: str) -> None:
        write("own.yaml", text)
        with pytest.raises(LabError, match=r"^own\.yaml: holds no settings; a config is `key: value` lines"):
            find_config("own.yaml")

    def test_a_binary_file(self) -> None:
        Path("own.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(LabError, match=r"^own\.yaml: is not UTF-8 text"):
            find_config("own.yaml")


class TestResolveConfigs:
    @pytest.mark.parametrize("option", ["--config", "-c"])
    @pytest.mark.parametrize("joined", [True, False])
    def test_each_way_to_write_it(self, option: str, joined: bool) -> None:
        given = [f"{option}=embedded.yaml"] if joined else [option, "embedded.yaml"]
        found = configs_dir() / "embedded.yaml"
        resolved, files = resolve_configs(["--a=1", *given, "--b", "2"])
        replaced = [f"--config={found}"] if joined else [option, str(found)]
        assert resolved == ["--a=1", *replaced, "--b", "2"]
        assert files == [found]

    def test_several_keep_their_order(self) -> None:
        write("own.yaml")
        resolved, files = resolve_configs(["--config", "own.yaml", "--x=1", "-c=baseline.yaml", "--config=own.yaml"])
        baseline = configs_dir() / "baseline.yaml"
        assert files == [Path("own.yaml"), baseline, Path("own.yaml")]
        assert resolved == ["--config", "own.yaml", "--x=1", f"--config={baseline}", "--config=own.yaml"]

    @pytest.mark.parametrize(
        "args",
        [
            [],
            ["--data.source", "embedded.yaml"],
            ["--data.source=--config"],
            ["--configuration=embedded.yaml"],
            ["--print_config"],
            ["--config"],  # without a value: the parser says so
        ],
    )
    def test_everything_else_is_left_alone(self, args: list[str]) -> None:
        assert resolve_configs(args) == (args, [])

    @pytest.mark.parametrize("args", [["--config=no.yaml"], ["-c", "no.yaml"], ["--config="]])
    def test_a_missing_one_is_an_error(self, args: list[str]) -> None:
        with pytest.raises(LabError, match="no such config"):
            resolve_configs(args)
