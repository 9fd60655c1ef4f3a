"""Opens HTML pages in headless Chromium, at the widths of a desktop and a phone, and fails if one of them is broken.

    pip install playwright
    make docs && python -m flowgen report runs/digits
    python docs/scripts/browser.py site runs/digits/report.html --shots runs/shots

A page is broken if a script reports an error, a file or picture is missing, or the page is wider than the window. For a
folder, all its pages are opened. `--shots` saves the first screen of each page. --chromium is the path of a Chromium
that is installed; without it, `playwright install chromium` must have been run.
"""

import argparse
import functools
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

WINDOWS = {"desktop": (1280, 800), "phone": (390, 844)}
FIND_FAULTS = """() => {
  const found = [...document.images].filter(image => !image.complete || !image.naturalWidth)
    .map(image => `the picture ${image.currentSrc.slice(0, 80)} does not load`);
  const wide = document.documentElement.scrollWidth - document.documentElement.clientWidth;
  return wide > 1 ? [...found, `the page is ${wide} pixels wider than the window`] : found;
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", type=Path, nargs="+", help="HTML files, or folders of them")
    parser.add_argument("--shots", type=Path, help="folder for a picture of each page's first screen")
    parser.add_argument("--chromium", type=Path, help="an installed Chromium (default: that of playwright)")
    arguments = parser.parse_args()
    pages = 0
    faults: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=arguments.chromium)
        for name, (width, height) in WINDOWS.items():
            page = browser.new_page(viewport={"width": width, "height": height})
            for path in arguments.paths:
                for label, url in addresses(path):
                    pages += 1
                    faults += [f"{label} ({name}): {fault}" for fault in faults_of(page, url)]
                    if arguments.shots:
                        page.screenshot(path=arguments.shots / f"{label.replace('/', '-')}.{name}.png")
        browser.close()
    print(*faults, f"{pages} pages opened, {len(faults)} faults.", sep="\n")
    raise SystemExit(bool(faults))


def addresses(path: Path) -> Iterator[tuple[str, str]]:
    """Yields a label and the address of each page, which a server on this machine answers."""
    folder = path if path.is_dir() else path.parent
    with served(folder.resolve()) as root:
        for file in sorted(folder.rglob("*.html")) if path.is_dir() else [path]:
            name = file.relative_to(folder).as_posix()
            yield name.removesuffix("/index.html").removesuffix(".html"), f"{root}/{name}"


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Returns a context with the address at which the files of a folder can be read."""
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a line per request."""

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""


def faults_of(page: Page, url: str) -> list[str]:
    """Opens a page to its end, where pictures that load late are loaded, and returns what is wrong with it."""
    found: list[str] = []

    def on_console(message):
        if message.type == "error":
            found.append(f"the console says: {message.text}")

    def on_error(error):
        found.append(f"a script fails: {error}")

    page.on("console", on_console)
    page.on("pageerror", on_error)
    page.goto(url, wait_until="load")
    page.evaluate("() => [...document.images].forEach(image => image.loading = 'eager')")
    page.wait_for_load_state("networkidle")
    found += page.evaluate(FIND_FAULTS)
    page.remove_listener("console", on_console)
    page.remove_listener("pageerror", on_error)
    return found


if __name__ == "__main__":
    main()
