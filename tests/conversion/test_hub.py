"""Repositories of the hub: which files are asked for, the cache, and clear refusals."""

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

from conversion import hub
from conversion.cli import main
from conversion.detect import find
from tests.conversion import toy

REPO = "black-forest-labs/FLUX.2-klein-9B"


@pytest.mark.parametrize(
    "text, expected",
    [
        (REPO, True),
        ("a/b", True),
        ("a", False),
        ("./a", False),
        ("/a/b", False),
        ("a/b/c", False),
        ("../b", False),
        ("~/b", False),
        ("a/b c", False),
    ],
)
def test_repository_ids(text, expected):
    assert hub.is_repo_id(text) == expected


def snapshots(monkeypatch, folder, calls):
    def snapshot_download(repo_id, *, allow_patterns):
        calls.append((repo_id, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_only_what_is_needed_is_asked_for(tmp_path, monkeypatch):
    calls = []
    toy.pipeline(tmp_path / "p")
    snapshots(monkeypatch, tmp_path / "p", calls)
    found = find(REPO, ["transformer"])
    assert found.components.keys() == {"transformer"}
    ((repo_id, patterns),) = calls
    assert repo_id == REPO
    assert "transformer/*" in patterns and "tokenizer/*" in patterns
    assert "vae/*" not in patterns and "*.safetensors" not in patterns
    find(REPO)
    assert {"transformer/*", "vae/*", "text_encoder/*"} <= set(calls[-1][1])


def test_a_repository_of_single_files_is_asked_for_them(tmp_path, monkeypatch):
    calls = []
    toy.save(tmp_path / "r" / "x.safetensors", toy.tensors("transformer", "bfl"))
    snapshots(monkeypatch, tmp_path / "r", calls)
    assert find("org/files").components["transformer"].config == toy.TRANSFORMER
    assert [("*.safetensors" in patterns) for _, patterns in calls] == [False, True]


def test_a_base_is_not_asked_for_what_the_file_holds(tmp_path, monkeypatch):
    calls = []
    toy.pipeline(tmp_path / "p")
    (tmp_path / "p" / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    snapshots(monkeypatch, tmp_path / "p", calls)
    file = toy.save(tmp_path / "x.safetensors", toy.tensors("transformer", "bfl"))
    assert main([str(file), str(tmp_path / "out"), "--base=org/base"]) == 0
    assert find(tmp_path / "out").components.keys() == toy.CONFIGS.keys()
    ((_, patterns),) = calls
    assert "transformer/*" not in patterns
    assert {"*/config.json", "vae/*", "text_encoder/*", "tokenizer/*"} <= set(patterns)


def http(kind, status):
    request = httpx2.Request("GET", f"https://huggingface.co/api/models/{REPO}")
    return kind(f"{status} error", response=httpx2.Response(status, request=request))


@pytest.mark.parametrize(
    "error, message",
    [
        (http(errors.GatedRepoError, 403), f"is gated: accept its licence at .*{REPO}.*HF_TOKEN"),
        (http(errors.GatedRepoError, 401), "is gated"),
        (http(errors.RepositoryNotFoundError, 404), "neither a local path nor a repository"),
        (http(errors.RepositoryNotFoundError, 401), "if it is private, log in"),
        (http(errors.HfHubHTTPError, 401), r"access refused \(HTTP 401\); log in"),
        (http(errors.HfHubHTTPError, 403), r"access refused \(HTTP 403\)"),
        (http(errors.HfHubHTTPError, 503), r"answered HTTP 503; try again"),
        (
            errors.LocalEntryNotFoundError("nothing cached"),
            "not in the local cache.*nothing cached",
        ),
        (errors.OfflineModeIsEnabled("offline"), "hub is out of reach; connect"),
        (httpx2.ReadTimeout("slow"), "run again to go on. ReadTimeout: slow"),
        (OSError("no space left"), "OSError: no space left"),
    ],
)
def test_refusals_say_what_to_do(tmp_path, monkeypatch, capsys, error, message):
    def snapshot_download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(hub.HubError, match=message):
        find(REPO)
    assert main([REPO, str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: " + REPO)
    assert not list(tmp_path.iterdir())


def test_the_local_cache_serves_offline(tmp_path, monkeypatch):
    """The library's own resolution of a cached snapshot, with its network switched off."""
    cache = tmp_path / "cache"
    repo = cache / ("models--" + REPO.replace("/", "--"))
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    toy.pipeline(repo / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    assert find(REPO).components.keys() == toy.CONFIGS.keys()
    with pytest.raises(hub.HubError, match="not in the local cache"):
        find("org/absent")
