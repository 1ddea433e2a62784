"""Chat templates: Hugging Face's dialect, and nothing that a hostile one can do but fail in one line."""

import re
import sys
import time
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from dsopt.runtime import meter
from dsopt.runtime.errors import DsoptError
from dsopt.runtime.template import render_chat

MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": " Be <brief> & kind. "},
    {"role": "user", "content": "Grüße, 日本 😀\n\t'quoted' \"twice\""},
    {
        "role": "assistant",
        "content": "Yes.",
        "tool_calls": [{"name": "f", "arguments": {"x": [1, 2.5, None]}}],
    },
    {"role": "user", "content": ""},
]

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""

LLAMA = """{{- bos_token }}
{%- if tools is not none %}{{ raise_exception('no tools here') }}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- endif %}
{%- macro header(role, n=1) -%} [{{ role }} {{ n * 2 ** 3 }}]{%- endmacro %}
{%- set ns = namespace(count=0, out='', found=[]) %}
{% for message in messages if message.role != 'tool' %}
    {%- set ns.count = ns.count + 1 %}
    {%- set ns.found = ns.found + [message.role ~ ns.count] %}
    {%- if message.tool_calls is defined and message.tool_calls %}
        {{- message.tool_calls | tojson }}
        {{- message.tool_calls[0].arguments | tojson(indent=4) | indent(2, true) }}
        {%- for key, value in message.tool_calls[0].arguments.items() %}{{ key }}={{ value }}{% endfor %}
        {%- continue %}
    {%- endif %}
    {% generation %}
    {{ header(message['role'], loop.index) ~ system ~ [ns.count, (1, 'a'), {'k': none}] }}
    {% endgeneration %}
    {%- if loop.index > 7 %}{% break %}{% endif %}
{% endfor %}
{%- set block %}x{{ ns.found | join(', ') }}y{% endset %}
{{ block | upper }} {{ '%s of %d%%' % ('a', 3) }} {{ '{:>5}|{}'.format('r', 1) }} {{ messages | length }}
{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}
{{ messages[-1].content.split('x') }} {{ 'a-b'.replace('-', '+') }} {{ range(3) | sum }} {{ dict(a=1)['a'] }}
{{ [3, 1] | sort | first }} {{ 'abc'[::-1] }} {{ 7 // 2 }}
{{ undefined_name }}{{ '-' * 30 }} {{ 3 in [1, 3] }}"""


@pytest.mark.parametrize("template", [CHATML, LLAMA])
@pytest.mark.parametrize("prompted", [True, False])
def test_the_text_is_that_of_transformers(template: str, prompted: bool) -> None:
    wanted, _ = render_jinja_template(
        [MESSAGES], chat_template=template, add_generation_prompt=prompted, bos_token="<s>"
    )
    text = render_chat(template, MESSAGES, add_generation_prompt=prompted, variables={"bos_token": "<s>"})
    assert text == wanted[0]
    assert len(text) > 100


def test_tojson_escapes_neither_html_nor_unicode() -> None:
    assert render_chat("{{ messages | tojson }}", [{"c": "<ü> & '"}]) == '[{"c": "<ü> & \'"}]'


def test_the_date_is_todays() -> None:
    before = time.strftime("%F")
    assert render_chat("{{ strftime_now('%F') }}", []) in (before, time.strftime("%F"))


def test_variables_reach_the_template_but_do_not_replace_the_messages() -> None:
    template = "{{ eos_token }}{{ enable_thinking }}{{ messages | length }}"
    assert render_chat(template, [], variables={"eos_token": "</s>", "enable_thinking": False}) == "</s>False0"


def fails(template: str, messages: list[dict[str, Any]] = MESSAGES) -> str:
    with pytest.raises(DsoptError) as caught:
        render_chat(template, messages)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_refusal_is_told_in_the_templates_words() -> None:
    assert fails("{{ raise_exception('roles must\nalternate') }}").endswith("messages: roles must alternate")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("a\nb\n{% if %}", "at line 3: "),
        ("a\nb{{ 1 + 'x' }}", "at line 2: unsupported operand"),
        ("a\n\n{{ messages[0].nothing.more }}", "at line 3: .* has no attribute 'nothing'"),
        ("{{ 1 | unheard_of }}", "No filter named 'unheard_of'"),
        ("{% include 'file' %}", "no loader"),
        ("(" * 10 + "{{ " + "(" * 5000, ""),
    ],
)
def test_a_wrong_template_fails_with_its_line(template: str, message: str) -> None:
    assert re.search(message, fails(template))


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}",
        "{{ ''['__class__'] }}",
        "{{ messages | attr('__class__') }}",
        "{{ messages | map(attribute='__class__') | list }}",
        "{{ [messages] | sort(attribute='__class__') }}",
        "{{ raise_exception.__globals__['x'] }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ '{0.__class__}'.format_map({'0': 1}) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self._TemplateReference__context }}",
        "{% macro m() %}{% endmacro %}{{ m.__call__ }}",
    ],
)
def test_there_is_no_way_out(template: str) -> None:
    messages = [{"role": "user"}]
    fails(template, messages)
    assert messages == [{"role": "user"}]


