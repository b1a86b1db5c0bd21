// The chat page: what a person sees and does. Endpoints are in api.js, conversations in store.js.

import { models, stream } from "./api.js";
import { markdown } from "./markdown.js";
import { Store, add, choose, onChange, path, siblings } from "./store.js";

const $ = (id) => document.getElementById(id);
const SLIDERS = ["temperature", "top_k", "top_p", "max_tokens"];
const SETTINGS = [...SLIDERS, "seed", "system", "key"];
const UNREACHABLE = "The server cannot be reached. Is nanochat serve still running?";
const EXAMPLES = ["Hello! Who are you?", "What is 12 + 30?", "Spell the word apple."];

const store = new Store();
let known = []; // the server's models
let current = null; // the conversation on the screen
let running = null; // {controller, node} while an answer streams
let inside = new Set(); // ids of answers whose tokens are shown
let editing = null; // {id, box}: the question under the pen, and its editor

const model = () => known.find((m) => m.id === store.settings.model) ?? known[0];
const completes = () => model()?.nanochat?.stage === "base";
const local = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
// Whether a key sends what was typed. Safari does not say that Enter confirms a word of an input method, except by the number 229.
const sends = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229;
// The selector of a message; ids in an imported file may hold anything.
const place = (id) => `[data-id="${CSS.escape(id)}"]`;

function node(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const small = (label, action, name = label) => node("button", { class: "small", type: "button", "aria-label": name, onclick: action }, label);

// ---- notices

function say(text) {
  $("status").textContent = text;
}

function complain(text, retry = null) {
  text = text.charAt(0).toUpperCase() + text.slice(1);
  const buttons = node("span", { class: "buttons" });
  if (retry) buttons.append(small("Try again", () => { complain(""); retry(); }));
  if (text) buttons.append(small("✕", () => complain(""), "Dismiss"));
  $("notice").replaceChildren(...(text ? [node("span", {}, text), buttons] : []));
}

// ---- the list of conversations

function rename(conversation) {
  const title = prompt("Name of the conversation", conversation.title);
  if (title?.trim()) {
    conversation.title = title.trim().slice(0, 80);
    store.save();
    drawList();
  }
}

function remove(conversation) {
  if (!confirm(`Delete "${conversation.title}"?`)) return;
  if (conversation === current) leave();
  store.remove(conversation.id);
  draw();
}

function matches(conversation, words) {
  const text = [conversation.title, ...Object.values(conversation.nodes).map((n) => n.content)].join(" ").toLowerCase();
  return words.every((word) => text.includes(word));
}

function drawList() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const items = store.conversations.filter((c) => matches(c, words)).map((conversation) =>
    node(
      "li",
      { class: conversation === current ? "current" : "" },
      node(
        "button",
        { class: "title", type: "button", "aria-current": conversation === current ? "true" : undefined, onclick: () => open(conversation) },
        conversation.title,
      ),
      small("✎", () => rename(conversation), `Rename ${conversation.title}`),
      small("✕", () => remove(conversation), `Delete ${conversation.title}`),
    ),
  );
  $("conversations").replaceChildren(...items);
}

function leave(conversation = null) {
  stop();
  current = conversation;
  editing = null;
  complain("");
}

function open(conversation) {
  leave(conversation);
  document.body.classList.remove("sidebar-open");
  meter(null);
  draw();
  scrollDown();
  $("input").focus();
}

// ---- messages

function toolCard(part) {
  const label = part.type === "python" ? "calculates" : "result";
  return node("div", { class: "tool" }, node("span", { class: "label" }, label), node("code", {}, part.text));
}

function tokenClass(token) {
  if (token.logprob === null) return "token forced";
  const p = Math.exp(token.logprob);
  return `token ${p > 0.75 ? "p4" : p > 0.4 ? "p3" : p > 0.15 ? "p2" : "p1"}`;
}

function visible(text) {
  return JSON.stringify(text).slice(1, -1);
}

