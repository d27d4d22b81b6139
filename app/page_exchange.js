// A question and its answer: texts, words, notes, what it took, and the buttons.

/** One question and its answer. `on` holds what its buttons do. */
function exchangeView(live, on) {
  const thumbs = make("div.thumbs");
  const asked = make("div.asked", { dir: "auto" });
  const answered = make("div.answered", { dir: "auto" });
  const progress = make("p.progress");
  const mark = make("p.mark");
  const error = make("p.error", { role: "alert", hidden: true });
  const notes = make("div.notes");
  const again = make(
    "button.again", { type: "button", onclick: () => on.again(shown.id) }, "Try again",
  );
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
  const check = button("check", "Check", () => on.send("check", { exchange: shown.id }));
  check.title = "Ask for each word of the answer by itself: is it in the picture?";
  const actions = live ? make("div.actions", {}, edit, retry, check, copy) : "";
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
  let judged = null; // what `judge` and `light` have drawn
  let lit = null;

  function openEditor() {
    if (editor) return;
    const text = make("textarea", { rows: 2, dir: "auto", "aria-label": "Edit the question" });
    text.value = shown.question;
    const save = make("button.action.save", { type: "submit" }, "Ask again");
    const cancel = make("button.action.cancel", { type: "button", onclick: closeEditor }, "Cancel");
    const hint = make(
      "p.hint", {}, "Ctrl + Enter asks, Escape cancels. Later questions are dropped.",
    );
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
    judged = lit = null;
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
    const there = Array.from(notes.children, (note) => note.textContent);
    if (JSON.stringify(there) !== JSON.stringify(said)) {
      notes.replaceChildren(...said.map((text) => make("p.note", {}, text)));
    }
    const failed = context.view?.state === "failed";
    pull.hidden = !failed;
    if (failed) {
      say(pull.firstChild, context.view.error || "It could not be read where the words looked.");
    }
    for (const one of [edit, retry, check, copy]) one.disabled = busy;
    copy.hidden = !exchange.answer;
    check.hidden = !exchange.answer || !context.view?.looks?.pictures?.length;
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
    if (judged === threshold) return;
    judged = threshold;
    for (const { word, button } of words) {
      const doubtful = word.names && word.grounding < threshold;
      button.classList.toggle("names", Boolean(word.names));
      button.style.setProperty("--g", word.grounding);
      button.classList.toggle("ungrounded", Boolean(doubtful));
      if (doubtful) button.setAttribute("aria-describedby", explanation);
      else button.removeAttribute("aria-describedby");
    }
  }

  /** Marks the word that is shown and the one that is pinned, by index or null. */
  function light(preview, pinned) {
    if (lit === `${preview} ${pinned}`) return;
    lit = `${preview} ${pinned}`;
    for (const { button, index } of words) {
      button.classList.toggle("shown", preview === index);
      button.setAttribute("aria-pressed", pinned === index);
    }
  }

  const has = (index) => words.some((word) => word.index === index);
  return { node, update, judge, light, has };
}
