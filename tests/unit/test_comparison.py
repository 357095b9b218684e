import csv
import json
import xml.etree.ElementTree as ET

import pytest

from latentact.data.cache import DataConfig
from latentact.data.time_base import frames_in_gap
from latentact.errors import UserError
from latentact.evaluation.policy.comparison import Row, aggregate, verdict
from latentact.evaluation.policy.intervals import success_interval
from latentact.policies.latent import LatentConfig
from latentact.policies.network import NetworkConfig
from latentact.reporting.comparison_plot import write_comparison
from latentact.stages import compare


def row(method, rate, *, k=5, seed=0, episodes=100, **more):
    won = round(rate * episodes)
    values = {
        "method": method,
        "k": k,
        "seed": seed,
        "episodes": episodes,
        "success": rate,
        "return": rate,
    }
    successes = [1] * won + [0] * (episodes - won)
    interval = list(success_interval(successes))
    return Row.from_json(
        {
            **values,
            "ci95": interval,
            "return_ci95": interval,
            "successes": successes,
            "run": f"{method}/{seed}",
        }
        | more
    )


def rows(**success):
    return [row(method, value, k=None if "oracle" in method else 5) for method, value in success.items()]


@pytest.mark.parametrize(
    ("method", "name"),
    [
        ("latent", "Latent policy"),
        ("latent_joint", "Latent policy with joint head"),
        ("bc_k", "BC on k labels"),
        ("idm_k", "IDM on k labels"),
    ],
)
def test_the_first_sentence_names_the_winner_whoever_it_is(method, name):
    scores = {"latent": 0.3, "latent_joint": 0.3, "bc_k": 0.3, "idm_k": 0.3, "oracle": 0.9} | {method: 0.8}
    message = verdict(rows(**scores))
    assert message.startswith(
        f"{name} wins with 5 labeled episodes: success 0.80 (0.71 to 0.87) against 0.30"
    )
    assert "the next best; the intervals do not overlap." in message
    assert message.endswith("scores 89% of the oracle, BC on all labels, which reaches 0.90 (0.83 to 0.94).")


def test_when_a_baseline_wins_the_latent_policy_is_still_reported():
    message = verdict(rows(latent=0.2, latent_joint=0.25, bc_k=0.7, idm_k=0.5))
    assert message.startswith("BC on k labels wins with 5 labeled episodes: success 0.70")
    assert "against 0.50 (0.40 to 0.60) for IDM on k labels" in message
    assert "The best latent policy, Latent policy with joint head, reaches 0.25 (0.18 to 0.34)" in message


def test_when_latent_policies_lead_the_best_baseline_is_reported():
    message = verdict(rows(latent=0.7, latent_joint=0.75, bc_k=0.2, idm_k=0.5))
    assert (
        "for Latent policy, the next best; the intervals overlap, so more episodes or seeds could" in message
    )
    assert (
        "The best baseline, IDM on k labels, reaches 0.50 (0.40 to 0.60); the intervals do not overlap."
        in message
    )


def test_ties_failures_and_loneliness():
    assert verdict(rows(latent=0.5, bc_k=0.5)).startswith("Latent policy and BC on k labels tie with 5")
    assert verdict(rows(latent=0.0, bc_k=0.0)).startswith("No method wins with 5 labeled episodes: none ever")
    assert verdict(rows(bc_k=0.4)).startswith("BC on k labels with 5 labeled episodes reaches success 0.40")
    assert verdict(rows(oracle=0.4)) == "There is no method with k labels to compare."


def test_what_observes_nothing_is_a_floor():
    message = verdict([*rows(latent=0.5, bc_k=0.2, idm_k=0.27), *blind(uniform=0.27, frequencies=0.1)])
    assert message.endswith(
        "Without observations, uniformly random actions reach 0.27 (0.19 to 0.36); no better than that: "
        "IDM on k labels (5 labeled episodes), BC on k labels (5 labeled episodes)."
    )
    message = verdict([*rows(latent=0.5, bc_k=0.2), *blind(uniform=0.1, frequencies=0.15)])
    assert message.endswith("observations, random actions of the data reach 0.15 (0.09 to 0.23).")


def blind(**success):
    return [row(method, value, k=None) for method, value in success.items()]


def test_a_vla_stands_beside_the_same_without_pretraining():
    message = verdict(rows(vla=0.6, vla_scratch=0.3, idm_k=0.35, oracle=0.5, vla_oracle=0.8))
    assert message.startswith(
        "VLA pretrained on latent actions wins with 5 labeled episodes: success 0.60 (0.50 to 0.69) against"
    )
    assert (
        "At equal steps of fine-tuning, latent actions of the video take the VLA from 0.30 to 0.60; the "
        "intervals do not overlap." in message
    )
    assert (
        "is at least as good as the oracle, BC on all labels, which reaches 0.50 (0.40 to 0.60). The best"
        in message
    )
    assert message.endswith(
        "scores 75% of the oracle VLA, trained on all labels, which reaches 0.80 (0.71 to 0.87)."
    )
    message = verdict(rows(vla=0.2, vla_scratch=0.5, bc_k=0.1))
    assert message.startswith("VLA on k labels, not pretrained wins with 5 labeled episodes")
    assert "take the VLA from 0.50 to 0.20; the intervals do not overlap." in message
    assert "of the VLA" not in message


