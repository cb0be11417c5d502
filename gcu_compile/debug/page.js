"use strict";
// The page of a dump. Everything shown comes from the JSON in #data and is set as text, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const views = { Overview: overview, Card: (...args) => card(...args), Fusion: fusion, Steps: steps, Code: code, Time: time };
// A graph that was compiled for a card that is not here has no steps and no calls; the others have no card.
const shownViews = () => Object.keys(views).filter((name) => (graph() && graph().card ? name !== "Steps" : name !== "Card"));
const state = { graph: 0, view: "Overview", stage: 0, call: 0, layer: "", at: -1, hits: [] };
const $ = (id) => document.getElementById(id);

function el(tag, options = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(options)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value);
  }
  made.append(...children.flat(Infinity).filter((child) => child != null));
  return made;
}

const seconds = (value) => (value >= 1 ? `${value.toFixed(2)} s` : `${(value * 1e3).toFixed(1)} ms`);
const graph = () => data.graphs[state.graph];
// What a place counts as: fused by us, left to Inductor's fusion, or the status.
const kind = (match) => (match.status === "fused" && match.by === "inductor" ? "inductor" : match.status);
// model.layers.3.self_attn -> model.layers.3
const layerOf = (path) => (path.match(/^(.*?\.\d+)(?:\.|$)/) || [0, path || "(outside any layer)"])[1];
// Layers 2, 10 in this order.
const byLayer = new Intl.Collator("en", { numeric: true }).compare;

function table(heads, rows, options = {}) {
  const numeric = (cell) => typeof cell === "number" || (typeof cell === "string" && /^[\d.]+ (m?s|%)$/.test(cell));
  const cells = (row) => row.map((cell) => el("td", { class: numeric(cell) && "number" },
    cell instanceof Node ? cell : String(cell)));
  const head = heads.map((text, column) => el("th", { class: rows.length && numeric(rows[0][column]) && "number" }, text));
  return el("table", options, el("thead", {}, el("tr", {}, head)),
    el("tbody", {}, rows.map((row) => el("tr", row.attributes || {}, cells(row)))));
}

// Lines in chunks that the browser lays out only when they come into sight: thousands cost nothing.
function lines(items) {
  const box = el("div", { class: "lines", tabindex: 0 });
  for (let start = 0; start < items.length; start += 150) {
    const chunk = el("div", { class: "chunk", style: `contain-intrinsic-height: auto ${150 * 19}px` });
    for (const [number, text, kind] of items.slice(start, start + 150)) {
      const cut = text.lastIndexOf("    # ");
      const tail = cut < 0 ? [] : [el("span", { class: "where" }, text.slice(cut))];
      chunk.append(el("div", { class: `line ${kind || ""}`, "data-n": number }, cut < 0 ? text : text.slice(0, cut), tail));
    }
    box.append(chunk);
  }
  return box;
}

function overview() {
  const shown = graph(), first = shown.stages[0], last = shown.stages.at(-1);
  const count = (wanted) => shown.matches.filter((match) => kind(match) === wanted).length;
  const nodes = (stage) => Object.values(stage.ops).reduce((sum, n) => sum + n, 0);
  const lowered = shown.stages.filter((stage) => Object.keys(stage.ops).length);
  const tile = (value, text, style) => el("div", { class: "card" }, el("b", { class: style }, String(value)), text);
  const rules = new Map();
  for (const match of shown.matches) {
    const key = [match.rule, kind(match), match.reason].join("\n");
    if (!rules.has(key)) rules.set(key, { match, places: 0 });
    rules.get(key).places += 1;
  }
  return [
    el("div", { class: "cards" },
      tile(count("fused"), "places fused", "fused"), tile(count("inductor"), "left to Inductor to fuse", "inductor"),
      tile(count("near_miss"), "near misses", "near_miss"),
      first && lowered.length ? tile(`${nodes(first)} → ${nodes(lowered.at(-1))}`, "operations") : null,
      shown.calls.length ? tile(shown.calls.length, "kernel calls") : null, tile(seconds(shown.timing.parts.total || 0), "to compile")),
    shown.inference ? null : el("p", { class: "near_miss" }, "This graph needs gradients; the rules are for inference and did not run."),
    el("h2", {}, "Rules"),
    rules.size ? table(["rule", "status", "places", "reason", "first at"], [...rules.values()].map(({ match, places }) =>
      [match.rule, el("span", { class: kind(match) }, match.status.replace("_", " ")), places, match.reason,
        el("code", {}, [match.layer, match.source].filter(Boolean).join("  "))])) : el("p", { class: "quiet" }, "No rule found anything to look at."),
    el("h2", {}, "Kernels"),
    shown.kernels.length ? table(["kernel", "made by", "calls"], shown.kernels.map((one) => [el("code", { class: "name" }, one.name), one.by, one.calls]))
      : el("p", { class: "quiet" }, "No code was generated for this graph."),
    el("h2", {}, "Options"),
    table(["option", "value"], Object.entries(shown.options).map(([name, value]) => [name, JSON.stringify(value)])),
  ];
}

