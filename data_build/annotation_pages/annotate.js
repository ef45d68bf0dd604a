// The page of an annotator: asks for a task, shows it, sends the answer until the server has confirmed it.

import { ask, byId, element, imageOf, isOwn, isTyping, key, preload, Refused, zoom } from "./dom.js";
import * as order from "./order.js";

const RETRY = 1500; // milliseconds between two tries to send an answer
let words = null;
let task = null;
let form = null; // of the task: {answer(), press(event), draft()}
let sending = false;
let shownSince = null; // when the page was last seen
let seconds = 0;

// ------------------------------------------------------------ time

function countTime() {
  if (shownSince !== null) seconds += (performance.now() - shownSince) / 1000;
  shownSince = document.visibilityState === "visible" ? performance.now() : null;
}

document.addEventListener("visibilitychange", countTime);

// ------------------------------------------------------------ drafts: a reload loses nothing

const draftName = (id) => `preftune draft ${id}`;

function keepDraft() {
  try {
    localStorage.setItem(draftName(task.task), JSON.stringify(form.draft()));
  } catch { /* no room, or not allowed: only a reload would need it */ }
}

function draftOf(id) {
  try {
    return JSON.parse(localStorage.getItem(draftName(id)));
  } catch {
    return null;
  }
}

function dropDraft(id) {
  try {
    localStorage.removeItem(draftName(id));
  } catch { /* it was not kept either */ }
}

// ------------------------------------------------------------ the four kinds of tasks

function figure(number, { onchoose = null, digit = true } = {}) {
  const id = task.images[number];
  const name = `image ${number + 1}`;
  const image = element("img", { src: imageOf(id), alt: name, draggable: "false" });
  return element(
    "figure", { "data-image": number },
    onchoose ? element("button", { class: "image", type: "button", "aria-label": name, onclick: onchoose }, image) : image,
    element(
      "figcaption", {}, digit ? key(`${number + 1}`) : "", element("span", { class: "rank" }),
      element("button", { class: "zoom", type: "button", "aria-label": `enlarge ${name}`, onclick: () => zoom(id, name) }, "enlarge"),
    ),
  );
}

function checks(names, keys, chosen, onchange) {
  return element(
    "fieldset", { class: "checks" }, element("legend", {}, "Problems"),
    ...Object.entries(names).map(([name, text], at) => element(
      "label", {},
      element("input", { type: "checkbox", name, checked: chosen.includes(name), onchange }), key(keys[at]), text,
    )),
  );
}

const checked = (place) => [...place.querySelectorAll("input[type=checkbox]:checked")].map((box) => box.name);

function toggle(place, at) {
  const box = place.querySelectorAll("input[type=checkbox]")[at];
  if (box) box.click();
  return Boolean(box);
}

function promptForm(place, before) {
  const letters = "abcdefghijkl";
  const choose = () => keepDraft();
  place.append(
    element(
      "fieldset", { class: "categories" }, element("legend", {}, "What is the text mainly about?"),
      ...words.categories.map((name, at) => element(
        "label", {},
        element("input", { type: "radio", name: "category", value: name, checked: before?.category === name, onchange: choose }),
        key(letters[at]), name,
      )),
    ),
    checks(words.prompt_problems, "12345", before?.problems ?? [], choose),
  );
  const answer = () => ({
    category: place.querySelector("input[name=category]:checked")?.value ?? null, problems: checked(place),
  });
  return {
    help: "letters: category; digits: problems; Enter: save",
    draft: answer,
    answer: () => (answer().category ? answer() : "Choose a category."),
    press(event) {
      const at = letters.indexOf(event.key);
      if (at >= 0) place.querySelectorAll("input[type=radio]")[at].click();
      else if (/^[1-5]$/.test(event.key)) toggle(place, Number(event.key) - 1);
      else return false;
      return true;
    },
  };
}