def test_several_k():
    few, many = (
        [row("latent", 0.6, k=1), row("bc_k", 0.1, k=1)],
        [row("latent", 0.7, k=50), row("bc_k", 0.9, k=50)],
    )
    message = verdict([*few, *many, row("oracle", 0.9, k=None)])
    assert message.startswith("The winner depends on k: Latent policy at k = 1, BC on k labels at k = 50. ")
    assert "Latent policy wins with 1 labeled episode: success 0.60" in message
    assert message.endswith(
        "The best method with 50 labeled episodes is at least as good as the oracle, BC on all labels, "
        "which reaches 0.90 (0.83 to 0.94)."
    )
    assert verdict([*few, row("latent", 0.7, k=9), row("bc_k", 0.2, k=9)]).startswith(
        "Latent policy wins at every k (1, 9). "
    )


def test_seeds_are_pooled_with_wilson_over_all_episodes():
    (result,) = aggregate(
        [row("latent", 0.5, seed=0), row("latent", 0.7, seed=1), row("latent", 0.6, seed=2)]
    )
    assert (result.seeds, result.episodes, result.success) == (3, 300, 0.6)
    assert result.ci95 == pytest.approx(success_interval([True] * 180 + [False] * 120))
    assert result.per_seed == (0.5, 0.7, 0.6)


def test_returns_of_seeds_are_pooled_by_hand():
    pair = [
        row("latent", 0.5, seed=s, **{"return": r, "return_ci95": [r - 3, r + 3]})
        for s, r in ((0, 10), (1, 20))
    ]
    (result,) = aggregate(pair)
    assert result.mean_return == 15
    # half-widths 3 and 3, weights 1/2 each: sqrt(1.5 ** 2 + 1.5 ** 2)
    assert result.return_ci95 == pytest.approx((15 - 4.5**0.5, 15 + 4.5**0.5))


def test_without_success_the_return_decides():
    def blind(method, value):
        interval = [value - 1, value + 1]
        return row(method, 0.0, **{"success": None, "ci95": None, "return": value, "return_ci95": interval})

    message = verdict([blind("latent", 5.0), blind("bc_k", 9.0)])
    assert message.startswith("BC on k labels wins with 5 labeled episodes: return 9.00 (8.00 to 10.00)")


def test_fine_tuned_policies_are_shown_and_do_not_compete():
    tuned = {"success": 0.9, "return": 0.9, "ci95": [0.8, 0.95]}
    table = [row("latent", 0.3, decoder_only=tuned), row("bc_k", 0.6)]
    assert [r.method for r in aggregate(table)] == ["latent", "latent_decoder_only", "bc_k"]
    assert aggregate(table)[1].success == 0.9
    assert verdict(table).startswith("BC on k labels wins")


@pytest.mark.parametrize("ks", [(5,), (2, 5)])
def test_files(tmp_path, ks):
    table = [row(m, s, k=k) for k in ks for m, s in (("latent", 0.7), ("bc_k", 0.2))] + [
        row("oracle", 0.9, k=None)
    ]
    content = write_comparison(tmp_path, "<env> & co", table)
    assert json.loads((tmp_path / "comparison.json").read_text()) == content
    assert content["verdict"] == verdict(table)
    assert [Row.from_json(r) for r in content["rows"]] == table
    with (tmp_path / "comparison.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == [r.method for r in table]
    assert lines[-1]["k"] == ""
    assert float(lines[0]["success_low"]) == pytest.approx(success_interval([1] * 70 + [0] * 30)[0])
    svg = ET.fromstring((tmp_path / "comparison.svg").read_text())
    message = "".join(svg.itertext())
    assert "Success of every method on <env> & co" in message
    assert "Latent policy" in message
    assert "Oracle BC (all labels)" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "comparison.csv",
        "comparison.json",
        "comparison.svg",
    ]


@pytest.mark.parametrize(("gap_s", "steps"), [(0.0, 1), (0.1, 1), (0.2, 2), (0.5, 5)])
def test_chunks_of_behavior_cloning_last_as_long_as_latent_ones(blocks, tmp_path, gap_s, steps):
    network = NetworkConfig(backbone="patch", patch=4, chunk_size=3, n_action_steps=2)
    config = compare.CompareConfig(
        data=DataConfig(path=str(blocks), resolution=32),
        env="any",
        policy=LatentConfig(network=network),
        frame_gap_s=gap_s,
    )
    for method in ("bc_k", "idm_k", "oracle"):
        plain = compare._Row(config, tmp_path, method, 5, 0)._behavior_cloning().network
        assert (plain.chunk_size, plain.n_action_steps) == (3 * steps, 2 * steps)


def test_a_gap_in_seconds_needs_a_frame_rate():
    with pytest.raises(UserError, match="frame_gap_s must be 0 for videos, which has no frame rate"):
        frames_in_gap(0.1, 0.0, "videos", setting="frame_gap_s")
