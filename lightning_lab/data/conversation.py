"""One row of a chat data set -> a checked `Conversation`, and its last answer."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from lightning_lab.data import turns
from lightning_lab.data.turns import HARMLESS, Message, RowError
from lightning_lab.errors import LabError

EmptyAnswers = Literal["refuse", "keep"]

_TURNS = ("conversations", "messages")
_QUESTIONS, _INPUTS, _ANSWERS = ("prompt", "instruction"), ("input", "context"), ("completion", "output", "response")
_SYSTEM, _TOOLS = ("system", "system_prompt"), ("tools", "functions")
_ROW_KEYS = {*_TURNS, *_SYSTEM, *_TOOLS}
_PAIR_KEYS = {*_ROW_KEYS, *_QUESTIONS, *_INPUTS, *_ANSWERS, "history"}
# By whether there is a question in a column of its own. The name of a row is harmless, that of a turn is not.
_KNOWN_KEYS = {True: {*_PAIR_KEYS, "name"}, False: {*_ROW_KEYS, "name"}}


class Conversation(NamedTuple):
    """The turns of one row, of which only the first may be a system message, and the tools that may be called."""

    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


class Prompt(NamedTuple):
    """A conversation to answer, and the answer that is known.

    Attributes:
        row: The conversation's row in its source.
        conversation: The turns before the answer.
        reference: The last answer; None where nobody has given one.
        content: Hash of the conversation with its answer, of ``predict_source`` where there is one.

    """

    row: int
    conversation: Conversation
    reference: str | None
    content: int | None = None

    @classmethod
    def of(cls, row: int, conversation: Conversation) -> "Prompt | None":
        """Cut before the last answer that is learned; None when the conversation begins with it."""
        messages = conversation.messages
        last = max(i for i, message in enumerate(messages) if message.role == "assistant" and message.weight)
        return cls(row, conversation._replace(messages=messages[:last]), messages[last].answer) if last else None


@dataclass(frozen=True)
class RowFormat:
    """What rows mean where their keys alone do not say.

    Args:
        ignore: Keys of rows and turns to leave out, whatever they mean.
        columns: The rows' column for each key of ours that goes by another name there.
        empty_answers: ``refuse`` takes a row with an empty answer for a bad one, ``keep`` trains its end-of-turn token.

    Raises:
        LabError: A key of ``columns`` is none of ours.

    """

    ignore: tuple[str, ...] = ()
    columns: Mapping[str, str] = field(default_factory=dict)
    empty_answers: EmptyAnswers = "refuse"

    @property
    def unread(self) -> frozenset[str]:
        """Columns that nobody uses: the harmless and the ignored ones."""
        return HARMLESS.union(self.ignore) - set(self.columns.values())

    def __post_init__(self) -> None:
        for key in self.columns.keys() - _PAIR_KEYS:
            raise LabError(f"data.columns has the key '{key}'; choose from {', '.join(sorted(_PAIR_KEYS))}")


BY_KEYS = RowFormat()


def parse_conversation(row: Mapping[str, Any] | RowError, row_format: RowFormat = BY_KEYS) -> Conversation:
    """Read a row in ShareGPT, `messages`, prompt-completion or Alpaca format, recognised by its keys.

    * ``conversations`` or ``messages``: a list of turns, or its JSON, each with ``from``/``value`` or
      ``role``/``content``; an answer may have ``tool_calls``, ``reasoning_content`` and a ``weight`` or ``train``. Or
      a list of texts, which the user and the assistant say in turn;
    * ``prompt`` or ``instruction`` with ``completion``, ``output`` or ``response``, each a text or a list of turns;
      ``input`` or ``context`` follows the question after an empty line; ``history``, earlier [question, answer]
      pairs, comes first, and its answers are learned like any others.

    A ``system`` or ``system_prompt`` beside any of them becomes the leading system message, ``tools`` or ``functions``
    are what the answers may call. Of several keys of one meaning the filled one counts. Consecutive turns of one role
    are allowed.

    Raises:
        RowError: The row is one, has none of these formats, contradicts itself, has a key that cannot be honoured or
            nothing to learn, or a turn is malformed; the reason names the turn, counted from 1.

    """
    conversation = _parse(row, row_format)
    learned = [(i, m) for i, m in enumerate(conversation.messages, start=1) if m.role == "assistant" and m.weight]
    if not learned:
        marked = any(message.role == "assistant" for message in conversation.messages)
        reason = "every answer is marked as not to be trained" if marked else "no assistant turn and no 'output'"
        raise RowError(f"{reason}, so there is nothing to learn")
    for number, message in learned:
        if not (message.content.strip() or message.tool_calls or row_format.empty_answers == "keep"):
            raise RowError(f"the answer in turn {number} is empty; data.empty_answers: keep would train it")
    return conversation


def parse_prompt(row: Mapping[str, Any] | RowError, row_format: RowFormat = BY_KEYS) -> tuple[Conversation, str | None]:
    """Read a row to be answered: a conversation up to its last answer, and that answer where there is one.

    The formats are those of `parse_conversation`, but no answer is needed: a conversation that ends with another turn
    than the assistant's is a prompt as it stands.

    Raises:
        RowError: as `parse_conversation`; also when nothing comes before the only answer.

    """
    conversation = _parse(row, row_format)
    *before, last = conversation.messages
    if last.role != "assistant":
        return conversation, None
    if not before:
        raise RowError("it begins with the answer, so there is nothing to answer")
    return conversation._replace(messages=tuple(before)), last.answer


def unread_keys(row: Mapping[str, Any], row_format: RowFormat) -> set[str]:
    """Filled keys of a row and of its turns that are left out: the harmless and the ignored ones."""
    said = [turn for key in _TURNS if isinstance(row.get(key), list) for turn in row[key] if isinstance(turn, Mapping)]
    return {key for part in (row, *said) for key in turns.filled(part, part.keys() & row_format.unread)}


def _parse(row: Mapping[str, Any] | RowError, row_format: RowFormat) -> Conversation:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError(f"a row must be an object with named fields, found {turns.kind(row)}")
    if row_format.ignore or row_format.columns:
        row = _renamed(row, row_format)
    forms = [_parse_turns(row[key], f"'{key}'", row_format, alternate=True) for key in turns.filled(row, _TURNS)]
    if len(forms) > 1 and forms[0] != forms[1]:
        raise RowError("its 'conversations' and 'messages' differ; name the one to leave out in data.ignore")
    paired = any(row.get(key) not in (turns.EMPTY if forms else (None,)) for key in _QUESTIONS)
    if paired:
        forms.append(_parse_pair(row, row_format))
    forms = list(filter(None, forms))
    if not forms:
        for key in (key for key in _TURNS if row.get(key) is not None):
            raise RowError(f"'{key}' is empty")
        found = ", ".join(sorted(map(str, row))) or "none"
        raise RowError(f"no 'conversations', 'messages', 'prompt' or 'instruction' in the row (keys found: {found})")
    turns.refuse_unknown(row, _KNOWN_KEYS[paired], "the row")
    messages = forms[0]
    if len(forms) > 1 and not {message[:2] for message in forms[-1]} <= {message[:2] for message in messages}:
        # Sets of turns may repeat the first question in a column of its own, which says nothing new.
        raise RowError("its columns hold different conversations; name those to leave out in data.ignore")
    if system := turns.one_of(row, _SYSTEM, "the row"):
        leading = Message("system", turns.checked_text(system, "'system'"))
        if messages[0].role == "system" and not messages[0].content.strip():
            del messages[0]
        if not messages or messages[0].role != "system":
            messages.insert(0, leading)
        elif messages[0].content != leading.content:
            raise RowError("'system' differs from the system message in turn 1; keep one of them")
    for number, message in enumerate(messages[1:], start=2):
        if message.role == "system":
            raise RowError(f"system message in turn {number}; only the first turn can be one")
    tools = turns.one_of(row, _TOOLS, "the row")
    return Conversation(tuple(messages), turns.objects(tools, "'tools'") if tools else ())


def _renamed(row: Mapping[str, Any], row_format: RowFormat) -> dict[str, Any]:
    """Put the columns under our keys, and leave out those to ignore."""
    columns = row_format.columns
    kept = {key: row[key] for key in row.keys() - columns.values() - set(row_format.ignore)}
    for key, column in columns.items():
        if column not in row:
            raise RowError(f"there is no column '{column}', which data.columns names")
        if kept.get(key) not in turns.EMPTY:
            raise RowError(f"data.columns puts '{column}' under '{key}', which is filled too; ignore it")
    return kept | {key: row[column] for key, column in columns.items()}


def _parse_pair(row: Mapping[str, Any], row_format: RowFormat) -> list[Message]:
    """Read a question and its answer, each in a column of its own, and the pairs before them."""
    messages = []
    shape = "'history' must be a list of [question, answer] pairs"
    history = turns.from_json(row.get("history") or [], f"{shape}, found text that")
    for pair in history if isinstance(history, list | tuple) else [history]:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowError(shape)
        asked, answered = (turns.checked_text(text, "a text of 'history'") for text in pair)
        messages += [Message("user", asked), Message("assistant", answered)]
    question, extra, answer = (turns.one_of(row, names, "the row") for names in (_QUESTIONS, _INPUTS, _ANSWERS))
    if extra:
        parts = [turns.checked_text(question, "'instruction'"), turns.checked_text(extra, "'input'")]
        question = "\n\n".join(filter(None, parts))
    for role, said, names in (("user", question, _QUESTIONS), ("assistant", answer, _ANSWERS)):
        what = turns.named(name for name in names if row.get(name) is not None)
        if isinstance(said, list):
            messages += _parse_turns(said, what, row_format)
        elif said is not None:
            messages.append(Message(role, turns.checked_text(said, what)))  # type: ignore[arg-type]
    return messages


def _parse_turns(value: Any, what: str, row_format: RowFormat, *, alternate: bool = False) -> list[Message]:
    """Read a list of turns, or its JSON; with ``alternate`` also texts, the user's and the assistant's in turn."""
    value = turns.from_json(value, f"{what} must be a list of turns, found text that")
    if not isinstance(value, list | tuple):
        raise RowError(f"{what} must be a list of turns, found {turns.kind(value)}")
    if all(isinstance(turn, str) and turn.lstrip().startswith("{") for turn in value):  # as exported columns have them
        value = [turns.from_json(turn, f"turn {number} is text that") for number, turn in enumerate(value, start=1)]
    if alternate and all(isinstance(turn, str) for turn in value):
        texts = [turns.checked_text(text, f"turn {number}") for number, text in enumerate(value, start=1)]
        return [Message("assistant" if number % 2 else "user", text) for number, text in enumerate(texts)]
    return [turns.parse_turn(turn, number, row_format.ignore) for number, turn in enumerate(value, start=1)]