const ORDER = ["fused", "inductor", "near_miss", "skipped", "disabled"];
const SIGN = { fused: "●", inductor: "◐", near_miss: "▲", skipped: "–", disabled: "×" };

function fusion() {
  const shown = graph();
  const rules = [...new Set(shown.matches.map((match) => match.rule))];
  const layers = [...new Set(shown.matches.map((match) => layerOf(match.layer)))].sort(byLayer);
  if (!rules.length) return [el("p", { class: "quiet" }, "No rule found anything to look at.")];
  const details = el("div", {});
  const show = (layer, rule) => {
    const found = shown.matches.filter((match) => layerOf(match.layer) === layer && match.rule === rule);
    details.replaceChildren(el("h2", {}, `${rule} in ${layer}`), table(["place", "status", "node", "reason", "source"],
      found.map((match) => [`${match.rule}@${match.index}`, el("span", { class: kind(match) }, kind(match).replace("_", " ")),
        el("code", {}, match.node), match.reason, el("code", {}, match.source)])));
    details.scrollIntoView({ block: "nearest" });
  };
  const cell = (layer, rule) => {
    const found = shown.matches.filter((match) => layerOf(match.layer) === layer && match.rule === rule);
    const counts = ORDER.map((name) => [name, found.filter((match) => kind(match) === name).length]).filter(([, n]) => n);
    if (!counts.length) return "";
    return el("button", { title: `${rule} in ${layer}`, onclick: () => show(layer, rule) },
      counts.map(([name, n]) => el("span", { class: name }, `${SIGN[name]}${n > 1 ? n : ""} `)));
  };
  const words = { fused: "fused by a rule", inductor: "left whole for Inductor to fuse", near_miss: "near miss", skipped: "refused by its guard", disabled: "switched off" };
  return [
    el("p", { class: "legend" }, ORDER.map((name) => el("span", { class: name }, `${SIGN[name]} ${words[name]}`)), el("span", { class: "quiet" }, "Choose a cell for its reasons.")),
    table(["layer", ...rules], layers.map((layer) => [layer, ...rules.map((rule) => cell(layer, rule))]), { class: "matrix" }),
    details,
  ];
}

function stageLines(index) {
  while (index >= 0 && graph().stages[index].lines === null) index -= 1;
  return index < 0 ? [] : graph().stages[index].lines;
}

function steps() {
  const shown = graph();
  if (!shown.stages.length) return [el("p", { class: "quiet" }, "This graph was not lowered.")];
  state.stage = Math.min(state.stage, shown.stages.length - 1);
  const whole = state.whole ? "whole" : "changes", stage = shown.stages[state.stage];
  const button = (one, index) => el("button", { "aria-pressed": index === state.stage, onclick: () => { state.stage = index; render(); } },
    one.name, one.changes ? el("small", { class: "quiet" }, ` ${one.changes.length} changed`) : null);
  const before = state.stage ? shown.stages[state.stage - 1].ops : {};
  const names = [...new Set([...Object.keys(before), ...Object.keys(stage.ops)])].filter((name) => (before[name] || 0) !== (stage.ops[name] || 0));
  const counted = Object.keys(stage.ops).length && state.stage;
  return [
    el("div", { class: "steps" }, shown.stages.map(button),
      state.stage ? el("button", { onclick: () => { state.whole = !state.whole; render(); } }, whole === "whole" ? "Show changes only (d)" : "Show whole graph (d)") : null),
    counted && names.length ? el("div", {}, table(["operation", "before", "after"], names.map((name) => [el("code", {}, name), before[name] || 0, stage.ops[name] || 0]))) : null,
    state.stage && !stage.changes ? el("p", { class: "quiet" }, "This step changed nothing.") : null,
    el("h2", {}, state.stage && whole === "changes" ? `What ${stage.name} changed` : state.stage ? `The graph after ${stage.name}` : "The graph before lowering"),
    lines(difference(state.stage, !state.stage || whole === "whole")),
  ];
}

