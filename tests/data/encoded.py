"""One conversation at a time, as tests look at them."""

from lightning_lab.data.conversation import Conversation, RowError
from lightning_lab.data.encoding import ConversationEncoder, Encoded
from lightning_lab.data.template import Rendered


def encode(encoder: ConversationEncoder, conversation: Conversation) -> Encoded:
    """Encode one conversation; raise the error that would stand in its place."""
    (result,) = encoder.encode_batch([conversation])
    if isinstance(result, RowError):
        raise result
    return result


def render(encoder: ConversationEncoder, conversation: Conversation) -> Rendered:
    """Render one conversation by the encoder's template."""
    return encoder.template.render(conversation)


def labels(encoded: Encoded) -> list[int]:
    """The ids where they are supervised, -100 elsewhere."""
    return [i if on else -100 for i, on in zip(encoded.input_ids, encoded.supervised, strict=True)]
