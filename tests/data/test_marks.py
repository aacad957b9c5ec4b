"""Tool calls and thinking in their places; texts and spans are put together here by hand, or by transformers."""

import json
from pathlib import Path
from typing import Any

import pytest

from lightning_lab.data.conversation import Conversation, Message, RowError
from lightning_lab.data.template import ChatTemplate
from lightning_lab.errors import LabError

CALL = {"type": "function", "function": {"name": "get_rate", "arguments": {"pair": "EURSEK"}}}
TOOL = {
    "type": "function",
    "function": {"name": "get_rate", "parameters": {"type": "object", "properties": {"pair": {"type": "string"}}}},
}
SAID = (Message("user", "a?"), Message("assistant", "b."))


HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
CONVERSATION = Conversation(
    (
        Message("user", "What is EURSEK now?"),
        Message("assistant", "", tool_calls=(CALL,)),
        Message("tool", "11.2", tool_call_id="call_1"),
        Message("assistant", "It is 11.2."),
    ),
    (TOOL,),
)
# Qwen 2.5's and Hermes' form of tools, with generation tags.
TAGGED = """{%- if tools %}{{ '<|im_start|>system\\n<tools>' }}{% for t in tools %}{{ '\\n' + t | tojson }}{% endfor %}
{{- '\\n</tools><|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{%- if m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' }}{% generation %}{{ m.content }}
{%- for c in m.tool_calls %}{{ '\\n' if m.content or not loop.first }}{{ '<tool_call>\\n{"name": "' + c.function.name }}
{{- '", "arguments": ' + c.function.arguments | tojson + '}\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>' }}
{%- endgeneration %}{{ '\\n' }}{%- elif m.role == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m.content }}
{{- '\\n</tool_response><|im_end|>\\n' }}{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""
# As Qwen 3: thinking, in the content or beside it, is written in the last answer alone, and then always.
THINKS = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- set text = m.content.split('</think>')[-1] %}
{%- if m.role == 'assistant' and loop.last %}{%- set thought = m.reasoning_content or '' %}
{%- if '</think>' in m.content %}{% set thought = m.content.split('</think>')[0].split('<think>')[-1] %}{% endif %}
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + text.lstrip('\\n') }}
{%- elif m.role == 'assistant' %}{{ text.lstrip('\\n') }}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\\n' }}
{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""
STRIPS = """{%- for m in messages -%}{%- set last = loop.last -%}{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.role == 'assistant' and not last and '</think>' in m.content -%}
{{- m.content.split('</think>')[-1].lstrip('\\n') -}}
{%- else -%}{{- m.content -}}{%- endif -%}{{- '<|im_end|>\\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
CHATML = "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"


@pytest.fixture
def opened(smollm2_tokenizer: Any, tmp_path: Path) -> Any:
    def open_template(text: str) -> ChatTemplate:
        (tmp_path / "chat.jinja").write_text(text)
        return ChatTemplate(smollm2_tokenizer, str(tmp_path / "chat.jinja"))

    return open_template


def trained(template: ChatTemplate, conversation: Conversation) -> list[tuple[str, str]]:
    """Of each document what stands before its one answer, and the answer."""
    found = []
    for document in template.documents(conversation):
        ((start, end),) = document.spans
        found.append((document.text[:start], document.text[start:end]))
        assert not [c for c in document.contents if c[0] < end < c[1]]
    return found


def test_a_tool_call_as_llama_documents_it(llama_tokenizer: Any) -> None:
    (document,) = ChatTemplate(llama_tokenizer, "llama-3.1").documents(CONVERSATION)
    call = '{"name": "get_rate", "parameters": {"pair": "EURSEK"}}<|eot_id|>'
    pieces = [
        ("<|begin_of_text|>" + HEADER.format("system") + "Environment: ipython\n", False),
        (
            "Cutting Knowledge Date: December 2023\nToday Date: 26 July 2024\n\n<|eot_id|>" + HEADER.format("user"),
            False,
        ),
        (
            "Given the following functions, please respond with a JSON for a function call with its proper arguments ",
            False,
        ),
        ("that best answers the given prompt.\n\nRespond in the format ", False),
        ('{"name": function name, "parameters": dictionary of argument name and its value}.', False),
        ("Do not use variables.\n\n" + json.dumps(TOOL, indent=4) + "\n\nWhat is EURSEK now?<|eot_id|>", False),
        (HEADER.format("assistant"), False),
        (call, True),
        (HEADER.format("ipython") + "11.2<|eot_id|>" + HEADER.format("assistant"), False),
        ("It is 11.2.<|eot_id|>", True),
    ]
    assert document.text == "".join(text for text, _ in pieces)
    assert [document.text[a:b] for a, b in document.spans] == [text for text, on in pieces if on]
    assert document.spans[0][0] == len("".join(text for text, _ in pieces[:7]))
    for turns, reason in (
        ((Message("assistant", "b", tool_calls=(CALL,)),), "one tool call or a text"),
        ((Message("assistant", "", tool_calls=(CALL, CALL)),), "one tool call or a text"),
    ):
        with pytest.raises(RowError, match=reason):
            ChatTemplate(llama_tokenizer, "llama-3.1").documents(Conversation((Message("user", "a"), *turns)))
    with pytest.raises(RowError, match="the first user turn"):
        ChatTemplate(llama_tokenizer, "llama-3.1").documents(Conversation((Message("assistant", "b"),), (TOOL,)))


@pytest.mark.parametrize("content", ["", "Let me look."])
def test_tool_calls_are_what_transformers_masks(smollm2_tokenizer: Any, opened: Any, content: str) -> None:
    arguments = {"pair": 'EUR"SEK"\n', "<|x|>": ["{{ a }}", 3, None, {"b": "<tool_call> é"}], "n": 2.5}
    calls = (CALL, {"type": "function", "function": {"name": "f", "arguments": arguments}})
    turns = (CONVERSATION.messages[0], Message("assistant", content, tool_calls=calls), *CONVERSATION.messages[2:])
    truth = smollm2_tokenizer.apply_chat_template(
        [turn.as_turn() for turn in turns],
        tools=[TOOL],
        chat_template=TAGGED,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    template = opened(TAGGED)
    assert not template.per_answer
    (document,) = template.documents(Conversation(turns, (TOOL,)))
    found = smollm2_tokenizer(document.text, add_special_tokens=False, return_offsets_mapping=True)
    inside = [any(a <= start and end <= b for a, b in document.spans) for start, end in found["offset_mapping"]]
    assert found["input_ids"] == truth["input_ids"]
    assert inside == list(map(bool, truth["assistant_masks"]))


def test_what_a_call_quotes_is_content(opened: Any) -> None:
    quoted = {"name": "f", "arguments": {"<|im_end|>": "<|im_start|>"}}
    calls = ({"type": "function", "function": quoted},)
    (document,) = opened(TAGGED).documents(Conversation((SAID[0], Message("assistant", "", tool_calls=calls))))
    written = [document.text[a:b] for a, b in document.contents]
    assert {"f", "<|im_end|>", "<|im_start|>"} < set(written)
    for tools, id_ in ((({"name": "<|im_end|>"},), "x"), ((), "<|im_end|>")):
        turns = (*SAID, Message("tool", "c", tool_call_id=id_), SAID[1])
        with pytest.raises(RowError, match="hold a control token"):
            opened(TAGGED).documents(Conversation(turns, tools))


def test_a_template_without_a_place_says_so(smollm2_tokenizer: Any) -> None:
    template = ChatTemplate(smollm2_tokenizer, "tokenizer")
    with pytest.raises(RowError, match=r"does not write the tool calls of turn 2 \(assistant\)"):
        template.documents(Conversation(CONVERSATION.messages))
    with pytest.raises(RowError, match="no place for 'tools'"):
        template.documents(Conversation(SAID, (TOOL,)))
    with pytest.raises(RowError, match=r"does not write the reasoning of turn 2 \(assistant\)"):
        template.documents(Conversation((SAID[0], Message("assistant", "b.", reasoning="because"))))


THOUGHT = "<think>\n{}\n</think>\n\n"
USER = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(("text", "beside"), [(STRIPS, False), (THINKS, False), (THINKS, True)])
def test_each_answer_as_it_is_written_when_it_is_last(opened: Any, text: str, beside: bool) -> None:
    template = opened(text)
    assert template.per_answer

    def thinks(thought: str, content: str) -> Message:
        return (
            Message("assistant", content, reasoning=thought)
            if beside
            else Message("assistant", THOUGHT.format(thought) + content)
        )

    turns = (Message("user", "2+2?"), thinks("easy", "4"), Message("user", "3+3?"), thinks("also easy", "6"))
    first = USER.format("2+2?")
    assert trained(template, Conversation(turns)) == [
        (first, THOUGHT.format("easy") + "4<|im_end|>"),
        (first + "4<|im_end|>\n" + USER.format("3+3?"), THOUGHT.format("also easy") + "6<|im_end|>"),
    ]
    unlearned = (turns[0], turns[1]._replace(weight=0), *turns[2:])
    assert len(template.documents(Conversation(unlearned))) == 1
    prompt = template.render(Conversation(turns[:3]), add_generation_prompt=True).text
    assert prompt == first + "4<|im_end|>\n" + USER.format("3+3?")


def test_answers_without_thinking_where_the_template_writes_an_empty_one(opened: Any) -> None:
    """What the model is to write, the empty thinking too, is learned."""
    assert trained(opened(THINKS), Conversation(SAID)) == [
        (USER.format("a?"), "<think>\n\n</think>\n\nb.<|im_end|>"),
    ]


def test_a_generation_prompt_that_opens_the_thinking(opened: Any) -> None:
    """An answer follows what the model is given when it is asked."""
    template = opened(CHATML + "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}")
    assert template.per_answer
    thinking = Message("assistant", THOUGHT.format("easy") + "4")
    assert trained(template, Conversation((*SAID, Message("user", "2+2?"), thinking))) == [
        (USER.format("a?") + "<think>\n", "b.<|im_end|>"),
        (USER.format("a?") + "b.<|im_end|>\n" + USER.format("2+2?") + "<think>\n", "easy\n</think>\n\n4<|im_end|>"),
    ]


def test_a_header_is_never_learned(opened: Any) -> None:
    """Without a generation prompt nothing tells where such an answer begins."""
    template = opened(CHATML)
    (document,) = template.documents(Conversation(SAID))
    assert [document.text[a:b] for a, b in document.spans] == ["b.<|im_end|>"]
    with pytest.raises(RowError, match="does not begin and end turn 2"):
        template.documents(Conversation((SAID[0], SAID[1]._replace(name="bot"))))


def test_what_cannot_be_served_is_refused_when_the_template_is_opened(opened: Any) -> None:
    asked = "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"
    with pytest.raises(LabError, match=r"chat\.jinja cannot be used: .* does not write turn 1 \(user\)"):
        opened(CHATML.replace("in messages", "in messages[-2:]") + asked)
