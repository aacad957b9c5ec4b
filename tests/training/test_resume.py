"""A checkpoint's file is read whole or refused; its settings must be those of the run."""

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_lab.__main__ import main
from lightning_lab.errors import LabError
from lightning_lab.training.resume import CheckpointFile, check_version, own_part, read_checkpoint
from tests.training.conftest import checkpoint_file


class RunsCode:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


class TestReading:
    def test_our_own(self, finished: Path) -> None:
        checkpoint = read_checkpoint(checkpoint_file(finished / "whole", "last"))
        assert checkpoint["lightning_lab"]["completed_steps"] == 4
        assert all("lora_" in name for name in checkpoint["state_dict"])

    @pytest.mark.parametrize("how", ["torch", "pickle"])
    def test_a_pickle_that_would_run_code(self, tmp_path: Path, how: str) -> None:
        path, ran = tmp_path / "x.ckpt", tmp_path / "ran"
        content = {"lightning_lab": {"completed_steps": 1}, "state_dict": RunsCode(ran)}
        if how == "torch":
            torch.save(content, path)
        else:
            path.write_bytes(pickle.dumps(content))
        with pytest.raises(LabError, match=r"x\.ckpt: (cannot be read as a checkpoint \(|is damaged)"):
            read_checkpoint(path)
        assert not ran.exists()
        if how == "torch":  # the trap is a real one
            torch.load(path, weights_only=False)
        else:
            pickle.loads(path.read_bytes())
        assert ran.exists()

    @pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04", b"\x80\x02"])
    def test_a_file_of_something_else(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "x.ckpt").write_bytes(content)
        with pytest.raises(LabError, match=r"x\.ckpt: is damaged \(its checksum does not match\); use another"):
            read_checkpoint(tmp_path / "x.ckpt")

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
    def test_one_of_ours_cut_short(self, finished: Path, tmp_path: Path, share: float) -> None:
        whole = checkpoint_file(finished / "whole", "last").read_bytes()
        (tmp_path / "x.ckpt").write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(LabError, match=r"x\.ckpt: is damaged"):
            read_checkpoint(tmp_path / "x.ckpt")

    @pytest.mark.parametrize("name", ["last", "best"])
    def test_any_flipped_bit(self, finished: Path, tmp_path: Path, name: str) -> None:
        whole = checkpoint_file(finished / "whole", name).read_bytes()
        generator, path = random.Random(1), tmp_path / "x.ckpt"
        places = [(generator.randrange(len(whole)), generator.randrange(8)) for _ in range(200)]
        places += [(len(whole) - 1 - i, generator.randrange(8)) for i in range(100)]  # the end record and the checksum
        for byte, bit in places:
            flipped = bytearray(whole)
            flipped[byte] ^= 1 << bit
            path.write_bytes(flipped)
            with pytest.raises(LabError, match=r"x\.ckpt: is damaged"):
                read_checkpoint(path)

    def test_plain_torch_reads_it(self, finished: Path) -> None:
        path = checkpoint_file(finished / "whole", "last")
        plain = torch.load(path, weights_only=True)
        assert plain.keys() == read_checkpoint(path).keys()

    def test_one_that_a_plain_trainer_saved_has_no_checksum(self, finished: Path, tmp_path: Path) -> None:
        checkpoint = read_checkpoint(checkpoint_file(finished / "whole", "last"))
        torch.save(checkpoint, tmp_path / "x.ckpt")
        assert read_checkpoint(tmp_path / "x.ckpt").keys() == checkpoint.keys()

    def test_another_version(self, finished: Path, tmp_path: Path) -> None:
        checkpoint = read_checkpoint(checkpoint_file(finished / "whole", "last"))
        checkpoint["lightning_lab"]["version"] = 99
        torch.save(checkpoint, tmp_path / "x.ckpt")
        with pytest.raises(
            LabError, match=r"x\.ckpt: was saved by another version .* \(format 99, this one reads 2 and 3\)"
        ):
            read_checkpoint(tmp_path / "x.ckpt")

    def test_the_version_before_can_be_evaluated_but_not_continued(self, finished: Path, tmp_path: Path) -> None:
        checkpoint = read_checkpoint(checkpoint_file(finished / "whole", "last"))
        checkpoint["lightning_lab"]["version"] = 2
        torch.save(checkpoint, tmp_path / "x.ckpt")
        state = own_part(read_checkpoint(tmp_path / "x.ckpt"))
        with pytest.raises(LabError, match=r"format 2.*optimizer state.*model\.adapter"):
            check_version(state)

    def test_it_never_passes_through_tmpdir(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TMPDIR", "/nonexistent")
        monkeypatch.setattr("tempfile.tempdir", None)
        CheckpointFile().save_checkpoint({"a": 1}, tmp_path / "x.ckpt")
        assert [path.name for path in tmp_path.iterdir()] == ["x.ckpt"]

    def test_a_folder_and_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(LabError, match=r": cannot be read \(Is a directory\)"):
            read_checkpoint(tmp_path)
        with pytest.raises(LabError, match=r"x\.ckpt: cannot be read \(No such file"):
            read_checkpoint(tmp_path / "x.ckpt")

    @pytest.mark.parametrize(
        "content",
        [{"state_dict": {}, "lightning_lab": 2}, [1, 2], {}, "lightning_lab", torch.ones(2)],
    )
    def test_somebody_elses(self, tmp_path: Path, content: Any) -> None:
        torch.save(content, tmp_path / "x.ckpt")
        with pytest.raises(LabError, match=r"x\.ckpt: is not a checkpoint of this program$"):
            read_checkpoint(tmp_path / "x.ckpt")

    def test_the_command_line_says_it_in_one_line(
        self, runs: Path, args: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        torch.save({"state_dict": {}}, "x.ckpt")
        assert main(["test", *args, "--ckpt_path=x.ckpt"]) == 2
        assert "error: x.ckpt: is not a checkpoint of this program\n" in capsys.readouterr().err
        assert not Path("runs").exists()  # nothing was made for it
