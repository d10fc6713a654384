// GPT-2 and its tokenizers in plain JavaScript, one text at a time: the same numbers as gptjax.
//
// Arrays are flat Float32Arrays, row behind row; their names end in their shape:
// T new tokens, S tokens in all, D width, H heads, K head width, F = 4D, V vocabulary.
"use strict";

const EPSILON = 1e-5; // of LayerNorm
const counter = { multiplications: 0 }; // in matrix products and in attention

// ---- The file that export.py writes --------------------------------------------------------------

// Return {config, tokenizer, params}: a JSON header, then arrays of bfloat16.
function readModel(buffer) {
  const size = new DataView(buffer).getUint32(0, true);
  let text = "";
  for (const byte of new Uint8Array(buffer, 4, size)) text += String.fromCharCode(byte);
  const { config, tokenizer, arrays } = JSON.parse(text);
  const params = {};
  let offset = 4 + size;
  for (const { name, shape } of arrays) {
    const length = shape.reduce((a, b) => a * b, 1);
    params[name] = widen(new Uint16Array(buffer, offset, length));
    offset += 2 * length;
  }
  return { config, tokenizer: makeTokenizer(tokenizer), params };
}

// bfloat16 is the upper half of float32.
function widen(halves) {
  const words = new Uint32Array(halves.length);
  for (let i = 0; i < halves.length; i++) words[i] = halves[i] << 16;
  return new Float32Array(words.buffer);
}

// ---- The parts of the model ----------------------------------------------------------------------

function linear(x, n_in, kernel, bias) {
  const rows = x.length / n_in, n_out = kernel.length / n_in;
  const y = new Float32Array(rows * n_out);
  for (let r = 0; r < rows; r++) {
    const y_O = y.subarray(r * n_out, (r + 1) * n_out);
    if (bias) y_O.set(bias);
    let i = 0;
    for (; i + 4 <= n_in; i += 4) { // four rows of the kernel at once: 1.6 times as fast
      const [a, b, c, d] = x.subarray(r * n_in + i, r * n_in + i + 4);
      const at = i * n_out, bt = at + n_out, ct = bt + n_out, dt = ct + n_out;
      for (let o = 0; o < n_out; o++) {
        y_O[o] += a * kernel[at + o] + b * kernel[bt + o] + c * kernel[ct + o] + d * kernel[dt + o];
      }
    }
    for (; i < n_in; i++) {
      const a = x[r * n_in + i], at = i * n_out;
      for (let o = 0; o < n_out; o++) y_O[o] += a * kernel[at + o];
    }
  }
  counter.multiplications += rows * n_in * n_out;
  return y;
}

function layerNorm(x, D, scale, bias) {
  const y = new Float32Array(x.length);
  for (let at = 0; at < x.length; at += D) {
    let mean = 0, variance = 0;
    for (let d = 0; d < D; d++) mean += x[at + d] / D;
    for (let d = 0; d < D; d++) variance += (x[at + d] - mean) ** 2 / D;
    const factor = 1 / Math.sqrt(variance + EPSILON);
    for (let d = 0; d < D; d++) {
      y[at + d] = (x[at + d] - mean) * factor * scale[d] + (bias ? bias[d] : 0);
    }
  }
  return y;
}

const ACTIVATIONS = {
  gelu_tanh: (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3))),
  gelu: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)),
};

// Abramowitz and Stegun 7.1.26, which is off by 1.5e-7 at most.
function erf(x) {
  const t = 1 / (1 + 0.3275911 * Math.abs(x));
  const factors = [1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592];
  const sum = factors.reduce((total, factor) => total * t + factor, 0) * t;
  return Math.sign(x) * (1 - sum * Math.exp(-x * x));
}

function softmax(scores) {
  const largest = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const weights = scores.map((score) => Math.exp(score - largest));
  const total = weights.reduce((a, b) => a + b, 0);
  return weights.map((weight) => weight / total);
}

// ---- The model -----------------------------------------------------------------------------------

