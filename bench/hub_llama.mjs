// llama.cpp's side of bench/hub.py, through node-llama-cpp: `node hub_llama.mjs MODULES FILE IDS` writes
// twelve greedy tokens and the log-probabilities of what it holds likely. Float32 cache, no flash attention.
import {createRequire} from "module";
import path from "path";
import {pathToFileURL} from "url";

const [modules, file, ids] = process.argv.slice(2);
const resolve = createRequire(path.join(modules, "package.json")).resolve;
const {getLlama} = await import(pathToFileURL(resolve("node-llama-cpp")).href);
const llama = await getLlama({gpu: false, build: "never", logLevel: "error"});
const model = await llama.loadModel({modelPath: file});
const context = await model.createContext({
    contextSize: 64, threads: 1, flashAttention: false,
    experimentalKvCacheKeyType: 0, experimentalKvCacheValueType: 0
});
const tokens = [], steps = [];
const replies = context.getSequence().evaluateWithMetadata(
    JSON.parse(ids), {probabilities: true}, {temperature: 0, yieldEogToken: true}
);
for await (const step of replies) {
    tokens.push(step.token);
    const likely = [...step.probabilities].filter(([, p]) => p > 1e-4);
    steps.push(likely.map(([token, p]) => [token, Math.log(p)]));
    if (tokens.length === 12) break;
}
process.stdout.write(JSON.stringify({tokens, steps}) + "\n", () => process.exit(0)); // when all is written
