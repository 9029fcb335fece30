"""--push-to-hub uploads an export, and nothing else, by the token that huggingface_hub finds; failures are one message.

The hub is on loopback (tests/fake_hub.py). Each upload is a process: huggingface_hub reads its settings once.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import yaml

from simclr_dist.cli import main
from simclr_dist.errors import ExportError
from simclr_dist.export import hub
from tests.fake_hub import FakeHub
from tests.fork_server import ModuleProcess
from tests.test_export import save_run

TOKEN = "hf_averysecrettokenindeed"


def push(run: Path, url: str, *options: str, token: str | None = TOKEN, format: str = "timm") -> tuple[int, str]:
    """The exit status and all output of `simclr-dist export`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    env |= {"HF_ENDPOINT": url, "HF_HOME": str(run.parent / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    if token is not None:
        env["HF_TOKEN"] = token
    arguments = ["export", str(run), "--format", format, "--crop", "1", "--push-to-hub", "me/birds", *options]
    process = ModuleProcess("simclr_dist.cli", arguments, env)
    return process.wait(200), process.output()


@pytest.mark.parametrize("format", ["timm", "safetensors"])
def test_the_files_of_the_export_are_uploaded_and_nothing_else(tmp_path: Path, format: str) -> None:
    run, _ = save_run(tmp_path, encoder="timm/test_vit")
    (run / "export").mkdir()
    (run / "export" / "secret.txt").write_text("not to be uploaded")
    name = "model.safetensors" if format == "timm" else "encoder.safetensors"
    with FakeHub(TOKEN, large=(name,)) as server:
        status, output = push(run, server.url, "--license", "my own words", format=format)
        assert status == 0, output
        assert f"{server.url}/me/birds" in output
        assert TOKEN not in output
        repository = server.repositories["me/birds"]
    assert repository["private"] is True
    files = repository["files"]
    assert files.keys() == {name, "README.md"} | ({"config.json"} if format == "timm" else set())
    folder = run / "export" / "timm" if format == "timm" else run / "export"
    assert files[name] == (folder / name).read_bytes()
    card = files["README.md"].decode()
    assert ('timm.create_model("hf-hub:me/birds", pretrained=True)' in card) == (format == "timm")
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["license"], front["license_name"]) == ("other", "my own words")


def test_a_public_repository_is_written_to_only_where_that_is_said(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path, encoder="timm/test_vit")
    with FakeHub(TOKEN) as server:
        server.repositories["me/birds"] = {"private": False, "files": {}}
        status, output = push(run, server.url)
        assert status != 0
        assert "everyone can read it; nothing was uploaded. Add --public" in output
        assert not server.repositories["me/birds"]["files"]
        status, output = push(run, server.url, "--public", "--overwrite")
        assert status == 0, output
        assert server.repositories["me/birds"]["files"]


def test_a_failed_upload_is_one_message_and_the_export_stays(tmp_path: Path) -> None:
    run, _ = save_run(tmp_path, encoder="timm/test_vit")
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{unused.getsockname()[1]}"
        cases = [
            (FakeHub("another"), TOKEN, "does not know the token"),
            (FakeHub("another"), None, "does not know the token"),
            (FakeHub(TOKEN, status=403), TOKEN, "does not allow the token to write there"),
            (FakeHub(TOKEN, status=404), TOKEN, "has no such owner or repository"),
            (FakeHub(TOKEN, status=500), TOKEN, "has a fault of its own, 500"),
            (None, TOKEN, "cannot be reached"),
        ]
        for server, token, message in cases:
            if server is None:
                status, output = push(run, nobody, "--overwrite", token=token)
            else:
                with server:
                    status, output = push(run, server.url, "--overwrite", token=token)
            assert status == 2, output
            assert message in output
            assert "nothing was uploaded" in output
            assert "to try again, add --overwrite" in output
            assert "Traceback" not in output
            assert TOKEN not in output
            assert (run / "export" / "timm" / "README.md").is_file()


@pytest.mark.parametrize("name", ["a/b/c", "two words", "../up", "x" * 200, "", "-dash-"])
def test_a_name_that_no_repository_can_have_is_refused_before_anything_is_written(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = save_run(tmp_path, encoder="timm/test_vit")
    with pytest.raises(SystemExit):
        main(["export", str(run), "--format", "timm", "--crop", "1", f"--push-to-hub={name}"])
    assert "not a name of a repository" in capsys.readouterr().err
    assert not (run / "export").exists()


def test_without_huggingface_hub_the_command_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ExportError, match=r"needs huggingface-hub: pip install 'simclr-dist\[hf\]'"):
        hub.check_repository("me/birds")
