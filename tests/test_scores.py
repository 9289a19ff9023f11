"""Score rows, their files, and that a damaged file is never read as a good one."""

from __future__ import annotations

import csv
import json
import math

import pytest

from ld_pruner_hf import CRITERIA, OperatorScore, OperatorScores, OutputRule, PlanError, StandInSpec
from ld_pruner_hf.scores import RowFile, check_criterion, read_rows

IDENTITY = StandInSpec((OutputRule("x", 0, "identity"),))
ZERO = StandInSpec((OutputRule("x", 0, "zero"),))


def row(path: str, avg=(1.0, 2.0), std=(3.0, 5.0), stand_in=IDENTITY, **changes) -> OperatorScore:
    return OperatorScore(path, "Conv2d", stand_in, avg, std, **changes)


def scores(*rows: OperatorScore, **changes) -> OperatorScores:
    fields = {
        "architecture": "a",
        "weights": "w",
        "model_class": "UNet",
        "component": "unet",
        "settings": {"seeds": [0, 1]},
    }
    return OperatorScores(rows, **{**fields, **changes})


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("latent-shift", 1 + 3 + 2 + 5),
        ("latent-shift-product", 1 * 3 + 2 * 5),
        ("latent-shift-mean", 1 + 2),
        ("latent-shift-std", 3 + 5),
    ],
)
def test_criteria_are_summed_over_conditions(criterion, expected):
    assert row("a").score(criterion) == expected
    assert (
        criterion in CRITERIA and scores(row("a")).with_criterion(criterion).ranked()[0].score(criterion) == expected
    )


def test_a_criterion_that_was_not_measured_is_refused():
    latents, alone = scores(row("a"), row("b")), scores(row("a", (), (), magnitude=0.5), criterion="magnitude")
    assert latents.criteria == CRITERIA[:4] and alone.criteria == ("magnitude",)
    assert alone.ranked()[0].score("magnitude") == 0.5
    for wrong, criterion, held in [(latents, "taylor", "latent-shift"), (alone, "latent-shift", "magnitude")]:
        for use in (wrong.with_criterion, wrong.ranked, wrong.table, wrong.rows[0].score):
            with pytest.raises(
                ValueError, match=f"got '{criterion}', these scores hold .*'{held}'.*score with criterion="
            ):
                use(criterion)
    assert alone.table()[0]["magnitude"] == 0.5
    assert not {"latent-shift", "random"} & set(alone.table()[0])


def test_scores_without_the_measurement_in_one_row_do_not_hold_it():
    mixed = scores(row("a", random=0.25), row("b"), row("c", (), (), error="RuntimeError: no"))
    assert mixed.criteria == CRITERIA[:4]
    assert scores(row("a", random=0.25), row("c", (), (), error="no")).criteria == (*CRITERIA[:4], "random")


OLD = """{"format": "ld_pruner_hf.scores", "version": 1, "architecture": "a", "weights": "w", "model_class": "UNet", "component": "unet", "settings": {"seeds": [0, 1]}, "criterion": "latent-shift"}
{"path": "conv_in", "kind": "Conv2d", "stand_in": {"name": "identity", "rules": [{"argument": "x", "position": 0, "rule": "identity"}], "structure": 0}, "avg_dist": [1.0, 2.0], "std_dist": [3.0, 5.0], "params_removed": 3, "macs_removed": 4, "latency_share": 0.5, "seconds": 0.1, "error": null}
{"end_of_run": true}
"""


def test_files_from_before_there_were_other_criteria_load(tmp_path):
    (tmp_path / "old.jsonl").write_text(OLD)
    old = OperatorScores.load(tmp_path / "old.jsonl")
    assert old.criteria == CRITERIA[:4] and old.rows[0].score() == 11 and old.rows[0].stand_in == IDENTITY
    old.save(tmp_path / "new.jsonl")
    assert OperatorScores.load(tmp_path / "new.jsonl") == old


def test_unknown_criterion():
    with pytest.raises(ValueError, match=r"criterion: got 'fid', expected one of \['latent-shift'"):
        check_criterion("fid")
    with pytest.raises(ValueError, match="'fid'"):
        scores(row("a")).with_criterion("fid")


def test_ranking_takes_the_best_stand_in_and_puts_failures_last():
    s = scores(
        row("failed", (), (), error="RuntimeError: no"),
        row("bad", (9.0,), (0.0,)),
        row("good", (5.0,), (0.0,)),
        row("good", (1.0,), (7.0,), ZERO),
    )
    assert [(r.path, r.stand_in.name) for r in s.ranked()] == [
        ("good", "identity"),
        ("bad", "identity"),
        ("failed", "identity"),
    ]
    by_mean = s.with_criterion("latent-shift-mean").ranked()
    assert (by_mean[0].path, by_mean[0].stand_in.name) == ("good", "zero")
    assert s.ranked()[-1].score() == math.inf
    assert s.table()[-1] | {"error": "RuntimeError: no", "latent-shift": None, "rank": 4} == s.table()[-1]


