r"""General English for the benchmarks, from a package on PyPI: Wikipedia to train on, news articles to evaluate on.

    pip install mwparserfromhell
    pip download --no-deps gensim==4.4.0 --dest build/text
    python benchmarks/general_english.py --wheel build/text/gensim-4.4.0-*.whl --output build/text

gensim's tests carry 106 articles of the English Wikipedia, as wikitext, and the 300 news articles of Lee, Pincombe and
Welsh (2005). `wikipedia.jsonl` and `news.jsonl` have the column `text`, a passage or an article a line, shuffled with
seed 0.
"""

import argparse
import bz2
import json
import random
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import mwparserfromhell

DATA = "gensim/test/test_data/"
WIKIPEDIA = DATA + "enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
NEWS = DATA + "lee_background.cor"

#: What a reader of the article does not see as part of its text.
HIDDEN = ("ref", "table", "gallery", "math", "timeline")

#: Links to pictures, categories and other languages.
ELSEWHERE = re.compile("(file|image|category|[a-z-]{2,12}):", re.IGNORECASE)

#: Characters of a passage, at least: an article is too long to see many in a short run.
PASSAGE = 2000


def articles(wikitext: bytes) -> Iterator[str]:
    """The texts of the pages of an export, without markup, references and tables."""
    parser = ElementTree.XMLPullParser(["end"])
    parser.feed(wikitext)
    for _, page in parser.read_events():
        source = page.findtext(".//{*}text") if page.tag.endswith("}page") else None
        if not source or page.findtext("./{*}ns") != "0" or source.lower().startswith("#redirect"):
            continue
        code = mwparserfromhell.parse(source)
        for tag in code.filter_tags(matches=lambda tag: tag.tag in HIDDEN):
            if code.contains(tag):
                code.remove(tag)
        for link in code.filter_wikilinks(matches=lambda link: ELSEWHERE.match(str(link.title))):
            if code.contains(link):
                code.remove(link)
        text = re.sub(r"\s*\n\s*\n\s*", "\n\n", code.strip_code()).strip()
        yield re.split(r"\n(?:See also|References|Notes|External links)\n", text)[0]


def passages(article: str) -> Iterator[str]:
    """Paragraphs of an article, together until they are long enough; what remains at its end is left out."""
    passage = ""
    for paragraph in article.split("\n\n"):
        passage += paragraph + "\n\n"
        if len(passage) >= PASSAGE:
            yield passage
            passage = ""


def main() -> None:
    """Read the wheel, write the two files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path, help="folder")
    options = parser.parse_args()
    with zipfile.ZipFile(options.wheel) as wheel:
        encyclopedia = articles(bz2.decompress(wheel.read(WIKIPEDIA)))
        texts = {
            "wikipedia": [passage for article in encyclopedia for passage in passages(article)],
            "news": wheel.read(NEWS).decode("utf-8").splitlines(),
        }
    options.output.mkdir(parents=True, exist_ok=True)
    for name, documents in texts.items():
        documents = [document.strip() for document in documents if document.strip()]
        random.Random(0).shuffle(documents)
        lines = [json.dumps({"text": document}, ensure_ascii=False) + "\n" for document in documents]
        (options.output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{name}: {len(documents)} texts, {sum(map(len, documents)):,} characters")


if __name__ == "__main__":
    main()