function showDistribution(span, token) {
  const rows = token.top.length ? token.top : [];
  const lines = rows.map(([text, logprob]) => {
    const share = node("div", { class: "share" });
    share.style.width = `${Math.max(1, 100 * Math.exp(logprob))}%`;
    return node(
      "div",
      { class: text === token.text ? "row taken" : "row" },
      node("code", {}, visible(text)),
      node("div", {}, share),
      node("span", {}, `${(100 * Math.exp(logprob)).toFixed(1)} %`),
    );
  });
  const taken = token.logprob === null ? "written by the calculator" : `taken: ${visible(token.text)}, ${(100 * Math.exp(token.logprob)).toFixed(1)} %`;
  const popover = $("popover");
  popover.replaceChildren(node("div", { class: "quiet" }, taken), ...lines);
  popover.hidden = false;
  const box = span.getBoundingClientRect();
  const size = popover.getBoundingClientRect();
  popover.style.left = `${Math.max(8, Math.min(box.left, innerWidth - size.width - 8))}px`;
  popover.style.top = `${box.bottom + size.height + 8 > innerHeight ? box.top - size.height - 6 : box.bottom + 6}px`;
}

function hideDistribution() {
  $("popover").hidden = true;
}

function tokenView(message) {
  const spans = message.tokens.map((token) =>
    node(
      "span",
      {
        class: tokenClass(token),
        tabindex: "0",
        "aria-describedby": "popover",
        onmouseenter: (event) => showDistribution(event.target, token),
        onfocus: (event) => showDistribution(event.target, token),
        onmouseleave: hideDistribution,
        onblur: hideDistribution,
      },
      token.text,
    ),
  );
  return node("div", { class: "tokens" }, ...spans);
}

function answerBody(message) {
  if (inside.has(message.id) && message.tokens?.length) return [tokenView(message)];
  const parts = message.parts ?? [{ type: "text", text: message.content }];
  const nodes = parts.flatMap((part) => (part.type === "text" ? markdown(part.text) : [toolCard(part)]));
  return nodes.length ? nodes : [node("p", { class: "quiet" }, running?.node === message ? "…" : "(empty answer)")];
}

function branchButtons(message) {
  const all = siblings(current, message);
  if (all.length < 2) return [];
  const at = all.indexOf(message);
  const go = (step) => () => {
    choose(current, all[at + step]);
    store.save();
    draw();
  };
  return [
    at > 0 ? small("‹", go(-1), "Previous version") : null,
    node("span", { class: "quiet" }, `${at + 1} of ${all.length}`),
    at < all.length - 1 ? small("›", go(1), "Next version") : null,
  ];
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text); // there is no clipboard on a page that came over plain HTTP from another machine
    say("Copied");
  } catch {
    complain("The browser does not allow copying here.");
  }
}

// A base model continues a text with every space in it.
function typed(box) {
  return completes() ? box.value : box.value.trim();
}

function editor(message) {
  const area = node("textarea", { "aria-label": "Edit the message" });
  area.value = message.content;
  const send = () => {
    if (!area.value.trim() || !ready()) return;
    editing = null;
    ask(typed(area), message.parent);
  };
  area.addEventListener("keydown", (event) => {
    if (sends(event)) {
      event.preventDefault();
      send();
    } else if (event.key === "Escape") {
      event.stopPropagation();
      editing = null;
      draw();
    }
  });
  return node("div", { class: "editor" }, area, node("div", { class: "bar" }, node("button", { class: "primary", type: "button", onclick: send }, "Send"), node("button", { type: "button", onclick: () => { editing = null; draw(); } }, "Cancel")));
}

function lost(dropped) {
  if (dropped === "tokens") return "beginning of this text";
  return `${dropped === 1 ? "oldest exchange" : `${dropped} oldest exchanges`} of this conversation`;
}

function edit(message) {
  editing = { id: message.id, box: editor(message) };
  draw();
  editing.box.querySelector("textarea").focus();
}

