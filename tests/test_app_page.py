"""The page as a server: its endpoint, its queue, and what it keeps to itself."""

from __future__ import annotations

import logging
import pickle
import re
import sys
import threading
import types
import wave
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import gradio
import numpy as np
import psutil
import pytest
import requests
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

from ld_pruner_hf import cli
from ld_pruner_hf.app import AppConfig, Comparer, Limits, Request, build_page, page
from ld_pruner_hf.app.compare import BY_SCORE

ASKED = {"model": "Tiny", "prompt": "red heart", "k": 3, "seed": 5, "steps": 2, "guidance": 2.0}


@pytest.fixture
def client(app_server, tmp_path):
    return Client(app_server.url, verbose=False, download_files=tmp_path, analytics_enabled=False)


@pytest.fixture
def served(app_config, monkeypatch, tmp_path):
    """`served(comparer)` serves a page from this process; gives its address."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "temp"))
    pages = []

    def serve(comparer):
        pages.append(build_page(comparer))
        return page.serve(pages[-1], host="127.0.0.1")[1]

    yield serve
    for one in pages:
        one.close()


# ---- the endpoint ----------------------------------------------------------------------------------------------------


def test_the_endpoint_returns_pictures_and_costs(client, app_config):
    result = client.predict(**ASKED, pictures=2, api_name="/compare")
    direct = Comparer(AppConfig(app_config.models[:1]), "cpu").compare(Request(**ASKED, pictures=2))
    assert [c["name"] for c in result["columns"]] == ["Original", "k = 3"]
    assert result["operators"] == direct.plan.paths and result["device"].endswith("(1 thread)")
    for column, expected in zip(result["columns"], direct.columns, strict=True):
        assert column["cost"]["params"] == expected.cost.params and column["cost"]["macs"] == expected.cost.macs
        assert column["cost"]["call_ms"] > 0
        for file, image in zip(column["files"], expected.images, strict=True):
            assert np.array_equal(np.asarray(Image.open(_path(file))), np.asarray(image))


def test_the_endpoint_returns_sounds(client):
    result = client.predict(model="Tones", k=2, steps=2, api_name="/compare")
    for column in result["columns"]:
        spectrogram, sound = map(_path, column["files"])
        assert Image.open(spectrogram).size == (8, 8)
        with wave.open(sound) as file:
            assert file.getframerate() == 8000 and file.getnframes() > 1000


def _path(file):
    return file if isinstance(file, str) else file["path"]


def test_the_endpoint_is_the_only_one_and_is_documented(client):
    described = client.view_api(return_format="dict")
    assert list(described["named_endpoints"]) == ["/compare"] and not described["unnamed_endpoints"]
    endpoint = described["named_endpoints"]["/compare"]
    names = [p["parameter_name"] for p in endpoint["parameters"]]
    assert names == ["model", "prompt", "version", "k", "seed", "steps", "guidance", "pictures"]
    assert "same prompt and noise" in endpoint["description"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 9999}, "Operators: got 9999, expected a whole number from 1 to"),
        ({"steps": 10_000}, "Steps: got 10000"),
        ({"pictures": 99}, "Pictures: got 99"),
        ({"prompt": ""}, "Prompt: it is empty"),
        ({"prompt": "x" * 5000}, "Prompt: got 5000 characters"),
        ({"model": "/etc"}, "Model: got '/etc'"),
        ({"model": "user/repo"}, "Model: got 'user/repo'"),
        ({"version": "/etc/passwd"}, "Version: got"),
        ({"model": "<img src=x onerror=alert(1)>"}, "Model: got '&lt;img"),
    ],
)
def test_what_is_refused_is_one_line(client, app_server, change, message):
    with pytest.raises(AppError) as caught:
        client.predict(**{**ASKED, **change}, api_name="/compare")
    text = str(caught.value).replace("&#x27;", "'")
    assert message in text and "Traceback" not in text and "\n" not in text and "<img" not in text
    assert "Traceback" not in app_server.log.read_text()


# ---- many at once ----------------------------------------------------------------------------------------------------


def test_twenty_users_at_once_wait_and_none_is_lost(app_server, tmp_path):
    def user(i):
        one = Client(app_server.url, verbose=False, download_files=tmp_path / str(i), analytics_enabled=False)
        result = one.predict(**{**ASKED, "steps": 1, "seed": i, "k": 1 + i % 3}, api_name="/compare")
        return [Image.open(_path(column["files"][0])).tobytes() for column in result["columns"]]

    process = psutil.Process(app_server.process.pid)
    with ThreadPoolExecutor(20) as pool:
        first = list(pool.map(user, range(20)))
        before = process.memory_info().rss
        again = list(pool.map(user, range(20)))
        grown = process.memory_info().rss - before
    assert first == again
    assert len({originals for originals, _ in first}) == 20  # everybody has the picture of their own seed
    assert grown < 40e6, f"{grown / 1e6:.0f} MB more after 20 more requests"


def test_when_the_queue_is_full_the_next_is_told_so(app_config, served, monkeypatch, tmp_path):
    comparer = Comparer(replace(app_config, models=app_config.models[:1], limits=Limits(waiting=2)), "cpu")
    go, compare = threading.Event(), comparer.compare
    monkeypatch.setattr(comparer, "compare", lambda *args: go.wait(60) and compare(*args))
    client = Client(served(comparer), verbose=False, download_files=tmp_path, analytics_enabled=False)
    jobs = [client.submit(**ASKED, api_name="/compare") for _ in range(8)]
    refused = [job for job in jobs if _fails_within(job, 2)]
    go.set()
    done = [job.result(60) for job in jobs if job not in refused]
    assert len(refused) >= 4 and len(done) >= 2 and len(refused) + len(done) == 8
    assert "queue" in str(refused[0].exception()).lower()


def _fails_within(job, seconds):
    try:
        return job.exception(seconds) is not None
    except TimeoutError:
        return False


# ---- what it keeps to itself -----------------------------------------------------------------------------------------


def test_files_are_written_to_the_temporary_folder_only(client, app_server):
    client.predict(**ASKED, api_name="/compare")
    assert list(app_server.temp.rglob("*.png"))
    assert list(app_server.cwd.iterdir()) == []


def test_no_token_gets_out(client, app_server):
    with pytest.raises(AppError):
        client.predict(**{**ASKED, "k": 0}, api_name="/compare")
    for path in ("", "config", "gradio_api/info", "gradio_api/startup-events"):
        assert "SecretOfTheTests" not in requests.get(f"{app_server.url}/{path}", timeout=30).text
    assert "SecretOfTheTests" not in app_server.log.read_text()


@pytest.mark.parametrize("path", ["/etc/passwd", "app.yaml", "../app.yaml"])
def test_other_files_are_not_served(app_server, app_config, path):
    folder = app_config.models[0].pipeline
    for name in (path, f"{folder}/../{path}", f"{folder}/model_index.json"):
        assert requests.get(f"{app_server.url}/gradio_api/file={name}", timeout=30).status_code in (403, 404)


def test_no_large_file_is_taken(app_server):
    files = {"files": ("big.bin", b"x" * 100_000)}
    assert requests.post(f"{app_server.url}/gradio_api/upload", files=files, timeout=30).status_code == 413


def test_events_of_the_page_cannot_be_called_past_its_queue(app_server):
    answer = requests.post(f"{app_server.url}/gradio_api/run/compare", json={"data": list(ASKED.values())}, timeout=60)
    assert answer.status_code >= 400


def test_a_failure_is_in_the_log_and_not_in_the_page(app_config, served, monkeypatch, caplog, tmp_path):
    comparer = Comparer(replace(app_config, models=app_config.models[:1]), "cpu")

    def fail(*_):
        raise RuntimeError("out of memory at /secret/place")

    monkeypatch.setattr(comparer, "compare", fail)
    client = Client(served(comparer), verbose=False, download_files=tmp_path, analytics_enabled=False)
    with caplog.at_level(logging.ERROR), pytest.raises(AppError, match="the reason is in its log") as caught:
        client.predict(**ASKED, api_name="/compare")
    assert "secret" not in str(caught.value) and "/secret/place" in caplog.text


def test_nothing_is_asked_of_other_hosts(app_server):
    """The page works offline: no font, script or statistics from elsewhere."""
    html = requests.get(app_server.url, timeout=30).text
    for url in re.findall(r'(?:src|href)="(https?://[^"]+)"', html):
        assert url.startswith(("https://arxiv.org", app_server.url)), url
    assert "fonts.googleapis" not in requests.get(f"{app_server.url}/theme.css", timeout=30).text


# ---- ZeroGPU, missing packages, the command --------------------------------------------------------------------------


def test_on_zerogpu_every_run_goes_through_its_decorator(app_config, served, monkeypatch, tmp_path):
    """`spaces.GPU` runs the function in a process that has the GPU: what goes there and comes back must be plain data."""
    lent = []

    def gpu(duration):
        def decorate(function):
            def run(*args):
                lent.append(duration)
                return pickle.loads(pickle.dumps(function(*pickle.loads(pickle.dumps(args)))))

            return run

        return decorate

    monkeypatch.setitem(sys.modules, "spaces", types.SimpleNamespace(GPU=gpu))
    comparer = Comparer(replace(app_config, models=app_config.models[:1], limits=Limits(gpu_seconds=17)), "cpu")
    client = Client(served(comparer), verbose=False, download_files=tmp_path, analytics_enabled=False)
    assert len(client.predict(**ASKED, api_name="/compare")["columns"]) == 2
    pickle.dumps(gradio.Progress())
    assert lent == [17]


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert cli.main(["app"]) == 2
    assert "pip install 'ld_pruner_hf[app]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config", "nothing.yaml"], "nothing.yaml"),
        (["--device", "abacus"], "device: got 'abacus'"),
        (["--port", "99999"], "port: got 99999"),
    ],
)
def test_mistakes_in_the_command_are_one_line(argv, message, capsys):
    assert cli.main(["app", *argv]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1] and err[-1].startswith("ld-pruner: error:")


def test_a_port_that_is_taken_is_one_line(app_server, app_config, capsys):
    port = app_server.url.rpartition(":")[2]
    assert cli.main(["app", "--port", port]) == 2
    assert port in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_figure_names_the_model_and_comes_in_both_themes(app_config):
    comparer = Comparer(replace(app_config, models=app_config.models[:1]), "cpu")
    html = page.importance_html(comparer.models["Tiny"])
    assert html.count("data:image/png;base64,") == 2 and "ld-light" in html and "ld-dark" in html
    assert "every operator of Tiny" in html


def test_numbers_are_plain():
    numbers = {0.02163: "0.0216", 65.04: "65", 1234.5: "1,230", 8.139: "8.14", 140.2: "140"}
    assert {value: page.plain(value) for value in numbers} == numbers


def test_costs_are_shown_as_measured(app_config):
    comparer = Comparer(replace(app_config, models=app_config.models[:1]), "cpu")
    comparison = comparer.compare(Request(**ASKED, version=BY_SCORE))
    html = page.costs_html(comparison)
    for column in comparison.columns:
        assert f"{page.plain(column.cost.params / 1e6)} M" in html and f"{page.plain(column.cost.call_ms)} ms" in html
    assert "Taken out: 3 operators." in html and "3 convolution" in html
