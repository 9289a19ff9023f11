"""The command line, as a user runs it: on the pipeline that ships with the package, in tiny settings."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from ld_pruner_hf import OperatorScores, PruningPlan, cli, plan_of, reporting
from ld_pruner_hf.demo import job, load, names
from ld_pruner_hf.latents import final_latents, preserved
from ld_pruner_hf.loading import load_pipeline

TINY = ["--num-inference-steps", "1", "--guidance-scale", "1"]
INNER = ["--include", "mid_block.resnets.0.conv*", "mid_block.resnets.0.norm*", "mid_block.resnets.0.nonlinearity"]
QUICK = ["--repeats", "2"]
SCORING = [*TINY, *INNER, "--prompt", "red heart", "pizza", "--seeds", "1", "--pooled"]


def run(capsys, *argv):
    """(exit code, stdout, stderr) of one command."""
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def error_of(capsys, *argv):
    """The one line that a user's error prints."""
    code, out, err = run(capsys, *argv)
    lines = [line for line in err.splitlines() if line.startswith("ld-pruner")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in err and not out
    assert lines[0].startswith("ld-pruner: error: ")
    return lines[0]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    assert cli.main(["score", "demo:emoji", "-o", str(folder), *SCORING]) == 0
    return folder


# ---- score -----------------------------------------------------------------------------------------------------------


def test_score_writes_what_the_options_ask_for(scored):
    assert sorted(p.name for p in scored.iterdir()) == ["scores.csv", "scores.json", "scores.jsonl"]
    scores = OperatorScores.load(scored / "scores.jsonl")
    assert {row.path.rpartition(".")[2] for row in scores} == {"conv1", "conv2", "norm1", "norm2", "nonlinearity"}
    assert all(row.error is None and len(row.avg_dist) == 1 for row in scores)  # pooled: one set
    assert scores.settings["seeds"] == [0] and scores.settings["pooled"] is True
    assert [c["prompt"] for c in scores.settings["conditions"]] == ["'red heart'", "'pizza'"]
    assert all(c["num_inference_steps"] == "1" and c["guidance_scale"] == "1.0" for c in scores.settings["conditions"])
    lines = (scored / "scores.csv").read_text().splitlines()
    assert len(lines) == 1 + len(scores) and lines[0].startswith("rank,path,kind")


def test_score_goes_on_where_it_was_interrupted(scored, tmp_path, capsys):
    lines = (scored / "scores.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "scores.jsonl").write_text("".join(lines[:3]) + lines[3][:20])
    code, out, _ = run(capsys, "score", "demo:emoji", "-o", tmp_path, *SCORING)
    assert code == 0 and "operators of unet" in out
    again = (tmp_path / "scores.jsonl").read_text().splitlines(keepends=True)
    assert again[:3] == lines[:3]
    numbers = [[(r.path, r.avg_dist) for r in OperatorScores.load(f / "scores.jsonl")] for f in (scored, tmp_path)]
    assert numbers[0] == numbers[1]


def test_score_does_not_mix_settings(scored, capsys):
    before = (scored / "scores.jsonl").read_bytes()
    line = error_of(capsys, "score", "demo:emoji", "-o", scored, *SCORING, "--seed", "7")
    assert "made by another run" in line
    assert (scored / "scores.jsonl").read_bytes() == before


def test_a_dry_run_tells_the_cost_and_writes_nothing(tmp_path, capsys):
    code, out, _ = run(capsys, "score", "demo:emoji", "-o", tmp_path / "out", *SCORING, "--dry-run")
    assert code == 0 and "effort exact" in out and "denoiser inputs" in out and out.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_score_tells_its_cost_and_takes_an_effort(tmp_path, capsys):
    code, _, err = run(capsys, "score", "demo:emoji", "-o", tmp_path, *SCORING, "--effort", "fast")
    assert code == 0 and "effort fast" in err
    assert OperatorScores.load(tmp_path / "scores.jsonl").settings["effort"] == "fast"


def test_prompts_come_from_a_file(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("cat face\n\n  rocket \n")
    assert run(
        capsys, "score", "demo:emoji", "-o", tmp_path / "out", *TINY, "--prompts", tmp_path / "prompts.txt",
        "--include", "conv_in", "--criterion", "latent-shift-mean",
    )[0] == 0  # fmt: skip
    scores = OperatorScores.load(tmp_path / "out" / "scores.jsonl")
    assert [c["prompt"] for c in scores.settings["conditions"]] == ["'cat face'", "'rocket'"]
    assert scores.criterion == "latent-shift-mean" and len(scores.settings["seeds"]) == 2


# ---- prune -----------------------------------------------------------------------------------------------------------


def latents(pipe):
    with preserved(pipe):
        return final_latents(pipe, {"prompt": "rocket", "num_inference_steps": 2}, [3])


def test_prune_saves_a_pipeline_that_loads_and_differs(scored, tmp_path, capsys):
    out_folder = tmp_path / "pruned"
    code, out, _ = run(
        capsys, "prune", "demo:emoji", "2", "-o", out_folder, "--scores", scored / "scores.json", *QUICK
    )
    assert code == 0 and "before: " in out and "after: " in out
    plan = PruningPlan.load(out_folder / "pruning_plan.json")
    assert len(plan) == 2 and all(path.startswith("mid_block.resnets.0.") for path in plan.paths)
    pruned, original = DiffusionPipeline.from_pretrained(out_folder), load("emoji")
    assert plan_of(pruned.unet).paths == plan.paths
    difference = sum(p.numel() for p in original.unet.parameters()) - sum(p.numel() for p in pruned.unet.parameters())
    assert difference == plan.params_removed
    assert not torch.equal(latents(pruned), latents(original))

    again = tmp_path / "again"  # the plan alone makes the same pipeline
    assert run(capsys, "prune", "demo:emoji", out_folder / "pruning_plan.json", "-o", again, *QUICK)[0] == 0
    assert torch.equal(latents(DiffusionPipeline.from_pretrained(again)), latents(pruned))


def test_prune_scores_first_and_resumes_from_its_folder(scored, tmp_path, capsys):
    lines = (scored / "scores.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "scores.jsonl").write_text("".join(lines[:-1]))
    assert (
        run(capsys, "prune", "demo:emoji", "1", "-o", tmp_path, *SCORING, *QUICK, "--criterion", "latent-shift-mean")[
            0
        ]
        == 0
    )
    assert (tmp_path / "scores.jsonl").read_text().splitlines(keepends=True)[:-1] == lines[:-1]
    plan = PruningPlan.load(tmp_path / "pruning_plan.json")
    assert plan.how["criterion"] == "latent-shift-mean"
    assert not (tmp_path / ".ld-pruner-new").exists() and (tmp_path / "model_index.json").is_file()


@pytest.fixture
def nothing_loads(monkeypatch):
    """Fails the test if a command gets as far as loading a pipeline."""
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: pytest.fail("loaded before the check"))


def test_prune_by_a_budget_with_rounds_and_fitting(tmp_path, capsys):
    inner = ["--kinds", "ResnetBlock2D", "--include", "mid_block*", "down_blocks.3*", "up_blocks.0*"]
    how = ["--params", "0.2", "--method", "rounds", "--rounds", "2", "--fit"]
    options = [*TINY, *QUICK, *inner, "--prompt", "pizza", "--seeds", "1"]
    code, out, _ = run(capsys, "prune", "demo:emoji", "-o", tmp_path, *how, *options)
    assert code == 0 and "load it after `import ld_pruner_hf`" in out
    plan = PruningPlan.load(tmp_path / "pruning_plan.json")
    assert plan.how["budget"] == {"params": 0.2} and plan.how["rounds"] == 2 and "fit" in plan.how
    assert plan.params_removed >= 0.2 * plan.params_before
    assert {"scores.jsonl", "scores-round2.jsonl", "model_index.json"} <= {p.name for p in tmp_path.iterdir()}


def test_prune_by_a_preset_gives_a_stock_pipeline(tmp_path, capsys):
    code, out, _ = run(capsys, "prune", "demo:emoji", "no-mid-block", "-o", tmp_path, *QUICK)
    assert code == 0 and "no-mid-block: 8.14M -> 7.12M params" in out and "loads with plain diffusers" in out
    assert not (tmp_path / "pruning_plan.json").exists()
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["mid_block_type"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["2", "--params", "0.3"], "got ['k', 'params']"),
        ([], "no goal"),
        (["--macs", "3"], "macs: got 3.0, expected the share to take away"),
        (["bk-sdm-base", "--fit"], "['fit'] cannot go together"),
        (["bk-sdm-base", "--criterion", "latent-shift-mean"], "--criterion choose operators"),
        (["2", "--method", "knapsack"], "method: got 'knapsack', expected one of ['top-k', 'rounds']"),
        (["2", "--method", "rounds", "--rounds", "1"], "rounds: got 1"),
    ],
)
def test_prune_checks_its_goal_before_anything_loads(options, message, tmp_path, capsys, nothing_loads):
    assert message in error_of(capsys, "prune", "demo:emoji", "-o", tmp_path / "new", *options)
    assert not (tmp_path / "new").exists()


def test_a_warning_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ld_pruner_hf.profiling.measure_latency", lambda *_: (10.0, 1.0))
    inner = ["--kinds", "UNetMidBlock2DCrossAttn", "--prompt", "pizza", "--seeds", "1"]
    code, _, err = run(capsys, "prune", "demo:emoji", "-o", tmp_path, "--params", "0.05", *TINY, *inner)
    said = [line for line in err.splitlines() if "but no time" in line]
    assert code == 0 and len(said) == 1 and said[0].startswith("ld-pruner: warning: ") and ".py" not in said[0]


def test_prune_never_writes_over_other_files(tmp_path, capsys, nothing_loads):
    (tmp_path / "thesis.txt").write_text("do not lose")
    assert "not empty (it has thesis.txt)" in error_of(capsys, "prune", "demo:emoji", "2", "-o", tmp_path)
    line = error_of(capsys, "prune", "demo:emoji", "2", "-o", tmp_path, "--overwrite")
    assert "replaces only a saved pipeline" in line
    assert (tmp_path / "thesis.txt").read_text() == "do not lose"


def test_overwrite_leaves_nothing_of_the_old_pipeline(scored, tmp_path, capsys):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "old.safetensors").write_text("old")
    scores = ["--scores", scored / "scores.jsonl"]
    assert "not empty" in error_of(capsys, "prune", "demo:emoji", "1", "-o", tmp_path, *scores)
    assert run(capsys, "prune", "demo:emoji", "1", "-o", tmp_path, *scores, *QUICK, "--overwrite")[0] == 0
    assert not (tmp_path / "unet" / "old.safetensors").exists()
    assert plan_of(DiffusionPipeline.from_pretrained(tmp_path).unet) is not None