function ratingForm(place, before) {
  const letters = "abcdefg";
  const axes = Object.entries(words.axes);
  let current = 0;
  const rows = axes.map(([axis, [name, question, low, high]]) => element(
    "fieldset", { class: "axis", "data-axis": axis }, element("legend", {}, name), element("p", {}, question),
    element(
      "div", { class: "points" },
      ...Array.from({ length: words.points }, (_, at) => element(
        "label", {},
        element("input", {
          type: "radio", name: axis, value: at + 1, checked: before?.[axis] === at + 1,
          onchange: () => { select(axes.findIndex(([other]) => other === axis)); keepDraft(); },
        }),
        `${at + 1}`,
      )),
    ),
    element("p", { class: "ends" }, element("span", {}, low), element("span", {}, high)),
  ));
  function select(at) {
    current = Math.max(0, Math.min(at, axes.length - 1));
    rows.forEach((row, index) => row.classList.toggle("current", index === current));
  }
  const right = element("div", {}, ...rows, checks(words.image_problems, letters, before?.problems ?? [], () => keepDraft()));
  place.append(element("div", { class: "beside" }, element("div", { class: "single" }, figure(0, { digit: false })), right));
  select(0);
  const value = (axis) => Number(right.querySelector(`input[name=${axis}]:checked`)?.value ?? 0) || null;
  const answer = () => ({ ...Object.fromEntries(axes.map(([axis]) => [axis, value(axis)])), problems: checked(right) });
  return {
    help: "1 to 7: points, and on to the next axis; up and down: axis; letters: problems; Enter: save",
    draft: answer,
    answer() {
      const missing = axes.findIndex(([axis]) => !value(axis));
      if (missing < 0) return answer();
      select(missing);
      return `${axes[missing][1][0]} has no points yet.`;
    },
    press(event) {
      const letter = letters.indexOf(event.key);
      if (/^[1-7]$/.test(event.key)) {
        const at = current;
        rows[at].querySelectorAll("input")[Number(event.key) - 1].click();
        select(at + 1);
      } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
        select(current + (event.key === "ArrowDown" ? 1 : -1));
      } else if (letter < 0 || !toggle(right, letter)) return false;
      return true;
    },
  };
}

function choiceForm(place) {
  const choose = (number) => {
    const ranks = task.images.map((_, at) => (number === null || at === number ? 1 : 2));
    send({ ranks: Object.fromEntries(task.images.map((id, at) => [id, ranks[at]])) });
  };
  place.append(element("div", { class: "two" }, ...[0, 1].map((at) => figure(at, { onchoose: () => choose(at) }))));
  if (task.ties) {
    place.append(element("button", { id: "tie", type: "button", onclick: () => choose(null) }, "No difference ", key("0")));
  }
  for (const [at, id] of task.images.entries()) {
    if (task.answer?.ranks && Object.values(task.answer.ranks).some((rank) => rank > 1) && task.answer.ranks[id] === 1) {
      place.querySelectorAll("figure")[at].classList.add("chosen");
    }
  }
  return {
    help: `1 or left arrow: the left image; 2 or right arrow: the right one${task.ties ? "; 0: no difference" : ""}`,
    draft: () => null,
    answer: null,
    press(event) {
      if (event.key === "1" || event.key === "ArrowLeft") choose(0);
      else if (event.key === "2" || event.key === "ArrowRight") choose(1);
      else if (event.key === "0" && task.ties) choose(null);
      else return false;
      return true;
    },
  };
}

