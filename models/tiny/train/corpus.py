"""Builds the training text from free documentation packaged by Debian.

    python corpus.py --work DIR        # downloads, unpacks, cleans, splits

Writes DIR/train.txt and DIR/validation.txt, documents separated by a form feed ('\\f'), and
DIR/test.txt, plain text that may be published. No document is in two of them, no paragraph occurs
twice, and paragraphs of the latter two that training text copies in part (sources quote each other)
are dropped. Every source's licence is listed in ../README.md.
"""

import argparse
import gzip
import hashlib
import random
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Callable, Iterator

DOC_SEPARATOR = "\f"
VALIDATION_BYTES = 200_000
TEST_BYTES = 200_000
MAX_HELD_OUT_DOC_BYTES = 20_000  # so that both hold many documents
MIN_DOC_CHARS = 200
MIN_PARAGRAPH_CHARS = 40
COPIED_RUN = 13  # words in a row that hardly stand twice by chance
MAX_COPIED_SHARE = 0.1  # of a held-out paragraph's words

HTML_SOURCES = {  # package -> folder of its English pages
    "apache2-doc": "usr/share/doc/apache2-doc/manual/en",
    "aptitude-doc-en": "usr/share/doc/aptitude/html/en",
    "debian-faq": "usr/share/doc/debian/FAQ",
    "debian-handbook": "usr/share/doc/debian-handbook/html/en-US",
    "debian-policy": "usr/share/doc/debian-policy",
    "debian-reference-en": "usr/share/debian-reference",
    "developers-reference": "usr/share/developers-reference",
    "git-doc": "usr/share/doc/git/html",
    "harden-doc": "usr/share/doc/harden-doc/html/en-US",
    "installation-guide-amd64": "usr/share/doc/installation-guide-amd64/en",
    "maint-guide": "usr/share/doc/maint-guide/html",
    "postgresql-doc-15": "usr/share/doc/postgresql-doc-15/html",
    "python-django-doc": "usr/share/doc/python-django-doc/html",
    "python3.11-doc": "usr/share/doc/python3.11/html",
}
DICT_SOURCES = ["dict-gcide", "dict-foldoc", "dict-jargon", "dict-devil"]
OTHER_SOURCES = ["bible-kjv", "bible-kjv-text", "perl-doc"]
# Public domain or permissive: the test documents, published with the model, come from these.
PUBLISHABLE = {
    "apache2-doc",
    "bible-kjv-text",
    "dict-devil",
    "dict-jargon",
    "postgresql-doc-15",
    "python-django-doc",
    "python3.11-doc",
}
SAMPLED_BYTES = {"dict-gcide": 16_000_000}  # the dictionary would drown the prose otherwise


class ProseExtractor(HTMLParser):
    """Collects the text of paragraph-like elements; drops navigation, scripts and listings."""

    BLOCKS = {"p", "li", "dt", "dd", "h1", "h2", "h3", "h4", "td", "div", "blockquote"}
    DROPPED = {"script", "style", "nav", "head", "pre", "footer", "table"}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.paragraphs: list[str] = []
        self._text: list[str] = []
        self._dropped: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag in self.DROPPED:
            self._dropped.append(tag)
        if tag in self.BLOCKS:
            self.flush()

    def handle_endtag(self, tag: str) -> None:
        if tag in self._dropped:
            self._dropped.remove(tag)
        if tag in self.BLOCKS:
            self.flush()

    def handle_data(self, data: str) -> None:
        if not self._dropped:
            self._text.append(data)

    def flush(self) -> None:
        text = " ".join("".join(self._text).split()).replace("¶", "").strip()
        self._text.clear()
        if text:
            self.paragraphs.append(text)


def read_text(path: Path) -> str:
    data = (
        gzip.decompress(path.read_bytes()) if path.suffix in (".gz", ".dz") else path.read_bytes()
    )
    return data.decode("utf-8", errors="replace")


def html_documents(root: Path) -> Iterator[str]:
    for path in sorted(p for p in root.rglob("*") if p.suffix == ".html" and p.is_file()):
        extractor = ProseExtractor()
        extractor.feed(read_text(path))
        extractor.flush()
        yield "\n\n".join(p for p in extractor.paragraphs if len(p) >= MIN_PARAGRAPH_CHARS)