// Keys and values of the tokens read so far, and the weights with which each token attended to them.
function makeCache({ n_layer, n_head, n_embd, block_size }) {
  const layers = Array.from({ length: n_layer }, () => ({
    k_SD: new Float32Array(block_size * n_embd),
    v_SD: new Float32Array(block_size * n_embd),
    weights: Array.from({ length: n_head }, () => []), // [head][token] is a row of weights
  }));
  return { length: 0, layers };
}

// Forget all tokens but the first ones.
function cutCache(cache, length) {
  for (const layer of cache.layers) layer.weights = layer.weights.map((rows) => rows.slice(0, length));
  cache.length = length;
}

function attend(config, qkv, T, layer, length) {
  const { n_head, n_embd: D } = config, K = D / n_head;
  const y_TD = new Float32Array(T * D);
  for (let t = 0; t < T; t++) {
    const q = qkv.subarray(t * 3 * D, t * 3 * D + D), S = length + t + 1;
    layer.k_SD.set(qkv.subarray(t * 3 * D + D, t * 3 * D + 2 * D), (S - 1) * D);
    layer.v_SD.set(qkv.subarray(t * 3 * D + 2 * D, t * 3 * D + 3 * D), (S - 1) * D);
    for (let h = 0; h < n_head; h++) {
      const scores_S = new Float32Array(S);
      for (let s = 0; s < S; s++) {
        for (let i = h * K; i < h * K + K; i++) scores_S[s] += q[i] * layer.k_SD[s * D + i];
        scores_S[s] /= Math.sqrt(K);
      }
      const weights_S = softmax(scores_S);
      for (let s = 0; s < S; s++) {
        for (let i = h * K; i < h * K + K; i++) y_TD[t * D + i] += weights_S[s] * layer.v_SD[s * D + i];
      }
      layer.weights[h].push(weights_S);
    }
    counter.multiplications += 2 * S * D;
  }
  return y_TD;
}

// Read tokens behind those of the cache, which gets longer; return their hidden states (T, D).
function read(model, ids, cache) {
  const { config, params } = model, { n_embd: D, block_size } = config, T = ids.length;
  if (cache.length + T > block_size) throw new Error(`the context holds ${block_size} tokens`);
  const x_TD = new Float32Array(T * D);
  for (let t = 0; t < T; t++) {
    const token = ids[t] * D, position = (cache.length + t) * D;
    for (let d = 0; d < D; d++) {
      x_TD[t * D + d] = params["wte.embedding"][token + d] + params["wpe.embedding"][position + d];
    }
  }
  const norm = (x, name) => layerNorm(x, D, params[`${name}.scale`], params[`${name}.bias`]);
  const apply = (x, n_in, name) => linear(x, n_in, params[`${name}.kernel`], params[`${name}.bias`]);
  const add = (y_TD) => y_TD.forEach((y, i) => { x_TD[i] += y; });
  cache.layers.forEach((layer, i) => {
    const qkv = apply(norm(x_TD, `h.${i}.ln_1`), D, `h.${i}.attn.c_attn`);
    add(apply(attend(config, qkv, T, layer, cache.length), D, `h.${i}.attn.c_proj`));
    const x_TF = apply(norm(x_TD, `h.${i}.ln_2`), D, `h.${i}.mlp.c_fc`);
    add(apply(x_TF.map(ACTIVATIONS[config.activation]), 4 * D, `h.${i}.mlp.c_proj`));
  });
  cache.length += T;
  return norm(x_TD, "ln_f");
}

// Return the logits (V) of the token behind row t of hidden states.
function logitsOf(model, x_TD, t) {
  const { n_embd: D, vocab_size: V, tie_head } = model.config;
  const head_VD = model.params[tie_head ? "wte.embedding" : "lm_head.embedding"];
  const logits_V = new Float32Array(V);
  for (let v = 0; v < V; v++) {
    let sum = 0;
    for (let d = 0; d < D; d++) sum += x_TD[t * D + d] * head_VD[v * D + d];
    logits_V[v] = sum;
  }
  counter.multiplications += V * D;
  return logits_V;
}

// Return how many multiplications `read` needs for T tokens behind S others, and `logitsOf` once.
function costOf({ n_layer, n_embd: D, vocab_size: V }, T, S) {
  const linears = 12 * D * D * T, attention = D * T * (2 * S + T + 1);
  return n_layer * (linears + attention) + V * D;
}

