// The conversation whose words light up the picture.
//
// `looking(element, host)` builds it in `element` and returns {update(state)}. The app and the
// exported page use the same file; `host` is what differs:
//   live                      true in the app; the rest but looks and pictures only then
//   looks({exchange, layer, head})  -> where each word of an exchange looked, with its maps
//   pictures(ids)             -> [{id, name, width, height, src}]
//   download(format)          -> {name, text}
//   send(event, data)         edit {exchange, text}, retry {exchange}, example_select {id}
// The first three may also fail, by rejecting or with {error: a sentence}.
// What a model, a user or a file's name says is put in as text, never as markup.

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

/** The pictures that were asked for, by id; `changed` is called when some have come. */
function gallery(host, changed) {
  const known = new Map();
  const tries = new Map();
  const pending = new Set();
  const get = (id) => known.get(id);
  async function want(ids) {
    const missing = ids.filter((id) => !known.has(id) && !pending.has(id) && !(tries.get(id) > 2));
    if (!missing.length) return;
    missing.forEach((id) => pending.add(id));
    let found = [];
    try {
      const told = await host.pictures(missing);
      if (Array.isArray(told)) found = told;
    } catch {
      // Tried again with a later update, three times in all.
    }
    for (const picture of found) known.set(picture.id, picture);
    for (const id of missing) {
      pending.delete(id);
      tries.set(id, (tries.get(id) ?? 0) + 1);
    }
    if (found.length) changed();
  }
  return { get, want };
}

/** Where words looked, exchange by exchange: asked for once, kept, forgotten with the exchange. */
function lookbook(host, changed) {
  const kept = new Map(); // exchange id -> {said, views: "layer|head" -> {state, looks}}
  const waiting = [];
  let asking = false;

  function forget(known) {
    for (const [id, entry] of kept) if (known.get(id) !== entry.said) kept.delete(id);
  }

  /** {state: "asked" | "ready" | "failed", looks, error}; `said` is what the maps belong to. */
  function view(id, said, layer = null, head = null) {
    if (!kept.has(id)) kept.set(id, { said, views: new Map() });
    const { views } = kept.get(id);
    const name = `${layer}|${head}`;
    let found = views.get(name);
    if (!found) {
      found = { state: "asked", looks: null, error: "", query: { exchange: id, layer, head } };
      views.set(name, found);
      const old = [...views.keys()].filter((key) => key !== "null|null");
      if (old.length > 12) views.delete(old[0]);
      waiting.push(found);
      ask();
    }
    return found;
  }

  function again(id) {
    kept.delete(id);
    changed();
  }

  /** One at a time, the newest wish first: the model's thread answers one after the other. */
  async function ask() {
    if (asking) return;
    asking = true;
    for (let next = waiting.pop(); next; next = waiting.pop()) {
      if (![...(kept.get(next.query.exchange)?.views.values() ?? [])].includes(next)) continue;
      try {
        const looks = await host.looks(next.query);
        if (Array.isArray(looks?.words)) next.looks = looks;
        else next.error = looks?.error ?? "";
      } catch {
        // Said with the exchange, where it can be tried again.
      }
      next.state = next.looks ? "ready" : "failed";
      changed();
    }
    asking = false;
  }

  return { view, again, forget };
}

