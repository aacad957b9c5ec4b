"""Marks in place of all that a row's author wrote, which show where a chat template puts it."""

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from lightning_lab.data.conversation import Conversation

Span = tuple[int, int]

# Private-use characters: no template takes them for whitespace or markup.
MARK = re.compile("\ue000([0-9]+)\ue001")
_THINKING = re.compile(r"(\s*(?:<think>)?\s*)(.*?)(\s*</think>\s*)(.*)", re.DOTALL)


class Leaf(NamedTuple):
    """A text of a conversation.

    Attributes:
        owner: Number of its message.
        text: As given.
        what: Which of the message's texts it is, for errors; empty for the content.
        optional: The template may leave it out.

    """

    owner: int
    text: str
    what: str = ""
    optional: bool = False


def mark(conversation: Conversation, keep_blank: bool, drops_thinking: bool) -> tuple[Conversation, list[Leaf]]:
    """Put a mark with its number in the place of each content, and of each text in a tool call or beside a content.

    Args:
        conversation: Is not altered.
        keep_blank: Leave blank contents as they are.
        drops_thinking: The template leaves the thinking out of earlier answers, so it has a mark of its own.

    """
    leaves: list[Leaf] = []

    def put(text: str, what: str = "", optional: bool = False) -> str:
        leaves.append(Leaf(i, text, what, optional))
        return f"\ue000{len(leaves) - 1}\ue001"

    def put_all(value: Any) -> Any:
        if isinstance(value, dict):
            return {put_all(key): put_all(item) for key, item in value.items()}
        if isinstance(value, list):
            return list(map(put_all, value))
        return put(value, "the tool calls of ") if isinstance(value, str) else value

    marked = []
    for i, message in enumerate(conversation.messages):
        content, earlier = message.content, drops_thinking and i < len(conversation.messages) - 1
        parts = _THINKING.fullmatch(content) if drops_thinking and message.role == "assistant" else None
        if parts:
            opening, thinking, closing, rest = parts.groups()
            thinking = thinking and put(thinking, "the thinking of ", earlier)
            content = opening + thinking + closing + (rest and put(rest))
        elif not content.strip() and (keep_blank or message.tool_calls):
            put(content, optional=message.role != "assistant" or bool(message.tool_calls))
        else:
            content = put(content)
        functions = [call["function"] for call in message.tool_calls]
        placed = [{"name": put_all(f["name"]), "arguments": put_all(f["arguments"])} for f in functions]
        calls = [{**call, "function": f} for call, f in zip(message.tool_calls, placed, strict=True)]
        reasoning = message.reasoning and put(message.reasoning, "the reasoning of ", earlier)
        name = message.name and put(message.name, optional=True)
        marked.append(message._replace(content=content, tool_calls=tuple(calls), reasoning=reasoning, name=name))
    return conversation._replace(messages=tuple(marked)), leaves


def variants(content: str) -> list[str]:
    """List the ways in which a template may write a content: as it is, trimmed, or as a JSON string."""
    as_json = json.dumps(content, ensure_ascii=False)[1:-1]
    return [content, content.strip(), content.lstrip(), content.rstrip(), as_json]


def walk(text: str, literals: Sequence[str], texts: Sequence[Sequence[str]]) -> list[Span] | None:
    """Walk literals and the variants of texts along the whole text; None when they do not make up all of it.

    After each message all positions that can be reached are kept, each with the places of the messages before it; of
    several ways to a position the one of earlier variants counts.
    """
    first, *others = literals
    reached: dict[int, list[Span]] = {len(first): []} if text.startswith(first) else {}
    for choices, literal in zip(texts, others, strict=True):
        before, reached = reached, {}
        for start, places in before.items():
            for content in choices:
                end = start + len(content)
                after = end + len(literal)
                if after not in reached and text.startswith(content, start) and text.startswith(literal, end):
                    reached[after] = [*places, (start, end)]
    return reached.get(len(text))
