"""Files of models: which folder is meant, what is in it, what a user is told."""

from __future__ import annotations

import json
import shlex

import pytest

from vcd_fast.models.hub import content_digest, download_command, local_folder, read_json, shards


def test_a_name_is_a_folder_a_repository_or_wrong(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "model").mkdir(parents=True)
    (tmp_path / "file").touch()
    assert local_folder("owner/model", "weights", "of a model").samefile(tmp_path / "owner" / "model")
    assert local_folder("owner/other", "weights", "of a model") is None
    with pytest.raises(ValueError, match=r"model\.vae_weights: expected the folder of a model, got the file file"):
        local_folder("file", "vae_weights", "of a model")
    for value in ("nowhere", "./owner/other", "~/owner-other", "/owner/other", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=r"model\.weights: no such folder: "):
            local_folder(value, "weights", "of a model")


def test_commands_name_what_they_fetch():
    assert download_command("owner/model") == "hf download owner/model"
    words = shlex.split(download_command("owner/model", "v1", ["vae/*", "*.json"], "/a/folder"))
    assert words[:3] == ["hf", "download", "owner/model"]
    options = dict.fromkeys(words[3::2])
    assert list(options) == ["--revision", "--include", "--local-dir"]
    assert words[4::2] == ["v1", "vae/*", "*.json", "/a/folder"]


def test_commands_are_what_the_hub_s_own_program_takes(monkeypatch):
    """Every pattern has to arrive as a pattern; a second word after --include would be the name of a file."""
    from huggingface_hub.cli import hf

    seen = {}

    def download(**options: object) -> str:
        seen.update(options)
        raise OSError("seen enough")

    monkeypatch.setattr("huggingface_hub.cli.download.snapshot_download", download)
    words = shlex.split(download_command("owner/model", "v1", ["vae/*", "*.json"], "/a/folder"))
    with pytest.raises(OSError, match="seen enough"):
        hf.app(words[1:], standalone_mode=False)
    assert (seen["repo_id"], seen["revision"], seen["local_dir"]) == ("owner/model", "v1", "/a/folder")
    assert list(seen["allow_patterns"]) == ["vae/*", "*.json"]


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff\xfe"])
def test_json_that_is_none(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json: expected (a )?JSON"):
        read_json(path)


def test_shards_are_those_of_the_index(tmp_path):
    assert shards(tmp_path, ".safetensors") is None
    for name in ("a.safetensors", "b.safetensors", "stray.safetensors"):
        (tmp_path / name).touch()
    assert shards(tmp_path, ".safetensors") is None
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "b.safetensors", "y": "a.safetensors", "z": "b.safetensors"}}))
    assert shards(tmp_path, ".safetensors") == [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert shards(tmp_path, ".bin") is None
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks b\.safetensors, which model\.safetensors\.index\.json names"):
        shards(tmp_path, ".safetensors")
    index.write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"lacks weights, which"):
        shards(tmp_path, ".safetensors")


@pytest.mark.parametrize("size", [10, (1 << 20) + 10, (2 << 20) + 10, (3 << 20) + 10])
def test_the_digest_sees_ends_names_and_places(size, tmp_path):
    """Every byte of files up to 2 MiB, and both ends of larger ones."""
    folder, moved = tmp_path / "part", tmp_path / "moved"
    (folder / "sub").mkdir(parents=True)
    path = folder / "sub" / "weights.bin"
    path.write_bytes(bytes(size))
    base = content_digest({"vae": folder})
    found = {base, content_digest({"text_encoder": folder})}
    for position in (0, size // 3, size - 1):
        changed = bytearray(size)
        changed[position] = 1
        path.write_bytes(changed)
        found.add(content_digest({"vae": folder}))
    path.write_bytes(bytes(size + 1))
    found.add(content_digest({"vae": folder}))
    assert len(found) == (6 if size <= 2 << 20 else 5 + (size // 3 < 1 << 20))
    path.write_bytes(bytes(size))
    folder.rename(moved)
    assert content_digest({"vae": moved}) == base
    path = moved / "sub" / "weights.bin"
    path.rename(moved / "sub" / "other.bin")
    assert content_digest({"vae": moved}) != base