def test_a_stand_in_that_works_beats_one_that_failed():
    s = scores(row("a", (), (), error="no"), row("a", (3.0,), (0.0,), ZERO))
    assert [r.stand_in.name for r in s.ranked()] == ["zero"]


def test_file_round_trip(tmp_path):
    s = scores(
        row("a", seconds=0.25, latency_share=0.5, params_removed=3),
        row("b", (), (), error="x"),
        criterion="latent-shift-std",
    )
    s.save(tmp_path / "scores.jsonl")
    assert OperatorScores.load(tmp_path / "scores.jsonl") == s


def test_one_json_document_loads_too(tmp_path):
    path = tmp_path / "scores.json"
    s = scores(row("a"), row("b", (), (), error="x"))
    s.to_json(path)
    assert OperatorScores.load(path) == s and len(json.loads(path.read_text())["rows"]) == 2
    data = json.loads(path.read_text())
    for changed, message in [
        (data | {"rows": 3}, "expected a list 'rows'"),
        (data | {"rows": [{"path": "a"}]}, "score row"),
        (data | {"version": 99}, "upgrade it"),
        ({k: v for k, v in data.items() if k != "weights"}, "has no 'weights'"),
    ]:
        path.write_text(json.dumps(changed))
        with pytest.raises(PlanError, match=message):
            OperatorScores.load(path)
    path.write_text(json.dumps(data, indent=1)[:-30])
    with pytest.raises(PlanError):
        OperatorScores.load(path)


def test_csv_holds_the_table(tmp_path):
    s = scores(row("a"), row("b", (0.5,), (0.0,)), row("c", (), (), error="failed, badly"))
    s.to_csv(tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [r["path"] for r in rows] == ["b", "a", "c"]
    assert float(rows[1]["latent-shift"]) == 11 and rows[2]["error"] == "failed, badly"
    assert "3 operators of unet, 1 failed" in str(s)


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "scores.jsonl"
    with pytest.raises(PlanError, match="no such file of scores"):
        OperatorScores.load(path)
    scores(row("a"), row("b")).save(path)
    header, first, second, end = path.read_text().splitlines()
    assert json.loads(end) == {"end_of_run": True}
    for lines, message in [
        ([header[:30]], "line 1: not readable"),
        (["{}", first], "got format None"),
        ([header, first[:50], second], "line 2: not readable"),
        ([header, first, "[]"], "line 3: got list"),
        ([header, '{"path": "a"}'], "line 2: .*the file is damaged"),
        ([json.dumps({"format": "ld_pruner_hf.scores", "version": 1}), first, end], "no complete file of scores"),
    ]:
        path.write_text("\n".join(lines) + "\n")
        with pytest.raises(PlanError, match=message):
            OperatorScores.load(path)
    path.write_text("")
    with pytest.raises(PlanError, match="no complete first line"):
        OperatorScores.load(path)


def test_a_file_broken_off_inside_a_line_is_no_finished_table(tmp_path):
    path = tmp_path / "scores.jsonl"
    scores(row("a"), row("b")).save(path)
    whole = path.read_bytes().splitlines(keepends=True)
    for content, left in [(b"".join(whole[:3])[:-7], ["a"]), (b"".join(whole[:3]), ["a", "b"])]:
        path.write_bytes(content)  # inside a line; between two rows
        with pytest.raises(PlanError, match=f"breaks off after {len(left)} rows"):
            OperatorScores.load(path)
        assert [r.path for r in read_rows(path).rows] == left


def test_row_file_grows_row_by_row_and_is_taken_up_again(tmp_path):
    path = tmp_path / "scores.jsonl"
    header = scores().header()
    file = RowFile(path, header)
    assert file.found == {}
    file.append(row("a"))
    file.end()
    assert OperatorScores.load(path).rows == (row("a"),)
    file.append(row("b"))
    path.write_bytes(path.read_bytes()[:-3])
    again = RowFile(path, header)
    assert list(again.found) == [("a", "identity")], "the row that was cut off counts as not measured"
    again.append(row("c"))
    again.end()
    assert [r.path for r in OperatorScores.load(path)] == ["a", "c"], "the cut row must not spoil the next one"
    whole = path.read_bytes()
    RowFile(path, header).end()
    assert path.read_bytes() == whole, "a complete file is left as it is"


def test_row_file_of_another_run_is_refused_and_left_as_it_is(tmp_path):
    path = tmp_path / "scores.jsonl"
    RowFile(path, scores().header()).append(row("a"))
    content = path.read_bytes()
    for other in (scores(weights="v"), scores(architecture="b"), scores(settings={"seeds": [0, 1, 2]})):
        with pytest.raises(PlanError, match="made by another run"):
            RowFile(path, other.header())
    assert path.read_bytes() == content
    RowFile(path, scores(criterion="latent-shift-std").header())  # the criterion only changes the ranking


def test_row_file_without_a_path_writes_nothing():
    file = RowFile(None, {})
    file.append(row("a"))
    assert file.found == {row("a").key: row("a")}
