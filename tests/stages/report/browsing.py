"""The report's page in a browser without a window."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

PROBE = """
<script>
addEventListener("load", () => {
  const table = document.querySelector("table.sortable");
  const heads = [...table.tHead.rows[0].cells].map(head => head.textContent);
  const column = name => [...table.tBodies[0].rows].map(
    row => row.cells[heads.indexOf(name)].textContent.trim());
  const click = name => [...table.querySelectorAll("th button")].find(
    button => button.textContent === name).click();
  const seen = { heads, before: column("perplexity") };
  click("perplexity"); seen.rising = column("perplexity");
  click("perplexity"); seen.falling = column("perplexity");
  click("point"); seen.names = column("point");
  table.querySelector("tbody a").click();
  setTimeout(() => {
    seen.opened = [...document.querySelectorAll("section > details[open]")].map(
      details => details.querySelector("summary").textContent);
    seen.behind = document.querySelector("section > details[open]").textContent;
    seen.images = [...document.images].map(image => image.naturalWidth);
    seen.fetched = performance.getEntriesByType("resource").map(entry => entry.name)
      .filter(name => !name.startsWith("data:"));
    seen.bold = document.querySelectorAll("td b").length;
    const result = document.createElement("pre");
    result.id = "seen"; result.textContent = JSON.stringify(seen);
    document.body.append(result);
  }, 300);
});
</script>
"""


def browse(file: Path, directory: Path) -> tuple[str, list[str]]:
    """The page's elements after its scripts, and what its console said."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser on this machine, none of {', '.join(BROWSERS)}")
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0")
    ran = subprocess.run(
        [
            browser,
            *flags,
            f"--user-data-dir={directory / 'profile'}",
            "--virtual-time-budget=5000",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return ran.stdout, re.findall(r":CONSOLE[:(].*", ran.stderr)
