// What the page asks its host for once and keeps: pictures, and where words looked.

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
      if (Array.isArray(told)) found = told.filter((picture) => picture?.src);
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
