"""Text and spans -> `input_ids` and which of them are supervised; truncation."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

from lightning_lab import hub
from lightning_lab.data.conversation import Conversation, RowError, or_error
from lightning_lab.data.template import ChatTemplate, Rendered
from lightning_lab.errors import LabError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ControlTokens = Literal["text", "control"]
Mask = Literal["assistant"]
Truncation = Literal["tokens", "turns", "drop", "error"]

IGNORED = -100  # torch.nn.functional.cross_entropy's default ignore_index


def load_tokenizer(source: str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """Load the fast tokenizer of a base model, with a padding token that is already in its vocabulary.

    Padding is ``<|finetune_right_pad_id|>`` (Llama 3.1 and later), else the tokenizer's own, else a reserved token,
    else the end-of-sequence token. Masks must come from lengths, never from comparing ids with the padding id.

    Args:
        source: Hub id, folder, GGUF file or ``embedded``.
        revision: Commit of a Hub repository; None for its newest.

    Raises:
        LabError: As `hub.model_folder`; or there is no fast tokenizer, or nothing to pad with.

    """
    from transformers import AutoTokenizer

    folder = hub.model_folder(source, weights=False, revision=revision)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise LabError(f"model.base: {source} has no tokenizer that loads ({error}); add tokenizer.json") from error
    if not tokenizer.is_fast:
        raise LabError(f"model.base: the tokenizer of {source} is not a fast one; add tokenizer.json to it")
    vocabulary = tokenizer.get_vocab()
    reserved = "<|reserved_special_token_0|>"
    for token in ("<|finetune_right_pad_id|>", tokenizer.pad_token, reserved, tokenizer.eos_token):
        if token in vocabulary:
            tokenizer.pad_token = token
            return tokenizer
    raise LabError(f"model.base: the tokenizer of {source} has no padding and no end-of-sequence token; set pad_token")


@dataclass(frozen=True)
class Encoded:
    """A conversation ready to train on.

    Attributes:
        input_ids: Token ids, at most ``max_length``.
        supervised: Whether each of them is supervised.
        truncated: Tokens were cut off.

    """

    input_ids: list[int]
    supervised: list[bool]
    truncated: bool

    @property
    def labels(self) -> list[int]:
        """The ids where they are supervised, -100 elsewhere; not shifted."""
        return [i if on else IGNORED for i, on in zip(self.input_ids, self.supervised, strict=True)]


class RowTooLongError(RowError):
    """A row longer than ``max_length`` under truncation ``drop`` or ``error``."""


class _Continued(NamedTuple):
    """Plain text that continues another, so that the tokenizer must not put a space before it."""

    text: str


_Plain = str | _Continued
_Ids = dict[_Plain, list[int]]


class _Piece(NamedTuple):
    """A stretch of a rendered text that is tokenised by itself.

    Attributes:
        content: Plain text, or the id of the control token that it is.
        span: Number of the answer that it belongs to; None outside answers.

    """

    content: _Plain | int
    span: int | None


class Renderer:
    """Renders and tokenises conversations for one tokenizer, template and set of rules.

    Args:
        tokenizer: A fast Hugging Face tokenizer; it is read, never altered.
        template: As for `ChatTemplate`.
        control_tokens: ``text`` encodes control tokens quoted in a message as plain text, ``control`` parses them.
        mask: ``assistant`` supervises each answer and its end-of-turn.
        max_length: Tokens a row may have; None for no limit.
        truncation: For longer rows: ``tokens`` cuts at ``max_length``, ``turns`` after the last answer that fits
            whole, ``drop`` and ``error`` refuse them.

    Attributes:
        end_of_turn: As of `ChatTemplate`.
        fingerprint: Changes whenever `encode` could give other results.

    Raises:
        LabError: An unknown setting, a missing or broken template, or a tokenizer that does not fit.

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
        for key, value, choices in (
            ("control_tokens", control_tokens, get_args(ControlTokens)),
            ("mask", mask, get_args(Mask)),
            ("truncation", truncation, get_args(Truncation)),
        ):
            if value not in choices:
                raise LabError(f"data.{key} is '{value}'; choose one of {', '.join(choices)}")
        if getattr(tokenizer, "backend_tokenizer", None) is None:
            raise LabError("this tokenizer has no fast backend; use a model with a tokenizer.json")
        self.control_tokens, self.max_length, self.truncation = control_tokens, max_length, truncation
        self.template = ChatTemplate(tokenizer, template)
        self.end_of_turn = self.template.end_of_turn

        from tokenizers import Tokenizer

        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Whoever used the tokenizer last may have left these; they would cut or pad pieces.
        backend["truncation"] = backend["padding"] = None
        for token in backend["added_tokens"]:  # else the backend parses those not marked so in contents too
            token["special"] = token["special"] or token["content"] in self.template.control_ids
        backend_text = json.dumps(backend, sort_keys=True)
        self._backend = Tokenizer.from_str(backend_text)
        self._probe_prefix()
        self._backend.encode_special_tokens = True  # as plain text: this class places the tokens that count
        settings = (
            *(self.template.source, self.template.bos, tokenizer.special_tokens_map),
            *(control_tokens, mask, max_length, truncation),
        )
        self.fingerprint = hashlib.sha256(f"{settings}{backend_text}".encode()).hexdigest()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend.encode_special_tokens = True  # the one setting that pickling a tokenizer loses

    def render(self, conversation: Conversation) -> Rendered:
        """Render a conversation and locate its answers: see `ChatTemplate.render`."""
        return self.template.render(conversation.messages)

    def encode(self, conversation: Conversation) -> Encoded:
        """Render and tokenise one conversation.

        Raises:
            RowError: See `render`; also when truncation leaves no label that can be predicted.
            RowTooLongError: It is longer than ``max_length`` under truncation ``drop`` or ``error``.

        """
        (result,) = self.encode_batch([conversation])
        if isinstance(result, RowError):
            raise result
        return result

    def encode_batch(self, conversations: Sequence[Conversation | RowError]) -> list[Encoded | RowError]:
        """Encode many conversations at once, in order.

        An item of the result is the error that `encode` would raise; an error among the conversations stays in place.
        """
        pieces = [or_error(self._rendered_pieces, conversation) for conversation in conversations]
        ids_of = self._tokenize([made for made in pieces if not isinstance(made, RowError)])
        return [or_error(lambda made: self._assemble(made, ids_of), made) for made in pieces]

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Tokenise the messages before an answer, and the header that opens it; nothing is truncated.

        The ids are a prefix of what `encode` gives for the conversation with the answer, wherever the template writes
        the same text in both.

        Raises:
            RowError: See `render`.

        """
        return self.token_ids([self.template.render(conversation.messages, add_generation_prompt=True)])[0]

    def token_ids(self, texts: Sequence[Rendered]) -> list[list[int]]:
        """Tokenise whole texts, cut at the edges of their spans and at control tokens alone."""
        pieces = [self._pieces(text) for text in texts]
        ids_of = self._tokenize(pieces)
        return [[i for piece in made for i in _ids(piece.content, ids_of)] for made in pieces]

    def _rendered_pieces(self, conversation: Conversation) -> list[_Piece]:
        return self._pieces(self.render(conversation))

    def _pieces(self, rendered: Rendered) -> list[_Piece]:
        """Cut the text at every span's start and end, and at the control tokens."""
        text, spans = rendered.text, rendered.spans
        edges = sorted({0, len(text)}.union(*spans))
        if self.control_tokens == "control":
            parsed = list(pairwise(edges))
        else:  # what the template wrote: the gaps between the contents
            bounds = [0, *(edge for content in rendered.contents for edge in content), len(text)]
            parsed = list(zip(bounds[::2], bounds[1::2], strict=True))
        pattern = self.template.control_pattern
        token_ends = {m.start(): m.end() for stretch in parsed for m in pattern.finditer(text, *stretch)}
        cuts = sorted({*edges, *token_ends, *token_ends.values()})

        starts = [start for start, _ in spans]
        pieces: list[_Piece] = []
        end = 0
        for start, next_cut in pairwise(cuts):
            if start < end:  # inside a control token that takes in the whitespace after it
                continue
            end = token_ends.get(start, next_cut)
            span = bisect_right(starts, start) - 1
            inside = span >= 0 and start < spans[span][1]
            content: _Plain | int = text[start:end]
            if start in token_ends:
                content = self._token_id(text[start:end])
            elif pieces and self._adds_space[isinstance(pieces[-1].content, int)]:
                content = _Continued(text[start:end])
            pieces.append(_Piece(content, span if inside else None))
        return pieces

    def _token_id(self, text: str) -> int:
        ids = self.template.control_ids
        return ids[text] if text in ids else ids[text.strip()]

    def _probe_prefix(self) -> None:
        """Find out whether the tokenizer puts a space before text, as SentencePiece does, and after tokens too."""

        def ids(text: str) -> list[int]:
            found: list[int] = self._backend.encode(text, add_special_tokens=False).ids
            return found

        self._newline = len(ids("\n"))
        adds_space = ids("\nx") != ids("\n") + ids("x")
        token = next(iter(self.template.control_ids), "")
        # For a piece after plain text and for one after a control token: must it be kept from getting a space?
        self._adds_space = (adds_space, adds_space and ids(f"{token}x")[1:] != ids("x"))

    def _tokenize(self, texts: Sequence[list[_Piece]]) -> _Ids:
        """Tokenise each distinct piece of plain text.

        A piece that continues a text is encoded after a newline, which takes the space and is cut off again.
        """
        contents = dict.fromkeys(piece.content for pieces in texts for piece in pieces)
        plain = [content for content in contents if not isinstance(content, int)]
        encodings = self._backend.encode_batch_fast(
            [content if isinstance(content, str) else f"\n{content.text}" for content in plain],
            add_special_tokens=False,
        )
        return {
            content: encoding.ids if isinstance(content, str) else encoding.ids[self._newline :]
            for content, encoding in zip(plain, encodings, strict=True)
        }

    def _assemble(self, pieces: list[_Piece], ids_of: _Ids) -> Encoded:
        """Lay ids and mask side by side, and truncate both."""
        ids: list[int] = []
        supervised: list[bool] = []
        answer_ends: dict[int, int] = {}  # in tokens
        for piece in pieces:
            tokens = _ids(piece.content, ids_of)
            ids += tokens
            supervised += [piece.span is not None] * len(tokens)
            if piece.span is not None:
                answer_ends[piece.span] = len(ids)

        length, limit = len(ids), self.max_length
        truncated = limit is not None and length > limit
        if limit is not None and length > limit:
            if self.truncation in ("drop", "error"):
                raise RowTooLongError(f"{length} tokens are more than data.max_length {limit}")
            fitting = [end for end in answer_ends.values() if end <= limit]
            keep = max(fitting, default=0) if self.truncation == "turns" else limit
            del ids[keep:], supervised[keep:]
        if True not in supervised[1:]:  # the first token has nothing before it to be predicted from
            if truncated:
                verb = "ends" if self.truncation == "turns" else "begins"
                raise RowError(
                    f"nothing left to learn: no answer {verb} within data.max_length {limit} "
                    f"(the row has {length} tokens)"
                )
            raise RowError("nothing left to learn: its answers are empty and the template writes no end-of-turn token")
        return Encoded(ids, supervised, truncated)


def _ids(content: _Plain | int, ids_of: _Ids) -> list[int]:
    return [content] if isinstance(content, int) else ids_of[content]
