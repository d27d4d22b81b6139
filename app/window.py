"""The page in a native window (pywebview) instead of a browser."""

from agevlm_mlx.errors import UserError, one_line


def show(url: str) -> None:
    """Open a window with the page and return when it is closed. For the main thread alone.

    ``UserError`` where the computer has nothing to show a window with.
    """
    import webview  # optional, and slow to import

    # Without it the conversation's downloads are dropped without a word.
    webview.settings["ALLOW_DOWNLOADS"] = True
    webview.create_window(
        "AgeVLM", url, width=1280, height=900, min_size=(480, 480), text_select=True, zoomable=True
    )
    try:
        webview.start(private_mode=True)  # nothing stays on the disk
    except webview.WebViewException as error:
        raise UserError(
            f"--window: cannot open one here: {one_line(error)} Without --window it is a page for "
            "the browser"
        ) from None
