"""Chat templates: the messages as the one text that the model was trained on.

The dialect is that of Hugging Face's `apply_chat_template`: Jinja2 with trimmed blocks, `break`/`continue`,
`raise_exception`, `strftime_now`, `{% generation %}` and a `tojson` that escapes nothing.
"""

import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jinja2

from dsopt.runtime.errors import DsoptError
from dsopt.runtime.meter import metered
from dsopt.runtime.sandbox import Sandbox

_FILE = "<template>"  # what Jinja calls the file of a template made from a string
_NONE: Mapping[str, Any] = MappingProxyType({})


def render_chat(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    variables: Mapping[str, Any] = _NONE,
) -> str:
    """The text of `messages`, each with `role`, `content` and whatever else the template reads.

    `variables` are the other names it may use: `bos_token`, `eos_token`, `tools`, switches of the model.
    A template comes with a model and may be hostile: it runs sandboxed, with bounded time and memory.
    Raises DsoptError when it is wrong, refuses the messages, or goes out of bounds.
    """
    # Templates ask `tools is none`, which an undefined name is not.
    names = {"tools": None, "documents": None, **variables}
    names |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
    try:
        with metered(names):
            return _compile(template).render(names)
    except DsoptError:
        raise
    except RecursionError as error:
        raise DsoptError("the chat template recurses too deeply; use another template or --raw") from error
    except Exception as error:  # it is foreign code, whatever it raises is its own failure
        where = _line(error)
        what = " ".join(str(error).split()) or type(error).__name__
        raise DsoptError(f"the chat template fails{where}: {what}; use another template or --raw") from error


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    return Sandbox().from_string(template)


def _line(error: Exception) -> str:
    """Where in the template: Jinja rewrites the traceback to its lines."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f" at line {error.lineno}"
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _FILE:
            line = trace.tb_lineno
        trace = trace.tb_next
    return "" if line is None else f" at line {line}"
