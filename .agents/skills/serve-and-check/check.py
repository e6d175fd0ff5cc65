"""Serve a model, compare its answers with a forward pass, exit 0 or 1."""

import json
import subprocess
import sys
import time
import urllib.request

import torch

from headway.hub.load import load_model

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind at all."


def ask(url, body):
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    return urllib.request.urlopen(request, timeout=120)


def blocks(url):
    lines = urllib.request.urlopen(f"{url}/metrics").read().decode().splitlines()
    return next(float(x.split()[1]) for x in lines if x.startswith("headway_cache_blocks_used "))


def checks(url, run):
    """Yield what was checked and whether it holds."""
    loaded = load_model(run, "cpu", "float32")
    ids = [int(i) for i in loaded.tokenizer.encode(TEXT)][: loaded.info.max_len - 1]
    with torch.no_grad():
        logits = loaded.model(torch.tensor([ids])).logits_BSV[0, :, : loaded.tokenizer.vocab_size]
    expected = torch.log_softmax(logits.float(), -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
    for state in ("cold", "cached"):
        reply = json.load(ask(url, {"prompt": ids, "echo": True, "logprobs": 1, "max_tokens": 0}))
        scores = torch.tensor(reply["choices"][0]["logprobs"]["token_logprobs"][1:])
        error = float((scores - expected[:, 0]).abs().max())
        yield f"log-probabilities, {state}: {error:.1e} off", error < 1e-4
    body = {"prompt": ids[:4], "max_tokens": min(20, loaded.info.max_len - 4), "seed": 1}
    whole = json.load(ask(url, body))["choices"][0]["text"]
    lines = [line[6:] for line in ask(url, {**body, "stream": True}) if line.startswith(b"data: ")]
    parts = "".join(json.loads(line)["choices"][0]["text"] for line in lines[:-1])
    yield "a stream says what the whole reply says", parts == whole
    long = {"prompt": ids[:1], "max_tokens": loaded.info.max_len - 1, "ignore_eos": True}
    stream = ask(url, {**long, "n": 8, "stream": True})
    stream.readline()
    stream.close()
    end = time.monotonic() + 10
    while blocks(url) and time.monotonic() < end:
        time.sleep(0.02)
    yield "a client that leaves frees its blocks", blocks(url) == 0


def main(run):
    words = ["serve", run, "--port", "0", "--json", "--device", "cpu", "--dtype", "float32"]
    server = subprocess.Popen(
        [sys.executable, "-m", "headway", *words], stdout=subprocess.PIPE, text=True
    )
    line = server.stdout.readline()
    if not line:
        return False
    try:
        good = True
        for what, holds in checks(json.loads(line)["url"], run):
            print("ok  " if holds else "FAIL", what, flush=True)
            good &= holds
    finally:
        server.terminate()
        out, _ = server.communicate(timeout=60)
    stopped = json.loads(out.splitlines()[-1])
    print("ok  " if server.returncode == 0 else "FAIL", f"stopped: {stopped}")
    return good and server.returncode == 0 and stopped["blocks_used"] == 0


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: check.py RUN")
    sys.exit(0 if main(sys.argv[1]) else 1)
