// Conversations in localStorage. A conversation is a tree of messages, so that an edited question starts a branch.
//   {id, title, system, leaf, nodes: {id: {id, parent, role, content, parts?, tokens?, note?}}}

const KEY = "nanochat.conversations";
const SETTINGS = "nanochat.settings";
const DEFAULTS = { temperature: 0.6, top_k: 50, top_p: 1, max_tokens: 0, seed: "", model: "", system: "", key: "" };

function read(key, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(key)) ?? otherwise;
  } catch {
    return otherwise; // unreadable or not allowed: start empty
  }
}

export const newId = () => crypto.getRandomValues(new Uint32Array(2)).join("");

const isText = (value) => typeof value === "string";
const isNumber = (value) => value === null || typeof value === "number";
const isListOf = (value, is) => value === undefined || (Array.isArray(value) && value.every(is));
const isPart = (part) => part && ["text", "python", "python_output"].includes(part.type) && isText(part.text);
const isChance = (pair) => Array.isArray(pair) && isText(pair[0]) && isNumber(pair[1]);
const isToken = (token) =>
  token && isText(token.text) && isNumber(token.logprob) && Array.isArray(token.top) && token.top.every(isChance);
const isMessage = (n) =>
  n && isText(n.id) && isText(n.content) && ["user", "assistant"].includes(n.role) && isListOf(n.parts, isPart) && isListOf(n.tokens, isToken);

// Whether everything that the page reads has the right form, and every message leads to a first one.
function isConversation(value) {
  const nodes = value?.nodes;
  if (!nodes || typeof nodes !== "object" || !isText(value.id)) return false;
  const isPlace = (id) => id === null || id === undefined || (isText(id) && (Object.hasOwn(nodes, id) || !(id in nodes)));
  if (!isPlace(value.leaf)) return false;
  if (!Object.entries(nodes).every(([id, n]) => isMessage(n) && n.id === id && isPlace(n.parent))) return false;
  const ends = new Set(); // ids from which the first message is reached
  for (const id of Object.keys(nodes)) {
    const way = new Set();
    for (let at = id; nodes[at] && !ends.has(at); at = nodes[at].parent) {
      if (way.has(at)) return false;
      way.add(at);
    }
    for (const at of way) ends.add(at);
  }
  return true;
}

// What is stored: a list, or null if there is none.
function stored() {
  const list = read(KEY, null);
  return Array.isArray(list) ? list.filter(isConversation) : null;
}

export class Store {
  constructor() {
    this.conversations = stored() ?? [];
    this.settings = { ...DEFAULTS, user: newId(), ...read(SETTINGS, {}) };
    this.full = false;
    this.seen = new Set(this.conversations.map((c) => c.id)); // ids that were stored once
    this.removed = new Set(); // ids of conversations and messages
    this.saveSettings(); // the user's id stays the same
  }

  // Takes over what another tab has stored: its new conversations, messages and deletions.
  merge(titles = true) {
    const list = stored()?.filter((c) => !this.removed.has(c.id));
    if (!list) return;
    const own = new Map(this.conversations.map((c) => [c.id, c]));
    const there = new Set(list.map((c) => c.id));
    const merged = list.map((c) => {
      const mine = own.get(c.id);
      if (!mine) return c;
      mine.nodes = { ...c.nodes, ...mine.nodes };
      for (const id of this.removed) delete mine.nodes[id];
      if (titles) mine.title = c.title;
      return mine;
    });
    this.conversations = [...this.conversations.filter((c) => !there.has(c.id) && !this.seen.has(c.id)), ...merged];
  }

  save() {
    this.merge(false);
    do {
      try {
        localStorage.setItem(KEY, JSON.stringify(this.conversations));
        this.full = false;
        for (const c of this.conversations) this.seen.add(c.id);
        return;
      } catch (error) {
        this.full = true; // the page says so
        if (error.name !== "QuotaExceededError") return;
      }
    } while (this.forget());
  }

  // Makes room: the oldest quarter of the answers with tokens lose these. Returns whether there were any.
  forget() {
    const answers = [...this.conversations].reverse().flatMap((c) => Object.values(c.nodes)).filter((n) => n.tokens);
    for (const answer of answers.slice(0, Math.ceil(answers.length / 4))) delete answer.tokens;
    return answers.length > 0;
  }

  saveSettings() {
    try {
      localStorage.setItem(SETTINGS, JSON.stringify({ ...this.settings, key: "" }));
    } catch {
      this.full = true;
    }
  }

  resetSettings() {
    this.settings = { ...DEFAULTS, model: this.settings.model, user: this.settings.user };
    this.saveSettings();
  }

  create() {
    const conversation = { id: newId(), title: "New chat", leaf: null, nodes: {} };
    this.conversations.unshift(conversation);
    return conversation;
  }

  remove(id) {
    this.removed.add(id);
    this.conversations = this.conversations.filter((c) => c.id !== id);
    this.save();
  }

  // Takes an answer that never began out of its conversation.
  drop(conversation, message) {
    this.removed.add(message.id);
    delete conversation.nodes[message.id];
  }

  exported() {
    return JSON.stringify({ format: "nanochat conversations 1", conversations: this.conversations }, null, 1);
  }

  // Adds the conversations of an exported file; returns how many, and how many are damaged. Throws for a file of another kind.
  imported(text) {
    const list = JSON.parse(text)?.conversations;
    if (!Array.isArray(list)) throw new Error("the file holds no conversations");
    const good = list.filter(isConversation).map((c) => ({ ...c, id: newId(), title: String(c.title ?? "Imported") }));
    this.conversations.unshift(...good);
    this.save();
    return { added: good.length, damaged: list.length - good.length };
  }
}

// Calls back when another tab has stored conversations.
export function onChange(call) {
  addEventListener("storage", (event) => {
    if (event.key === KEY) call();
  });
}

export function add(conversation, parent, role, content) {
  const node = { id: newId(), parent, role, content };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  return node;
}

// From the first message to the leaf.
export function path(conversation) {
  const nodes = [];
  for (let node = conversation.nodes[conversation.leaf]; node; node = conversation.nodes[node.parent]) nodes.unshift(node);
  return nodes;
}

export function siblings(conversation, node) {
  return Object.values(conversation.nodes).filter((n) => n.parent === node.parent);
}

// Show another branch: the newest leaf below a message.
export function choose(conversation, node) {
  for (let at = node; at; ) {
    conversation.leaf = at.id;
    const parent = at.id;
    at = Object.values(conversation.nodes).filter((n) => n.parent === parent).pop();
  }
}