/** One question and its answer. `on` holds what its buttons do. */
function exchangeView(live, on) {
  const thumbs = make("div.thumbs");
  const asked = make("div.asked", { dir: "auto" });
  const answered = make("div.answered", { dir: "auto" });
  const progress = make("p.progress");
  const mark = make("p.mark");
  const error = make("p.error", { role: "alert", hidden: true });
  const notes = make("div.notes");
  const again = make("button.again", { type: "button", onclick: () => on.again(shown.id) }, "Try again");
  const pull = make("p.note.pull", { hidden: true }, make("span"), " ", again);
  const stats = make("p.stats");
  const button = (name, label, act) =>
    make(`button.action.${name}`, { type: "button", onclick: act }, label);
  const edit = button("edit", "Edit", openEditor);
  const retry = button("retry", "Retry", () => on.send("retry", { exchange: shown.id }));
  const copy = button("copy", "Copy", async () => {
    copy.textContent = (await copyText(shown.answer)) ? "Copied" : "Could not copy";
    setTimeout(() => (copy.textContent = "Copy"), 1600);
  });
  const actions = live ? make("div.actions", {}, edit, retry, copy) : "";
  const question = make("div.question", {}, make("span.unseen", {}, "Question: "), thumbs, asked);
  const answer = make(
    "div.answer", {}, make("span.unseen", {}, "Answer: "), progress, answered, mark,
  );
  const node = make(
    "li.exchange", {}, question, answer, error, notes, pull, make("div.foot", {}, stats, actions),
  );
  let shown = {};
  let editor = null;
  let busy = false;
  let drawn = null;
  let words = []; // {word, index, button}

  function openEditor() {
    if (editor) return;
    const text = make("textarea", { rows: 2, dir: "auto", "aria-label": "Edit the question" });
    text.value = shown.question;
    const save = make("button.action.save", { type: "submit" }, "Ask again");
    const cancel = make("button.action.cancel", { type: "button", onclick: closeEditor }, "Cancel");
    const hint = make("p.hint", {}, "Ctrl + Enter asks, Escape cancels. Later questions are dropped.");
    editor = make("form.editor", {
      onsubmit: (event) => {
        event.preventDefault();
        const changed = text.value.trim();
        if (!changed || busy) return;
        closeEditor();
        on.send("edit", { exchange: shown.id, text: changed });
      },
      oninput: () => (save.disabled = busy || !text.value.trim()),
      onkeydown: (event) => {
        if (event.key === "Escape") closeEditor();
        else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) editor.requestSubmit();
        else return;
        event.preventDefault();
        event.stopPropagation();
      },
    }, text, make("div.actions", {}, save, cancel), hint);
    asked.hidden = true;
    edit.hidden = true;
    question.append(editor);
    text.focus();
    text.setSelectionRange(text.value.length, text.value.length);
  }

  function closeEditor() {
    if (!editor) return;
    editor.remove();
    editor = null;
    asked.hidden = false;
    edit.hidden = false;
    edit.focus();
  }

  function progressText({ state, ahead, pictures, answer }) {
    if (state === "waiting") {
      return ahead > 0 ? `Waiting: ${plural(ahead, "question")} before yours` : "Waiting";
    }
    if (state === "reading") {
      const what = pictures.length > 1 ? "pictures" : "picture";
      return pictures.length ? `Looking at the ${what}` : "Reading the question";
    }
    return state === "answering" && !answer ? "Answering" : "";
  }

  function markText({ state, stats }) {
    if (state === "stopped") return "stopped";
    return stats?.finish === "length" ? "cut off: the limit of new tokens was reached" : "";
  }

  /** The texts as words, once it is known where each looked; before that as they come. */
  function drawTexts(looks) {
    const signature = looks ?? `${shown.question}\u0000${shown.answer}`;
    if (drawn === signature) return;
    drawn = signature;
    words = (looks?.words ?? []).map((word, index) => ({
      word,
      index,
      button: make("button.word", {
        type: "button", "data-role": word.role, "data-index": index, "aria-pressed": "false",
        tabindex: "-1",
      }),
    }));
    for (const [place, role, text] of [
      [asked, "user", shown.question],
      [answered, "assistant", shown.answer],
    ]) {
      const own = words
        .filter(({ word }) => word.role === role)
        .map(({ word, button }) => ({ start: word.start, end: word.end, button }))
        .sort((a, b) => a.start - b.start);
      if (own.length) place.replaceChildren(...wordNodes(text, own));
      else if (place.textContent !== text) place.textContent = text;
      place.querySelector(".word")?.setAttribute("tabindex", "0");
      place.classList.toggle("lit", own.length > 0);
    }
    words = words.filter(({ button }) => button.isConnected || node.contains(button));
  }

  function update(exchange, context) {
    if (editor && exchange.question !== shown.question) closeEditor();
    shown = exchange;
    busy = context.busy;
    node.dataset.id = exchange.id;
    node.dataset.state = exchange.state;
    const running = ["waiting", "reading", "answering"].includes(exchange.state);
    answer.setAttribute("aria-busy", running);
    drawTexts(context.view?.looks ?? null);
    say(progress, progressText(exchange));
    say(mark, markText(exchange));
    say(error, exchange.error ?? "");
    drawStats([...(exchange.stats ? statsParts(exchange.stats) : []), context.by].filter(Boolean));
    const said = [...(exchange.notes ?? []), context.view?.looks?.note].filter(Boolean);
    if (notes.childElementCount !== said.length || said.some((t, i) => notes.children[i].textContent !== t)) {
      notes.replaceChildren(...said.map((text) => make("p.note", {}, text)));
    }
    const failed = context.view?.state === "failed";
    pull.hidden = !failed;
    if (failed) say(pull.firstChild, context.view.error || "It could not be read where the words looked.");
    for (const one of [edit, retry, copy]) one.disabled = busy;
    copy.hidden = !exchange.answer;
    drawThumbs(context.gallery);
  }

  function drawStats(parts) {
    if (stats.textContent === parts.join(" · ")) return;
    const last = parts.length - 1;
    stats.replaceChildren(...parts.flatMap((part, n) =>
      n < last ? [make("span", {}, `${part} ·`), " "] : [make("span", {}, part)]));
  }

  function drawThumbs(pictures) {
    const found = shown.pictures.map(pictures.get).filter(Boolean);
    if (thumbs.childElementCount === found.length) return;
    thumbs.replaceChildren(
      ...found.map((picture) => make("img", { src: picture.src, alt: picture.name })),
    );
  }

  /** Underlines what may name a thing and was looked for nowhere definite. */
  function judge(threshold, explanation) {
    for (const { word, button } of words) {
      const doubtful = word.names && word.grounding < threshold(shown.id);
      button.classList.toggle("names", Boolean(word.names));
      button.style.setProperty("--g", word.grounding);
      button.classList.toggle("ungrounded", Boolean(doubtful));
      if (doubtful) button.setAttribute("aria-describedby", explanation);
      else button.removeAttribute("aria-describedby");
    }
  }

  function light(preview, pinned) {
    for (const { button, index } of words) {
      button.classList.toggle("shown", preview === index);
      button.setAttribute("aria-pressed", pinned === index);
    }
  }

  return { node, update, judge, light, wordAt: (index) => words.find((w) => w.index === index)?.word };
}

