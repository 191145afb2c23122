"""A headless Chromium: the system's, or Debian's packages unpacked under `.venv`, installing nothing."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, sync_playwright

from tests.debian_packages import UNPACKED, environment_with, libraries, unpack

PACKAGES = ("chromium", "fonts-dejavu-core")
QUIET = (
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
FONTS = """<?xml version="1.0"?>
<!DOCTYPE fontconfig SYSTEM "fonts.dtd">
<fontconfig>
<include ignore_missing="yes">/etc/fonts/fonts.conf</include>
<dir>{folder}</dir><cachedir>{cache}</cachedir>
<match><test name="family"><string>system-ui</string></test>
<edit name="family" mode="prepend" binding="strong"><string>DejaVu Sans</string></edit></match>
</fontconfig>
"""


@contextmanager
def chromium(scratch: Path, folder: Path = UNPACKED / "chromium") -> Iterator[Browser]:
    """Starts a Chromium; `scratch` takes what it writes.

    Raises:
        RuntimeError: There is none and none can be had; says what to install.
    """
    program, environment = shutil.which("chromium"), dict(os.environ)
    if program is None:
        unpack(PACKAGES, folder)
        program = str(folder / "usr" / "lib" / "chromium" / "chromium")
        environment = environment_with({"LD_LIBRARY_PATH": [libraries(folder), libraries(folder) / "pulseaudio"]})
        fonts = scratch / "fonts.conf"
        fonts.write_text(FONTS.format(folder=folder / "usr" / "share" / "fonts", cache=scratch / "fonts"))
        environment["FONTCONFIG_FILE"] = str(fonts)
    environment["HOME"] = str(scratch)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=list(QUIET), env=environment)
        yield browser
        browser.close()