function messageNode(message) {
  const user = message.role === "user";
  const busy = running?.node === message;
  const body = node("div", { class: busy ? "body cursor" : "body" });
  if (user && editing?.id === message.id) body.append(editing.box);
  else body.append(...(user ? [message.content] : answerBody(message)));
  const tools = node("div", { class: "tools" }, ...branchButtons(message));
  if (!busy) {
    tools.append(small("Copy", () => copy(message.content)));
    if (user) tools.append(small("Edit", () => edit(message)));
    else {
      tools.append(small("Regenerate", () => { if (!running) answer(message.parent); }));
      if (message.tokens?.length) {
        const shown = inside.has(message.id);
        tools.append(small(shown ? "Text" : "Look inside", () => { shown ? inside.delete(message.id) : inside.add(message.id); draw(); }));
      }
    }
  }
  if (message.note) tools.append(node("span", { class: "quiet" }, message.note));
  const who = node("div", { class: "who" }, user ? (completes() ? "Beginning" : "You") : (completes() ? "Continuation" : "Assistant"));
  const cut = message.dropped ? node("div", { class: "cut" }, `The model no longer sees the ${lost(message.dropped)}: its context is full.`) : null;
  return node("article", { class: `message ${message.role}`, "data-id": message.id }, who, cut, body, tools);
}

function emptyNode() {
  const where = local ? "It runs on this machine. Nothing you write leaves it." : "It runs on the machine that serves this page.";
  const buttons = completes() ? [] : EXAMPLES.map((text) => node("button", { type: "button", onclick: () => ask(text) }, text));
  return node(
    "div",
    { class: "empty" },
    node("h1", {}, completes() ? "Begin a text" : "Talk to your model"),
    node("div", {}, completes() ? "This base model continues what you write; it does not converse." : where),
    node("div", { class: "examples" }, ...buttons),
  );
}

function draw() {
  hideDistribution();
  drawList();
  const messages = current ? path(current) : [];
  const focused = document.activeElement;
  const home = focused?.closest("#messages [data-id]");
  const at = home ? tools(home.dataset.id).indexOf(focused) : -1;
  $("messages").replaceChildren(...(messages.length ? messages.map(messageNode) : [emptyNode()]));
  if (editing?.box.contains(focused)) focused.focus(); // moving it took the focus
  else if (at >= 0) (tools(home.dataset.id)[at] ?? tools(home.dataset.id).at(-1))?.focus();
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
  $("input").placeholder = completes() ? "Begin a text" : "Write a message";
  if (store.full) complain("The browser's storage is full: export and delete old conversations, or new ones will be lost.");
}

// The buttons below a message.
function tools(id) {
  return [...$("messages").querySelectorAll(`${place(id)} .tools button`)];
}

function atEnd() {
  const box = $("messages");
  return box.scrollHeight - box.scrollTop - box.clientHeight < 60;
}

function scrollDown() {
  $("messages").scrollTop = $("messages").scrollHeight;
}

function redraw(message) {
  const old = $("messages").querySelector(place(message.id));
  const follow = atEnd();
  if (old) old.replaceWith(messageNode(message));
  if (follow) scrollDown();
}

// ---- asking

function stop() {
  running?.controller.abort();
}

function ready() {
  if (!running && !model()) complain("No model is loaded yet.", connect);
  return !running && Boolean(model());
}

function ask(text, parent) {
  if (!ready()) return;
  current ??= store.create();
  if (parent === undefined) {
    const last = current.nodes[current.leaf];
    parent = last?.role === "user" ? last.parent : current.leaf; // replaces a question that has no answer
  }
  const question = add(current, parent, "user", text);
  if (current.title === "New chat") current.title = text.replace(/\s+/g, " ").slice(0, 40);
  store.save();
  answer(question.id);
}