function rankingForm(place, before) {
  const number = task.images.length;
  let places = Array.isArray(before?.places) ? before.places : before?.ranks ? order.placesOf(before.ranks, task.images) : [];
  let selected = null; // an image that keys move
  let tieNext = false;
  const grid = element("div", { class: "grid" }, ...task.images.map((_, at) => figure(at)));
  const list = element("ol", { id: "order", "aria-label": "order, the best first" });
  place.append(element("div", { class: "beside wide" }, grid, element("div", {}, element("h2", {}, "Best first"), list)));

  function set(next, image = null) {
    places = next;
    selected = image;
    tieNext = false;
    draw();
    keepDraft();
  }

  function press(image) { // as its digit
    if (order.placeOf(places, image) >= 0) {
      selected = selected === image ? null : image;
      draw();
    } else set(tieNext && places.length ? order.tied(places, image, places.length - 1) : order.appended(places, image));
  }

  function gap(at) {
    return element("li", { class: "gap", "data-gap": at, "aria-hidden": "true" });
  }

  function draw() {
    const thumbnails = (images) => images.map((image) => element(
      "button", {
        class: `thumbnail${image === selected ? " selected" : ""}`, type: "button", "data-image": image,
        "aria-label": `image ${image + 1}`, "aria-pressed": `${image === selected}`,
      }, element("img", { src: imageOf(task.images[image]), alt: "", draggable: "false" }), key(`${image + 1}`),
    ));
    list.replaceChildren(
      gap(0),
      ...places.flatMap((images, at) => [
        element("li", { class: "place", "data-place": at }, element("b", {}, `${at + 1}`), ...thumbnails(images)), gap(at + 1),
      ]),
    );
    if (places.length < 1) list.append(element("li", { class: "hint" }, "Press the digit of the best image, or drag it here."));
    else if (tieNext) list.append(element("li", { class: "hint" }, "The next one is tied with the last."));
    grid.querySelectorAll("figure").forEach((found, image) => {
      const at = order.placeOf(places, image);
      found.classList.toggle("placed", at >= 0);
      found.classList.toggle("selected", image === selected);
      found.querySelector(".rank").textContent = at < 0 ? "" : `place ${at + 1}`;
    });
  }

  function drop(image, x, y) {
    const under = document.elementFromPoint(x, y);
    const [between, on] = [under?.closest("[data-gap]"), under?.closest("[data-place]")];
    if (between) set(order.inserted(places, image, Number(between.dataset.gap)));
    else if (on) set(order.tied(places, image, Number(on.dataset.place)));
    else if (under?.closest("#order")) set(order.appended(places, image));
    else if (under?.closest(".grid") && order.placeOf(places, image) >= 0) set(order.without(places, image));
  }

  dragging(place, press, drop);
  draw();
  const step = (event) => (event.key === "ArrowUp" ? -1 : 1);
  return {
    help: "digits: the next best; = : the next one is tied; digit of a placed image: select it, then up and down move it and = ties "
      + "it with the one above; Backspace: take out; Enter: save. Or drag: between two places, or onto one for a tie",
    draft: () => ({ places }),
    answer() {
      if (places.flat().length === number) return { ranks: order.ranksOf(places, task.images) };
      return `${number - places.flat().length} of ${number} images have no place yet.`;
    },
    press(event) {
      if (/^[1-9]$/.test(event.key) && Number(event.key) <= number) press(Number(event.key) - 1);
      else if (event.key === "=" && selected !== null) {
        const at = order.placeOf(places, selected);
        if (at > 0) set(order.tied(places, selected, at - 1), selected);
      } else if (event.key === "=") {
        tieNext = places.length > 0 && !tieNext;
        draw();
      } else if ((event.key === "ArrowUp" || event.key === "ArrowDown") && selected !== null) {
        set(order.moved(places, selected, step(event)), selected);
      } else if (event.key === "Backspace" && places.length) {
        set(order.without(places, selected ?? places.at(-1).at(-1)));
      } else return false;
      return true;
    },
  };
}

// Pointer: a press without movement is `press`, a movement is a drag of an image. Fingers drag thumbnails only: elsewhere they scroll.
function dragging(place, press, drop) {
  let held = null;
  const stop = (event) => { // the click of the mouse that follows a press or drag; one of the keyboard has no detail
    if (event.detail > 0) event.stopPropagation();
  };
  place.addEventListener("pointerdown", (event) => {
    place.removeEventListener("click", stop, { capture: true });
    const source = event.target.closest("[data-image]");
    const taken = source && event.button === 0 && !event.target.closest(".zoom");
    if (!taken || (event.pointerType !== "mouse" && source.matches("figure"))) return;
    held = { image: Number(source.dataset.image), x: event.clientX, y: event.clientY, ghost: null, source };
    place.setPointerCapture(event.pointerId);
  });
  place.addEventListener("pointermove", (event) => {
    if (!held) return;
    if (!held.ghost && Math.hypot(event.clientX - held.x, event.clientY - held.y) > 6) {
      held.ghost = held.source.querySelector("img").cloneNode();
      held.ghost.className = "ghost";
      document.body.append(held.ghost);
    }
    if (held.ghost) {
      held.ghost.style.left = `${event.clientX}px`;
      held.ghost.style.top = `${event.clientY}px`;
    }
  });
  const end = (event) => {
    if (!held) return;
    const { image, ghost } = held;
    held = null;
    ghost?.remove();
    place.addEventListener("click", stop, { capture: true, once: true });
    if (event.type === "pointerup") (ghost ? drop(image, event.clientX, event.clientY) : press(image));
  };
  place.addEventListener("pointerup", end);
  place.addEventListener("pointercancel", end);
  place.addEventListener("click", (event) => { // of fingers on an image, and of the space bar on a thumbnail
    const source = event.target.closest("[data-image]");
    if (source && !event.target.closest(".zoom")) press(Number(source.dataset.image));
  });
}

