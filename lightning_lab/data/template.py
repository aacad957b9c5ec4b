"""Conversation -> text, and where each message and each answer stands in it.

A chat template is rendered once with the real contents and once (cached by the sequence of roles) with a placeholder
for each content; anew for a conversation with tool calls, each text of which has its own. What the template writes
between the placeholders, its literals, is then walked along the real text, which gives every turn's place for any
template. Contents are never searched for, so a content that quotes the template cannot pass for it.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from itertools import product
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_lab.data.conversation import Conversation
from lightning_lab.data.marks import MARK, Span, mark, variants, walk
from lightning_lab.data.turns import Message, RowError
from lightning_lab.errors import LabError

if TYPE_CHECKING:
    from tokenizers import AddedToken

TIME_LIMIT_S = 5.0  # for the first conversation, which takes milliseconds
_CACHED_SKELETONS = 4096  # bounds the memory that a data set of many sequences of roles takes
_LLAMA_TOKENS = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}

# Conversations that show whether a template writes earlier turns otherwise than the last; the simplest come first.
_TURNS = (Message("user", "one"), Message("assistant", "two"), Message("user", "three"), Message("assistant", "four"))
_PROBES = (
    Conversation(_TURNS),
    Conversation(
        tuple(
            m._replace(content=f"<think>\nfive\n</think>\n\n{m.content}" if m.role == "assistant" else m.content)
            for m in _TURNS
        )
    ),
    Conversation(tuple(m._replace(reasoning="five" if m.role == "assistant" else None) for m in _TURNS)),
    Conversation((Message("system", "six"), *_TURNS)),
    Conversation(_TURNS, ({"type": "function", "function": {"name": "f", "description": "", "parameters": {}}},)),
)

# Put before every template: one that asks for today gets the day of the template it was published with, so that token
# ids do not change from day to day. "26 Jul 2024" is what Llama 3.1's own template has as its constant.
_PINNED_TODAY = """\
{%- macro strftime_now(format) -%}
{{- {"%Y-%m-%d": "2024-07-26", "%B %d, %Y": "July 26, 2024", "%d %B %Y": "26 July 2024"}.get(format, "26 Jul 2024") -}}
{%- endmacro -%}
"""


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it.

    Attributes:
        text: What the model sees.
        spans: For each assistant turn the (start, end) characters of its content and end-of-turn token.
        contents: The (start, end) characters of all that the row's author wrote, in the order of the text.
        weights: Of each span's labels.

    """

    text: str
    spans: tuple[Span, ...]
    contents: tuple[Span, ...]
    weights: tuple[float, ...]


class _Skeleton(NamedTuple):
    """``literals[0] <text of message owners[0]> literals[1] ... literals[-1]``; those texts, if not just contents."""

    literals: tuple[str, ...]
    owners: tuple[int, ...]
    texts: tuple[str, ...] | None = None


