"""The chat format of :mod:`nemo_bluelm.data.chat` as a Jinja template, with thinking control."""

from nemo_bluelm.config.schema import ControlToken
from nemo_bluelm.data.tokenizer import SPECIAL_NAMES

# `enable_thinking` true puts the control token into the last query; false or not given, none, and then the model may
# still choose to think. In earlier turns it stands where the reply has a thought.
_TEMPLATE = """\
{%- if not messages or messages[-1].role not in ('user', 'assistant') -%}
    {{- raise_exception('the last message must be the user\\'s or the assistant\\'s') -}}
{%- endif -%}
{{- '@bos' -}}
{%- for message in messages -%}
    {%- if message.role != ['user', 'assistant'][loop.index0 % 2] -%}
        {{- raise_exception('messages must be user, assistant, user, ...; there is no system message') -}}
    {%- endif -%}
    {%- if message.role == 'user' -%}
        {%- if loop.last -%}
            {%- set thinks = enable_thinking is defined and enable_thinking -%}
        {%- else -%}
            {%- set reply = messages[loop.index0 + 1] -%}
            {%- set thinks = reply.thinking or reply.reasoning_content -%}
        {%- endif -%}
        {{- '@human' -}}
        @before
        {%- if message.content is string -%}
            {{- message.content -}}
        {%- else -%}
            {%- for part in message.content -%}
                {%- if part.type in ('image', 'image_url') -%}
                    {{- '@image' -}}
                {%- else -%}
                    {{- part.text -}}
                {%- endif -%}
            {%- endfor -%}
        {%- endif -%}
        @after
        {{- '\\n@ai' -}}
    {%- else -%}
        {%- if message.thinking or message.reasoning_content -%}
            {{- '@think' + (message.thinking or message.reasoning_content) + '@close' -}}
        {%- endif -%}
        {%- if message.content is string -%}
            {{- message.content -}}
        {%- else -%}
            {%- for part in message.content -%}
                {{- part.text -}}
            {%- endfor -%}
        {%- endif -%}
        {{- '@eos' -}}
    {%- endif -%}
{%- endfor -%}
"""


def chat_template(control_token: ControlToken) -> str:
    """Jinja; the last query ends with the role of its reply, whatever ``add_generation_prompt`` says."""
    control = "{%- if thinks -%}{{- '" + SPECIAL_NAMES["blue_think"] + "' -}}{%- endif -%}"
    places = {"@before": ControlToken.before_query, "@after": ControlToken.after_query}
    text = _TEMPLATE
    for mark, place in places.items():
        line = f"        {mark}\n"
        text = text.replace(line, f"        {control}\n" if place is control_token else "")
    names = {**SPECIAL_NAMES, "close": SPECIAL_NAMES["think_end"]}
    for name in ("bos", "eos", "human", "ai", "image", "close", "think"):
        text = text.replace(f"@{name}", names[name])
    return text
