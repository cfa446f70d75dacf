"""The page of `mvsplit app`, in gradio (extra `app`). It asks nothing of any network but its own
server: no statistics, no fonts from elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvsplit.cli import app_drawing as limits
from mvsplit.cli.app_drawing import Drawing, Wish
from mvsplit.cli.subject import Subject
from mvsplit.errors import UserError, needs_extra
from mvsplit.sampling import SAMPLERS

QUIET = {  # read by gradio and what it uses when they are imported
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
}
HOST = "127.0.0.1"
_WAITING = 16  # wishes at most; the next is told to come again
_FULL = (
    "⚠ The queue is full: other drawings wait for their turn already, as many as may. Yours is not "
    "among them; press draw again in a minute."
)
_CSS = """
.gradio-container {max-width: 1100px !important; width: 100%; margin: 0 auto;}
#preview img, #gallery img {image-rendering: pixelated;}
#gallery .grid-wrap {height: auto !important; max-height: none !important; overflow: auto;}
#gallery {height: auto !important; min-height: 0 !important;}
@media (max-width: 640px) {
  #gallery .grid-container {grid-template-columns: repeat(2, minmax(0, 1fr)) !important;}
}
"""
_FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}


def load_gradio(cache: Path) -> Any:
    """gradio, told to keep quiet and to copy files to `cache`.

    Raises:
        UserError: the extra `app` is not installed.
    """
    os.environ.update(QUIET, GRADIO_TEMP_DIR=str(cache))
    with needs_extra("app"):
        import gradio
    return gradio


def build_page(gradio: Any, subject: Subject, drawing: Drawing) -> Any:
    """The page as gradio's Blocks, with one queue in which drawings wait for each other."""
    with gradio.Blocks(title="mvsplit", analytics_enabled=False) as page:
        gradio.Markdown(f"## mvsplit\n{_what(subject)}")
        with gradio.Row():
            with gradio.Column(scale=2, min_width=300):
                inputs, status, start, stop = _controls(gradio, subject)
            with gradio.Column(scale=3, min_width=300):
                preview = gradio.Image(
                    label="where it leads", elem_id="preview", visible=False, buttons=[]
                )
                gallery = gradio.Gallery(
                    show_label=False,
                    elem_id="gallery",
                    columns=4,
                    object_fit="contain",
                    height="auto",
                    buttons=["download", "download_all", "fullscreen"],
                )
        _connect(gradio, drawing, inputs, (start, stop), [status, preview, gallery])
    return page.queue(max_size=_WAITING, default_concurrency_limit=1)


def _connect(
    gradio: Any, drawing: Drawing, inputs: list[Any], buttons: tuple[Any, Any], outputs: list[Any]
) -> None:
    """Lets the two buttons, and Enter in the prompt, do what they say."""

    def enlist(request: Any) -> tuple[Any, ...]:
        return drawing.enlist(request.session_hash), "Waiting for its turn …"

    def updates(request: Any, ticket: int, *values: Any) -> Iterator[tuple[Any, ...]]:
        yield from _updates(gradio, drawing, values, request.session_hash, ticket)

    def end(request: Any) -> Any:
        # What is being drawn says itself that it ends: of two that write what the page shows one
        # may overtake the other.
        waited = drawing.stop(request.session_hash)
        return limits.STOPPED.status if waited else gradio.skip()

    def refused(request: Any, ticket: int) -> Any:
        # The page's queue lets a wish in or turns it away; of one that it let in, `updates` has
        # said how it ended, and its ticket is gone.
        full = drawing.waits(ticket, request.session_hash)
        drawing.drop(ticket)
        return _FULL if full else gradio.skip()

    for function in (enlist, updates, end, refused):  # gradio reads from it what to pass
        function.__annotations__["request"] = gradio.Request

    start, stop = buttons
    status, *_ = outputs
    # In the page, so that each wish takes its own along: a State is read when the turn has come.
    ticket = gradio.Number(precision=0, visible="hidden")
    quietly = {"show_progress": "hidden", "api_visibility": "private"}
    for trigger in (start.click, inputs[0].submit):
        enlisted = trigger(enlist, None, [ticket, status], queue=False, **quietly)
        drawn = enlisted.then(
            updates,
            [ticket, *inputs],
            outputs,
            concurrency_limit=1,
            concurrency_id="drawing",
            trigger_mode="multiple",  # or one that waits would keep what is wished next from it
            **quietly,
        )
        drawn.failure(refused, ticket, status, queue=False, **quietly)
    stop.click(end, None, status, queue=False, **quietly)


