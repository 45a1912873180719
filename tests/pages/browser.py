"""A real browser: Chromium as the machine has it, or as Debian's packages bring it to this checkout."""

import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from playwright.async_api import Browser, async_playwright

ROOT = Path(__file__).resolve().parents[2]
UNPACKED = ROOT / ".local" / "chromium"
NAMES = ("chromium-headless-shell", "chromium", "google-chrome")
FONTS = """\
<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig><dir>/usr/share/fonts</dir><dir>{unpacked}/usr/share/fonts</dir><cachedir>{unpacked}/cache</cachedir></fontconfig>
"""


def _program() -> tuple[str, dict[str, str]]:
    """The executable, and the environment that it needs."""
    if installed := next(filter(None, map(shutil.which, NAMES)), None):
        return installed, dict(os.environ)
    subprocess.run(["sh", "deploy/bootstrap.sh", "chromium"], cwd=ROOT, check=True)
    fonts = UNPACKED / "fonts.conf"
    fonts.write_text(FONTS.format(unpacked=UNPACKED))
    libraries = [path for place in UNPACKED.glob("usr/lib/*-linux-gnu") for path in (place, place / "pulseaudio")]
    environ = {"LD_LIBRARY_PATH": ":".join(map(str, libraries)), "FONTCONFIG_FILE": str(fonts)}
    return str(UNPACKED / "usr/lib/chromium/chromium-headless-shell"), {**os.environ, **environ}


@asynccontextmanager
async def browsing() -> AsyncIterator[Browser]:
    program, environ = _program()
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=program, env=dict(environ), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        try:
            yield browser
        finally:
            await browser.close()
