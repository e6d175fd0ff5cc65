"""Options of a server: what is out of range costs one line."""

import pytest

from headway.config import ServerConfig, UsageError


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"port": -1}, "port=-1 is below 0"),
        ({"port": 65536}, "port=65536 is above 65535; use 0 for a free one"),
        ({"drain": float("nan")}, "drain=nan is below 0"),
        ({"max_n": 0}, "max_n=0 is below 1"),
        ({"max_body": 0}, "max_body=0 is below 1"),
        ({"body_timeout": 0.0}, "body_timeout=0.0 is not above 0"),
        ({"body_timeout": float("inf")}, "body_timeout=inf is not above 0"),
        ({"max_waiting": -1}, "max_waiting=-1 is below 0"),
    ],
)
def test_a_number_out_of_range(changed, words):
    with pytest.raises(UsageError, match=words):
        ServerConfig(**changed).check()


def test_what_it_is_by_default_is_in_range():
    ServerConfig().check()
