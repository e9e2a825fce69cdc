"""README.md and README_CN.md say the same: headings, code, measured tables and links agree, and the links lead
somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SWITCH = {"README.md": "English | [简体中文](README_CN.md)", "README_CN.md": "[English](README.md) | 简体中文"}
FENCE = re.compile(r"^```[^\n]*\n.*?^```$", re.M | re.S)


class Page:
    def __init__(self, name):
        text = (ROOT / name).read_text(encoding="utf-8")
        self.head = text.split("\n", 3)[:3]
        self.fenced = FENCE.findall(text)
        self.text = FENCE.sub("", text.replace(SWITCH[name], "", 1))
        self.indented = re.findall(r"(?:^    .*\n)+", self.text, re.M)
        self.headings = re.findall(r"^(#+) (.+)$", self.text, re.M)
        self.tables = [table.splitlines() for table in re.findall(r"(?:^\|.*\n)+", self.text, re.M)]
        self.links = re.findall(r"\]\(([^)\s]+)\)", self.text)

    def measured(self):
        """Tables whose cells are decimal numbers."""
        return [table for table in self.tables if any(re.search(r"\| *\d+\.\d+(?: %)? *\|", row) for row in table)]

    def files(self):
        """Targets without in-page anchors."""
        return {link for link in self.links if not link.startswith("#")}


@pytest.fixture(scope="module")
def pages():
    return Page("README.md"), Page("README_CN.md")


@pytest.mark.parametrize("name", SWITCH)
def test_the_language_switch_is_under_the_title(name):
    assert Page(name).head == ["# colora_ms", "", SWITCH[name]]


def test_the_headings_have_the_same_levels_in_the_same_order(pages):
    english, chinese = ([len(marks) for marks, _ in page.headings] for page in pages)
    assert len(english) >= 8
    assert english == chinese


def test_the_code_blocks_are_the_same(pages):
    english, chinese = pages
    assert len(english.fenced) >= 5
    assert english.fenced == chinese.fenced
    assert english.indented == chinese.indented


def test_the_tables_have_one_shape_and_measured_ones_are_the_same(pages):
    english, chinese = pages
    shapes = [[[len(re.findall(r"(?<!\\)\|", row)) for row in table] for table in page.tables] for page in pages]
    assert shapes[0] == shapes[1]
    assert english.measured()
    assert english.measured() == chinese.measured()


def test_the_prose_of_each_section_gives_the_same_decimal_numbers(pages):
    def numbers(page):
        sections = re.split(r"^#+ .+$", page.text, flags=re.M)
        return [sorted(re.findall(r"\d+(?:\.\d+)+", section)) for section in sections]

    assert numbers(pages[0]) == numbers(pages[1])


def test_the_links_are_the_same(pages):
    english, chinese = pages
    assert english.files()
    assert english.files() == chinese.files()


@pytest.mark.parametrize("name", SWITCH)
def test_every_link_leads_somewhere(name):
    page = Page(name)
    targets = re.findall(r"\]\(([^)\s]+)\)", SWITCH[name]) + page.links
    anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for _, title in page.headings}
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not re.match(r"https?://", target):
            assert (ROOT / target.partition("#")[0]).exists(), target


def test_the_front_page_is_read_in_five_minutes():
    assert (ROOT / "README.md").stat().st_size <= 12 * 1024


@pytest.mark.parametrize("path",
                         sorted({*ROOT.glob("colora_ms/**/*.md"), *ROOT.glob("ops/*/README.md"),
                                 *ROOT.glob("scripts/*.md"),
                                         *ROOT.glob("model_zoo/**/*.md")}),
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_rooms_page_leads_somewhere(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, fragment = target.partition("#")
        page = (path.parent / name).resolve() if name else path
        assert page.exists(), target
        if fragment and page.suffix == ".md":
            titles = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.M)
            assert fragment in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target
