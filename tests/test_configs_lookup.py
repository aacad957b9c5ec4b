from pathlib import Path
from typing import Any

import pytest

from lightning_lab.configs_lookup import DEFAULTS, configs_dir, find_config, packaged_configs, resolve_configs
from lightning_lab.errors import LabError
from lightning_lab.experiments.reference import lab_run, published
from lightning_lab.files import flatten, read_yaml


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
    named.add("lab_faithful")
    assert {f"{name}.yaml" for name in named} <= set(packaged_configs())
    assert DEFAULTS not in packaged_configs()
    assert (configs_dir() / DEFAULTS).is_file()


# The lab's runs as it published them: learning rate, and rank, which is alpha too.
LAB = {
    "baseline.yaml": (2e-4, 16),
    "lr1e-4_r16.yaml": (1e-4, 16),
    "lr3e-4_r16.yaml": (3e-4, 16),
    "lr3e-4_r32.yaml": (3e-4, 32),
}


def merged(*names: str) -> dict[str, Any]:
    """Settings by dotted key, later files over earlier ones; all of them known to the shared defaults."""
    found: dict[str, Any] = {}
    for name in (DEFAULTS, *names):
        settings = flatten(read_yaml(configs_dir() / name))
        assert not found or settings.keys() <= found.keys() | {"sweep.settings", "sweep.tie.model.alpha"}
        found |= settings
    return found


@pytest.mark.parametrize("name", [*LAB, "lab_grid.yaml"])
def test_the_labs_configs_are_its_runs(name: str) -> None:
    settings = merged(name)
    lr, r = LAB.get(name, (2e-4, 16))  # the grid's own are in its settings
    recipe = {
        **{"base": "unsloth/Llama-3.2-1B-Instruct", "bits": 4, "lr": lr, "r": r, "alpha": r, "dropout": 0.0},
        **{"optimizer": "adamw_8bit", "weight_decay": 0.01, "warmup_steps": 100, "max_grad_norm": 1.0},
        "hf_eval_batch_size": 2,
    }
    data = {
        **{"source": "mlabonne/FineTome-100k", "rows": 15_000, "split": [12_000, 1_500, 1_500], "split_method": "lab"},
        **{"split_seed": 42, "template": "llama-3.1", "mask": "assistant", "max_length": 2048, "batch_size": 8},
    }
    run = {"seed_everything": 3407, "val_every_steps": 250, "train_loss_window": 10, "trainer.max_epochs": 1}
    expected = run | flatten({"model": recipe, "data": data})
    assert {key: settings[key] for key in expected} == expected
    assert 12_000 / settings["data.batch_size"] == 1_500
    assert lab_run(settings, published())[1] == []  # what a report calls the lab's settings are these


@pytest.mark.parametrize("overlay", ["embedded.yaml", "chitchat.yaml"])
@pytest.mark.parametrize("name", [*LAB, "lab_grid.yaml"])
def test_a_sample_is_trained_on_as_without_the_labs_split(name: str, overlay: str) -> None:
    settings = merged(name, overlay)
    own = merged(overlay)
    assert {key for key in own if settings[key] != own[key]} <= {
        "model.lr",
        "model.r",
        "model.alpha",
        "data.on_bad_row",
    }
    assert (settings["model.warmup_steps"], settings["data.split_seed"], settings["train_loss_window"]) == (
        5,
        3407,
        None,
    )


def test_nothing_of_the_lab_binds_a_users_own_data() -> None:
    settings = merged()
    assert (settings["data.rows"], settings["data.split"], settings["data.on_bad_row"]) == (
        None,
        [0.8, 0.1, 0.1],
        "error",
    )
    assert (settings["data.split_method"], settings["model.hf_eval_batch_size"]) == ("permutation", 8)


def test_headers_say_what_the_lab_reached() -> None:
    for run, name in zip(published()["runs"], [*LAB, "llama-3.2-3b.yaml"], strict=True):
        header = "".join(line for line in find_config(name).read_text().splitlines() if line.startswith("#"))
        for split in ("validation", "test"):
            there = f"{split} loss ({'val' if split == 'validation' else 'test'}_loss_hf) of "
            assert (f"{there}{run[split][-1]:.6f}" if split in run else f"no {split} loss") in header


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

    @pytest.mark.parametrize("args", [["--config=own.yaml"], ["--data=own.yaml"], ["--model", "own.yaml"]])
    def test_a_key_that_is_given_twice_is_an_error(self, args: list[str]) -> None:
        Path("own.yaml").write_text("lr: 1\nr: 2\nlr: 3\n")
        with pytest.raises(LabError, match=r"own\.yaml line 3: .*the key lr is given twice"):
            resolve_configs(args)

    @pytest.mark.parametrize("args", [["--config=no.yaml"], ["-c", "no.yaml"], ["--config="]])
    def test_a_missing_one_is_an_error(self, args: list[str]) -> None:
        with pytest.raises(LabError, match="no such config"):
            resolve_configs(args)