def test_prune_does_not_write_over_its_own_pipeline(tmp_path, capsys, nothing_loads):
    (tmp_path / "model_index.json").write_text("{}")
    line = error_of(capsys, "prune", tmp_path, "2", "-o", f"{tmp_path}/.", "--overwrite")
    assert "is the pipeline itself" in line


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["prune", "demo:emoji", "0", *TINY], "k: got 0"),
        (["prune", "demo:emoji", "100000", *SCORING], "k: got 100000"),
        (["prune", "demo:emoji", "nothing.json"], "no such file"),
        (["prune", "demo:emoji", "2", "--scores", "nothing.jsonl"], "no such file"),
        (["prune", "demo:emoji", "2", "--prompts", "nothing.txt"], "No such file"),
    ],
)
def test_prune_refuses_impossible_targets_and_missing_files(argv, message, tmp_path, capsys):
    assert message in error_of(capsys, *argv, "-o", tmp_path / "out")
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_a_plan_and_scores_contradict_each_other(scored, tmp_path, capsys, nothing_loads):
    plan = tmp_path / "plan.json"
    PruningPlan("unet", "UNet2DConditionModel", "", ()).save(plan)
    assert "leave these options out" in error_of(
        capsys, "prune", "demo:emoji", plan, "-o", tmp_path / "o", "--scores", scored / "scores.jsonl"
    )


