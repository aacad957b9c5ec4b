"""Files are written whole or not at all, read within bounds, and damage is named."""

import os
import random
import subprocess
from pathlib import Path

import pytest

from lightning_lab.errors import LabError
from lightning_lab.files import check_sums, cut, read_json, read_yaml, set_aside, write_sums, write_whole


class TestWriteWhole:
    def test_a_kill_before_the_replacement_leaves_the_old_file(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = tmp_path / "losses.md"
        write_whole(path, "first")
        monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_whole(path, "second")
        assert [p.read_text() for p in tmp_path.iterdir()] == ["first"]

    def test_it_is_on_the_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: list[bool] = []
        real = os.fsync
        monkeypatch.setattr(
            "os.fsync", lambda handle: (synced.append(os.path.isdir(f"/proc/self/fd/{handle}")), real(handle))
        )
        write_whole(tmp_path / "a", b"x")
        assert synced == [False, True]  # the file, then its folder

    def test_a_full_disk_names_the_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("os.fsync", full)
        with pytest.raises(LabError, match=r"a\.json: cannot be written \(No space left on device\)$"):
            write_whole(tmp_path / "a.json", "{}")
        assert list(tmp_path.iterdir()) == []

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(LabError, match=r"none/a: cannot be written \(No such file"):
            write_whole(tmp_path / "none" / "a", "x")


class TestYaml:
    def test_a_mapping(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        path.write_text("model: {lr: 3.0e-4}\nbase: &b [1, 2]\nagain: *b\n")
        assert read_yaml(path) == {"model": {"lr": 3e-4}, "base": [1, 2], "again": [1, 2]}

    @pytest.mark.parametrize(
        ("content", "why"),
        [
            ("a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)), "more than 100,000 values"),  # noqa: E501
            ("a: &a {b: *a}", "more than 100,000 values"),
            ("a: " + "[" * 5000 + "]" * 5000, "nested too deep"),
            ("model: [unclosed\n", r"line 2: is not YAML"),
            ("a:\n  b: 1\n  c: 2\n  b: 1\n", r"line 4: is not YAML \(the key b is given twice; keep one\)"),
            ("- 1\n- 2\n", "holds no settings"),
            ("", "holds no settings"),
            ("a: \x00", "is not YAML"),
            ("a: 2024-13-45", "is not YAML"),
        ],
    )  # fmt: skip
    def test_one_line(self, tmp_path: Path, content: str, why: str) -> None:
        path = tmp_path / "a.yaml"
        path.write_text(content)
        with pytest.raises(LabError, match=f"^{path}.*{why}"):
            read_yaml(path)

    def test_not_text_and_not_there(self, tmp_path: Path) -> None:
        path = tmp_path / "a.yaml"
        with pytest.raises(LabError, match=r"a\.yaml: cannot be read \(No such file"):
            read_yaml(path)
        path.write_bytes(b"a: \xff")
        with pytest.raises(LabError, match=r"a\.yaml: is not UTF-8 text"):
            read_yaml(path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_damaged_json_is_empty(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert read_json(tmp_path / "a.json") == read_json(tmp_path / "none.json") == {}


def test_what_is_set_aside_replaces_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in ("one", "two", "three"):
        (tmp_path / "a.json").write_text(content)
        set_aside(tmp_path / "a.json", "is damaged")
    kept = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert kept == {"a.json.damaged": "one", "a.json.damaged-2": "two", "a.json.damaged-3": "three"}
    assert capsys.readouterr().err.count("begun anew") == 3


class TestSums:
    def test_they_are_those_of_sha256sum(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"adapter")
        (tmp_path / "b.json").write_bytes(b"{}")
        write_sums(tmp_path)
        subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=tmp_path, check=True)
        check_sums(tmp_path)

    def test_any_flipped_bit_is_named(self, tmp_path: Path) -> None:
        generator = random.Random(0)
        path = tmp_path / "a"
        content = generator.randbytes(500)
        path.write_bytes(content)
        write_sums(tmp_path)
        sums = (tmp_path / "SHA256SUMS").read_bytes()
        for _ in range(200):
            target, whole = generator.choice([(path, content), (tmp_path / "SHA256SUMS", sums)])
            flipped = bytearray(whole)
            flipped[generator.randrange(len(flipped))] ^= 1 << generator.randrange(8)
            target.write_bytes(flipped)
            with pytest.raises(LabError, match="is damaged or missing"):
                check_sums(tmp_path)
            target.write_bytes(whole)
        check_sums(tmp_path)

    def test_a_folder_without_sums_is_not_checked(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_bytes(b"of an older version")
        check_sums(tmp_path)


@pytest.mark.parametrize(("name", "kept"), [("x" * 121, 120), ("名" * 200, 40), ("é" * 61, 60), ("a" + "😀" * 30, 30)])
def test_a_name_is_cut_by_its_bytes_between_characters(name: str, kept: int, tmp_path: Path) -> None:
    assert cut(name) == name[:kept]
    assert cut(cut(name)) == cut(name)
    (tmp_path / cut(name)).touch()
