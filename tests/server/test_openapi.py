"""The OpenAPI description, and schemathesis, which makes requests from it."""

import pytest
from hypothesis import HealthCheck, given, settings

schemathesis = pytest.importorskip(
    "schemathesis", reason="needs schemathesis: pip install schemathesis"
)
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = (
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
)


@pytest.fixture(scope="module")
def description(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_it_describes_every_endpoint_and_field(server):
    document = server.http.get("/openapi.json").json()
    paths = document["paths"]
    assert set(paths) == {
        "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/models/{name}", "/tokenize", "/detokenize",
        "/health", "/version", "/metrics",
    }  # fmt: skip
    body = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["prompt"] and body["properties"]["temperature"]["description"]
    assert server.http.get("/docs").status_code == 404


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]
)
def test_schemathesis_finds_no_mistake(server, description, path):
    operation = description[path]["POST"]

    @settings(
        max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    def ask(case):
        response = case.call()
        case.validate_response(response, checks=list(CHECKS))

    given(operation.as_strategy())(ask)()
    assert "Traceback" not in server.log.read_text()