class ChatTemplate:
    """A chat template with a tokenizer's special tokens.

    Args:
        tokenizer: A fast Hugging Face tokenizer; it is read, never altered.
        template: ``tokenizer`` for the tokenizer's own chat template, ``llama-3.1`` for the packaged one, or the path
            of a ``.jinja`` file.
        double_bos: Put the beginning-of-sequence token before the text even where the template writes it.

    Attributes:
        source: The template's text.
        bos: What is put before the text: the beginning-of-sequence token where the tokenizer adds one to every text
            and the template does not write it (or ``double_bos``), else empty.
        control_ids: Id of each added token that steers the model.
        control_pattern: Matches those tokens as the tokenizer does.
        end_of_turn: The control token, with whitespace that the template writes before it, that closes an answer;
            empty where the template has none.
        per_answer: The template writes earlier answers otherwise than the last one, so each is a document of its own.

    Raises:
        LabError: A missing or broken template, one that does not end, or a tokenizer that lacks its tokens.

    """

    def __init__(self, tokenizer: Any, template: str, double_bos: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skeletons: dict[Any, _Skeleton] = {}
        self.source = _PINNED_TODAY + _template_text(tokenizer, template)
        self.bos = self.end_of_turn = ""
        self.per_answer = False
        try:
            with _time_limit(TIME_LIMIT_S):
                skeleton = self._skeleton(Conversation((Message("user", "x"), Message("assistant", "x"))), False)
        except RowError as error:
            raise LabError(f"data.template {template} cannot be used: {error}") from None

        written = "\0".join(skeleton.literals)
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self.control_ids: dict[str, int] = {t.content: i for i, t in added.items() if _is_control(t, written)}
        if template == "llama-3.1" and not self.control_ids.keys() >= _LLAMA_TOKENS:
            missing = ", ".join(sorted(_LLAMA_TOKENS - self.control_ids.keys()))
            raise LabError(f"data.template llama-3.1 needs {missing}, which this tokenizer lacks; use 'tokenizer'")
        # As tokenizers match: the longest first, and some take in the whitespace beside them. Without any: never.
        control = sorted((added[i] for i in self.control_ids.values()), key=lambda token: -len(token.content))
        pattern = "|".join(r"\s*" * t.lstrip + re.escape(t.content) + r"\s*" * t.rstrip for t in control) or "(?!)"
        self.control_pattern = re.compile(pattern)
        closing = re.match(rf"\s*(?:{pattern})", skeleton.literals[-1])
        self.end_of_turn = closing.group().rstrip() if closing else ""
        adds_bos = tokenizer.bos_token and tokenizer.bos_token_id in tokenizer.backend_tokenizer.encode("x").ids
        if double_bos and not adds_bos:
            raise LabError(
                "data.double_bos: this tokenizer puts no beginning-of-sequence token before a text; set false"
            )
        if adds_bos and (double_bos or not skeleton.literals[0].startswith(tokenizer.bos_token)):
            self.bos = tokenizer.bos_token
            self._skeletons.clear()
        self.per_answer = any(map(self._rewrites, _PROBES))
        try:
            if self.per_answer:  # rows like the other probes, which ask for more than many templates have, are refused
                self.documents(_PROBES[0])
        except RowError as error:
            reason = f"it does not write every turn of a conversation as it does the last, and {error}"
            raise LabError(f"data.template {template} cannot be used: {reason}") from None

    def documents(self, conversation: Conversation) -> list[Rendered]:
        """Render a conversation as the texts to train on: one, or one for each answer where `per_answer` says so.

        Raises:
            RowError: As `render`.

        """
        if not self.per_answer:
            return [self.render(conversation)]
        messages, documents = conversation.messages, []
        for i, message in enumerate(messages):
            if message.role != "assistant" or not message.weight:
                continue
            whole = self.render(conversation._replace(messages=messages[: i + 1]))
            start, end = whole.spans[-1]
            prompt = self.render(conversation._replace(messages=messages[:i]), True) if i else Rendered("", (), (), ())
            begins = len(prompt.text) if i else start
            if begins < start and self._headed:
                raise RowError("it writes a header before an answer, but no generation prompt")
            if not whole.text.startswith(prompt.text):  # the answer follows what the model is given, then as in use
                shift = begins - start
                answer = tuple((a + shift, b + shift) for a, b in whole.contents if a >= start)
                whole = Rendered(prompt.text + whole.text[start:], (), prompt.contents + answer, ())
                end += shift
            documents.append(replace(whole, spans=((begins, end),), weights=(message.weight,)))
        return documents

    def render(self, conversation: Conversation, add_generation_prompt: bool = False) -> Rendered:
        """Render a conversation and locate its messages in the text.

        Args:
            conversation: The turns.
            add_generation_prompt: End with the header that opens an answer.

        Raises:
            RowError: The template refuses the conversation, or changes or drops a content so that it cannot be placed.

        """
        messages = conversation.messages
        rich = {
            i for i, m in enumerate(messages) if not m.is_plain or (self.per_answer and "</think>" in m.content)
        }  # of which more than the content has to be placed
        cacheable = not (rich or conversation.tools)
        text = self._apply(conversation, add_generation_prompt)
        for keep_blank, verbatim in product((False, True), (True, False)):  # nearly always the first one fits
            skeleton = self._skeleton(conversation, add_generation_prompt, keep_blank, cacheable)
            texts = [messages[i].content for i in skeleton.owners] if skeleton.texts is None else skeleton.texts
            places = walk(text, skeleton.literals, [[leaf] if verbatim else variants(leaf) for leaf in texts])
            if places is not None:
                break
        else:
            raise RowError(
                "the chat template changes the text of a message, so its answers cannot be located; "
                "use another data.template"
            )
        answers: dict[int, tuple[int, int, str]] = {}
        for i, (start, end), after in zip(skeleton.owners, places, skeleton.literals[1:], strict=True):
            if messages[i].role == "assistant":
                answers[i] = (answers[i][0] if i in answers else start, end, after)
        if self.per_answer:  # only the last turn's span is asked for: earlier answers may be written in any way
            answers = {i: place for i, place in answers.items() if i == len(messages) - 1}
        spans = []
        for i, (start, end, after) in answers.items():
            closing = after.find(self.end_of_turn)
            if i in rich:  # such an answer begins with what the template writes after the header
                prompt = self._apply(conversation._replace(messages=messages[:i]), True)
                unclosed = closing < 0 or (messages[i].tool_calls and not self.end_of_turn)
                if self._headed or unclosed or not text.startswith(prompt):
                    raise RowError(f"the chat template does not begin and end turn {i + 1} as it does other answers")
                start = len(prompt)
            if i in rich or closing == 0:
                end += closing + len(self.end_of_turn)
            spans.append((start, end))
        return Rendered(text, tuple(spans), tuple(places), tuple(messages[i].weight for i in answers))

    @cached_property
    def _headed(self) -> bool:
        """Whether answers have a header that no generation prompt writes, so that nothing tells where they begin."""
        closes, asks = (self._skeleton(Conversation(_TURNS[:1]), asked).literals[-1] for asked in (False, True))
        between = self._skeleton(Conversation(_TURNS[:2]), False).literals[-2]
        return closes == asks and self.control_pattern.search(between.removeprefix(closes)) is not None

    def _rewrites(self, conversation: Conversation) -> bool:
        """Whether an answer, or what stands before it, is written otherwise once further turns follow."""
        messages, end = conversation.messages, self.end_of_turn
        try:
            whole = self._apply(conversation, False)
            for i, message in enumerate(messages):
                if message.role == "assistant":
                    prompt = self._apply(conversation._replace(messages=messages[:i]), True)
                    answer = self._apply(conversation._replace(messages=messages[: i + 1]), False)
                    known = answer[: answer.find(end, len(prompt)) + len(end)] if end else answer.rstrip()
                    if not (whole.startswith(prompt) and whole.startswith(known)):
                        return True
        except RowError:  # such conversations are refused row by row
            pass
        return False

    def _apply(self, conversation: Conversation, add_generation_prompt: bool) -> str:
        turns = [message.as_turn() for message in conversation.messages]
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns,
                tools=list(conversation.tools) or None,
                chat_template=self.source,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except RecursionError:
            raise RowError("the chat template calls itself without end") from None
        except Exception as error:  # a template is a program: it raises whatever it likes
            raise RowError(f"the chat template refuses the conversation: {error or type(error).__name__}") from None
        return self.bos + text

    def _skeleton(
        self, conversation: Conversation, add_generation_prompt: bool, keep_blank: bool = False, cacheable: bool = True
    ) -> _Skeleton:
        """Find what the template writes around the texts of such messages.

        ``keep_blank`` leaves blank contents as they are, for templates that write nothing, not even a header, then.
        One that is not ``cacheable``, as there is more than contents, is good for this conversation alone.
        """
        messages = conversation.messages
        kept = {i: m.content for i, m in enumerate(messages) if keep_blank and not m.content.strip()}
        key = (tuple(message.role for message in messages), add_generation_prompt, tuple(kept.items()))
        if cacheable and key in self._skeletons:
            return self._skeletons[key]
        marked, leaves = mark(conversation, keep_blank, self.per_answer)
        text = self._apply(marked, add_generation_prompt)
        literals = MARK.split(text)
        order = list(map(int, literals[1::2]))
        for number, (owner, _, what, optional) in enumerate(leaves):
            if order.count(number) != 1 and not (optional and number not in order):
                turn = f"{what}turn {owner + 1} ({messages[owner].role})"
                raise RowError(
                    f"the chat template does not write {turn} exactly once, as given; use another data.template"
                )
        if conversation.tools and text == self._apply(marked._replace(tools=()), add_generation_prompt):
            raise RowError("the chat template has no place for 'tools'; use another or add them to data.ignore")
        skeleton = _Skeleton(tuple(literals[::2]), tuple(leaves[number].owner for number in order))
        if not cacheable:
            unmarked = [marked.tools, [(message.tool_call_id, message.tool_calls) for message in marked.messages]]
            if self.control_pattern.search(json.dumps(unmarked, ensure_ascii=False)):
                raise RowError("its tools or ids hold a control token of the chat template")
            return skeleton._replace(texts=tuple(leaves[number].text for number in order))
        if len(self._skeletons) >= _CACHED_SKELETONS:
            self._skeletons.clear()
        self._skeletons[key] = skeleton
        return skeleton


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Stop a template that loops without end: the interpreter asks at each of its lines whether the time is up."""
    end = time.monotonic() + seconds

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if time.monotonic() > end:
            raise TimeoutError(f"it takes more than {seconds:g} s for two short messages; it may loop without end")
        return trace if frame.f_code.co_filename == "<template>" else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def _template_text(tokenizer: Any, template: str) -> str:
    if template == "tokenizer":
        own = tokenizer.chat_template
        # Some tokenizers keep several templates by name.
        own = own.get("default") if isinstance(own, dict) else own
        if not own:
            raise LabError("the tokenizer has no chat template; set data.template to llama-3.1 or a .jinja file")
        return str(own)
    if template == "llama-3.1":
        return (resources.files("lightning_lab.data") / "templates" / "llama-3.1.jinja").read_text("utf-8")
    if not template.endswith(".jinja"):
        raise LabError(f"data.template is '{template}'; choose tokenizer, llama-3.1 or the path of a .jinja file")
    try:
        return Path(template).expanduser().read_text("utf-8")
    except OSError as error:
        raise LabError(f"data.template {template} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise LabError(f"data.template {template} is not UTF-8; convert it") from None


def _is_control(token: "AddedToken", written: str) -> bool:
    """Say whether an added token steers the model: marked special, of such a form, or written by the template."""
    content = token.content
    if token.special or re.fullmatch(r"<[|｜].+[|｜]>", content):
        return True
    return content in written and not content.isspace() and not content.isalnum()