function requestBody(messages) {
  const { temperature, top_k, top_p, max_tokens, seed, system } = store.settings;
  const body = { model: model().id, user: store.settings.user, temperature, top_k, top_p, stream: true, stream_options: { include_usage: true } };
  if (max_tokens > 0) body.max_tokens = max_tokens;
  if (seed !== "") body.seed = Number(seed);
  if (completes()) return { ...body, prompt: messages.map((m) => m.content).join(""), logprobs: 5, max_tokens: max_tokens || 128, truncation: "auto" };
  const turns = messages.map((m) => ({ role: m.role, content: m.parts?.some((p) => p.type !== "text") ? m.parts : m.content }));
  if (system.trim()) turns.unshift({ role: "system", content: system.trim() });
  return { ...body, messages: turns, logprobs: true, top_logprobs: 5, truncation: "auto" };
}

function takeParts(message, parts) {
  message.parts ??= [];
  for (const part of parts) {
    const last = message.parts.at(-1);
    if (part.type === "text" && last?.type === "text") last.text += part.text;
    else message.parts.push({ ...part });
    if (part.type === "text") message.content += part.text;
  }
}

function takeTokens(message, choice) {
  message.tokens ??= [];
  for (const t of choice.logprobs?.content ?? []) {
    message.tokens.push({ text: t.token, logprob: t.logprob, top: t.top_logprobs.map((o) => [o.token, o.logprob]) });
  }
  const old = choice.logprobs?.tokens ? choice.logprobs : null; // the shape of /v1/completions
  const plain = (text) => (/^bytes:.*\\x/.test(text) ? "\ufffd" : text); // a part of a character
  old?.tokens.forEach((text, i) => {
    const top = Object.entries(old.top_logprobs[i] ?? {}).map(([t, p]) => [plain(t), p]);
    message.tokens.push({ text: plain(text), logprob: old.token_logprobs[i], top: top.sort((a, b) => b[1] - a[1]) });
  });
}

function meter(usage) {
  const context = model()?.nanochat?.context;
  if (!context) $("meter").textContent = "";
  else if (!usage) $("meter").textContent = `context: ${context.toLocaleString()} tokens`;
  else $("meter").replaceChildren(`${Math.min(usage.total_tokens, context).toLocaleString()} of ${context.toLocaleString()}`, node("span", { class: "wide-only" }, " tokens"));
}

function take(message, event) {
  const choice = event.choices[0];
  const dropped = event.nanochat?.dropped; // exchanges, or the first tokens of a text
  if (dropped) message.dropped = event.object === "text_completion" ? "tokens" : dropped;
  if (choice) {
    const text = choice.text ?? choice.delta?.content;
    takeParts(message, choice.delta?.nanochat?.parts ?? (text ? [{ type: "text", text }] : []));
    takeTokens(message, choice);
    if (choice.finish_reason === "length") message.note = "reached the length limit";
  }
  if (event.usage) {
    meter(event.usage);
    const speed = event.nanochat?.tokens_per_second;
    const count = `${event.usage.completion_tokens} tokens`;
    message.note = [message.note, speed ? `${count}, ${Math.round(speed)} per second` : count].filter(Boolean).join(" · ");
  }
}

async function answer(parent) {
  if (running) return;
  complain("");
  current.leaf = parent;
  const asked = current;
  const messages = path(asked);
  const message = add(asked, parent, "assistant", "");
  running = { controller: new AbortController(), node: message };
  draw();
  scrollDown();
  say("The model is answering");
  const endpoint = completes() ? "v1/completions" : "v1/chat/completions";
  try {
    for await (const event of stream(endpoint, requestBody(messages), store.settings.key, running.controller.signal)) {
      take(message, event);
      if (asked === current) redraw(message);
    }
    say(`Answer complete: ${message.content}`);
  } catch (error) {
    if (error.name === "AbortError") {
      message.note = "stopped";
      say("Stopped");
    } else {
      if (!message.content) {
        store.drop(asked, message);
        asked.leaf = parent;
      } else message.note = "interrupted";
      complain(error.name === "ApiError" ? error.message : UNREACHABLE, () => { if (asked === current) answer(parent); });
    }
  } finally {
    running = null;
    store.save();
    draw();
  }
}

// ---- settings

