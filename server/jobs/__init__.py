"""Background jobs: fits, calibrations and evaluations, each in a process of its own. What a job is, the queue, the
worker, the child that computes, and the publication of what it made. It knows nothing of bodies. The child knows no
database.

`job` and `kinds` load no SQLAlchemy and no torch, so that a server without jobs does without them."""
