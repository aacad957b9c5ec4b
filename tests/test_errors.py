"""Arguments that a constructor refuses, each in one line that names the key and what it may be."""

from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest

from lightning_lab import ChatDataModule, QLoRAModule
from lightning_lab.errors import LabError, check_arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 5}, "model.bits is 5; choose one of 4, 8, 16"),
        ({"compute_dtype": "bf16"}, "model.compute_dtype is 'bf16'; choose one of auto, bfloat16, float16, float32"),
        ({"checkpointing": "half"}, "model.checkpointing is 'half'; choose one of none, selective, full, offload"),
        ({"optimizer": "sgd"}, "model.optimizer is 'sgd'; choose one of adamw_8bit, adamw"),
    ],
)
def test_a_choice_of_the_module(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(LabError) as caught:
        QLoRAModule(base="nowhere", **settings)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("constructor", [QLoRAModule, ChatDataModule])
def test_every_choice_of_a_constructor_is_checked(constructor: Any) -> None:
    """Walks the annotations: a key that is added with a Literal is covered without a line of its own."""
    section = {QLoRAModule: "model", ChatDataModule: "data"}[constructor]
    hints = get_type_hints(constructor.__init__)
    choices = [key for key, hint in hints.items() if Literal in map(get_origin, (hint, *get_args(hint)))]
    assert len(choices) >= 4
    for key in choices:
        with pytest.raises(LabError, match=rf"{section}\.{key} is 'no such choice'; choose one of "):
            constructor(**{key: "no such choice"})


def test_what_else_an_annotation_allows() -> None:
    def function(tokens: int | Literal["auto"], split: Literal["train", "test"] | None) -> None: ...

    for tokens, split in ((5, "train"), ("auto", None)):
        check_arguments("data", function, {"tokens": tokens, "split": split}, {"tokens": (1, 9)})
    with pytest.raises(LabError, match="data.tokens is 10; it must be between 1 and 9"):
        check_arguments("data", function, {"tokens": 10, "split": None}, {"tokens": (1, 9)})
    with pytest.raises(LabError, match="data.tokens is 'most'; choose one of auto"):
        check_arguments("data", function, {"tokens": "most", "split": None}, {"tokens": (1, 9)})
