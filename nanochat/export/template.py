"""
The chat template (Jinja) that renders messages as `Tokenizer.render_prompt` does.

A message's content is a text or a list of parts. Text that looks like a special token must not
become one: "<|" is rendered as "< |", because transformers and llama.cpp both parse special tokens
in the rendered text. The calculator's calls and results are parts of the assistant's content.
"""

CHAT_TEMPLATE = """
{%- macro plain(content) -%}
  {%- if content is string -%}
    {{- content | replace('<|', '< |') -}}
  {%- else -%}
    {%- set all = namespace(text='') -%}
    {%- for part in content if part.type == 'text' -%}
      {%- set all.text = all.text + part.text -%}
    {%- endfor -%}
    {{- all.text | replace('<|', '< |') -}}
  {%- endif -%}
{%- endmacro -%}
{%- macro spoken(content) -%}
  {%- if content is string -%}
    {{- plain(content) -}}
  {%- else -%}
    {%- set all = namespace(text='') -%}
    {%- for part in content -%}
      {%- if part.type in ('python', 'python_output') -%}
        {{- plain(all.text) -}}
        {%- set all.text = '' -%}
        {%- set name = 'python' if part.type == 'python' else 'output' -%}
        {{- '<|' + name + '_start|>' + plain(part.text) + '<|' + name + '_end|>' -}}
      {%- else -%}
        {%- set all.text = all.text + part.text -%}
      {%- endif -%}
    {%- endfor -%}
    {{- plain(all.text) -}}
  {%- endif -%}
{%- endmacro -%}
{%- set state = namespace(system='', turns=0) -%}
{{- '<|bos|>' -}}
{%- for message in messages -%}
  {%- if message.role == 'system' and loop.first -%}
    {%- set state.system = plain(message.content) + '\\n\\n' -%}
  {%- elif message.role == 'user' and state.turns % 2 == 0 -%}
    {{- '<|user_start|>' + state.system + plain(message.content) + '<|user_end|>' -}}
    {%- set state.system = '' -%}
    {%- set state.turns = state.turns + 1 -%}
  {%- elif message.role == 'assistant' and state.turns % 2 == 1 -%}
    {{- '<|assistant_start|>' + spoken(message.content) + '<|assistant_end|>' -}}
    {%- set state.turns = state.turns + 1 -%}
  {%- else -%}
    {{- raise_exception('user and assistant must take turns, after at most one system message') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}
""".strip()
