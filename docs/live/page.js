// What is seen of the model of gpt.js: the text, the next token, the cost and the attention.
"use strict";

const at = (id) => document.getElementById(`live-${id}`);
const SHOWN = 48; // tokens in a heat map
const BARS = 12;
const state = {
  model: null,
  ids: [], // of the whole text
  begin: 0, // the context begins at this one
  cache: null, // what the model has read of ids from `begin` on
  logits: null, // of the next token
  costs: [], // {multiplications, cached} of each token that was added
  layer: 0,
  head: 0,
  query: -1, // the token that looks; -1 is the last one
  writing: false,
};

// ---- The model's turn ----------------------------------------------------------------------------

function setText(text) {
  const { tokenizer, config } = state.model;
  const ids = text ? tokenizer.encode(text) : [tokenizer.start];
  const begin = Math.max(0, ids.length - config.block_size);
  if (begin !== state.begin) state.cache = null;
  if (state.cache) { // keep what was read of the tokens that are still the same, but for the last one
    const changed = ids.findIndex((id, i) => id !== state.ids[i]);
    const same = (changed < 0 ? ids.length : changed) - begin;
    cutCache(state.cache, Math.max(0, Math.min(same, ids.length - begin - 1, state.cache.length)));
  }
  Object.assign(state, { ids, begin, costs: [], query: -1 });
  think();
}

// Read what was not read yet, or everything without a cache.
function think() {
  const { model } = state, { block_size } = model.config, before = counter.multiplications;
  if (state.ids.length - state.begin > block_size) { // go on with the last half of the context
    state.begin = state.ids.length - Math.ceil(block_size / 2);
    state.cache = null;
  }
  if (!state.cache || !at("cached").checked) state.cache = makeCache(model.config);
  const unread = state.ids.slice(state.begin + state.cache.length);
  state.logits = logitsOf(model, read(model, unread, state.cache), unread.length - 1);
  return counter.multiplications - before;
}

function addToken(id) {
  if (state.model.tokenizer.ends.includes(id)) return false;
  state.ids.push(id);
  const multiplications = think();
  state.costs.push({ multiplications, cached: at("cached").checked });
  state.query = -1;
  at("text").value = decode(state.ids);
  at("text").scrollTop = at("text").scrollHeight;
  show();
  return true;
}

const chosen = () => probabilities(state.logits, Number(at("temperature").value));
const decode = (ids) => new TextDecoder().decode(Uint8Array.from(ids.flatMap(state.model.tokenizer.bytes)));

async function write() {
  state.writing = !state.writing;
  at("many").textContent = state.writing ? "Stop" : "Write";
  while (state.writing && addToken(draw(chosen(), Math.random()))) {
    await new Promise((resume) => setTimeout(resume, 30)); // let the browser draw and listen
  }
  state.writing = false;
  at("many").textContent = "Write";
}

// ---- What is shown -------------------------------------------------------------------------------

function show() {
  showBars();
  showCost();
  showHeads();
  showTokens();
}

// A token as one can see it: a space as an open box, a newline as an arrow.
function visible(id) {
  return decode([id]).replaceAll(" ", "␣").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "∅";
}

function element(kind, className, text = "") {
  const made = document.createElement(kind);
  made.className = className;
  made.textContent = text;
  return made;
}

function showBars() {
  const shares = chosen();
  const best = Array.from(shares.keys()).sort((a, b) => shares[b] - shares[a]).slice(0, BARS);
  at("bars").replaceChildren(...best.map((id) => {
    const row = element("button", "live-bar"), bar = element("span", "live-length");
    bar.style.width = `${100 * shares[id]}%`;
    row.dataset.id = id;
    row.dataset.share = shares[id];
    row.dataset.logit = state.logits[id];
    const track = element("span", "live-track");
    track.append(bar);
    row.append(element("code", "", visible(id)), track, `${(100 * shares[id]).toFixed(1)} %`);
    row.onclick = () => addToken(id);
    return row;
  }));
}

function showCost() {
  const { costs, ids, begin, model: { config } } = state, length = ids.length - begin;
  const total = costs.reduce((sum, cost) => sum + cost.multiplications, 0);
  at("cost").textContent = `${length} of at most ${config.block_size} tokens are in the context. `
    + `Reading one more takes ${inWords(costOf(config, 1, length - 1))} multiplications with the KV `
    + `cache, and ${inWords(costOf(config, length, 0))} without it. `
    + (costs.length ? `Adding ${costs.length} took ${inWords(total)}.` : "None was added yet.");
  const canvas = at("chart"), pen = canvas.getContext("2d"), drawn = costs.slice(-120);
  const most = Math.max(1, ...drawn.map((cost) => cost.multiplications));
  at("most").textContent = drawn.length ? `The highest bar stands for ${inWords(most)}.` : "";
  pen.clearRect(0, 0, canvas.width, canvas.height);
  drawn.forEach(({ multiplications, cached }, i) => {
    const height = Math.max(1, (canvas.height * multiplications) / most);
    pen.fillStyle = cached ? "#3b6fb6" : "#e08a1e";
    pen.fillRect(canvas.width - 6 * (drawn.length - i), canvas.height - height, 5, height);
  });
}

