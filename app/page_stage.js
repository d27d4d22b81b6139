// The stage: pictures, the map of a word over them, and what can be set.

/** The pictures with the map of the word that is shown, and what can be set. */
function stageView(live, on) {
  const figures = make("div.figures");
  const empty = make("p.none", {}, "The picture of the conversation appears here.");
  const caption = make("p.caption", { role: "status", "aria-live": "polite" });
  const scale = make(
    "div.scale", { "aria-hidden": "true" },
    make("span", {}, "little attention"), make("span.bar"), make("span", {}, "most attention"),
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
    const row = make("label.control", {}, make("span", {}, label), input, output);
    return { input, output, row };
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
    const name = make("span.name", { dir: "auto" });
    const strongest = make("span.badge", { hidden: true }, "strongest");
    const below = make("figcaption", {}, name, strongest);
    const whole = make("figure", { "data-id": picture.id }, plain, heat, peak, below);
    whole.style.setProperty("--ratio", picture.width / picture.height || 1);
    return { whole, heat, peak, name, strongest };
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
      const { whole, name } = shownFigures.get(id);
      say(name, ids.length > 1 ? `${ids.indexOf(id) + 1}. ${picture.name}` : picture.name);
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
    const { input } = threshold;
    if (document.activeElement === input || Number(input.value) === value) return;
    input.value = value;
    threshold.output.textContent = value.toFixed(2);
  }

  return {
    node, setPictures, setWord, setModel, setThreshold,
    say: (text) => { if (caption.textContent !== text) caption.textContent = text; },
    about: (text) => say(about, text),
    opacity: () => Number(opacity.input.value),
  };
}
