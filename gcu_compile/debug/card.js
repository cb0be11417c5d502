// The view of a graph that was cross-compiled for a card: kernels and calls by predicted time, and one of them in full.
const micro = (value) => (value >= 1e3 ? `${(value / 1e3).toFixed(2)} ms` : `${value.toFixed(1)} us`);
const percent = (value) => `${(100 * value).toFixed(2)} %`;

function cardRows(shown) {
  const kernels = shown.kernels.map((one) => ({ one, name: one.name, times: one.launches, kernel: true }));
  const calls = shown.calls.filter((one) => !one.view).map((one) => ({ one, name: one.target, times: one.count, kernel: false }));
  const spent = ({ one }) => (one.cost ? one.cost.microseconds : 0);
  return [...kernels, ...calls].sort((left, right) => spent(right) - spent(left));
}

function verdict({ one, kernel }) {
  if (!kernel) return ["call", "quiet"];
  if (one.error) return ["does not compile", "disabled"];
  if (!one.report.legal) return ["illegal", "disabled"];
  const gathers = one.report.accesses.filter((access) => access.verdict === "gather").length;
  return gathers ? [`${gathers} gathers`, "near_miss"] : ["slices", "fused"];
}

function card() {
  const shown = graph().card, totals = shown.totals, rows = cardRows(shown);
  state.card = Math.min(state.card || 0, rows.length - 1);
  const box = (value, text, style) => el("div", { class: "card" }, el("b", { class: style }, String(value)), text);
  const bad = totals.aborts + totals.errors;
  const listed = rows.map((row, index) => {
    const [word, style] = verdict(row), cost = row.one.cost;
    const line = [el("code", { class: "name" }, row.name), row.times, cost ? micro(cost.microseconds) : "?", cost ? cost.bound : "?", el("span", { class: style }, word)];
    line.attributes = { "data-card": index, "aria-selected": index === state.card, onclick: () => { state.card = index; render(true); } };
    return line;
  });
  const beside = shown.baseline;
  return [
    el("div", { class: "cards" },
      box(micro(totals.microseconds), "predicted"), box(percent(totals.dma_share), "of bytes in DMA slices", totals.dma_share >= 0.99 ? "fused" : "near_miss"),
      box(bad, "aborts and errors", bad ? "disabled" : "fused"), box(totals.wide, "64-bit values", totals.wide ? "disabled" : "fused"),
      box(totals.known_wrong, "known-wrong patterns", totals.known_wrong ? "disabled" : "fused"),
      box(`${totals.kernel_launches} + ${totals.calls}`, "launches and calls")),
    beside ? el("p", { class: "quiet" }, `Inductor's own scheduling of the same graph: ${micro(beside.microseconds)} predicted, ${beside.aborts + beside.errors} aborts and errors, ${percent(beside.dma_share)} in slices.`) : null,
    totals.gathers.length ? el("div", {}, el("h2", {}, "Gathers"), table(["kernel", "tile", "why"],
      totals.gathers.map((one) => [el("code", { class: "name" }, one.kernel), `${one.shape.join("x")} ${one.element}`, one.why]))) : null,
    el("div", { class: "split" }, el("div", {}, table(["kernel or call", "times", "predicted", "bound", "verdict"], listed)),
      el("div", {}, rows.length ? cardOne(rows[state.card]) : null)),
  ];
}

function cardOne({ one, name, kernel }) {
  const cost = one.cost, numbered = (text) => lines(text.replace(/\n$/, "").split("\n").map((line, n) => [n + 1, line]));
  const times = cost && Object.entries(cost.times).map(([bound, value]) => [bound, micro(value)]);
  const shapes = (tensors) => tensors.map(([shape, kind]) => `${shape.join("x") || "scalar"} ${kind}`).join(", ");
  return [
    el("h2", { class: "name" }, name),
    kernel ? el("p", { class: "quiet" }, `grid ${one.grid.join(" x ")}, ${one.num_warps} warps, ${Object.entries(one.constexprs).map(([key, value]) => `${key} ${value}`).join(", ")}`)
      : el("p", { class: "quiet" }, `${shapes(one.inputs)} → ${shapes(one.outputs)}`),
    cost ? [el("h2", {}, "Predicted cost"), table(["part", "time"], times),
      el("p", { class: "quiet" }, `${cost.bytes_read} bytes read, ${cost.bytes_written} written; ${cost.slices} slices, ${cost.gathered} gathered elements; ${cost.active_sips} SIPs`)] : null,
    one.error ? el("p", { class: "disabled" }, one.error) : null,
    kernel && one.report ? [
      el("h2", {}, "The checker's verdict on each access"),
      table(["line", "operation", "tile", "verdict", "reasons"], one.report.accesses.map((access) => [access.line, access.operation,
        `${access.shape.join("x") || "scalar"} ${access.element}`, access.verdict, access.reasons.join(", ")])),
      one.report.findings.length ? table(["severity", "rule", "line", "finding", "remedy"], one.report.findings.map((found) =>
        [found.severity, found.rule, found.line, found.message, found.remedy])) : null] : null,
    kernel ? [el("h2", {}, "Triton"), numbered(one.triton)] : null,
    kernel && one.ttir ? [el("h2", {}, "TTIR"), numbered(one.ttir)] : null,
  ];
}