// [number, text, kind] of a stage: its lines, with those that it took out; only the changes and three lines around them
// unless `whole`.
function difference(index, whole) {
  const after = stageLines(index), changes = graph().stages[index].changes || [];
  const before = index ? stageLines(index - 1) : [];
  const result = [];
  let at = 0;
  const keep = (from, to, first, last) => {
    for (let i = from; i < to; i += 1) {
      const near = (!first && i < from + 3) || (!last && i >= to - 3);
      if (whole || near) result.push([i + 1, `  ${after[i]}`]);
      else if (result.length === 0 || result.at(-1)[2] !== "gap") result.push(["", "  ⋯", "gap"]);
    }
  };
  changes.forEach(([, a, b, c, d], number) => {
    keep(at, c, number === 0, false);
    for (let i = a; i < b; i += 1) result.push([i + 1, `- ${before[i]}`, "minus"]);
    for (let i = c; i < d; i += 1) result.push([i + 1, `+ ${after[i]}`, "plus"]);
    at = d;
  });
  keep(at, after.length, changes.length === 0, true);
  return result;
}

function code() {
  const shown = graph();
  if (!shown.code.length) return [el("p", { class: "quiet" }, "No code was generated for this graph: Inductor was off, or the cache held it without a dump.")];
  const places = (call) => call.nodes.map((name) => [name, shown.origins[name]]).filter(([, origin]) => origin);
  const layers = (call) => [...new Set(places(call).map(([, origin]) => layerOf(origin.layer)))].sort(byLayer);
  const choices = [...new Set(shown.calls.flatMap(layers))].sort(byLayer);
  const chosen = shown.calls.map((call, index) => ({ call, index })).filter(({ call }) => !state.layer || layers(call).includes(state.layer));
  if (!chosen.some(({ index }) => index === state.call)) state.call = chosen.length ? chosen[0].index : 0;
  const rows = chosen.map(({ call, index }) => {
    const row = [index, el("code", { class: "name" }, call.kernel), call.by, shortened(layers(call))];
    row.attributes = { "data-call": index, "aria-selected": index === state.call, onclick: () => { state.call = index; render(true); } };
    return row;
  });
  const filter = el("select", { "aria-label": "Layer", onchange: (event) => { state.layer = event.target.value; render(); } },
    el("option", { value: "" }, "every layer"), choices.map((layer) => el("option", { value: layer, selected: layer === state.layer && "" }, layer)));
  return [el("div", { class: "split" },
    el("div", {}, el("p", {}, filter), table(["#", "kernel", "made by", "layers"], rows)),
    el("div", {}, shown.calls.length ? callView(shown.calls[state.call], places(shown.calls[state.call])) : lines(shown.code.map((text, n) => [n + 1, text]))))];
}

const shortened = (names) => (names.length > 2 ? `${names[0]} to ${names.at(-1)} (${names.length})` : names.join(", "));

function callView(call, places) {
  const shown = graph(), sources = new Map();
  for (const [name, origin] of places) {
    const key = [origin.layer, origin.source, origin.line].join("\n");
    if (!sources.has(key)) sources.set(key, { origin, nodes: [] });
    sources.get(key).nodes.push(name);
  }
  const numbered = (from, to) => lines(shown.code.slice(from - 1, to).map((text, n) => [n + from, text, n + from === call.line ? "here" : ""]));
  const definition = shown.definitions[call.kernel];
  return [
    el("h2", { class: "name" }, call.kernel),
    el("p", { class: "quiet" }, "From these lines of the model:"),
    el("div", { class: "model" }, sources.size ? [...sources.values()].map(({ origin, nodes }) => el("div", {},
      el("code", {}, origin.line || "(no source line)"), el("div", { class: "quiet" }, [origin.source, origin.layer].filter(Boolean).join("  "), "  computes ", nodes.join(", "))))
      : el("div", { class: "quiet" }, "Not known.")),
    el("h2", {}, "Its call"), numbered(Math.max(1, call.line - 3), call.line + 2),
    definition ? [el("h2", {}, "Its code"), numbered(...definition)] : null,
  ];
}

const HUES = [212, 155, 32, 275, 190, 345, 60];

function time() {
  const bar = (parts) => el("div", { class: "bar" }, parts.map(([name, value, colour]) => el("i", { style: `flex:${value};background:${colour}`, title: `${name}: ${seconds(value)}` })));
  const parts = (timing) => Object.entries(timing.parts).filter(([name, value]) => name !== "total" && value > 0)
    .map(([name, value], index) => [name, value, `hsl(${HUES[index % HUES.length]} 45% 55%)`]);
  const one = graph().timing, total = one.parts.total || 0, rows = parts(one);
  const share = (value) => (total ? `${(100 * value / total).toFixed(1)} %` : "");
  return [
    el("h2", {}, `This graph: ${seconds(total)}`), el("p", { class: "quiet" }, "From Dynamo's graph to a callable. Dynamo's own tracing is not part of it. Graphs of one compilation share it."),
    bar(rows),
    table(["part", "time", "share"], rows.map(([name, value, colour]) => [el("span", {}, el("span", { class: "swatch", style: `background:${colour}` }), name), seconds(value), share(value)])),
    el("h2", {}, "Lowering, step by step"),
    table(["step", "time"], Object.entries(one.steps).map(([name, value]) => [name, seconds(value)])),
    el("h2", {}, "Every graph"),
    table(["graph", "time"], data.graphs.map((other) => [other.folder, seconds(other.timing.parts.total || 0)])),
  ];
}

