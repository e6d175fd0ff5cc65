"""What a chat template may do: the dialect of Transformers, within bounds."""

import pytest

from headway.config import UsageError
from headway.data.tokenizer import load_tokenizer
from headway.server import template_sandbox
from headway.server.chat_template import ChatTemplate

pytest.importorskip("jinja2")
HELLO = [{"role": "user", "content": "hello"}]


def template(source):
    return ChatTemplate(source, load_tokenizer("bytes"))


@pytest.mark.parametrize(
    "source, words",
    [
        ("{{ raise_exception('two\nlines') }}", "refuses this: two lines"),
        ("{{ messages[0].content + 1 }}", "fails: TypeError"),
        ("{{ messages.nothing.at_all }}", "refuses this: .*nothing"),
        ("{{ ''.__class__.__mro__ }}", "refuses this: .*unsafe"),
        ("{{ messages.append(1) }}", "refuses this: .*unsafe"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "more than 0.2 s",
        ),
        (
            "{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}",
            "writes more than 1,000,000 characters",
        ),
        ("{{ 'x' * 10**12 }}", "makes more than"),
        ("{{ 10**10**10 }}", "makes more than"),
        ("{{ '%99999999d' % 1 }}", "makes more than"),
        ("{{ '{:>99999999}'.format(1) }}", "makes more than"),
        ("{{ 'x'.ljust(10**9) }}", "makes more than"),
        ("{{ 'x' | center(10**9) }}", "makes more than"),
        ("{{ messages | tojson(indent=10**9) }}", "makes more than"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "nested too deep"),
    ],
)
def test_what_a_template_may_not_do_is_one_line(monkeypatch, source, words):
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(template_sandbox, "MAX_CHARACTERS", 1_000_000)
    with pytest.raises(UsageError, match=words) as error:
        template(source).render(HELLO)
    assert "\n" not in str(error.value)


def test_the_dialect_of_transformers():
    source = "{{ strftime_now('%Y') | length }}{{ {'b': '<é>', 'a': 1} | tojson }}{{ [1] | tojson(indent=1) }}"
    assert bytes(template(source).render(HELLO)).decode() == '4{"b": "<é>", "a": 1}[\n 1\n]'
