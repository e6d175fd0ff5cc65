// Asks this server alone, with the API that every client has. A token is an object
// {text, logprob, top: [[text, logprob], …], routes: {experts, gates} or null}, both of layers × heads × top_k.

const $ = (selector, from = document) => from.querySelector(selector);
const make = (tag, name, text = "") => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.textContent = text;
  return element;
};

let model = null; // of /v1/models
let running = []; // AbortControllers
const columns = [];

const mode = () => $("input[name=mode]:checked").value;
const headers = () => {
  const key = $("#key").value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
};

// ---- the server ------------------------------------------------------------------------------

async function ask(path, body, signal) {
  const options = body && {
    method: "POST",
    headers: { "content-type": "application/json", ...headers() },
    body: JSON.stringify(body),
    signal,
  };
  const reply = await fetch(path, options ?? { headers: headers() });
  if (reply.ok) return reply;
  if (reply.status === 401) $("#key-row").hidden = false;
  const error = await reply.json().catch(() => null);
  throw new Error(error?.error?.message ?? `HTTP ${reply.status}`);
}

async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      const event = JSON.parse(part.slice(6));
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}

const tokensOf = (logprobs) => {
  if (!logprobs) return [];
  if (logprobs.content) {
    return logprobs.content.map((t) => ({
      text: t.token, logprob: t.logprob, top: t.top_logprobs.map((a) => [a.token, a.logprob]),
    }));
  }
  return logprobs.tokens.map((text, i) => ({
    text, logprob: logprobs.token_logprobs[i], top: Object.entries(logprobs.top_logprobs[i] ?? {}),
  }));
};

// The routes of the tokens that were read since the event before.
function routesOf(choice) {
  if (!choice.routed_experts) return [];
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer;
  const experts = new Int16Array(bytes(choice.routed_experts));
  const gates = new Float32Array(bytes(choice.expert_gates));
  const { layers, heads, top_k } = model.routes;
  const each = layers.length * heads * top_k;
  return Array.from({ length: experts.length / each }, (_, i) => {
    const row = [i * each, (i + 1) * each];
    return { experts: experts.slice(...row), gates: gates.slice(...row) };
  });
}

// ---- a column: controls, what was said, the token that is looked at ---------------------------

class Column {
  constructor(name) {
    this.element = $("#column").content.firstElementChild.cloneNode(true);
    this.controls = $(".controls", this.element);
    this.output = $(".output", this.element);
    this.facts = $(".facts", this.element);
    this.detail = $(".detail", this.element);
    $("legend", this.element).textContent = name;
    this.output.addEventListener("keydown", (event) => this.move(event));
    this.clear();
  }

  clear() {
    this.messages = [];
    this.tokens = [];
    this.chosen = -1;
    this.output.replaceChildren();
    this.facts.textContent = "";
    this.detail.hidden = true;
  }

  settings() {
    const body = {};
    for (const input of this.controls.querySelectorAll("input")) {
      if (input.value !== "") body[input.name] = input.type === "number" ? Number(input.value) : input.value;
    }
    return body;
  }

  turn(role, text) {
    const turn = make("div", "turn", text);
    turn.dataset.role = role;
    this.output.append(turn);
    return turn;
  }

  async run(text, system, signal) {
    const chat = mode() === "chat";
    const body = { ...this.settings(), stream: true, stream_options: { include_usage: true } };
    if (model.routes) body.return_routed_experts = body.return_expert_gates = true;
    let place = this.output;
    if (chat) {
      if (!this.messages.length && system) this.messages.push({ role: "system", content: system });
      this.messages.push({ role: "user", content: text });
      this.turn("user", text);
      place = this.turn("assistant", "");
      Object.assign(body, { messages: this.messages, logprobs: true, top_logprobs: 5 });
    } else {
      this.clear();
      place.append(make("span", "given", text));
      Object.assign(body, { prompt: text, logprobs: 5 });
    }
    const first = this.tokens.length, begin = performance.now();
    const state = { place, said: "", decoder: new TextDecoder(), firstToken: 0, reason: "", usage: null, read: 0 };
    try {
      const path = chat ? "v1/chat/completions" : "v1/completions";
      for await (const event of events(await ask(path, body, signal))) {
        if (event.usage) state.usage = event.usage;
        for (const choice of event.choices) this.take(choice, state, first, begin);
        this.tell(state, first, begin);
      }
    } catch (error) {
      if (error.name === "AbortError") state.reason = "stopped";
      else place.append(make("div", "error", error.message));
    }
    if (chat) this.messages.push({ role: "assistant", content: state.said });
    this.tell(state, first, begin);
  }