def unwrap(text: str) -> str:
    """Joins hard-wrapped lines; blank lines stay paragraph breaks."""
    paragraphs = re.split(r"\n\s*\n", text)
    return "\n\n".join(" ".join(p.split()) for p in paragraphs if p.strip())


def clean_gcide_entry(entry: str) -> str:
    entry = re.sub(r"\\[^\\\n]+\\", "", entry)  # pronunciation
    for _ in range(3):  # etymologies, sources and accents in brackets, some of them nested
        entry = re.sub(r" *\[[^\[\]]*\]", "", entry)
    entry = re.sub(r' *\([^()]*"[^()]*\)', "", entry)  # pronunciation in parentheses
    entry = re.sub(r"\n\s+Syn:.*", "", entry, flags=re.S)
    return unwrap(re.sub(r"[{}]", "", entry)).replace(" ,", ",")


def dict_documents(root: Path, package: str) -> Iterator[str]:
    """Entries of a dictd dictionary: a headword in column 0, then the indented definition."""
    text = read_text(next(root.rglob("*.dz")))
    if package == "dict-devil":
        separator = r"\n\n(?=[A-Z][A-Z-]+, )"
        clean: Callable[[str], str] = unwrap
    else:
        separator = r"\n(?=[A-Za-z])"
        clean = (
            clean_gcide_entry
            if package == "dict-gcide"
            else lambda e: unwrap(re.sub(r"[{}]", "", e))
        )
    for entry in re.split(separator, text):
        yield clean(entry)


def pod_documents(root: Path) -> Iterator[str]:
    """Prose of Perl's POD pages: no commands, no verbatim paragraphs, formatting codes opened."""
    for path in sorted(root.rglob("*.pod")):
        kept = [p for p in read_text(path).split("\n\n") if p and p[0] not in "= \t\n"]
        text = "\n\n".join(" ".join(p.split()) for p in kept)
        for _ in range(3):  # nested codes
            text = re.sub(r"\b[A-Z]<+ ?([^<>]*?) ?>+", r"\1", text)
        yield text


