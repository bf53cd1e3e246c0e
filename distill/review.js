// One sample at a time. Everything becomes text of elements; nothing is parsed as markup.
"use strict";
const byId = name => document.getElementById(name);
let items = [];
let at = 0;
let busy = false;

function make(name, content, className) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...[].concat(content));
  return element;
}

function show() {
  const left = items.filter(item => !item.decided).length;
  byId("left").textContent = items.length ? `${at + 1} of ${items.length}, ${left} left` : "The queue is empty.";
  byId("problem").textContent = "";
  editing(false);
  for (const name of ["accept", "edit", "reject", "back", "next", "note"]) byId(name).disabled = !items.length;
  if (!items.length) return;
  const item = items[at];
  byId("facts").textContent = [...item.facts, "judge's score " + Number(item.score.toPrecision(3))].join(" · ");
  byId("prompt").replaceChildren(...item.messages.map(([role, content]) =>
    make("div", [make("h2", role), make("pre", content)], "message")));
  const edited = item.decided && item.decided.completion;
  byId("thinking").hidden = !item.thought || Boolean(edited);
  byId("thinking").querySelector("pre").textContent = item.thought;
  byId("answer").textContent = edited || item.answer;
  byId("judged").replaceChildren(...[["principles", item.principles.map((text, i) => i + 1 + ". " + text).join("\n")],
    ["reference", item.reference], ["the judge", item.evidence]]
    .filter(fact => fact[1]).flatMap(([name, value]) => [make("dt", name), make("dd", value)]));
  byId("note").value = item.decided ? item.decided.note : "";
  for (const name of ["accept", "edit", "reject"])
    byId(name).setAttribute("aria-pressed", String(Boolean(item.decided && item.decided.decision === name)));
  scrollTo(0, 0);
}

function editing(on) {
  byId("editor").hidden = byId("editing").hidden = !on;
  byId("answer").hidden = byId("choices").hidden = on;
  byId("thinking").hidden = on || !items.length || !items[at].thought;
  if (on) {
    const item = items[at];
    byId("editor").value = item.decided && item.decided.completion || item.completion;
    byId("editor").focus();
  }
}

async function decide(decision, completion) {
  if (busy || !items.length) return;
  busy = true;
  const item = items[at];
  const note = byId("note").value;
  try {
    const answer = await fetch("decisions", { method: "POST", headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ id: item.id, decision, note, ...(completion === undefined ? {} : { completion }) }) });
    const told = await answer.json();
    if (!answer.ok) throw new Error(told.error);
    item.decided = { decision, note, completion: completion ?? null };
    document.activeElement.blur();
    const after = [...items.keys()].map(i => (at + 1 + i) % items.length).find(i => !items[i].decided);
    at = after ?? at;
    show();
    if (after === undefined) byId("left").textContent = `All ${items.length} are decided.`;
  } catch (error) {
    byId("problem").textContent = "Not kept: " + error.message;
  } finally {
    busy = false;
  }
}

function move(step) {
  if (!items.length) return;
  at = Math.min(items.length - 1, Math.max(0, at + step));
  show();
}

const actions = {
  a: () => decide("accept"), r: () => decide("reject"), e: () => editing(true), j: () => move(1), k: () => move(-1),
  t: () => { byId("thinking").open = !byId("thinking").open; }, n: () => byId("note").focus(),
};
const save = () => decide("edit", byId("editor").value);
for (const [name, key] of [["accept", "a"], ["reject", "r"], ["edit", "e"], ["next", "j"], ["back", "k"]])
  byId(name).addEventListener("click", actions[key]);
byId("save").addEventListener("click", save);
byId("cancel").addEventListener("click", show);
document.addEventListener("keydown", event => {
  const writing = event.target === byId("editor") || event.target === byId("note");
  if (event.key === "Escape") {
    if (event.target === byId("note")) event.target.blur(); else if (!byId("editing").hidden) show();
  } else if (event.key === "Enter" && event.ctrlKey && !byId("editing").hidden) {
    save();
  } else if (!writing && byId("editing").hidden && !event.ctrlKey && !event.metaKey && !event.altKey &&
             Object.hasOwn(actions, event.key) && items.length) {
    event.preventDefault();
    actions[event.key]();
  }
});

fetch("items").then(answer => answer.json()).then(found => {
  items = found;
  at = Math.max(0, items.findIndex(item => !item.decided));
  show();
}).catch(error => { byId("problem").textContent = "The samples could not be read: " + error.message; });