  take(choice, state, first, begin) {
    state.said += choice.text ?? choice.delta?.content ?? "";
    for (const token of tokensOf(choice.logprobs)) {
      state.firstToken ||= performance.now() - begin;
      this.show(token, state);
    }
    const routes = routesOf(choice);
    // a token is read with the one after it; the rows before those of the reply are the prompt's
    const read = this.tokens.length - first - 1;
    routes.slice(Math.max(0, routes.length - (read - state.read))).forEach((row, i, rows) => {
      const index = first + read - rows.length + i;
      this.tokens[index].routes = row;
      if (index === this.chosen) this.look(index);
    });
    if (routes.length) state.read = read;
    state.reason = choice.finish_reason ?? state.reason;
  }

  show(token, state) {
    const escaped = /^(?:bytes:)((?:\\x[0-9a-f]{2})+)$/.exec(token.text);
    const bytes = escaped
      ? Uint8Array.from(escaped[1].split("\\x").slice(1), (hex) => parseInt(hex, 16))
      : new TextEncoder().encode(token.text);
    const special = /^<\|.*\|>$/.test(token.text);
    const span = make("span", special ? "token special" : "token", special ? token.text : state.decoder.decode(bytes, { stream: true }));
    span.style.setProperty("--rarity", Math.min(1, Math.max(0, -token.logprob / Math.log(1000))).toFixed(3));
    const index = this.tokens.push({ routes: null, ...token, span }) - 1;
    span.addEventListener("pointerenter", () => this.look(index));
    span.addEventListener("click", () => this.look(index));
    state.place.append(span);
  }

  tell({ usage, reason, firstToken }, first, begin) {
    const n = this.tokens.length - first;
    const seconds = (performance.now() - begin) / 1000;
    const facts = [`${n} tokens`];
    if (n) {
      const mean = this.tokens.slice(first).reduce((sum, t) => sum + t.logprob, 0) / n;
      facts.push(`first after ${firstToken.toFixed(0)} ms`, `${(n / seconds).toFixed(1)} tokens/s`, `perplexity ${Math.exp(-mean).toFixed(2)}`);
    }
    if (usage) facts.push(`${usage.prompt_tokens_details.cached_tokens} of ${usage.prompt_tokens} prompt tokens cached`);
    if (reason) facts.push(reason);
    this.facts.textContent = facts.join(" · ");
  }

  move(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step || !this.tokens.length) return;
    event.preventDefault();
    this.look(Math.min(Math.max(this.chosen + step, 0), this.tokens.length - 1));
  }

  look(index) {
    this.tokens[this.chosen]?.span.classList.remove("chosen");
    const token = this.tokens[index];
    this.chosen = index;
    token.span.classList.add("chosen");
    this.detail.replaceChildren(alternatives(token), experts(token));
    this.detail.hidden = false;
  }
}

function alternatives(token) {
  const table = make("table", "alternatives");
  const known = token.top.some(([text]) => text === token.text);
  for (const [text, logprob] of [...token.top, ...(known ? [] : [[token.text, token.logprob]])].sort((a, b) => b[1] - a[1])) {
    const row = table.insertRow();
    if (text === token.text) row.className = "drawn";
    row.insertCell().append(make("code", "", JSON.stringify(text).slice(1, -1).replaceAll(" ", "␣")));
    const number = row.insertCell();
    number.className = "number";
    number.textContent = Math.exp(logprob).toFixed(4);
    const bar = make("span", "bar");
    bar.style.width = `${Math.max(1, 160 * Math.exp(logprob))}px`;
    row.insertCell().append(bar);
  }
  return table;
}

