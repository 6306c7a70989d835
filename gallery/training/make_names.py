"""Write the bundled text set again: names of countries, languages and currencies in ten languages.

They come from the Unicode Common Locale Data Repository by way of the package Babel. A name that several of the
languages share is left out. Writes ``names.tsv`` and the licence beside it::

    python gallery/training/make_names.py
"""

from __future__ import annotations

import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import babel

LANGUAGES = ["de", "en", "es", "fi", "fr", "it", "nl", "pl", "sv", "tr"]
HERE = Path(__file__).parent
LICENSE = Path(babel.__file__).parent / "locale-data" / "LICENSE.unicode"


def names_of(language: str) -> set[str]:
    """All names of a language that are neither codes nor sentences."""
    locale = babel.Locale(language)
    names = {*locale.territories.values(), *locale.languages.values(), *locale.currencies.values()}
    return {name for name in names if 3 <= len(name) <= 40 and not re.search(r"[\d()]", name)}


def main() -> None:
    """Write the two files."""
    found = {language: names_of(language) for language in LANGUAGES}
    times = Counter(name for names in found.values() for name in names)
    rows = sorted((language, name) for language, names in found.items() for name in names if times[name] == 1)
    (HERE / "names.tsv").write_text("".join(f"{language}\t{name}\n" for language, name in rows), encoding="utf-8")
    source = f"names.tsv is made from CLDR data in Babel {version('babel')}, by make_names.py; its licence:\n\n"
    (HERE / "names.LICENSE").write_text(source + LICENSE.read_text(encoding="utf-8"), encoding="utf-8")
    print(f"{len(rows)} names in {len(LANGUAGES)} languages")


if __name__ == "__main__":
    main()
