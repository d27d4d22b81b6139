"""What the tabs are made of: the conversation's component, choosers, sliders, pieces of HTML."""

import html
import json
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from agevlm_mlx.errors import UserError

from . import catalogue, export
from .catalogue import Choice
from .session import Session, sentence
from .sessions import Sessions
from .uploads import Uploads

#: Tokens of the longest answer that the page asks for.
LONGEST = 8192
#: Answers that may wait for the model at the same time; each has a thread while it waits.
WAITING = 64
#: How a model is kept in memory: what the page says, bits.
PRECISIONS = {"As stored": None, "8 bits": 8, "4 bits": 4}
#: Events that the page shows nothing for while they run, and that no API lists.
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
#: Events that answer.
ANSWERS: dict[str, Any] = {**QUIET, "concurrency_limit": WAITING, "concurrency_id": "answers"}
#: Events that must not wait behind an answer.
AT_ONCE: dict[str, Any] = {**QUIET, "queue": False}

#: After page.js and SIDE, the name of one of several conversations of a page.
_GLUE = """
const root = element.querySelector(".looking");
const ask = (name, query) => server[name]({...query, key: props.value.key});
const view = looking(root, {
  live: true,
  looks: (query) => ask("looks", query),
  pictures: async (ids) => {
    const found = await ask("pictures", {ids});
    return Array.isArray(found) ? found : [];
  },
  download: (format) => ask("download", {format}),
  send: (event, data) => trigger(event, data), // "edit", "retry", "check", "example_select"
});
const show = () => {
  if (props.value) view.update(props.value);
  if (SIDE) root.style.display = props.value?.exchanges?.length ? "" : "none";
};
for (const part of SIDE ? root.querySelectorAll("section") : [])
  part.ariaLabel = `${SIDE}: ${part.ariaLabel}`; // landmarks must have different names
watch("value", show);
show();
"""


@dataclass(frozen=True)
class House:
    """What the tabs share: the conversations, the uploads, the models on offer.

    shared: strangers may see the page, so nobody may name a model that is not in the list.
    """

    sessions: Sessions
    uploads: Uploads
    extra_models: Sequence[Path] = ()
    shared: bool = False

    def session(self, request: gr.Request, side: str = "") -> Session:
        """The conversation of the browser's tab (side: one of Compare)."""
        return self.sessions.get(tab_of(request) + side)

    def files(self, request: gr.Request, paths: Iterable[str | None]) -> list[tuple[str, bytes]]:
        """(name, content) of uploads. ``UserError`` if one is gone."""
        return self.uploads.read(tab_of(request), [path for path in paths if path])

    def models(self) -> dict[str, str]:
        """Source of each model on this computer by its label, the default first. Sources may be
        paths, so the page gets labels."""
        return dict(catalogue.choices(self.extra_models))

    def choice(self, request: gr.Request, label: str | None, precision: str) -> Choice:
        """What a model chooser says; with nothing in it, the chat's model. ``UserError``."""
        if label and label.strip():
            source = catalogue.pick(label, self.extra_models, listed_only=self.shared)
        else:
            source = self.session(request).choice.source
        return Choice(source, PRECISIONS.get(precision))

    def chosen(self, choice: Choice) -> tuple[str | None, str]:
        """A choice as a model chooser says it: label or None, precision."""
        labels = [label for label, source in self.models().items() if source == choice.source]
        if choice.source is None:
            labels = list(self.models())
        precision = next(name for name, bits in PRECISIONS.items() if bits == choice.bits)
        return (labels[0] if labels else None), precision


def tab_of(request: gr.Request) -> str:
    """The name that Gradio has for a tab of the browser."""
    return request.session_hash or ""


# --- the conversation ----------------------------------------------------------------------------


def conversation(house: House, name: str, side: str = "") -> gr.HTML:
    """The component that shows a conversation whose words light up; its value is the state.

    side: what tells it from another one on the page, where an empty one is hidden.
    """

    def safely(query: Any, work: Callable[[Session, dict[str, Any]], Any]) -> Any:
        """What `work` makes of the query's session, or why not, in a sentence."""
        try:
            if not isinstance(query, dict) or not isinstance(query.get("key"), str):
                raise UserError("expected a question of this page, got another; reload it")
            session = house.sessions.by_key(query["key"])
            if session is None:
                raise UserError("this conversation is closed; reload the page")
            return work(session, query)
        except (UserError, RuntimeError) as error:
            return {"error": sentence(error)}
        except Exception:
            traceback.print_exc(file=sys.stderr)
            return {"error": "That did not work; the terminal says more."}

    def looks(query: Any) -> Any:
        def work(session: Session, query: dict[str, Any]) -> Any:
            found = (query.get(name) for name in ("exchange", "layer", "head"))
            exchange, layer, head = (n if isinstance(n, int) else None for n in found)
            return session.looks(-1 if exchange is None else exchange, layer, head)

        return safely(query, work)

    def pictures(query: Any) -> Any:
        def work(session: Session, query: dict[str, Any]) -> Any:
            ids = query.get("ids")
            return session.pictures([i for i in ids if isinstance(i, str)] if ids else [])

        return safely(query, work)

    def download(query: Any) -> Any:
        def work(session: Session, query: dict[str, Any]) -> Any:
            if query.get("format") == "html":
                return {"name": "conversation.html", "text": export.as_html(session)}
            return {"name": "conversation.json", "text": export.as_json(session)}

        return safely(query, work)

    return gr.HTML(
        html_template="<div class='looking'></div>",
        js_on_load=f"{export.script()}\nconst SIDE = {json.dumps(side)};{_GLUE}",
        apply_default_css=False,
        elem_id=name,
        server_functions=[looks, pictures, download],
    )