# ---- profile, show ---------------------------------------------------------------------------------------------------


def test_profile_prints_json_that_counts_the_parameters(capsys):
    code, out, _ = run(
        capsys, "profile", "demo:emoji", "--json", "--per-operator", "--repeats", "2", "--prompt", "pizza"
    )
    data = json.loads(out)
    assert code == 0 and data["params"] == sum(p.numel() for p in load("emoji").unet.parameters())
    assert data["operators"]["conv_in"]["params"] > 0 and data["latency_ms"] > 0


def test_profile_prints_a_line_per_operator(capsys):
    code, out, _ = run(capsys, "profile", "demo:emoji", "--per-operator", "--repeats", "2", "--call", "height=128")
    assert code == 0 and re.search(r"^mid_block\.resnets\.0\.conv1 +[\d,]+ +[\d,]+ +\d+\.\d%$", out, re.MULTILINE)
    assert out.splitlines()[-1].startswith("8.")


def test_show_prints_scores_and_plans(scored, tmp_path, capsys):
    for name in ("scores.jsonl", "scores.json"):
        code, out, _ = run(capsys, "show", scored / name, "--criterion", "latent-shift-std")
        assert code == 0 and "latent-shift-std" in out.splitlines()[0] and "conv1" in out
    PruningPlan("unet", "U", "", (), 5).save(tmp_path / "plan.json")
    assert run(capsys, "show", tmp_path / "plan.json")[1].startswith("0 operators of unet")
    (tmp_path / "broken.json").write_text((tmp_path / "plan.json").read_text()[:60])
    assert "truncated or damaged" in error_of(capsys, "show", tmp_path / "broken.json")
    error_of(capsys, "show", tmp_path / "nothing.json")
    error_of(capsys, "show", tmp_path)


