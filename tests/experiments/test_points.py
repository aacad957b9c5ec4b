"""What a grid, settings one by one and ranges make of config keys."""

from typing import Any

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_lab.errors import LabError
from lightning_lab.experiments.points import (
    Point,
    SweepSettings,
    all_runs,
    draw,
    flags,
    grid_points,
    run_name,
    search_space,
    sweep_points,
    tied,
)


class TestGrid:
    def test_every_combination_in_the_order_written(self) -> None:
        points = grid_points(SweepSettings(grid={"model.lr": [1e-4, 3e-4], "model.r": [16, 32]}))
        assert [p.name for p in points] == ["lr1e-4_r16", "lr1e-4_r32", "lr3e-4_r16", "lr3e-4_r32"]
        assert points[1].settings == {"model.lr": 1e-4, "model.r": 32}
        assert flags(points[1].settings) == ["--model.lr=0.0001", "--model.r=32"]

    def test_nested_keys_are_the_same(self) -> None:
        nested = grid_points(SweepSettings(grid={"model": {"lr": [1e-4], "r": [16, 32]}}))
        assert nested == grid_points(SweepSettings(grid={"model.lr": [1e-4], "model.r": [16, 32]}))

    def test_paired_settings_with_names_and_seeds(self) -> None:
        points = grid_points(
            SweepSettings(
                settings=[{"name": "low", "model.lr": 1e-4}, {"model.lr": 3e-4, "model.r": 32}],
                grid={"seed_everything": [1, 2]},
                tie=None,
            )
        )
        assert [p.name for p in points] == ["low_seed1", "low_seed2", "lr3e-4_r32_seed1", "lr3e-4_r32_seed2"]
        assert points[3].settings == {"model.lr": 3e-4, "model.r": 32, "seed_everything": 2}

    def test_alpha_follows_r(self) -> None:
        points = grid_points(SweepSettings(grid={"model.r": [16, 32]}, tie={"model.alpha": "model.r"}))
        assert [p.settings["model.alpha"] for p in points] == [16, 32]
        assert [p.name for p in points] == ["r16", "r32"]
        assert tied({"model.r": 16}, {"model.alpha": "2 * model.r"}) == {"model.r": 16, "model.alpha": 32}
        assert tied({"model.r": 5}, {"model.dropout": "0.01*model.r"})["model.dropout"] == pytest.approx(0.05)

    @pytest.mark.parametrize(
        ("settings", "says"),
        [
            ({}, "no settings"),
            ({"grid": {"model.lr": 1e-4}}, "model.lr needs a list"),
            ({"grid": {"model.lr": []}}, "model.lr needs a list"),
            ({"grid": {"model.lr": [1e-4]}, "settings": [{"model.lr": 2e-4}]}, "model.lr is in sweep.grid and"),
            ({"grid": {"run_dir": ["a"]}}, "run_dir cannot be varied"),
            ({"settings": [{"sweep.seed": 1}]}, "sweep.seed cannot be varied"),
            ({"settings": [{"name": "../x", "model.lr": 1}]}, "'../x' cannot be a run's name"),
            ({"settings": [{"name": ".", "model.lr": 1}]}, "'.' cannot be a run's name"),
            ({"settings": [{"name": "a/b", "model.lr": 1}]}, "'a/b' cannot be a run's name"),
            ({"settings": [{"name": "x" * 200, "model.lr": 1}]}, "cannot be a run's name"),
            ({"settings": [{"name": "名" * 41, "model.lr": 1}]}, "cannot be a run's name"),
            ({"settings": [{"name": "", "model.lr": 1}]}, "'' cannot be a run's name"),
            ({"grid": {"model.lr": [1e-4]}, "tie": {"model.alpha": "model.r"}}, "follows no key"),
            ({"grid": {"model.r": [1]}, "tie": {"model.r": "model.r"}}, "tied and set"),
            ({"grid": {"model.base": ["a"]}, "tie": {"model.alpha": "2*model.base"}}, "that has a number"),
            (
                {"grid": {"model.r": [8]}, "tie": {"model.alpha": "1.2.3 * model.r"}},
                "alpha: 1.2.3 . model.r follows no",
            ),
            ({"grid": {"model.r": [8]}, "tie": {"model.alpha": "model.r + 1"}}, "such as 2 . model.r"),
        ],
    )
    def test_what_cannot_be_combined(self, settings: dict[str, Any], says: str) -> None:
        with pytest.raises(LabError, match=says):
            grid_points(SweepSettings(**settings))

    # the first draw loads hypothesis' tables of Unicode, which is slow on a busy machine
    @settings(suppress_health_check=[HealthCheck.too_slow])
    @given(
        st.dictionaries(
            st.sampled_from(["model.lr", "model.r", "data.source", "model.dora"]),
            st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.integers(), st.booleans(), st.text()),
        )
    )
    def test_a_name_is_one_folder(self, values: dict[str, Any]) -> None:
        name = run_name(values)
        assert "/" not in name
        assert len(name.encode()) <= 120
        assert name.isprintable()

    def test_the_defaults_alone_are_a_point_too(self) -> None:
        points = grid_points(SweepSettings(settings=[{"model.r": 8}, {}, {"name": 3}]))
        assert [(p.name, p.settings) for p in points] == [("r8", {"model.r": 8}), ("base", {}), ("3", {})]


