"""Kept generations, feedback with copies of what it is about, and deleted users."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

NUMBER = sa.BigInteger().with_variant(sa.Integer, "sqlite")


def upgrade() -> None:
    op.create_table(
        "generations",
        sa.Column("id", sa.String(128), primary_key=True),
        sa.Column("answer_id", sa.String(128), index=True),
        sa.Column("choice", sa.Integer, nullable=False),
        sa.Column("created", sa.Float, nullable=False, index=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("key_name", sa.Text, nullable=False),
        sa.Column("user", sa.Text, index=True),
        sa.Column("data", sa.JSON, nullable=False),
    )
    op.create_table(
        "feedback",
        sa.Column("seq", NUMBER, primary_key=True, autoincrement=True),
        sa.Column("id", sa.String(64), nullable=False, unique=True),
        sa.Column("created", sa.Float, nullable=False, index=True),
        sa.Column("tenant", sa.String(64), nullable=False),
        sa.Column("key_name", sa.Text, nullable=False),
        sa.Column("user", sa.Text, index=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("value", sa.JSON, nullable=False),
        sa.Column("idempotency_key", sa.Text),
        sa.Column("digest", sa.String(64), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_feedback_idempotency", "feedback", ["tenant", "idempotency_key"], unique=True)
    op.create_table(
        "feedback_answers",
        sa.Column("feedback", NUMBER, sa.ForeignKey("feedback.seq", ondelete="CASCADE"), primary_key=True),
        sa.Column("place", sa.Integer, primary_key=True),
        sa.Column("generation", sa.String(128), index=True),
        sa.Column("user", sa.Text, index=True),
        sa.Column("data", sa.JSON, nullable=False),
    )
    op.create_table(
        "feedback_profiles",
        sa.Column("feedback", NUMBER, sa.ForeignKey("feedback.seq", ondelete="CASCADE"), primary_key=True),
        sa.Column("place", sa.Integer, primary_key=True),
        sa.Column("profile", sa.String(64), primary_key=True),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("strength", sa.Float, nullable=False),
    )
    op.create_index("ix_feedback_profiles_profile", "feedback_profiles", ["profile", "version"])
    op.create_table(
        "deleted_users",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("deleted", sa.Float, nullable=False),
    )


def downgrade() -> None:
    for table in ("deleted_users", "feedback_profiles", "feedback_answers", "feedback", "generations"):
        op.drop_table(table)