GREEDY = [
    "{% for i in range(10 ** 9) %}{% endfor %}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ [1] * 10 ** 9 }}",
    "{{ 10 ** (10 ** 9) }}",
    "{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "{% set ns = namespace(s='ab') %}{% for i in range(99) %}"
    "{% set b %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = b %}{% endfor %}",
    "{% set ns = namespace(l=1) %}{% for i in 'a' * 99 %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "{% set ns = namespace(l=1) %}{% for i in 'a' * 99 %}{% set ns.l = (ns.l, ns.l) %}{% endfor %}{{ ns.l }}",
    "{% set ns = namespace(l=1) %}{% for i in 'a' * 99 %}{% set ns.l = {1: ns.l, 2: ns.l} %}{% endfor %}{{ ns.l }}",
    "{% set ns = namespace(l={}) %}{% for i in range(99) %}"
    "{% set ns.l = dict(a=ns.l, b=ns.l).values() %}{% endfor %}{{ ns.l }}",
    "{% macro pair() %}{% set ns.l = varargs %}{% endmacro %}{% set ns = namespace(l='x') %}"
    "{% for i in range(99) %}{{ pair(ns.l, ns.l) }}{% endfor %}{{ ns.l }}",
    "{% set ns = namespace(l=[1]) %}{% for i in range(99) %}"
    "{% set ns.l = [nothing, nothing] | map('default', ns.l) | list %}{% endfor %}{{ ns.l }}",
    "{{ [range(9999) | list] * 9999 | sum(start=[]) }}",
    "{{ ('a' * 10 ** 6).replace('a', 'b' * 10 ** 6) }}",
    "{{ ('a' * 10 ** 6) | replace('a', 'b' * 10 ** 6) }}",
    "{{ ('a' * 10 ** 6).join(range(10 ** 5) | map('string')) }}",
    "{{ range(10 ** 5) | join('a' * 10 ** 6) }}",
    "{{ 'a'.center(10 ** 10) }}",
    "{{ ('\t' * 1000).expandtabs(10 ** 6) }}",
    "{{ ('a' * 10 ** 4).translate({97: 'b' * 10 ** 5}) }}",
    "{{ 'a' | center(10 ** 10) }}",
    "{{ 'a' | indent(10 ** 10, true) }}",
    "{{ ['a'] | tojson(indent=10 ** 9) }}",
    "{{ ['a'] | batch(10 ** 9, 'x') | list }}",
    "{{ ['a'] | slice(10 ** 9) | list }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%*d' % (10 ** 9, 1) }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, 10 ** 9) }}",
    "{{ ('%(a)s' * 10 ** 5) % {'a': 'x' * 10 ** 6} }}",
    "{{ 1 | round(-10 ** 9) }}",
    "{{ (1).to_bytes(10 ** 10) }}",
    "{{ ('f' * 10 ** 6) | int(base=16) }}",
    "{{ 'a'.encode().zfill(10 ** 10) }}",
    "{{ lipsum(n=10 ** 9) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% block b %}{{ self.b() }}{% endblock %}",
    "{{ " + "-" * 100000 + "1 }}",
]


@pytest.mark.parametrize("template", GREEDY)
def test_what_grows_without_bound_is_stopped(template: str) -> None:
    resource = pytest.importorskip("resource")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
    fails(template)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert time.thread_time() - began < 5
    assert after - before < (300e6 if sys.platform == "darwin" else 300e3)  # bytes there, KiB elsewhere


@pytest.mark.parametrize(
    "template",
    [
        "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for i in r %}{% for j in r if false %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% for i in range(99999) %}{{ 'a' * 99999 in 'b' * 99999 }}{% endfor %}",
    ],
)
def test_what_takes_too_long_is_stopped(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meter, "CPU_SECONDS", 0.1)
    began = time.thread_time()
    assert "takes more than 0.1 s" in fails(template)
    assert time.thread_time() - began < 2


def test_a_long_conversation_is_within_bounds() -> None:
    messages = [{"role": "user", "content": "word " * 2000}] * 300
    assert len(render_chat(CHATML, messages)) > 2_900_000
    growing = "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s + m.content %}{% endfor %}"
    assert len(render_chat(growing + "{{ ns.s }}", messages)) == 3_000_000
