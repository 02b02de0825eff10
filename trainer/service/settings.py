"""The trainer service's settings: read once, validated, frozen.

Owns names, defaults, limits and their help texts. The option ``--lease-s``, the variable ``PREFIXD_TRAINER_LEASE_S``
and the key ``lease_s`` in the file are the same setting.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, ByteSize, Field
from pydantic_settings import NoDecode, SettingsConfigDict

from prefixes.registry import default_registry_url
from server.web.access_settings import AccessSettings
from server.web.settings_types import COMMA_SEPARATED, Address, Count, Names, Seconds

_BACKBONE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def _check_backbone(text: str) -> str:
    name, equals, place = text.partition("=")
    if not _BACKBONE.fullmatch(name) or (equals and not place):
        raise ValueError("expected NAME or NAME=FOLDER or NAME=HUB-ID, the name of letters, digits, dots and dashes")
    return text


def _default_data() -> Path:
    return Path(default_registry_url().removeprefix("disk://")).parent / "trainer"


Backbones = Annotated[
    tuple[Annotated[str, AfterValidator(_check_backbone)], ...],
    NoDecode,
    COMMA_SEPARATED,
    Field(min_length=1),
]


class TrainerSettings(AccessSettings):
    """Everything that ``prefixd trainer`` can be told."""

    model_config = SettingsConfigDict(env_prefix="PREFIXD_TRAINER_")

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 is every interface.")
    port: int = Field(8100, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    admin_host: Address = Field(
        "127.0.0.1",
        description="Address of the admin port: metrics and probes. Of a network, such as 10.117.44.0/24, this "
        "machine's own address in it, and 127.0.0.1.",
    )
    admin_port: int = Field(8101, ge=0, le=65535, description="The admin port, never for the public; 0 picks one.")

    data: Path = Field(
        default_factory=_default_data,
        description="Folder of datasets, checkpoints and results; workers on several machines share one.",
    )
    redis: str | None = Field(
        None, min_length=1, description="Redis that keeps jobs and queue, redis://…; default: files in the data folder."
    )
    registry: str = Field(
        default_factory=default_registry_url, min_length=1,
        description="Where prefixes are published: a folder, disk:///PATH or redis://…",
    )  # fmt: skip
    registry_id: str | None = Field(
        None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="The registry's id; with it a flushed or wrong registry is refused at start.",
    )  # fmt: skip
    backbone: Backbones = Field(
        ("demo", "demo-bart"),
        description="A backbone that jobs may name: NAME, NAME=FOLDER, NAME=FILE.gguf or NAME=HUB-ID (repeatable).",
    )
    ignore_generation_config: Names = Field(
        (), description="A field of the backbones' generation configs that does not count here (repeatable)."
    )

    api: bool = Field(True, description="Take requests; without it this process only works.")
    workers: int = Field(1, ge=0, le=64, description="Jobs that this process runs at once; 0 only takes requests.")
    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N; auto is cuda if there."
    )
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = Field(
        "float32", description="Numbers of the frozen model."
    )
    threads: Count | None = Field(None, description="CPU threads of each job's process; default: torch's choice.")
    lease_s: int = Field(
        15, ge=2, le=3600, description="Seconds within which another worker has the job of one that died."
    )
    progress_s: Seconds = Field(0.5, description="How often, at most, a job's progress is written down.")
    max_job_s: float = Field(
        604800.0, gt=0, le=1e9,
        description="Seconds that a job may run, over all its workers; it fails then, its checkpoint stays.",
    )  # fmt: skip
    max_job_memory: ByteSize | None = Field(
        None, gt=0, description="Memory that each job's process may allocate; default: what the machine gives."
    )
    confine_jobs: bool = Field(
        True, description="Let each job's process reach only the files that it needs, where the kernel has Landlock."
    )
    publish_patience_s: Seconds = Field(3600.0, description="How long a job waits for a registry that is away.")

    max_dataset_bytes: ByteSize = Field(ByteSize(1 << 30), gt=0, description="Largest dataset upload.")
    max_body_bytes: ByteSize = Field(ByteSize(1 << 20), gt=0, description="Largest request body, datasets apart.")
    max_open_jobs: Count = Field(1000, description="Queued and running jobs of a tenant; more are refused with 429.")

    heartbeat_s: Seconds = Field(15.0, description="How often a comment goes into every stream, for proxies' sake.")
    drain_timeout_s: Seconds = Field(30.0, description="Seconds that jobs get to write a checkpoint after SIGTERM.")
    access_log: bool = Field(False, description="One log line per HTTP request.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="The least that is logged.")

    @property
    def backbones(self) -> dict[str, str]:
        """Name -> the folder or hub name to load."""
        pairs = (text.partition("=") for text in self.backbone)
        return {name: place or name for name, _, place in pairs}