# ---- loading, errors, entry points -----------------------------------------------------------------------------------


def test_load_pipeline_takes_a_folder_and_a_dtype(tmp_path):
    pipe = load_pipeline("demo:emoji", "bfloat16", "cpu")
    assert pipe.unet.dtype == torch.bfloat16 and pipe.device.type == "cpu"
    pipe.save_pretrained(tmp_path / "copy")
    assert load_pipeline(str(tmp_path / "copy"), device="cpu").unet.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("demo:nothing", {}, "demo pipeline: got 'nothing'"),
        ("./nothing", {}, "no such folder"),
        ("/nowhere/at/all", {}, "no such folder"),
        (".", {}, "no model_index.json"),
        ("demo:emoji", {"dtype": "int8"}, "dtype: got 'int8'"),
        ("demo:emoji", {"device": "abacus"}, "device: got 'abacus'"),
        ("demo:emoji", {"device": "xla"}, "torch finds no such device"),
    ],
)
def test_load_pipeline_says_what_is_wrong(name, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        load_pipeline(name, **options)


def test_a_hub_id_that_cannot_be_loaded_is_one_line(monkeypatch, capsys):
    def offline(*_, **__):
        raise OSError("We couldn't connect\nto the Hub")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", offline)
    line = error_of(capsys, "profile", "nobody/nothing")
    assert "nobody/nothing: no local folder" in line and "couldn't connect to the Hub" in line


def test_usage_errors_are_one_line(capsys):
    assert "invalid choice: 'scoer'" in error_of(capsys, "scoer")
    assert "required: -o/--output" in error_of(capsys, "prune", "demo:emoji", "2")
    assert "not allowed with" in error_of(capsys, "score", "demo:emoji", "--prompt", "a", "--prompts", "f")
    assert "NAME=VALUE" in error_of(capsys, "profile", "demo:emoji", "--call", "height")


@pytest.mark.parametrize("command", [[], ["score"], ["prune"], ["profile"], ["demo"], ["show"], ["app"]])
def test_help_names_the_options(command, capsys):
    code, out, _ = run(capsys, *command, "--help")
    assert (
        code == 0
        and out.startswith("usage: ld-pruner")
        and "(default: None)" not in out
        and "default: False" not in out
    )


def test_a_bug_keeps_its_traceback_and_an_interruption_has_its_own_code(monkeypatch, capsys):
    def fail(error):
        def loading(*_, **__):
            raise error

        monkeypatch.setattr(DiffusionPipeline, "from_pretrained", loading)

    fail(ZeroDivisionError())
    with pytest.raises(ZeroDivisionError):
        cli.main(["profile", "demo:emoji"])
    fail(KeyboardInterrupt())
    code, _, err = run(capsys, "profile", "demo:emoji")
    assert code == 130 and "interrupted" in err
    fail(ValueError("wrong"))
    code, _, err = run(capsys, "--traceback", "profile", "demo:emoji")
    assert code == 2 and "Traceback" in err and err.endswith("ld-pruner: error: wrong\n")


def test_the_module_runs_and_a_closed_pipe_is_no_error(tmp_path):
    PruningPlan("unet", "U", "", (), 5).save(tmp_path / "plan.json")
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "ld_pruner_hf", "show", str(tmp_path / "plan.json")]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert done.returncode == 0 and "Error" not in done.stderr


