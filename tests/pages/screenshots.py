"""`python -m tests.pages.screenshots [DIRECTORY]`: each page as a picture, light, dark and on a phone.

Of the local stack that runs (`make start`), which needs some sales to be worth a picture: `--sell` makes a few weeks of
them first. DIRECTORY is build/screenshots unless named.
"""

import argparse
import asyncio
import os
from pathlib import Path

from deploy.local.stack import Stack
from pos.client import PosClient, connect
from tests.pages.browser import ROOT, browsing
from tests.pages.history import sales

PAGES = {"sales": "/", "till": "/till", "operations": "/operations"}
WAYS = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 860}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 860}},
    "phone": {"color_scheme": "light", "viewport": {"width": 360, "height": 780}},
    "phone-dark": {"color_scheme": "dark", "viewport": {"width": 320, "height": 700}},
    "wall": {"color_scheme": "dark", "viewport": {"width": 2560, "height": 1440}},
}


async def take(address: str, directory: Path, only: str) -> None:
    async with browsing() as browser:
        for name, path in PAGES.items():
            for way, options in WAYS.items():
                if only and only not in f"{name}-{way}":
                    continue
                context = await browser.new_context(**options)  # type: ignore[arg-type]
                page = await context.new_page()
                await page.goto(f"http://{address}{path}")
                await page.screenshot(path=directory / f"{name}-{way}.png", full_page=True)
                await context.close()
                print(directory / f"{name}-{way}.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, nargs="?", default=ROOT / "build" / "screenshots")
    parser.add_argument("--only", default="", help="those whose name has this in it")
    parser.add_argument("--sell", action="store_true", help="some weeks of sales first")
    asked = parser.parse_args()
    endpoints = Stack(ROOT).endpoints()
    if asked.sell:
        with connect(endpoints["purchases"][0]) as channel:
            made = PosClient(channel).upload_purchases(sales(7, days=62, purchases=20_000), register_customers=True)
            print(sum(1 for _ in made), "sales")
    asked.directory.mkdir(parents=True, exist_ok=True)
    asyncio.run(take(os.environ.get("PAGES") or endpoints["pages"][0], asked.directory, asked.only))


if __name__ == "__main__":
    main()
