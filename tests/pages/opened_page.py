"""Opens a page from disk as a reader does, and tells what is wrong with it."""

from pathlib import Path

from playwright.sync_api import Browser, Route

PICTURES = """async () => {
    const faults = [];
    for (const image of document.images) {
        await image.decode().catch(() => {});
        if (!image.naturalWidth || !image.getBoundingClientRect().width) faults.push(`not drawn: ${image.alt}`);
    }
    for (const drawing of document.querySelectorAll("svg")) {
        const box = drawing.getBoundingClientRect(), content = drawing.getBBox();
        if (!(box.width && box.height && content.width && content.height))
            faults.push(`not drawn: ${drawing.getAttribute("aria-label")}`);
    }
    return faults;
}"""
WIDTH = "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"


def faults_of(browser: Browser, file: Path, width_px: int, scheme: str, screenshot: Path) -> list[str]:
    """Returns what is wrong with a page at a width and in a scheme, light or dark; takes a screenshot of all of it."""
    address = file.resolve().as_uri()
    faults: list[str] = []

    def answer(route: Route) -> None:
        if route.request.url == address or route.request.url.startswith("data:"):
            route.continue_()
        else:
            faults.append(f"asks for {route.request.url}")
            route.abort()

    with browser.new_context(viewport={"width": width_px, "height": 900}, color_scheme=scheme) as context:
        page = context.new_page()
        page.route("**/*", answer)
        page.on("console", lambda message: faults.append(f"says {message.text}") if message.type == "error" else None)
        page.on("pageerror", lambda error: faults.append(f"fails with {error}"))
        page.goto(address, wait_until="networkidle")
        for folded in page.query_selector_all("details"):
            folded.evaluate("element => { element.open = true; }")
        faults += page.evaluate(PICTURES)
        wide_px = page.evaluate(WIDTH)
        if wide_px > width_px:
            faults.append(f"is {wide_px} px wide")
        page.screenshot(path=screenshot, full_page=True)
    return faults
