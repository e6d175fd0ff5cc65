// llama.cpp's side of bench/serve.py, through node-llama-cpp: `node serve_llama.mjs MODULES FILE THREADS`.
// Requests and answers as in serve_rivals.py, a line of JSON each.
import {createRequire} from "module";
import path from "path";
import {pathToFileURL} from "url";
import readline from "readline";

const [modules, file, threads] = process.argv.slice(2);
const resolve = createRequire(path.join(modules, "package.json")).resolve;
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(resolve("node-llama-cpp")).href);
const llama = await getLlama({gpu: false, build: "never", maxThreads: +threads, logLevel: LlamaLogLevel.error});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({
    sequences: 16, contextSize: 2304, batchSize: 2048, threads: +threads, flashAttention: true
});
const sequences = Array.from({length: 16}, () => context.getSequence());

async function reply(sequence, prompt, n) {
    await sequence.clearHistory();
    const text = [];
    for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        text.push(token);
        if (text.length === n) break;
    }
    return text;
}

for await (const line of readline.createInterface({input: process.stdin})) {
    const {prompts, tokens} = JSON.parse(line);
    const begin = performance.now();
    const text = await Promise.all(prompts.map((prompt, i) => reply(sequences[i], prompt, tokens)));
    console.log(JSON.stringify({seconds: (performance.now() - begin) / 1e3, text}));
}
process.exit(0);
