"""What is written about a run holds no secret, and all that is none."""

import pytest

from pretrain.engine.redaction import arguments_without_secrets, is_secret_name, without_secrets

KEY = "0f1e2d3c4b" * 4
VARIABLES = {
    "WANDB_API_KEY": KEY,
    "PGPASSWORD": "correct horse",
    "SLURM_JOB_ID": "4242424",
    "SSH_AUTH_SOCK": "/etc/hosts",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:p@ss/word@host.org:80/a/b", "https://[removed]@host.org:80/a/b"),
        ("https://me:pa?ss@host.org/a", "https://[removed]@host.org/a"),
        ("https://me:pa'ss@host.org/a", "https://[removed]@host.org/a"),
        ("curl -H Authorization: token abcdef", "curl -H Authorization: [removed]"),
        ("AccountName=me;AccountKey=abc==;x", "AccountName=me;[removed];x"),
        ("https://me:pass@host.org/a/b", "https://[removed]@host.org/a/b"),
        ("s3://AKIAIOSFODNN7EXAMPLE:wJalr/XUtn@bucket/a", "s3://[removed]@bucket/a"),
        ("https://host.org/a?X-Amz-Signature=0badcafe#part", "https://host.org/a?[removed]"),
        ("pipe:curl -H 'Authorization: Bearer abc.def' https://u:p@h/x", None),
        (f"a {KEY} b", "a [removed] b"),
        ("--note=correct horse", "--note=[removed]"),
        ("hf_" + "AbCdE" * 7, "[removed]"),
        ("ghp_" + "a1B2c3" * 6, "[removed]"),
        ("AKIAIOSFODNN7EXAMPLE", "[removed]"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJtZSJ9.c2ln", "[removed]"),
        ("local-" + KEY, "local-[removed]"),
    ],
)
def test_a_text_loses_its_secrets(text, expected):
    cleaned = without_secrets(text, VARIABLES)
    assert cleaned == (expected or "pipe:curl -H 'Authorization: [removed] https://[removed]@h/x")


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/kinetics-400/train",
        "https://data.example.org:8080/shards",
        "job 4242424",
        "/etc/hosts",
        "e7f3394011d4f39923343c302cf423c91634ae61",
        "data.packing.tokens=1024",
        "git@github.com:me/videos",
        "a@b://c",
    ],
)
def test_a_text_without_a_secret_stays_as_it_is(text):
    assert without_secrets(text, VARIABLES) == text


def test_secrets_are_found_in_whatever_holds_texts():
    value = {"data": {"mixture": [{"shards": f"https://u:{KEY}@h/s"}, ("x", KEY, 3, None, 0.5)]}}
    cleaned = {"data": {"mixture": [{"shards": "https://[removed]@h/s"}, ["x", "[removed]", 3, None, 0.5]]}}
    assert without_secrets(value, VARIABLES) == cleaned


def test_a_command_line_loses_the_values_of_secret_options_and_no_others():
    command = ["python", "-m", "pretrain", "--log_keys", "true", "--data.packing.tokens", "1024", "--steps=3"]
    secret = ["--api-key", "abc", "--token=abc", "HF_TOKEN=abc", "--password", "--resume", "auto", "--pass", "-abc"]
    cleaned = ["--api-key", "[removed]", "--token=[removed]", "HF_TOKEN=[removed]", "--password", "--resume", "auto"]
    cleaned += ["--pass", "[removed]"]
    assert arguments_without_secrets(command + secret, VARIABLES) == command + cleaned


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "PGPASSWORD",
        "SLURM_JWT",
        "accessToken",
        "AUTHTOKEN",
        "TUBELET_PWD",
    ],
)
def test_variables_with_secrets_are_known_by_their_names(name):
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["PWD", "KEYBOARD", "PATH", "SLURM_JOB_ID", "TOKENIZERS_PARALLELISM", "MONKEY"])
def test_other_variables_are_not_taken_for_secret(name):
    assert not is_secret_name(name)
