"""Requests that cannot be had are refused in one line that names both values."""

import dataclasses

import pytest

from headway.config import UsageError
from headway.serve.params import SamplingParams

NAN = float("nan")


def test_defaults_and_the_largest_request_pass():
    SamplingParams().check(257, 100, 84)
    SamplingParams(max_tokens=0, prompt_logprobs=20).check(257, 100, 100)
    SamplingParams(seed=-(2**63), stop=("a",) * 16, logit_bias=((256, -100.0),)).check(257, 99, 1)


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"max_tokens": 17},
            "84 tokens and max_tokens=17 do not fit a context of 100.* at most 16",
        ),
        ({"max_tokens": -1}, "max_tokens=-1 is outside 0"),
        ({"min_tokens": 17}, "min_tokens=17 is above max_tokens=16"),
        ({"temperature": NAN}, "temperature=nan"),
        ({"temperature": -0.1}, "temperature=-0.1 is outside 0"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": NAN}, "top_p=nan"),
        ({"min_p": 1.5}, "min_p=1.5"),
        ({"n": 0}, "n=0"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ({"presence_penalty": 2.5}, "presence_penalty=2.5 is outside -2 … 2"),
        ({"frequency_penalty": NAN}, "frequency_penalty=nan"),
        ({"logit_bias": ((257, 1.0),)}, "logit_bias has token 257, outside the vocabulary of 257"),
        ({"logit_bias": ((3, 101.0),)}, "logit_bias of token 3=101.0"),
        ({"allowed_token_ids": (-1,)}, "allowed_token_ids has token -1"),
        ({"stop_token_ids": (300,)}, "stop_token_ids has token 300"),
        ({"stop": ("",)}, "empty text"),
        ({"stop": ("x",) * 17}, "17 texts; give at most 16"),
        ({"logprobs": 21}, "logprobs=21 is outside -1 … 20"),
        ({"prompt_logprobs": -2}, "prompt_logprobs=-2"),
    ],
)
def test_what_cannot_be_had_is_one_line(change, words):
    with pytest.raises(UsageError, match=words) as error:
        dataclasses.replace(SamplingParams(), **change).check(257, 100, 84)
    assert "\n" not in str(error.value)


def test_a_grammar_and_allowed_tokens_contradict():
    class Any:
        def matcher(self):
            raise NotImplementedError

    with pytest.raises(UsageError, match=r"a grammar and allowed_token_ids=\[1, 2\]"):
        SamplingParams(grammar=Any(), allowed_token_ids=(1, 2)).check(257, 100, 1)
