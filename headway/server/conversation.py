"""Messages and tools of a chat request, in the form that chat templates and grammars take."""

from typing import Any

from headway.server.errors import BadRequest
from headway.server.fields import Json
from headway.server.json_body import read_json


def template_message(message: dict[str, Any], param: str) -> dict[str, Any]:
    """Return a message as chat templates take it: text as one string, arguments as objects."""
    content, calls, role = message["content"], message["tool_calls"], message["role"]
    if content is None and not calls:
        raise BadRequest(f"{param}.content is missing; give a text", f"{param}.content")
    if calls and role != "assistant":
        raise BadRequest(f"{param} has tool_calls and role {role}; only assistant calls", param)
    if message["tool_call_id"] is not None and role != "tool":
        raise BadRequest(f"{param} has tool_call_id and role {role}; only tool answers", param)
    if isinstance(content, list):
        content = "\n".join(part["text"] for part in content)
    calls = [_arguments(call, param) for call in calls] if calls else None
    return _given({**message, "content": content or "", "tool_calls": calls})


def _arguments(call: dict[str, Any], param: str) -> dict[str, Any]:
    function = call["function"]
    try:
        arguments = read_json(function["arguments"].encode())
    except BadRequest as error:
        raise BadRequest(f"{param}.tool_calls: the arguments: {error}", param) from None
    if type(arguments) is not dict:
        raise BadRequest(f"{param}.tool_calls: arguments are no JSON object", param)
    return _given({**call, "function": {**function, "arguments": arguments}})


def template_tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool as chat templates take it."""
    return {**tool, "function": _given(tool["function"])}


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that have a value."""
    return {name: value for name, value in values.items() if value is not None}


def call_schema(values: dict[str, Any]) -> Json:
    """Return the JSON Schema of a forced call: of one of the tools, or of the named one."""
    choice = values["tool_choice"]
    functions = [tool["function"] for tool in values["tools"]]
    if choice != "required":
        functions = [f for f in functions if f["name"] == choice["function"]["name"]][:1]
    calls: list[Json] = []
    shared: dict[str, dict[str, Json]] = {}
    for function in functions:
        arguments: dict[str, Json] = dict(function["parameters"] or {"type": "object"})
        for defs in ("$defs", "definitions"):  # a reference counts from the root
            if not isinstance(arguments.get(defs), dict):
                continue
            for name, schema in arguments.pop(defs).items():
                if shared.setdefault(defs, {}).setdefault(name, schema) != schema:
                    why = f"two tools define {name!r} in {defs} differently; rename one"
                    raise BadRequest(why, "tools")
        properties = {"name": {"const": function["name"]}, "arguments": arguments}
        shape = {"type": "object", "properties": properties, "additionalProperties": False}
        calls.append({**shape, "required": list(properties)})
    return {**(calls[0] if len(calls) == 1 else {"anyOf": calls}), **shared}
