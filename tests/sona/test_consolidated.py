"""What an interrupted benchmark takes up again, without a model."""

import json
from dataclasses import asdict

import pytest

from sona.bench import consolidated
from sona.bench.consolidation import CONFIG


@pytest.fixture
def written(tmp_path):
    """A file as a run leaves it, of one arm and two seeds."""
    figures = {"final": 0.9, "learned": 1.0, "backward": -0.1, "forward": 0.0, "forgetting": 0.1,
               "retained": 1.0}  # fmt: skip
    runs = [
        {"arm": "routed", "seed": seed, **figures, "final": 0.8 + 0.2 * seed} for seed in (0, 1)
    ]
    settings = {"num_tasks": 12, "model": "", "tune": asdict(CONFIG)}
    path = tmp_path / "arms.json"
    path.write_text(json.dumps({"settings": settings, "runs": runs}))
    return path


def test_what_is_known_is_shown_and_nothing_is_trained(written, capsys, monkeypatch):
    monkeypatch.setattr(consolidated, "Lab", None)  # a model would be asked of it
    status = consolidated.run(arms=["routed"], seeds=2, num_tasks=12, output=written)
    assert status == 0
    assert "final        0.900" in capsys.readouterr().out


def test_a_file_of_other_settings_is_not_mixed_in(written):
    with pytest.raises(ValueError, match="other settings"):
        consolidated.run(arms=["routed"], seeds=2, num_tasks=5, output=written)