// Shows all settings. The field that is being edited stays as it is: it reads half a number as nothing.
function drawSettings(edited = "") {
  for (const name of SETTINGS) if (name !== edited) $(name).value = store.settings[name];
  for (const name of SLIDERS) {
    const value = Number(store.settings[name]);
    const words = { max_tokens: value ? value : "no limit", top_k: value ? value : "off" };
    $(`${name}-value`).textContent = words[name] ?? value;
  }
  const options = known.map((m) => node("option", { value: m.id, selected: m === model() }, m.id));
  $("model").replaceChildren(...options);
}

function connectSettings() {
  for (const name of SETTINGS) {
    $(name).addEventListener("input", () => {
      store.settings[name] = SLIDERS.includes(name) ? Number($(name).value) : $(name).value;
      store.saveSettings();
      drawSettings(name);
    });
  }
  $("key").addEventListener("change", connect);
  $("settings").addEventListener("submit", (event) => event.preventDefault());
  $("model").addEventListener("change", () => {
    store.settings.model = $("model").value;
    store.saveSettings();
    meter(null);
    draw();
  });
  $("reset-settings").addEventListener("click", () => {
    store.resetSettings();
    drawSettings();
  });
  $("toggle-settings").addEventListener("click", () => {
    const hidden = !$("settings").hidden;
    $("settings").hidden = hidden;
    $("toggle-settings").setAttribute("aria-expanded", String(!hidden));
  });
}

// ---- files

function download(text, name) {
  const address = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const link = node("a", { href: address, download: name, hidden: true });
  document.body.append(link); // some browsers follow no other links
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 40000); // when the browser has read it
}

async function importFile(file) {
  try {
    const { added, damaged } = store.imported(await file.text());
    say(`Imported ${added} conversations`);
    draw();
    if (damaged) complain(`${damaged} of the conversations in ${file.name} are damaged and were left out.`);
  } catch (error) {
    complain(`Could not import ${file.name}: ${error.message}`);
  }
}

// ---- start

async function connect() {
  complain("");
  try {
    known = await models(store.settings.key);
  } catch (error) {
    const reason = error.status === 401 ? "This server needs an API key: enter it in the settings." : error.message;
    complain(error.name === "ApiError" ? reason : UNREACHABLE, connect);
    if (error.code === "loading") setTimeout(connect, 1000);
    return;
  }
  drawSettings();
  meter(null);
  draw();
}

function grow() {
  $("input").style.height = "auto";
  $("input").style.height = `${$("input").scrollHeight + 2}px`;
}

function submit(event) {
  event?.preventDefault();
  const text = typed($("input"));
  if (!text.trim() || !ready()) return;
  $("input").value = "";
  grow();
  ask(text);
}

$("composer").addEventListener("submit", submit);
$("input").addEventListener("input", grow);
$("input").addEventListener("keydown", (event) => {
  if (sends(event)) submit(event);
});
$("stop").addEventListener("click", stop);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) stop();
  else document.body.classList.remove("sidebar-open");
});
$("new").addEventListener("click", () => {
  leave();
  document.body.classList.remove("sidebar-open");
  meter(null);
  draw();
  $("input").focus();
});
$("search").addEventListener("input", drawList);
$("export").addEventListener("click", () => download(store.exported(), "nanochat-conversations.json"));
$("import").addEventListener("click", () => $("import-file").click());
$("import-file").addEventListener("change", () => {
  if ($("import-file").files[0]) importFile($("import-file").files[0]);
  $("import-file").value = "";
});
$("open-sidebar").addEventListener("click", () => {
  document.body.classList.add("sidebar-open");
  $("new").focus();
});
$("close-sidebar").addEventListener("click", () => document.body.classList.remove("sidebar-open"));

onChange(() => {
  store.merge();
  if (current && !store.conversations.includes(current)) leave();
  draw();
});

connectSettings();
current = store.conversations[0] ?? null;
drawSettings();
draw();
scrollDown();
connect().then(scrollDown);
