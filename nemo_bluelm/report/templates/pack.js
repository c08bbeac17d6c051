"use strict";
// The tooltip of a token. Elements follow the tokens; one with data-n stands for that many of them.
const tip = document.getElementById("tip");
const known = new WeakMap();
let current = null;

function tokensOf(body) {
  if (!known.has(body)) {
    const data = JSON.parse(body.nextElementSibling.textContent);
    const elements = [...body.children];
    const places = new Map();
    let at = 0;
    for (const element of elements) {
      places.set(element, at);
      at += Number(element.dataset.n || 1);
    }
    known.set(body, { data, elements, places });
  }
  return known.get(body);
}

function describe(element) {
  const { data, places } = tokensOf(element.parentElement);
  const at = places.get(element), count = Number(element.dataset.n || 1), last = at + count - 1;
  const span = (a, b) => (a === b ? `${a}` : `${a} to ${b}`);
  const position = (i) => data.positions[i] ?? i;
  const label = data.labels[last] ?? data.ids[last + 1];
  const next = element.nextElementSibling;
  const named = !(last in data.labels) && next && !next.dataset.n ? ` ${JSON.stringify(next.textContent)}` : "";
  const target = at > 0 && data.trained[at - 1] === "1";
  const rest = element.classList.contains("u");
  const text = count > 1 ? `${count} tokens` : rest ? "rest of a character" : JSON.stringify(element.textContent);
  return [
    `${text}   id ${data.ids[at]}`,
    `row ${span(data.first + at, data.first + last)}, position id ${span(position(at), position(last))}`,
    `label ${label}${named}, ${data.trained[last] === "1" ? "in the loss" : "masked"}`,
    target ? "a target: the token before it learns to predict it" : "context: never predicted in training",
  ].join("\n");
}

function show(element) {
  if (current) current.classList.remove("at");
  current = element;
  tip.hidden = !element;
  if (!element) return;
  element.classList.add("at");
  tip.textContent = describe(element);
  const box = element.getClientRects()[0] || element.getBoundingClientRect();
  const left = Math.max(8, Math.min(box.left, innerWidth - tip.offsetWidth - 8));
  const below = box.bottom + 8 + tip.offsetHeight < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? box.bottom + 8 : Math.max(8, box.top - tip.offsetHeight - 8)}px`;
}

function tokenAt(node) {
  return node instanceof Element ? node.closest(".tokens > *") : null;
}

document.addEventListener("mouseover", (event) => show(tokenAt(event.target)));
document.addEventListener("click", (event) => show(tokenAt(event.target)));
document.addEventListener("scroll", () => show(null), { passive: true });
document.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") show(null);
  const focused = document.activeElement.closest(".tokens");
  if (!step || !(current || focused)) return;
  const body = current ? current.parentElement : focused;
  const { elements } = tokensOf(body);
  const next = current ? elements[elements.indexOf(current) + step] : elements[0];
  if (next) {
    event.preventDefault();
    next.scrollIntoView({ block: "nearest" });
    show(next);
  }
});
