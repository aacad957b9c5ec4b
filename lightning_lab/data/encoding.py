"""Text and spans -> `input_ids` and which of them are supervised; truncation."""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, islice, pairwise
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from lightning_lab import hub
from lightning_lab.data.conversation import Conversation
from lightning_lab.data.template import ChatTemplate, Rendered
from lightning_lab.data.turns import RowError, or_error
from lightning_lab.errors import LabError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ControlTokens = Literal["text", "control"]
Mask = Literal["assistant", "last"]
Truncation = Literal["tokens", "turns", "drop", "error"]

CHARACTERS_A_TOKEN = 5  # English chat has fewer: nearly no row has to be tokenised a second time
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


class Encoded(NamedTuple):
    """A conversation ready to train on.

    Attributes:
        input_ids: Token ids, at most ``max_length`` of each document.
        supervised: Whether each of them is supervised.
        truncated: Tokens were cut off.
        weights: Each token's weight in the training loss, 0 where it is not supervised; None where all others have 1.
        starts: Where each document after the first begins: a template that rewrites earlier turns takes one document
            for each answer.

    """

    input_ids: list[int]
    supervised: list[bool]
    truncated: bool
    weights: list[float] | None = None
    starts: tuple[int, ...] = ()


class RowTooLongError(RowError):
    """A row longer than ``max_length`` under truncation ``drop`` or ``error``."""


# A stretch of a rendered text that is tokenised by itself: what to tokenise, or the id of the control token that it is;
# tokens at its start that are not part of the text; number of the answer that it belongs to, None outside answers.
# Plain tuples, as there are five to a turn.
_Piece = tuple[str | int, int, int | None]
_Tokens = tuple[list[int], int | None]  # of a piece, and its span


