"""The page in a native window (pywebview) instead of a browser."""

import signal

from agevlm_mlx.errors import UserError, one_line


def show(url: str) -> None:
    """Open a window with the page and return when it is closed. For the main thread alone.

    ``UserError`` where the computer has nothing to show a window with.
    """
    import webview  # optional, and slow to import

    # Without it the conversation's downloads are dropped without a word.
    webview.settings["ALLOW_DOWNLOADS"] = True
    opened = webview.create_window(
        "AgeVLM", url, width=1280, height=900, min_size=(480, 480), text_select=True, zoomable=True
    )
    # What a signal raises would be raised within the window's own loop, which cannot unwind.
    before = signal.signal(signal.SIGTERM, lambda *_: opened and opened.destroy())
    try:
        webview.start(private_mode=True)  # nothing stays on the disk
    except webview.WebViewException as error:
        raise UserError(
            f"--window: cannot open one here: {one_line(error)} Without --window it is a page for "
            "the browser"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, before)
