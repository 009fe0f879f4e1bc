"""The registry: every family in its base form, by name."""

from sona.bench.tasks.company import F2, F3, F4
from sona.bench.tasks.formats import F1
from sona.bench.tasks.skills import F7, R1, R2, R3, R4, R5, R6
from sona.bench.tasks.voice import F5, F6

BASE_FAMILIES = (F1, F2, F3, F4, F5, F6, F7, R1, R2, R3, R4, R5, R6)
FAMILIES = {family.name: family for family in BASE_FAMILIES}
TWO_VOICED = frozenset({"F5", "F6"})  # two right answers, half and half
