"""The documentation: links, navigation, generated pages, every error by its message; as a heavy test the built site."""

from __future__ import annotations

import functools
import http.server
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import yaml

from helpers.paths import ROOT
from llava_orpo import precheck, recipe
from llava_orpo.arguments import PluginArguments
from llava_orpo.errors import UserError
from llava_orpo.site import generated, markdown, messages, staging

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
CONFIG = ROOT / "mkdocs.yml"
AGAIN = "run python scripts/make_docs.py and commit what it writes"


def config() -> dict:
    return yaml.safe_load(CONFIG.read_text(encoding="utf-8"))


def nav_files(entries) -> list[str]:
    if isinstance(entries, str):
        return [entries]
    parts = entries.values() if isinstance(entries, dict) else entries
    return [name for part in parts for name in nav_files(part)]


@pytest.fixture(scope="module")
def collected():
    return messages.collect(ROOT)


# --- links and navigation -------------------------------------------------------------------------------------


def test_every_link_and_anchor_of_the_documentation_leads_somewhere():
    assert len(PAGES) > 20 and sum(len(markdown.links(page.read_text(encoding="utf-8"))) for page in PAGES) > 150
    assert markdown.problems(ROOT, PAGES) == []


def test_links_that_lead_nowhere_are_found(tmp_path):
    (tmp_path / "b.md").write_text("# One, two\n\n## `code` of *it*\n\n## One, two\n", encoding="utf-8")
    page = tmp_path / "a.md"
    page.write_text(
        "# A\n[1](b.md) [2](b.md#one-two) [3](b.md#one-two-1) [4](b.md#code-of-it) [5](#a) [6](https://x.org/#y)\n"
        "`[7](none.md)` ![8](none.png)\n```text\n[9](none.md)\n```\n[10](b.md#two) [11](../c.md) [12](#b)\n",
        encoding="utf-8",
    )
    assert markdown.problems(tmp_path, [page]) == [
        "a.md:3: there is no none.png",
        "a.md:7: b.md has no heading #two",
        "a.md:7: there is no ../c.md",
        "a.md:7: a.md has no heading #b",
    ]


def test_navigation_names_every_page_once():
    named = nav_files(config()["nav"])
    assert len(named) == len(set(named))
    pages = {str(staging.place(page, ROOT)) for page in PAGES}
    pages |= {f"{staging.API}/{name}" for name in staging.api_pages(ROOT)}
    assert pages - set(named) == set(), "pages without a line in nav of mkdocs.yml"
    assert set(named) - pages == set(), "lines in nav of mkdocs.yml without a page"


def test_pages_of_the_site_link_to_each_other_alone(tmp_path):
    written = staging.stage(ROOT, tmp_path / "pages")
    pages = [path for path in written if path.suffix == ".md"]
    assert markdown.problems(tmp_path / "pages", pages) == []
    shown = (tmp_path / "pages" / "files" / "recipes" / "llava16_orpo_qlora-yaml.md").read_text(encoding="utf-8")
    assert (ROOT / "recipes" / "llava16_orpo_qlora.yaml").read_text(encoding="utf-8").strip() in shown
    home = (tmp_path / "pages" / "index.md").read_text(encoding="utf-8")
    assert "](docs/" not in home and "](tutorial.md" not in home.partition("# ")[0] and "(images/demo.png)" in home
    assert (tmp_path / "pages" / "images" / "demo.png").is_file()
    kept, times = tmp_path / "pages" / "faq.md", [path.stat().st_mtime_ns for path in written]
    (tmp_path / "pages" / "gone.md").write_text("# Gone\n", encoding="utf-8")
    assert staging.stage(ROOT, tmp_path / "pages") == written and not (tmp_path / "pages" / "gone.md").exists()
    assert [path.stat().st_mtime_ns for path in written] == times
    text = kept.read_text(encoding="utf-8")
    kept.write_text("changed", encoding="utf-8")
    staging.stage(ROOT, tmp_path / "pages")
    assert kept.read_text(encoding="utf-8") == text


def test_links_in_code_stay():
    text = "[a](x.md) `[b](x.md)` [c](http://x.md)\n```\n[d](x.md)\n```\n[e](x.md#y)"
    assert markdown.with_links(text, lambda link: link.upper()) == text.replace("[a](x.md)", "[a](X.MD)").replace(
        "[e](x.md#y)", "[e](X.MD#Y)"
    )


