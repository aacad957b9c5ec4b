"""Every field of a row is honoured, harmless or refused; expected values are written by hand."""

import json
from typing import Any

import pytest

from lightning_lab.data.conversation import Conversation, Message, RowError, RowFormat, parse_conversation, unread_keys
from lightning_lab.errors import LabError

CALL = {"type": "function", "function": {"name": "get_rate", "arguments": {"pair": "EURSEK"}}}
TOOL = {
    "type": "function",
    "function": {"name": "get_rate", "parameters": {"type": "object", "properties": {"pair": {"type": "string"}}}},
}
QA = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b."}]
SAID = (Message("user", "a?"), Message("assistant", "b."))


def parse(row: dict[str, Any], **options: Any) -> tuple[Message, ...]:
    return parse_conversation(row, RowFormat(**options)).messages


def answer(**fields: Any) -> dict[str, Any]:
    return {"messages": [QA[0], {"role": "assistant", "content": "b.", **fields}]}


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [], "messages": QA},
        {"conversations": None, "messages": QA},
        {"instruction": "", "input": "", "output": "", "messages": QA},
        {"messages": [{"from": "", "value": "", **turn} for turn in QA]},
        {"messages": [{"from": None, "value": None, **turn} for turn in QA]},
        {"messages": [{"value": "", **turn} for turn in QA]},
        {"messages": [{"from": "human", "role": "user", "content": "a?"}, QA[1]]},
        {"messages": QA, "conversations": QA, "chosen": None, "images": []},
        {"messages": json.dumps(QA), "source": "x", "score": 5.0, "id": 3},
        {"prompt": "a?", "messages": QA, "prompt_id": "9f"},
        {"instruction": "a?", "response": "b.", "conversations": QA, "difficulty": "easy"},
        {"prompt": "a?", "completion": "b."},
        {"prompt": QA[:1], "completion": QA[1:]},
        {"instruction": "a?", "context": "", "response": "b.", "category": "open_qa"},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "?"}]},
                QA[1],
            ]
        },
        {"messages": [{"content": "a?", "role": "user", "name": None, "turn_identifier": 1, "weight": 0}, QA[1]]},
        {
            "messages": [{**turn, "train": turn["role"] == "assistant", "tool_calls": None} for turn in QA],
            "tools": "[]",
        },
    ],
)
def test_rows_that_say_the_same(row: dict[str, Any]) -> None:
    assert parse(row) == SAID


def test_columns_by_other_names() -> None:
    assert parse({"question": "a?", "answer": "b."}, columns={"prompt": "question", "completion": "answer"}) == SAID
    assert parse({"dialog": QA, "messages": None}, columns={"messages": "dialog"}) == SAID
    swapped = {"prompt": "b.", "completion": "a?"}
    assert parse(swapped, columns={"prompt": "completion", "completion": "prompt"}) == SAID
    with pytest.raises(RowError, match="no column 'answer', which data.columns names"):
        parse({"question": "a?"}, columns={"prompt": "question", "completion": "answer"})
    with pytest.raises(RowError, match="'prompt', which is filled too"):
        parse({"question": "a?", "prompt": "c?", "output": "b."}, columns={"prompt": "question"})
    with pytest.raises(LabError, match=r"data\.columns has the key 'question'; choose from completion, "):
        RowFormat(columns={"question": "prompt"})


def test_a_row_may_have_a_name_and_an_empty_system_turn_beside_its_system() -> None:
    said = [{"role": "system", "content": " "}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    found = parse_conversation({"name": "first", "system": "Be brief.", "messages": said})
    assert [message.content for message in found.messages] == ["Be brief.", "a", "b"]


def test_a_null_argument_is_said() -> None:
    for arguments in ({"x": None, "y": 1}, '{"x": null, "y": 1}'):
        call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}
        (_, message) = parse_conversation({"messages": [{"role": "user", "content": "a"}, call]}).messages
        assert message.tool_calls[0]["function"]["arguments"] == {"x": None, "y": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "a", "output": "b", "history": "3"}, "'history' must be a list of"),
        ({"instruction": "a", "output": "b", "history": "[["}, "found text that is not JSON"),
        ({"instruction": "a", "output": "b", "history": 3}, "'history' must be a list of"),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 10**400}]},
            "must be a number",
        ),
    ],
)
def test_cells_of_a_wrong_kind(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse_conversation(row)


def test_history_comes_first() -> None:
    row = {
        "instruction": "Its size?",
        "input": "",
        "output": "Ten.",
        "system": "Be brief.",
        "history": [["Where?", "S."]],
    }
    assert parse(row) == (
        *(Message("system", "Be brief."), Message("user", "Where?"), Message("assistant", "S.")),
        *(Message("user", "Its size?"), Message("assistant", "Ten.")),
    )
    assert parse({**row, "history": '[["Where?", "S."]]'}) == parse(row)
    assert len(parse(row, ignore=("history",))) == 3
    assert parse({"system_prompt": "s", "messages": QA})[0] == Message("system", "s")


@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        *(({"weight": 0}, 0), ({"weight": 0.5}, 0.5), ({"weight": 2, "train": True}, 2), ({"train": False}, 0)),
        *(({"trainable": False, "training": False, "loss": False}, 0), ({"train_on_turn": "False"}, 0)),
        *(({"loss": 1}, 1), ({"train": "true", "weight": None}, 1)),
    ],
)
def test_flags_are_weights(flags: dict[str, Any], weight: float) -> None:
    row = {"messages": [*QA, *answer(**flags)["messages"]]}
    assert [message.weight for message in parse(row)] == [1, 1, 1, weight]