class TestNames:
    def test_of_two_settings_with_one_name_one_must_be_named(self) -> None:
        points = grid_points(SweepSettings(grid={"data.source": ["/a/x.jsonl", "/a|x.jsonl"]}))
        with pytest.raises(LabError, match="a run sourcea-x.jsonl with {'data.source': '/a/x.jsonl'} is there already"):
            all_runs(points, {})

    @pytest.mark.parametrize("named", [{}, {"name": "a" * 100}])
    def test_long_ones_differ(self, named: dict[str, Any]) -> None:
        sources = [f"/{'x' * 120}/{folder}/{'y' * 200}.jsonl" for folder in ("a", "b", "c d", "c e")]
        points = grid_points(SweepSettings(settings=[named], grid={"data.source": sources, "model.r": [8, 16]}))
        names = [*all_runs(points, {})]
        assert len(names) == 8
        assert {len(name) for name in names} == {120}
        assert all(name.startswith(named.get("name", "sourcex")) for name in names)
        assert names == [*all_runs(points[::-1], {})][::-1]

    def test_upper_and_lower_case_are_one_name(self) -> None:
        with pytest.raises(LabError, match=r"a run baseA with .*give {'x': 2} \(as basea\) another name"):
            all_runs([Point("baseA", {"x": 1}), Point("basea", {"x": 2})], {})

    def test_what_there_is_stays_under_its_name(self) -> None:
        points = grid_points(SweepSettings(settings=[{"name": "baseline", "model.lr": 2.5e-4}, {"model.lr": 1e-4}]))
        for name in ("baseline", "lr2.5e-4"):
            begun = {name: {"model.lr": 2.5e-4}}
            assert all_runs(points, begun) == begun | {"lr1e-4": {"model.lr": 1e-4}}
        with pytest.raises(LabError, match="a run baseline with {'model.lr': 0.0002} is there already"):
            all_runs(points, {"baseline": {"model.lr": 2e-4}})

    def test_settings_twice(self) -> None:
        points = grid_points(SweepSettings(settings=[{"model.lr": 1e-4}, {"name": "again", "model.lr": 1e-4}]))
        with pytest.raises(LabError, match="as again"):
            all_runs(points, {})


class TestSpace:
    def test_whole_numbers_stay_whole(self) -> None:
        space = search_space({"model": {"r": {"low": 4, "high": 64}, "lr": {"low": "1e-5", "high": 1e-3, "log": True}}})
        assert space == {
            "model.r": {"low": 4, "high": 64},
            "model.lr": {"low": 1e-5, "high": 1e-3, "log": True},
        }

    @pytest.mark.parametrize(
        "range_",
        [
            {"low": 1},
            {"low": 2, "high": 1},
            {"low": 0.0, "high": 1.0, "log": True},
            {"low": 1, "high": 2, "log": True, "step": 2},
            {"low": 0.1, "high": 0.2, "log": True, "step": 0.1},
            {"choices": []},
            {"choices": [1], "low": 1},
            {"low": "x", "high": 1},
            {"low": 1, "high": 2, "prior": 3},
            {"low": 0, "high": 1, "step": 0},
            {"low": 0, "high": 1, "step": -1},
            {"low": 0, "high": float("inf")},
            {"low": 0, "high": float("nan")},
            {"low": 0, "high": 10**400},
            {"low": 1, "high": 2, "step": None},
            [1, 2],
        ],
    )
    def test_impossible_ranges(self, range_: Any) -> None:
        with pytest.raises(LabError, match=r"sweep\.search: model(\.|: {')lr.*; write {low: ..., high: ...}"):
            search_space({"model.lr": range_})

    def test_every_choice_and_both_ends_are_checked(self) -> None:
        sweep = SweepSettings(
            search={"model.r": {"choices": [8, 12.5, 16]}, "model.lr": {"low": 1.0, "high": 2.0}},
            tie={"model.alpha": "2*model.r"},
        )
        corners = sweep_points(sweep, search_space(sweep.search or {}))
        assert [tuple(p.settings.values()) for p in corners] == [
            (8, 1.0, 16),
            (12.5, 1.0, 25),
            (16, 1.0, 32),
            (8, 2.0, 16),
        ]

    def test_what_is_drawn_lies_in_the_range_and_on_its_steps(self) -> None:
        modules = [["q_proj"], ["q_proj", "v_proj"], None]
        space = search_space(
            {
                "a": {"low": 0, "high": 1, "step": 0.25},
                "b": {"low": 4, "high": 64, "step": 4},
                "c": {"choices": modules},
                "d": {"low": "1e-5", "high": 1e-3, "log": True},
            }
        )
        study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        for _ in range(20):
            trial = study.ask()
            drawn = {key: draw(trial, key, range_) for key, range_ in space.items()}
            assert drawn["a"] in (0.0, 0.25, 0.5, 0.75, 1.0)
            assert isinstance(drawn["b"], int)
            assert drawn["b"] % 4 == 0
            assert drawn["c"] in modules
            assert 1e-5 <= drawn["d"] <= 1e-3


def test_flags_of_lists_and_nothing() -> None:
    settings = {"model.target_modules": ["q_proj"], "data.rows": None, "model.dora": True, "data.source": "a b"}
    assert flags(settings) == [
        '--model.target_modules=["q_proj"]',
        "--data.rows=null",
        "--model.dora=true",
        "--data.source=a b",
    ]
