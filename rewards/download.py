"""Published weights that a command lacks: named all at once, and downloaded where they are on the hub.

Downloads are on by default, as in diffusers' `from_pretrained`: the names of scorers are a closed list, so that a
typing error downloads nothing, and HF_HUB_OFFLINE=1, which every library of the hub obeys, forbids them. Programs
check first that nothing is missing that only a person can fetch. They download once all other flags are known to
be right, and before the first weight is read (rewards.shared_towers.load_all). The size is printed before and the
digest checked after (rewards/hub.py). Of the processes of a run, one downloads each file; the others wait for the
lock of the hub's cache. Where one file of several can only be fetched by hand, nothing is downloaded.
"""

from collections.abc import Collection

from huggingface_hub import constants

from rewards.card import Card
from rewards.hub import fetch_file
from rewards.weights import local, remedy


def to_download(cards: Collection[Card]) -> list[Card]:
    """Return the cards whose weights are not on this machine and have to be downloaded.

    ValueError names all weights that are missing, with their sizes and what to do, where some are not on the hub or
    HF_HUB_OFFLINE=1 is set.
    """
    missing = [card for card in cards if local(card) is None]
    if not all(card.repo is not None and card.folder is None for card in missing):
        raise ValueError(_sentence(missing))
    if missing and constants.is_offline_mode():
        raise ValueError(f"{_sentence(missing)} (HF_HUB_OFFLINE=1 forbids a download)")
    return missing


def obtain(cards: Collection[Card]) -> None:
    """Download what `to_download` finds; ValueError as there, and where a download fails."""
    missing = to_download(cards)
    for index, card in enumerate(missing):
        try:
            fetch_file(str(card.repo), str(card.file), revision=card.revision, sha256=card.sha256)
        except ValueError as error:
            if index == len(missing) - 1:
                raise
            raise ValueError(f"{error}; besides, {_sentence(missing[index + 1 :])}") from error


def _sentence(missing: Collection[Card]) -> str:
    """Say which weights are missing and what to do about each."""
    names = ", ".join(card.name for card in missing)
    if len(missing) == 1:
        return (
            f"the weights of {names} are not here; {remedy(*missing)}, or name the path of one that you have"
        )
    each = "; ".join(f"{card.name}: {remedy(card)}" for card in missing)
    return f"the weights of {names} are not here; {each}; or name the paths of those that you have"
