// The page of an inspector: answers of others, one after the other; accept, or send back with a note.

import { ask, byId, element, imageOf, isOwn, isTyping, key, preload, zoom } from "./dom.js";

let words = null;
let shown = null;
let state = "given";
let busy = false;

function say(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

function figure(entry, id, at) {
  const rank = entry.answer.ranks?.[id];
  const name = `image ${at + 1}`;
  return element(
    "figure", { class: rank === 1 ? "chosen" : "" }, element("img", { src: imageOf(id), alt: name }),
    element(
      "figcaption", {}, entry.images.length > 1 ? key(`${at + 1}`) : "", element("span", { class: "rank" }, rank ? `place ${rank}` : ""),
      element("button", { class: "zoom", type: "button", "aria-label": `enlarge ${name}`, onclick: () => zoom(id, name) }, "enlarge"),
    ),
  );
}

function lines(entry) { // [name, value] of what is not said by ranks
  const { answer } = entry;
  if (answer.skip) return [["Skipped", words.skips[answer.skip]]];
  const found = [];
  if (answer.category) found.push(["Category", answer.category]);
  for (const [axis, [name]] of Object.entries(words.axes)) if (axis in answer) found.push([name, `${answer[axis]} of ${words.points}`]);
  const names = entry.kind === "prompt" ? words.prompt_problems : words.image_problems;
  if (answer.problems) found.push(["Problems", answer.problems.map((name) => names[name]).join("; ") || "none"]);
  return found;
}

function show(found) {
  shown = found;
  const { entry, counts } = found;
  byId("who").textContent = found.name;
  for (const button of document.querySelectorAll("[data-state]")) {
    const name = button.dataset.state;
    button.textContent = `${button.dataset.name} (${counts[name]})`;
    button.setAttribute("aria-pressed", `${name === state}`);
  }
  byId("place").textContent = entry ? `${found.at + 1} of ${found.total}` : "nothing here";
  byId("prompt").textContent = entry ? entry.prompt : "";
  byId("about").textContent = entry
    ? `${entry.kind} by ${entry.annotator}, ${entry.seconds.toFixed(1)} s${entry.visit ? ", second time" : ""}` : "";
  byId("verdict").hidden = !entry;
  byId("note").value = "";
  const place = byId("work");
  place.replaceChildren();
  document.body.dataset.entry = entry ? JSON.stringify(entry.id) : "";
  document.activeElement?.blur();
  if (!entry) return;
  const images = [...entry.images.entries()].sort(([, a], [, b]) => (entry.answer.ranks?.[a] ?? 0) - (entry.answer.ranks?.[b] ?? 0));
  const layout = images.length > 2 ? "grid" : images.length === 2 ? "two" : "single";
  place.append(
    element(
      "div", { class: layout === "single" ? "beside" : "" },
      element("div", { class: layout }, ...images.map(([at, id]) => figure(entry, id, at))),
      element("dl", {}, ...lines(entry).flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])),
    ),
  );
  if (entry.note) place.append(element("p", { class: "note" }, `Note: ${entry.note}`));
  preload(found.ahead);
}

async function doing(work) {
  if (busy) return;
  busy = true;
  try {
    await work();
  } catch (error) {
    say(error.message, true);
  } finally {
    busy = false;
  }
}

async function load(at) {
  words ??= await ask("words");
  show(await ask(`review?state=${state}&at=${Math.max(at, 0)}`));
}

const go = (at) => doing(async () => { say(""); await load(at); });

const judge = (verdict) => doing(async () => {
  if (!shown?.entry) return;
  if (verdict === "return" && !byId("note").value.trim()) {
    byId("note").focus();
    say("Say in the note what is wrong, then send it back.", true);
    return;
  }
  const at = shown.at;
  try {
    await ask("verdict", { id: shown.entry.id, verdict, note: byId("note").value });
    say(verdict === "accept" ? "Accepted." : "Sent back.");
  } finally {
    await load(at);
  }
});

for (const button of document.querySelectorAll("[data-state]")) {
  button.addEventListener("click", () => { state = button.dataset.state; go(0); });
}
byId("accept").addEventListener("click", () => judge("accept"));
byId("return").addEventListener("click", () => judge("return"));
byId("previous").addEventListener("click", () => go(shown.at - 1));
byId("next").addEventListener("click", () => go(shown.at + 1));
byId("export").addEventListener("click", () => doing(async () => {
  const counts = await ask("export", {});
  say(Object.entries(counts).map(([name, number]) => `${name}: ${number}`).join(", "));
}));
document.addEventListener("keydown", (event) => {
  if (event.target.matches("textarea")) {
    if (event.key === "Escape") event.target.blur();
    else if (event.key === "Enter" && event.ctrlKey) judge("return");
    return;
  }
  if (isTyping(event) || isOwn(event)) return;
  const actions = {
    a: () => judge("accept"), r: () => judge("return"), ArrowLeft: () => go(shown.at - 1), ArrowRight: () => go(shown.at + 1),
    n: () => byId("note").focus(),
  };
  if (!(event.key in actions)) return;
  event.preventDefault();
  actions[event.key]();
});
go(0);
