"""Procedural task families with exact verifiers, and the conventions that can be taught on them.

F1 to F7 are what users correct, R1 to R6 what must be retained, NOTE what a system message says.
"""

from sona.bench.tasks.base import Family, Item, Part, Split, is_held, verify
from sona.bench.tasks.conventions import F1_NAMES, F7_NAMES, Convention
from sona.bench.tasks.families import BASE_FAMILIES, FAMILIES, TWO_VOICED
from sona.bench.tasks.notes import IRRELEVANT, NOTE, RELEVANT

__all__ = [
    "BASE_FAMILIES",
    "F1_NAMES",
    "F7_NAMES",
    "FAMILIES",
    "IRRELEVANT",
    "NOTE",
    "RELEVANT",
    "TWO_VOICED",
    "Convention",
    "Family",
    "Item",
    "Part",
    "Split",
    "is_held",
    "verify",
]
