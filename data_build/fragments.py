"""Prompts that describe nothing: no word at all, function words alone ("the "), or broken off in mid-phrase ("a photo of").

They are short, so that by the cosine of their words they are near to very many prompts, and a choice of typical prompts
takes them first. The words are English; texts in other languages pass.
"""

import re

_WORDS = """
a an the this that these those some any each every no all both such of in on at by for from to into onto with
without within over under above below between about as per via off up down out and or but nor so if than then
because while when where which who whom whose what how why i me my mine you your yours he him his she her hers
it its we us our ours they them their theirs is are was were be been being am do does did has have had can
could will would shall should may might must not there here very too also just only
"""
FUNCTION_WORDS = frozenset(_WORDS.split())
_OPEN = re.compile(r"(?:^|[^\W_]\W+|\s)(?:(?i:an|the|of|and|with)|a)[\s.,;:!?'\"-]*$")
"""Ends with a word that no phrase ends with; a capital A may be a name, as in `Vitamin A`."""
SHORT = 8
"""Words. A longer text that is broken off still describes something."""


def is_fragment(text: str) -> bool:
    """Return whether a prompt has no word of its own, or is short and ends where a phrase has just begun."""
    words = re.findall(r"[^\W_]+", text)
    if not words:
        return text.isascii()  # an emoji says something
    if all(word.lower() in FUNCTION_WORDS for word in words):
        return True
    return len(words) <= SHORT and _OPEN.search(text) is not None
