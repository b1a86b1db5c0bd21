// Markdown to DOM nodes. Text only ever becomes text nodes: nothing here uses innerHTML.

function element(tag, children = [], attributes = {}) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*|\*([^*\s][^*\n]*)\*|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/;

export function inline(text) {
  const nodes = [];
  let rest = text;
  for (let match = INLINE.exec(rest); match; match = INLINE.exec(rest)) {
    if (match.index) nodes.push(rest.slice(0, match.index));
    const [whole, code, strong, emphasis, label, address] = match;
    if (code !== undefined) nodes.push(element("code", [code]));
    else if (strong !== undefined) nodes.push(element("strong", inline(strong)));
    else if (emphasis !== undefined) nodes.push(element("em", inline(emphasis)));
    else nodes.push(element("a", [label], { href: address, rel: "noopener noreferrer", target: "_blank" }));
    rest = rest.slice(match.index + whole.length);
  }
  if (rest) nodes.push(rest);
  return nodes;
}

function lines(texts) {
  const nodes = [];
  texts.forEach((text, i) => {
    if (i) nodes.push(element("br"));
    nodes.push(...inline(text));
  });
  return nodes;
}

function row(line, tag) {
  const cells = line.trim().replace(/^\||\|$/g, "").split("|");
  return element("tr", cells.map((cell) => element(tag, inline(cell.trim()))));
}

const BULLET = /^\s*([-*+]|\d+[.)])\s+(.*)$/;

// One block that starts at line i: [its node, the line after it].
function block(all, i) {
  const line = all[i];
  if (/^\s*```/.test(line)) {
    let end = i + 1;
    while (end < all.length && !/^\s*```/.test(all[end])) end++;
    const code = element("code", [all.slice(i + 1, end).join("\n")]);
    return [element("pre", [code], { tabindex: "0" }), end + 1];
  }
  const heading = /^(#{1,6})\s+(.*)$/.exec(line);
  if (heading) return [element(`h${Math.min(6, heading[1].length + 2)}`, inline(heading[2])), i + 1];
  if (/^\s*>/.test(line)) {
    let end = i;
    while (end < all.length && /^\s*>/.test(all[end])) end++;
    return [element("blockquote", lines(all.slice(i, end).map((l) => l.replace(/^\s*>\s?/, "")))), end];
  }
  if (BULLET.test(line)) {
    const ordered = /^\s*\d/.test(line);
    const items = [];
    let end = i;
    for (; end < all.length && BULLET.test(all[end]); end++) {
      items.push(element("li", inline(BULLET.exec(all[end])[2])));
    }
    return [element(ordered ? "ol" : "ul", items, ordered ? { start: String(parseInt(line, 10)) } : {}), end];
  }
  if (line.includes("|") && /^\s*\|?[\s:|-]*-[\s:|-]*\|[\s:|-]*$/.test(all[i + 1] ?? "")) {
    const rows = [row(line, "th")];
    let end = i + 2;
    for (; end < all.length && all[end].includes("|"); end++) rows.push(row(all[end], "td"));
    return [element("div", [element("table", rows)], { class: "table" }), end];
  }
  let end = i + 1;
  while (end < all.length && all[end].trim() && !/^\s*(```|>|#{1,6}\s)/.test(all[end]) && !BULLET.test(all[end])) end++;
  return [element("p", lines(all.slice(i, end))), end];
}

export function markdown(text) {
  const all = text.split("\n");
  const nodes = [];
  for (let i = 0; i < all.length; ) {
    if (!all[i].trim()) {
      i++;
      continue;
    }
    const [node, next] = block(all, i);
    nodes.push(node);
    i = next;
  }
  return nodes;
}
