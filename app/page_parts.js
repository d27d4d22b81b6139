// What the files of the page build upon: elements, figures in words, text with words in it.

/** An element, "tag.class.class", with attributes, listeners ("onclick") and children. */
function make(selector, attributes = {}, ...children) {
  const [tag, ...classes] = selector.split(".");
  const node = document.createElement(tag);
  if (classes.length) node.className = classes.join(" ");
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** Text of a node, touched only if it changes; an empty one is hidden. */
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
  node.hidden = text === "";
}

const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

function duration(ms) {
  if (ms >= 1000) return `${(ms / 1000).toFixed(ms < 10000 ? 1 : 0)} s`;
  return `${ms > 0 && ms < 9.95 ? ms.toFixed(1) : Math.round(ms)} ms`;
}

function size(bytes) {
  const step = bytes < 1e3 ? 0 : bytes < 1e5 ? 1 : bytes < 1e9 ? 2 : 3;
  const value = bytes / 1000 ** step;
  return `${value.toFixed(step && value < 100 ? 1 : 0)} ${["B", "kB", "MB", "GB"][step]}`;
}

/** What an answer took, part by part. */
function statsParts(stats) {
  const rate = stats.tokens_per_second;
  const parts = [stats.first_ms == null ? "" : `first word after ${duration(stats.first_ms)}`];
  if (stats.images_seen > 0) {
    const what = stats.images_seen === 1 ? "image" : `${stats.images_seen} images`;
    parts.push(`${what} seen in ${duration(stats.image_ms)}`);
  } else if (stats.images_known > 0) {
    const what = stats.images_known === 1 ? "image" : `${stats.images_known} images`;
    parts.push(`${what} already seen: ${duration(stats.image_ms)}`);
  }
  if (rate > 0) parts.push(`${rate < 10 ? rate.toFixed(1) : Math.round(rate)} tokens/s`);
  parts.push(plural(stats.tokens, "token"));
  if (stats.image_bytes > 0) parts.push(`image memory ${size(stats.image_bytes)}`);
  return parts.filter(Boolean);
}

/** A point of the picture (fractions) in words. */
function place({ x, y }) {
  const across = x < 1 / 3 ? "left" : x > 2 / 3 ? "right" : "";
  const down = y < 1 / 3 ? "upper" : y > 2 / 3 ? "lower" : "";
  if (across && down) return `in the ${down} ${across}`;
  if (across) return `on the ${across}`;
  return down ? `at the ${down === "upper" ? "top" : "bottom"}` : "in the middle";
}

/**
 * `text` as nodes, with a button for each of `words` (sorted {start, end, button}; start and end
 * count code points). A word and the punctuation that touches it stay on one line: browsers
 * would break a line between a button and its comma.
 */
function wordNodes(text, words) {
  const points = Array.from(text);
  const parts = [];
  let at = 0;
  for (const { start, end, button } of words) {
    if (start < at || end <= start || end > points.length) continue;
    parts.push(...points.slice(at, start).join("").split(/(\s+)/));
    button.textContent = points.slice(start, end).join("");
    parts.push(button);
    at = end;
  }
  parts.push(...points.slice(at).join("").split(/(\s+)/));
  const nodes = [];
  let clump = [];
  const close = () => {
    const length = clump.reduce((sum, part) => sum + (part.textContent ?? part).length, 0);
    if (clump.length > 1 && length <= 40) nodes.push(make("span.clump", {}, ...clump));
    else nodes.push(...clump);
    clump = [];
  };
  for (const part of parts) {
    if (part === "") continue;
    if (typeof part === "string" && /^\s/.test(part)) {
      close();
      nodes.push(part);
    } else clump.push(part);
  }
  close();
  return nodes;
}

/** Copies through the clipboard, or as browsers did before it (a page that is not https). */
async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    const area = make("textarea.unseen", { "aria-hidden": "true", tabindex: "-1" });
    const focused = document.activeElement;
    area.value = text;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    focused?.focus();
    return copied;
  }
}
