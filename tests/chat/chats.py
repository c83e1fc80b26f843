"""Chat templates in Jinja, one for each way in which families differ, and a tokenizer with their tokens."""

from __future__ import annotations

from collections.abc import Sequence

from mlcbuild.chat.checkpoint import CheckpointChat
from mlcbuild.chat.jinja import ChatTemplate
from mlcbuild.chat.tokenizer_info import TokenizerFacts

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>")
TOKENS = {token: i for i, token in enumerate((*SPECIAL, "a", "▁###", "##", "\n"))}
TOKENIZER = TokenizerFacts(TOKENS, frozenset(range(len(SPECIAL))), {})

_EACH = "{% for m in messages %}"
_END = "{% endfor %}"
# Roles around the message, the way of most models since 2023.
CHATML = (
    _EACH + "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}" + _END
    + "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)  # fmt: skip
# A system message of its own where the conversation brings none (Qwen 2.5, SmolLM2).
CHATML_DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen.<|im_end|>\n' }}{% endif %}" + CHATML
)
# Earlier replies lose their reasoning (Qwen 3).
CHATML_REASONING = CHATML.replace("m['content']", "m['content'].split('</think>')[-1].lstrip('\n')")
# The first role is inside the system message; replies and their end are between brackets (Llama 2).
LLAMA_2 = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set messages = messages[1:] %}"
    "{% endif %}" + _EACH + "{% set content = m.content %}{% if loop.first and system is defined %}"
    "{% set content = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + content %}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}" + _END
)
# No system message at all (Gemma 2).
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + _EACH + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
    "+ '<end_of_turn>\n' }}" + _END + "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)  # fmt: skip
# A system message is the beginning of the first user message (Gemma 3).
GEMMA_3 = (
    "{{ bos_token }}{% set prefix = '' %}{% if messages[0].role == 'system' %}"
    "{% set prefix = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}{% endif %}"
    + _EACH + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ (prefix if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}" + _END
    + "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)  # fmt: skip
# Plain words, and an end of text after replies (Vicuna).
VICUNA = (
    "{{ bos_token }}" + _EACH + "{% if m.role == 'system' %}{{ m.content + ' ' }}"
    "{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}" + _END
    + "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)  # fmt: skip
# The day is part of the system message (Llama 3.1).
LLAMA_3 = (
    "{{ bos_token + '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + strftime_now('%d %b %Y') + '\n\n' }}"
    "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}"
    "{{ '<|eot_id|>' }}" + _EACH + "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content "
    "+ '<|eot_id|>' }}" + _END
    + "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)  # fmt: skip
# A reply begins with reasoning, which earlier replies have not (DeepSeek R1).
THINKING = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
# The system message stands before the last user message (Mistral 7B v0.3).
SYSTEM_LAST = (
    "{% set system = messages[0].content if messages[0].role == 'system' else none %}" + _EACH
    + "{% if m.role == 'user' %}{{ '[INST] ' + (system + '\n\n' if system and loop.last else '') + m.content "
    "+ '[/INST]' }}{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% endif %}" + _END
)  # fmt: skip
# Turns are numbered.
NUMBERED = _EACH + "{{ loop.index ~ '. ' ~ m.role ~ ': ' ~ m.content ~ '\n' }}" + _END + "assistant: "


def chat(source: str | None, end_ids: Sequence[int] = (1,)) -> CheckpointChat:
    """A checkpoint with this template; `</s>` ends its texts."""
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    template = None if source is None else ChatTemplate(source, "tokenizer_config.json", special)
    return CheckpointChat(TOKENIZER, template, tuple(end_ids))
