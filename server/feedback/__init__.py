"""What people say about answers, and the answers themselves where the server keeps them: tables, migrations, the
writer, retention, and the formats of exports. It knows nothing of bodies, and engines only by their messages.

`store`, `keeping`, `items` and `writer` load no SQLAlchemy, so that a server without feedback does without it."""