function render(keepScroll = false) {
  const scroll = [...document.querySelectorAll(".split > div")].map((one) => one.scrollTop);
  $("graphs").replaceChildren(...data.graphs.map((one, index) => el("button", { "aria-current": index === state.graph, onclick: () => { state.graph = index; state.call = 0; render(); } },
    el("b", {}, one.name || one.folder), el("small", {}, `${one.folder}  ${one.target}  ${one.matches.filter((match) => match.status === "fused").length} fused`))));
  if (!shownViews().includes(state.view)) state.view = "Overview";
  $("tabs").replaceChildren(...shownViews().map((name, index) => el("button", { role: "tab", "aria-selected": name === state.view, onclick: () => { state.view = name; render(); } },
    name, el("kbd", {}, String(index + 1)))));
  $("view").replaceChildren(...(data.graphs.length ? views[state.view]().flat(Infinity).filter(Boolean) : [el("p", {}, "This dump holds no graph.")]));
  if (keepScroll) document.querySelectorAll(".split > div").forEach((one, index) => { if (index === 0) one.scrollTop = scroll[index] || 0; });
  location.replace(`#${state.graph}/${state.view}`);
  search(false);
}

// Marks every line and row of this view that holds the text; Enter and Shift+Enter go from one to the next.
function search(move, back = false) {
  const wanted = $("search").value.trim().toLowerCase();
  if (!move) {
    document.querySelectorAll("#view .line.hit, #view tr.hit").forEach((one) => one.classList.remove("hit"));
    state.hits = wanted ? [...document.querySelectorAll("#view .line, #view tbody tr")].filter((one) => one.textContent.toLowerCase().includes(wanted)) : [];
    state.hits.forEach((one) => one.classList.add("hit"));
    state.at = -1;
  } else if (state.hits.length) {
    state.at = (state.at + (back ? -1 : 1) + state.hits.length) % state.hits.length;
    state.hits[state.at].scrollIntoView({ block: "center" });
  }
  $("found").textContent = wanted ? `${state.at < 0 ? "" : `${state.at + 1} of `}${state.hits.length} found` : "";
}

function theme(name) {
  document.documentElement.dataset.theme = name;
  try { localStorage.setItem("gcu-theme", name); } catch { /* a file: page may have no storage */ }
}

const KEYS = { "1 to 5": "view", "j, k": "next, previous graph", "n, p": "next, previous step or kernel call", d: "whole graph or changes only", "/": "search; Enter and Shift+Enter go through what is found", t: "dark or light", "?": "this list" };

function move(by) {
  if (state.view === "Steps") state.stage = Math.max(0, Math.min(graph().stages.length - 1, state.stage + by));
  if (state.view === "Code") {
    const rows = [...document.querySelectorAll("tr[data-call]")].map((row) => Number(row.dataset.call));
    const next = rows[Math.max(0, Math.min(rows.length - 1, rows.indexOf(state.call) + by))];
    if (next !== undefined) state.call = next;
  }
  render(true);
  document.querySelector("tr[aria-selected=true]")?.scrollIntoView({ block: "nearest" });
}

document.addEventListener("keydown", (event) => {
  if (event.target === $("search")) {
    if (event.key === "Enter") search(true, event.shiftKey);
    if (event.key === "Escape") { $("search").value = ""; $("search").blur(); search(false); }
    return;
  }
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
  const names = shownViews(), other = { j: 1, k: -1 }[event.key], step = { n: 1, p: -1 }[event.key];
  if (names[Number(event.key) - 1]) { state.view = names[Number(event.key) - 1]; render(); }
  else if (other) { state.graph = Math.max(0, Math.min(data.graphs.length - 1, state.graph + other)); render(); }
  else if (step) move(step);
  else if (event.key === "d") { state.whole = !state.whole; render(); }
  else if (event.key === "t") $("theme").click();
  else if (event.key === "?") $("help").click();
  else if (event.key === "/") { event.preventDefault(); $("search").focus(); $("search").select(); }
});