// Return the probability of each token; at temperature 0 the likeliest one has all of it.
function probabilities(logits_V, temperature) {
  if (temperature > 0) return softmax(logits_V.map((logit) => logit / temperature));
  const best = logits_V.indexOf(logits_V.reduce((a, b) => Math.max(a, b), -Infinity));
  return logits_V.map((_, v) => (v === best ? 1 : 0));
}

// Return the token at which the running sum of the probabilities passes `uniform`, a number in [0, 1).
function draw(probabilities_V, uniform) {
  let sum = 0, last = 0;
  for (let v = 0; v < probabilities_V.length; v++) {
    if (probabilities_V[v] > 0) last = v;
    sum += probabilities_V[v];
    if (uniform < sum) return v;
  }
  return last; // rounding left the sum a little below 1
}

// ---- Tokenizers ----------------------------------------------------------------------------------

// Return {encode(text) -> ids, bytes(id), start, ends}; text that cannot be encoded throws an Error.
function makeTokenizer(fields) {
  return { ...TOKENIZERS[fields.kind](fields), start: fields.start, ends: fields.ends };
}

const TOKENIZERS = {
  char: ({ chars }) => {
    const characters = [...chars], idOf = new Map(characters.map((char, id) => [char, id]));
    const encode = (text) => [...text].map((char) => {
      if (!idOf.has(char)) throw new Error(`this model does not know the character "${char}"`);
      return idOf.get(char);
    });
    return { encode, bytes: (id) => utf8(characters[id] ?? "") };
  },
  byte: () => ({ encode: utf8, bytes: (id) => [id] }),
  bpe: ({ tokens, merges, special }) => {
    const idOf = new Map(tokens.map((token, id) => [token, id]));
    const rankOf = new Map(merges.map((pair, rank) => [pair, rank]));
    const letters = byteLetters(), byteOf = new Map(letters.map((letter, byte) => [letter, byte]));
    const encodeWord = (word) => {
      const parts = mergeAll(utf8(word).map((byte) => letters[byte]), rankOf);
      return parts.map((part) => idOf.get(part));
    };
    const encode = (text) => (text.match(WORDS) ?? []).flatMap(encodeWord);
    const bytes = (id) => special.includes(id) ? utf8(tokens[id])
      : [...(tokens[id] ?? "")].map((letter) => byteOf.get(letter));
    return { encode, bytes };
  },
};

// GPT-2's: contractions, then runs of letters, digits, other signs, and white space.
const WORDS = new RegExp(
  "'(?:[sdmt]|ll|ve|re)| ?\\p{L}+| ?\\p{N}+| ?[^\\p{White_Space}\\p{L}\\p{N}]+"
    + "|\\p{White_Space}+(?!\\P{White_Space})|\\p{White_Space}+", "gu");

// Join the two neighbours that were merged first in training, until no neighbours were merged.
function mergeAll(parts, rankOf) {
  for (;;) {
    let best = Infinity, at = -1;
    for (let i = 0; i + 1 < parts.length; i++) {
      const rank = rankOf.get(`${parts[i]} ${parts[i + 1]}`);
      if (rank < best) [best, at] = [rank, i];
    }
    if (at < 0) return parts;
    parts.splice(at, 2, parts[at] + parts[at + 1]);
  }
}

// Return the printable letter that stands for each byte in GPT-2's vocabulary files.
function byteLetters() {
  const prints = (b) => (b > 32 && b < 127) || (b > 160 && b !== 173);
  let others = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(prints(b) ? b : others++));
}

function utf8(text) {
  const bytes = [];
  for (const char of text) {
    const code = char.codePointAt(0);
    const size = code < 0x80 ? 1 : code < 0x800 ? 2 : code < 0x10000 ? 3 : 4;
    const first = [0, 0, 0xc0, 0xe0, 0xf0][size];
    bytes.push(first | (code >> (6 * (size - 1))));
    for (let i = size - 2; i >= 0; i--) bytes.push(0x80 | ((code >> (6 * i)) & 0x3f));
  }
  return bytes;
}