def bible_documents(unpacked: Path) -> Iterator[str]:
    """Chapters, printed by the package's own reader from its compressed file."""
    reader = unpacked / "bible-kjv/usr/bin/bible"
    data = unpacked / "bible-kjv-text/usr/lib"
    out = subprocess.run(
        [reader, "-f", "-l", "10000", "-p", data, "gen1:1-rev22:21"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    chapters: dict[str, list[str]] = {}
    for line in out.splitlines():
        verse = re.match(r"(\S+?)(\d+):(\d+)\s+(.*)", line.strip())
        if verse:
            chapters.setdefault(verse[1] + verse[2], []).append(verse[4])
    for verses in chapters.values():
        yield "\n".join(verses)


def runs_of_words(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"[a-z0-9]+", text.lower())
    return list(zip(*(words[i:] for i in range(COPIED_RUN))))


def copied_share(paragraph: str, copied: set[tuple[str, ...]]) -> float:
    """Share of a paragraph's words that stand in one of the runs `copied`."""
    runs = runs_of_words(paragraph)
    words = {at + i for at, run in enumerate(runs) if run in copied for i in range(COPIED_RUN)}
    return len(words) / (len(runs) + COPIED_RUN - 1)


def drop_copies(held_out: list[str], training: list[str]) -> list[str]:
    """Documents without the paragraphs that training text copies."""
    own = {run for doc in held_out for run in runs_of_words(doc)}
    copied = {run for doc in training for run in runs_of_words(doc) if run in own}
    kept = (
        [p for p in doc.split("\n\n") if copied_share(p, copied) <= MAX_COPIED_SHARE]
        for doc in held_out
    )
    return ["\n\n".join(paragraphs) for paragraphs in kept if paragraphs]


def fetch(packages: list[str], work: Path) -> Path:
    """apt-get download + dpkg -x: nothing is installed."""
    debs, unpacked = work / "debs", work / "unpacked"
    debs.mkdir(parents=True, exist_ok=True)
    for package in packages:
        if (unpacked / package).exists():
            continue
        subprocess.run(["apt-get", "download", package], cwd=debs, check=True)
        deb = next(debs.glob(f"{package}_*.deb"))
        partial = unpacked / f"{package}.partial"
        subprocess.run(["dpkg", "-x", deb, partial], check=True)
        partial.rename(unpacked / package)
    return unpacked


def documents(unpacked: Path) -> Iterator[tuple[str, str]]:
    """(package, text) of every source, before any filtering."""
    for package, folder in HTML_SOURCES.items():
        yield from ((package, d) for d in html_documents(unpacked / package / folder))
    for package in DICT_SOURCES:
        yield from ((package, d) for d in dict_documents(unpacked / package, package))
    yield from (("perl-doc", d) for d in pod_documents(unpacked / "perl-doc"))
    yield from (("bible-kjv-text", d) for d in bible_documents(unpacked))


def is_prose(paragraph: str) -> bool:
    letters = sum(c.isascii() and (c.isalpha() or c == " ") for c in paragraph)
    return letters > 0.8 * len(paragraph)


def deduplicate(docs: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Drops paragraphs seen before anywhere, paragraphs that are not prose, and short documents."""
    seen: set[bytes] = set()
    for package, doc in docs:
        kept = []
        for paragraph in doc.replace(DOC_SEPARATOR, " ").split("\n\n"):
            digest = hashlib.blake2b(
                " ".join(paragraph.lower().split()).encode(), digest_size=12
            ).digest()
            if digest not in seen and is_prose(paragraph):
                seen.add(digest)
                kept.append(paragraph)
        text = "\n\n".join(kept)
        if len(text) >= MIN_DOC_CHARS:
            yield package, text


def sample(docs: list[tuple[str, str]], rng: random.Random) -> list[tuple[str, str]]:
    """Shuffles, and holds the sources in SAMPLED_BYTES to their share."""
    rng.shuffle(docs)
    used: dict[str, int] = {}
    kept = []
    for package, text in docs:
        used[package] = used.get(package, 0) + len(text.encode())
        if used[package] <= SAMPLED_BYTES.get(package, 1 << 60):
            kept.append((package, text))
    return kept


def split(docs: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Whole documents in random order: short ones fill the test split first, when they may be
    published, then the validation split."""
    splits: dict[str, list[str]] = {"test": [], "validation": [], "train": []}
    left = {"test": TEST_BYTES, "validation": VALIDATION_BYTES}
    for package, text in docs:
        size = len(text.encode()) + 2
        target = "train"
        if size <= MAX_HELD_OUT_DOC_BYTES:
            if package in PUBLISHABLE and size <= left["test"]:
                target = "test"
            elif size <= left["validation"]:
                target = "validation"
        if target in left:
            left[target] -= size
        splits[target].append(text)
    return splits


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    work = parser.parse_args().work
    unpacked = fetch([*HTML_SOURCES, *DICT_SOURCES, *OTHER_SOURCES], work)
    docs = sample(list(deduplicate(documents(unpacked))), random.Random(1))
    splits = split(docs)
    for name in ("test", "validation"):
        splits[name] = drop_copies(splits[name], splits["train"])
    for name in ("train", "validation"):
        (work / f"{name}.txt").write_text(DOC_SEPARATOR.join(splits[name]), newline="")
    (work / "test.txt").write_text("\n\n".join(splits["test"]) + "\n", newline="")
    for package in sorted({p for p, _ in docs}):
        sizes = [len(t.encode()) for p, t in docs if p == package]
        deb = next((work / "debs").glob(f"{package}_*.deb")).stem
        print(f"{deb:58s} {len(sizes):7d} documents {sum(sizes) / 1e6:7.2f} MB")
    for name in ("train", "validation", "test"):
        digest = hashlib.sha256((work / f"{name}.txt").read_bytes()).hexdigest()
        print(f"{name}.txt sha256 {digest}")


if __name__ == "__main__":
    main()
