"""Puts a server together, before any socket listens: backbone, registry, kernels, engine, metrics.

Owns the order and what "auto" means on this machine. A wrong setting raises its named error here. Knows no HTTP.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch
import transformers
from prometheus_client import (
    CollectorRegistry,
    GCCollector,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)

import prefixes
from prefixes.backbone import Backbone, load_backbone
from prefixes.checkpoint_folder import DEMOS
from prefixes.errors import BackboneError, InvalidParameter, PrefixdError, RegistryUnavailable
from prefixes.fetchable import FETCHABLE
from prefixes.generation_config import OPTION
from prefixes.registry import open_to_serve
from prefixes.registry.base import Registry
from prefixes.spec import PrefixSpec, TaskRef, check_compatible
from prefixes.tenancy.keyring import Keyring
from prefixes.usage.prices import PriceTable, read_prices
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.kernels import chosen_quantization, select_kernels
from server.engine.kernels.threads import configure_threads
from server.engine.memory.heap import trim_heap
from server.engine.memory.shares import Shares
from server.engine.types import Failed, Finished, GenerationRequest, PrefixKey, SamplingParams
from server.metrics import EngineMetrics
from server.parameters import ParameterLimits, merge_parameters
from server.registry.catalog import Catalog
from server.registry.link import RegistryLink
from server.registry.metrics import RegistryMetrics
from server.settings import Settings
from server.tiers.disk_cache import DiskCache
from server.tiers.tiers import Cache, HostCache, PrefixTiers
from server.web.binding import addresses_of
from server.web.denials import DenialLog
from server.web.opening import open_keyring
from server.web.settings_sources import InvalidSettings

DEMO_FOLDERS: Final = {
    name: Path(prefixes.__file__).parent / "demo" / folder
    for name, folder in {**DEMOS, **{name: name for name in FETCHABLE}}.items()
}
"""Backbone -> the folder whose ``prefixes/`` are published for it. A fetched one need not have any."""
WARM_UP_TOKENS: Final = 8
NOBODY: Final = ""  # asks for the warm-up: no tenant's name, so that no tenant's limits hold
WARM_UP_INPUT: Final = 256  # long enough to measure the pace of prompts and encoders

_log = logging.getLogger("prefixd.server")


@dataclass(frozen=True)
class Assembled:
    """All that is ready before the event loop runs.

    ``pinned`` are the versions that ``--pin`` named at start. The engine counts them; whoever starts it loads them.
    """

    settings: Settings
    backbone: Backbone
    link: RegistryLink
    keyring: Keyring
    denials: DenialLog
    catalog: Catalog
    tiers: PrefixTiers
    engine: Engine
    engine_metrics: EngineMetrics
    metrics_registry: CollectorRegistry
    pinned: Mapping[PrefixKey, PrefixSpec]
    prices: PriceTable | None


def assemble(settings: Settings) -> Assembled:
    """Load, connect, compile and warm up.

    Raises BackboneError, RegistryUnavailable, TaskNotFound (for a pin), IncompatiblePrefix, InvalidSettings.
    """
    transformers.utils.logging.disable_progress_bar()  # stderr is the log, and what transformers says is lines of it
    transformers.utils.logging.disable_default_handler()
    transformers.utils.logging.enable_propagation()
    disable_created_metrics()
    device = _device(settings.device)
    dtype = _dtype(settings.dtype, device)
    registry = open_to_serve(settings.registry, registry_id=settings.registry_id)
    keyring = open_keyring(registry.tenancy, settings, (settings.host, *addresses_of(settings.admin_host)))
    prices = _prices(settings)
    began = time.monotonic()
    backbone = load_backbone(
        settings.backbone, dtype=dtype, device=device, ignore_generation_config=settings.ignore_generation_config
    )
    _check_defaults(backbone, settings)
    _log.info("backbone loaded", extra={"facts": {
        "backbone": settings.backbone, "fingerprint": backbone.spec.fingerprint, "device": str(device),
        "dtype": str(dtype).removeprefix("torch."), "seconds": round(time.monotonic() - began, 3)}})
    if settings.backbone in DEMO_FOLDERS:
        publish_demo(registry, settings.backbone, DEMO_FOLDERS)
    metrics_registry = CollectorRegistry()
    for collector in (ProcessCollector, PlatformCollector, GCCollector):
        collector(registry=metrics_registry)
    link = RegistryLink(registry, RegistryMetrics(metrics_registry))
    tiers = _tiers(settings, link, keyring)
    catalog = Catalog(
        link, backbone.spec, tiers, alias_ttl_s=settings.alias_ttl_s, max_stale_s=settings.max_stale_s
    )
    metrics = EngineMetrics(
        max_task_labels=settings.max_task_labels, max_tenant_labels=settings.max_tenant_labels
    )
    try:
        configure_threads(settings.threads)  # the command called it before importing torch; now it sets torch's number
        quantize = chosen_quantization(
            settings.quantize, device, dtype, settings.kernels, stored=backbone.quantized
        )
        kernels = select_kernels(
            device, dtype, settings.kernels, settings.threads,
            deterministic=settings.deterministic, take_weights=True, quantize=quantize,
        )
        engine = Engine(backbone, kernels, _engine_config(settings, keyring), catalog.load, metrics)
    except ValueError as error:
        raise InvalidSettings(str(error)) from None
    backbone.release()  # the engine has what it needs
    began = time.monotonic()
    warm_up(engine)
    metrics.begin(metrics_registry)
    trim_heap()  # gives back what loading and compiling took
    _log.info("engine warm", extra={"facts": {
        "kernels": kernels.name, "quantize": quantize, "seconds": round(time.monotonic() - began, 3)}})
    return Assembled(
        settings=settings,
        backbone=backbone,
        link=link,
        keyring=keyring,
        denials=DenialLog(registry.tenancy),
        catalog=catalog,
        tiers=tiers,
        engine=engine,
        engine_metrics=metrics,
        metrics_registry=metrics_registry,
        pinned=_reserve_pins(settings.pin, registry, backbone, engine),
        prices=prices,
    )


def publish_demo(registry: Registry, demo: str, folders: Mapping[str, Path]) -> None:
    """Publish ``demo``'s artifacts, each under its file's name, if ``registry`` has none of them and nothing but demos.

    ``folders`` maps each demo's name to its folder, which has the artifacts under ``prefixes/``. Where there is neither
    an artifact nor a task, the log says how one comes.
    """
    bundled = {name: sorted((folder / "prefixes").glob("*.safetensors")) for name, folder in folders.items()}
    demos = {path.stem for paths in bundled.values() for path in paths}
    try:
        there = {task.name for task in registry.tasks()}
    except RegistryUnavailable:
        registry.check()
        return  # a user's registry with damaged data: the user gets that error on asking for the data
    if not there and not bundled[demo]:
        _log.warning("no task in the registry; prefixd train and prefixd prefixes publish add one while this serves")
    if there - demos or there & {path.stem for path in bundled[demo]}:
        return
    source = {"source": "bundled with prefixd"}
    for path in bundled[demo]:
        info = registry.publish("default", path.stem, path.read_bytes(), record=source, actor="prefixd")
        _log.info("demo task published", extra={"facts": {"task": f"default/{path.stem}", "version": info.version}})


def warm_up(engine: Engine) -> None:
    """Run bare requests to their ends: greedy, sampled, with beams and with a long input.

    So no user's request pays for what the first run costs.
    """
    greedy = SamplingParams(max_new_tokens=WARM_UP_TOKENS, min_new_tokens=WARM_UP_TOKENS)
    sampled = replace(greedy, do_sample=True, top_k=4, top_p=0.9, num_return_sequences=2, seed=0)
    kinds = (
        (greedy, WARM_UP_TOKENS),
        (sampled, WARM_UP_TOKENS),
        (replace(greedy, num_beams=2), WARM_UP_TOKENS),
        (greedy, WARM_UP_INPUT),
    )
    for index, (params, length) in enumerate(kinds):
        request = GenerationRequest(f"warm-up-{index}", NOBODY, (0,) * length, params)
        try:
            engine.check(request)
        except PrefixdError as error:
            if index == 0:
                raise InvalidSettings(f"not even a short request fits: {error.message}") from None
            continue  # an engine with a single row has neither samples nor beams, a short window no long input
        engine.add(request)
    while engine.requests:
        for event in engine.step():
            if isinstance(event, Failed):
                raise BackboneError(f"warm-up: expected the engine to generate, got: {event.error.message}")
            assert not isinstance(event, Finished) or event.outputs


def limits_of(settings: Settings) -> ParameterLimits:
    """The limits of requests' parameters. Defaults are cut to them, so none asks for more rows than there are."""
    return ParameterLimits(
        default_max_new_tokens=settings.default_max_new_tokens,
        max_new_tokens=settings.max_new_tokens_limit,
        num_beams=min(settings.num_beams_limit, settings.max_rows),
        num_return_sequences=min(settings.num_return_sequences_limit, settings.max_rows),
    )


