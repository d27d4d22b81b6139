// The conversation whose words light up the picture.
//
// `looking(element, host)` builds it in `element` and returns {update(state)}. The app and the
// exported page use the same files (the page_*.js come before this one); `host` is what differs:
//   live                      true in the app; the rest but looks and pictures only then
//   looks({exchange, layer, head})  -> where each word of an exchange looked, with its maps
//   pictures(ids)             -> [{id, name, width, height, src}]
//   download(format)          -> {name, text}
//   send(event, data)         edit {exchange, text}, retry {exchange}, example_select {id}
// The first three may also fail, by rejecting or with {error: a sentence}.
// What a model, a user or a file's name says is put in as text, never as markup.

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
  let leaving = 0; // the timer that ends a preview
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
    make(
      `button.action.download-${format}`, { type: "button", onclick: () => save(format) }, label,
    );
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
    if (!exchange || !finished(exchange)) return null;
    return book.view(exchange.id, said(exchange), layer, head);
  }

  const thresholdOf = (id) =>
    chosenThreshold ?? viewOf(exchangeOf(id))?.looks?.threshold ?? 0;

  function judge() {
    for (const [id, view] of views) view.judge(thresholdOf(id), hintId);
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
      if (!views.has(id)) {
        views.set(id, exchangeView(live, { send: host.send, again: book.again }));
      }
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
        make("h2", {}, live ? "Ask about a picture" : "Nothing was said"),
        make("p", {}, live
          ? "When the model has answered, point at any word of the question or the answer: the " +
            "picture shows where the model looked for it."
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

  /** What is shown of a word; of an old answer, or another model's, there may only be the mean. */
  function describe(word, { pictures: ids, layer, head }, doubtful) {
    const many = ids.length > 1;
    const who = word.role === "user" ? "asked" : "answered";
    const mean = (chosen, kept, what) => (chosen != null && kept == null ? `mean of ${what}` : "");
    const which = [
      layer == null ? mean(setting.layer, layer, "all layers") : `layer ${layer}`,
      head == null ? mean(setting.head, head, "all heads") : `head ${head + 1}`,
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
      const { names, grounding } = base?.words[active.index] ?? word;
      const doubtful = names && grounding < thresholdOf(exchange.id);
      stage.say(describe(word, chosen.looks, doubtful));
    }
    else if (active && chosen?.state === "asked") stage.say("Reading where it looked ...");
    else if (active && chosen?.state === "failed") stage.say("This map could not be read.");
    else if (active && chosen?.looks?.note) stage.say(chosen.looks.note);
    else if (base?.words.length) stage.say("Point at a word to see where the model looked for it.");
    else stage.say("");
  }

  function wordOf(target) {
    const button = target?.closest?.(".word");
    const item = button?.closest(".exchange");
    if (!item || !turns.contains(item)) return null;
    const exchange = state.exchanges.find(({ id }) => String(id) === item.dataset.id);
    return exchange ? { id: exchange.id, index: Number(button.dataset.index) } : null;
  }

  function point(word) {
    clearTimeout(leaving);
    if (preview?.id === word?.id && preview?.index === word?.index) return;
    preview = word;
    showWord();
  }

  /** The word with the keyboard's focus, shown again when the pointer leaves another one. */
  const focused = () =>
    turns.querySelector(".word:focus-visible") ? wordOf(document.activeElement) : null;

  function letGo() {
    clearTimeout(leaving);
    preview = pinned = null;
    showWord();
  }

  turns.addEventListener("pointerover", (event) => {
    const word = wordOf(event.target);
    if (word) point(word);
  });
  turns.addEventListener("pointerout", (event) => {
    if (!wordOf(event.target) || wordOf(event.relatedTarget)) return;
    // The gap between two words is crossed without going back to the plain picture.
    leaving = setTimeout(() => point(focused()), 100);
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
    event.target.closest(".word").focus(); // Safari does not
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
    const distances = boxes.map(distance);
    return distances.indexOf(Math.min(...distances));
  }

  // --- the whole ---------------------------------------------------------------------------

  async function save(format) {
    say(saved, "Being made …");
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
    say(saved, "");
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
      if (!word || views.get(word.id)?.has(word.index)) continue;
      if (word === preview) preview = null;
      if (word === pinned) pinned = null;
    }
    judge();
    showWord();
    if (atEnd && state.exchanges.length) log.scrollTop = log.scrollHeight;
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