@dataclass(frozen=True, kw_only=True)
class Served:
    """A page that is being served. `close` ends that."""

    url: str
    page: Any

    def close(self) -> None:
        self.page.close(verbose=False)


def serve_page(gradio: Any, page: Any, folder: Path, port: int) -> Served:
    """Serves on this machine only, pictures from `folder` among the rest."""
    _, url, _ = page.launch(
        server_name=HOST,
        server_port=port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        max_file_size="1mb",
        allowed_paths=[str(folder)],
        css=_CSS,
        theme=gradio.themes.Default(**_FONTS),
    )
    return Served(url=url, page=page)


def _what(subject: Subject) -> str:
    height, width = subject.shape[1:]
    size = f"{width * subject.codec.multiple}×{height * subject.codec.multiple} pixels"
    run = subject.record.get("run")
    name = subject.title if run is None else f"{Path(run).name}, {subject.title}"
    return f"{name}, {len(subject.model.blocks)} layers, {size}"


def _controls(gradio: Any, subject: Subject) -> tuple[list[Any], Any, Any, Any]:
    """The fields of a `Wish` in its order, the line that says how it stands, and two buttons."""
    words = getattr(subject.embedder, "vocabulary", None)
    inputs = [
        gradio.Textbox(
            label="prompt",
            info="empty for no condition",
            elem_id="prompt",
            value=words[0] if words and _short(subject) else "",
            max_length=limits.MOST_CHARACTERS,
            max_lines=3,
        )
    ]
    if words:
        with gradio.Accordion("words it knows", open=False, elem_id="words"):
            gradio.Markdown(", ".join(words))
    with gradio.Row():
        start = gradio.Button("draw", variant="primary", elem_id="draw", min_width=100)
        stop = gradio.Button("stop", elem_id="stop", min_width=100)
    status = gradio.Markdown("Nothing drawn yet.", elem_id="status")
    most = limits.MOST_PICTURES
    inputs += [
        gradio.Slider(1, most, value=4, step=1, label="pictures", elem_id="pictures"),
        gradio.Number(0, label="seed", precision=0, minimum=0, elem_id="seed"),
        gradio.Slider(1, limits.MOST_STEPS, value=35, step=1, label="steps", elem_id="steps"),
        gradio.Slider(
            0, limits.MOST_GUIDANCE, value=2, step=0.1, label="guidance", elem_id="guidance"
        ),
        gradio.Dropdown(list(SAMPLERS), value="euler", label="sampler", elem_id="sampler"),
    ]
    return inputs, status, start, stop


def _short(subject: Subject) -> bool:
    """Whether one word is a whole prompt."""
    return getattr(subject.embedder, "max_tokens", 0) == 1


def _updates(
    gradio: Any, drawing: Drawing, values: tuple[Any, ...], visitor: str, ticket: int
) -> Iterator[tuple[Any, ...]]:
    """What the status, the preview and the gallery show, again and again."""
    prompt, pictures, seed, steps, guidance, sampler = values
    try:
        wish = Wish(
            prompt=prompt or "",
            pictures=pictures,
            seed=seed,
            steps=steps,
            guidance=guidance,
            sampler=sampler,
        )
        for shown in drawing.draw(wish, visitor, ticket):
            if shown.preview is not None:
                preview = gradio.update(value=shown.preview, visible=True)
                yield shown.status, preview, gradio.skip()
            else:  # where it was stopped, the pictures before stay
                files = [str(path) for path in shown.files] or gradio.skip()
                yield shown.status, gradio.update(visible=False, value=None), files
    except UserError as error:
        yield f"⚠ {error}", gradio.update(visible=False), gradio.skip()
    finally:
        drawing.drop(ticket)
