"""The commands put together."""

import click

from sona.cli.adapters import adapters
from sona.cli.bench import bench
from sona.cli.configure import config
from sona.cli.demo import demo
from sona.cli.doctor import doctor
from sona.cli.feedback import feedback
from sona.cli.generate import embed, generate, score
from sona.cli.learning import learning
from sona.cli.models import models
from sona.cli.serve import serve


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="sona", prog_name="sona")
def main() -> None:
    """A language-model server that learns from its own traffic."""


for _command in (
    serve, demo, generate, score, embed, feedback, adapters, learning, doctor, bench, models,
    config,
):  # fmt: skip
    main.add_command(_command)
