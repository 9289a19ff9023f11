"""Push, then load by repo id: both upload paths, every option, every fault; through real HTTP."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import ModelCard, constants
from pruned import Pruned

import ld_pruner_hf
from ld_pruner_hf import Evidence, OperatorScores, PruningPlan, cli, load_plan, publish
from ld_pruner_hf.hub import push_folder
from ld_pruner_hf.loading import load_pipeline
from ld_pruner_hf.measurements import Measurements

from . import cards
from .server import OTHER, READ, WRITE

DOWNLOADS = ("/api/resolve-cache/", "/cdn/", "/xorb-data/")
LARGE = "^/v1/(xorbs|shards)|^/lfs/"

DRAW = """
import numpy as np, sys, torch
from diffusers import DiffusionPipeline

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    torch.set_num_threads(1)
    torch.manual_seed(3)
    return np.asarray(pipe("cat face", num_inference_steps=2, output_type="np").images[0])
"""


def picture(pipe):
    torch.manual_seed(3)
    return tiny.picture(tiny.quiet(pipe), prompt="cat face")


def state_of(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def commits(hub, repo_id, revision="main"):
    return list(hub.store.repo("model", repo_id).log(revision))


def run(capsys, *argv):
    code = cli.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


# ---- push and load ---------------------------------------------------------------------------------------------------


def test_one_commit_with_everything_then_loads_equal_and_only_once(hub, base, result, transport, capsys):
    repo_id = f"alice/pruned-{transport}"
    before = state_of(result)
    code, out, _ = run(capsys, "publish", result, repo_id)
    assert code == 0
    assert f"{hub.url}/{repo_id}/commit/" in out
    assert len(commits(hub, repo_id)) == 2  # the Hub's own first commit, and ours
    assert state_of(result) == before
    files = set(hub.store.repo("model", repo_id).files())
    assert {"README.md", "pruning_plan.json", "scores.jsonl", "measurements.json", "model_index.json"} <= files
    assert {"figures/removed_by_block.png", "figures/importance_by_block.png"} <= files
    used = {"xet": "/v1/xorbs", "lfs": "/lfs/"}
    sent = [e["path"] for e in hub.log if e["method"] in ("POST", "PUT")]
    assert not any(p.startswith(used["lfs" if transport == "xet" else "xet"]) for p in sent)

    pipe = DiffusionPipeline.from_pretrained(repo_id)
    assert np.array_equal(picture(pipe), picture(DiffusionPipeline.from_pretrained(result)))
    assert any(e["path"].startswith(DOWNLOADS) for e in hub.log)
    hub.log.clear()
    again = load_pipeline(repo_id, device="cpu")
    assert not [e for e in hub.log if e["path"].startswith(DOWNLOADS) and e["method"] == "GET"]
    assert np.array_equal(picture(again), picture(pipe))


def test_fresh_processes_load_it_with_and_without_the_plugin(hub, base, result, fresh, tmp_path):
    publish(result, "alice/remote", remote_code=True)
    np.save(tmp_path / "expected.npy", picture(DiffusionPipeline.from_pretrained(result)))
    with_plugin = (
        DRAW
        + (
            "import ld_pruner_hf\n"
            "pipe = DiffusionPipeline.from_pretrained('alice/remote')\n"  # the flag is not needed, and the shipped code not run
            "assert not any(m.endswith('ld_pruner_hf_code') for m in sys.modules)\n"
            "assert np.array_equal(draw(pipe), np.load(sys.argv[1]))\n"
        )
    )
    done = fresh(with_plugin, tmp_path / "expected.npy")
    assert done.returncode == 0, done.stderr
    without = DRAW + (
        "from diffusers import UNet2DConditionModel\n"
        "def refused(load, *words):\n"
        "    try:\n"
        "        load()\n"
        "    except ValueError as error:\n"
        "        assert all(word in str(error) for word in words), error\n"
        "    else:\n"
        "        raise AssertionError('loaded')\n"
        "refused(lambda: DiffusionPipeline.from_pretrained('alice/remote'), 'trust_remote_code=True')\n"
        "refused(lambda: UNet2DConditionModel.from_pretrained('alice/remote', subfolder='unet'), 'import ld_pruner_hf')\n"
        "pipe = DiffusionPipeline.from_pretrained('alice/remote', trust_remote_code=True)\n"
        "assert np.array_equal(draw(pipe), np.load(sys.argv[1]))\n"
        "assert type(pipe.unet) is UNet2DConditionModel\n"
        "pipe.save_pretrained(sys.argv[2])\n"
        "assert np.array_equal(draw(DiffusionPipeline.from_pretrained(sys.argv[2])), np.load(sys.argv[1]))\n"
    )
    done = fresh(without, tmp_path / "expected.npy", tmp_path / "saved", without_plugin=True)
    assert done.returncode == 0, done.stderr


def test_without_remote_code_a_process_without_the_plugin_is_told_what_to_do(hub, base, result, fresh):
    publish(result, "alice/plain")
    script = DRAW + "DiffusionPipeline.from_pretrained('alice/plain', trust_remote_code=True)"
    done = fresh(script, without_plugin=True)
    assert done.returncode
    assert "import ld_pruner_hf" in done.stderr.splitlines()[-1]


def test_a_stock_result_loads_without_the_plugin(hub, base, fresh, tmp_path):
    pipe = tiny.stable_diffusion()
    pipe.prune("no-mid-block")
    pipe.push_to_hub("alice/stock", remote_code=True)
    assert not [f for f in hub.store.repo("model", "alice/stock").files() if f.endswith(".py")]
    np.save(tmp_path / "expected.npy", picture(pipe))
    script = (
        DRAW + "assert np.array_equal(draw(DiffusionPipeline.from_pretrained('alice/stock')), np.load(sys.argv[1]))"
    )
    done = fresh(script, tmp_path / "expected.npy", without_plugin=True)
    assert done.returncode == 0, done.stderr


def test_published_files_say_nothing_about_this_machine(hub, base, result, tmp_path):
    reloaded = DiffusionPipeline.from_pretrained(result)  # its configs now name the folder
    reloaded.save_pretrained(tmp_path / "again")
    assert str(result) in (tmp_path / "again" / "unet" / "config.json").read_text()
    publish(tmp_path / "again", "alice/anonymous", Evidence(scores=OperatorScores.load(result / "scores.jsonl")))
    repo = hub.store.repo("model", "alice/anonymous")
    for path in repo.files():
        content = repo.read(path)
        for secret in (str(result), str(tmp_path), str(Path.home()) + "/", WRITE, "name_or_path"):
            assert secret.encode() not in content, (path, secret)
    settings = OperatorScores.load(_write(tmp_path / "scores.jsonl", repo.read("scores.jsonl"))).settings
    assert settings["conditions"] == 1  # counted, not quoted


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_a_file_that_quotes_local_folders_is_not_published(hub, base, result, tmp_path):
    shutil.copytree(result, tmp_path / "leaky")
    plan = PruningPlan.load(result / "pruning_plan.json")
    config = json.loads((tmp_path / "leaky" / "unet" / "config.json").read_text())
    config["pruning_plan"]["how"]["note"] = f"{Path.home()}/secret"
    (tmp_path / "leaky" / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="would publish the home folder"):
        publish(tmp_path / "leaky", "alice/leaky")
    assert hub.store.repo("model", "alice/leaky") is None
    assert len(plan) == 8


# ---- options ---------------------------------------------------------------------------------------------------------


def test_private(hub, base, result, capsys):
    assert run(capsys, "publish", result, "alice/private", "--private")[0] == 0
    assert hub.store.repo("model", "alice/private").meta["private"]
    hub.store.create("model", "alice/public", "alice")
    code, _, err = run(capsys, "publish", result, "alice/public", "--private")
    assert code == 2
    assert "public" in err
    assert len(commits(hub, "alice/public")) == 1


def test_pull_request_to_a_repository_of_others(hub, base, result, capsys, monkeypatch):
    hub.store.create("model", "acme/shared", "alice")
    monkeypatch.setenv("HF_TOKEN", OTHER)
    code, out, err = run(capsys, "publish", result, "acme/shared", "--create-pr")
    assert code == 0, err
    assert f"{hub.url}/acme/shared/discussions/1" in out
    assert len(commits(hub, "acme/shared")) == 1
    assert "README.md" in hub.store.repo("model", "acme/shared").files("refs/pr/1")
    code, _, err = run(capsys, "publish", result, "bob/missing", "--create-pr")
    assert code == 2
    assert "no such repository" in err


def test_revision(hub, base, result):
    publish(result, "alice/branches", revision="experiment")
    assert len(commits(hub, "alice/branches")) == 1
    assert "README.md" in hub.store.repo("model", "alice/branches").files("experiment")
    pipe = DiffusionPipeline.from_pretrained("alice/branches", revision="experiment")
    assert np.array_equal(picture(pipe), picture(DiffusionPipeline.from_pretrained(result)))


def test_dry_run_writes_the_folder_prints_the_card_and_pushes_nothing(hub, base, result, tmp_path, capsys):
    code, out, _ = run(
        capsys, "publish", result, "alice/dry", "--dry-run", "--output", tmp_path / "dry", "--remote-code"
    )
    assert code == 0
    assert (tmp_path / "dry" / "README.md").read_text() in out
    assert (tmp_path / "dry" / "unet" / "ld_pruner_hf_code.py").is_file()
    assert hub.store.repo("model", "alice/dry") is None
    assert not [e for e in hub.log if e["method"] in ("POST", "PUT")]
    assert np.array_equal(
        picture(load_pipeline(str(tmp_path / "dry"), device="cpu")), picture(load_pipeline(str(result), device="cpu"))
    )
    code, _, err = run(capsys, "publish", result, "alice/dry", "--dry-run", "--output", tmp_path / "dry")
    assert code == 2
    assert "not empty" in err


def test_dry_run_needs_no_hub(result, tmp_path, capsys):
    code, out, _ = run(capsys, "publish", result, "alice/dry", "--dry-run", "--output", tmp_path / "dry")
    assert code == 0
    assert "base_model: acme/base" in out


def test_with_the_original_at_hand_it_is_measured_and_drawn(hub, base, result, tmp_path, capsys):
    argv = ["--original", "acme/base", "--prompt", "red heart", "pizza", "--num-inference-steps", 1]
    assert run(capsys, "publish", result, "alice/drawn", *argv)[0] == 0
    repo = hub.store.repo("model", "alice/drawn")
    assert repo.read("figures/before_after.png").startswith(b"\x89PNG")
    measurements = Measurements.load(_write(tmp_path / "m.json", repo.read("measurements.json")))
    assert measurements.before.params - measurements.after.params == load_plan(result).params_removed
    assert "seeds 0 to 1, not selected, num_inference_steps=1" in repo.read("README.md").decode()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--output", "x"], "--output goes with --dry-run"),
        (["--private", "--create-pr"], "--private is for a new repository"),
        (["--base-model", "/home/me/sd"], "expected a Hub id such as org/model, never a local path"),
        (["--base-model", "acme/nothing"], "the Hub has no acme/nothing"),
        (["--evaluation", "missing.json"], "missing.json: no such file"),
        (["--recipe", "missing.yaml"], "missing.yaml"),
        (["--license", "my-own"], '"license" must be one of'),
    ],
)
def test_wrong_arguments_change_nothing_on_the_hub(hub, base, result, capsys, argv, message):
    code, _, err = run(capsys, "publish", result, "alice/wrong", *argv)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert hub.store.repo("model", "alice/wrong") is None


def test_only_pruned_pipelines_are_published(hub, tmp_path, capsys):
    tiny.stable_diffusion().save_pretrained(tmp_path / "stock")
    for folder, message in (
        (tmp_path / "stock", "none of its models was pruned"),
        (tmp_path / "gone", "no such file"),
    ):
        code, _, err = run(capsys, "publish", folder, "alice/not")
        assert code == 2
        assert message in err
    assert not hub.log


# ---- pipe.push_to_hub ------------------------------------------------------------------------------------------------


def test_push_to_hub_of_a_pruned_pipeline(hub, base, scores):
    pipe = DiffusionPipeline.from_pretrained("acme/base")
    pipe.prune(5, scores=scores)
    done = pipe.push_to_hub("from-memory", private=True, commit_message="mine", scores=scores)  # of the token's user
    assert done.commit_url.startswith(f"{hub.url}/alice/from-memory/commit/")
    repo = hub.store.repo("model", "alice/from-memory")
    assert repo.meta["private"]
    assert commits(hub, "alice/from-memory")[0]["title"] == "mine"
    data = cards.metadata(repo.read("README.md").decode())
    assert (data["base_model"], data["license"]) == ("acme/base", "openrail++")
    assert "5 operators" in repo.read("README.md").decode()
    again = DiffusionPipeline.from_pretrained("alice/from-memory")
    assert np.array_equal(picture(again), picture(pipe))


def test_push_to_hub_of_an_mmdit_and_of_its_denoiser_alone(hub):
    pruned = Pruned("sd3")
    pruned.pipe.push_to_hub("alice/mmdit")
    absent = {
        name: None for name, part in pruned.pipe.components.items() if part is None
    }  # the tiny one has no text encoders
    assert pruned.same(DiffusionPipeline.from_pretrained("alice/mmdit", **absent).transformer)
    pruned.model.push_to_hub("alice/transformer")
    assert pruned.same(type(pruned.model).from_pretrained("alice/transformer"))


def test_push_to_hub_of_other_pipelines_is_diffusers_own(hub):
    pipe = tiny.ddpm()
    pipe.push_to_hub("alice/other")
    assert "pruned" not in hub.store.repo("model", "alice/other").read("README.md").decode()
    with pytest.raises(TypeError, match="base_model"):
        pipe.push_to_hub("alice/other", base_model="acme/base")


def test_save_pretrained_with_push_keeps_the_local_card(hub, base, scores, tmp_path):
    pipe = tiny.stable_diffusion()
    pipe.prune(5, scores=scores)
    folder = tmp_path / "saved"
    folder.mkdir()
    (folder / "README.md").write_text("mine")
    pipe.save_pretrained(str(folder), push_to_hub=True, repo_id="alice/saved", commit_message="saved")
    assert (folder / "README.md").read_text() == "mine"
    repo = hub.store.repo("model", "alice/saved")
    assert "## What was removed" in repo.read("README.md").decode()
    assert (
        repo.read("unet/diffusion_pytorch_model.safetensors")
        == (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    )
    assert commits(hub, "alice/saved")[0]["title"] == "saved"


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_wrong", "log in with `hf auth login`"),
        (None, "log in with `hf auth login`"),
        (READ, "a token with write access"),
    ],
    ids=["wrong", "missing", "read-only"],
)
def test_tokens(hub, base, result, capsys, monkeypatch, token, message):
    if token is None:
        monkeypatch.delenv("HF_TOKEN")
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    code, out, err = run(capsys, "publish", result, "alice/refused")
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
    assert "hf_" not in out + err
    assert hub.store.repo("model", "alice/refused") is None


def test_a_repository_of_others(hub, result, capsys, monkeypatch):
    hub.store.create("model", "acme/theirs", "alice")
    monkeypatch.setenv("HF_TOKEN", OTHER)
    code, _, err = run(capsys, "publish", result, "acme/theirs")
    assert code == 2
    assert "--create-pr" in err
    assert len(commits(hub, "acme/theirs")) == 1


def test_an_existing_repository_gets_one_commit_that_replaces_the_pipeline_and_keeps_the_rest(hub, base, result):
    repo = hub.store.create("model", "alice/existing", "alice")
    for path in ("notes.txt", "unet/diffusion_pytorch_model.fp16.safetensors", "figures/old.png"):
        value = {"path": path, "content": b"old"}
        repo.add_commit("main", [{"key": "file", "value": value}], "mine", "alice")
    publish(result, "alice/existing")
    publish(result, "alice/existing")  # nothing has changed: no empty commit
    assert len(commits(hub, "alice/existing")) == 5
    files = hub.store.repo("model", "alice/existing").files()
    assert "notes.txt" in files
    assert not {"unet/diffusion_pytorch_model.fp16.safetensors", "figures/old.png"} & set(files)


@pytest.fixture
def unseen(result, tmp_path) -> Path:
    """The result with weights that the Hub has never seen, so that they must be uploaded."""
    folder = tmp_path / "unseen"
    shutil.copytree(result, folder)
    pipe = DiffusionPipeline.from_pretrained(folder)
    with torch.no_grad():
        pipe.unet.conv_in.weight.normal_(generator=torch.Generator().manual_seed(time.time_ns() % 2**31))
    pipe.unet.save_pretrained(folder / "unet")
    return folder


def test_server_errors_in_mid_upload_are_retried(hub, base, unseen, transport, impatient):
    hub.fault(LARGE, status=503)
    publish(unseen, f"alice/retried-{transport}")
    assert len(commits(hub, f"alice/retried-{transport}")) == 2
    assert [e["status"] for e in hub.log if e["status"] == 503] == [503]


@pytest.mark.parametrize(
    "fault",
    [
        {"path": LARGE, "status": 500, "times": 50},
        {"path": LARGE, "drop_request_after": 1000, "times": 50},
        {"path": "/commit/main", "status": 500, "times": 50},
        {"path": "/commit/main", "drop_request_after": 100, "times": 50},
        {"path": "/preupload/", "status": 502, "times": 50},
    ],
    ids=["5xx in an upload", "upload dropped", "5xx at the commit", "commit dropped", "5xx before"],
)
def test_a_failed_upload_leaves_the_repository_as_it_was_and_a_rerun_completes(
    hub, base, result, unseen, transport, impatient, fault, capsys
):
    repo_id = f"alice/failed-{time.time_ns()}"
    publish(result, repo_id)
    before, local = hub.store.repo("model", repo_id).files(), state_of(unseen)
    hub.fault(**fault)
    code, out, err = run(capsys, "publish", unseen, repo_id)
    assert code == 2
    assert "the same command again" in err
    assert "Traceback" not in err
    assert "hf_" not in out + err
    assert hub.store.repo("model", repo_id).files() == before
    assert state_of(unseen) == local
    hub.faults.rules.clear()
    assert run(capsys, "publish", unseen, repo_id)[0] == 0
    assert len(commits(hub, repo_id)) == 3
    again = DiffusionPipeline.from_pretrained(repo_id)
    assert np.array_equal(picture(again), picture(DiffusionPipeline.from_pretrained(unseen)))


def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, base, result, capsys):
    hub.fault("/commit/main", lost_response=True)
    code, _, err = run(capsys, "publish", result, "alice/lost")
    assert code == 2
    assert "broke off" in err
    assert len(commits(hub, "alice/lost")) == 2
    assert run(capsys, "publish", result, "alice/lost")[0] == 0
    assert len(commits(hub, "alice/lost")) == 2


def test_a_killed_upload_is_completed_by_the_same_command(hub, base, unseen, tmp_path, capsys):
    local = state_of(unseen)
    hub.fault(LARGE, delay=60, times=50)
    env = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "home"),
        "HF_TOKEN": WRITE,
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-m", "ld_pruner_hf", "publish", str(unseen), "alice/killed"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(e["path"].startswith(("/v1/xorbs", "/lfs/")) for e in hub.log):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.faults.rules.clear()
    assert state_of(unseen) == local
    assert len(commits(hub, "alice/killed")) == 1
    assert run(capsys, "publish", unseen, "alice/killed")[0] == 0
    assert len(commits(hub, "alice/killed")) == 2


def test_bad_metadata_is_refused_before_anything_is_made(hub, result, tmp_path):
    shutil.copytree(result, tmp_path / "bad")
    (tmp_path / "bad" / "README.md").write_text("---\nlicense: mine\n---\n")
    with pytest.raises(ValueError, match=r'README.md: the Hub does not accept its metadata: "license" must be one of'):
        push_folder(tmp_path / "bad", "alice/bad")
    assert hub.store.repo("model", "alice/bad") is None


# ---- plans on the Hub ------------------------------------------------------------------------------------------------


@pytest.fixture
def plan_repo(hub, result) -> str:
    plan = PruningPlan.load(result / "pruning_plan.json")
    ld_pruner_hf.push_plan(plan, "alice/plan", base_model="acme/base")
    return "alice/plan"


def test_a_plan_alone(hub, plan_repo, result):
    files = hub.store.repo("model", plan_repo).files()
    assert set(files) == {".gitattributes", "README.md", "pruning_plan.json"}
    card = hub.store.repo("model", plan_repo).read("README.md").decode()
    assert cards.validate(card) == ([], [])
    assert 'pipe.prune("alice/plan")' in card
    pipe = tiny.stable_diffusion()
    pipe.prune(plan_repo)
    assert np.array_equal(picture(pipe), picture(DiffusionPipeline.from_pretrained(result)))


def test_a_plan_of_another_architecture_is_refused(hub, plan_repo):
    pipe = tiny.ddpm()
    with pytest.raises(ld_pruner_hf.PlanError, match="made for UNet2DConditionModel"):
        pipe.prune(plan_repo)


def test_plans_of_the_hub_on_the_command_line(hub, base, plan_repo, result, tmp_path, capsys):
    code, out, _ = run(capsys, "show", plan_repo)
    assert code == 0
    assert "8 operators of unet" in out
    argv = ["prune", "acme/base", plan_repo, "-o", tmp_path / "out", "--repeats", 1, "--prompt", "red heart"]
    assert run(capsys, *argv)[0] == 0
    again = DiffusionPipeline.from_pretrained(tmp_path / "out")
    assert np.array_equal(picture(again), picture(DiffusionPipeline.from_pretrained(result)))
    assert Measurements.load(tmp_path / "out" / "measurements.json").base_model == "acme/base"
    assert run(capsys, "publish", tmp_path / "out" / "pruning_plan.json", "alice/plan-2")[0] == 0
    assert PruningPlan.load(result / "pruning_plan.json").paths == load_plan("alice/plan-2").paths


@pytest.mark.parametrize("argv", [["show"], ["prune", "acme/base"]], ids=["show", "prune"])
@pytest.mark.parametrize(
    ("name", "message"),
    [("alice/no-such", "no plan from the Hub either"), ("acme/base", "has no pruning_plan.json")],
)
def test_names_that_are_no_plan(hub, base, tmp_path, capsys, argv, name, message):
    more = ["-o", tmp_path / "out"] if argv[0] == "prune" else []
    code, _, err = run(capsys, *argv, name, *more)
    assert code == 2
    assert message in err


def test_a_name_that_is_nothing_lists_what_is_possible(hub, tmp_path, capsys):
    code, _, err = run(capsys, "prune", "demo:emoji", "bk-sdm-smal", "-o", tmp_path / "out")
    assert code == 2
    assert "bk-sdm-small" in err
    with pytest.raises(ValueError, match="the file or Hub id of one"):
        tiny.stable_diffusion().prune("bk-sdm-smal")


def test_presets_on_the_command_line_leave_a_stock_pipeline(hub, base, tmp_path, capsys):
    argv = ["prune", "acme/base", "no-mid-block", "-o", tmp_path / "out", "--repeats", 1, "--prompt", "red heart"]
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "import ld_pruner_hf" not in out
    assert type(load_pipeline(str(tmp_path / "out"), device="cpu").unet) is UNet2DConditionModel
    code, _, err = run(capsys, "publish", tmp_path / "out", "alice/preset", "--remote-code")
    assert code == 2
    assert "this is a stock model" in err
    assert run(capsys, "publish", tmp_path / "out", "alice/preset")[0] == 0
    card = ModelCard.load("alice/preset")
    assert card.data.base_model == "acme/base"
    assert hub.url == constants.ENDPOINT
