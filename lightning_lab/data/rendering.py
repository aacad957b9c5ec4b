"""Conversation -> text, spans to learn, `input_ids` and `labels`.

A chat template is rendered once with the real contents and once (cached by the sequence of roles) with a placeholder
for each content. What the template writes between the placeholders, its literals, is then walked along the real text,
which gives every turn's place for any template. Contents are never searched for, so a content that quotes the template
cannot pass for it.
"""

import hashlib
import json
import math
import re
from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import resources
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lightning_lab.data.conversation import Conversation, Message, RowError
from lightning_lab.errors import LabError

ControlTokens = Literal["text", "control"]
Mask = Literal["assistant", "unsloth-2024"]
Truncation = Literal["tokens", "turns", "drop", "error"]
Span = tuple[int, int]

_CHARACTERS_A_TOKEN = 4.5  # at least so many are tokenised of a row, as English chat has 4; more if they fall short
_BATCHES_AHEAD = 2  # in the tokenizer, so that it need not wait for the next one; more is no faster
IGNORED = -100  # torch.nn.functional.cross_entropy's default ignore_index

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
        text: what the model sees.
        spans: for each assistant turn the (start, end) characters of its content and end-of-turn token.
        contents: the (start, end) characters of every message's content, in the order of the text.

    """

    text: str
    spans: tuple[Span, ...]
    contents: tuple[Span, ...]


@dataclass(frozen=True)
class Encoded:
    """A conversation ready to train on.

    Attributes:
        input_ids: token ids, at most ``max_length``.
        learned: [start, end) of each run of tokens that are learned, in order; runs are not empty and do not touch.
        text: the whole rendered text, before truncation.
        truncated: tokens were cut off.

    """

    input_ids: list[int]
    learned: list[Span]
    text: str
    truncated: bool

    @property
    def labels(self) -> list[int]:
        """The ids where they are learned, -100 elsewhere; not shifted."""
        labels = [IGNORED] * len(self.input_ids)
        for start, end in self.learned:
            labels[start:end] = self.input_ids[start:end]
        return labels


class RowTooLongError(RowError):
    """A row longer than ``max_length`` under truncation ``drop`` or ``error``."""


class Renderer:
    """Renders and tokenises conversations for one tokenizer, template and set of rules.

    Args:
        tokenizer: a fast Hugging Face tokenizer; it is read, never altered.
        template: ``tokenizer`` for the tokenizer's own chat template, ``llama-3.1`` for the packaged one, or the path
            of a ``.jinja`` file.
        control_tokens: ``text`` encodes control tokens quoted in a message as plain text, ``control`` parses them.
        mask: ``assistant`` learns each answer and its end-of-turn; ``unsloth-2024`` also the whitespace token between
            the assistant header and the answer, as Unsloth's ``train_on_responses_only`` did in 2024.
        max_length: tokens a row may have; None for no limit.
        truncation: for longer rows: ``tokens`` cuts at ``max_length``, ``turns`` after the last answer that fits
            whole, ``drop`` and ``error`` refuse them.

    Attributes:
        end_of_turn: the control token, with whitespace that the template writes before it, that closes an answer;
            empty where the template has none.
        fingerprint: changes whenever `encode` could give other results.

    Raises:
        LabError: an unknown setting, a missing or broken template, or a tokenizer that does not fit.

    """

    def __init__(
        self,
        tokenizer: Any,
        template: str = "tokenizer",
        control_tokens: ControlTokens = "text",
        mask: Mask = "assistant",
        max_length: int | None = None,
        truncation: Truncation = "tokens",
    ) -> None:
        _check_choice("data.control_tokens", control_tokens, ControlTokens)
        _check_choice("data.mask", mask, Mask)
        _check_choice("data.truncation", truncation, Truncation)
        if max_length is not None and max_length < 2:
            raise LabError(f"data.max_length is {max_length}; it must be at least 2, as the first token has no label")
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise LabError("this tokenizer has no fast backend; use a model with a tokenizer.json")
        self.max_length, self.truncation = max_length, truncation
        self.control_tokens, self.mask = control_tokens, mask
        self._tokenizer = tokenizer
        self._template = _PINNED_TODAY + _template_text(tokenizer, template)
        self._skeletons: dict[Any, _Skeleton] = {}
        self._bos = ""
        try:
            skeleton = self._skeleton((Message("user", "x"), Message("assistant", "x")), False)
        except RowError as error:
            raise LabError(f"data.template {template} cannot be used: {error}") from None

        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Whoever used the tokenizer last may have left these; they would cut or pad parts.
        backend["truncation"] = backend["padding"] = None
        written = "\0".join(skeleton.literals)
        control = [token for token in backend["added_tokens"] if _is_control(token, written)]
        for token in control:
            token["special"] = True  # else the backend parses it in contents too
        self._control_ids = {token["content"]: token["id"] for token in control}
        if template == "llama-3.1" and not self._control_ids.keys() >= _LLAMA_TOKENS:
            missing = ", ".join(sorted(_LLAMA_TOKENS - self._control_ids.keys()))
            raise LabError(f"data.template llama-3.1 needs {missing}, which this tokenizer lacks; use 'tokenizer'")
        self._control_pattern = _token_pattern(control)
        closing = re.match(rf"\s*(?:{_alternatives(self._control_ids)})", skeleton.literals[-1])
        self.end_of_turn = closing.group() if closing else ""

        from tokenizers import Tokenizer

        backend_text = json.dumps(backend, sort_keys=True)
        self._backend = Tokenizer.from_str(backend_text)
        self._probe_prefix()
        adds_bos = tokenizer.bos_token and self._backend.encode("x").ids[:1] == [tokenizer.bos_token_id]
        if adds_bos and not skeleton.literals[0].startswith(tokenizer.bos_token):
            self._bos = tokenizer.bos_token
            self._skeletons.clear()
        self._backend.encode_special_tokens = True  # as plain text: this class places the tokens that count
        settings = (
            self._template,
            self._bos,
            tokenizer.special_tokens_map,
            control_tokens,
            mask,
            max_length,
            truncation,
        )
        self.fingerprint = hashlib.sha256(f"{settings}{backend_text}".encode()).hexdigest()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # the one setting that pickling a tokenizer loses

    def render(self, conversation: Conversation) -> Rendered:
        """Render a conversation and locate what is learned in it.

        Raises:
            RowError: the template refuses the conversation, or changes or drops a content so that it cannot be placed.

        """
        return self._render(conversation.messages, add_generation_prompt=False)

    def encode(self, conversation: Conversation) -> Encoded:
        """Render and tokenise one conversation.

        Raises:
            RowError: see `render`; also when truncation leaves no label that can be predicted.
            RowTooLongError: it is longer than ``max_length`` under truncation ``drop`` or ``error``.

        """
        (result,) = self.encode_batch([conversation])
        if isinstance(result, RowError):
            raise result
        return result

    def encode_batch(self, conversations: Sequence[Conversation | RowError]) -> list[Encoded | RowError]:
        """Encode many conversations at once, in order.

        An item of the result is the error that `encode` would raise; an error among the conversations stays in place.
        """
        (results,) = self.encode_batches([conversations])
        return results

    def encode_batches(
        self, batches: Iterable[Sequence[Conversation | RowError]]
    ) -> Iterator[list[Encoded | RowError]]:
        """Encode batch after batch as `encode_batch` does: while the tokenizer has one, the next ones are rendered.

        The tokenizer uses all cores and frees the interpreter meanwhile. All else is done by the caller's thread:
        several would take turns within their batches, finish together, and leave the tokenizer with nothing to do.
        """
        waiting: deque[tuple[list[_Plan | RowError], list[_Plain], Future[list[Any]]]] = deque()
        with ThreadPoolExecutor(max(1, _BATCHES_AHEAD)) as tokenizing:
            for conversations in batches:
                plans = [self._try_plan(conversation) for conversation in conversations]
                made = [plan for plan in plans if isinstance(plan, _Plan)]
                likely = chain.from_iterable(
                    chain(plan.likely_parts(self._needed_tokens()), plan.headers.values()) for plan in made
                )
                plain = _plain_parts(likely)
                waiting.append((plans, plain, tokenizing.submit(self._tokenize, plain)))
                if len(waiting) > _BATCHES_AHEAD:
                    yield self._finish(*waiting.popleft())
            while waiting:
                yield self._finish(*waiting.popleft())

    def _try_plan(self, conversation: Conversation | RowError) -> "_Plan | RowError":
        try:
            return self._plan(self.render(conversation)) if isinstance(conversation, Conversation) else conversation
        except RowError as error:
            return error

    def _finish(
        self, plans: "list[_Plan | RowError]", plain: "list[_Plain]", encodings: "Future[list[Any]]"
    ) -> list[Encoded | RowError]:
        ids = self._ids(plain, encodings.result())
        results: list[Encoded | RowError] = []
        for plan in plans:
            try:
                results.append(self._assemble(plan, ids) if isinstance(plan, _Plan) else plan)
            except RowError as error:
                results.append(error)
        return results

    def boundary_shifts(self, conversations: Sequence[Conversation]) -> list[bool]:
        """Say of each conversation whether tokenising its text without cuts at the spans would give other ids.

        The whole text is compared, what `encode` would truncate too.

        Raises:
            RowError: see `render`.

        """
        plans = [self._plan(self.render(conversation)) for conversation in conversations]
        # Only what a cut goes through can differ: control tokens end a text anyway.
        cut = [[(plan.parts[first:last], whole) for first, last, whole in plan.uncut] for plan in plans]
        ids = self._encode_parts(part for stretches in cut for parts, whole in stretches for part in (*parts, whole))
        return [
            any(ids[whole] != list(chain.from_iterable(ids[part] for part in parts)) for parts, whole in stretches)
            for stretches in cut
        ]

    def encode_prompt(self, messages: Conversation | Sequence[Message]) -> list[int]:
        """Tokenise the messages before an answer, and the header that opens it; nothing is truncated.

        The ids are a prefix of what `encode` gives for the conversation with the answer, wherever the template writes
        the same text in both.

        Raises:
            RowError: see `render`.

        """
        turns = messages.messages if isinstance(messages, Conversation) else tuple(messages)
        plan = self._plan(self._render(turns, add_generation_prompt=True))
        ids = self._encode_parts(plan.parts)
        return list(chain.from_iterable(ids[part] for part in plan.parts))

    # --- the template

    def _apply_template(self, messages: Sequence[Message], contents: Sequence[str], add_generation_prompt: bool) -> str:
        import jinja2

        try:
            text: str = self._tokenizer.apply_chat_template(
                [{"role": message.role, "content": text} for message, text in zip(messages, contents, strict=True)],
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            raise RowError(f"the chat template refuses the conversation: {error}") from None
        return self._bos + text

    def _skeleton(
        self, messages: tuple[Message, ...], add_generation_prompt: bool, keep_blank: bool = False
    ) -> "_Skeleton":
        """Return what the template writes around the contents of such messages.

        ``keep_blank`` leaves blank contents as they are, for templates that write nothing, not even a header, then.
        """
        kept = {i: m.content for i, m in enumerate(messages) if keep_blank and not m.content.strip()}
        key = (tuple(message.role for message in messages), add_generation_prompt, tuple(kept.items()))
        known = self._skeletons.get(key)
        if known is not None:
            return known
        # Private-use characters: no template takes them for whitespace or markup.
        contents = [kept.get(i, f"\ue000{i}\ue001") for i in range(len(messages))]
        parts = re.split("\ue000([0-9]+)\ue001", self._apply_template(messages, contents, add_generation_prompt))
        skeleton = _Skeleton(tuple(parts[::2]), tuple(map(int, parts[1::2])))
        for i, message in enumerate(messages):
            if skeleton.order.count(i) != 1 and (i not in kept or message.role == "assistant"):
                raise RowError(
                    f"the chat template does not write turn {i + 1} ({message.role}) exactly once, as given; "
                    "use another data.template"
                )
        if len(self._skeletons) >= 4096:  # bounds the memory that a data set of many shapes takes
            self._skeletons.clear()
        self._skeletons[key] = skeleton
        return skeleton

    def _render(self, messages: tuple[Message, ...], add_generation_prompt: bool) -> Rendered:
        text = self._apply_template(messages, [message.content for message in messages], add_generation_prompt)
        skeleton = self._skeleton(messages, add_generation_prompt)
        places = _place(text, skeleton, messages)
        if places is None and not all(message.content.strip() for message in messages):
            skeleton = self._skeleton(messages, add_generation_prompt, keep_blank=True)
            places = _place(text, skeleton, messages)
        if places is None:
            raise RowError(
                "the chat template changes the text of a message, so its answers cannot be located; "
                "use another data.template"
            )
        spans = []
        for i, (start, end), literal in zip(skeleton.order, places, skeleton.literals[1:], strict=True):
            if messages[i].role == "assistant":
                closed = literal.startswith(self.end_of_turn)
                spans.append((start, end + len(self.end_of_turn) * closed))
        return Rendered(text, tuple(spans), places)

    # --- the tokenizer

    def _plan(self, rendered: Rendered) -> "_Plan":
        """Cut the text into control tokens and plain parts, the latter also at every span's start and end."""
        text, spans = rendered.text, rendered.spans
        edges = sorted({0, len(text)}.union(*spans))
        if self.control_tokens == "control":
            parsed = list(pairwise(edges))
        else:  # what the template wrote: the gaps between the contents
            bounds = [0, *(edge for place in rendered.contents for edge in place), len(text)]
            parsed = list(zip(bounds[::2], bounds[1::2], strict=True))
        tokens = [match for gap in parsed for match in self._control_pattern.finditer(text, *gap)]

        plan = _Plan(rendered)
        parts, span_of = plan.parts, plan.span_of
        ends = iter((*spans, (len(text), len(text) + 1)))  # and one that nothing belongs to
        span = 0
        span_start, span_end = next(ends)
        position = edge = 0
        for match in (*tokens, None):
            begin, first = position, len(parts)
            end = match.start() if match else len(text)
            token_end = match.end() if match else end
            while position < token_end:
                while span_end <= position:  # spans and positions both only move forward
                    span += 1
                    span_start, span_end = next(ends)
                span_of.append(span if span_start <= position else None)
                if position == span_start and self.mask == "unsloth-2024":
                    header_end = self._before_answer(rendered, position)
                    plan.headers[len(parts)] = self._part(text, header_end, position, cut=True)
                if position >= end:
                    assert match
                    token = match.group()
                    parts.append(self._control_ids.get(token) or self._control_ids[token.strip()])
                    position = token_end
                    break
                while edges[edge] <= position:
                    edge += 1
                cut = min(edges[edge], end)
                parts.append(self._part(text, position, cut, position > begin))
                position = cut
            last = len(parts) - (match is not None)
            if last > first + 1:
                plan.uncut.append((first, last, self._part(text, begin, end, cut=False)))
        return plan

    def _before_answer(self, rendered: Rendered, position: int) -> int:
        """Return where the whitespace begins that the template wrote right before an answer."""
        content = bisect_left(rendered.contents, (position, position))
        literal_start = rendered.contents[content - 1][1] if content else 0
        return literal_start + len(rendered.text[literal_start:position].rstrip())

    def _part(self, text: str, start: int, end: int, cut: bool) -> "_Plain":
        if self._adds_prefix and (cut or (start > 0 and not self._prefix_after_token)):
            return _Continued(text[start:end])
        return text[start:end]

    def _probe_prefix(self) -> None:
        """Find out whether the tokenizer puts a space before the text, as SentencePiece does, and after tokens too."""

        def ids(text: str) -> list[int]:
            found: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return found

        self._newline = len(ids("\n"))
        self._adds_prefix = ids("\nx") != ids("\n") + ids("x")
        token = next(iter(self._control_ids), "")
        self._prefix_after_token = ids(f"{token}x")[1:] == ids("x")

    def _encode_parts(self, parts: "Iterable[_Plain | int]") -> "_Ids":
        plain = _plain_parts(parts)
        return self._ids(plain, self._tokenize(plain))

    def _tokenize(self, plain: "list[_Plain]") -> list[Any]:
        # A part that continues a text is encoded after a newline, which takes the prefix space and is cut off again.
        texts = [part if isinstance(part, str) else f"\n{part.text}" for part in plain]
        encodings: list[Any] = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return encodings

    def _ids(self, plain: "list[_Plain]", encodings: list[Any]) -> "_Ids":
        return _Ids(
            (part, encoding.ids if isinstance(part, str) else encoding.ids[self._newline :])
            for part, encoding in zip(plain, encodings, strict=True)
        )

    def _needed_tokens(self) -> float:
        """Return after how many tokens the rest of a row changes nothing but the count in a message."""
        if self.max_length is None or self.truncation in ("drop", "error"):
            return math.inf
        return self.max_length

    def _assemble(self, plan: "_Plan", ids_of: "_Ids") -> Encoded:
        ids: list[int] = []
        learned: list[Span] = []
        answer_ends: dict[int, int] = {}  # in tokens

        def learn(start: int, end: int) -> None:
            if learned and learned[-1][1] >= start:
                learned[-1] = learned[-1][0], end
            elif start < end:
                learned.append((start, end))

        done = 0  # parts
        needed, headers = self._needed_tokens(), plan.headers
        for part, span in zip(plan.parts, plan.span_of, strict=True):
            start = len(ids)
            if start > needed:
                break
            if done in headers:
                header = ids_of[headers[done]]
                if header and ids[-len(header) :] == header:
                    learn(start - len(header), start)
            if isinstance(part, int):
                ids.append(part)
            else:
                if part not in ids_of:
                    ids_of.update(self._encode_parts(plan.likely_parts(needed - start, done)))
                ids += ids_of[part]
            if span is not None:
                learn(start, len(ids))
                answer_ends[span] = len(ids)
            done += 1
        length = len(ids)
        truncated = self.max_length is not None and length > self.max_length
        if truncated:
            assert self.max_length is not None
            if self.truncation in ("drop", "error"):
                raise RowTooLongError(f"{length} tokens are more than data.max_length {self.max_length}")
            keep = self.max_length
            if self.truncation == "turns":
                keep = max((end for end in answer_ends.values() if end <= keep), default=0)
            del ids[keep:]
            learned = [(start, min(end, keep)) for start, end in learned if start < keep]
        # The first token has nothing before it to be predicted from.
        if not learned or learned[-1][1] <= 1:
            if truncated:
                verb = "ends" if self.truncation == "turns" else "begins"
                rest = plan.parts[done:]
                rest_ids = self._encode_parts(rest)
                length += sum(len(rest_ids[part]) for part in rest)
                raise RowError(
                    f"nothing left to learn: no answer {verb} within data.max_length {self.max_length} "
                    f"(the row has {length} tokens)"
                )
            raise RowError("nothing left to learn: its answers are empty and the template writes no end-of-turn token")
        return Encoded(ids, learned, plan.rendered.text, truncated)


