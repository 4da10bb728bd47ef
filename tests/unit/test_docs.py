"""README and docs: what is generated is what the code says, links lead somewhere, commands parse, the site builds."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

import ds_optim
from docs import generated, listings, reference
from ds_optim.cli.app import app, main, take_plugins
from ds_optim.job.settings import TrainSettings
from ds_optim.optimizers.options import CommonOptions, MatrixOptions
from ds_optim.optimizers.table import in_order
from ds_optim.zero.refused import REFUSED_SETTINGS
from tests.distributed.models import TinyNet

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / folder / "README.md" for folder in ("configs", "benchmarks", "tests")),
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
README_MOST = 8192
LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(page, text) of each fenced block in a language."""
    for page, text in PAGES.items():
        yield from ((page, block) for found, block in FENCE.findall(text) if found == language)


def commands() -> list[tuple[str, list[str]]]:
    """(page, words) of each command line in a block of bash."""
    lines = [(page, line) for page, block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [(page, words) for page, line in lines if (words := shlex.split(line, comments=True))]


def test_readme_is_one_page() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= README_MOST


@pytest.mark.parametrize("name", generated.WRITTEN)
def test_generated_parts_are_what_the_code_says(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "<!-- generated:" in text
    assert generated.fill(text) == text, "run: python docs/generated.py"


def test_generated_parts_say_all() -> None:
    filled = {name: make() for name, make in generated.PARTS.items()}
    for described in in_order():
        for part in ("optimizers in full", "claims", "arguments"):
            assert described.cls.__name__ in filled[part]
    assert all(f"| `{name}` |" in filled["settings"] for name in TrainSettings.model_fields)
    for part, options in (("options", CommonOptions), ("matrix options", MatrixOptions)):
        own = set(options.__annotations__) - (set() if part == "options" else set(CommonOptions.__annotations__))
        assert set(re.findall(r"^\| `(\w+)` \|", filled[part], re.MULTILINE)) == own
    paths = [path for path, _, _ in REFUSED_SETTINGS if not path.startswith("bfloat16.")]
    assert all(f"| `{path}` |" in filled["refused"] for path in paths)
    assert len(re.findall("^- ", filled["messages"], re.MULTILINE)) > 200
    for name, part in filled.items():
        for table in re.findall(r"(?:^\|.*\n)+", part, re.MULTILINE):
            bars = {re.sub(r"\\\|", "", row).count("|") for row in table.splitlines()}
            assert len(bars) == 1, f"{name}: rows have cells of unlike number"


def test_an_unknown_part_is_an_error() -> None:
    with pytest.raises(KeyError):
        generated.fill("<!-- generated: nothing of the kind -->\n<!-- end -->")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page: str) -> None:
    from markdown.extensions.toc import slugify

    made = {"docs/api/index.md"}
    outside = FENCE.sub("", PAGES[page])
    for target, anchor in LINK.findall(outside):
        path = (ROOT / page).parent / target if target else ROOT / page
        name = os.path.relpath(path, ROOT)
        if name in made:
            continue
        assert path.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
            slugs = {slugify(re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading), "-") for heading in headings}
            assert anchor in slugs, f"{page}: {target}#{anchor}"


def test_commands_of_the_docs_parse() -> None:
    group: Any = typer.main.get_command(app)
    parsed = 0
    for page, words in commands():
        if "ds_optim" in words and words[words.index("ds_optim") - 1] in ("-m", "--module"):
            rest = words[words.index("ds_optim") + 1 :]
        elif words[0] == "ds-optim":
            rest = words[1:]
        else:
            continue
        command, (rest, _) = group, take_plugins(rest)
        while hasattr(command, "commands"):
            assert rest, page
            assert rest[0] in command.commands, f"{page}: {words}"
            command, rest = command.commands[rest[0]], rest[1:]
        command.make_context("ds-optim", list(rest))  # raises on what it does not know
        parsed += 1
    assert parsed > 10


@pytest.mark.full
def test_commands_that_need_no_ranks_run(capsys: pytest.CaptureFixture[str]) -> None:
    quick = [words[1:] for _, words in commands() if words[:2] in (["ds-optim", "estimate"], ["ds-optim", "simulate"])]
    quick = [words for words in quick if "qwen3-134m" in words and "--plugin" not in words]
    assert {words[0] for words in quick} == {"estimate", "simulate"}
    for words in quick:
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 0
        assert "64" in capsys.readouterr().out


def test_the_check_of_commands_sees_a_wrong_flag() -> None:
    command: Any = typer.main.get_command(app).commands["train"]  # type: ignore[attr-defined]
    with pytest.raises(Exception, match="No such option"):
        command.make_context("ds-optim", ["--step", "3"])