# ---- demo ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    settings = job.DemoSettings(
        ks=(2, 3), score_prompts=2, seeds=1, num_inference_steps=1, pictures=2, picture_steps=1, rounds=1, repeats=2,
        include=("mid_block.resnets.0.*",),
    )  # fmt: skip
    return folder, job.run_demo(folder, settings)


def test_demo_writes_everything_that_its_readme_names(demo_folder):
    folder, result = demo_folder
    names = {p.name for p in folder.iterdir()}
    grids = {f"grid_{c}.png" for c in result.plans}
    assert names == grids | {
        "README.md", "costs.csv", "importance_by_block.png", "index.html", "modified_by_block.png", "modified_by_type.png",
        "plan_k2.json", "plan_k3.json", "pruned", "scores.csv", "scores.json", "scores.jsonl",
    }  # fmt: skip
    for name in names:
        if name.endswith(".png"):
            Image.open(folder / name).verify()
    readme = (folder / "README.md").read_text()
    assert "equal bit for bit" in readme and "NOT" not in readme


def test_demo_measures_what_it_prunes(demo_folder):
    folder, result = demo_folder
    assert result.equal_after_reload is True
    assert list(result.profiles) == ["original", "k = 2", "k = 3"]
    original = result.profiles["original"].params
    for k in (2, 3):
        plan = PruningPlan.load(folder / f"plan_k{k}.json")
        assert len(plan) == k
        assert result.profiles[f"k = {k}"].params == original - plan.params_removed
    assert (
        plan_of(DiffusionPipeline.from_pretrained(folder / "pruned").unet).paths
        == result.plans["latent-shift"][2].paths
    )
    for columns in result.pictures.values():
        assert list(columns) == ["original", "k = 2", "k = 3"] and all(len(c) == 2 for c in columns.values())


def test_demo_pictures_are_those_of_the_pruned_pipelines(demo_folder):
    folder, result = demo_folder
    pruned = DiffusionPipeline.from_pretrained(folder / "pruned")
    pictures = reporting.draw(pruned, job.picture_options(pruned, result.settings), job.PROMPTS["emoji"], 2)
    shown = result.pictures["latent-shift"]
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in shown["k = 2"]]
    assert [p.tobytes() for p in pictures] != [p.tobytes() for p in shown["original"]]


def test_demo_page_shows_the_measured_numbers(demo_folder):
    folder, result = demo_folder
    page = (folder / "index.html").read_text()
    for p in result.profiles.values():
        assert f"{p.params / 1e6:.2f} M" in page and f"{p.latency_ms:.1f} ms" in page
    assert "<b>equal, bit for bit, to</b>" in page and f"torch {torch.__version__}" in page
    assert "http" not in page and "<script" not in page


def test_demo_refuses_an_impossible_k_before_it_scores(tmp_path, capsys):
    code, _, err = run(capsys, "demo", "-o", tmp_path / "out", "--k", "99999", "--device", "cpu")
    assert code == 2 and "k: got 99999" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [name for name in names() if name != "emoji"])
def test_demo_of_an_unconditional_pipeline(name, tmp_path, capsys):
    if name == "digits":
        pytest.importorskip("librosa")
    options = ["--k", "2", "--num-inference-steps", "1", "--seeds", "1", "--picture-steps", "1", "--device", "cpu"]
    include = ["--include", "mid_block.resnets.0.*"]
    code, out, _ = run(capsys, "demo", "--pipeline", name, "-o", tmp_path, *options, *include)
    assert code == 0 and "index.html" in out
    page = (tmp_path / "index.html").read_text()
    assert "<b>equal, bit for bit, to</b>" in page and "seed 5, k = 2" in page and "3 seeds, 1 denoising steps" in page
    assert "guidance" not in page.partition("<h2>Settings")[0]
    scores = OperatorScores.load(tmp_path / "scores.jsonl")
    assert scores.settings["seeds"] == [0, 1, 2] and not any(row.error for row in scores)
    original, pruned = (
        Image.open(tmp_path / "grid_latent-shift.png").crop(box) for box in ((0, 0, 200, 200), (200, 0, 400, 200))
    )
    assert original.tobytes() != pruned.tobytes()


def test_demo_refuses_an_unknown_pipeline(tmp_path, capsys):
    assert "invalid choice: 'dogs'" in error_of(capsys, "demo", "--pipeline", "dogs", "-o", tmp_path / "out")
