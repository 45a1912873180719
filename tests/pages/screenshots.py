"""`python -m tests.pages.screenshots [DIRECTORY]`: each page as a picture, light, dark and on a phone.

Of the local stack that runs (`make start`), which needs some sales to be worth a picture: `--sell` makes a few weeks of
them first. DIRECTORY is build/screenshots unless named.
"""

import argparse
import asyncio
from pathlib import Path
from typing import Any

from deploy.local.stack import Stack
from pos.client import PosClient, connect
from tests.pages.browser import ROOT, browsing
from tests.pages.history import sales

PAGES = {"sales": "/", "till": "/till", "operations": "/operations"}
SCANNED = ("2001", "2008", "2014", "2018")  # so that there is a receipt on the picture
WAYS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 860}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 860}},
    "phone": {"color_scheme": "light", "viewport": {"width": 360, "height": 780}},
    "phone-dark": {"color_scheme": "dark", "viewport": {"width": 320, "height": 700}},
    "wall": {"color_scheme": "dark", "viewport": {"width": 2560, "height": 1440}},
}


# For the README: what one sees without scrolling.
DOCUMENTS = {"sales": "light", "till": "dark", "operations": "light"}
DOCUMENT_SIZE = {"width": 1280, "height": 900}


async def take(address: str, directory: Path, only: str) -> None:
    for name in PAGES:
        for way in WAYS:
            if only in f"{name}-{way}":
                await picture(address, name, WAYS[way], directory / f"{name}-{way}.png")


async def take_documents(address: str) -> None:
    for name, way in DOCUMENTS.items():
        options = {**WAYS[way], "viewport": DOCUMENT_SIZE}
        await picture(address, name, options, ROOT / "docs" / f"pages-{name}.png", full_page=False)


async def picture(address: str, name: str, options: dict[str, Any], file: Path, *, full_page: bool = True) -> None:
    async with browsing() as browser:
        page = await browser.new_page(**options)
        await page.goto(f"http://{address}{PAGES[name]}")
        for product in SCANNED if name == "till" else ():
            await page.locator("#scan").fill(product)
            async with page.expect_navigation():
                await page.locator("#scan").press("Enter")
        await page.screenshot(path=file, full_page=full_page)
    print(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / "build" / "screenshots")
    parser.add_argument("--only", default="", help="those whose name has this in it")
    parser.add_argument("--sell", action="store_true", help="some weeks of sales first")
    parser.add_argument("--docs", action="store_true", help="only those of the README, to docs/")
    asked = parser.parse_args()
    endpoints = Stack(ROOT).endpoints()
    if asked.sell:
        with connect(endpoints["purchases"][0]) as channel:
            made = PosClient(channel).upload_purchases(sales(7, days=62, purchases=20_000), register_customers=True)
            print(sum(1 for _ in made), "sales")
    address = endpoints["pages"][0]
    if asked.docs:
        asyncio.run(take_documents(address))
        return
    asked.directory.mkdir(parents=True, exist_ok=True)
    asyncio.run(take(address, asked.directory, asked.only))


if __name__ == "__main__":
    main()
