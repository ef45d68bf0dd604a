"""Rules that take style out of prompts and leave what is to be seen: subject, relations, count, colours, setting.

HPS v2 (arXiv 2306.09341, section 3.1) has a language model do this, with an instruction that is not published; these rules need
no model. In their order:

1. DiffusionDB's spaces: "1 9 8 7" and "8 k" become 1987 and 8k, and in prompts without capitals "sci - fi" becomes sci-fi.
2. Syntax of interfaces: (word:1.3), ((word)), [word], word::2, <lora:name:1> and flags such as --ar 16:9.
3. The prompt is taken apart at commas and other marks. In each part
   - "by NAME", "art by", "painted by", "in the style of", "in anime style" go, up to a word such as with, in or of,
   - phrases of the table (style_words.tsv) that count anywhere go,
   - the part goes as a whole where nothing but words of the table is left of it; after an artist also one that is only names.
4. What is left is joined again, without words such as "and" or "with" at the ends.

"by" is also in "surrounded by flowers" and "a house by the lake": after a participle that is no making of art, or before an
article, it stays. Where a prompt is nothing but style its first part is kept.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from preftune.records import read_lines

TABLE = Path(__file__).with_name("style_words.tsv")
KINDS = ("artist", "camera", "engine", "light", "medium", "quality", "resolution", "site", "style", "syntax")
"""What a rule removes; syntax is of interfaces, and is in no table."""
PLACES = ("alone", "anywhere")
MAX_PHRASE = 8
"""Words of a phrase of the table."""
MAX_NESTED = 5
"""Weights inside each other."""
MAX_NAMES = 40
"""Words after "by"."""
MOSTLY = 0.6
"""Share of a part's words in names of artists from which the rest is taken for names, too."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_WORD = re.compile(r"[^\W_]+(?:['\u2019&][^\W_]+)*")
_JOIN = re.compile(r"[^\w&#]|_")
_NUMBER = re.compile(r"\d+")
_MARK = re.compile(
    r"\s*[,;|]++\s*|(?<=\w\w\w)[.](?=\s|$)\s*|(?<![!?])[!?]++(?=\s|$)\s*|\s+[-\u2013\u2014]\s+|\s*:++(?=\s|$)\s*|\s*::++\s*"
)
_SPACED_DIGITS = re.compile(r"(?<![\w.])\d(?: \d)+(?![\w.])")
_SPACED_UNIT = re.compile(r"(?<![\w.])(\d{1,2}) ([kK]|[dD])(?!\w)")
_SPACED_DECADE = re.compile(r"(?<!\w)(\d{3}0) s(?!\w)")
_SPACED_HYPHEN = re.compile(r"(?<=\w) - (?=\w)")
_FLAG = re.compile(r"\[?(?<![\w-])--[a-z]\w*(?:[ =]?(?:\d[\w.:/]*))?\]?", re.IGNORECASE)
_NO = re.compile(r"(?<![\w-])--no\b.*?(?=--|$)", re.IGNORECASE)
_TAG = re.compile(r"<[\w -]+:[^<>]*>")
_WEIGHTED = re.compile(r"(?<![(\[{])[(\[{]++([^()\[\]{}]*?)\s*:\s*-?\d*\.?\d+\s*[)\]}]+")
_DOUBLED = re.compile(r"\({2,}|\){2,}|[\[\]{}]+")
_PART_WEIGHT = re.compile(r"\s*::\s*-?\d*\.?\d+")

