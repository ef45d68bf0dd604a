"""Which items an annotator gets, in which order, and in which order their images stand.

Orders are functions of (seed, annotator, item). Nothing in them is drawn one after the other: an order is that of digests, so it is
the same after a restart, and another item moves none of those that are there. Shares of prompts (`shared_out`) are kept in the
database and change only when somebody joins, who takes over what nobody has begun.
"""

import hashlib
import hmac
from collections.abc import Collection, Mapping, Sequence
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
    items: Sequence[Item],
    annotator: str,
    secret: str,
    *,
    seed: int,
    repeats: float,
    again: Collection[str] = (),
) -> list[Task]:
    """Return the tasks that an annotator has of the items of a share, in their order.

    Prompts are shuffled; the items of a prompt stand together, in the order of the stages, images to rate shuffled. `repeats` of
    the items of each kind come again, at least GAP items later where there are so many; `again`: ids of items that do in any case,
    because the second time was begun.
    """
    mine = ordered(items, annotator, seed)
    second = repeated(mine, annotator, repeats, seed, again)
    places = [(float(at), item, 0) for at, item in enumerate(mine)]
    for at, item in second:
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


def shared_out(
    prompts: Mapping[str, int], everyone: Sequence[str], number: int, seed: int, *,
    held: Mapping[str, Collection[str]], begun: Mapping[tuple[str, str], int],
) -> dict[str, list[str]]:  # fmt: skip
    """Return prompt -> its annotators: `number` of them, or everyone where there are fewer.

    `prompts`: prompt -> number of its items. `held`: the annotators of each prompt so far; `begun`: (annotator, prompt) -> items
    answered, for prompts of which an annotator has at least seen something. Who has begun a prompt keeps it. Prompts with too
    few annotators go to those with the least work left; then whoever is new takes over prompts that are not begun from those with
    the most, until another one would make it no more even. At the start shares differ by at most one prompt.
    """
    shares = {prompt: sorted(held.get(prompt, ())) for prompt in prompts}
    new = [name for name in everyone if not any(name in names for names in shares.values())]
    for name, prompt in sorted(begun):
        if prompt in shares and name not in shares[prompt]:
            shares[prompt].append(name)
    left = dict.fromkeys(everyone, 0)
    for prompt, names in shares.items():
        for name in names:
            left[name] += prompts[prompt] - begun.get((name, prompt), 0)
    for prompt in sorted(prompts, key=lambda one: _key(seed, one, "share")):
        free = [name for name in everyone if name not in shares[prompt]]
        free.sort(key=lambda name: (left[name], _key(seed, name, prompt)))
        for name in free[: max(number - len(shares[prompt]), 0)]:
            shares[prompt].append(name)
            left[name] += prompts[prompt]
    _take_over(shares, prompts, new, left, begun, seed)
    return shares


def _take_over(
    shares: dict[str, list[str]], prompts: Mapping[str, int], new: Sequence[str], left: dict[str, int],
    begun: Mapping[tuple[str, str], int], seed: int,
) -> None:  # fmt: skip
    """Move prompts that are not begun to new annotators, one by one from whoever has the most left, the last in the order first."""
    waiting: dict[str, list[str]] = {
        name: [prompt for prompt in shares if name in shares[prompt] and (name, prompt) not in begun]
        for name in left
    }
    for name, some in waiting.items():
        some.sort(key=lambda prompt: _key(seed, name, prompt, "prompt"))
    takers = [*new]
    while takers:
        taker = min(takers, key=lambda name: left[name])
        found = next(
            (
                (giver, prompt)
                for giver in sorted(waiting, key=lambda name: -left[name])
                for prompt in reversed(waiting[giver])
                if left[giver] > left[taker] + prompts[prompt] and taker not in shares[prompt]
            ),
            None,
        )
        if found is None:
            takers.remove(taker)
            continue
        giver, prompt = found
        shares[prompt][shares[prompt].index(giver)] = taker
        waiting[giver].remove(prompt)
        left[giver] -= prompts[prompt]
        left[taker] += prompts[prompt]


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


def repeated(
    items: Sequence[Item], annotator: str, share: float, seed: int, again: Collection[str] = ()
) -> list[tuple[int, Item]]:
    """Return (place, item) of those that come again: a share of each kind, rounded, `again` first, and rather those with GAP items
    behind them.
    """
    found: list[tuple[int, Item]] = []
    for kind in KINDS:
        places = [at for at, item in enumerate(items) if item.kind == kind]
        fixed = sum(items[at].id in again for at in places)
        places.sort(
            key=lambda at: (
                items[at].id not in again,
                at + GAP >= len(items),
                _key(seed, annotator, items[at].id, "repeat"),
            )
        )
        found += [(at, items[at]) for at in places[: max(fixed, round(share * len(places)))]]
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
