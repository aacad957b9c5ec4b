"""One turn of a row -> a checked `Message`.

Every key of a row and of a turn is honoured, harmless or refused. Empty values are harmless: tables that merge several
sources leave the columns that a row does not use empty.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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

# What public sets add to say where a row or turn comes from, or how good it is; nothing to the model.
_HARMLESS = """
    id idx index _id __index_level_0__ row_id uuid hash prompt_id message_id parent_id conversation_id
    conversation_hash message_tree_id turn_id turn_identifier turn num_turns n_turns num_tokens token_count
    length source sources data_source dataset dataset_name origin subset split url link title author user_id views
    avatarUrl license metadata meta category subcategory task task_type task_category topic topics domain type tag
    tags language lang locale country state header hashed_ip timestamp date time created created_at created_date
    updated_at model model_name generator gen_input_configs intent difficulty cache_control score scores rating ratings
    quality input_quality quality_explanation rank reward reward_model instruct_reward llama_guard_2
    min_neighbor_distance min_similar_uuid repeat_count upvotes review_count review_result toxic toxicity redacted
    openai_moderation detoxify detoxify_moderation custom_instruction skip_prompt_formatting
"""
HARMLESS = frozenset(_HARMLESS.split())
_SPEAKER, _CONTENT, _CALLS = ("from", "role"), ("value", "content"), ("tool_calls", "function_call")
_REASONING = ("reasoning_content", "thinking", "reasoning")  # one thing; a template reads it under one of these names
_FLAGS = ("weight", "train", "training", "trainable", "train_on_turn", "loss")
_USUAL = {("from", "value"), ("role", "content")}
_SPOKEN = {*_SPEAKER, *_CONTENT}
_TURN_KEYS = {*_SPOKEN, *_CALLS, *_REASONING, *_FLAGS, "name", "tool_call_id"}
EMPTY: tuple[object, ...] = (None, "", [], {})


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
        reasoning: What the model thinks before it answers.
        name: Of the speaker or the tool, for templates that write it.
        tool_call_id: The call whose result this is, for templates that write or check it.

    """

    role: Role
    content: str
    weight: float = 1.0
    tool_calls: tuple[Mapping[str, Any], ...] = ()
    reasoning: str | None = None
    name: str | None = None
    tool_call_id: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it says nothing but its content."""
        return not (self.tool_calls or self.reasoning or self.name or self.tool_call_id)

    @property
    def answer(self) -> str:
        """The content, or the calls as JSON where there are those alone."""
        return json.dumps(self.tool_calls, ensure_ascii=False) if self.tool_calls and not self.content else self.content

    def as_turn(self) -> dict[str, Any]:
        """The turn as chat templates take it."""
        turn: dict[str, Any] = {"role": self.role, "content": self.content}
        if not self.is_plain:
            more = {"tool_calls": list(self.tool_calls), "name": self.name, "tool_call_id": self.tool_call_id}
            more |= dict.fromkeys(_REASONING, self.reasoning)
            turn |= {key: value for key, value in more.items() if value}
        return turn


def parse_turn(turn: Any, number: int, ignore: tuple[str, ...]) -> Message:
    """Read one turn, counted from 1, without the keys to ignore.

    Raises:
        RowError: It is malformed, contradicts itself, or has a key that cannot be honoured.

    """
    if isinstance(turn, dict) and tuple(turn) in _USUAL and not ignore:  # nearly always, and in a tenth of the time
        said, content = turn.values()
        if isinstance(said, str) and said in _ROLES and isinstance(content, str) and _is_unicode(content):
            return Message(_ROLES[said], content)
    if not isinstance(turn, Mapping):
        raise RowError(f"turn {number} must be an object, found {kind(turn)}")
    if ignore:
        turn = {key: value for key, value in turn.items() if key not in ignore}
    roles = [turn[key] for key in filled(turn, _SPEAKER)]
    if not roles:
        raise RowError(f"turn {number} has no 'from' or 'role' (keys found: {', '.join(sorted(map(str, turn)))})")
    known = [_ROLES.get(role.strip().lower()) if isinstance(role, str) else None for role in roles]
    role = known[0]
    if role is None or None in known:
        raise RowError(
            f"unknown role {roles[known.index(None)]!r} in turn {number}; use system, user, assistant or tool"
        )
    if known[-1] != role:
        raise RowError(f"'from' and 'role' of turn {number} differ; name the one to leave out in data.ignore")
    where = f"turn {number} ({role})"
    content = one_of(turn, _CONTENT, where)
    if turn.keys() <= _SPOKEN:  # most others, and in half the time
        return Message(role, checked_text(content, f"the content of {where}"))
    refuse_unknown(turn, _TURN_KEYS, where)
    calls, reasoning = _calls(turn, where), one_of(turn, _REASONING, where)
    if role != "assistant" and (calls or reasoning):
        raise RowError(f"{where} has tool calls or reasoning, which only an answer can have")
    texts = {"reasoning": reasoning, "name": turn.get("name"), "tool_call_id": turn.get("tool_call_id")}
    return Message(
        role,
        checked_text("" if content is None and calls else content, f"the content of {where}"),
        _weight(turn, role, where),
        calls,
        **{key: checked_text(text, f"the {key} of {where}") for key, text in texts.items() if text},
    )


def _weight(turn: Mapping[str, Any], role: Role, where: str) -> float:
    """Read what the flags of public formats say of a turn's labels; 1 if nothing."""
    weights = {}
    for name in filled(turn, _FLAGS):
        try:
            weight = float({"true": 1, "false": 0}.get(str(turn[name]).strip().lower(), turn[name]))
        except (TypeError, ValueError, OverflowError):  # the last: an integer of 400 digits
            weight = math.nan
        if not 0 <= weight < math.inf or (name != "weight" and weight not in (0, 1)):
            allowed = "a number of at least 0" if name == "weight" else "true or false"
            raise RowError(f"'{name}' of {where} is {turn[name]!r}; it must be {allowed}")
        weights[name] = weight
    first, *others = weights.values() or [1.0]
    if role != "assistant" and any(weights.values()):
        raise RowError(f"{named(weights)} would train {where}, but only answers are trained; set it to false")
    if any(bool(other) != bool(first) for other in others):
        raise RowError(f"{named(weights)} of {where} contradict each other; keep one of them")
    return first if role == "assistant" else 1.0


