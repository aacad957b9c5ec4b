import pytest

from lightning_lab.data.conversation import Message, RowError, parse_conversation, parse_prompt

TURNS = (Message("user", "hi"), Message("assistant", "yes?"))


def parse(row: object) -> tuple[Message, ...]:
    return parse_conversation(row).messages  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes?"}]},
        {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}]},
        {"messages": [{"role": "prompter", "content": "hi"}, {"role": "Model", "content": "yes?"}], "source": "x"},
        {"messages": None, "conversations": ({"from": "user", "value": "hi"}, {"from": "bot", "value": "yes?"})},
        {"conversations": ["hi", "yes?"], "source": "x"},
        {"messages": '["hi", "yes?"]'},
        {"instruction": "hi", "output": "yes?"},
        {"instruction": "hi", "input": "", "output": "yes?", "system": ""},
    ],
)
def test_formats(row: dict[str, object]) -> None:
    assert parse(row) == TURNS


def test_alpaca_input_and_system() -> None:
    row = {"instruction": "Add.", "input": "1 2", "output": "3", "system": "Be brief."}
    assert parse(row) == (Message("system", "Be brief."), Message("user", "Add.\n\n1 2"), Message("assistant", "3"))


def test_tool_roles_and_consecutive_turns() -> None:
    names = [
        "system",
        "human",
        "function_call",
        "observation",
        "ipython",
        "function_response",
        "tool",
        "gpt",
        "chatgpt",
    ]
    row = {"conversations": [{"from": name, "value": name} for name in names]}
    assert [message.role for message in parse(row)] == [
        *("system", "user", "assistant", "tool", "tool", "tool", "tool", "assistant", "assistant")
    ]


def messages(*turns: tuple[object, object]) -> dict[str, object]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (["a"], "must be an object"),
        ({"text": "a", "id": 1}, "keys found: id, text"),
        ({}, "keys found: none"),
        ({"messages": []}, "'messages' is empty"),
        ({"conversations": "hi"}, "must be a list of turns, found text"),
        ({"messages": ["hi", {"role": "assistant", "content": "a"}]}, "turn 1 must be an object, found text"),
        ({"prompt": ["hi"], "completion": "a"}, "turn 1 must be an object, found text"),
        ({"messages": ["hi"]}, "no assistant turn"),
        ({"conversations": ["hi", "half \ud83d"]}, "turn 2 holds half a surrogate pair"),
        ({"conversations": ["hi", ""]}, "the answer in turn 2 is empty"),
        (messages(("user", "a"), ("bot2", "b")), "unknown role 'bot2' in turn 2"),
        (messages((3, "a")), "unknown role 3 in turn 1"),
        ({"messages": [{"content": "a"}]}, "turn 1 has no 'from' or 'role' (keys found: content)"),
        (messages(("user", "a"), ("assistant", None)), "the content of turn 2 (assistant) is missing"),
        (messages(("user", {"a": 1})), "must be text, found an object"),
        (messages(("user", 5)), "must be text, found a number"),
        (messages(("user", "a")), "no assistant turn"),
        (messages(("user", "a"), ("system", "b"), ("assistant", "c")), "system message in turn 2"),
        ({**messages(("system", "a"), ("assistant", "c")), "system": "b"}, "differs from the system message"),
        (messages(("assistant", "half \ud83d")), "half a surrogate pair"),
        ({"instruction": "a"}, "no assistant turn and no 'output'"),
        ({"instruction": "a", "output": 3}, "'output' must be text"),
        (RowError("the line is not JSON"), "the line is not JSON"),
    ],
)
def test_bad_rows_are_refused_with_their_reason(row: object, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        parse(row)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


HI = (Message("user", "hi"),)


@pytest.mark.parametrize(
    ("row", "prompt", "reference"),
    [
        ({"prompt": "hi"}, HI, None),
        ({"prompt": "hi", "system": "Be brief."}, (Message("system", "Be brief."), *HI), None),
        (messages(("user", "hi")), HI, None),
        (messages(("user", "hi"), ("assistant", "yes?")), HI, "yes?"),
        (messages(("user", "a"), ("assistant", "b"), ("user", "c")), None, None),
        ({"instruction": "hi"}, HI, None),
        ({"instruction": "hi", "output": ""}, HI, ""),
        ({"conversations": [{"from": "human", "value": "hi"}], "prompt": None}, HI, None),
    ],
)
def test_prompts(row: dict[str, object], prompt: tuple[Message, ...] | None, reference: str | None) -> None:
    whole = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    conversation, answer = parse_prompt(row)
    assert conversation.messages == (prompt or whole)
    assert answer == reference


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (messages(("assistant", "yes")), "begins with the answer"),
        ({"prompt": 3}, "must be text, found a number"),
        ({"text": "a"}, "keys found: text"),
        (RowError("the line is not JSON"), "the line is not JSON"),
    ],
)
def test_bad_prompts(row: dict[str, object], reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse_prompt(row)


def test_turns_that_are_json_texts() -> None:
    """As a column of texts exports them; not what is said in turn."""
    turns = ('{"role": "user", "content": "a"}', ' {"from": "gpt", "value": "b"}')
    assert parse_conversation({"messages": [*turns]}).messages == (Message("user", "a"), Message("assistant", "b"))
    with pytest.raises(RowError, match="turn 1 is text that is not JSON"):
        parse_conversation({"messages": ["{a}", "{b}"]})
    assert parse_conversation({"messages": ["{a}", "b"]}).messages[0].content == "{a}"
