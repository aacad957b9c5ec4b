"""Small stand-ins for the templates of other families; what is trained is put together by hand, between « and »."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from lightning_lab.data.conversation import Conversation, Message, RowError
from lightning_lab.data.encoding import ConversationEncoder
from tests.data.encoded import encode
from tests.data.test_marks import CONVERSATION, SAID, STRIPS, THINKS, THOUGHT, TOOL, USER

END = "<|im_end|>"
# Mistral: no header and no generation prompt; tools and the system text stand beside the last question alone.
MISTRAL = """{%- set asked = messages | selectattr('role', 'equalto', 'user') | list %}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for m in messages %}{%- if m.role == 'user' %}
{%- if tools and m == asked[-1] %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST]' + (system if loop.last else '') + m.content + '[/INST]' }}
{%- elif m.tool_calls %}{{ '[TOOL_CALLS]' + m.tool_calls[0].function | tojson + eos_token }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}
{%- elif m.role == 'assistant' %}{{ m.content + eos_token }}{%- endif %}{%- endfor %}"""
# Gemma: another role's name, contents trimmed, the system text before the first question, roles that alternate.
GEMMA = """{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for m in (messages[1:] if system else messages) %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate') }}{%- endif %}
{{- '<|im_start|>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (system if loop.first else '') }}
{{- m.content | trim + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>model\\n' }}{%- endif %}"""
# DeepSeek R1, QwQ: the generation prompt opens the thinking, earlier answers are written without theirs.
OPENS = STRIPS.replace("assistant\\n' -}}{%- endif", "assistant\\n<think>\\n' -}}{%- endif")
EOS_LAST = """{%- for m in messages %}{{ {'user': 'User: ', 'assistant': 'Assistant: '}[m.role] + m.content }}
{{- eos_token if loop.last and m.role == 'assistant' else '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant: ' }}{%- endif %}"""

TWO = (*SAID, Message("user", "c?"), Message("assistant", " d. "))
THOUGHTS = tuple(m._replace(content=THOUGHT.format("x") + m.content) if m.role == "assistant" else m for m in TWO)
TOOLS, CALLED = f"[AVAILABLE_TOOLS]{json.dumps([TOOL])}[/AVAILABLE_TOOLS]", "What is EURSEK now?"
CALL = '[TOOL_CALLS]{"name": "get_rate", "arguments": {"pair": "EURSEK"}}' + END


@pytest.fixture
def opened(smollm2_tokenizer: Any, tmp_path: Path) -> Any:
    tokenizer = copy.deepcopy(smollm2_tokenizer)
    names = ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS")
    tokens = ["[TOOL_CALLS]", *(f"[{slash}{name}]" for name in names for slash in ("", "/"))]
    tokenizer.add_special_tokens({"additional_special_tokens": tokens})

    def opened(text: str) -> ConversationEncoder:
        (tmp_path / "chat.jinja").write_text(text)
        return ConversationEncoder(tokenizer, str(tmp_path / "chat.jinja"))

    return opened


@pytest.mark.parametrize(
    ("template", "conversation", "documents"),
    [
        (
            MISTRAL,
            Conversation(TWO),
            [f"[INST]a?[/INST]«b.{END}»", f"[INST]a?[/INST]b.{END}[INST]c?[/INST]« d. {END}»"],
        ),
        (
            MISTRAL,
            CONVERSATION,
            [
                f"{TOOLS}[INST]{CALLED}[/INST]«{CALL}»",
                f"{TOOLS}[INST]{CALLED}[/INST]{CALL}[TOOL_RESULTS]11.2[/TOOL_RESULTS]«It is 11.2.{END}»",
            ],
        ),
        (
            GEMMA,
            Conversation((Message("system", "s"), *TWO)),
            [
                f"<|im_start|>user\ns\n\na?{END}\n<|im_start|>model\n«b.{END}»\n"
                f"<|im_start|>user\nc?{END}\n<|im_start|>model\n«d.{END}»\n"
            ],
        ),
        (
            OPENS,
            Conversation(THOUGHTS),
            [
                f"{USER.format('a?')}<think>\n«x\n</think>\n\nb.{END}»\n",
                f"{USER.format('a?')}b.{END}\n{USER.format('c?')}<think>\n«x\n</think>\n\n d. {END}»\n",
            ],
        ),
        (
            THINKS,
            Conversation((SAID[0], SAID[1]._replace(reasoning="x"), *TWO[2:])),
            [
                f"{USER.format('a?')}«<think>\nx\n</think>\n\nb.{END}»\n",
                f"{USER.format('a?')}b.{END}\n{USER.format('c?')}«<think>\n\n</think>\n\n d. {END}»\n",
            ],
        ),
        (
            EOS_LAST,
            Conversation(THOUGHTS),
            [
                f"User: a?\nAssistant: «{THOUGHT.format('x')}b.{END}»",
                f"User: a?\nAssistant: {THOUGHT.format('x')}b.\nUser: c?\nAssistant: «{THOUGHT.format('x')} d. {END}»",
            ],
        ),
    ],
)
def test_answers_are_trained_as_they_are_asked_for(
    opened: Any, template: str, conversation: Conversation, documents: list[str]
) -> None:
    encoder = opened(template)
    shown = []
    for document in encoder.template.documents(conversation):
        text = document.text
        for start, end in reversed(document.spans):
            text = f"{text[:start]}«{text[start:end]}»{text[end:]}"
        shown.append(text)
    assert shown == documents
    # tokens: the answers' alone are supervised, behind exactly what the model is given
    encoded = encode(encoder, conversation)
    decode = encoder.template._tokenizer.decode
    supervised = [i for i, on in zip(encoded.input_ids, encoded.supervised, strict=True) if on]
    assert decode(supervised) == "".join(part.partition("»")[0] for text in documents for part in text.split("«")[1:])
    starts = (0, *encoded.starts)
    asked = [i for i, message in enumerate(conversation.messages) if message.role == "assistant"]
    for i, start in zip(asked, starts if len(starts) > 1 else (0,) * len(asked), strict=True):
        prompt = encoder.encode_prompt(conversation._replace(messages=conversation.messages[:i]))
        end = start + len(prompt)
        assert encoded.input_ids[start:end] == prompt
        assert encoded.supervised[end - 1 : end + 1] == [False, True]


@pytest.mark.parametrize(
    ("template", "turns", "reason"),
    [
        (GEMMA, (*SAID, SAID[1]), "refuses the conversation: roles must alternate"),
        (MISTRAL, (Message("system", "s"), *SAID), r"does not write turn 1 \(system\) exactly once"),
        (MISTRAL, (SAID[0], CONVERSATION.messages[1]._replace(content="b")), r"does not write turn 2 \(assistant\)"),
        (OPENS, CONVERSATION.messages, r"does not write the tool calls of turn 2"),
    ],
)
def test_what_a_template_cannot_write_is_a_bad_row(
    opened: Any, template: str, turns: tuple[Message, ...], reason: str
) -> None:
    with pytest.raises(RowError, match=reason):
        encode(opened(template), Conversation(turns))
