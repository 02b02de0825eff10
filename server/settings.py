"""The server's settings: read once, validated, frozen.

Owns names, defaults, limits and help texts. The option ``--max-rows``, the variable ``PREFIXD_MAX_ROWS`` and the key
``max_rows`` in the file are the same setting. Does not know where values come from (``web.settings_sources``) or what
they do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ByteSize, Field, model_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from prefixes.errors import InvalidName
from prefixes.registry import default_registry_url
from prefixes.spec import TaskRef
from server.web.access_settings import AccessSettings
from server.web.settings_types import COMMA_SEPARATED, Address, Count, Names, Seconds


def _check_task(text: str) -> str:
    try:
        TaskRef.parse(text)
    except InvalidName as error:
        raise ValueError(error.message) from None
    return text


Tasks = Annotated[tuple[Annotated[str, AfterValidator(_check_task)], ...], NoDecode, COMMA_SEPARATED]


class Settings(AccessSettings):
    """All settings of ``prefixd serve``."""

    model_config = SettingsConfigDict(env_prefix="PREFIXD_")

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 is every interface.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    admin_host: Address = Field(
        "127.0.0.1",
        description="Address of the admin port: metrics, probes, administration. Of a network, such as 10.117.44.0/24, "
        "this machine's own address in it, and 127.0.0.1.",
    )
    admin_port: int = Field(8001, ge=0, le=65535, description="The admin port, never for the public; 0 picks one.")

    backbone: str = Field(
        "demo", min_length=1,
        description="The frozen model: a name of `prefixd backbones list`, a folder, FOLDER/NAME.gguf, or a hub id "
        "such as gpt2.",
    )
    ignore_generation_config: Names = Field(
        (), description="A field of the backbone's generation config that does not count here (repeatable)."
    )
    registry: str = Field(
        default_factory=default_registry_url, min_length=1, description="Where prefixes live: a folder, disk:///PATH or redis://…"
    )
    registry_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="The registry's id; with it a flushed or wrong registry is refused at start as well.",
    )  # fmt: skip
    max_stale_s: float = Field(
        300.0, ge=0, le=30 * 86400, allow_inf_nan=False,
        description="Seconds for which known tasks are served while the registry does not answer.",
    )  # fmt: skip
    pin: Tasks = Field((), description="Tasks whose prefixes are loaded at start and never evicted (repeatable).")

    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N; auto is cuda if there."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = Field(
        "auto", description="Numbers to compute in; auto is float32 on cpu, bfloat16 on cuda."
    )
    kernels: str = Field("auto", min_length=1, description="Attention and linear kernels; auto picks the quickest.")
    deterministic: bool = Field(
        False, description="Kernels whose bits depend on nothing beside a request, or none; steps by no clock."
    )
    quantize: Literal["auto", "none", "int8"] = Field(
        "auto",
        description="int8 keeps weights as integers of 8 bits, on cpu: a quarter of the memory, and faster; auto does "
        "for a GGUF file of 8 bits or fewer.",
    )  # fmt: skip
    threads: Count | None = Field(None, description="CPU threads of the engine; default: all cores it may use.")

    kv_cache_bytes: ByteSize = Field(
        ByteSize(1 << 30), gt=0, description="Memory for rows, resident prefixes and reused prompts, e.g. 512MiB."
    )
    max_prefix_bytes: ByteSize | None = Field(
        None, gt=0, description="At most this much of it for resident prefixes; default: all of it."
    )
    preempted_prefix_bytes: ByteSize | None = Field(
        None, gt=0,
        description="For prefixes of running and of preempted requests, whose copies may take so much host memory; "
        "default: as much as max_prefix_bytes.",
    )  # fmt: skip
    host_cache_bytes: ByteSize = Field(
        ByteSize(256 << 20), ge=0, description="Host memory that keeps fetched artifacts; 0 keeps none."
    )
    disk_cache: Path | None = Field(
        None, description="Folder that keeps fetched artifacts, over restarts too; default: none is kept on disk."
    )
    disk_cache_bytes: ByteSize = Field(ByteSize(4 << 30), gt=0, description="Most bytes of artifacts in that folder.")
    block_size: Count = Field(16, description="Positions in one block of that memory.")
    max_rows: Count = Field(64, description="Rows that run at once; every beam and every sample is a row.")
    max_step_tokens: Count = Field(512, description="Tokens in one forward pass; long prompts are cut into chunks.")
    max_step_ms: float = Field(
        500.0, gt=0, allow_inf_nan=False,
        description="Milliseconds that prompts and encoders may hold up the rows that run, in each step.",
    )  # fmt: skip
    max_encoder_tokens: Count = Field(4096, description="Tokens of inputs that go through an encoder together.")
    max_waiting: Count = Field(1024, description="Requests that may wait; more are refused with 429.")
    max_waiting_per_tenant: Count | None = Field(
        None, description="Of these, requests of one tenant; default: half of max_waiting, rounded up."
    )
    reuse_prompts: bool = Field(True, description="Keep the memory of finished prompts for repeated ones.")

    default_max_new_tokens: Count = Field(128, description="max_new_tokens where nobody says.")
    max_new_tokens_limit: Count = Field(4096, description="The most max_new_tokens that a request may ask for.")
    num_beams_limit: Count = Field(16, description="The most num_beams of a request; max_rows bounds it too.")
    num_return_sequences_limit: Count = Field(16, description="The most num_return_sequences, as well.")
    max_batch_items: Count = Field(256, description="Items in one /generate/batch, prompts in one /v1/completions.")
    max_body_bytes: ByteSize = Field(ByteSize(4 << 20), gt=0, description="Largest request body, uploads apart.")
    max_input_bytes: ByteSize = Field(
        ByteSize(1 << 20), gt=0, description="Bytes of a text that are tokenised at most; truncate needs few of them."
    )
    tokenizer_threads: Count = Field(2, description="Long texts that are tokenised at once; further ones wait.")
    max_upload_bytes: ByteSize = Field(ByteSize(512 << 20), gt=0, description="Largest prefix upload.")

    alias_ttl_s: float = Field(
        0.5, ge=0, le=0.9, description="Seconds for which an alias is believed; below 1, so that a promote is seen."
    )
    drain_timeout_s: Seconds = Field(120.0, description="Seconds that running rows get to finish after SIGTERM.")
    usage_flush_s: Seconds = Field(
        5.0, description="Seconds between two records of what tenants used; a killed server loses as much at most."
    )
    price_file: Path | None = Field(
        None, description="Prices of tokens and training steps (TOML or JSON): `GET /usage` has costs then."
    )
    step_timeout_s: Seconds = Field(
        60.0, description="Seconds after which a step that does not return makes /ready and /health fail."
    )
    heartbeat_s: Seconds = Field(15.0, description="How often a comment goes into every stream, for proxies' sake.")
    max_task_labels: Count = Field(100, description='Tasks with a label in metrics, the most used; else "(other)".')
    max_tenant_labels: Count = Field(100, description='Tenants with a label in metrics, likewise; else "(other)".')
    access_log: bool = Field(False, description="One log line per HTTP request.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least that is logged.")

    @property
    def waiting_per_tenant(self) -> int:
        """Requests of one tenant that may wait."""
        return self.max_waiting_per_tenant or -(-self.max_waiting // 2)

    @property
    def backbone_name(self) -> str:
        """The name under which the bare backbone is a model: the last part of a path or hub id."""
        return self.backbone.rstrip("/").rpartition("/")[2] or self.backbone

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_step_tokens < self.max_rows:
            raise ValueError(
                f"max_step_tokens: expected at least max_rows ({self.max_rows}), one token for each row, "
                f"got {self.max_step_tokens}"
            )
        if self.default_max_new_tokens > self.max_new_tokens_limit:
            raise ValueError(
                f"default_max_new_tokens: expected at most max_new_tokens_limit ({self.max_new_tokens_limit}), "
                f"got {self.default_max_new_tokens}"
            )
        return self
