// The list, its filters and the sample chosen. Everything becomes text of elements; nothing is parsed as markup.
"use strict";
const samples = JSON.parse(document.getElementById("data").textContent);
const list = document.getElementById("list");
const article = document.getElementById("sample");
const filters = document.getElementById("filters");

function make(name, content, className) {
  const element = document.createElement(name);
  if (className) element.className = className;
  for (const child of [].concat(content ?? [])) element.append(child);
  return element;
}

for (const sample of samples) {
  const prompt = sample.messages.length ? sample.messages[sample.messages.length - 1][1] : "";
  sample.searched = [sample.id, sample.problem_id, sample.thought, sample.answer, ...sample.messages.map(m => m[1]),
    ...sample.facts.map(fact => fact[1])].join("\n").toLowerCase();
  sample.button = make("button", [
    make("span", prompt.slice(0, 200)),
    make("span", [make("b", sample.lost || sample.status || "no verdict"), " · " + sample.domain + " · " + sample.form +
      " · " + sample.tokens + " tokens"], "dim")]);
  sample.button.type = "button";
  sample.button.addEventListener("click", () => choose(sample));
  sample.item = make("li", sample.button);
  list.append(sample.item);
}

// Text with its fenced code in a fixed width; the fences stay, as they are part of what the model wrote.
function prose(content) {
  return content.split(/(^```[^\n]*\n[^]*?^```[^\n]*$)/m).filter(Boolean)
    .map(piece => make("pre", piece, piece.startsWith("```") ? "text code" : "text"));
}

let chosen = null;
let matching = samples;

function filter() {
  const wanted = new FormData(filters);
  const text = (wanted.get("text") ?? "").toLowerCase();
  wanted.delete("text");
  matching = samples.filter(sample => sample.searched.includes(text) &&
    [...wanted].every(([name, value]) => !value || sample[name] === value));
  const there = new Set(matching);
  for (const sample of samples) sample.item.hidden = !there.has(sample);
  filters.querySelector("output").textContent = matching.length + " of " + samples.length;
  if (!there.has(chosen)) choose(matching[0]);
}

function choose(sample) {
  if (chosen) chosen.button.removeAttribute("aria-current");
  chosen = sample ?? null;
  article.replaceChildren(...(sample ? shown(sample) : [make("p", "No sample fits.", "absent")]));
  article.scrollTop = 0;
  if (!sample) return;
  sample.button.setAttribute("aria-current", "true");
  sample.button.scrollIntoView({ block: "nearest" });
  history.replaceState(null, "", "#" + encodeURIComponent(sample.id));
}

function shown(sample) {
  const status = make("span", sample.status || "no verdict", "chip v-" + (sample.status || "abstain"));
  const said = [sample.reason, sample.score === null ? "" : "score " + Number(sample.score.toPrecision(3)),
    sample.domain, sample.form + " form", sample.tokens + " tokens", sample.split && sample.split + " split"];
  const head = make("h2", [status, make("span", said.filter(Boolean).join(" · "), "dim")]);
  const parts = [head];
  if (sample.lost) parts.push(make("p", "Lost because of: " + sample.lost, "absent"));
  for (const [role, content] of sample.messages) parts.push(message(role, prose(content)));
  const written = [];
  if (sample.thought) written.push(make("details", [
    make("summary", "thinking, " + sample.thought.length.toLocaleString("en") + " characters"),
    make("pre", sample.thought, "text")]));
  written.push(...prose(sample.answer || "(empty)"));
  parts.push(message("assistant", written));
  const others = samples.filter(other => other !== sample && other.problem_id === sample.problem_id);
  if (others.length) parts.push(make("p", ["Other samples of this problem: ", ...others.map(other => {
    const button = make("button", other.form + ", " + (other.lost || other.status || "no verdict"));
    button.type = "button";
    button.addEventListener("click", () => choose(other));
    return button;
  })], "siblings"));
  parts.push(make("dl", sample.facts.flatMap(([name, value]) => [make("dt", name), make("dd", value)])));
  return parts;
}

function message(role, content) {
  return make("div", [make("h3", role), ...content], "message" + (role === "assistant" ? " assistant" : ""));
}

filters.addEventListener("input", filter);
filters.addEventListener("submit", event => event.preventDefault());
document.addEventListener("keydown", event => {
  if (event.target.closest("input, select") || event.ctrlKey || event.metaKey || event.altKey) return;
  const step = { j: 1, k: -1 }[event.key];
  if (step && matching.length)
    choose(matching[Math.min(matching.length - 1, Math.max(0, matching.indexOf(chosen) + step))]);
  if (event.key === "/") {
    event.preventDefault();
    filters.elements.text.focus();
  }
});
const asked = decodeURIComponent(location.hash.slice(1));
filter();
choose(samples.find(sample => sample.id === asked) ?? matching[0]);