def test_scripts_and_modules_that_the_docs_name_are_there(tmp_path: Path) -> None:
    (tmp_path / "hostfile").write_text("node1 slots=8\nnode2 slots=8\n", encoding="utf-8")
    (tmp_path / "ds.json").write_text("{}", encoding="utf-8")
    tried = 0
    for page, words in commands():
        for word in words:
            if re.fullmatch(r"(launch|tests|docs)/[\w/.]+", word):
                assert (ROOT / word).exists(), f"{page}: {word}"
            if word.startswith("benchmarks."):
                assert (ROOT / f"{word.replace('.', '/')}.py").exists(), f"{page}: {word}"
        if words[0] == "bash" and re.fullmatch(r"launch/(local|hostfile|openmpi|torchrun)\.sh", words[1]):
            script = ["bash", str(ROOT / words[1]), "--dry-run", *words[2:]]
            env = {**os.environ, "DS_ACCELERATOR": "cpu", "PYTHON": sys.executable}
            done = subprocess.run(
                script, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60, check=False
            )
            assert done.returncode == 0, f"{page}: {words}: {done.stderr}"
            tried += 1
    assert tried >= 4


def test_json_of_the_docs_is_json() -> None:
    found = list(blocks("json"))
    assert len(found) >= 3
    for _, block in found:
        json.loads(block if block.lstrip().startswith("{") else f"{{{block}}}")


def test_python_of_the_docs_is_python() -> None:
    found = [block for _, block in blocks("python")]
    assert len(found) >= 8
    for block in found:
        compile(block, "docs", "exec")


def test_optimizers_of_the_diffs_are_built() -> None:
    entries = [line for _, block in blocks("diff") for line in block.splitlines() if line.startswith('+  "optimizer"')]
    assert entries
    for line in entries:
        config = json.loads(f"{{{line[1:].rstrip(',')}}}")
        optimizer, _ = ds_optim.from_config(TinyNet(), {**config, "train_micro_batch_size_per_gpu": 4})
        assert type(optimizer).__name__ == config["optimizer"]["type"]


def texts_of_the_package() -> list[str]:
    """Each text in the code, … where something is filled in; neighbours of a concatenation are one."""
    found = []
    for path in sorted((ROOT / "ds_optim").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.JoinedStr, ast.Constant)):
                found.append(listings.text_of(node))
    return found


def test_messages_of_troubleshooting_are_the_codes() -> None:
    quoted = re.findall(r"^### .*?`(.+)`", PAGES["docs/troubleshooting.md"], re.MULTILINE)
    texts = texts_of_the_package()
    assert len(quoted) > 25
    for message in quoted:
        if message.startswith("--"):
            continue  # a flag: of a status, not of a message
        parts = [re.escape(part.strip()) for part in message.split("…") if part.strip(" =:.")]
        pattern = re.compile(".*".join(parts), re.DOTALL)
        assert any(pattern.search(text) for text in texts), message


def test_the_design_lists_the_packages_that_there_are() -> None:
    folders = {path.parent.name for path in (ROOT / "ds_optim").glob("*/__init__.py")}
    rows = re.findall(r"^\| (`\w.*?) \|", PAGES["docs/design.md"].partition("## The packages")[2], re.MULTILINE)
    listed = {name for row in rows for name in re.findall("`(\\w+)`", row)}
    assert listed == folders == set(generated.PACKAGES)


def test_pre_commit_has_the_checks_of_the_tests() -> None:
    checks = re.findall(r"^ *check (\w+) ?(\w*)", (ROOT / "tests" / "run.sh").read_text(encoding="utf-8"), re.MULTILINE)
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert len(checks) >= 3
    for name, kind in checks:
        assert f"{name} {kind}" in hooks if name == "ruff" else f"id: {name}" in hooks


def build(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.full
def test_the_site_builds_without_a_warning_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    done = build(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    site = tmp_path / "site"
    pages = {str(path.relative_to(site)): path.read_text(encoding="utf-8") for path in site.rglob("*.html")}
    for name, html in pages.items():
        fetched = re.findall(r'<(?:script|link|img|iframe)[^>]*(?:src|href)="?(https?://[^">\s]*)', html)
        assert not fetched, f"{name} fetches {fetched}"
    assert all(f"<code>{described.cls.__name__}</code>" in pages["optimizers.html"] for described in in_order())
    names = [reference.path_of(described.cls.__name__) for described in in_order()]
    assert all(f'id="{name}"' in pages["api/index.html"] for name in names)


@pytest.mark.full
@pytest.mark.parametrize(
    ("link", "said"),
    [
        ("[x](nowhere.md)", "nowhere.md"),
        ("[x](index.md#nowhere)", "#nowhere"),
        ("[x](../NOWHERE)", "NOWHERE"),
        ("![x](images/nowhere.png)", "nowhere.png"),
    ],
)
def test_a_broken_link_fails_the_build(tmp_path: Path, link: str, said: str) -> None:
    """By the rules of mkdocs.yml, on a site of one page."""
    pytest.importorskip("mkdocs")
    yaml = pytest.importorskip("yaml")
    loader = type("Loader", (yaml.SafeLoader,), {})
    config = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader=loader)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"# Page\n\n{link}\n", encoding="utf-8")
    small = {"site_name": "x", "validation": config["validation"], "strict": config["strict"], "plugins": []}
    (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(small), encoding="utf-8")
    done = build(tmp_path, "--config-file", str(tmp_path / "mkdocs.yml"))
    assert done.returncode != 0
    assert said in done.stderr
