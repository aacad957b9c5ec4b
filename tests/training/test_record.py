from pathlib import Path

from lightning_lab.training.callbacks.record import COLUMNS, MetricsFile, draw_curve, loss_table


def test_rows_come_back_exactly_and_a_cut_one_is_left_out(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.csv")
    third = 1 / 3
    for step in (1, 2):
        file.append({"step": step, "train_loss": third})
    file.append({"step": 2, "val_loss": 0.1 + 0.2})
    with file.path.open("a") as tail:
        tail.write("1")  # of a row `12,...` that a kill cut short
    rows = file.read()
    assert [row["step"] for row in rows] == ["1", "2", "2"]
    assert float(rows[0]["train_loss"]) == third
    assert float(rows[2]["val_loss"]) == 0.1 + 0.2
    file.keep_until(1)
    assert file.path.read_text().splitlines() == [",".join(COLUMNS), "1,,0.3333333333333333" + "," * (len(COLUMNS) - 3)]


def test_the_labs_table_by_hand() -> None:
    def row(step: int, train: str = "", validation: str = "") -> dict[str, str]:
        return {"step": str(step), "train_loss": train, "val_loss": validation}

    rows = [row(1, "4.0"), row(2, "2.0"), row(2, "", "2.5"), row(3, "1.0"), row(3, "", "2.25")]
    assert loss_table(rows, base=4.5).splitlines()[2:] == [
        "| 0 (base) | | 4.500000 |",
        "| 2 | 3.0000 | 2.500000 |",
        "| 3 | 1.0000 | 2.250000 |",
    ]


def test_a_curve_of_nothing_and_of_one_row(tmp_path: Path) -> None:
    for rows in ([], [{"step": "1", "train_loss": "2.0", "val_loss": ""}]):
        draw_curve(rows, tmp_path / "curve.png", "run")
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