# --- choosing a model and how it answers ---------------------------------------------------------


def model_chooser(
    house: House, label: str, names: tuple[str, str], precision: str
) -> tuple[gr.Dropdown, gr.Radio]:
    """Components that choose a model and its precision; `names` are their ids in the page."""
    labels = list(house.models())
    source = gr.Dropdown(
        labels,
        value=labels[0] if labels else None,
        label=label,
        info=None if house.shared else "One of the list, or a folder or hub id that you type",
        allow_custom_value=not house.shared,
        elem_id=names[0],
    )
    return source, gr.Radio(list(PRECISIONS), value=precision, label="Precision", elem_id=names[1])


def progress_bar(part: float | None, step: str) -> str:
    """How far something is, 0..1 (None: not known), and what is being done."""
    told = html.escape(step)
    value = "" if part is None else f'value="{part:.3f}"'
    return (
        f'<div class="loading" role="status"><progress max="1" {value} '
        f'aria-label="{told}"></progress><span>{told}</span></div>'
    )


def told_html(text: str) -> str:
    return f'<p class="told" role="alert">{html.escape(text)}</p>'


def facts_html(facts: dict[str, str]) -> str:
    rows = (f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    return f'<dl class="facts">{"".join(rows)}</dl>'


def setting_controls() -> list[Any]:
    """Components for `settings_of` and `tune`, in their order."""
    with gr.Row():
        longest = gr.Number(precision=0, minimum=1, label="Longest answer, in tokens")
        temp = gr.Number(minimum=0, step=0.1, label="Temperature (0: always the likeliest word)")
        seed = gr.Textbox(label="Seed (empty: another each time)", max_lines=1)
    with gr.Row():
        top_p = gr.Slider(0.01, 1, step=0.01, label="Top-p")
        min_p = gr.Slider(0, 1, step=0.01, label="Min-p")
    with gr.Row():
        top_k = gr.Number(precision=0, minimum=0, label="Top-k (0: all)")
        penalty = gr.Number(minimum=0, step=0.05, label="Repetition penalty (1: none)")
        stop = gr.Textbox(label="Stop words, one in a line", max_lines=4)
    system = gr.Textbox(label="System prompt", lines=2, max_lines=6)
    return [longest, temp, seed, top_p, min_p, top_k, penalty, stop, system]


def settings_of(session: Session) -> list[Any]:
    """What the components of `setting_controls` show of a session."""
    chosen = session.sampling
    seed = "" if chosen.seed is None else str(chosen.seed)
    penalty = 1 if chosen.repetition_penalty is None else chosen.repetition_penalty
    likely = [chosen.top_p, chosen.min_p, chosen.top_k]
    stop = "\n".join(chosen.stop)
    return [chosen.max_tokens, chosen.temp, seed, *likely, penalty, stop, session.system]


def tune(session: Session, values: Sequence[Any]) -> None:
    """Give the session what the components say; what they do not show stays as it is.

    ``UserError`` says which is wrong.
    """
    longest, temp, seed, top_p, min_p, top_k, penalty, stop, system = values
    numbers = {"longest answer": longest, "temperature": temp, "top-k": top_k}
    for name, value in {**numbers, "repetition penalty": penalty}.items():
        if value is None:
            raise UserError(f"{name}: expected a number, got nothing")
    seed, stop, system = (str(text or "") for text in (seed, stop, system))
    if seed and not seed.strip().isdecimal():
        raise UserError(f"seed: expected a whole number or nothing, got {seed[:50]!r}")
    chosen = session.sampling
    # Unchanged: a stop word of the command line may hold a line break.
    changed = stop != "\n".join(chosen.stop)
    if longest != chosen.max_tokens and not 1 <= longest <= LONGEST:
        raise UserError(f"longest answer: expected 1 to {LONGEST} tokens, got {longest}")
    session.sampling = replace(
        chosen,
        max_tokens=int(longest),
        temp=temp,
        seed=int(seed) if seed.strip() else None,
        top_p=top_p,
        min_p=min_p,
        top_k=int(top_k),
        repetition_penalty=None if penalty == 1 else penalty,
        stop=tuple(filter(None, stop.split("\n"))) if changed else chosen.stop,
    )
    session.system = system.strip()


def note_uploads(house: House, component: Any) -> None:
    """Remember which tab has what is put into `component`, also if it is never sent."""

    def note(request: gr.Request, value: Any) -> None:
        paths = value["files"] if isinstance(value, dict) else [value]
        house.uploads.note(tab_of(request), [path for path in paths if path])

    component.change(note, component, **AT_ONCE)
