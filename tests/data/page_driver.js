// Runs the script of a page of pairs without a browser: `node page_driver.js PAGE ADDRESS STEPS` with STEPS as JSON.
// Prints a JSON list with what the page shows after each step, and the texts of the files that it saves.
"use strict";
const fs = require("fs");
const [, , pagePath, address, steps] = process.argv;
const text = fs.readFileSync(pagePath, "utf8");

class Element {
  constructor(tag) {
    Object.assign(this, { tag, children: [], handlers: {}, classes: new Set(), value: "", checked: false, disabled: false });
    this.classList = { toggle: (name, on) => (on ? this.classes.add(name) : this.classes.delete(name)) };
  }
  set className(value) { this.classes = new Set(value.split(" ")); }
  get textContent() { return this.children.map(child => (typeof child === "string" ? child : child.textContent)).join(""); }
  set textContent(value) { this.children = [String(value)]; }
  get childElementCount() { return this.children.length; }
  append(...children) { this.children.push(...children); }
  replaceChildren(...children) { this.children = children; }
  replaceWith(other) { Object.assign(this, other); }
  setAttribute(name, value) { this[name] = value; }
  addEventListener(name, handler) { this.handlers[name] = handler; }
  click() { if (this.tag !== "a") return this.handlers.click(); saved.push(blobs.at(-1)); }
  find(tag) {
    const inner = this.children.filter(child => typeof child !== "string");
    return [...inner.filter(child => child.tag === tag), ...inner.flatMap(child => child.find(tag))];
  }
}

const blobs = [], saved = [], byId = {};
for (const [, tag, id] of text.matchAll(/<(\w+)[^>]*\bid="(\w+)"/g)) byId[id] = new Element(tag);
byId.data.textContent = text.match(/<script id="data"[^>]*>([^]*?)<\/script>/)[1];
globalThis.document = { getElementById: id => byId[id] ?? null, createElement: tag => new Element(tag) };
globalThis.scrollTo = () => {};
globalThis.Blob = class { constructor(parts) { blobs.push(parts.join("")); } };
URL.createObjectURL = () => "blob:";
URL.revokeObjectURL = () => {};
const realFetch = globalThis.fetch;
let pending = 0;
globalThis.fetch = async (path, options) => {
  pending++;
  const answer = await realFetch(address + path, options), body = await answer.text();
  pending--;
  return { ok: answer.ok, text: async () => body, json: async () => JSON.parse(body) };
};
const wait = ms => new Promise(resolve => setTimeout(resolve, ms));

async function settle() {
  await wait(450); // longer than the delay of the search
  do await wait(50); while (pending);
}

const actions = {
  search: value => { byId.search.value = value; byId.search.handlers.input(); },
  only: value => { byId.only.checked = value; byId.only.handlers.change(); },
  place: value => { byId.place.value = String(value); byId.place.handlers.change(); },
  next: () => byId.next.click(),
  back: () => byId.back.click(),
  pick: number => byId.pairs.children[number].find("button")[0].click(),
  save: () => byId.save.click(),
};

(async () => {
  const script = text.match(/<script nonce="[^"]*">([^]*?)<\/script>/)[1];
  new Function(script)();
  await settle();
  const shown = [];
  for (const [name, value] of [["start"], ...JSON.parse(steps)]) {
    await actions[name]?.(value);
    await settle();
    shown.push({
      count: byId.count.textContent,
      save: byId.save.textContent,
      questions: byId.pairs.children.map(box => box.find("div").find(part => part.classes.has("question"))?.textContent ?? box.textContent),
      picked: byId.pairs.children.map(box => box.classes.has("picked")),
      images: byId.pairs.children.flatMap(box => box.find("img").map(image => image.src)),
    });
  }
  console.log(JSON.stringify({ shown, saved }));
  process.exit(0);
})();
