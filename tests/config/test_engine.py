"""Options of an engine: what is out of range costs one line."""

import pytest

from headway.config import EngineConfig, ServerConfig, UsageError


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"max_requests": 0}, "max_requests=0 is below 1; use a finite number ≥ 1"),
        ({"max_len": -1}, "max_len=-1 is below 0"),
        ({"cache_tokens": -1}, "cache_tokens=-1 is below 0"),
        (
            {"max_batch_tokens": 64},
            "max_batch_tokens=64 must be above max_requests=64, one token for each; use 320",
        ),
    ],
)
def test_a_number_out_of_range(changed, words):
    for config in (EngineConfig(**changed), ServerConfig(**changed)):
        with pytest.raises(UsageError, match=words):
            config.check()


def test_what_it_is_by_default_is_in_range():
    EngineConfig().check()
