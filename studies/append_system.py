"""What does a new instruction in mid-conversation cost: appended, or written into the top message?

The engine serves a conversation of several turns, then the instruction comes with the next one: as
a system message at its place (the template renders it there), or at the end of the system message
at the top, where it changes everything after it. Counted is what the cache serves of that turn's
prompt. Keys depend on tokens alone, so a small random model does."""

import string
from collections.abc import Sequence
from typing import Any

from headway.config import EngineConfig, ModelConfig, MoEConfig
from headway.data.tokenizer import ByteTokenizer
from headway.lab.measurement import Measurement, Row, Verdict
from headway.model.transformer import Transformer
from headway.serve.engine import Engine
from headway.serve.params import SamplingParams
from headway.server.chat_template import PLAIN_TEMPLATE, ChatTemplate

SYSTEM = "You are a careful assistant. " + "Answer from the text, say so where it is silent. " * 8
INSTRUCTION = "From now on answer in one sentence, and in French."
QUESTION = "Question {}: what does paragraph {} of the report say about the harvest of that year?"
LETTERS = tuple(string.ascii_lowercase.encode())
MODEL = ModelConfig(
    vocab_size=257, n_layers=1, d_model=16, n_heads=2, moe=MoEConfig(kind="dense"), d_ff=16
)
Messages = list[dict[str, Any]]


def change(messages: Messages, arm: str) -> Messages:
    """The conversation with the instruction before its last message."""
    match arm:
        case "unchanged":
            return messages
        case "appended":
            return [*messages[:-1], {"role": "system", "content": INSTRUCTION}, messages[-1]]
        case "edited":
            top = {"role": "system", "content": SYSTEM + INSTRUCTION}
            return [top, *messages[1:]]
    raise AssertionError(arm)


def served(arm: str, n_turns: int) -> tuple[int, int]:
    """Tokens of the prompt of the turn after `n_turns`, and how many of them the cache served."""
    tokenizer = ByteTokenizer()
    template = ChatTemplate(PLAIN_TEMPLATE, tokenizer)
    sizes = EngineConfig(max_len=8192, cache_tokens=16384)
    engine = Engine(Transformer(MODEL).eval(), tokenizer, sizes)
    params = SamplingParams(max_tokens=64, seed=0, allowed_token_ids=LETTERS)
    messages: Messages = [{"role": "system", "content": SYSTEM}]
    for turn in range(n_turns + 1):
        messages.append({"role": "user", "content": QUESTION.format(turn, turn)})
        asked = change(messages, arm) if turn == n_turns else messages
        request = engine.add(template.render(asked), params)
        reply = ""
        while engine.has_work:
            reply += "".join(update.text for update in engine.step())
        messages.append({"role": "assistant", "content": reply})
    return len(request.prompt), request.n_cached


def measure(turns: Sequence[int] = (1, 4, 16)) -> list[Row]:
    rows = []
    for n_turns in turns:
        for arm in ("unchanged", "appended", "edited"):
            n_prompt, n_cached = served(arm, n_turns)
            rows.append(
                {
                    "turns before": n_turns,
                    "instruction": arm,
                    "tokens of the prompt": n_prompt,
                    "from the cache": n_cached,
                    "share": n_cached / n_prompt,
                }
            )
    return rows


def judge(rows: Sequence[Row]) -> Verdict:
    cached = {(row["turns before"], row["instruction"]): row["from the cache"] for row in rows}
    turns = sorted({row["turns before"] for row in rows})
    least = min(cached[n, "appended"] / cached[n, "unchanged"] for n in turns)
    most = max(cached[n, "edited"] for n in turns)
    top = len(f"System: {SYSTEM}")
    worse = any(cached[n, "appended"] < cached[n, "edited"] for n in turns)
    answer = "refuted" if worse else "holds" if least >= 0.9 and most <= top else "cannot_tell"
    return Verdict(
        answer,
        f"Appended, the cache serves at least {least:.0%} of what it serves of an unchanged "
        f"conversation; edited, at most {most} tokens, of a top message of {top}.",
    )


STUDY = Measurement(
    "append_system",
    "An instruction that is appended as a system message keeps the cached prefix of the whole "
    "conversation; written into the top message it keeps no more than that message.",
    "Holds if, at every length, appending serves at least 90% of the tokens of an unchanged "
    "conversation from the cache and editing no more than the top message; refuted if appending "
    "serves less than editing at any.",
    measure,
    judge,
)