def test_what_is_not_learned_may_be_empty() -> None:
    turns = [*QA, QA[0], {"role": "assistant", "content": " ", "weight": 0}, {"role": "user", "content": ""}, QA[1]]
    assert [m.content for m in parse({"messages": turns})] == ["a?", "b.", "a?", " ", "", "b."]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": QA, "chosen": QA, "images": ["x"]}, r"the row has 'chosen' and 'images', .* data\.ignore"),
        ({"messages": QA, "output": "c."}, r"the row has 'output', "),
        ({"messages": QA, "prompt": "c?"}, "different conversations"),
        (
            {"messages": QA, "conversations": QA * 2},
            "'conversations' and 'messages' differ",
        ),
        ({"prompt": "a", "instruction": "b", "output": "c"}, "'prompt' and 'instruction' of the row differ"),
        ({"messages": QA, "system": "a", "system_prompt": "b"}, "'system' and 'system_prompt' of the row differ"),
        ({"messages": "[]"}, "'messages' is empty"),
        ({"messages": QA, "tools": "get_rate"}, "'tools' must be a list of objects, found text that is not JSON"),
        ({"messages": QA, "tools": [3]}, "'tools' must be a list of objects or its JSON text"),
        (
            {"instruction": "a", "output": "b", "history": [["c"]]},
            r"'history' must be a list of \[question, answer\] pairs",
        ),
        (answer(value="c."), r"'value' and 'content' of turn 2 \(assistant\) differ"),
        (answer(**{"from": "human"}), "'from' and 'role' of turn 2 differ"),
        (answer(mask=True, train_detail=[1]), r"turn 2 \(assistant\) has 'mask' and 'train_detail', "),
        (answer(weight=0), "every answer is marked as not to be trained"),
        (answer(weight=-1), r"'weight' of turn 2 \(assistant\) is -1; it must be a number of at least 0"),
        (answer(weight=float("nan")), "'weight' of turn 2"),
        (answer(loss=0.73), r"'loss' of turn 2 \(assistant\) is 0.73; it must be true or false"),
        (answer(weight=1, train=False), "'weight' and 'train' of turn 2 .* contradict each other"),
        ({"messages": [{**QA[0], "train": True}, QA[1]]}, r"'train' would train turn 1 \(user\), but only answers"),
        (answer(content=" \n"), r"the answer in turn 2 is empty; data\.empty_answers: keep"),
        ({"instruction": "a", "output": ""}, "the answer in turn 2 is empty"),
        (
            answer(content=[{"type": "image_url", "image_url": "x"}]),
            r"turn 2 \(assistant\) has a part of type 'image_url'",
        ),
        (answer(content=[{"type": "text", "text": "x", "audio": "y"}]), r"turn 2 \(assistant\) has 'audio', "),
        ({"messages": [{**QA[0], "tool_calls": [CALL]}, QA[1]]}, r"turn 1 \(user\) has tool calls or reasoning"),
        (answer(tool_calls=[{"name": "f", "arguments": "x"}]), "the arguments of a tool call of turn 2 .* not JSON"),
        (answer(tool_calls=[{"arguments": {}}]), "a tool call of turn 2 .* must have a 'name'"),
        (answer(tool_calls=[{**CALL, "result": 1}]), r"a tool call of turn 2 \(assistant\) has 'result'"),
        (answer(tool_calls=[CALL], function_call={"name": "g"}), "has 'tool_calls' and 'function_call'"),
        (answer(tool_calls=[{"name": "f", "arguments": {"x": "\ud83d"}}]), "half a surrogate pair"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse(row)


def test_the_user_may_know_better() -> None:
    row = {**answer(mask=True), "chosen": "x", "score": 3, "images": None}
    row_format = RowFormat(("mask", "chosen"))
    assert parse_conversation(row, row_format).messages == SAID
    assert unread_keys(row, row_format) == {"mask", "chosen", "score"}
    assert unread_keys({"conversations": ["a?", "b."], "source": "x"}, RowFormat()) == {"source"}
    renamed = RowFormat(columns={"prompt": "topic", "completion": "answer"})
    assert unread_keys({"topic": "Why?", "answer": "So.", "source": "x"}, renamed) == {"source"}
    assert parse(answer(content=""), empty_answers="keep")[1] == Message("assistant", "")


@pytest.mark.parametrize(
    "fields",
    [
        {"content": None, "tool_calls": [CALL]},
        {"content": "", "tool_calls": [{"id": "", "type": "function", "index": 0, **CALL}]},
        {"content": "", "tool_calls": [{"function": {"name": "get_rate", "arguments": '{"pair": "EURSEK"}'}}]},
        {"content": None, "function_call": {"name": "get_rate", "arguments": '{"pair": "EURSEK"}'}},
        {
            "content": None,
            "tool_calls": json.dumps([{"name": "get_rate", "arguments": {"pair": "EURSEK"}}]),
        },
    ],
)
def test_forms_of_a_tool_call(fields: dict[str, Any]) -> None:
    conversation = parse_conversation({**answer(**fields), "tools": json.dumps([TOOL])})
    assert conversation == Conversation((SAID[0], Message("assistant", "", tool_calls=(CALL,))), (TOOL,))
