"""The documentation says what is true now."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from edgekd.recipe import load_recipe, preflight

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_generated_parts_are_up_to_date():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "write_docs.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def recipes():
    for page in PAGES:
        for index, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)):
            if text.startswith("name:"):
                yield pytest.param(text, id=f"{page.name}-{index}")


@pytest.mark.parametrize("text", list(recipes()))
def test_every_whole_recipe_in_the_documentation_is_valid(text, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    loaded = load_recipe(path)
    if loaded.recipe.data.kind == "digits":
        preflight(loaded)


def test_the_readme_recipe_has_12_lines():
    text = re.search(r"## A recipe in 12 lines\n\n```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    assert len(text.strip().splitlines()) == 12


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), target
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in anchors, anchor


def test_the_error_in_the_readme_is_the_real_one(tmp_path, monkeypatch):
    readme = (ROOT / "README.md").read_text()
    shown = re.search(r"^error: (recipe\.yaml:.*)$", readme, re.MULTILINE)[1]
    text = re.search(r"## A recipe in 12 lines\n\n```yaml\n(.*?)```", readme, re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(text.replace("method: {name: logits}", "method: {name: logits, temprature: 4}", 1))
    with pytest.raises(Exception, match="temprature") as caught:
        load_recipe(Path("recipe.yaml"))
    assert str(caught.value).splitlines() == [shown]
