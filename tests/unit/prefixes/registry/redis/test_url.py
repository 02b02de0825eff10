"""What a Redis URL may say, and that nothing of it that is secret is ever said again."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from prefixes.errors import RegistryUnavailable
from prefixes.registry import is_redis, open_registry, shown_url
from prefixes.registry.redis.url import SCHEMES, TIMEOUT_S, RedisTarget, parse_redis_url

NODES = "one:7000,two:7001,three"


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("redis://host", RedisTarget("server", (("host", 6379),))),
        ("redis://host/", RedisTarget("server", (("host", 6379),))),
        ("redis://host:6380/3", RedisTarget("server", (("host", 6380),), db=3)),
        ("redis://[::1]:6380/3", RedisTarget("server", (("::1", 6380),), db=3)),
        ("rediss://host", RedisTarget("server", (("host", 6379),), tls=True)),
        ("redis://ann:pw@host", RedisTarget("server", (("host", 6379),), username="ann", password="pw")),
        ("redis://:pw@host", RedisTarget("server", (("host", 6379),), password="pw")),
        ("redis://:p%40%2Fw@host", RedisTarget("server", (("host", 6379),), password="p@/w")),
        ("redis://ann@host", RedisTarget("server", (("host", 6379),), username="ann")),
        ("redis://host?timeout_s=0.25", RedisTarget("server", (("host", 6379),), timeout_s=0.25)),
        (
            f"redis+sentinel://ann:pw@{NODES}/main/2",
            RedisTarget(
                "sentinel",
                (("one", 7000), ("two", 7001), ("three", 26379)),
                service="main",
                db=2,
                username="ann",
                password="pw",
            ),
        ),
        ("rediss+sentinel://one/main", RedisTarget("sentinel", (("one", 26379),), service="main", tls=True)),
        (f"redis+cluster://{NODES}", RedisTarget("cluster", (("one", 7000), ("two", 7001), ("three", 6379)))),
        (
            f"rediss+cluster://:pw@{NODES}/",
            RedisTarget("cluster", (("one", 7000), ("two", 7001), ("three", 6379)), password="pw", tls=True),
        ),
    ],
)
def test_every_form_means_its_target(url: str, target: RedisTarget) -> None:
    assert is_redis(url)
    assert parse_redis_url(url) == target


def test_a_timeout_has_a_default_of_a_second() -> None:
    assert parse_redis_url("redis://host").timeout_s == TIMEOUT_S == 1.0


def test_certificates_are_options_of_tls(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.pem" for name in ("ca_certs", "certfile", "keyfile")}
    for file in files.values():
        file.touch()
    query = "&".join(f"{name}={quote(str(file))}" for name, file in files.items())
    for scheme in (scheme for scheme, (kind, tls) in SCHEMES.items() if tls and kind != "sentinel"):
        assert parse_redis_url(f"{scheme}://host?{query}").options == {name: str(f) for name, f in files.items()}
    with pytest.raises(RegistryUnavailable, match="expected rediss, which is TLS, with ca_certs"):
        parse_redis_url(f"redis://host?ca_certs={files['ca_certs']}")  # else sent in the clear, against all appearance


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://", r"expected host\[:port\]; got ''"),
        ("redis://:pw@", r"expected host\[:port\]; got ''"),
        ("redis://a,b", "expected one host; got 2"),
        ("redis://a:port", r"expected host\[:port\]; got 'a:port'"),
        ("redis://a:0", r"expected host\[:port\]; got 'a:0'"),
        ("redis://a:65536", r"expected host\[:port\]"),
        ("redis://[::1", "expected user:password@host:port"),
        ("redis://a/b", "expected a database number behind the last /; got 'b'"),
        ("redis://a/1/2", "expected a database number behind the last /; got '1/2'"),
        ("redis://a/²", "expected a database number"),
        ("redis://a/0#x", "expected no #fragment"),
        ("redis+sentinel://a,b", "expected redis.sentinel://HOST,HOST/SERVICE.*; got no service"),
        ("redis+sentinel://a,,b/s", r"expected host\[:port\]; got ''"),
        ("redis+sentinel://a/s/x", "expected a database number"),
        ("redis+cluster://a,b/0", "expected no database"),
        ("redis://a?timeout_s", "expected options as NAME=VALUE"),
        ("redis://a?timeout_s=", "expected a value for every option"),
        ("redis://a?timeout_s=1&timeout_s=2", "expected options among .*, each once; got one twice"),
        ("redis://a?timeout=1", "expected options among password_file, .*; got timeout"),
        ("redis://a?timeout_s=0", "expected timeout_s from 0.01 to 60; got '0'"),
        ("redis://a?timeout_s=inf", "expected timeout_s"),
        ("redis://a?timeout_s=nan", "expected timeout_s"),
        ("redis://a?timeout_s=soon", "expected timeout_s"),
        ("rediss://a?ca_certs=/no/such/file", "expected a file for ca_certs; got none at /no/such/file"),
    ],
)
def test_a_wrong_url_is_told_what_was_expected(url: str, expected: str) -> None:
    with pytest.raises(RegistryUnavailable, match=f"^registry URL: {expected}"):
        open_registry(url)


@pytest.mark.parametrize("scheme", ["REDIS", "redis+unix", "redis+ssl", "valkey"])
def test_other_schemes_are_none_of_ours(scheme: str) -> None:
    with pytest.raises(RegistryUnavailable, match="registry URL: expected a folder, disk:///PATH, redis"):
        open_registry(f"{scheme}://:s3cr3t@host")


def test_a_password_is_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "secret"
    file.write_text("s3cr3t p@ss\n")
    target = parse_redis_url(f"redis://ann@host?password_file={file}")
    assert (target.username, target.password) == ("ann", "s3cr3t p@ss")
    assert "password_file" not in target.options
    with pytest.raises(RegistryUnavailable, match="expected a password or a password_file; got both"):
        parse_redis_url(f"redis://:other@host?password_file={file}")


def test_a_password_file_that_has_none_is_an_error_that_names_it(tmp_path: Path) -> None:
    missing, empty, binary = tmp_path / "missing", tmp_path / "empty", tmp_path / "binary"
    empty.write_text("\n")
    binary.write_bytes(b"\xff\xfes3cr3t")
    for file, expected in [(missing, "No such file"), (empty, "got an empty file"), (binary, "no text")]:
        with pytest.raises(RegistryUnavailable, match=expected) as caught:
            parse_redis_url(f"redis://host?password_file={file}")
        assert str(file) in caught.value.message
        assert "s3cr3t" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://ann:s3cr3t@host:6380/3?timeout_s=2", "redis://host:6380/3"),
        ("redis://:s3@cr3t@host", "redis://host"),
        (f"rediss+sentinel://:s3cr3t@{NODES}/main?password_file=/x", f"rediss+sentinel://{NODES}/main"),
        (f"redis+cluster://{NODES}", f"redis+cluster://{NODES}"),
        ("redis://:s3/cr3t@host/0", "redis://…"),
        ("redis://host?password_file=/run/s3@cr3t", "redis://…"),
        ("disk:///srv/prefixes", "/srv/prefixes"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, shown: str) -> None:
    assert shown_url(url) == shown


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@given(scheme=st.sampled_from(sorted(SCHEMES)), user=TEXT, password=TEXT, service=TEXT.filter(str.strip))
def test_whatever_is_quoted_comes_back(scheme: str, user: str, password: str, service: str) -> None:
    path = f"/{quote(service, safe='')}" if "sentinel" in scheme else ""
    target = parse_redis_url(f"{scheme}://{quote(user, safe='')}:{quote(password, safe='')}@host:1{path}")
    assert (target.username, target.password, target.hosts) == (user or None, password, (("host", 1),))
    assert target.service == (service if path else "")


LOUD = st.text(st.sampled_from("/?#@:[]%&=,;+ \\é℀²x"), max_size=6)


@given(scheme=st.sampled_from(sorted(SCHEMES)), user=LOUD, before=LOUD, after=LOUD)
@example("redis", "", "pa/", "")
@example("redis", "ann", "pa/", "")
@example("redis", "", "x?a=", "&b=c")
@example("redis", "", "", "#")
@example("redis", "", "℀", "")
@example("redis+cluster", "", "a/", "")
def test_a_password_that_was_not_quoted_is_in_no_message(scheme: str, user: str, before: str, after: str) -> None:
    url = f"{scheme}://{user}:{before}s3cr3t{after}@host:1/main"
    said = shown_url(url)
    try:
        said += repr(parse_redis_url(url))
    except RegistryUnavailable as error:
        said += f"{error!r}{error.detail}{error.__cause__!r}"
        assert error.__context__ is None or error.__suppress_context__
    assert "s3cr3t" not in said


def test_the_password_is_in_no_repr() -> None:
    assert "s3cr3t" not in repr(parse_redis_url("redis://ann:s3cr3t@host"))