def test_angle_brackets_of_docstrings_stay_visible():
    text = 'A "<image>" and `</s>` or ``a `<b>` c``, x < y\n\n    code <here>\n    <and here>\n'
    text += "Args:\n    a: <b>\n```\n<fence>\n```"
    shown = text.replace('"<image>"', '"&lt;image>"').replace("x < y", "x &lt; y").replace("<b>\n```", "&lt;b>\n```")
    assert markdown.escaped(text) == shown


def test_api_reference_has_every_public_module():
    blocks = "\n".join(staging.api_pages(ROOT).values())
    for path in (ROOT / "plugins" / "llava_orpo").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT / "plugins").with_suffix("").parts)
        assert (f"::: {name}\n" in blocks) == (not path.name.startswith("_")), name


def test_nothing_is_asked_of_another_server():
    read = config()
    assert read["theme"]["font"] is False
    assert not {"extra_javascript", "extra_css", "extra"} & set(read)
    assert not {"offline", "social"} & {
        name for plugin in read["plugins"] for name in ([plugin] if isinstance(plugin, str) else plugin)
    }


# --- generated pages ------------------------------------------------------------------------------------------


def test_generated_pages_are_what_the_code_says():
    for path, text in generated.contents(ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.relative_to(ROOT)} is out of date: {AGAIN}"


def test_commands_of_the_pages_exist():
    """Scripts, recipes and tests that a page's commands name."""
    names = re.compile(r"(?<![\w/.-])((?:scripts|evals|benchmarks|recipes|tests)/[\w./-]+\.(?:py|sh|yaml|sbatch))")
    for page in PAGES:
        for name in names.findall(page.read_text(encoding="utf-8")):
            assert (ROOT / name).exists(), f"{page.relative_to(ROOT)}: {name}"


# --- errors by their message ----------------------------------------------------------------------------------


def test_words_of_every_error_are_found():
    """All but those that only hand on what another error says."""
    others = [call for call in messages.Sources(ROOT).unworded() if not call.endswith("Error(str(error))")]
    assert others == []


def skeleton_of(text: str, collected) -> list[str]:
    """The collected skeletons that a real message fits."""
    return [
        message.text
        for message in collected
        if re.fullmatch(".*".join(map(re.escape, message.text.split(messages.GAP))), " ".join(text.split()), re.DOTALL)
    ]


def real_messages(tmp_path: Path) -> list[str]:
    """What is really said about mistakes of many kinds."""
    model = tmp_path / "folder"
    model.mkdir()
    bad = {
        "model_name_or_path": str(model),
        "adapter_name_or_path": str(model),
        "dataset": "mine",
        "dataset_dir": str(tmp_path),
        "output_dir": str(ROOT / "LICENSE"),
        "do_train": True,
        "lerning_rate": 1,
        "recompute": 7,
        "gradient_checkpointing": True,
        "deepspeed": "none/zero.json",
        "resume_from_checkpoint": str(tmp_path / "none"),
        "infer_backend": "vllm",
        "trust_remote_code": True,
        "bad_rows": "keep",
    }
    found = precheck.problems(bad)
    found += recipe.check_overrides(["word", "hf_hub_token=x"])
    for call in (
        lambda: recipe.load(tmp_path / "none.yaml"),
        lambda: recipe.load(tmp_path),
        lambda: recipe.read_command("help", [], {}),
        lambda: PluginArguments(dataset_filter="x"),
        lambda: PluginArguments(max_anomalies=0, bad_rows="keep"),
        lambda: PluginArguments(nonsense=1),
    ):
        with pytest.raises(UserError) as caught:
            call()
        found += caught.value.args
    return found


def test_what_is_really_said_is_on_the_page(tmp_path, collected):
    found = real_messages(tmp_path)
    assert len(found) > 18
    for text in found:
        assert skeleton_of(text, collected), f"no entry for: {text}"
    assert not skeleton_of("Something that nobody says, ever.", collected)