_MAKING = _words(
    "animated composed crafted created designed directed drawn filmed illustrated imagined inspired made painted photographed reimagined rendered"
    " sculpted shot styled taken written"
)
_PARTICIPLES = _words(
    "lit held worn hit driven ridden eaten built seen beaten bitten blown broken caught chosen fed fought led left lost run sent"
    " shown shaken struck sung thrown torn won stand stands standing sit sits sitting walking running passing pass go goes"
)
_NOT_NAMES = _words(
    "a an the his her its their my your our this that these those some any all each every one two three four five six seven eight"
    " nine ten day night nightfall dawn dusk candlelight moonlight sunlight firelight hand side step far itself himself herself"
    " themselves means accident water fire light lights sea river lake mountain mountains tree trees road car train foot"
)
_NAME_ENDS = _words(
    "with in on at from using for as who while during of featuring trending standing wearing holding sitting where which that"
    " made highly ultra hyper very full concept digital oil"
)
_PARTICLES = _words("van von de da del della di la le el al der den af st and & y")
_FILLERS = _words(
    "and with very super ultra extremely insanely highly a an the in on of at by art style styles styled from to is it as for & y"
    " made artwork artworks image picture or also like"
)
_HANGING = _words("and with by in on of the a an as art from at to for &")
_LEADING = _words("and by of")
_IS = re.compile(r"(?<!\w)(?:is|are|be|been|being|was|were|looks?|very|and|or|not|no)\s*$", re.IGNORECASE)
_AND = re.compile(r"\s+(?:and|or)(?!\w)", re.IGNORECASE)
_STYLE = re.compile(r"[\s-]*styled?(?!\w)", re.IGNORECASE)
_BY = re.compile(
    rf"(?:^art(?:work)?\s+)?(?:(?<!\w)(?P<verb>{'|'.join(sorted(_MAKING))})\s+)?(?<!\w)by\s+", re.IGNORECASE
)
_STYLE_OF = re.compile(
    r"(?:^|(?<!\w)(?:in|with|and)\s+)(?:the\s+)?(?<!\w)(?:art\s*)?style\s+of\s+.*?(?=\s(?:with|wearing|holding|standing|sitting)\s|$)",
    re.IGNORECASE,
)
_IN_STYLE = re.compile(r"(?<!\w)in\s+(?:an?\s+|the\s+)?(?:[\w'-]+\s+){1,2}style(?!\w)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Removed:
    """A piece that a rule took out."""

    kind: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Cleaned:
    """A prompt without style."""

    prompt: str
    removed: tuple[Removed, ...] = ()
    only_style: bool = False
    """Whether nothing would have been left, so that the first part was kept."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A phrase of the table in a text."""

    start: int
    end: int
    kind: str
    place: str
    key: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """Phrases by their letters without spaces -> kind and place."""

    phrases: dict[str, tuple[str, str]] = field(repr=False)
    longest: int

    def find(self, text: str) -> Iterator[Found]:
        """The phrases in a text from the left, the longest first; they do not overlap."""
        words = [*_WORD.finditer(text)]
        keys = [key_of(word[0]) for word in words]
        at = 0
        while at < len(words):
            for end in range(min(len(words), at + self.longest), at, -1):
                key = "".join(keys[at:end])
                key = key if key in self.phrases else _NUMBER.sub("#", key)  # 8k, else #k
                if key in self.phrases and _is_close(text, words[at:end]):
                    kind, place = self.phrases[key]
                    yield Found(
                        start=words[at].start(), end=words[end - 1].end(), kind=kind, place=place, key=key
                    )
                    at = end
                    break
            else:
                at += 1


def key_of(text: str) -> str:
    """Return the small letters of a phrase without what is between them."""
    return _JOIN.sub("", text.lower())


def _is_close(text: str, words: Sequence[re.Match[str]]) -> bool:
    """Whether there is nothing but spaces, hyphens, points and slashes between words."""
    gaps = (text[a.end() : b.start()] for a, b in itertools.pairwise(words))
    return all(not gap.strip(" -./") for gap in gaps)


def read_table(path: Path, without: Iterable[str] = ()) -> Table:
    """Return the phrases of a table but of those kinds; ValueError that names a line that is none."""
    left_out, phrases, longest = set(without), dict[str, tuple[str, str]](), 1
    for place, line in read_lines(path):
        if not line.strip() or line.startswith("# "):
            continue
        columns = [column.strip() for column in line.split("\t")]
        if len(columns) != 3 or columns[0] not in KINDS or columns[1] not in PLACES:
            raise ValueError(
                f"{place} must be a kind ({', '.join(KINDS)}), a place ({' or '.join(PLACES)}) and a phrase, with tabs between them"
            )
        key = key_of(columns[2])
        if not key or len(columns[2].split()) > MAX_PHRASE:
            raise ValueError(f"{place}: {columns[2]!r} has no word, or more than {MAX_PHRASE}")
        if columns[0] not in left_out:
            phrases[key] = columns[0], columns[1]
            longest = max(longest, len(columns[2].split()) + 2)  # hyphens count, too
    if not phrases:
        raise ValueError(f"{path} holds no phrases")
    return Table(phrases=phrases, longest=longest)


def unspaced(text: str) -> str:
    """Return a prompt without DiffusionDB's spaces inside numbers and, where it has no capitals, around hyphens."""
    text = _SPACED_DIGITS.sub(lambda match: match[0].replace(" ", ""), " ".join(text.split()))
    text = _SPACED_DECADE.sub(r"\1s", _SPACED_UNIT.sub(r"\1\2", text))
    if text == text.lower():
        text = _SPACED_HYPHEN.sub("-", text).replace("d & d", "d&d")
        text = text.replace("( ", "(").replace(" )", ")")
    return text


def without_syntax(text: str) -> tuple[str, list[Removed]]:
    """Return a prompt without weights, brackets and flags of interfaces, and what was removed."""
    removed = list[Removed]()

    def drop(match: re.Match[str]) -> str:
        removed.append(Removed(kind="syntax", text=match[0].strip()))
        return " "

    for pattern in (_NO, _FLAG, _TAG):
        text = " ".join(pattern.sub(drop, text).split())
    for _ in range(MAX_NESTED):
        removed += [_around(match) for match in _WEIGHTED.finditer(text)]
        text = _WEIGHTED.sub(r"\1", text)
    text = _DOUBLED.sub(drop, _PART_WEIGHT.sub(lambda match: drop(match) + ", ", text))
    return " ".join(text.split()), removed


def _around(match: re.Match[str]) -> Removed:
    """The weight and the brackets of words that stay: (:1.3) of (a red car:1.3)."""
    start, end = (place - match.start() for place in match.span(1))
    return Removed(kind="syntax", text="".join((match[0][:start] + match[0][end:]).split()))


def clean(text: str, table: Table, kept: Iterable[str] = ()) -> Cleaned:
    """Return a prompt without style; kinds in `kept` stay, of which the table has to be read without."""
    kept = frozenset(kept)
    text, removed = unspaced(text), list[Removed]()
    if "syntax" not in kept:
        text, removed = without_syntax(text)
    parts, after_artist, after_gap = list[tuple[str, str]](), False, False
    for mark, part in _parts(text):
        left, gone, artist = (part, [], False) if "artist" in kept else _without_clauses(part, table)
        left, more = _without_phrases(left, table, is_first=not mark)
        if left and after_artist and _is_name(left):
            left, more, artist = "", [*more, Removed(kind="artist", text=left)], True
        if after_gap:
            left = left.removeprefix("and ")
        after_artist = artist or (not left and any(one.kind == "artist" for one in more))
        after_gap = not left
        removed += [*gone, *more]
        if left:
            parts.append((mark, left))
    end = text[-1:] if text[-1:] in (".", "!", "?") and not after_gap else ""
    if parts:
        return Cleaned(prompt=_joined(parts).removesuffix(end) + end, removed=tuple(removed))
    return Cleaned(prompt=_first_words(text, table), removed=tuple(removed), only_style=True)


def _first_words(text: str, table: Table) -> str:
    """The first part of a prompt that is nothing but style, if possible without its artist."""
    first = next((part for _, part in _parts(text) if _WORD.search(part)), text)
    left = _without_clauses(first, table)[0]
    return left if _WORD.search(left) else first


def _parts(text: str) -> Iterator[tuple[str, str]]:
    """(mark before it, part) of a prompt, without empty ones."""
    start, mark = 0, ""
    for match in [*_MARK.finditer(text), None]:
        end = match.start() if match else len(text)
        if part := text[start:end].strip():
            yield mark, part
            mark = ""
        if match:
            mark, start = match[0].strip() or mark, match.end()


def _without_phrases(part: str, table: Table, *, is_first: bool) -> tuple[str, list[Removed]]:
    """A part without phrases that count anywhere, '' where all of it is style, and what was removed."""
    found = [*table.find(part)]
    rest = _cut(part, found)
    words = {word.lower() for word in _WORD.findall(rest)}
    if found and words <= _FILLERS:
        return "", [Removed(kind=found[0].kind, text=part)]
    names = sum(len(_WORD.findall(part[one.start : one.end])) for one in found if one.kind == "artist")
    if not is_first and names and names >= MOSTLY * (names + len(words - _FILLERS)):
        return "", [Removed(kind="artist", text=part)]
    anywhere = [
        one
        for one in found
        if one.place == "anywhere" and not (_IS.search(part[: one.start]) or _AND.match(part, one.end))
    ]  # "the face is very detailed" and "detailed and dark" would be no sentence without
    if not anywhere:
        return part, []
    left = _trimmed(_cut(part, anywhere))
    return left, [Removed(kind=one.kind, text=part[one.start : one.end]) for one in anywhere]


def _cut(text: str, found: Iterable[Found]) -> str:
    for one in reversed([*found]):
        text = text[: one.start] + text[one.end :]
    return text


def _without_clauses(part: str, table: Table) -> tuple[str, list[Removed], bool]:
    """A part without "by NAME" and "in the style of ...", what was removed, and whether an artist was."""
    removed = list[Removed]()
    for pattern in (_STYLE_OF, _IN_STYLE):
        if match := pattern.search(part):
            removed.append(Removed(kind="style", text=match[0].strip()))
            part = f"{part[: match.start()]} {part[match.end() :]}"
    for one in reversed([one for one in table.find(part) if one.kind == "artist"]):
        if match := _STYLE.match(part, one.end):
            removed.append(Removed(kind="artist", text=part[one.start : match.end()]))
            part = f"{part[: one.start]} {part[match.end() :]}"
    at, artist = 0, bool(removed)
    while match := _BY.search(part, at):
        name = _name(part[match.end() :])
        if _is_artist(part[: match.start()], match, name, part[match.end() + len(name) :], table):
            removed.append(Removed(kind="artist", text=(match[0] + name).strip()))
            part, at, artist = (
                f"{part[: match.start()]} {part[match.end() + len(name) :]}",
                match.start(),
                True,
            )
        else:
            at = match.end()
    return (_trimmed(part) if removed else part), removed, artist


def _name(text: str) -> str:
    """The begin of a text up to a word that is in no name."""
    words = [*itertools.islice(re.finditer(r"\S+", text), MAX_NAMES)]
    for word, following in itertools.zip_longest(words, words[1:]):
        joined = following is not None and following[0].lower() in _NOT_NAMES
        if word[0].lower() in _NAME_ENDS or (word[0].lower() == "and" and joined):
            return text[: word.start()]
    return text[: words[-1].end()] if words else ""


def _is_artist(before: str, by: re.Match[str], name: str, after: str, table: Table) -> bool:
    """Whether "by" is followed by who made it, and not by what is near or did something."""
    words = [word.lower() for word in _WORD.findall(name)]
    if not words or words[0] in _NOT_NAMES or words[0].isdigit():
        return False
    if by["verb"] or any(one.kind == "artist" for one in table.find(name)):
        return True
    previous = (_WORD.findall(before[-50:]) or [""])[-1].lower()
    if previous.endswith("ed") or previous in _PARTICIPLES:
        return False
    if not previous or previous in (
        "art",
        "artwork",
        "artstyle",
        "illustration",
        "painting",
        "drawing",
        "photo",
        "photography",
        "portrait",
    ):
        return True
    if name[:1].isupper():
        return True
    return len(words) > 1 and not after.strip() and not _NOT_NAMES & set(words)


def _is_name(part: str) -> bool:
    """Whether a part is nothing but names: two to five words with capitals, besides particles."""
    words = re.findall(r"\S+", part)
    names = [word for word in words if word.lower() not in _PARTICLES]
    return 2 <= len(names) <= 5 and all(
        word[0].isupper() and word.lower() != word.upper() and not word.isupper() for word in names
    )


def _trimmed(text: str) -> str:
    """A text without what hangs at its ends where something was cut off."""
    words = re.sub(r"\(\s*\)", " ", text).split()
    start, end = 0, len(words)
    while start < end and words[start].lower().strip(",;:.-") in _LEADING | {""}:
        start += 1
    while start < end and words[end - 1].lower().strip(",;:.-") in _HANGING | {""}:
        end -= 1
    return " ".join(words[start:end]).strip(" ,;:-")


def _joined(parts: Sequence[tuple[str, str]]) -> str:
    """The parts in one text, each after its own mark."""
    text = ""
    for mark, part in parts:
        mark = (
            mark
            if mark and mark[0] in ".!?"
            else f" {mark}"
            if mark and mark[0] in "|-\u2013\u2014"
            else mark[:1]
        )
        text += f"{mark or ','} {part}" if text else part
    return text
