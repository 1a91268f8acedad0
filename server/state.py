"""What a running application holds: the engine and the profiles, and whether they are loaded.

Loading happens beside the event loop, so that a server answers /health while its model is being read.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from functools import cached_property, partial

from server.access.callers import Caller
from server.engines.config import EngineConfig
from server.engines.errors import Unavailable
from server.engines.pool import DaemonPool
from server.engines.process import ProcessEngine
from server.engines.protocol import Engine
from server.engines.torch.build import build_engine
from server.feedback.items import NO_FEEDBACK, FeedbackOff
from server.feedback.keeping import Keeping, who
from server.feedback.store import FeedbackStore
from server.generation.answer_sizes import AnswerBudget
from server.generation.intake import Ask, Intake, longest_text
from server.generation.load import MIN_RETRY_SECONDS, Load
from server.generation.request_limits import RequestLimits
from server.generation.token_texts import TokenTexts
from server.http.middleware import BytesInFlight
from server.jobs.job import NO_JOBS, JobsOff, ServedModel
from server.jobs.job_service import Jobs
from server.observability.logs import LogFormat, set_up_logs, set_up_transformers_logs
from server.observability.metrics import Metrics, Snapshot
from server.profiles.changes import ProfileChanges
from server.profiles.registry import ProfileRegistry
from server.profiles.versions import ProfileStore
from server.settings import Settings, seconds_of
from steering_vectors.errors import TrimtabError
from steering_vectors.profiles.files import installed_version
from steering_vectors.profiles.shipped import shipped_profiles
from steering_vectors.runtime.cpu.threads import run_apart

logger = logging.getLogger(__name__)

MAX_WAITING_TEXTS = 64
BUSY = "many long texts wait to be tokenised: try again later"


class Service:
    """Belongs to one application. An engine that is given is used, and left open at the end; else one is made. What is
    loaded raises Unavailable until it is."""

    def __init__(self, settings: Settings, engine: Engine | None = None) -> None:
        self.settings = settings
        self.created = int(time.time())
        self.metrics = Metrics(self._snapshot)
        self._given = engine
        self._engine: Engine | None = None
        self._registry: ProfileRegistry | None = None
        self._changes: ProfileChanges | None = None
        self._feedback: FeedbackStore | None = None
        self._jobs: Jobs | None = None
        self._loading: asyncio.Task[None] | None = None
        self._loaded = asyncio.Event()
        self._failure: Exception | None = None
        self._draining = False
        self._loader = DaemonPool(1, "trimtab-loading")
        self._tokenizing = DaemonPool(2, "trimtab-tokenizing", max_waiting=MAX_WAITING_TEXTS, busy=BUSY)
        self.encoding = DaemonPool(1, "trimtab-encoding")  # of large answers
        self.bytes_in_flight = BytesInFlight(settings.max_bytes_in_flight, settings.max_queue_share)
        self._budget = AnswerBudget(settings.max_answer_values)
        self._engine_load: Load | None = None
        self._max_characters = 0
        self._limits = RequestLimits(
            default_timeout=settings.default_timeout_seconds,
            max_timeout=settings.max_timeout_seconds,
            max_tokens=settings.max_tokens_limit,
            max_n=settings.max_n,
        )

    @property
    def problem(self) -> str | None:
        """Why the engine cannot go on; None if it can, or is being loaded."""
        return None if self._engine is None else self._engine.health()

    def check_alive(self) -> None:
        """Raise Unavailable if the server must be restarted."""
        if self._failure is not None:
            raise Unavailable("the server could not load its model or profiles; its log says why")
        if (problem := self.problem) is not None:
            raise Unavailable(problem, code="engine_failed")

    def check_ready(self) -> None:
        """Raise Unavailable until everything is loaded, and if the engine cannot go on."""
        if not self._loaded.is_set():
            raise Unavailable("the model is being loaded: try again in a moment", code="loading")
        self.check_alive()

    def check_accepting(self) -> None:
        """Raise Unavailable if no new work is taken."""
        self.check_ready()
        if self._draining:
            raise Unavailable("the server is shutting down", code="draining")

    def check_room(self, tenant: str) -> None:
        """Raise Unavailable if no new work is taken, Overloaded if there is no room for more."""
        self.check_accepting()
        self.load.check_room(tenant)

    def retry_after(self) -> int:
        """The seconds after which a request that was refused may be sent again."""
        return MIN_RETRY_SECONDS if self._engine_load is None else self._engine_load.retry_after()

    def drain(self) -> None:
        """Take no new generations; /ready says so. What runs goes on, and its steering can still be changed."""
        self._draining = True
        if self._jobs is not None:
            self._jobs.drain()

    @property
    def engine(self) -> Engine:
        self.check_ready()
        assert self._engine is not None
        return self._engine

    @property
    def registry(self) -> ProfileRegistry:
        self.check_ready()
        assert self._registry is not None
        return self._registry

    @property
    def load(self) -> Load:
        assert self._engine_load is not None
        return self._engine_load

    @property
    def changes(self) -> ProfileChanges:
        self.check_ready()
        assert self._changes is not None
        return self._changes

    @property
    def feedback(self) -> FeedbackStore:
        """Raises FeedbackOff if the server has none."""
        self.check_ready()
        if self._feedback is None:
            raise FeedbackOff(NO_FEEDBACK)
        return self._feedback

    @property
    def jobs(self) -> Jobs:
        """Raises JobsOff if the server runs none."""
        self.check_ready()
        if self._jobs is None:
            raise JobsOff(NO_JOBS)
        return self._jobs

    @property
    def model_name(self) -> str:
        """The base model's name on /v1."""
        return self.settings.served_model_name or self.engine.info.model_name

    def intake(self, caller: Caller) -> Intake:
        self.check_accepting()
        return Intake(
            self.engine,
            self.model_name,
            self.registry,
            self._tokenizing,
            self._budget,
            self.load,
            self._max_characters,
            self._limits,
            caller,
            keep=self._keep if self._feedback is not None and self._feedback.keeps_generations else None,
        )

    def _keep(self, ask: Ask, caller: Caller) -> Keeping:
        assert self._feedback is not None
        identity = self.engine.info.identity
        return Keeping(
            ask,
            who(caller),
            {
                "name": self.model_name,
                "fingerprint": identity.fingerprint,
                "system_fingerprint": self.fingerprint,
            },
            self._feedback.keep,
        )

    @cached_property
    def fingerprint(self) -> str:
        """Tells one model, its numbers and version of this server from another, as OpenAI's `system_fingerprint`."""
        info = self.engine.info
        described = f"{info.identity.fingerprint}/{self.settings.quantize or info.dtype}/{installed_version()}"
        return f"fp_{hashlib.sha256(described.encode()).hexdigest()[:12]}"

    @cached_property
    def token_texts(self) -> TokenTexts:
        return TokenTexts(self.engine.info.tokenizer)

    def start(self) -> None:
        self._loading = asyncio.create_task(self._load(), name="trimtab-loading")

    async def wait_ready(self) -> None:
        """Return once everything is loaded; raise what went wrong if it cannot be."""
        await self._loaded.wait()
        if self._failure is not None:
            raise self._failure

    async def close(self) -> None:
        """Stop watching and computing; streams that still run end in an error event. May be called again."""
        if self._loading is not None:
            self._loading.cancel()
            await asyncio.gather(self._loading, return_exceptions=True)
        if self._jobs is not None:
            await self._jobs.close()
        if self._registry is not None:
            await self._registry.stop()
        if self._changes is not None:
            self._changes.close()
        self._tokenizing.close()
        self.encoding.close()
        if self._engine is not None and self._engine is not self._given:
            await self._engine.close()
        if self._feedback is not None:
            await self._feedback.close()

    def _snapshot(self) -> Snapshot:
        registry, engine = self._registry, self._engine
        if registry is None or engine is None:
            return Snapshot(installed_version())
        return Snapshot(
            installed_version(),
            self.settings.served_model_name or engine.info.model_name,
            engine.info,
            engine.stats(),
            ready=self._loaded.is_set() and self._failure is None,
            served={profile.name: profile.version for profile in registry.served},
            rejected=sum(entry.status == "rejected" for entry in registry.entries),
            unreadable=registry.unreadable,
            directory_unreadable=registry.problem is not None,
            loads=registry.loads,
            rejections=registry.rejections,
            admitted=self.load.total,
            body_bytes=self.bytes_in_flight.total,
            answer_values=self._budget.used,
            changes={} if self._changes is None else {**self._changes.counts},
            feedback_waiting=0 if self._feedback is None else self._feedback.waiting,
            jobs={} if self._jobs is None else {(state,): count for state, count in self._jobs.counts.items()},
        )

    async def _open_feedback(self) -> FeedbackStore | None:
        settings = self.settings
        url = settings.feedback_database
        if url is None:
            return None
        return await self._loader.run(
            lambda: FeedbackStore.open(
                url,
                keep_generations=seconds_of(settings.keep_generations),
                keep_feedback=seconds_of(settings.keep_feedback),
                noted=self.metrics.generation_kept,
            )
        )

    def _open_jobs(self) -> Jobs | None:
        """Within the thread that loads."""
        settings, feedback = self.settings, self._feedback
        if not settings.jobs:
            return None
        assert feedback is not None
        assert settings.feedback_database is not None
        from server.jobs.worker import WorkerSettings

        make = partial(
            WorkerSettings,
            settings.feedback_database,
            str(settings.profiles.resolve()),
            model=_of_jobs(settings),
            profile_versions=settings.profile_versions,
            profile_quota_bytes=settings.profile_quota_bytes,
            audit_log=None if settings.audit_log is None else str(settings.audit_log.resolve()),
            allow_model_mismatch=settings.allow_model_mismatch,
            at_once=settings.jobs_at_once,
            log_format=settings.log_format,
            log_level=settings.log_level,
        )
        keep, data = seconds_of(settings.keep_jobs), settings.jobs_data
        return Jobs.open(feedback.database, settings.profiles, make, keep=keep, data=data)

    async def _load(self) -> None:
        try:
            config = self.settings.engine_config()
            self._feedback = await self._open_feedback()
            self._jobs = await self._loader.run(self._open_jobs)
            if self._given is not None:
                self._engine = self._given
            elif self.settings.engine_process:
                make = partial(_build_in_process, config, self.settings.log_format, self.settings.log_level)
                self._engine = await ProcessEngine.start(make, self.settings.step_timeout_seconds)
            else:
                self._engine = await self._loader.run(lambda: run_apart(partial(build_engine, config)))
            info = self._engine.info
            identity = info.identity
            self._engine_load = Load(info.slots, info.capacity, self.settings.max_queue_share)
            self._max_characters = await self._loader.run(lambda: longest_text(info))
            shipped = await self._loader.run(lambda: shipped_profiles(identity))
            store = ProfileStore(
                self.settings.profiles,
                shipped,
                max_versions=self.settings.profile_versions,
                quota=self.settings.profile_quota_bytes,
                audit_log=self.settings.audit_log,
            )
            self._registry = ProfileRegistry(
                self.settings.profiles, self._engine, shipped=shipped, changed=self.metrics.serve_profiles, store=store
            )
            self._changes = ProfileChanges(store, self._registry, self._engine)
            await self._registry.start()
            if self._feedback is not None:
                self._feedback.start()
            if self._jobs is not None:
                self._jobs.start(self._changes)
        except Exception as error:
            if not isinstance(error, TrimtabError):
                logger.exception("loading failed")
            self._failure = error
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # a library's panic
            logger.exception("loading failed")
            self._failure = RuntimeError(f"loading failed: {error!r}")
        finally:
            self._loaded.set()
            self._loader.close()


def _of_jobs(settings: Settings) -> ServedModel:
    """The served model, as jobs load it: from the same weights, on the device of jobs."""
    return ServedModel(
        settings.model,
        settings.dtype,
        settings.jobs_device,
        None if settings.adapter is None else str(settings.adapter),
        settings.chat_template,
        settings.revision,
    )


def _build_in_process(config: EngineConfig, log_format: LogFormat, log_level: str) -> Engine:
    """The engine of a process of its own, which logs as the server does."""
    set_up_logs(log_format, log_level)
    set_up_transformers_logs(log_format)
    return build_engine(config)
