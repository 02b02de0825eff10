"""Settings: precedence, strictness and messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

import prefixd
from prefixes.registry import default_registry_url
from server.settings import Settings
from server.web.settings_sources import InvalidSettings, load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import os

    for name in list(os.environ):
        if name.upper().startswith("PREFIXD_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "prefixd.toml"
    path.write_text(text)
    return path


def test_defaults_serve_the_demo_on_the_loopback_from_the_default_registry() -> None:
    settings = load_settings(Settings, {})
    assert (settings.host, settings.port, settings.backbone) == ("127.0.0.1", 8000, "demo")
    assert settings.registry == default_registry_url()


def test_administration_is_on_the_loopback_and_nothing_is_kept_on_disk_unless_told() -> None:
    settings = load_settings(Settings, {"host": "0.0.0.0", "host_cache_bytes": "0"})
    assert (settings.admin_host, settings.admin_port) == ("127.0.0.1", 8001)
    assert (settings.disk_cache, settings.host_cache_bytes, settings.registry_id) == (None, 0, None)
    assert load_settings(Settings, {"disk_cache": "cache"}).disk_cache == Path("cache")


@pytest.mark.parametrize("registry_id", ["", "../other", "a b", "x" * 65])
def test_an_id_that_no_registry_can_have_is_an_error(registry_id: str) -> None:
    with pytest.raises(InvalidSettings, match="registry-id"):
        load_settings(Settings, {"registry_id": registry_id})


def test_flags_win_over_environment_over_file_over_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = write(tmp_path, "port = 1\nmax_rows = 2\nmax_waiting = 3\n")
    monkeypatch.setenv("PREFIXD_PORT", "10")
    monkeypatch.setenv("PREFIXD_MAX_ROWS", "20")
    settings = load_settings(Settings, {"port": 100}, config=config)
    assert (settings.port, settings.max_rows, settings.max_waiting) == (100, 20, 3)
    assert settings.max_step_tokens == 512


def test_the_file_can_be_named_by_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFIXD_CONFIG", str(write(tmp_path, 'pin = ["e2e", "acme/dart"]\n')))
    assert load_settings(Settings, {}).pin == ("e2e", "acme/dart")


def test_lists_and_sizes_read_as_people_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXD_PIN", "e2e, dart")
    monkeypatch.setenv("PREFIXD_KV_CACHE_BYTES", "2MiB")
    settings = load_settings(Settings, {"max_prefix_bytes": "1kB"})
    assert (settings.pin, settings.kv_cache_bytes, settings.max_prefix_bytes) == (("e2e", "dart"), 2 << 20, 1000)


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXD_PORT", "")
    assert load_settings(Settings, {}).port == 8000


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError):
        load_settings(Settings, {}).port = 1


def test_an_unknown_variable_is_an_error_with_a_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFIXD_BACKBON", "gpt2")
    with pytest.raises(InvalidSettings, match="PREFIXD_BACKBON: unknown; did you mean PREFIXD_BACKBONE"):
        load_settings(Settings, {})


def test_an_unknown_key_in_the_file_is_an_error_with_a_guess(tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match="max_row: unknown; did you mean max_rows"):
        load_settings(Settings, {}, config=write(tmp_path, "max_row = 3\n"))


@pytest.mark.parametrize(("text", "message"), [("port = ", "expected TOML"), (None, "cannot be read")])
def test_a_file_that_cannot_be_used_is_an_error(tmp_path: Path, text: str | None, message: str) -> None:
    config = write(tmp_path, text) if text is not None else tmp_path / "none.toml"
    with pytest.raises(InvalidSettings, match=message):
        load_settings(Settings, {}, config=config)


def test_a_wrong_value_says_where_it_came_from(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InvalidSettings, match=r"option --port: .*65535.*70000"):
        load_settings(Settings, {"port": 70000})
    with pytest.raises(InvalidSettings, match=r"prefixd.toml: dtype: .*float32.*got 'int8'"):
        load_settings(Settings, {}, config=write(tmp_path, 'dtype = "int8"\n'))
    monkeypatch.setenv("PREFIXD_MAX_ROWS", "many")
    with pytest.raises(InvalidSettings, match=r"environment variable PREFIXD_MAX_ROWS: .*integer.*'many'"):
        load_settings(Settings, {})


def test_settings_that_contradict_each_other_are_an_error() -> None:
    with pytest.raises(InvalidSettings, match=r"max_step_tokens: expected at least max_rows \(600\).*512"):
        load_settings(Settings, {"max_rows": 600})
    with pytest.raises(InvalidSettings, match="default_max_new_tokens"):
        load_settings(Settings, {"max_new_tokens_limit": 5})


def test_a_malformed_pin_is_an_error() -> None:
    with pytest.raises(InvalidSettings, match="option --pin: tenant name"):
        load_settings(Settings, {"pin": ["../../etc"]})


def test_help_names_every_setting_with_a_sentence() -> None:
    shown = CliRunner().invoke(prefixd.app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert field.description
        assert field.description.split()[0] in shown


def test_an_unknown_option_is_refused_with_a_guess() -> None:
    result = CliRunner().invoke(prefixd.app, ["serve", "--registri", "x"])
    assert result.exit_code == 2
    assert re.search("No such option.*--registri", result.output)
    assert "--registry" in result.output


def test_the_command_lists_its_four_sub_commands() -> None:
    shown = CliRunner().invoke(prefixd.app, ["--help"]).output
    assert all(name in shown for name in ("serve", "prefixes", "train", "convert"))


@pytest.mark.parametrize(("given", "most"), [({}, 512), ({"max_waiting": 7}, 4), ({"max_waiting_per_tenant": 9}, 9)])
def test_a_tenant_may_take_half_of_the_queue_unless_told_otherwise(given: dict[str, int], most: int) -> None:
    assert Settings(**given).waiting_per_tenant == most  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "given", ["*", "null", "https://a.example/", "https://a.example/x", "a.example", "HTTPS://a.example", "https://*.a"]
)
def test_an_origin_that_no_browser_sends_is_refused(given: str) -> None:
    """It let nobody write and, with a star, everybody read."""
    with pytest.raises(InvalidSettings, match="expected origins as browsers send them"):
        load_settings(Settings, {"allowed_origins": f"https://a.example,{given}"})
    settings = load_settings(Settings, {"allowed_origins": "https://a.example,http://localhost:3000"})
    assert settings.allowed_origins == ("https://a.example", "http://localhost:3000")


@pytest.mark.parametrize("given", ["*", "http://a.example", "a.example/", "*.example"])
def test_a_host_that_no_header_says_is_refused(given: str) -> None:
    with pytest.raises(InvalidSettings, match="expected names of hosts"):
        load_settings(Settings, {"allowed_hosts": given})
    settings = load_settings(Settings, {"allowed_hosts": "a.example,[::1]:8000"})
    assert settings.allowed_hosts == ("a.example", "[::1]:8000")
