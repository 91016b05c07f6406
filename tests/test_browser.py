"""The pages in a real browser: nothing is cut off, in light and dark, on narrow and wide screens."""

import re
import shutil
import subprocess

import pytest
from report.test_tables import several_methods

from hf_curriculum_distill.report.comparison import compare_on_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# What a browser made of a page, which only a script can say.
LOOK = b"""<script>
const shown = (selector) => [...document.querySelectorAll(selector)].map((each) => each.getBoundingClientRect());
const color = (name) => getComputedStyle(document.body)[name].replace(/[^0-9,]/g, "");
document.title = [
  innerWidth, document.documentElement.scrollWidth, shown("figure svg").length,
  Math.min(...shown("figure svg").map((box) => Math.min(box.width, box.height))),
  color("color"), color("backgroundColor"),
].join(" ");
</script>"""


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser is installed; any of {', '.join(BROWSERS)} will do")
    return found


@pytest.mark.needs_browser
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 500)])
def test_a_page_fits_the_window_and_follows_the_scheme(browser, tmp_path, scheme, width):
    page = tmp_path / "page.html"
    page.write_bytes(compare_on_page(several_methods(tmp_path)) + LOOK)
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    options += [f"--window-size={width},900", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}"]
    command = [browser, *options, "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    inner, needed, figures, smallest, ink, paper = re.search("<title>(.*?)</title>", done.stdout)[1].split()
    assert int(needed) <= int(inner) and int(figures) == 2 and float(smallest) > 150
    brightness = [sum(map(int, each.split(","))) for each in (ink, paper)]
    assert (brightness[0] < brightness[1]) == (scheme == "light") and abs(brightness[0] - brightness[1]) > 400