// A table of layers by heads; each expert with its gate, which also is the colour behind it.
function experts({ routes }) {
  const box = make("div", "experts");
  if (!model.routes) {
    box.textContent = "Experts: start the server with --return-routes.";
    return box;
  }
  if (!routes) {
    box.textContent = "Experts come when a token is read, with the one after it. The last token of a reply is never read.";
    return box;
  }
  const { layers, heads, top_k, experts } = model.routes;
  const table = box.appendChild(make("table"));
  const names = Array.from({ length: heads }, (_, h) => make("th", "", heads > 1 ? `head ${h}` : "expert and gate"));
  table.createTHead().insertRow().append(make("th", "", "experts"), ...names);
  const body = table.createTBody();
  const largest = Math.max(...routes.gates) || 1;
  layers.forEach((layer, i) => {
    const row = body.insertRow();
    row.append(make("th", "", `layer ${layer}`));
    for (let h = 0; h < heads; h++) {
      const chips = row.insertCell().appendChild(make("div", "chips"));
      chips.style.gridTemplateColumns = `repeat(${Math.min(top_k, 4)}, max-content)`;
      for (let k = 0; k < top_k; k++) {
        const at = (i * heads + h) * top_k + k, expert = routes.experts[at], gate = routes.gates[at];
        const name = expert < experts ? `${expert}` : "none";
        const chip = make("span", "expert", name);
        chip.append(" ", make("small", "", gate.toFixed(2)));
        chip.style.setProperty("--gate", (gate / largest).toFixed(3));
        chip.title = `layer ${layer}, head ${h}: expert ${name}, gate ${gate.toPrecision(4)}`;
        chips.append(chip);
      }
    }
  });
  return box;
}

// ---- the page --------------------------------------------------------------------------------

function setMode() {
  const chat = mode() === "chat";
  $("#system-row").hidden = $("#reset").hidden = !chat;
  $("#text-label").textContent = chat ? "Message" : "Prompt";
  $("#send").textContent = chat ? "Send" : "Write";
  columns.forEach((column) => column.clear());
}

function setColumns(n) {
  while (columns.length < n) columns.push(new Column("AB"[columns.length]));
  columns.length = n;
  $("#columns").replaceChildren(...columns.map((column) => column.element));
  $("#compare").setAttribute("aria-pressed", n === 2);
}

async function send() {
  if (running.length) return;
  const text = $("#text").value;
  if (!model) await load();
  if (!model) return;
  if (mode() === "chat") {
    if (!text) return;
    $("#text").value = "";
  }
  $("#send").disabled = true;
  $("#stop").disabled = false;
  running = columns.map(() => new AbortController());
  await Promise.all(columns.map((column, i) => column.run(text, $("#system").value, running[i].signal)));
  running = [];
  $("#send").disabled = false;
  $("#stop").disabled = true;
}

async function load() {
  try {
    model = (await (await ask("v1/models")).json()).data[0];
    $("#model").textContent = document.title = model.id;
    const routes = model.routes ? `, ${model.routes.layers.length} sparse layers of ${model.routes.heads} heads, top ${model.routes.top_k} of ${model.routes.experts} experts` : "";
    $("#about").textContent = `context ${model.max_model_len} tokens${routes}`;
  } catch (error) {
    $("#about").textContent = error.message;
  }
}

$("#ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("#text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); send(); }
});
$("#stop").addEventListener("click", () => running.forEach((controller) => controller.abort()));
$("#reset").addEventListener("click", () => columns.forEach((column) => column.clear()));
$("#compare").addEventListener("click", () => setColumns(columns.length === 1 ? 2 : 1));
$("#theme").addEventListener("click", () => {
  const dark = getComputedStyle(document.documentElement).colorScheme === "dark" || (!document.documentElement.dataset.theme && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "light" : "dark";
});
$("#key").addEventListener("change", load);
document.querySelectorAll("input[name=mode]").forEach((input) => input.addEventListener("change", setMode));
setColumns(1);
setMode();
await load();
document.documentElement.dataset.ready = "true";
