"""One row of a chat data set -> a checked `Conversation`, and its last answer."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeVar

from lightning_lab.errors import LabError

Role = Literal["system", "user", "assistant", "tool"]

# The names that public ShareGPT, OpenAI-style and OpenAssistant data sets give to the four roles.
_ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer", "context"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "question", "instruction"), "user"),
    **dict.fromkeys(
        ("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "bing", "bard", "claude", "ai", "answer"),
        "assistant",
    ),
    # A call is written by the model, its result by the tool.
    **dict.fromkeys(("function_call", "function-call", "tool_call", "tool_calls"), "assistant"),
    **dict.fromkeys(
        ("tool", "function", "observation", "ipython", "function_response", "function-response", "tool_response"),
        "tool",
    ),
}


class RowError(LabError):
    """A row that cannot be learned from; it may stand in the row's place, so that the rows after it keep their index.

    The message is the reason alone; the caller adds file and row.
    """


Item = TypeVar("Item")
Result = TypeVar("Result")


def or_error(function: Callable[[Item], Result], item: Item | RowError) -> Result | RowError:
    """Apply a function; a `RowError` that it raises, or that stands in the item's place, is the result."""
    if isinstance(item, RowError):
        return item
    try:
        return function(item)
    except RowError as error:
        return error


# Named tuples, as Lightning, which looks for tensors inside the results of a prediction, refuses frozen dataclasses.
class Message(NamedTuple):
    """One turn.

    Attributes:
        role: Who speaks.
        content: What is said; empty where an answer is a tool call alone.
        weight: Of the answer's labels; 0 for context that is not learned.
        tool_calls: ``{"type": "function", "function": {"name": ..., "arguments": {...}}}`` of each call.
        reasoning: What the model thinks before it answers; None where nothing is known of it.

    """

    role: Role
    content: str
    weight: float = 1.0
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    reasoning: str | None = None


class Conversation(NamedTuple):
    """The turns of one row, of which only the first may be a system message, and the tools that it may call."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


class Prompt(NamedTuple):
    """A conversation to answer, and the answer that is known.

    Attributes:
        row: The conversation's row in its source.
        conversation: The turns before the answer.
        reference: The last answer; None where nobody has given one.

    """

    row: int
    conversation: Conversation
    reference: str | None

    @classmethod
    def of(cls, row: int, conversation: Conversation) -> "Prompt | None":
        """Cut before the last assistant turn; None when the conversation begins with it."""
        messages = conversation.messages
        last = max(i for i, message in enumerate(messages) if message.role == "assistant")
        return cls(row, Conversation(messages[:last]), messages[last].content) if last else None


def parse_conversation(row: Mapping[str, Any] | RowError) -> Conversation:
    """Read a row in ShareGPT, `messages` or Alpaca format, recognised by its keys.

    * ``conversations`` or ``messages``: a list of turns, each with ``from``/``value`` or ``role``/``content``;
    * ``instruction``, ``output`` and optionally ``input``, which follows the instruction after an empty line.

    A ``system`` text beside any of them becomes the leading system message. Consecutive turns of one role and
    empty answers are allowed.

    Raises:
        RowError: The row is one, has none of these formats or no assistant turn, or a turn is malformed; the reason
            names the turn, counted from 1.

    """
    conversation = _parse(row, answered=True)
    if not any(message.role == "assistant" for message in conversation.messages):
        raise RowError("no assistant turn, so there is nothing to learn")
    return conversation


def parse_prompt(row: Mapping[str, Any] | RowError) -> tuple[Conversation, str | None]:
    """Read a row to be answered: a conversation up to its last answer, and that answer where there is one.

    Beside the formats of `parse_conversation` a row may be ``prompt``, one user turn, and needs no answer: a
    conversation that ends with another turn than the assistant's is a prompt as it stands.

    Raises:
        RowError: as `parse_conversation`; also when nothing comes before the only answer.

    """
    if isinstance(row, Mapping) and row.get("prompt") is not None:
        user = {"role": "user", "content": row["prompt"]}
        row = {"messages": [user], "system": row.get("system")}
    messages = _parse(row, answered=False).messages
    if messages[-1].role != "assistant":
        return Conversation(messages), None
    if len(messages) == 1:
        raise RowError("it begins with the answer, so there is nothing to answer")
    return Conversation(messages[:-1]), messages[-1].content


def _parse(row: Mapping[str, Any] | RowError, answered: bool) -> Conversation:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError(f"a row must be an object with named fields, found {_kind(row)}")
    # Tables that merge several sources fill the columns that a row does not use with null.
    for key in ("conversations", "messages"):
        if row.get(key) is not None:
            messages = _parse_turns(row[key], key)
            break
    else:
        if row.get("instruction") is None:
            found = ", ".join(sorted(map(str, row))) or "none"
            raise RowError(f"no 'conversations', 'messages' or 'instruction' in the row (keys found: {found})")
        messages = _parse_alpaca(row, answered)

    system = row.get("system")
    if system is not None and system != "":
        leading = Message("system", _checked_text(system, "'system'"))
        if messages[0].role != "system":
            messages.insert(0, leading)
        elif messages[0] != leading:
            raise RowError("'system' differs from the system message in turn 1; keep one of them")
    for number, message in enumerate(messages[1:], start=2):
        if message.role == "system":
            raise RowError(f"system message in turn {number}; only the first turn can be one")
    return Conversation(tuple(messages))


def _parse_turns(turns: Any, key: str) -> list[Message]:
    if not isinstance(turns, list | tuple):
        raise RowError(f"'{key}' must be a list of turns, found {_kind(turns)}")
    if not turns:
        raise RowError(f"'{key}' is empty")
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict | Mapping):  # asking for Mapping alone is slow
            raise RowError(f"turn {number} must be an object, found {_kind(turn)}")
        role = turn.get("from") if turn.get("from") is not None else turn.get("role")
        content = turn.get("value") if turn.get("value") is not None else turn.get("content")
        if role is None:
            raise RowError(f"turn {number} has no 'from' or 'role' (keys found: {', '.join(sorted(map(str, turn)))})")
        known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
        if known is None:
            raise RowError(f"unknown role {role!r} in turn {number}; use system, user, assistant or tool")
        messages.append(Message(known, _checked_text(content, f"the content of turn {number} ({known})")))
    return messages


def _parse_alpaca(row: Mapping[str, Any], answered: bool) -> list[Message]:
    question = _checked_text(row["instruction"], "'instruction'")
    if row.get("input") is not None and (extra := _checked_text(row["input"], "'input'")):
        question = f"{question}\n\n{extra}"
    if row.get("output") is None and not answered:
        return [Message("user", question)]
    return [Message("user", question), Message("assistant", _checked_text(row.get("output"), "'output'"))]


def _checked_text(value: Any, what: str) -> str:
    if value is None:
        raise RowError(f"{what} is missing")
    if not isinstance(value, str):
        raise RowError(f"{what} must be text, found {_kind(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            # JSON can spell half a surrogate pair ("\ud83d"), which no tokenizer takes.
            raise RowError(f"{what} holds half a surrogate pair, which is not valid Unicode") from None
    return value


def _kind(value: Any) -> str:
    """Name a value's type in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)
