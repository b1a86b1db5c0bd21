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

function isConversation(value) {
  if (!value || typeof value.id !== "string" || typeof value.nodes !== "object" || value.nodes === null) return false;
  return Object.values(value.nodes).every(
    (n) => n && typeof n.id === "string" && typeof n.content === "string" && ["user", "assistant"].includes(n.role),
  );
}

export class Store {
  constructor() {
    this.conversations = read(KEY, []).filter(isConversation);
    this.settings = { ...DEFAULTS, user: newId(), ...read(SETTINGS, {}) };
    this.full = false;
  }

  save() {
    try {
      localStorage.setItem(KEY, JSON.stringify(this.conversations));
      localStorage.setItem(SETTINGS, JSON.stringify({ ...this.settings, key: "" }));
      this.full = false;
    } catch {
      this.full = true; // the page says so
    }
  }

  resetSettings() {
    this.settings = { ...DEFAULTS, model: this.settings.model, user: this.settings.user };
    this.save();
  }

  create() {
    const conversation = { id: newId(), title: "New chat", leaf: null, nodes: {} };
    this.conversations.unshift(conversation);
    return conversation;
  }

  remove(id) {
    this.conversations = this.conversations.filter((c) => c.id !== id);
    this.save();
  }

  exported() {
    return JSON.stringify({ format: "nanochat conversations 1", conversations: this.conversations }, null, 1);
  }

  // Adds the conversations of an exported file; returns how many. Throws for a file of another kind.
  imported(text) {
    const data = JSON.parse(text);
    if (!Array.isArray(data.conversations)) throw new Error("the file holds no conversations");
    const good = data.conversations.filter(isConversation).map((c) => ({ ...c, id: newId(), title: String(c.title) }));
    this.conversations.unshift(...good);
    this.save();
    return good.length;
  }
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