def _calls(turn: Mapping[str, Any], where: str) -> tuple[dict[str, Any], ...]:
    """Read the tool calls of a turn: OpenAI's, or objects of a name and arguments."""
    given = filled(turn, _CALLS)
    if len(given) > 1:
        raise RowError(f"{where} has {named(given)}; name the one to leave out in data.ignore")
    what = f"a tool call of {where}"
    calls = from_json(turn[given[0]], f"{what} is text that") if given else []
    read = []
    for call in objects([calls] if isinstance(calls, dict) else calls, f"{named(given)} of {where}"):
        function = call.get("function") or call
        arguments = function.get("arguments") or {} if isinstance(function, dict) else None
        arguments = from_json(arguments, f"the arguments of {what} are text that")
        if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{what} must have a 'name' and 'arguments', an object or its JSON text")
        for fields in (call, function):
            refuse_unknown(fields, {"function", "name", "arguments"}, what)
        name = {"name": function["name"], "arguments": arguments}
        read.append({"type": "function", "function": name} | ({"id": call["id"]} if call.get("id") else {}))
    return tuple(read)


def objects(value: Any, what: str) -> tuple[dict[str, Any], ...]:
    """Check a list of objects, or its JSON text."""
    value = from_json(value, f"{what} must be a list of objects, found text that")
    if not isinstance(value, list | tuple) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"{what} must be a list of objects or its JSON text")
    checked_text(json.dumps(value, ensure_ascii=False, default=str), what)
    return tuple(value)


def from_json(value: Any, what: str) -> Any:
    """Read a text as JSON, and leave other values as they are; ``what`` begins the sentence of a `RowError`."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError) as error:
        raise RowError(f"{what} is not JSON ({error})") from None


def checked_text(value: Any, what: str) -> str:
    """Take a text, or a list of parts, as valid Unicode; ``what`` names it in a `RowError`."""
    if isinstance(value, list | tuple):
        value = "".join(_part(part, what) for part in value)
    if value is None:
        raise RowError(f"{what} is missing")
    if not isinstance(value, str):
        raise RowError(f"{what} must be text, found {kind(value)}")
    if not _is_unicode(value):
        raise RowError(f"{what} holds half a surrogate pair, which is not valid Unicode")
    return value


def _is_unicode(text: str) -> bool:
    """Whether it can be encoded: JSON can spell half a surrogate pair ("\ud83d"), which no tokenizer takes."""
    try:
        return text.isascii() or bool(text.encode())
    except UnicodeEncodeError:
        return False


def _part(part: Any, what: str) -> str:
    """The text of a part; parts are joined without anything between them, as chat templates write them."""
    if isinstance(part, str):
        return part
    described = f"of type '{part.get('type')}'" if isinstance(part, Mapping) else f"that is {kind(part)}"
    if not isinstance(part, Mapping) or part.get("type") not in ("text", "input_text", "output_text"):
        raise RowError(f"{what} has a part {described}; only parts of type 'text' can be learned")
    refuse_unknown(part, {"text"}, what)
    return checked_text(part.get("text"), what)


def named(names: Iterable[str]) -> str:
    """Quote and join keys for a message."""
    return " and ".join(f"'{name}'" for name in names)


def kind(value: Any) -> str:
    """Name a value's type in JSON's words."""
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def filled(fields: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Those of the names under which something stands."""
    return [name for name in names if fields.get(name) not in EMPTY]


def one_of(fields: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    """The value under one of several names of one thing: the filled one, else an empty text, else None."""
    if fields.keys().isdisjoint(names):  # nearly always, and in a tenth of the time
        return None
    found = filled(fields, names)
    if any(fields[name] != fields[found[0]] for name in found[1:]):
        raise RowError(f"{named(found)} of {where} differ; name the one to leave out in data.ignore")
    if found:
        return fields[found[0]]
    return "" if any(fields.get(name) == "" for name in names) else None


def refuse_unknown(fields: Mapping[str, Any], known: set[str], where: str) -> None:
    """Refuse filled keys that are neither known nor harmless."""
    if found := filled(fields, sorted(fields.keys() - known - HARMLESS)):
        raise RowError(f"{where} has {named(found)}, which would be lost; if that changes nothing, use data.ignore")
