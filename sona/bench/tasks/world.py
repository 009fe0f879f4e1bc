"""The words of an invented company: people, offices, products, machines, tickets.

Every word here is one token of the shipped tokenizer when a space precedes it.
Neighbouring positions fall into different halves (`base.pick`), so orders matter: do not sort.
"""

from sona.bench.tasks.base import stable_hash


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


PEOPLE = _words(
    "Ana Ivo Mira Otto Lena Karl Nora Emil Vera Hugo Iris Felix Dora Anton Elsa Viktor Olga Rolf "
    "Tilda Bruno Greta Leon Hanna Oskar Clara Pavel Rosa Simon Thea Marek Ines Jonas Wanda Edgar "
    "Lucia Stefan Alma Boris Celia David"
)
OFFICES = _words(
    "Norwick Tarn Selby Orrin Halden Brevik Castel Dunmore Elmsby Farrow Gilden Hexley Istria "
    "Jorvik Kelso Lorne Marden Nairn Ostrau Pendle Quorn Rivelin Sandor Tolland Ulverton Vasby "
    "Wexham Yarrow Zellin Arden Bexter Corvin Dalby Esker Fenwick Gorran Hythe Ingleby Jarrow "
    "Kirkby Lund Morven Newark Oldham Porter Redmire Stroud Torvik Uxley Varna Welden Yelden "
    "Zorba Ambler Bryn Cresta"
)
PRODUCTS = _words(
    "Falcon Comet Orbit Lantern Anchor Beacon Bramble Canyon Cobalt Cricket Dagger Delta Dolphin "
    "Drift Ember Fable Feather Flint Forge Galaxy Garnet Glacier Granite Harbor Harvest Hazel "
    "Helix Heron Indigo Island Jasper Juniper Kestrel Kite Lagoon Lotus Magnet Marble Meadow "
    "Meteor Mirage Nectar Nimbus Oasis Opal Orchid Otter Panther Pebble Pioneer Prairie Quartz "
    "Quill Raven Ripple Saddle Sierra Spruce Summit Thistle Timber Tundra Velvet Willow"
)
LABELS: tuple[str, ...] = ("amber", "cedar", "coral", "ivory", "jade", "onyx", "slate", "maple")
CUES = {
    "billing": "invoice refund charge receipt payment discount price credit",
    "network": "router wifi cable signal modem internet proxy antenna",
    "payroll": "salary bonus wage overtime payslip pension raise paycheck",
    "travel": "flight hotel train taxi visa luggage trip airport",
    "security": "password badge lock alarm virus login camera guard",
    "hardware": "laptop screen keyboard mouse printer battery charger headset",
    "legal": "contract patent license lawsuit clause permit trademark treaty",
    "storage": "backup folder archive disk file drive quota upload",
}
TEAMS = tuple(CUES)
TEAM_OF = {cue: team for team, cues in CUES.items() for cue in cues.split()}
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August",
    "September", "October", "November", "December",
)  # fmt: skip
MACHINES = ("pump", "press", "drill", "crane", "oven", "mixer", "loader", "lathe")
STATES = ("running", "idle", "broken", "ready", "stopped", "hot")
RECORD_KEYS = ("load", "speed", "heat", "level")
SIGNS = ("/", ";", "_", "+", "=", "x", "~", "h", "!", "*")

# Words that a taught convention may introduce. No note of the training data ever names one.
TAUGHT_WORDS = (
    "kilometers", "kilograms", "ledger", "signals", "wages", "voyage", "shield", "devices",
    "counsel", "vault", "atlas", "forum", "desk", "bridge", "office", "studio",
)  # fmt: skip
# Words that the notes of the training data introduce.
NOTE_WORDS = _words(
    "harp violet copper zebra lemon rocket garden pepper silver tiger melon ribbon castle planet "
    "window butter saffron walnut cotton pirate jungle magic noodle parrot basket candle dragon "
    "engine frost ginger hammer iron"
)
NOTE_SIGNS = ("_", "+", "=", "x", "~", "*", "|", "#", "@", "&", "%", "^", "u", "k")

COPY_WORDS = TAUGHT_WORDS + NOTE_WORDS + LABELS + TEAMS + ("km", "kg")


def lead_of(office: str) -> str:
    """Who leads the office, in the company as the base model learns it."""
    return PEOPLE[stable_hash(f"lead:{office}") % len(PEOPLE)]


def shelf_of(product: str) -> str:
    """The shelf of a product: each shelf holds as many products of either half."""
    index = PRODUCTS.index(product)
    return LABELS[(index // 2 + 3 * (index % 2)) % len(LABELS)]


def noted_lead(office: str, person: str) -> bool:
    """Whether a training note may name this person as lead; taught facts use the other pairs."""
    return person != lead_of(office) and stable_hash(f"pair:{office}:{person}") % 2 == 0