_LLAMA_TOKENS = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}


@dataclass(frozen=True)
class _Skeleton:
    """``literals[0] <message order[0]> literals[1] ... literals[-1]``."""

    literals: tuple[str, ...]
    order: tuple[int, ...]


class _Continued(NamedTuple):
    """Plain text that continues another, so that no prefix space may be added to it."""

    text: str


_Plain = str | _Continued  # text to tokenise without control tokens


class _Ids(dict["_Plain | int", list[int]]):
    """Token ids of plain parts; the id of a control token stands for itself."""

    def __missing__(self, part: _Plain | int) -> list[int]:
        if not isinstance(part, int):
            raise KeyError(part)
        return [part]


def _plain_parts(parts: Iterable[_Plain | int]) -> list[_Plain]:
    """Return each distinct part that must be tokenised, in the order of their first places."""
    return [part for part in dict.fromkeys(parts) if not isinstance(part, int)]


@dataclass(frozen=True)
class _Plan:
    """A rendered text in the parts it is tokenised in."""

    rendered: Rendered
    parts: list[_Plain | int] = field(default_factory=list)  # plain text, or a control token's id
    span_of: list[int | None] = field(default_factory=list)  # of each part
    headers: dict[int, _Plain] = field(default_factory=dict)  # part that begins an answer -> whitespace before it
    uncut: list[tuple[int, int, _Plain]] = field(default_factory=list)  # [first, last) parts, all in one

    def likely_parts(self, tokens: float, first: int = 0) -> Iterator[_Plain | int]:
        """Yield the parts from the ``first`` on that the next tokens are likely to come from, at least one.

        English chat has 4 characters a token. Most of a long row is cut off, and need not be tokenised.
        """
        characters = _CHARACTERS_A_TOKEN * tokens
        if first == 0 and len(self.rendered.text) <= characters:
            yield from self.parts
            return
        for part in self.parts[first:]:
            yield part
            if not isinstance(part, int):
                characters -= len(part if isinstance(part, str) else part.text)
                if characters <= 0:
                    return


