"""The tables of the feedback database, for SQLite and PostgreSQL alike.

Texts are in columns of JSON, whose escapes hold every character: PostgreSQL's text has no NUL.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

NUMBER = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up an INTEGER only

metadata = MetaData()

generations = Table(
    "generations",
    metadata,
    Column("id", String(128), primary_key=True),
    Column("answer_id", String(128), index=True),
    Column("choice", Integer, nullable=False),
    Column("created", Float, nullable=False, index=True),  # Unix time
    Column("tenant", String(64), nullable=False),
    Column("key_name", Text, nullable=False),
    Column("user", Text, index=True),
    Column("data", JSON, nullable=False),  # an `items.Answer`
)

feedback = Table(
    "feedback",
    metadata,
    Column("seq", NUMBER, primary_key=True, autoincrement=True),  # writes are serial, so it is the order of commits
    Column("id", String(64), nullable=False, unique=True),
    Column("created", Float, nullable=False, index=True),
    Column("tenant", String(64), nullable=False),
    Column("key_name", Text, nullable=False),
    Column("user", Text, index=True),
    Column("kind", String(16), nullable=False),
    Column("value", JSON, nullable=False),
    Column("idempotency_key", Text),
    Column("digest", String(64), nullable=False),  # of what was sent
    Index("ix_feedback_idempotency", "tenant", "idempotency_key", unique=True),
    sqlite_autoincrement=True,
)

answers = Table(  # what feedback is about: a copy, which outlives the generation
    "feedback_answers",
    metadata,
    Column("feedback", NUMBER, ForeignKey("feedback.seq", ondelete="CASCADE"), primary_key=True),
    Column("place", Integer, primary_key=True),
    Column("generation", String(128), index=True),
    Column("user", Text, index=True),  # who asked for the generation
    Column("data", JSON, nullable=False),
)

profiles = Table(
    "feedback_profiles",
    metadata,
    Column("feedback", NUMBER, ForeignKey("feedback.seq", ondelete="CASCADE"), primary_key=True),
    Column("place", Integer, primary_key=True),
    Column("profile", String(64), primary_key=True),
    Column("version", String(64), nullable=False),
    Column("strength", Float, nullable=False),
    Index("ix_feedback_profiles_profile", "profile", "version"),
)

deleted_users = Table(  # the SHA-256 of ids: late retries and old exports must not bring deleted feedback back
    "deleted_users",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("deleted", Float, nullable=False),
)

jobs = Table(  # background jobs, see `server.jobs`
    "jobs",
    metadata,
    Column("seq", NUMBER, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("queue", String(64), nullable=False),  # the profile directory whose servers run it
    Column("kind", String(16), nullable=False),
    Column("profile", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("options", JSON, nullable=False),
    Column("data", JSON, nullable=False),
    Column("conditions", JSON, nullable=False),
    Column("key_name", Text),
    Column("address", Text),
    Column("created", Float, nullable=False),
    Column("started", Float),
    Column("ended", Float),
    Column("attempts", Integer, nullable=False),
    Column("cancelling", Boolean, nullable=False),
    Column("progress", JSON),
    Column("publication", JSON),
    Column("result", JSON),
    Column("error", JSON),
    Index("ix_jobs_queue_state", "queue", "state"),
    sqlite_autoincrement=True,
)
