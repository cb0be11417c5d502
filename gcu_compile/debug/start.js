// Runs last: the page's controls, and the view that the address names.
$("title").textContent = data.graphs.length ? data.graphs[0].name : "";
$("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
$("help").addEventListener("click", () => $("keys").showModal());
$("keys").append(el("h2", {}, "Keys"), table(["key", "does"], Object.entries(KEYS).map(([key, does]) => [el("kbd", {}, key), does])), el("form", { method: "dialog" }, el("p", {}, el("button", {}, "Close"))));
$("search").addEventListener("input", () => search(false));
let stored = null;
try { stored = localStorage.getItem("gcu-theme"); } catch { /* as above */ }
theme(stored || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
const [wantedGraph, wantedView] = decodeURIComponent(location.hash.slice(1)).split("/");
state.graph = Math.max(0, Math.min(data.graphs.length - 1, Number(wantedGraph) || 0));
if (views[wantedView]) state.view = wantedView;
render();