const FORMS = { prompt: promptForm, rating: ratingForm, ranking: rankingForm, choice: choiceForm };
const TITLES = {
  prompt: "The text", rating: "One image of this text", ranking: "Order the images of this text",
  choice: "Which image do you prefer for this text?",
};

// ------------------------------------------------------------ the page

function show(next) {
  task = next;
  form = null;
  sending = false;
  seconds = 0;
  shownSince = null;
  countTime();
  byId("who").textContent = task.name;
  byId("count").textContent = task.total ? `${task.done} of ${task.total}` : "";
  byId("bar").hidden = !task.total;
  byId("bar").max = Math.max(task.total, 1);
  byId("bar").value = task.done;
  byId("inspect").hidden = task.role !== "inspector";
  const place = element("div"); // a new one: what the last task listened to goes with it
  byId("work").replaceChildren(place);
  const finished = Boolean(task.finished);
  for (const id of ["send", "skip", "help"]) byId(id).hidden = finished;
  byId("back").hidden = task.at === 0;
  byId("note").hidden = !task.note;
  byId("note").textContent = task.note ? `Sent back by an inspector: ${task.note}` : "";
  document.body.dataset.kind = finished ? "finished" : task.kind;
  document.body.dataset.task = finished ? "" : task.task;
  byId("kind").textContent = finished ? "" : TITLES[task.kind];
  byId("prompt").textContent = finished ? task.why || "That was all. Thank you!" : task.prompt;
  document.activeElement?.blur();
  window.scrollTo(0, 0);
  say(finished && !task.why ? "Everything is saved; you can close this page." : "");
  if (finished) return;
  const before = draftOf(task.task) ?? task.answer;
  form = FORMS[task.kind](place, before?.skip ? null : before);
  byId("help").textContent = `Keys: ${form.help}.`;
  byId("send").hidden = form.answer === null;
  if (task.accepted) say("An inspector has accepted this answer; it stays as it is.");
  else if (task.answer?.skip) say(`You have skipped this: ${words.skips[task.answer.skip]}.`);
  preload(task.ahead);
}

function say(text, isError = false) {
  byId("status").textContent = text;
  byId("status").classList.toggle("error", isError);
}

async function until(address, body, text) { // asks until the server answers
  for (;;) {
    try {
      return await ask(address, body);
    } catch (error) {
      if (error instanceof Refused) throw error;
      say(text, true);
      await new Promise((done) => setTimeout(done, RETRY));
    }
  }
}

async function load(at = null) {
  sending = true;
  try {
    words ??= await until("words", undefined, "The server does not answer; trying again.");
    show(await until(at === null ? "task" : `task?at=${at}`, undefined, "The server does not answer; trying again."));
  } catch (error) {
    say(error.message, true);
  } finally {
    sending = false;
  }
}

async function send(answer) {
  if (sending || !task || task.finished) return;
  sending = true;
  countTime();
  byId("work").inert = true;
  const id = task.task;
  try {
    await until("answer", { task: id, answer, seconds }, "Not saved yet: the server does not answer. Trying again; leave this page open.");
    dropDraft(id);
    sending = false;
    await load();
  } catch (error) {
    say(error.message, true);
  } finally {
    sending = false;
    byId("work").inert = false;
  }
}

function submit() {
  if (!form || form.answer === null) return;
  const answer = form.answer();
  if (typeof answer === "string") say(answer, true);
  else send(answer);
}

function fillSkips() {
  byId("reasons").replaceChildren(...Object.entries(words.skips).map(([name, text]) => element(
    "button", { type: "button", "data-skip": name, onclick: () => { byId("skips").close(); send({ skip: name }); } }, text,
  )));
}

byId("send").addEventListener("click", submit);
byId("back").addEventListener("click", () => { if (!sending) load(task.at - 1); });
byId("skip").addEventListener("click", () => { fillSkips(); byId("skips").showModal(); });
byId("stay").addEventListener("click", () => byId("skips").close());
document.addEventListener("keydown", (event) => {
  if (isTyping(event) || isOwn(event) || sending || !form) return;
  if (event.key === "Enter" && !event.repeat) submit();
  else if (event.key === "PageUp" && !byId("back").hidden) byId("back").click();
  else if (event.key === "Delete") byId("skip").click();
  else if (event.repeat || !form.press(event)) return;
  event.preventDefault();
});
load();
