"""`optim.transfer=power`: batch, rates, beta2 and epsilon by the tokens of a run.

With T the tokens of the run, B the tokens of its step and T0, B0 those that the rates were tuned
with (`base_tokens`, `base_batch`):

    B = B0 · (T/T0)^0.383                    arXiv 2505.13738 (Power Lines)
    rates = those given · √(B/B0)
    beta2 = beta2^(B/B0) within 0.95 … 0.9999: the average spans the same tokens
    eps = eps · √(r0/r), with r = B·T0 / (B0·T) and r0 = 1

as in Marin's MoE recipe, but for its rate, which falls with T^0.28 besides. The run keeps its
tokens: a larger batch takes fewer steps. All of it is arithmetic on the config, so that the
resolved config has the results under their own names and `transfer=none`: a run that is resumed, or
made longer, keeps them."""

import math
from dataclasses import replace

from headway.config.tree import Config

EXPONENT = 0.383


def powered(config: Config) -> tuple[Config, dict[str, str]]:
    """Return the config with what `optim.transfer=power` changes, and field → the sentence that
    explains its value; the config itself under another rule. Raises UsageError for values out of
    their range, and where bfloat16 moments would lose the average of the new beta2."""
    optim, data = config.optim, config.data
    if optim.transfer != "power":
        return config, {}
    optim.check()
    sequences = (optim.steps - 1) * data.batch_size + (data.last_batch_size or data.batch_size)
    tokens, unit = sequences * data.seq_len, config.mesh.size * (data.micro_batch_size or 1)
    long = tokens / optim.base_tokens
    wanted = optim.base_batch * long**EXPONENT / data.seq_len
    batch = max(unit, min(round(wanted / unit), sequences // unit) * unit)
    steps = -(-sequences // batch)
    last = sequences - (steps - 1) * batch
    if last > unit:
        last -= last % unit
    large = batch * data.seq_len / optim.base_batch
    by_batch, by_ratio = math.sqrt(large), math.sqrt(long / large)
    beta2 = min(max(optim.beta2**large, 0.95), 0.9999)
    data = replace(data, batch_size=batch, last_batch_size=0 if last == batch else last)
    after = replace(
        optim,
        transfer="none",
        base_batch=type(optim).base_batch,
        base_tokens=type(optim).base_tokens,
        steps=steps,
        lr=optim.lr * by_batch,
        muon_lr=optim.muon_lr * by_batch,
        beta2=beta2,
        eps=optim.eps * by_ratio,
    )
    after.check()
    ratio = f"√(B/B0) = √{large:.4g}"
    B = f"{batch} × {data.seq_len} tokens"
    derived = {
        "data.batch_size": f"{batch}: base_batch {optim.base_batch} · (T/T0)^{EXPONENT}, T/T0 = "
        f"{tokens:,}/{optim.base_tokens:,}, is {wanted:.4g} sequences of {data.seq_len}",
        "optim.steps": f"{steps}: {tokens:,} tokens in steps of B = {B}"
        + (f", the last of {last}" if last != batch else ""),
        "optim.lr": f"{after.lr:.4g}: {optim.lr:.4g} · {ratio}",
        "optim.beta2": f"{beta2:.6g}: {optim.beta2:.6g}^{large:.4g} within 0.95 … 0.9999",
        "optim.eps": f"{after.eps:.4g}: {optim.eps:.4g} · √(T·B0 / (T0·B)) = √{long / large:.4g}",
    }
    if optim.name == "muon":
        derived["optim.muon_lr"] = f"{after.muon_lr:.4g}: {optim.muon_lr:.4g} · {ratio}"
    return replace(config, data=data, optim=after), derived
