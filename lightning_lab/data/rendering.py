"""Conversation -> text, spans to learn, `input_ids` and `labels`.

A chat template is rendered once with the real contents and once (cached by the sequence of roles) with a placeholder
for each content. What the template writes between the placeholders, its literals, is then walked along the real text,
which gives every turn's place for any template. Contents are never searched for, so a content that quotes the template
cannot pass for it.
"""

import hashlib
import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from lightning_lab.data.conversation import Conversation, Message, RowError
from lightning_lab.errors import LabError

ControlTokens = Literal["text", "control"]
Mask = Literal["assistant", "unsloth-2024"]
Truncation = Literal["tokens", "turns", "drop", "error"]
Span = tuple[int, int]

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
        labels: the same ids where they are learned, -100 elsewhere; not shifted.
        text: the whole rendered text, before truncation.
        boundary_shift: tokenising the text without cuts at the spans would give other ids.
        truncated: tokens were cut off.

    """

    input_ids: list[int]
    labels: list[int]
    text: str
    boundary_shift: bool
    truncated: bool


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

    def encode_batch(self, conversations: Sequence[Conversation]) -> list[Encoded | RowError]:
        """Encode many conversations at once, in order; an item is the error that `encode` would raise."""
        plans: list[_Plan | RowError] = []
        for conversation in conversations:
            try:
                plans.append(self._plan(self.render(conversation)))
            except RowError as error:
                plans.append(error)
        ids = self._encode_plain(plan for plan in plans if isinstance(plan, _Plan))
        results: list[Encoded | RowError] = []
        for plan in plans:
            try:
                results.append(self._assemble(plan, ids) if isinstance(plan, _Plan) else plan)
            except RowError as error:
                results.append(error)
        return results

    def encode_prompt(self, messages: Conversation | Sequence[Message]) -> list[int]:
        """Tokenise the messages before an answer, and the header that opens it; nothing is truncated.

        The ids are a prefix of what `encode` gives for the conversation with the answer, wherever the template writes
        the same text in both.

        Raises:
            RowError: see `render`.

        """
        turns = messages.messages if isinstance(messages, Conversation) else tuple(messages)
        plan = self._plan(self._render(turns, add_generation_prompt=True))
        ids = self._encode_plain([plan])
        return [token for part in plan.parts for token in (ids[part] if isinstance(part, _Plain) else (part,))]

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
        if key in self._skeletons:
            return self._skeletons[key]
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
        if len(self._skeletons) == 4096:  # bounds the memory that a data set of many shapes takes
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
        span = 0

        def before_answer(position: int) -> int:
            """Return where the whitespace begins that the template wrote right before an answer."""
            content = bisect_left(rendered.contents, (position, position))
            literal_start = rendered.contents[content - 1][1] if content else 0
            return literal_start + len(text[literal_start:position].rstrip())

        def add(part: _Plain | int, position: int) -> None:
            nonlocal span
            while span < len(spans) and spans[span][1] <= position:
                span += 1
            learned = span < len(spans) and spans[span][0] <= position
            if learned and spans[span][0] == position and self.mask == "unsloth-2024":
                header_end = before_answer(position)
                plan.headers[len(plan.parts)] = self._part(text, header_end, position, cut=True)
            plan.parts.append(part)
            plan.span_of.append(span if learned else None)

        def add_plain(start: int, end: int) -> None:
            cuts = [start, *edges[bisect_right(edges, start) : bisect_left(edges, end)], end]
            if len(cuts) > 2:
                plan.uncut.append((len(plan.parts), len(cuts) - 1, self._part(text, start, end, cut=False)))
            for a, b in pairwise(cuts):
                add(self._part(text, a, b, cut=a > start), a)

        position = 0
        for match in tokens:
            if position < match.start():
                add_plain(position, match.start())
            add(self._control_ids.get(match.group()) or self._control_ids[match.group().strip()], match.start())
            position = match.end()
        if position < len(text):
            add_plain(position, len(text))
        return plan

    def _part(self, text: str, start: int, end: int, cut: bool) -> "_Plain":
        continues = self._adds_prefix and (cut or (start > 0 and not self._prefix_after_token))
        return _Plain(text[start:end], continues)

    def _probe_prefix(self) -> None:
        """Find out whether the tokenizer puts a space before the text, as SentencePiece does, and after tokens too."""

        def ids(text: str) -> list[int]:
            found: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return found

        self._newline = len(ids("\n"))
        self._adds_prefix = ids("\nx") != ids("\n") + ids("x")
        token = next(iter(self._control_ids), "")
        self._prefix_after_token = ids(f"{token}x")[1:] == ids("x")

    def _encode_plain(self, plans: "Iterable[_Plan]") -> "dict[_Plain, list[int]]":
        """Tokenise each distinct plain part once, in one parallel call."""
        wanted: dict[_Plain, None] = {}
        for plan in plans:
            wanted.update((part, None) for part in plan.parts if isinstance(part, _Plain))
            wanted.update((part, None) for part in plan.headers.values())
            wanted.update((part, None) for _, _, part in plan.uncut)
        # A part that continues a text is encoded after a newline, which takes the prefix space and is cut off again.
        texts = [f"\n{part.text}" if part.continues else part.text for part in wanted]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return {
            part: encoding.ids[self._newline :] if part.continues else encoding.ids
            for part, encoding in zip(wanted, encodings, strict=True)
        }

    def _assemble(self, plan: "_Plan", plain_ids: "dict[_Plain, list[int]]") -> Encoded:
        pieces = [plain_ids[part] if isinstance(part, _Plain) else [part] for part in plan.parts]
        ids: list[int] = []
        labels: list[int] = []
        answer_ends: dict[int, int] = {}  # in tokens
        for number, (piece, span) in enumerate(zip(pieces, plan.span_of, strict=True)):
            if number in plan.headers:
                header = plain_ids[plan.headers[number]]
                if header and ids[-len(header) :] == header:
                    labels[-len(header) :] = header
            ids += piece
            labels += [IGNORED] * len(piece) if span is None else piece
            if span is not None:
                answer_ends[span] = len(ids)
        shift = any(
            plain_ids[whole] != [token for piece in pieces[first : first + count] for token in piece]
            for first, count, whole in plan.uncut
        )
        length = len(ids)
        truncated = self.max_length is not None and length > self.max_length
        if truncated:
            assert self.max_length is not None
            if self.truncation in ("drop", "error"):
                raise RowTooLongError(f"{length} tokens are more than data.max_length {self.max_length}")
            keep = self.max_length
            if self.truncation == "turns":
                keep = max((end for end in answer_ends.values() if end <= keep), default=0)
            del ids[keep:], labels[keep:]
        # The first token has nothing before it to be predicted from.
        if all(label == IGNORED for label in islice(labels, 1, None)):
            if truncated:
                verb = "ends" if self.truncation == "turns" else "begins"
                raise RowError(
                    f"nothing left to learn: no answer {verb} within data.max_length {self.max_length} "
                    f"(the row has {length} tokens)"
                )
            raise RowError("nothing left to learn: its answers are empty and the template writes no end-of-turn token")
        return Encoded(ids, labels, plan.rendered.text, shift, truncated)


_LLAMA_TOKENS = {"<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"}


@dataclass(frozen=True)
class _Skeleton:
    """``literals[0] <message order[0]> literals[1] ... literals[-1]``."""

    literals: tuple[str, ...]
    order: tuple[int, ...]


class _Plain(NamedTuple):
    """Text to tokenise without control tokens; ``continues`` says that no prefix space may be added to it."""

    text: str
    continues: bool


@dataclass(frozen=True)
class _Plan:
    """A rendered text in the parts it is tokenised in."""

    rendered: Rendered
    parts: list[_Plain | int] = field(default_factory=list)  # plain text, or a control token's id
    span_of: list[int | None] = field(default_factory=list)  # of each part
    headers: dict[int, _Plain] = field(default_factory=dict)  # part that begins an answer -> whitespace before it
    uncut: list[tuple[int, int, _Plain]] = field(default_factory=list)  # first part, number of parts, all in one


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
    if not text.startswith(first):
        return None
    if not skeleton.order:
        return () if text == first else None
    stack = [(len(first), candidates(0))]
    places: list[Span] = []
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
