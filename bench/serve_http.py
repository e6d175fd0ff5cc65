"""The server under clients: what HTTP and streaming cost, what a cached prefix saves, how a long
prompt and a crowd are borne; what a folder costs to load.

    python bench/serve_http.py [--shapes S,M] [--seconds 60] [--clients 200] [--work DIR] [--json]
                               [--save]

Shapes and weights as in bench/serve.py, bfloat16, the server with one thread, its clients in this
process. `stream`: 16 clients read 65 tokens each; compared with the same requests in a process that
runs the engine alone. `prefix`: time to the first token of a prompt of 520 tokens, whose first 512
were asked before or not. `beside`: 4 streams, then a prompt of 2,048 tokens; how much longer their
tokens are apart (median while it is read), and how much longer it takes than alone. `crowd`:
clients that ask for 32 streamed tokens again and again, one in five leaves in the middle; resident
memory at the end against that at half of the time, when all pages have been used. `memory`:
resident size against weights + cache. `ready`: from the start of the process to a server that
answers, beside Transformers' `from_pretrained` on the same folder, in turns. `import`: peak memory
of `headway import`.
"""

import argparse
import asyncio
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from bench.serve import SHAPES, prepare, side_of
from headway.config import UsageError

Prompt = list[int]


class Server:
    """`headway serve` in a process of its own."""

    def __init__(self, run: Path, *flags: str):
        command = [sys.executable, "-m", "headway", "serve", str(run), "--port", "0", "--json"]
        begin = time.perf_counter()
        self.process = subprocess.Popen(
            [*command, "--threads", "1", "--dtype", "bfloat16", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        self.ready = json.loads(self.process.stdout.readline())
        self.seconds_to_ready = time.perf_counter() - begin
        self.port = int(self.ready["url"].rpartition(":")[2])

    def resident(self) -> int:
        """Resident bytes of the process."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("VmRSS"))

    def metric(self, name: str) -> float:
        import urllib.request

        text = urllib.request.urlopen(f"{self.ready['url']}/metrics").read().decode()
        return next(float(x.split()[-1]) for x in text.splitlines() if x.startswith(name + " "))

    def stop(self) -> dict:
        self.process.terminate()
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readlines()[-1])


async def stream(port: int, prompt: Prompt, tokens: int, leave_after: int = 0) -> list[float]:
    """The times at which the tokens of a reply arrive; `leave_after` tokens the client leaves.
    Raises RuntimeError with the status of a reply that is none."""
    body = json.dumps(
        {
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "return_token_ids": True,
        }
    ).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Length: {len(body)}"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
        status = (await reader.readline()).split()[1].decode()
        if status != "200":
            raise RuntimeError(status)
        times: list[float] = []
        while line := await reader.readline():
            if line.startswith(b"data: {"):
                event = json.loads(line[6:])
                ids = event["choices"][0].get("token_ids") if event["choices"] else None
                times += [time.perf_counter()] * len(ids or ())
                if leave_after and len(times) >= leave_after:
                    break
            elif line.startswith(b"data: [DONE]"):
                break
        return times
    finally:
        writer.close()


def draw(n: int, vocab_size: int, source: random.Random) -> Prompt:
    return [source.randrange(1, vocab_size) for _ in range(n)]


async def http_share(server: Server, run: Path, vocab_size: int) -> dict:
    """Tokens/s of 16 streams over those of the engine alone, in turns."""
    source, shares = random.Random(2), []
    engine = side_of("headway", run)
    try:
        for repetition in range(4):
            prompts = [draw(8, vocab_size, source) for _ in range(16)]
            alone = engine.step({"prompts": prompts, "tokens": 65})["seconds"]
            begin = time.perf_counter()
            await asyncio.gather(*(stream(server.port, p, 65) for p in prompts))
            if repetition:
                shares.append(alone / (time.perf_counter() - begin))
    finally:
        engine.close()
    return {"task": "stream", "share": statistics.median(shares), "shares": shares}


async def prefix_gain(server: Server, vocab_size: int) -> dict:
    """Times to the first token of prompts with a new and with a known prefix."""
    source, cold, warm = random.Random(3), [], []
    for _ in range(5):
        prefix = draw(512, vocab_size, source)
        for times in (cold, warm):
            begin = time.perf_counter()
            arrived = await stream(server.port, prefix + draw(8, vocab_size, source), 1)
            times.append(arrived[0] - begin)
    gain = statistics.median(cold) / statistics.median(warm)
    return {"task": "prefix", "gain": gain, "cold": cold, "warm": warm}


async def beside(server: Server, vocab_size: int) -> dict:
    """A prompt of 2,048 tokens beside four streams."""
    source = random.Random(4)
    long = [draw(2048, vocab_size, source) for _ in range(2)]
    begin = time.perf_counter()
    alone = (await stream(server.port, long[0], 1))[0] - begin
    streams = [
        asyncio.create_task(stream(server.port, draw(8, vocab_size, source), 400)) for _ in range(4)
    ]
    await asyncio.sleep(2.0)
    begin = time.perf_counter()
    end = (await stream(server.port, long[1], 1))[0]
    quiet, busy = [], []
    for times in await asyncio.gather(*streams):
        for before, after in itertools.pairwise(times):
            if before > begin - 1.9 and after < begin:
                quiet.append(after - before)
            elif before > begin and after < end:
                busy.append(after - before)
    return {
        "task": "beside",
        "gap_growth": statistics.median(busy) / statistics.median(quiet),
        "prompt_growth": (end - begin) / alone,
        "alone": alone,
        "gap": statistics.median(quiet),
    }


async def crowd(server: Server, vocab_size: int, seconds: float, clients: int) -> dict:
    """Many clients, of which some leave; what went wrong, and what is held afterwards."""
    source, end = random.Random(5), time.perf_counter() + seconds
    gaps, statuses, left = [], {"200": 0}, 0
    blocks = server.metric("headway_cache_blocks_used")

    async def client() -> None:
        nonlocal left
        while time.perf_counter() < end:
            leave = source.randrange(1, 32) if source.random() < 0.2 else 0
            prompt = draw(source.randrange(4, 64), vocab_size, source)
            try:
                times = await stream(server.port, prompt, 32, leave)
                statuses["200"] += 1
                left += leave > 0
                gaps.extend(b - a for a, b in itertools.pairwise(times))
            except RuntimeError as error:
                statuses[str(error)] = statuses.get(str(error), 0) + 1
                await asyncio.sleep(0.2)

    async def resident_at_half() -> int:
        await asyncio.sleep(seconds / 2)
        return server.resident()

    half = asyncio.create_task(resident_at_half())
    await asyncio.gather(*(client() for _ in range(clients)))
    await asyncio.sleep(1.0)
    gaps.sort()
    return {
        "task": "crowd",
        "statuses": statuses,
        "p50_between_tokens": gaps[len(gaps) // 2],
        "p99_between_tokens": gaps[int(len(gaps) * 0.99)],
        "left": left,
        "blocks_held": server.metric("headway_cache_blocks_used") - blocks,
        "resident_growth": server.resident() / await half - 1,
    }


def ready(folder: Path) -> dict:
    """Seconds until a server answers, and until Transformers has loaded the same folder."""
    ours, theirs = [], []
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM; "
        "torch.set_num_threads(1); "
        "AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)"
    )
    for _ in range(3):
        server = Server(folder)
        ours.append(server.seconds_to_ready)
        server.stop()
        begin = time.perf_counter()
        command = [sys.executable, "-c", code, str(folder)]
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        theirs.append(time.perf_counter() - begin)
    ratio = statistics.median(ours) / statistics.median(theirs)
    return {"task": "ready", "ratio": ratio, "seconds": ours, "from_pretrained": theirs}


def imported(folder: Path) -> dict:
    """Peak memory of an import above the interpreter, and its bound of 200 MB + 3 × the largest
    tensor of the folder."""
    from safetensors import safe_open

    largest = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                part = tensors.get_slice(name)
                largest = max(largest, 2 * math.prod(part.get_shape()))
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "headway", "import", str(folder), "--to"]
        command += [f"{temporary}/run", "--json"]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    answer = json.loads(out.splitlines()[-1])
    peak, bound = answer["peak_memory_bytes"], 200e6 + 3 * largest
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return {"task": "import", "bytes": size, "peak": peak, "bound": bound}


async def bench_shape(name: str, args: argparse.Namespace, work: Path) -> list[dict]:
    folder, vocab_size = work / name, SHAPES[name].vocab_size
    prepare(name, folder, gguf=False, hf=True)
    rows = [imported(folder / "hf"), ready(folder / "hf")]
    server = Server(folder / "run", "--cache-tokens", "16384", "--max-waiting", "64")
    try:
        rows.append(await http_share(server, folder / "run", vocab_size))
        rows.append(await prefix_gain(server, vocab_size))
        rows.append(await beside(server, vocab_size))
        rows.append(await crowd(server, vocab_size, args.seconds, args.clients))
        size = sum(p.stat().st_size for p in (folder / "run").rglob("*.safetensors"))
        cache = 16384 * kv_bytes(name)
        resident = server.resident()
        rows.append({"task": "memory", "resident": resident, "weights": size, "cache": cache})
    finally:
        rows.append({"task": "stopped", **server.stop()})
    for row in rows:
        row["shape"] = name
        shown = {k: v for k, v in row.items() if not isinstance(v, list)}
        print(json.dumps(shown), flush=True)
    return rows


def kv_bytes(name: str) -> int:
    """Bytes of the cache per position."""
    m = SHAPES[name]
    return m.n_layers * 2 * m.kv_heads * m.head_width * 2


def targets(rows: list[dict]) -> list[dict]:
    out = []
    for row in rows:
        shape, task = row["shape"], row["task"]
        if task == "stream":
            bound = 0.6 if shape == "S" else 0.9
            name = f"{shape} tokens/s of 16 streams / engine alone"
            out.append(common.target(name, row["share"], bound, at_least=True))
        if task == "prefix":
            name = f"{shape} time to first token, new prefix / known prefix of 512"
            out.append(common.target(name, row["gain"], 5, at_least=True))
        if task == "beside" and shape != "S":
            name = f"{shape} time between tokens beside a prompt of 2048 / before"
            out.append(common.target(name, row["gap_growth"], 4, at_least=False))
            name = f"{shape} prompt of 2048 beside 4 streams / alone"
            out.append(common.target(name, row["prompt_growth"], 1.6, at_least=False))
        if task == "crowd":
            wrong = sum(n for status, n in row["statuses"].items() if status not in ("200", "429"))
            out.append(common.target(f"{shape} crowd: errors but 429", wrong, 0, at_least=False))
            held = row["blocks_held"]
            out.append(common.target(f"{shape} crowd: blocks held after", held, 0, at_least=False))
            name = f"{shape} crowd: growth of resident memory after half of the time"
            out.append(common.target(name, row["resident_growth"], 0.03, at_least=False))
        if task == "ready":
            name = f"{shape} time to ready / from_pretrained"
            out.append(common.target(name, row["ratio"], 1.2, at_least=False))
        if task == "import":
            name = f"{shape} import: peak memory / (200 MB + 3 × the largest tensor)"
            out.append(common.target(name, row["peak"] / row["bound"], 1, at_least=False))
        if task == "memory":
            limit = 1.15 * (row["weights"] + row["cache"]) + 450e6
            name = f"{shape} resident / (1.15 (weights + cache) + 450 MB)"
            out.append(common.target(name, row["resident"] / limit, 1, at_least=False))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    common.add_options(parser, data=False)
    parser.add_argument("--shapes", default="S,M")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--work", default="", help="folder that keeps the models between calls")
    args = parser.parse_args()
    names = args.shapes.split(",")
    if unknown := set(names) - set(SHAPES):
        raise UsageError(f"--shapes {sorted(unknown)[0]} is none of {', '.join(SHAPES)}")
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in names:
            rows += asyncio.run(bench_shape(name, args, Path(args.work or temporary)))
    common.report("serve_http", rows, targets(rows), args)


if __name__ == "__main__":
    common.run(main)