/** The pictures with the map of the word that is shown, and what can be set. */
function stageView(live, on) {
  const figures = make("div.figures");
  const empty = make("p.none", {}, "The picture of the conversation appears here.");
  const caption = make("p.caption", { role: "status", "aria-live": "polite" });
  const scale = make(
    "div.scale", { "aria-hidden": "true" },
    make("span", {}, "little attention"), make("span.bar"), make("span", {}, "the word's most"),
  );
  const slider = (name, label, value, act) => {
    const output = make("output");
    const input = make(`input.${name}`, {
      type: "range", min: 0, max: 1, step: 0.01, value,
      oninput: () => {
        output.textContent = Number(input.value).toFixed(2);
        act(Number(input.value));
      },
    });
    output.textContent = Number(value).toFixed(2);
    return { input, output, row: make("label.control", {}, make("span", {}, label), input, output) };
  };
  const opacity = slider("opacity", "Map over picture", 0.75, on.opacity);
  const threshold = slider("threshold", "Underline below", 0.2, on.threshold);
  const choose = (name, label) => {
    const select = make(`select.${name}`, { onchange: () => on.view(number(layer), number(head)) });
    return { select, row: make("label.control", {}, make("span", {}, label), select) };
  };
  const number = ({ select }) => (select.value === "" ? null : Number(select.value));
  const layer = choose("layer", "Layer");
  const head = choose("head", "Head");
  const about = make("p.about");
  const legend = make(
    "details.legend", {},
    make("summary", {}, "What an underline proves, and what it does not"),
    make("p", {},
      "A map shows where the model looked while it read or chose a word. It does not show why it ",
      "answered so."),
    make("p", {},
      make("span.sample", {}, "A wavy underline"),
      " says: this word may name something to see, and the model looked at nothing definite for ",
      "it. Its grounding (the share of its attention on the picture, times how concentrated that ",
      "is) is below the threshold. Check such a word; it is not proved wrong."),
    make("p", {},
      "The stronger a word is lit, the higher its grounding. ",
      "A word without underline is not proved right: a model can look at one definite place and ",
      "still be mistaken about what is there."),
    about,
    make("p", {},
      "Keyboard: Tab goes to a text, the arrow keys from word to word, Enter keeps a word shown, ",
      "Escape lets it go."),
  );
  const node = make(
    "section.stage", { "aria-label": "Where the model looked" },
    make("div.view", {}, make("div.easel", {}, empty, figures), caption, scale),
    make(
      "div.settings", {},
      make("div.controls", {}, opacity.row, threshold.row, ...(live ? [layer.row, head.row] : [])),
      legend,
    ),
  );
  const shownFigures = new Map();
  let kinds = "";

  function figure(picture) {
    const plain = make("img.plain", { src: picture.src, alt: picture.name });
    const heat = make("img.heat", { alt: "", hidden: true });
    const peak = make("span.peak", { hidden: true, "aria-hidden": "true" });
    const name = make("span.name", { dir: "auto" }, picture.name);
    const strongest = make("span.badge", { hidden: true }, "strongest");
    const whole = make(
      "figure", { "data-id": picture.id }, plain, heat, peak, make("figcaption", {}, name, strongest),
    );
    whole.style.setProperty("--ratio", picture.width / picture.height || 1);
    return { whole, heat, peak, strongest };
  }

  /** The pictures that have come, in the order of `ids`. */
  function setPictures(ids, pictures) {
    for (const [id, { whole }] of shownFigures) {
      if (ids.includes(id)) continue;
      whole.remove();
      shownFigures.delete(id);
    }
    let next = figures.firstChild;
    for (const id of ids) {
      const picture = pictures.get(id);
      if (!picture) continue;
      if (!shownFigures.has(id)) shownFigures.set(id, figure(picture));
      const { whole } = shownFigures.get(id);
      if (whole === next) next = next.nextSibling;
      else figures.insertBefore(whole, next);
    }
    figures.dataset.count = shownFigures.size;
    empty.hidden = ids.length > 0;
  }

  /** Lays the maps of `word` over the pictures `ids`; none: the pictures alone. */
  function setWord(word, ids) {
    for (const [id, { whole, heat, peak, strongest }] of shownFigures) {
      const m = word ? ids.indexOf(id) : -1;
      const src = word?.layers?.[m];
      if (src && heat.getAttribute("src") !== src) heat.src = src;
      heat.hidden = !src;
      const best = Boolean(word?.peak) && word.peak.picture === m;
      whole.classList.toggle("dim", Boolean(word));
      whole.classList.toggle("strongest", best && ids.length > 1);
      strongest.hidden = !(best && ids.length > 1);
      peak.hidden = !best;
      if (!best) continue;
      const [left, top, right, bottom] = word.peak.box;
      const inside = (value, from, to) => `${(100 * (value - from)) / (to - from || 1)}%`;
      peak.style.left = `${100 * left}%`;
      peak.style.top = `${100 * top}%`;
      peak.style.width = `${100 * (right - left)}%`;
      peak.style.height = `${100 * (bottom - top)}%`;
      peak.style.setProperty("--x", inside(word.peak.x, left, right));
      peak.style.setProperty("--y", inside(word.peak.y, top, bottom));
    }
  }

  function setModel(model) {
    const wanted = JSON.stringify([model?.layers ?? [], model?.heads ?? 0]);
    if (!live || wanted === kinds) return;
    kinds = wanted;
    const options = (select, all, labels) => {
      const keep = select.value;
      select.replaceChildren(make("option", { value: "" }, all));
      labels.forEach((label, n) => select.append(make("option", { value: n }, label)));
      select.value = keep < labels.length ? keep : "";
    };
    const layers = model?.layers ?? [];
    options(layer.select, "mean of all layers", layers.map((label) => `layer ${label}`));
    options(head.select, "mean of all heads",
      Array.from({ length: model?.heads ?? 0 }, (_, n) => `head ${n + 1}`));
    layer.row.hidden = layers.length === 0;
    head.row.hidden = !model?.heads;
    on.view(number(layer), number(head));
  }

  function setThreshold(value) {
    if (document.activeElement === threshold.input || Number(threshold.input.value) === value) return;
    threshold.input.value = value;
    threshold.output.textContent = value.toFixed(2);
  }

  return {
    node, setPictures, setWord, setModel, setThreshold,
    say: (text) => { if (caption.textContent !== text) caption.textContent = text; },
    about: (text) => say(about, text),
    opacity: () => Number(opacity.input.value),
  };
}

