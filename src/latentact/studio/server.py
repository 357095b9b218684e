"""Serve the studio on this machine; on other addresses only to those who have the token."""

from __future__ import annotations

import hmac
import ipaddress
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from http.cookies import CookieError, SimpleCookie
from importlib.resources import files
from typing import Any
from urllib.parse import parse_qs, urlsplit

from latentact.errors import UserError
from latentact.studio.workspace import Workspace

COOKIE = "latentact_token"
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
"""The browser asks no other host for anything, and no other page embeds this one."""
UPLOAD = "500mb"


def is_loopback(host: str) -> bool:
    """Return whether an address is reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class Guard:
    """ASGI middleware: reject requests from other origins, to another host name, or without the token.

    Args:
        app: the application.
        token: required from every request, once as `?token=` and then as a cookie; empty: none.
        loopback: whether requests must name this machine, so that no website can rebind its name to it.
    """

    def __init__(self, app: Callable[..., Any], token: str, loopback: bool) -> None:
        self._app, self._token, self._loopback = app, token, loopback

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        """Answer one request."""
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        headers = {name.decode("latin1").lower(): value.decode("latin1") for name, value in scope["headers"]}
        given = parse_qs(scope["query_string"].decode("latin1")).get("token", [""])[0]
        if problem := self._problem(headers, given):
            return await _answer(send, 403, problem)
        if self._token and given:  # the cookie carries it from here on, and the address bar is clean
            cookie = f"{COOKIE}={self._token}; HttpOnly; SameSite=Strict; Path=/"
            return await _answer(send, 303, "", [("location", scope["path"] or "/"), ("set-cookie", cookie)])

        async def guarded(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    (b"content-security-policy", POLICY.encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        return await self._app(scope, receive, guarded)

    def _problem(self, headers: dict[str, str], given: str) -> str:
        """Return why a request is refused; empty: it is not."""
        host = headers.get("host", "")
        if self._loopback and not is_loopback(urlsplit(f"//{host}").hostname or ""):
            return "The studio must be opened as 127.0.0.1 or localhost."
        origin = headers.get("origin", "")
        if origin and urlsplit(origin).netloc != host:
            return "The studio answers its own page only."
        if self._token and not self._knows(headers.get("cookie", ""), given):
            return "The studio needs its token. Open the address that latentact studio printed."
        return ""

    def _knows(self, cookies: str, given: str) -> bool:
        try:
            morsel = SimpleCookie(cookies).get(COOKIE)
        except CookieError:
            morsel = None
        known = self._token.encode()
        return any(
            hmac.compare_digest(each.encode(), known) for each in (given, morsel.value if morsel else "")
        )


async def _answer(send: Any, status: int, message: str, more: list[tuple[str, str]] | None = None) -> None:
    headers = [("content-type", "text/plain; charset=utf-8"), *(more or [])]
    encoded = [(name.encode(), value.encode("latin1", "replace")) for name, value in headers]
    await send({"type": "http.response.start", "status": status, "headers": encoded})
    await send({"type": "http.response.body", "body": message.encode()})


def make_app(work: Workspace, token: str = "", loopback: bool = True) -> Guard:
    """Return the studio as an ASGI application.

    Args:
        work: the workspace.
        token: see `Guard`.
        loopback: see `Guard`.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    import fastapi
    import gradio as gr

    from latentact.studio.app import build

    asset = files("latentact.studio").joinpath
    names = ("colors.css", "studio.css", "studio.js")
    colors, css, script = (asset(name).read_text(encoding="utf-8") for name in names)
    blocks = build(work)
    blocks.queue(default_concurrency_limit=4, api_open=False)
    host = fastapi.FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app = gr.mount_gradio_app(
        host,
        blocks,
        path="",
        allowed_paths=[],
        show_error=False,
        max_file_size=UPLOAD,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        footer_links=[],
        theme=_theme(),
        css=css,
        head=f"<style>{colors}</style><script>{script}</script>",  # `css` is scoped
    )
    return Guard(app, token, loopback)


def _theme() -> Any:
    """Return the colors and fonts of the reports; no font is downloaded."""
    from gradio.themes import Base

    fonts = ("ui-sans-serif", "system-ui", "sans-serif")
    theme = Base(
        primary_hue="teal",
        neutral_hue="zinc",
        font=fonts,
        font_mono=("ui-monospace", "monospace"),
        radius_size="lg",
    )
    names = ("body_background_fill", "block_background_fill", "body_text_color", "border_color_primary")
    names += ("body_text_color_subdued", "block_border_color", "block_label_text_color")
    colors = ("bg", "card", "ink", "line", "soft", "line", "soft")
    shades = {name: f"var(--st-{color})" for name, color in zip(names, colors, strict=True)}
    shades |= {"button_primary_background_fill": "var(--st-accent)", "button_primary_text_color": "#fff"}
    shades |= {
        "button_secondary_background_fill": "var(--st-track)",
        "block_title_text_color": "var(--st-soft)",
    }
    shades |= {"button_secondary_text_color": "var(--st-ink)", "input_background_fill": "var(--st-bg)"}
    return theme.set(**shades, **{f"{name}_dark": shade for name, shade in shades.items()})


def serve(work: Workspace, host: str, port: int, token: str, ready: Callable[[str], None]) -> None:
    """Serve the studio until it is interrupted.

    Args:
        work: the workspace.
        host: address to listen on.
        port: port to listen on; 0: any free one.
        token: see `Guard`.
        ready: called with the address to open.

    Raises:
        UserError: the address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with (
        tempfile.TemporaryDirectory(prefix="latentact_studio_") as folder,
        socket.socket(family) as listening,
    ):
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads; read when Gradio is imported
        import uvicorn

        app = make_app(work, token, is_loopback(host))
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise UserError(
                f"--host {host} and --port {port} cannot be used ({error.strerror or error}). Choose another "
                "port."
            ) from error
        shown = f"[{host}]" if ":" in host else host
        query = f"/?token={token}" if token else ""
        ready(f"http://{shown}:{listening.getsockname()[1]}{query}")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2))
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # uploads are deleted, too
        with suppress(KeyboardInterrupt):  # Ctrl-C is how it ends
            server.run(sockets=[listening])