def _check_defaults(backbone: Backbone, settings: Settings) -> None:
    """Raise BackboneError for a generation config with which every plain request would fail."""
    try:
        merge_parameters({}, {}, backbone.generation_defaults, limits_of(settings))
    except InvalidParameter as error:
        raise BackboneError(
            f"backbone {backbone.name!r}: generation config: {error.message}. Without it: {OPTION} FIELD",
            **error.detail,
        ) from None


def _prices(settings: Settings) -> PriceTable | None:
    try:
        return None if settings.price_file is None else read_prices(settings.price_file)
    except InvalidParameter as error:
        raise InvalidSettings(f"price_file: {error.message}") from None


def _tiers(settings: Settings, link: RegistryLink, keyring: Keyring) -> PrefixTiers:
    """The caches, the nearest first, and behind them the registry."""
    registry = link.registry
    caches: list[Cache] = [HostCache(settings.host_cache_bytes, Shares(keyring.weight_of))]
    if settings.disk_cache is not None:
        caches.append(DiskCache(settings.disk_cache, registry.id, settings.disk_cache_bytes))
    return PrefixTiers(lambda tenant, version: link.call("fetch", registry.fetch, tenant, version), tuple(caches))


def _engine_config(settings: Settings, keyring: Keyring) -> EngineConfig:
    return EngineConfig(
        kv_cache_bytes=settings.kv_cache_bytes,
        max_prefix_bytes=settings.max_prefix_bytes,
        preempted_prefix_bytes=settings.preempted_prefix_bytes,
        block_size=settings.block_size,
        max_rows=settings.max_rows,
        max_step_tokens=settings.max_step_tokens,
        max_step_ms=settings.max_step_ms,
        deterministic=settings.deterministic,
        max_encoder_tokens=settings.max_encoder_tokens,
        reuse_prompts=settings.reuse_prompts,
        weight_of=keyring.weight_of,
        limits_of=keyring.limits_of,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InvalidSettings(f"device: expected one that is here, got {name!r}; use cpu or auto")
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype = getattr(torch, name)
    if device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
        raise InvalidSettings(f"dtype: expected float32 or float64 on cpu, got {name!r}")
    assert isinstance(dtype, torch.dtype)
    return dtype


def _reserve_pins(
    tasks: Iterable[str], registry: Registry, backbone: Backbone, engine: Engine
) -> dict[PrefixKey, PrefixSpec]:
    pinned = {}
    for task in tasks:
        resolved = registry.resolve(TaskRef.parse(task))
        check_compatible(resolved.spec, backbone.spec)
        key = PrefixKey(resolved.tenant, resolved.version)
        try:
            engine.reserve_pin(key, resolved.spec)
        except PrefixdError as error:
            raise InvalidSettings(f"{error.message} with task {task!r}", **error.detail) from None
        pinned[key] = resolved.spec
    return pinned

