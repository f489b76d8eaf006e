"use strict";
// What is shown of a feature is unpacked when it is opened; only the list's columns are unpacked at the beginning.
(async () => {
const byId = (id) => document.getElementById(id);
const facts = JSON.parse(byId("facts").textContent);
const ROW = 56, SPARE = 8;

// -- data ------------------------------------------------------------------------------------------------------------
const unpacked = new Map();
function unpack(id) {
  if (!unpacked.has(id)) unpacked.set(id, inflate(byId(id).textContent));
  return unpacked.get(id);
}
async function inflate(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return JSON.parse(await new Response(stream).text());
}
const blocks = new Map();  // the last few that were opened
async function featureData(feature) {
  const number = Math.floor(feature / facts.block);
  const block = blocks.get(number) ?? inflate(byId(`block-${number}`).textContent);
  blocks.delete(number);
  blocks.set(number, block);
  if (blocks.size > 16) blocks.delete(blocks.keys().next().value);
  return (await block)[feature % facts.block];
}

// -- small things ----------------------------------------------------------------------------------------------------
function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") element.className = value; else if (value !== null) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}
const count = (number) => number.toLocaleString("en");
const figure = (number) => (Math.abs(number) >= 100 ? number.toFixed(0) : Number(number.toPrecision(3)).toString());
const share = (number) => {
  const percent = 100 * number;
  return percent === 0 ? "never" : percent >= 10 ? `${percent.toFixed(0)}%` : percent >= 0.01 ? `${Number(percent.toPrecision(2))}%` : "<0.01%";
};
const visible = (piece) => piece.replace(/\n/g, "↵").replace(/\t/g, "⇥");
function chart(heights, titles, label) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  svg.setAttribute("viewBox", `0 0 ${heights.length} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("role", "img");
  svg.setAttribute("aria-label", label);
  const most = Math.max(...heights.map((height) => Math.log1p(height)), 1e-9);
  heights.forEach((height, at) => {
    const size = height ? Math.max(2, (100 * Math.log1p(height)) / most) : 0;
    for (const [kind, y, tall] of [["bar", 100 - size, size], ["hit", 0, 100]]) {
      const bar = document.createElementNS(space, "rect");
      for (const [key, value] of Object.entries({ class: kind, x: at + 0.06, y, width: 0.88, height: tall })) bar.setAttribute(key, value);
      if (kind === "hit") {
        const title = document.createElementNS(space, "title");
        title.textContent = titles[at];
        bar.append(title);
      }
      svg.append(bar);
    }
  });
  return svg;
}

// -- the list --------------------------------------------------------------------------------------------------------
let index, words, lower;
try {
  [index, words] = await Promise.all([unpack("data-index"), unpack("data-words")]);
} catch (error) {
  byId("trouble").hidden = false;
  byId("trouble").textContent = `The features cannot be unpacked (${error.message}). The file is damaged, or the browser is older than 2023.`;
  throw error;
}
lower = words.map((word) => word.toLowerCase());
const total = facts.features;
const list = byId("list"), rows = byId("rows"), query = byId("query"), kind = byId("kind"), order = byId("order");
const tokensOf = (feature) => {
  const found = [];
  for (let at = 0; at < index.tokens[feature].length; at += 2) found.push([index.tokens[feature][at], index.tokens[feature][at + 1]]);
  return found;
};
const label = (feature) => index.explained[feature]
  ?? (index.count[feature] ? tokensOf(feature).slice(0, 4).map(([word]) => visible(words[word]).trim() || "␣").join(" · ") : "never active");
let shown = [], chosen = -1;

function admitted(feature) {
  switch (kind.value) {
    case "active": return index.count[feature] > 0;
    case "explained": return feature in index.explained;
    case "steered": return steered.has(feature);
    default: return true;
  }
}
const steered = new Set(index.steered);

function matches(text) {
  const scores = new Map();
  if (/^#?\d+$/.test(text) && Number(text.replace("#", "")) < total) scores.set(Number(text.replace("#", "")), 1e6);
  const exact = text.trim();
  // a token that is the word scores by its share of the activation; one that contains it a tenth of that
  const weight = lower.map((word) => (word.trim() === exact ? 1 : exact && word.includes(exact) ? 0.1 : 0));
  for (let feature = 0; feature < total; feature++) {
    let score = 0;
    const pairs = index.tokens[feature];
    for (let at = 0; at < pairs.length; at += 2) score += weight[pairs[at]] * (1 + pairs[at + 1]);
    const explained = index.explained[feature];
    if (explained && explained.toLowerCase().includes(exact)) score += 200;
    if (score) scores.set(feature, (scores.get(feature) ?? 0) + score);
  }
  return scores;
}

function search() {
  const text = query.value.toLowerCase();
  const scores = text.trim() ? matches(text.trim()) : null;
  const candidates = scores ? [...scores.keys()].filter((feature) => admitted(feature) || scores.get(feature) >= 1e6) : Array.from({ length: total }, (_, feature) => feature).filter(admitted);
  const focus = (feature) => tokensOf(feature).reduce((sum, [, part]) => sum + part * part, 0);
  const keys = {
    best: (feature) => (scores ? -scores.get(feature) : feature),
    number: (feature) => feature,
    often: (feature) => -index.count[feature],
    seldom: (feature) => index.count[feature],
    focus: (feature) => -focus(feature),
    score: (feature) => -(index.score[feature] ?? -1),
  };
  const key = new Map(candidates.map((feature) => [feature, keys[order.value](feature)]));
  shown = candidates.sort((a, b) => key.get(a) - key.get(b) || a - b);
  byId("found").textContent = shown.length
    ? `${count(shown.length)} ${shown.length === 1 ? "feature" : "features"}${text.trim() ? " found" : ""}`
    : `No feature found for “${query.value.trim()}”. Tokens are looked up in what features fire on most.`;
  rows.style.height = `${shown.length * ROW}px`;
  list.scrollTop = 0;
  list.dataset.searched = query.value;
  draw();
}

function draw() {
  const first = Math.max(0, Math.floor(list.scrollTop / ROW) - SPARE);
  const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + SPARE);
  rows.replaceChildren(...shown.slice(first, last).map((feature, at) => row(feature, first + at)));
  const active = byId(`row-${chosen}`);
  if (active) list.setAttribute("aria-activedescendant", active.id); else list.removeAttribute("aria-activedescendant");
}

function row(feature, at) {
  const element = make("div", {
    class: "row", role: "option", id: `row-${feature}`, "aria-selected": String(feature === chosen),
    "aria-posinset": at + 1, "aria-setsize": shown.length,
  }, make("span", { class: "often" }, share(index.count[feature] / facts.tokens)), make("b", {}, `#${feature}`));
  element.append(make("span", { class: feature in index.explained ? "what said" : "what" }, label(feature)));
  element.style.top = `${at * ROW}px`;
  element.dataset.feature = feature;
  return element;
}

function reveal(feature) {
  const at = shown.indexOf(feature);
  if (at < 0) return;
  if (at * ROW < list.scrollTop) list.scrollTop = at * ROW;
  else if ((at + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (at + 1) * ROW - list.clientHeight;
}

// -- one feature -----------------------------------------------------------------------------------------------------
let text;
async function open(feature, { quiet = false } = {}) {
  chosen = feature;
  reveal(feature);
  draw();
  if (location.hash !== `#f${feature}`) history.replaceState(null, "", `#f${feature}`);
  const [data, pieces, explanations, steering] = await Promise.all([
    featureData(feature), unpack("data-text"), unpack("data-explanations"), unpack("data-steering"),
  ]);
  if (chosen !== feature) return;  // another was opened meanwhile
  text = pieces;
  byId("detail").replaceChildren(...described(feature, data, explanations[feature], steering[feature]));
  byId("detail").setAttribute("aria-label", `Feature ${feature}: ${label(feature)}`);
  if (!quiet && getComputedStyle(document.querySelector(".to-list")).display !== "none") {
    byId("detail").scrollIntoView({ block: "start" });
    byId("detail").focus({ preventScroll: true });
  }
}

function described(feature, data, explanation, steering) {
  const parts = [make("h3", {}, `Feature ${feature}`), make("a", { class: "to-list", href: "#explorer" }, "Back to the list")];
  parts.push(...explained(explanation));
  const times = index.count[feature];
  parts.push(make("p", { class: "caption" }, times
    ? `Active on ${count(times)} of ${count(facts.tokens)} tokens (${share(times / facts.tokens)}); ${figure(data.mean)} in the mean where it is active, ${figure(index.maximum[feature])} at most.`
    : `Not active on any of ${count(facts.tokens)} tokens.`));
  if (times) parts.push(...activations(feature, data), ...contexts(data));
  if (data.promoted) parts.push(...logits(data));
  if (data.direction) parts.push(...neighbours(data));
  parts.push(...steer(feature, steering));
  return parts;
}

function explained(explanation) {
  if (!explanation) return [make("p", { class: "caption" }, "Not explained yet.")];
  const scores = make("ul", { class: "scores" });
  for (const score of explanation.scores) {
    const value = score.value === null ? "no answer" : score.value.toFixed(2);
    const interval = score.low === null ? "" : ` [${score.low.toFixed(2)}, ${score.high.toFixed(2)}]`;
    const abstained = score.abstained ? `, ${score.abstained} abstained` : "";
    scores.append(make("li", {}, `${score.scorer} `, make("b", {}, value), make("span", { class: "unit" }, `${interval} ${score.metric}, ${score.count} windows${abstained}`)));
  }
  return [make("p", { class: "said" }, explanation.text), scores, ...(facts.explainer ? [make("p", { class: "caption" }, `Explained by ${facts.explainer}.`)] : [])];
}

function activations(feature, data) {
  const most = index.maximum[feature], bins = data.histogram.length;
  const titles = data.histogram.map((height, at) => `${figure((most * at) / bins)} to ${figure((most * (at + 1)) / bins)}: ${count(height)} tokens`);
  const box = make("div", { class: "chart" }, chart(data.histogram, titles, `Histogram of activations from 0 to ${figure(most)}: ${titles.join("; ")}`));
  const tokens = make("p", {});
  tokensOf(feature).forEach(([word, part]) => tokens.append(make("span", { class: "piece" }, visible(words[word])), ` ${part}%  `));
  return [
    make("h4", {}, "How strongly it fires", make("span", { class: "unit" }, "heights are logarithmic")), box,
    make("p", { class: "scale-ends" }, make("span", {}, "0"), make("span", {}, figure(most))),
    make("h4", {}, "On which tokens", make("span", { class: "unit" }, "share of all its activation")), tokens,
  ];
}

function contexts(data) {
  const parts = [];
  for (const [title, note, items] of [["Strongest", "", data.strongest], ["From the rest of its range", "weaker and weaker", data.weaker]]) {
    if (!items.length) continue;
    parts.push(make("h4", {}, title, make("span", { class: "unit" }, note)), make("ul", { class: "contexts" }, ...items.map(context)));
  }
  return parts;
}

function context([first, length, centre, document_, position, active]) {
  const levels = new Map();
  for (let at = 0; at < active.length; at += 2) levels.set(active[at], active[at + 1]);
  const most = index.maximum[chosen];
  const line = make("p", {}, ...(position > centre ? [make("span", { class: "break" }, "… ")] : []));
  for (let at = 0; at < length; at++) {
    const piece = words[text[first + at]];
    const level = levels.get(at);
    if (!level && at !== centre) { line.append(piece.replace(/\n+/g, " ↵ ")); continue; }
    const value = (most * (level ?? 0)) / facts.levels;
    const mark = make("span", { class: at === centre ? "t c" : "t", title: `${figure(value)}`, style: `--a:${((level ?? 0) / facts.levels).toFixed(2)}` }, piece.replace(/\n+/g, " ↵ "));
    if (at === centre) mark.append(make("span", { class: "hidden" }, ` (active: ${figure(value)})`));
    line.append(mark);
  }
  line.append(make("span", { class: "break" }, " …"));
  return make("li", {}, make("span", { class: "where" }, `${figure((most * (levels.get(centre) ?? 0)) / facts.levels)} · document ${document_}, token ${position}`), line);
}

function bars(pairs, down) {
  const most = Math.max(...pairs.map(([, value]) => Math.abs(value)), 1e-9);
  return make("ul", { class: down ? "lines down" : "lines" }, ...pairs.map(([word, value]) => make("li", {},
    make("span", {}, make("span", { class: "piece" }, visible(words[word]))),
    make("span", { class: "n" }, (value > 0 ? "+" : "−") + figure(Math.abs(value))),
    make("span", { class: "bar", "aria-hidden": "true", style: `width:${(100 * Math.abs(value)) / most}%` }))));
}
function logits(data) {
  return [make("h4", {}, "What it does to the next token", make("span", { class: "unit" }, "logits on the direct path")), make("div", { class: "two" },
    make("section", { "aria-label": "promoted" }, make("p", { class: "caption" }, "promotes"), bars(data.promoted, false)),
    make("section", { "aria-label": "suppressed" }, make("p", { class: "caption" }, "suppresses"), bars(data.suppressed, true)))];
}

function neighbours(data) {
  const side = (title, pairs) => make("section", { "aria-label": title }, make("p", { class: "caption" }, title),
    make("ul", { class: "lines" }, ...pairs.map(([other, value]) => make("li", {},
      make("span", { class: "near" }, make("a", { href: `#f${other}` }, `#${other}`), ` ${label(other)}`), make("span", { class: "n" }, value.toFixed(2))))));
  return [make("h4", {}, "Neighbours"), make("div", { class: "two" }, side("by direction (cosine)", data.direction), side("by company (Jaccard)", data.together))];
}

function steer(feature, texts) {
  const parts = [make("h4", {}, "Steering")];
  if (!texts) {
    if (!facts.more) return [];
    return [...parts, make("p", { class: "caption" }, "Not steered on this page. This adds it, from what is kept:"), make("pre", {}, make("code", {}, facts.more.replace("{feature}", feature)))];
  }
  for (const [prompt, plain, ...changed] of texts) {
    const side = (who, words_, kind_) => make("div", { class: `text ${kind_}` }, make("p", { class: "who" }, who), make("p", {}, words_));
    parts.push(make("p", { class: "prompt" }, prompt), make("div", { class: "steer" }, side("as it is", plain, "dense"),
      ...changed.map((words_, at) => side(`with ${figure(facts.strengths[at])} × its strongest activation`, words_, "sparse"))));
  }
  return parts;
}

// -- the page --------------------------------------------------------------------------------------------------------
const sharesAt = (feature) => Math.floor(10 * Math.log10(index.count[feature] / facts.tokens));
function density() {
  const alive = Array.from({ length: total }, (_, feature) => feature).filter((feature) => index.count[feature]);
  if (!alive.length) return;
  const lowest = Math.min(...alive.map(sharesAt).slice(0, 60000)), heights = new Array(-lowest + 1).fill(0);
  for (const feature of alive) heights[sharesAt(feature) - lowest]++;
  const titles = heights.map((height, at) => `${share(10 ** ((lowest + at) / 10))} to ${share(10 ** ((lowest + at + 1) / 10))} of tokens: ${count(height)} features`);
  byId("density").append(chart(heights, titles, `Histogram of how often features fire: ${titles.join("; ")}`));
  byId("density").after(make("p", { class: "scale-ends" }, make("span", {}, share(10 ** (lowest / 10))), make("span", {}, "every token")));
}

let waiting;
const later = () => { clearTimeout(waiting); waiting = setTimeout(search, 120); };
query.addEventListener("input", later);
for (const select of [kind, order]) select.addEventListener("change", search);
byId("form").addEventListener("submit", (event) => { event.preventDefault(); clearTimeout(waiting); search(); if (shown.length) open(shown[0]); });
let frame = 0;
list.addEventListener("scroll", () => { frame ||= requestAnimationFrame(() => { frame = 0; draw(); }); });
list.addEventListener("click", (event) => {
  const hit = event.target.closest(".row");
  if (hit) open(Number(hit.dataset.feature));
});
list.addEventListener("keydown", (event) => {
  const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
  const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity };
  if (event.key === "Enter") { byId("detail").focus(); event.preventDefault(); return; }
  if (!(event.key in steps) || !shown.length) return;
  event.preventDefault();
  const now = shown.indexOf(chosen);
  const next = now < 0 ? 0 : Math.min(shown.length - 1, Math.max(0, now + steps[event.key]));
  open(shown[next], { quiet: true });
});
document.addEventListener("keydown", (event) => {
  if (event.key === "/" && !event.target.closest("input, select, textarea")) { event.preventDefault(); query.focus(); }
});
byId("detail").addEventListener("click", (event) => {
  const mark = event.target.closest(".t");
  if (!mark) return;
  const where = mark.closest("li").querySelector(".where");
  where.querySelector(".touched")?.remove();
  where.append(make("span", { class: "touched" }, ` · touched: ${mark.title}`));
});
const addressed = () => {
  const found = /^#f(\d+)$/.exec(location.hash);
  return found && Number(found[1]) < total ? Number(found[1]) : null;
};
addEventListener("hashchange", () => { const feature = addressed(); if (feature !== null) open(feature); });
addEventListener("resize", draw);

density();
search();
const first = addressed() ?? index.steered[0] ?? shown[0];
if (first !== undefined) await open(first, { quiet: addressed() === null });
document.documentElement.dataset.ready = "yes";
})();