SOURCE = """
from .errors import UserError

CONSTANT = "constant words " "in two parts"

def problems(recipe):
    found = [f"first {recipe} is wrong."]
    for key, check in CHECKS.items():
        found += check(key)
    found.append("second sentence here" if recipe else "third sentence here")
    return found

def _one(key):
    return [f"{key}: from the table" + (f"; hint {key}." if key else ".")]

CHECKS = {"a": _one}

def outer(recipe):
    if wrong := problems(recipe):
        raise UserError(*wrong)
    raise UserError(CONSTANT)

class OwnError(UserError):
    pass

def other(error):
    try:
        raise OwnError(f"own words {error!r:>3} {error}")
    except OwnError:
        raise UserError(str(error))
"""


def checkout(folder: Path, source: str, remedies: str = "{}") -> Path:
    (folder / "plugins" / "llava_orpo").mkdir(parents=True)
    (folder / "docs").mkdir()
    for name in ("scripts", "evals"):
        (folder / name).mkdir()
    (folder / "plugins" / "llava_orpo" / "early.py").write_text(source, encoding="utf-8")
    (folder / "scripts" / "x.sh").write_text('echo "error: shell words $HERE end." >&2\n', encoding="utf-8")
    (folder / messages.REMEDIES).write_text(remedies, encoding="utf-8")
    return folder


def test_sentences_are_followed_to_where_they_are_worded(tmp_path):
    root = checkout(tmp_path, SOURCE)
    assert [(message.function, message.text) for message in messages.collect(root)] == [
        ("problems", "first … is wrong."),
        ("_one", "…: from the table; hint …."),
        ("_one", "…: from the table."),
        ("problems", "second sentence here"),
        ("problems", "third sentence here"),
        ("", "constant words in two parts"),
        ("other", "own words … …"),
        ("", "shell words … end."),
    ]
    assert [call.partition(" ")[2] for call in messages.Sources(root).unworded()] == ["UserError(str(error))"]


def test_a_remedy_belongs_to_one_message(tmp_path):
    page = messages.page(checkout(tmp_path / "one", SOURCE, '{"own words": "Do this."}'))
    assert "- `own words … …`<br>Do this." in page and "`shell words … end.`" in page
    for words, count in (("nobody says", 0), ("sentence here", 2)):
        with pytest.raises(ValueError, match=f"is in {count} messages"):
            messages.page(checkout(tmp_path / str(count), SOURCE, f'{{"{words}": "Do this."}}'))


# --- the built site -------------------------------------------------------------------------------------------


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    """The strictly built site, served on 127.0.0.1: its address."""
    ended = subprocess.run(["bash", "scripts/docs.sh"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    folder = ROOT / "outputs" / "site" / "html"
    handler = functools.partial(Quiet, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.heavy
def test_site_in_a_browser(site):
    """Pages, drawings, search and the API, with nothing asked of another server and no complaint in the console."""
    if os.environ.get("LLAVA_ORPO_NO_BROWSER") == "1":
        pytest.skip("not run: LLAVA_ORPO_NO_BROWSER=1")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    assert program, "the site is looked at in headless Chromium: apt-get install chromium"
    from playwright.sync_api import sync_playwright

    complaints = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.on("console", lambda m: m.type in ("error", "warning") and complaints.append(m.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda r: r.url.startswith((site, "data:", "blob:")) or complaints.append(r.url))
        page.on("response", lambda r: r.status >= 400 and complaints.append(f"{r.status} {r.url}"))
        for name in nav_files(config()["nav"]):
            page.goto(f"{site}/{name.removesuffix('.md')}.html")
            assert page.locator("article h1").count() == 1, name
            broken = "() => [...document.images].filter((i) => !i.complete || !i.naturalWidth).map((i) => i.src)"
            assert page.evaluate(broken) == [], name
        page.goto(f"{site}/api/llava_orpo-step.html")
        assert page.get_by_role("heading", name="orpo_loss").count() == 1
        page.goto(f"{site}/api/llava_orpo-data.html")
        assert 'A literal "<image>" or "</s>" in a question' in page.locator("article").inner_text()
        page.goto(f"{site}/index.html")
        page.keyboard.press("Control+k")
        page.keyboard.type("odds ratio")
        page.wait_for_function("() => document.body.innerText.includes('ORPO in one page')", timeout=10_000)
        browser.close()
    assert complaints == []
