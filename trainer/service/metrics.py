"""The trainer's metrics.

Owns names and labels. A job's id is a label only while the job runs here, which bounds the series by the workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from trainer.jobs.open_job import OpenJob
from trainer.jobs.record import STATES, Job


class JobMetrics:
    """The metrics of this process's workers."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._by_job = {
            name: Gauge(metric, text, ("job_id",), registry=registry)  # Prometheus has a label `job` of its own
            for name, (metric, text) in {
                "loss": ("prefixd_trainer_job_loss", "Training loss of a running job's last step."),
                "validation_loss": ("prefixd_trainer_job_validation_loss", "Its validation loss per token, the last."),
                "step": ("prefixd_trainer_job_step", "Steps that a running job has done."),
                "total": ("prefixd_trainer_job_steps", "Steps that a running job has to do."),
                "tokens_per_s": ("prefixd_trainer_job_tokens_per_second", "Tokens per second through the model."),
            }.items()
        }
        self._tokens = Counter("prefixd_trainer_tokens_total", "Tokens trained on by this process.", registry=registry)
        self._ended = Counter(
            "prefixd_trainer_jobs_ended_total", "Jobs that ended with this process's workers.", ("state", "code"),
            registry=registry,
        )  # fmt: skip
        for state in STATES[2:]:
            self._ended.labels(state, "")
        self._counted: dict[str, int] = {}

    def progressed(self, job: Job, progress: Mapping[str, Any]) -> None:
        """Set a running job's gauges and count its new tokens."""
        for name, gauge in self._by_job.items():
            if isinstance(progress.get(name), (int, float)):
                gauge.labels(job.id).set(progress[name])
        tokens = int(progress.get("tokens", 0))
        self._tokens.inc(max(0, tokens - self._counted.get(job.id, tokens)))
        self._counted[job.id] = tokens

    def ended(self, job: Job) -> None:
        """Count a job that ended with a worker of this process."""
        self._ended.labels(job.state, job.failure.code if job.failure else "").inc()

    def forget(self, job_id: str) -> None:
        """Drop the series of a job that no longer runs here."""
        self._counted.pop(job_id, None)
        for gauge in self._by_job.values():
            gauge.remove_by_labels({"job_id": job_id})


class QueueCollector(Collector):
    """The open jobs of all tenants at the last look. Every process of a deployment reports the same numbers."""

    def __init__(self) -> None:
        self._open: tuple[OpenJob, ...] = ()

    def see(self, jobs: Iterable[OpenJob]) -> None:
        """Take the jobs that are open now."""
        self._open = tuple(jobs)

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """See prometheus_client."""
        states = GaugeMetricFamily("prefixd_trainer_jobs", "Open jobs of all tenants.", labels=("state",))
        for state in STATES[:2]:
            states.add_metric([state], sum(job.state == state for job in self._open))
        yield states
        waiting = [datetime.fromisoformat(job.queued_at) for job in self._open if job.state == "queued"]
        age = (datetime.now(UTC) - min(waiting)).total_seconds() if waiting else 0.0
        yield GaugeMetricFamily(
            "prefixd_trainer_queue_age_seconds", "How long the job that waits longest has waited.", value=max(0.0, age)
        )
