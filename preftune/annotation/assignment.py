"""Which items an annotator gets, in which order, and in which order their images stand: functions of (seed, annotator, item).

Nothing here is drawn one after the other: an order is that of digests, so it is the same after a restart, and another annotator,
or another item, changes nothing for those that are there.
"""

import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass

from preftune.annotation.items import Item
from preftune.annotation.tasks import KINDS

GAP = 10
"""Items at least that lie between an item and its repeat, where there are so many."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """An item for an annotator."""

    id: str
    """Known to this annotator alone."""
    item: Item
    visit: int
    """0, or 1 for the second time."""
    order: tuple[int, ...]
    """Places of the item's images, as they are shown."""


def tasks_of(
    items: Sequence[Item], annotator: str, everyone: Sequence[str], secret: str, *,
    seed: int, repeats: float, per_item: int | None,
) -> list[Task]:  # fmt: skip
    """Return all tasks of an annotator in their order.

    Prompts are shuffled; the items of a prompt stand together, in the order of the stages, images to rate shuffled. `per_item`: how
    many of all annotators get a prompt, None = all. `repeats` of the items of each kind come again, at least GAP items
    later where there are so many.
    """
    mine = ordered(
        [item for item in items if annotator in chosen(item.prompt, everyone, per_item, seed)],
        annotator,
        seed,
    )
    again = repeated(mine, annotator, repeats, seed)
    places = [(float(at), item, 0) for at, item in enumerate(mine)]
    for at, item in again:
        first = min(at + GAP, len(mine) - 1)
        later = first + _key(seed, annotator, item.id, "later") % (len(mine) - first)
        places.append((later + 0.5, item, 1))
    places.sort(key=lambda place: (place[0], _key(seed, annotator, place[1].id)))
    return [
        Task(
            id=sealed(secret, "task", annotator, item.id, str(visit)),
            item=item,
            visit=visit,
            order=shuffled(item, annotator, visit, seed),
        )
        for _, item, visit in places
    ]


def chosen(prompt: str, everyone: Sequence[str], number: int | None, seed: int) -> list[str]:
    """Return the annotators of a prompt: those with the smallest digests, so that a new one takes over few prompts only."""
    if number is None:
        return list(everyone)
    return sorted(everyone, key=lambda name: _key(seed, name, prompt))[:number]


def ordered(items: Sequence[Item], annotator: str, seed: int) -> list[Item]:
    """Return an annotator's items in order."""
    return sorted(
        items,
        key=lambda item: (
            _key(seed, annotator, item.prompt, "prompt"),
            item.prompt,
            KINDS.index(item.kind),
            _key(seed, annotator, item.id, "item"),
        ),
    )


def repeated(items: Sequence[Item], annotator: str, share: float, seed: int) -> list[tuple[int, Item]]:
    """Return (place, item) of those that come again: a share of each kind, rounded, rather of those with GAP items behind them."""
    found: list[tuple[int, Item]] = []
    for kind in KINDS:
        places = [at for at, item in enumerate(items) if item.kind == kind]
        places.sort(key=lambda at: (at + GAP >= len(items), _key(seed, annotator, items[at].id, "repeat")))
        found += [(at, items[at]) for at in places[: round(share * len(places))]]
    return found


def shuffled(item: Item, annotator: str, visit: int, seed: int) -> tuple[int, ...]:
    """Return the places of an item's images in the order in which they are shown."""
    return tuple(
        sorted(
            range(len(item.images)),
            key=lambda at: _key(seed, annotator, item.id, str(visit), str(at)),
        )
    )


def sealed(secret: str, *words: str) -> str:
    """Return 128 bits as hexadecimal digits that only who has the secret can compute of these words."""
    text = "\0".join(words).encode("utf-8", "surrogatepass")
    return hmac.new(secret.encode(), text, hashlib.sha256).hexdigest()[:32]


def _key(seed: int, *words: str) -> int:
    """A number of 64 bits that depends on nothing else."""
    text = "\0".join([str(seed), *words]).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
