// Elements and requests. Text of data goes into text nodes alone: nothing here reads HTML.

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

export const byId = (id) => document.getElementById(id);

export class Refused extends Error {}

// The answer of the server as an object. Refused: it said no, and asking again is of no use. Other errors: it is not there, or
// could not do it now.
export async function ask(address, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const response = await fetch(address, { ...options, cache: "no-store" });
  if (response.status >= 500) throw new Error(`the server says ${response.status}`);
  const value = await response.json();
  if (!response.ok) throw new Refused(value.error);
  return value;
}

export const imageOf = (id) => `image/${encodeURIComponent(id)}`;

const loaded = new Map();

// Load images before they are shown; only the last ones are held.
export function preload(ids) {
  for (const id of ids) {
    if (loaded.has(id)) continue;
    const image = new Image();
    image.src = imageOf(id);
    loaded.set(id, image);
    if (loaded.size > 60) loaded.delete(loaded.keys().next().value);
  }
}

export function zoom(id, name) {
  const dialog = byId("zoom");
  const image = dialog.querySelector("img");
  image.src = imageOf(id);
  image.alt = name;
  dialog.showModal();
}

// After the mouse, a button does not hold the keyboard: Enter is for the page again. Who came to it by Tab stays on it.
document.addEventListener("click", (event) => {
  if (event.detail > 0) event.target.closest("button")?.blur();
}, { capture: true });
byId("zoom").addEventListener("click", () => byId("zoom").close());

export const isTyping = (event) =>
  event.ctrlKey || event.altKey || event.metaKey || event.target.matches("textarea, select") ||
  document.querySelector("dialog[open]") !== null;

// Enter on a button or link is its own.
export const isOwn = (event) => event.key === "Enter" && event.target.matches("button, a");

export function key(name) {
  return element("kbd", {}, name);
}
