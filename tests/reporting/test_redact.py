"""What nobody should read is taken out of texts, by one rule."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlcbuild.redact import redact

SECRET = "hf_planted"


@pytest.mark.parametrize(
    "name",
    [
        *("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_API_KEY", "DB_PASSWORD", "PGPASSWD", "CREDENTIALS", "PROXY_AUTH"),
        *("AZURE_STORAGE_CONNECTION_STRING", "MYSQL_PWD", "SMTP_PASS", "BLOB_SAS", "DB_CONN_STR", "SSH_PASSPHRASE"),
    ],
)
def test_values_of_variables_that_are_called_secrets(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, SECRET)
    assert redact(f"401 for {SECRET}!") == "401 for [hidden]!"


def test_the_keys_in_a_connection_string(monkeypatch: pytest.MonkeyPatch) -> None:
    value = (
        "DefaultEndpointsProtocol=https;AccountName=builders;AccountKey=cGxhbnRlZA==;EndpointSuffix=core.windows.net"
    )
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", value)
    assert redact(
        f"({value}): cGxhbnRlZA== is refused at core.windows.net"
    ) == "([hidden]): [hidden] is refused at " + ("core.windows.net")


def test_an_author_and_a_short_value_are_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_AUTHOR_NAME", "Alice")
    monkeypatch.setenv("KEYMAP", "us")
    monkeypatch.setenv("PWD", "/home/alice")
    monkeypatch.setenv("OLDPWD", "/home/alice/old")
    assert redact("Alice, because of /home/alice/old") == "Alice, because of /home/alice/old"


def test_a_secret_within_a_secret_leaves_no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", SECRET)
    monkeypatch.setenv("B_TOKEN", f"{SECRET}_and_more")
    assert redact(f"{SECRET}_and_more {SECRET}") == "[hidden] [hidden]"


@pytest.mark.parametrize("loaded", [True, False])
def test_the_token_that_a_login_left_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: bool) -> None:
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if loaded:
        monkeypatch.setattr("huggingface_hub.get_token", lambda: SECRET)
    else:
        monkeypatch.delitem(__import__("sys").modules, "huggingface_hub", raising=False)
        (tmp_path / "token").write_text(f"{SECRET}\n")
        monkeypatch.setenv("HF_HOME", str(tmp_path))
        monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    assert redact(SECRET) == "[hidden]"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://user:pass@bucket/cache: no", "s3://[hidden]@bucket/cache: no"),
        ("at https://x.y/z?X-Amz-Signature=1&a=b, no", "at https://x.y/z?… no"),
        ("what? no URL: a@b.c", "what? no URL: a@b.c"),
    ],
)
def test_what_a_url_carries(text: str, shown: str) -> None:
    assert redact(text) == shown


def test_what_the_caller_knows_to_be_secret() -> None:
    assert redact("user and pass1234", "pass1234", "") == "user and [hidden]"