/** Builds the page in `element`; see the top of the file. */
function looking(element, host) {
  const live = Boolean(host.live);
  const hintId = `looking-${Math.random().toString(36).slice(2)}`;
  const pictures = gallery(host, draw);
  const book = lookbook(host, draw);
  const views = new Map(); // exchange id -> exchangeView
  const seen = new Map(); // exchange id -> its last state
  let state = { exchanges: [], examples: [], busy: false, model: null };
  let preview = null; // {id, index} of the word under the pointer or with the focus
  let pinned = null;
  let setting = { layer: null, head: null };
  let chosenThreshold = null;
  let lastKey;

  const stage = stageView(live, {
    opacity: (value) => element.style.setProperty("--map", value),
    threshold: (value) => { chosenThreshold = value; judge(); showWord(); },
    view: (layer, head) => { setting = { layer, head }; showWord(); },
  });
  const turns = make("ol.turns");
  const empty = make("div.empty");
  const log = make(
    "div.log",
    // What was answered is told below, whole; a log would read out every piece of it.
    live ? { role: "log", "aria-label": "Conversation", "aria-live": "off", tabindex: "0" } : {},
    empty, turns,
  );
  const told = make("p.unseen.told", { role: "status" });
  const saved = make("span.saved", { role: "status" });
  const download = (format, label) =>
    make(`button.action.download-${format}`, { type: "button", onclick: () => save(format) }, label);
  const downloads = live
    ? make("div.downloads", { hidden: true }, make("span", {}, "Keep this conversation:"),
        download("html", "Web page"), download("json", "JSON"), saved)
    : make("div", { hidden: true });
  const hint = make("span", { id: hintId, hidden: true },
    "not grounded: the model looked at nothing definite in the picture for this word");
  element.classList.toggle("live", live);
  element.replaceChildren(
    make("div.columns", {}, make("section.talk", { "aria-label": "Questions and answers" },
      log, downloads, told, hint), stage.node),
  );
  element.style.setProperty("--map", stage.opacity());

  // --- what is said ------------------------------------------------------------------------

  const finished = (exchange) => exchange.state === "done" || exchange.state === "stopped";
  const said = (exchange) => `${exchange.state}\u0000${exchange.question}\u0000${exchange.answer}`;
  const exchangeOf = (id) => state.exchanges.find((exchange) => exchange.id === id);

  /** Where the words of an exchange looked, as far as it is known; asks if it is not. */
  function viewOf(exchange, layer = null, head = null) {
    return exchange && finished(exchange) ? book.view(exchange.id, said(exchange), layer, head) : null;
  }

  const thresholdOf = (id) =>
    chosenThreshold ?? viewOf(exchangeOf(id))?.looks?.threshold ?? 0;

  function judge() {
    for (const view of views.values()) view.judge(thresholdOf, hintId);
  }

  function drawExchanges() {
    const models = new Set(state.exchanges.map((exchange) => exchange.model));
    if (state.model) models.add(state.model.name);
    const ids = new Set(state.exchanges.map((exchange) => exchange.id));
    for (const [id, view] of views) {
      if (ids.has(id)) continue;
      view.node.remove();
      views.delete(id);
      seen.delete(id);
    }
    let next = turns.firstChild;
    for (const exchange of state.exchanges) {
      const { id } = exchange;
      if (!views.has(id)) views.set(id, exchangeView(live, { send: host.send, again: book.again }));
      const view = views.get(id);
      view.update(exchange, {
        busy: state.busy,
        by: models.size > 1 ? exchange.model : "",
        gallery: pictures,
        view: viewOf(exchange),
      });
      if (view.node === next) next = next.nextSibling;
      else turns.insertBefore(view.node, next);
      if (seen.has(id) && seen.get(id) !== exchange.state && finished(exchange)) {
        say(told, `Answer: ${exchange.answer}`);
        told.hidden = false;
      }
      seen.set(id, exchange.state);
    }
    turns.hidden = state.exchanges.length === 0;
  }

  /** Before the first question: what this is, and examples to begin with. */
  function drawEmpty() {
    const examples = state.exchanges.length || !live ? [] : (state.examples ?? []);
    const have = examples.map(({ id }) => Boolean(pictures.get(id)));
    const signature = JSON.stringify([state.exchanges.length > 0, examples, have]);
    empty.hidden = state.exchanges.length > 0;
    if (empty.dataset.drawn !== signature) {
      empty.dataset.drawn = signature;
      const cards = examples.map(({ id, question }) => {
        const picture = pictures.get(id);
        const thumb = picture ? make("img", { src: picture.src, alt: "" }) : make("span.blank");
        return make("button.example", {
          type: "button", "data-id": id, onclick: () => host.send("example_select", { id }),
        }, thumb, make("span", { dir: "auto" }, question));
      });
      empty.replaceChildren(
        make("h2", {}, live ? "See where every word looks" : "Nothing was said"),
        make("p", {}, live
          ? "Give the model a picture and ask about it. When it has answered, point at any word: " +
            "the picture shows where the model looked for it."
          : "This conversation has no questions."),
        ...(cards.length ? [make("p.or", {}, "Or begin with an example:")] : []),
        make("div.examples", {}, ...cards),
      );
    }
    for (const card of empty.querySelectorAll(".example")) card.disabled = state.busy;
  }

  // --- what is looked at -------------------------------------------------------------------

  /** The exchange whose pictures stand on the stage: that of the word shown, else the last. */
  const onStage = () => exchangeOf((preview ?? pinned)?.id) ?? state.exchanges.at(-1);

  function picturesUpTo(exchange) {
    const from = viewOf(exchange)?.looks?.pictures;
    if (from?.length) return from;
    const ids = [];
    for (const one of state.exchanges) {
      for (const id of one.pictures) if (!ids.includes(id)) ids.push(id);
      if (one === exchange) break;
    }
    return ids;
  }

  function describe(word, ids, doubtful) {
    const many = ids.length > 1;
    const who = word.role === "user" ? "asked" : "answered";
    const { layer, head } = setting;
    const which = [
      layer == null ? "" : `layer ${state.model?.layers?.[layer] ?? layer + 1}`,
      head == null ? "" : `head ${head + 1}`,
    ].filter(Boolean);
    const parts = [`grounding ${word.grounding.toFixed(2)}`];
    if (doubtful) parts[0] += ", not grounded";
    if (word.null !== false) {
      const share = Math.round(100 * word.on_image);
      parts.push(`${share} % of its attention on the picture${many ? "s" : ""}`);
    }
    if (word.peak && word.layers.some(Boolean)) {
      const whose = many ? ` of picture ${word.peak.picture + 1}` : "";
      parts.push(`strongest ${place(word.peak)}${whose}`);
    } else parts.push("next to nothing in the picture");
    const text = Array.from(word.text);
    const short = text.length > 40 ? `${text.slice(0, 40).join("")} ...` : word.text;
    return `${[`${short} (${who})`, ...which].join(", ")}: ${parts.join("; ")}`;
  }

  function showWord() {
    const exchange = onStage();
    const ids = exchange ? picturesUpTo(exchange) : [];
    pictures.want(ids);
    stage.setPictures(ids, pictures);
    const active = preview ?? pinned;
    for (const [id, view] of views) {
      view.light(active?.id === id ? active.index : null, pinned?.id === id ? pinned.index : null);
    }
    const base = viewOf(exchange)?.looks;
    if (base) stage.setThreshold(chosenThreshold ?? base.threshold ?? 0);
    stage.about(base?.about ?? "");
    // Asked for with the setting, so that a map is there when a word is pointed at.
    const chosen = viewOf(exchange, setting.layer, setting.head);
    const word = active && chosen?.looks?.words[active.index];
    stage.setWord(word ?? null, chosen?.looks?.pictures ?? ids);
    if (word) {
      const { names, grounding } = base.words[active.index];
      stage.say(describe(word, chosen.looks.pictures, names && grounding < thresholdOf(exchange.id)));
    }
    else if (active && chosen?.state === "asked") stage.say("Reading where it looked ...");
    else if (active && chosen?.state === "failed") stage.say("This map could not be read.");
    else stage.say(base?.words.length ? "Point at a word to see where the model looked for it." : "");
  }

  function wordOf(target) {
    const button = target?.closest?.(".word");
    const item = button?.closest(".exchange");
    if (!item || !turns.contains(item)) return null;
    const exchange = state.exchanges.find(({ id }) => String(id) === item.dataset.id);
    return exchange ? { id: exchange.id, index: Number(button.dataset.index) } : null;
  }

  function point(word) {
    if (preview?.id === word?.id && preview?.index === word?.index) return;
    preview = word;
    showWord();
  }

  /** The word with the keyboard's focus, shown again when the pointer leaves another one. */
  const focused = () =>
    turns.querySelector(".word:focus-visible") ? wordOf(document.activeElement) : null;

  function letGo() {
    preview = pinned = null;
    showWord();
  }

  turns.addEventListener("pointerover", (event) => {
    const word = wordOf(event.target);
    if (word) point(word);
  });
  turns.addEventListener("pointerout", (event) => {
    if (wordOf(event.target) && !wordOf(event.relatedTarget)) point(focused());
  });
  turns.addEventListener("focusin", (event) => {
    const word = wordOf(event.target);
    if (!word) return;
    const text = event.target.closest(".asked, .answered");
    for (const other of text.querySelectorAll('.word[tabindex="0"]')) other.tabIndex = -1;
    event.target.tabIndex = 0;
    if (event.target.matches(":focus-visible")) point(word);
  });
  turns.addEventListener("focusout", (event) => {
    if (wordOf(event.target) && !wordOf(event.relatedTarget)) point(null);
  });
  turns.addEventListener("click", (event) => {
    const word = wordOf(event.target);
    if (!word) return;
    const same = pinned?.id === word.id && pinned.index === word.index;
    pinned = same ? null : word;
    showWord();
  });
  turns.addEventListener("keydown", (event) => {
    if (!wordOf(event.target)) return;
    const text = event.target.closest(".asked, .answered");
    const all = [...text.querySelectorAll(".word")];
    const at = all.indexOf(event.target);
    const forward = getComputedStyle(text).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
    const to = {
      [forward]: at + 1,
      [forward === "ArrowRight" ? "ArrowLeft" : "ArrowRight"]: at - 1,
      ArrowDown: nextLine(all, at, 1),
      ArrowUp: nextLine(all, at, -1),
      Home: 0,
      End: all.length - 1,
    }[event.key];
    if (to === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    all[Math.min(Math.max(to, 0), all.length - 1)].focus();
  });
  element.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && (preview || pinned)) letGo();
  });

  /** The word nearest below (1) or above (-1) that at `at`. */
  function nextLine(all, at, way) {
    const boxes = all.map((word) => word.getBoundingClientRect());
    const here = boxes[at];
    const other = boxes.filter((box) => way * (box.top - here.top) > here.height / 2);
    if (!other.length) return at;
    const line = way * Math.min(...other.map((box) => way * box.top));
    const distance = (box) =>
      Math.abs(box.top - line) > here.height / 2 ? Infinity : Math.abs(box.left - here.left);
    return boxes.reduce((best, box, n) => (distance(box) < distance(boxes[best]) ? n : best), 
      boxes.findIndex((box) => distance(box) < Infinity));
  }

  // --- the whole ---------------------------------------------------------------------------

  async function save(format) {
    say(saved, "");
    let file = null;
    try {
      file = await host.download(format);
    } catch {
      // Said below.
    }
    if (typeof file?.text !== "string") {
      say(saved, file?.error ?? "It could not be made; try again.");
      return;
    }
    const type = format === "html" ? "text/html" : "application/json";
    const url = URL.createObjectURL(new Blob([file.text], { type }));
    make("a", { href: url, download: file.name }).click();
    setTimeout(() => URL.revokeObjectURL(url), 60000);
  }

  /** Everything from the state; what has not changed is not touched. */
  function draw() {
    const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 48;
    book.forget(new Map(state.exchanges.map((exchange) => [exchange.id, said(exchange)])));
    pictures.want(state.exchanges.flatMap((exchange) => exchange.pictures));
    if (!state.exchanges.length) pictures.want((state.examples ?? []).map(({ id }) => id));
    drawEmpty();
    drawExchanges();
    downloads.hidden = !live || state.exchanges.length === 0;
    element.classList.toggle("blank", state.exchanges.length === 0);
    for (const word of [preview, pinned]) {
      if (!word || views.get(word.id)?.wordAt(word.index)) continue;
      if (word === preview) preview = null;
      if (word === pinned) pinned = null;
    }
    judge();
    showWord();
    if (atEnd) log.scrollTop = log.scrollHeight;
  }

  function update(next) {
    const newest = next.exchanges.at(-1)?.id;
    const before = state.exchanges.at(-1)?.id;
    if (lastKey !== undefined && next.key !== lastKey) book.forget(new Map());
    if (before !== undefined && newest !== before) preview = pinned = null;
    lastKey = next.key;
    state = next;
    stage.setModel(next.model);
    draw();
  }

  return { update };
}