function inWords(count) {
  if (count >= 1e9) return `${(count / 1e9).toFixed(1)} billion`;
  return count >= 1e6 ? `${(count / 1e6).toFixed(1)} million` : count.toLocaleString("en");
}

const shade = (weight) => `rgb(25 60 120 / ${Math.sqrt(weight)})`;

function showHeads() {
  const { n_head } = state.model.config;
  at("heads").style.gridTemplateColumns = `repeat(${n_head}, minmax(0, 7rem))`;
  at("heads").replaceChildren(...state.cache.layers.flatMap((layer, i) =>
    layer.weights.map((rows, h) => {
      const button = element("button", i === state.layer && h === state.head ? "live-on" : "");
      button.append(heatMap(rows), `layer ${i + 1}, head ${h + 1}`);
      button.onclick = () => { Object.assign(state, { layer: i, head: h }); showHeads(); showTokens(); };
      return button;
    })));
}

function heatMap(rows) {
  const first = Math.max(0, rows.length - SHOWN), size = rows.length - first;
  const canvas = element("canvas", "live-map");
  Object.assign(canvas, { width: size, height: size });
  const pen = canvas.getContext("2d");
  for (let t = first; t < rows.length; t++) {
    for (let s = first; s <= t; s++) {
      pen.fillStyle = shade(rows[t][s]);
      pen.fillRect(s - first, t - first, 1, 1);
    }
  }
  return canvas;
}

function showTokens() {
  const { begin, layer, head } = state, rows = state.cache.layers[layer].weights[head];
  const query = state.query < 0 || state.query >= rows.length ? rows.length - 1 : state.query;
  at("head-name").textContent = `Layer ${layer + 1}, head ${head + 1}`;
  at("tokens").replaceChildren(...rows.map((_, t) => {
    const weight = rows[query][t] ?? 0;
    const chip = element("button", t === query ? "live-token live-on" : "live-token");
    chip.append(visible(state.ids[begin + t]));
    chip.append(element("small", "", t <= query ? String(Math.round(100 * weight)) : ""));
    chip.style.background = shade(weight);
    chip.style.color = weight > 0.25 ? "#fff" : "";
    chip.onclick = () => { state.query = t; showTokens(); };
    return chip;
  }));
}

// ---- The page ------------------------------------------------------------------------------------

function start(buffer, name) {
  state.writing = false;
  state.model = readModel(buffer);
  const { n_layer, n_head, n_embd, vocab_size, block_size } = state.model.config;
  const count = Object.values(state.model.params).reduce((sum, array) => sum + array.length, 0);
  say(`${name}: ${inWords(count)} parameters, ${n_layer} layers of ${n_head} heads, width ${n_embd}, `
    + `context ${block_size}, ${vocab_size.toLocaleString("en")} tokens.`);
  for (const id of ["text", "one", "many"]) at(id).disabled = false;
  Object.assign(state, { cache: null, layer: 0, head: 0 });
  typed();
}

function say(text, wrong = false) {
  at("status").textContent = text;
  at("status").className = wrong ? "live-wrong" : "";
}

function typed() {
  state.writing = false;
  try {
    setText(at("text").value);
    at("text").setCustomValidity("");
    show();
  } catch (error) { // a character that the tokenizer does not know
    at("text").setCustomValidity(error.message);
    at("text").reportValidity();
  }
}

at("text").value = "It was a dark night, and the old man looked at the door. He";
at("text").oninput = typed;
at("one").onclick = () => addToken(draw(chosen(), Math.random()));
at("many").onclick = write;
at("temperature").oninput = () => {
  at("degrees").textContent = Number(at("temperature").value).toFixed(1);
  if (state.model) showBars();
};
at("file").onchange = async () => {
  const [file] = at("file").files;
  try {
    start(await file.arrayBuffer(), file.name);
  } catch (error) {
    say(`${file.name} is no model that export.py wrote: ${error.message}`, true);
  }
};

fetch("model.bin")
  .then((answer) => {
    if (!answer.ok) throw new Error(`status ${answer.status}`);
    return answer.arrayBuffer();
  })
  .then((buffer) => start(buffer, "model.bin"))
  .catch((error) => say(`The model is not loaded yet (${error.message}). Choose a model file at the `
    + "end of this page; where there is none, the command there writes one.", true));