def _place(text: str, skeleton: _Skeleton, messages: Sequence[Message]) -> tuple[Span, ...] | None:
    """Walk the literals and contents along the text; None when they do not make up all of it.

    A template may trim a content or write it as a JSON string, so that each has several candidates; a wrong choice
    shows further on, and the walk then goes back.
    """

    def candidates(number: int) -> Iterator[str]:
        content = messages[skeleton.order[number]].content
        yield content
        yield content.strip()
        yield content.lstrip()
        yield content.rstrip()
        yield json.dumps(content, ensure_ascii=False)[1:-1]

    first = skeleton.literals[0]
    # Nearly always every content stands there as it is, which is also what the walk tries first.
    verbatim = [first]
    places: list[Span] = []
    end = len(first)
    for number, literal in zip(skeleton.order, skeleton.literals[1:], strict=True):
        content = messages[number].content
        verbatim += content, literal
        places.append((end, end + len(content)))
        end += len(content) + len(literal)
    if "".join(verbatim) == text:
        return tuple(places)
    if not skeleton.order or not text.startswith(first):
        return None
    places.clear()
    stack = [(len(first), candidates(0))]
    dead: set[Span] = set()  # (number, position) known to lead nowhere: bounds the walk
    while stack:
        number = len(stack) - 1
        start, remaining = stack[-1]
        del places[number:]
        literal = skeleton.literals[number + 1]
        for content in remaining:
            end = start + len(content)
            after = end + len(literal)
            if not (text.startswith(content, start) and text.startswith(literal, end)) or (number + 1, after) in dead:
                continue
            places.append((start, end))
            if number + 1 < len(skeleton.order):
                stack.append((after, candidates(number + 1)))
                break
            if after == len(text):
                return tuple(places)
            places.pop()
        else:
            dead.add((number, start))
            stack.pop()
    return None


def _check_choice(key: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise LabError(f"{key} is '{value}'; choose one of {', '.join(get_args(choices))}")


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


def _is_control(token: dict[str, Any], written: str) -> bool:
    """Say whether an added token steers the model: marked special, of such a form, or written by the template."""
    content = token["content"]
    if token["special"] or re.fullmatch(r"<[|｜].+[|｜]>", content):
        return True
    return content in written and not content.isspace() and not content.isalnum()


def _alternatives(tokens: Iterable[str]) -> str:
    """Return a pattern of the tokens, the longest first as tokenizers match them; without any it never matches."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)"


def _token_pattern(tokens: list[dict[str, Any]]) -> re.Pattern[str]:
    """Return a pattern that matches like the tokenizer: some tokens take the whitespace beside them in."""
    plain = _alternatives(token["content"] for token in tokens if not token["lstrip"] and not token["rstrip"])
    greedy = [
        r"\s*" * token["lstrip"] + re.escape(token["content"]) + r"\s*" * token["rstrip"]
        for token in sorted(tokens, key=lambda token: len(token["content"]), reverse=True)
        if token["lstrip"] or token["rstrip"]
    ]
    return re.compile("|".join([*greedy, plain]))