class ConversationEncoder:
    """Renders and tokenises conversations for one tokenizer, template and set of rules.

    Args:
        tokenizer: A fast Hugging Face tokenizer; it is read, never altered.
        template: As for `ChatTemplate`.
        control_tokens: ``text`` encodes control tokens quoted in a message as plain text, ``control`` parses them.
        mask: ``assistant`` supervises each answer and its end-of-turn, ``last`` the last one alone.
        max_length: Tokens a document may have; None for no limit.
        truncation: For longer rows: ``tokens`` cuts at ``max_length``, ``turns`` after the last answer that fits
            whole, ``drop`` and ``error`` refuse them.
        double_bos: As for `ChatTemplate`.

    Attributes:
        template: The chat template.
        fingerprint: Changes whenever `encode_batch` could give other results.

    Raises:
        LabError: As `ChatTemplate`.

    """

    def __init__(
        self,
        tokenizer: Any,
        template: str = "tokenizer",
        control_tokens: ControlTokens = "text",
        mask: Mask = "assistant",
        max_length: int | None = None,
        truncation: Truncation = "tokens",
        double_bos: bool = False,
    ) -> None:
        self.control_tokens, self.mask = control_tokens, mask
        self.max_length, self.truncation = max_length, truncation
        self.template = ChatTemplate(tokenizer, template, double_bos)

        from tokenizers import Tokenizer

        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        # Whoever used the tokenizer last may have left these; they would cut or pad pieces.
        backend["truncation"] = backend["padding"] = None
        for token in backend["added_tokens"]:  # else the backend parses those not marked so in contents too
            token["special"] = token["special"] or token["content"] in self.template.control_ids
        backend_text = json.dumps(backend, sort_keys=True)
        self._backend = Tokenizer.from_str(backend_text)
        self._probe_prefix()
        written = (self.template.source, self.template.bos, tokenizer.special_tokens_map)
        rules = (control_tokens, mask, max_length, truncation)
        self.fingerprint = hashlib.sha256(f"{written + rules}{backend_text}".encode()).hexdigest()

    def encode_batch(self, conversations: Sequence[Conversation | RowError]) -> list[Encoded | RowError]:
        """Render and tokenise many conversations at once, in order.

        A `RowError` stands in the place of a conversation that is refused: by `ChatTemplate.documents`, as nothing is
        left to learn after truncation, or as `RowTooLongError`. An error among the conversations stays in its place.
        """
        rendered = [or_error(self._documents, conversation) for conversation in conversations]
        encoded = iter(self._encode([text for texts in rendered if not isinstance(texts, RowError) for text in texts]))
        return [
            texts if isinstance(texts, RowError) else or_error(_joined, list(islice(encoded, len(texts))))
            for texts in rendered
        ]

    def _documents(self, conversation: Conversation) -> list[Rendered]:
        if self.mask == "last":
            *earlier, _ = (i for i, message in enumerate(conversation.messages) if message.role == "assistant")
            turns = [m._replace(weight=0.0) if i in earlier else m for i, m in enumerate(conversation.messages)]
            conversation = conversation._replace(messages=tuple(turns))
        texts = self.template.documents(conversation)
        if not any(weight for text in texts for weight in text.weights):
            raise RowError("nothing left to learn: its last answer is context only")
        return texts

    def _encode(self, texts: Sequence[Rendered]) -> list[Encoded | RowError]:
        whole = [self._pieces(text) for text in texts]
        first = [self._start(pieces) for pieces in whole]
        results = self._assembled(first, texts)
        # what is cut at ``max_length`` anyway is the same from a start as from the whole text
        cut = [isinstance(result, Encoded) and result.truncated for result in results]
        again = [i for i in range(len(texts)) if first[i] is not whole[i] and not cut[i]]
        for i, result in zip(again, self._assembled([whole[i] for i in again], [texts[i] for i in again]), strict=True):
            results[i] = result
        return results

    def _assembled(self, pieces: Sequence[list[_Piece]], texts: Sequence[Rendered]) -> list[Encoded | RowError]:
        tokens = zip(self._tokenize(pieces), texts, strict=True)
        return [or_error(lambda pair: self._assemble(pair[0], pair[1].weights), pair) for pair in tokens]

    def _start(self, pieces: list[_Piece]) -> list[_Piece]:
        """The pieces that most likely hold ``max_length`` tokens; all of them where nothing is cut there."""
        if self.max_length is None or self.truncation != "tokens":
            return pieces
        ends = list(accumulate(1 if isinstance(content, int) else len(content) for content, _, _ in pieces))
        enough = bisect_right(ends, CHARACTERS_A_TOKEN * self.max_length) + 1
        return pieces[:enough] if enough < len(pieces) else pieces

    def encode_prompt(self, conversation: Conversation) -> list[int]:
        """Tokenise the messages before an answer, and the header that opens it; nothing is truncated.

        The ids are a prefix of what `encode_batch` gives for the conversation with the answer, wherever the template
        writes the same text in both.

        Raises:
            RowError: See `ChatTemplate.render`.

        """
        return self.token_ids([self.template.render(conversation, add_generation_prompt=True)])[0]

    def token_ids(self, texts: Sequence[Rendered]) -> list[list[int]]:
        """Tokenise whole texts, cut at the edges of their spans and at control tokens alone."""
        pieces = [self._pieces(text) for text in texts]
        return [[i for ids, _ in tokens for i in ids] for tokens in self._tokenize(pieces)]

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

        pieces: list[_Piece] = []
        control_ids, adds_space = self.template.control_ids, self._adds_space
        end = number = 0
        after_token = None  # whether the piece before is a control token
        for start, next_cut in pairwise(cuts):
            if start < end:  # inside a control token that takes in the whitespace after it
                continue
            while number < len(spans) and spans[number][1] <= start:
                number += 1
            span = number if number < len(spans) and spans[number][0] <= start else None
            if start in token_ends:
                end = token_ends[start]
                token = text[start:end]
                pieces.append((control_ids[token if token in control_ids else token.strip()], 0, span))
                after_token = True
                continue
            end = next_cut
            if after_token is not None and adds_space[after_token]:  # a newline takes the space of a text's start
                pieces.append((f"\n{text[start:end]}", self._newline, span))
            else:
                pieces.append((text[start:end], 0, span))
            after_token = False
        return pieces

    def _probe_prefix(self) -> None:
        """Find out whether the tokenizer puts a space before text, as SentencePiece does, and after tokens too."""

        def ids(text: str) -> Any:
            return self._backend.encode(text, add_special_tokens=False).ids

        self._newline = len(ids("\n"))
        adds_space = ids("\nx") != ids("\n") + ids("x")
        token = next(iter(self.template.control_ids), "")
        # For a piece after plain text and for one after a control token: must it be kept from getting a space?
        self._adds_space = (adds_space, adds_space and ids(f"{token}x")[1:] != ids("x"))

    def _tokenize(self, texts: Sequence[list[_Piece]]) -> list[list[_Tokens]]:
        """Tokenise each distinct piece of plain text."""
        contents = {c: None for pieces in texts for c, _, _ in pieces if isinstance(c, str)}
        self._backend.encode_special_tokens = True  # as plain text: `_pieces` places the tokens that count
        encodings = self._backend.encode_batch_fast(list(contents), add_special_tokens=False)
        ids_of: dict[str | int, list[int]] = {i: [i] for i in self.template.control_ids.values()}
        ids_of |= {content: encoding.ids for content, encoding in zip(contents, encodings, strict=True)}
        return [[(ids_of[c][skip:] if skip else ids_of[c], span) for c, skip, span in pieces] for pieces in texts]

    def _assemble(self, pieces: list[_Tokens], answer_weights: Sequence[float]) -> Encoded:
        """Lay ids, mask and weights side by side, and truncate them."""
        ids: list[int] = []
        supervised: list[bool] = []
        weights: list[float] = []
        answer_ends: dict[int, int] = {}  # in tokens
        for tokens, span in pieces:
            ids += tokens
            weight = 0.0 if span is None else answer_weights[span]
            supervised += [weight > 0] * len(tokens)
            weights += [weight] * len(tokens)
            if span is not None:
                answer_ends[span] = len(ids)

        length = len(ids)
        limit = length if self.max_length is None else self.max_length
        truncated = length > limit
        if truncated:
            if self.truncation in ("drop", "error"):
                raise RowTooLongError(f"{length} tokens are more than data.max_length {limit}")
            fitting = [end for end in answer_ends.values() if end <= limit]
            keep = max(fitting, default=0) if self.truncation == "turns" else limit
            del ids[keep:], supervised[keep:], weights[keep:]
        if True not in supervised[1:]:  # the first token has nothing before it to be predicted from
            if truncated:
                verb = "ends" if self.truncation == "turns" else "begins"
                raise RowError(
                    f"nothing left to learn: no answer {verb} within data.max_length {limit} "
                    f"(the row has {length} tokens)"
                )
            raise RowError("nothing left to learn: its answers are empty and the template writes no end-of-turn token")
        return Encoded(ids, supervised, truncated, None if set(answer_weights) <= {0.0, 1.0} else weights)


def _joined(documents: Sequence[Encoded | RowError]) -> Encoded:
    """The documents of one row, laid one after another, less those with nothing left to learn."""
    kept = [document for document in documents if isinstance(document, Encoded)]
    for error in documents:
        if isinstance(error, RowTooLongError) or (isinstance(error, RowError) and not kept):
            raise error
    if len(kept) == len(documents) == 1:
        return kept[0]
    weighted = any(document.weights for document in kept)
    return Encoded(
        input_ids=[i for document in kept for i in document.input_ids],
        supervised=[learned for document in kept for learned in document.supervised],
        truncated=len(kept) < len(documents) or any(document.truncated for document in kept),
        weights=[float(w) for d in kept for w in d.weights or d.supervised] if weighted else None,
        starts=tuple(accumulate(len(document.input_ids) for document in kept[:-1])),
    )
